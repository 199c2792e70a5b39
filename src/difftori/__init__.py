"""difftori: differentiable trajectory optimisation for PyTorch, and policies defined by an optimisation problem.

`difftori.solver` differentiates through the optimum of any batch of cost functions. `difftori.plan` is its shortcut for
control, `difftori.load(RUN)` a trained policy or agent that acts, `difftori.save` writes one. The command line trains them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difftori.controller import Controller
    from difftori.loading import load, save
    from difftori.planning import EnergyObjective, Plan, Planner, ReturnObjective, plan

__version__ = "0.1.0"

__all__ = ["Controller", "EnergyObjective", "Plan", "Planner", "ReturnObjective", "__version__", "load", "plan", "save"]


def __getattr__(name: str) -> Any:
    """Import the names above at their first use, so that `difftori --help` does not import torch."""
    if name == "Controller":
        return import_module("difftori.controller").Controller
    if name in ("load", "save"):
        return getattr(import_module("difftori.loading"), name)
    if name in __all__:
        return getattr(import_module("difftori.planning"), name)
    raise AttributeError(f"module 'difftori' has no attribute {name!r}")

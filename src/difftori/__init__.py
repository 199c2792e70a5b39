"""difftori: policies that are optimisers. Differentiable trajectory optimisation for PyTorch.

`difftori.solver` differentiates through the optimum of any batch of cost functions; `plan` is its door for control;
`difftori.policies` and the command line put it to work in imitation learning.
"""

from difftori.planning import EnergyObjective, Plan, Planner, ReturnObjective, plan

__version__ = "0.1.0"

__all__ = ["EnergyObjective", "Plan", "Planner", "ReturnObjective", "__version__", "plan"]

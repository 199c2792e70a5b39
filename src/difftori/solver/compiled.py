"""torch.compile for solves of fixed shape: opt-in. Every iterate equals the eager one up to rounding.

Four pieces are compiled: a chunk of solver steps, the gradient at the solution with its graph, the dense Hessian, and a
solve by conjugate gradients (newton.py).
What decides between rows (convergence, failure, factorisation) stays eager, where it may look at the numbers: after each chunk.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from difftori.errors import SolverError
from difftori.solver.derivatives import value_and_grad, value_grad_hessian
from difftori.solver.objective import Objective
from difftori.types import Hessians, Points, Rows

if TYPE_CHECKING:
    from difftori.solver.method import Problem, Solver, State

# Every new shape, solver and kind of objective is one compilation of the same code; torch's default allows 8.
_COMPILATIONS = 256


def compiled_steps(
    solver: "Solver", problem: "Problem", x: Points, state: "State", count: int
) -> "tuple[Points, State]":
    """`count` steps of a solver as one compiled function."""
    return compiled_call(_steps, solver, problem, x, state, count)


def compiled_value_and_grad(objective: Objective, x: Points, create_graph: bool) -> tuple[Rows, Points]:
    """`value_and_grad`, compiled."""
    return compiled_call(value_and_grad, objective, x, create_graph)


def compiled_value_grad_hessian(objective: Objective, x: Points) -> tuple[Rows, Points, Hessians]:
    """`value_grad_hessian`, compiled."""
    return compiled_call(value_grad_hessian, objective, x)


def _steps(solver: "Solver", problem: "Problem", x: Tensor, state: "State", count: int):
    for _ in range(count):
        x, state = solver.step(problem, x, state)
    return x, state


@cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def compiled_call(function: Callable, *arguments):
    """function(*arguments), compiled for these shapes at the first such call.

    Raises:
        SolverError: torch.compile cannot trace the solver or the objective.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second to load; not before it is needed

    limits = torch._dynamo.config.patch(  # noqa: SLF001 (the only way to raise the limit for one call)
        recompile_limit=_COMPILATIONS, accumulated_recompile_limit=4 * _COMPILATIONS
    )
    try:
        with limits:
            return _compile(function)(*arguments)
    except TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SolverError(
            f"compile=True: torch.compile cannot trace this solve ({reason}). Solve without it, or take another solver: "
            "Newton, GaussNewton, ILQR and Levenberg–Marquardt on stacked residuals decide by the numbers within a step, and "
            "a generator cannot be traced either. If it is none of these, look for .item() or the like in the cost."
        ) from error

"""torch.compile for solves and updates of fixed shape: opt-in. Every iterate equals the eager one up to rounding.

Of a solve, five pieces are compiled: a chunk of solver steps (solve.py), the gradient at the solution with its graph, the
dense Hessian, the costs of candidates (method.py), and a chunk of conjugate gradients (newton.py).
What decides between rows (convergence, failure, factorisation) stays eager, where it may look at the numbers: after each chunk.
Of an agent's update, its losses are (agents/tdmpc.py, agents/difftori.py).
"""

from collections.abc import Callable
from functools import cache

import torch

from difftori.errors import SolverError

# Every new shape, solver and kind of objective is one compilation of the same code; torch's default allows 8.
_COMPILATIONS = 256


@cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def compiled_call(function: Callable, *arguments):
    """function(*arguments), compiled for these shapes at the first such call.

    Raises:
        SolverError: torch.compile cannot trace the solver or the objective.
    """
    from torch._dynamo.exc import (  # takes a second; not before it is needed
        FailOnRecompileLimitHit,
        TorchDynamoException,
    )

    limits = torch._dynamo.config.patch(  # noqa: SLF001 (the only way to raise the limit for one call)
        recompile_limit=_COMPILATIONS, accumulated_recompile_limit=4 * _COMPILATIONS
    )
    try:
        with limits:
            return _compile(function)(*arguments)
    except FailOnRecompileLimitHit as error:
        raise SolverError(
            f"compile=True: more than {_COMPILATIONS} shapes, each compiled anew; keep the number of rows fixed, or go without it"
        ) from error
    except TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SolverError(
            f"compile=True: torch.compile cannot trace this ({reason}). Go without it, or take another solver: "
            "Newton, GaussNewton, ILQR and Levenberg–Marquardt on stacked residuals decide by the numbers within a step. "
            "If it is none of these, look for .item() or the like in the cost or loss."
        ) from error

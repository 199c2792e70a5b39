"""torch.compile for solves and updates of fixed shape: opt-in. Every iterate equals the eager one up to rounding.

Of a solve, five pieces are compiled: a chunk of solver steps (solve.py), the gradient at the solution with its graph, the
dense Hessian, the costs of candidates (method.py), and a chunk of conjugate gradients (newton.py). Of trajectories: rollouts,
derivatives along them, and sweeps (rollout.py, lq.py, kkt.py).
What decides between rows (convergence, failure, factorisation) stays eager, where it may look at the numbers: after each chunk.
Of an agent's update, its losses are (agents/tdmpc.py, agents/difftori.py).
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from difftori.errors import SolverError


def loop(body: Callable, carry: tuple[Tensor, ...], steps: tuple[Tensor, ...]):
    """carry, out = body(carry, (step[i] for step in steps)) for i = 0, 1, …: the last carry, and the outs stacked.

    Eager, a Python loop. Compiled, one loop around one compiled body, so that the time to compile does not grow with
    the number of steps.
    """
    if torch.compiler.is_compiling():
        from torch._higher_order_ops.scan import scan

        def apart(carry, step):
            carry, out = body(carry, step)
            return _apart(carry), _apart(out)

        return scan(apart, _apart(carry), steps)
    outs = []
    for step in zip(*(part.unbind(0) for part in steps), strict=True):
        carry, out = body(carry, step)
        outs.append(out)
    return carry, tuple(torch.stack(part) for part in zip(*outs, strict=True))


def _plain(tensor: Tensor) -> Tensor:
    """The same numbers in the usual layout, dimensions of one element included: another layout is compiled anew."""
    tensor, strides, step = tensor.contiguous(), [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    return tensor.as_strided(tensor.shape, strides[::-1])


def _apart(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies in one memory layout: what a scan carries must keep its layout, and may not share memory with its input."""
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)


# Every new shape, solver and kind of objective is one compilation of the same code; torch's default allows 8.
_COMPILATIONS = 256


@cache
def _compile(function: Callable, lean: bool) -> Callable:
    # A C++ wrapper spares a loop of small kernels most of its time; where kernels are large it only compiles longer.
    options: dict = {"cpp_wrapper": True} if lean else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options or None)


def compiled_call(function: Callable, *arguments, lean: bool = False):
    """function(*arguments), compiled for these shapes at the first such call. `lean`: many small kernels, on a CPU.

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
            return _compile(function, lean)(*(tree_map_only(Tensor, _plain, arguments) if lean else arguments))
    except FailOnRecompileLimitHit as error:
        raise SolverError(
            f"compile=True: more than {_COMPILATIONS} shapes, each compiled anew; keep the number of rows fixed, or go without it"
        ) from error
    except TorchDynamoException as error:
        raise SolverError(f"compile=True: torch.compile cannot trace this: {_reason(str(error))}") from error


def _reason(message: str) -> str:
    """What torch.compile said, in one line, with the fix."""
    if "alias" in message:
        return (
            "the dynamics or costs use several views of one tensor, such as those of `unbind`, which a compiled loop cannot. "
            "Fix: clone() each."
        )
    first = (message.strip().splitlines() or ["no reason given"])[0]
    return (
        f"{first} Fix: go without it, or take another solver: Newton, GaussNewton and Levenberg–Marquardt on stacked "
        "residuals decide by the numbers within a step. If it is none of these, look for .item() or the like in the cost or loss."
    )

"""torch.compile for solves and updates of fixed shape (opt-in). Every iterate equals the eager one up to rounding.

Five parts of a solve are compiled: a chunk of solver steps (solve.py), the gradient at the solution with its graph, the
dense Hessian, the costs of candidates (interface.py), and a chunk of conjugate gradients (newton.py). For trajectories these are
the rollouts, the derivatives along them, and the sweeps (rollout.py, lq.py, kkt.py). For an agent's update these are the
losses (agents/tdmpc.py, agents/difftori.py).
Decisions that depend on values (convergence, failure, factorisation) stay eager and are made after each chunk.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from difftori.errors import SolverError


def loop(body: Callable, carry: tuple[Tensor, ...], steps: tuple[Tensor, ...]):
    """Run carry, out = body(carry, (step[i] for step in steps)) for i = 0, 1, …; return the last carry and the stacked outs.

    Eager: a Python loop. Compiled: one loop around one compiled body, so the compile time does not grow with the number
    of steps.
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
    """The same values in the standard memory layout, including dimensions of one element. Other layouts would be recompiled."""
    tensor, strides, step = tensor.contiguous(), [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    return tensor.as_strided(tensor.shape, strides[::-1])


def _apart(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies in one memory layout: the carry of a scan must keep its layout and must not share memory with its input."""
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)


# Every new shape, solver and type of objective compiles the same code again; the default of torch allows 8.
_COMPILATIONS = 256


@cache
def _compile(function: Callable, lean: bool) -> Callable:
    # A C++ wrapper saves most of the time of a loop of small kernels. With large kernels it only compiles longer.
    options: dict = {"cpp_wrapper": True} if lean else {}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options or None)


def compiled_call(function: Callable, *arguments, lean: bool = False):
    """Call function(*arguments), compiled at the first call with these shapes. `lean`: many small kernels on a CPU; default: False.

    Raises:
        SolverError: torch.compile cannot trace the solver or the objective.
    """
    from torch._dynamo.exc import (  # imported here because it takes a second
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
            f"compile=True: more than {_COMPILATIONS} shapes, each compiled separately. Fix: keep the number of rows fixed, or use compile=False."
        ) from error
    except TorchDynamoException as error:
        raise SolverError(f"compile=True: torch.compile cannot trace this code: {_reason(str(error))}") from error


def _reason(message: str) -> str:
    """The first line of torch.compile's message, with the fix."""
    if "alias" in message:
        return (
            "the dynamics or costs use several views of one tensor, for example those of `unbind`, which a compiled loop does "
            "not support. Fix: clone() each."
        )
    first = (message.strip().splitlines() or ["no reason given"])[0]
    return (
        f"{first} Fix: use compile=False, or another solver: Newton, GaussNewton and Levenberg–Marquardt on stacked "
        "residuals branch on values within a step. With any other solver, remove .item() and similar calls from the cost or loss."
    )


def maybe_compiled(compile: bool, function: Callable, *arguments, lean: bool = False):
    """Call function(*arguments), compiled (see `compiled_call`) or eager."""
    return compiled_call(function, *arguments, lean=lean) if compile else function(*arguments)

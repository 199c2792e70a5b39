"""Checks of the arguments of `solve`, before any computation. Each message names the value and the fix."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, SupportsFloat, SupportsIndex
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

from difftori.errors import BoxError, ObjectiveError, ShapeError, SolverError
from difftori.solver.adjoint import Adjoint
from difftori.solver.box import UNBOUNDED, Box
from difftori.solver.host_reads import reading_is_free
from difftori.solver.interface import Solver, rowwise
from difftori.solver.objective import FunctionObjective, Objective, TrajectoryObjective


def check_transforms() -> None:
    """Raise SolverError inside a transform of `torch.func` or a forward-mode derivative, which would be zero or wrong."""
    if maybe_current_level() is not None or forward_ad._current_level >= 0:  # noqa: SLF001
        raise SolverError(
            "solve: torch.func (vmap, grad, jacrev, jvp, …) and forward-mode derivatives do not support a solve. Fix: use "
            "torch.autograd.grad or torch.autograd.functional.jacobian, and give many problems as the rows of one solve."
        )


def check_start(x0: Tensor) -> None:
    """Check that x0 is a float32 or float64 tensor (B n)."""
    if not isinstance(x0, Tensor):
        raise ShapeError(
            f"solve: x0 is a {type(x0).__name__}, not a tensor. Fix: torch.as_tensor(x0), and write the cost with "
            "torch functions."
        )
    if x0.dtype not in (torch.float32, torch.float64):
        why = "too coarse for a solve" if x0.is_floating_point() else "not a real floating-point type"
        raise ShapeError(
            f"solve: x0 has dtype {x0.dtype}, which is {why}. Fix: solve in float32 or float64, for example x0.float(), and "
            "convert the result."
        )
    if x0.dim() != 2 or x0.shape[1] == 0:
        raise ShapeError(
            f"solve: x0 has shape {tuple(x0.shape)}, not (B n). Fix: pass B independent problems of n ≥ 1 variables "
            "(one problem: x0[None])."
        )


def check_types(
    solver: Solver, adjoint: Adjoint | None, box: Box | None, max_steps: int, tolerance: float | None
) -> None:
    """Check that each argument is of its type, not a class, a name or a pair."""
    for name, value, wanted, example in (
        ("solver", solver, Solver, "ProjectedGradient()"),
        ("adjoint", adjoint, Adjoint | None, "Implicit()"),
        ("box", box, Box | None, "Box(-1.0, 1.0)"),
        ("max_steps", max_steps, SupportsIndex, "100"),
        ("tolerance", tolerance, SupportsFloat | None, "1e-6"),
    ):
        if isinstance(value, type) or not isinstance(value, wanted):
            raise SolverError(f"solve: {name}={value!r} is not valid. Fix: for example {name}={example}.")


def check_settings(
    solver: Solver, objective: Objective, x0: Tensor, max_steps: int, tolerance: float | None, keep: str, compile: bool
) -> None:
    """Check that the settings are in range and fit the solver and the objective."""
    if max_steps < 0:
        raise SolverError(f"solve: max_steps={max_steps} is negative. Fix: use 0 or more.")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise SolverError(f"solve: tolerance={tolerance} is no finite number from 0 on. Fix: for example 1e-6.")
    if keep not in ("best", "last"):
        raise SolverError(f'solve: keep={keep!r} is unknown. Fix: use "best" or "last".')
    if compile and not solver.compilable(objective):
        raise SolverError(
            f"solve: {type(solver).__name__} on a {type(objective).__name__} cannot be compiled, because a step branches on "
            "values. Fix: compile=False, or another solver, such as ProjectedGradient()."
        )
    if isinstance(objective, TrajectoryObjective) and objective.state.device != x0.device:
        raise ObjectiveError(
            f"solve: the objective's state is on {objective.state.device} and x0 is on {x0.device}. "
            "Fix: move one of them, for example x0.to(state.device)."
        )


def check_functions(objective: Objective, x0: Tensor, **constraints: Callable[[Tensor], Tensor] | None) -> None:
    """Check the rows of an objective that is a callable, and of constraints, once for each piece of code."""
    cost = objective.function if isinstance(objective, FunctionObjective) else None
    for name, function in {"objective": cost, **constraints}.items():
        if function is not None and len(x0) > 1 and (code := _code(function)) not in _checked_code:
            check_rows(name, function, x0)
            _checked_code.add(code)


_checked_code: WeakSet[Any] = WeakSet()


def _code(function: Any) -> Any:
    """The code object of a function, of the function in a partial or under a decorator, or of a module's or an object's call."""
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(function)
    if isinstance(function, nn.Module):
        function = type(function).forward
    return getattr(function, "__code__", getattr(type(function).__call__, "__code__", type(function)))


def check_rows(name: str, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Raise ObjectiveError if rows of a function of `inputs` (B …) depend on each other: if a change of the first or the last row changes others.

    Four evaluations, which leave the global random numbers as they were. Nothing is checked where values are not read for free, as on a
    GPU, nor if the function draws random numbers or refuses the changed row.
    """
    if len(inputs[0]) < 2 or not reading_is_free(inputs[0].device):
        return
    given, last = [values.detach() for values in inputs], len(inputs[0]) - 1
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            before = function(*given)
            fixed = ~_differ(before, function(*given))
            moved = {row: fixed & _differ(before, function(*_with_change(given, row))) for row in (0, last)}
            found = [(row, to) for to in moved for row in moved[to].nonzero()[:, 0].tolist() if row != to]
        except Exception:  # noqa: BLE001
            return
    if found:
        row, changed = found[0]
        raise ObjectiveError(
            f"{name}: the value of row {row} depends on row {changed}, but rows are independent problems. Fix: reduce over the last "
            "dimension only, such as x.norm(dim=-1, keepdim=True) instead of x.norm()."
        )


def _with_change(inputs: list[Tensor], changed: int) -> list[Tensor]:
    row = torch.arange(len(inputs[0])) == changed
    return [torch.where(rowwise(row, values), 0.7 * values + 0.1, values) for values in inputs]


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Where two results differ by more than rounding."""
    rounding = 1e3 * torch.finfo(one.dtype).eps
    return ~torch.isclose(
        one, other, rtol=rounding, atol=rounding * float(one.nan_to_num().abs().max()), equal_nan=True
    )


def checked_box(x0: Tensor, box: Box | None, candidates: Tensor | None, *, inside: bool) -> Box:
    """The box with bounds shaped for x0. Checks that candidates and x0 fit, and with `inside` that x0 lies in the box."""
    if candidates is not None and not isinstance(candidates, Tensor):
        raise ShapeError(
            f"solve: candidates are a {type(candidates).__name__}, not a tensor (K B n). "
            "Fix: torch.as_tensor(candidates).to(x0)."
        )
    if candidates is not None and candidates.shape[1:] != x0.shape:
        raise ShapeError(
            f"solve: candidates have shape {tuple(candidates.shape)}. Fix: use (K B n) with (B n) = {tuple(x0.shape)}."
        )
    if candidates is not None and (candidates.dtype, candidates.device) != (x0.dtype, x0.device):
        raise ShapeError(
            f"solve: candidates are {candidates.dtype} on {candidates.device}, but x0 is {x0.dtype} on {x0.device}. "
            "Fix: candidates.to(x0)."
        )
    bounds = (UNBOUNDED if box is None else box).to(x0)
    if not inside:
        return bounds
    slack = 1e-6 if x0.dtype == torch.float64 else 1e-4
    outside = ~(bounds.contains(x0.detach(), slack) | torch.isnan(x0.detach()))
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise BoxError(
            f"solve: x0[{row}, {column}] = {x0[row, column].item():g} lies outside the box. "
            "Fix: start inside it, for example from box.project(x0)."
        )
    return bounds

"""The check of a solver's numbers, where it is made."""

import math
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from difftori.errors import SolverError


def check_settings(owner: Any, **intervals: str) -> None:
    """Raise SolverError for a setting of the dataclass `owner` that is outside of its interval, such as `"[0, 1)"` or `"(0, inf)"`.

    Settings whose type is int must be whole numbers. Of a tuple, every number is checked, and there must be one. None and tensors are not
    checked.
    """
    defaults, whole = _declared(type(owner))
    for name, interval in intervals.items():
        value = getattr(owner, name)
        if value is None or isinstance(value, Tensor):
            continue
        numbers = value if isinstance(value, tuple | list) else (value,)
        alike = isinstance(value, tuple | list) == isinstance(defaults[name], tuple)
        if not alike or not numbers or not all(_is_in(number, interval, name in whole) for number in numbers):
            kind = "numbers" if isinstance(defaults[name], tuple) else "a whole number" if name in whole else "a number"
            raise SolverError(f"{type(owner).__name__}: {name}={value!r} is invalid. Fix: use {kind} in {interval}.")


@cache  # solvers are made in every update and step of a policy
def _declared(kind: type) -> tuple[dict[str, Any], set[str]]:
    """The defaults of a dataclass, and its settings of type int."""
    declared = fields(kind)
    return {field.name: field.default for field in declared}, {f.name for f in declared if f.type in (int, int | None)}


@cache
def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _is_in(number: Any, interval: str, whole: bool) -> bool:
    low, high = _ends(interval)
    if isinstance(number, bool) or not isinstance(number, Integral if whole else Real):
        return False
    number = float(number)
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return above and below and math.isfinite(number)

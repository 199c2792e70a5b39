"""Typed errors. Each message names the value at fault, where it was met, and the fix."""

import difflib
from collections.abc import Iterable, Mapping


class DifftoriError(Exception):
    """Base of every error that this package raises on purpose."""


class ShapeError(DifftoriError, ValueError):
    """A tensor has another shape or type than the one documented."""


class BoxError(DifftoriError, ValueError):
    """A box is empty, inverted or not finite where it must be, or a point lies outside it."""


class ObjectiveError(DifftoriError, ValueError):
    """An objective does not return one cost per row, or does not depend on what is optimised."""


class SolverError(DifftoriError, ValueError):
    """A solver or adjoint was given a setting, or an objective, that it cannot work with."""


class NonFiniteError(DifftoriError, ArithmeticError):
    """NaN or Inf was met where it would otherwise spread silently."""


class ConfigError(DifftoriError, ValueError):
    """A configuration has faults; `faults` lists every one of them."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("\n".join(faults))


class CheckpointError(DifftoriError, RuntimeError):
    """No valid checkpoint could be read or written; the message names the files and what is wrong with them."""


class DataError(DifftoriError, ValueError):
    """A data set is missing, truncated, wrong-shaped, or holds NaN or Inf."""


class MissingExtraError(DifftoriError, ImportError):
    """An optional dependency is absent; the message names the extra that installs it."""


def suggest(word: str, known: Iterable[str], written: Mapping[str, str] | None = None) -> str:
    """The end of an error message: the nearest known name, or all of them when none is near.

    `written` says how to write some of the names, where that is not the name itself.
    """
    names = sorted(known)
    labels = {name: name for name in names} | dict(written or {})
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; perhaps you meant {labels[near[0]]!r}"
    return f"; known: {', '.join(labels[name] for name in names)}" if names else "; none is known"

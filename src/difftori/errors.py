"""Typed errors. Each message names the invalid value, where it was found, and the fix."""

import difflib
from collections.abc import Iterable, Mapping


class DifftoriError(Exception):
    """Base class of all errors that this package raises on purpose."""


class ShapeError(DifftoriError, ValueError):
    """A tensor has another shape or type than documented."""


class BoxError(DifftoriError, ValueError):
    """A box is empty, inverted or not finite where it must be, or a point lies outside it."""


class ObjectiveError(DifftoriError, ValueError):
    """An objective does not return one cost per row, or does not depend on the optimised variables."""


class SolverError(DifftoriError, ValueError):
    """A solver or adjoint does not support a setting or an objective."""


class NonFiniteError(DifftoriError, ArithmeticError):
    """A NaN or Inf was found where it would otherwise spread silently."""


class ConfigError(DifftoriError, ValueError):
    """A configuration is invalid. `faults` lists every error."""

    def __init__(self, faults: list[str]):
        self.faults = faults
        super().__init__("\n".join(faults))


class CheckpointError(DifftoriError, RuntimeError):
    """No valid checkpoint could be read or written. The message names the files and their errors."""


class DataError(DifftoriError, ValueError):
    """A data set is missing, truncated, has the wrong shape, or contains NaN or Inf."""


class MissingExtraError(DifftoriError, ImportError):
    """An optional dependency is not installed. The message names the extra that installs it."""


class ServingError(DifftoriError, RuntimeError):
    """A policy server is not reachable, or it refused the client or a message; or a message is malformed."""


class ExportError(DifftoriError, RuntimeError):
    """The function cannot be exported, or the exported file computes other actions."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def brief(error: BaseException) -> str:
    """The class of an error, and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no details'}"


def suggest(word: str, known: Iterable[str], written: Mapping[str, str] | None = None) -> str:
    """The end of an error message: the nearest known name, or all known names if none is near.

    `written`: labels for names that the user writes differently. Default: the name itself.
    """
    names = sorted(known)
    labels = {name: name for name in names} | dict(written or {})
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; perhaps you meant {labels[near[0]]!r}"
    return f"; known: {', '.join(labels[name] for name in names)}" if names else "; none is known"

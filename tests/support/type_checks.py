"""Runtime checks of annotated types and shapes, for the first calls of each test.

Checking every call would triple the time of the solver's tests, whose loops repeat the same calls many times.
"""

import functools
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import config

CHECKS = 3_000
"""Number of checks per test. A call has two: of its arguments and of its result."""

_left = CHECKS


def start() -> None:
    """Check the next calls."""
    global _left
    _left = CHECKS
    config.update("jaxtyping_disable", False)


def stop() -> None:
    """Check nothing more in this test, so that invalid arguments reach this package's own checks."""
    config.update("jaxtyping_disable", True)


def first_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check types with beartype until the number of checks is used up (jaxtyping's typechecker)."""
    check = beartype(function)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _left
        _left -= 1
        if _left <= 0:
            config.update("jaxtyping_disable", True)
        return check(*args, **kwargs)

    return counted

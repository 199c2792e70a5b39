"""Whether a solve may read values to save operations: not on a GPU, nor while it is traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ALL_STEPS = ContextVar("_ALL_STEPS", default=False)


@contextmanager
def all_steps() -> Iterator[None]:
    """Solves without a tolerance read no value on the CPU either, as on a GPU, so that they can be traced."""
    token = _ALL_STEPS.set(True)
    try:
        yield
    finally:
        _ALL_STEPS.reset(token)


def reading_is_free(device: torch.device) -> bool:
    """Whether a value on this device is read without waiting for it, outside `all_steps`."""
    return device.type == "cpu" and not _ALL_STEPS.get()

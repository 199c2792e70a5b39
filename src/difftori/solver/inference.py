"""Solving under `torch.inference_mode()`: a solve computes gradients, which inference tensors do not support."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Leave inference mode, and replace every inference tensor by a copy when an operation uses it.

    No graph leaves the context if inference mode was on, as under `torch.no_grad()`.
    """
    if not torch.is_inference_mode_enabled():
        with _Copies():
            yield
        return
    with torch.inference_mode(False), torch.no_grad(), _Copies():
        yield


def without_inference_tensors(run: Callable[[], T]) -> T:
    """The result of `run`, with normal tensors if inference mode is on or autograd raises an error for an inference tensor,
    such as a weight created in inference mode. Otherwise this has no cost.
    """
    if not torch.is_inference_mode_enabled():
        try:
            return run()
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
    with normal_tensors():
        return run()


class _Copies(TorchFunctionMode):
    """Call every torch function with normal tensors. Each inference tensor is copied once."""

    def __init__(self):
        super().__init__()
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, self._copy, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _copy(self, tensor: Tensor) -> Tensor:
        if not tensor.is_inference():
            return tensor
        if id(tensor) not in self._copies:
            # The original is stored too, so that its id is not reused.
            self._copies[id(tensor)] = (tensor, tensor.detach().clone())
        return self._copies[id(tensor)][1]

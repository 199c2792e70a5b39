"""Solving under `torch.inference_mode()`: a solve needs gradients of its own, which inference tensors do not give."""

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
    """Out of inference mode, with every inference tensor replaced by a copy where an operation meets it.

    No graph reaches outside where inference mode was on, as under `torch.no_grad()`.
    """
    if not torch.is_inference_mode_enabled():
        with _Copies():
            yield
        return
    with torch.inference_mode(False), torch.no_grad(), _Copies():
        yield


def without_inference_tensors(run: Callable[[], T]) -> T:
    """The result of `run`, with normal tensors where inference mode is on or autograd complains of an inference tensor,
    such as a weight made in inference mode. Anywhere else this costs nothing.
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
    """Calls every torch function with normal tensors; each inference tensor is copied once."""

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
            # The original is kept as well, so that its id stays its own.
            self._copies[id(tensor)] = (tensor, tensor.detach().clone())
        return self._copies[id(tensor)][1]

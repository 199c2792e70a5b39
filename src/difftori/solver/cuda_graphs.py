"""CUDA graphs: a function of tensors, recorded once for each shape of its arguments and replayed as one launch."""

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from difftori.errors import first_line

_log = logging.getLogger(__name__)

_WARM_UP = 2
"""Runs before the recording, in which libraries allocate their workspaces."""

_REMEMBERED = 32
"""Number of latest combinations of arguments that are remembered until their second call."""

_KEPT = 8
"""Number of recordings that are kept; the least recently used are dropped first, with their memory."""

Recorder = Callable[[Callable[[], Any], Sequence[torch.Generator]], tuple[Callable[[], None], Any]]
"""Records a run that uses some generators, on the current device. Returns a function that repeats it, and the tensors to which the results are written."""


@dataclass(frozen=True)
class _Recording:
    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: Any


class Captured:
    """A function of tensors, on a CUDA device recorded as a CUDA graph and replayed.

        plan = Captured(lambda state, x0: solve(cost_of(state), x0, max_steps=20, tolerance=0.0, adjoint=Detached(), project_start=True).x)
        x = plan(state, x0)

    A short solve is hundreds of small kernels, and launching them one by one takes most of its time on a GPU; a graph is one
    launch. Arguments and results may be tensors in tuples, lists and dictionaries. Arguments that are not tensors must be
    hashable. Each combination of shapes, dtypes and other arguments has a recording of its own, made at its second call.
    The results have no graph of derivatives.

    The function must not read values of tensors on the host nor copy between devices: a fixed number of steps
    (`tolerance=0.0`), a box of numbers, `project_start=True`. If it does, or if the arguments are not on a CUDA device, it
    is called as it is; the reason is logged once. It may use other tensors, such as the weights of a network, and sees them
    changed in place, but not replaced.

    `generators`: the random generators that the function uses. `recorder`: records in place of a CUDA graph, on any device.
    `changing`: returns the tensors that it changes in place, such as the weights that it trains; they are restored after
    the runs that a recording needs.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        generators: Sequence[torch.Generator] = (),
        changing: Callable[[], Sequence[Tensor]] = tuple,
        recorder: Recorder | None = None,
    ):
        self._function, self._generators, self._changing = function, tuple(generators), changing
        self._record = recorder or _Graphs()
        self._always = recorder is not None
        self._recordings: dict[Hashable, _Recording] = {}
        self._seen: dict[Hashable, None] = {}
        self._warned = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The function's result, in tensors of its own."""
        leaves, form = tree_flatten((arguments, options))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors or not all(self.records(tensor.device) for tensor in tensors):
            return self._eager(arguments, options)
        with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext():
            key = (form, tuple(_kind(leaf) for leaf in leaves))
            recording = self._recordings.pop(key, None) or self._recorded(key, arguments, options)
            if recording is None:
                return self._eager(arguments, options)
            self._recordings[key] = recording  # the latest last
            while len(self._recordings) > _KEPT:
                dropped = next(iter(self._recordings))
                del self._recordings[dropped]
                self._seen.pop(dropped, None)
            for static, tensor in zip(recording.inputs, tensors, strict=True):
                static.copy_(tensor)
            recording.replay()
            return tree_map_only(Tensor, Tensor.clone, recording.outputs)

    def records(self, device: torch.device) -> bool:
        """Whether calls with tensors on this device are recorded."""
        return self._always or device.type == "cuda"

    def _eager(self, arguments: Any, options: Any) -> Any:
        return tree_map_only(Tensor, Tensor.detach, self._function(*arguments, **options))

    def _recorded(self, key: Hashable, arguments: Any, options: Any) -> _Recording | None:
        """Record the function with these arguments; None at their first call, or if it is impossible."""
        if self._warned or key not in self._seen:
            self._seen[key] = None
            while len(self._seen) > _REMEMBERED:
                del self._seen[next(iter(self._seen))]
            return None
        inputs: list[Tensor] = []

        def own(tensor: Tensor) -> Tensor:
            inputs.append(tensor.detach().clone())
            return inputs[-1]

        statics, named = tree_map_only(Tensor, own, (arguments, options))
        states = [generator.get_state() for generator in self._generators]
        before = [(tensor, tensor.detach().clone()) for tensor in self._changing()]
        try:
            replay, outputs = self._record(lambda: self._function(*statics, **named), self._generators)
        except RuntimeError as error:
            self._warned = True
            _log.warning("no CUDA graph, so this runs kernel by kernel, which is slower: %s", first_line(error))
            return None
        finally:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            with torch.no_grad():
                for tensor, old in before:
                    tensor.copy_(old)
        return _Recording(inputs, replay, tree_map_only(Tensor, Tensor.detach, outputs))


def _kind(leaf: Any) -> Hashable:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class _Graphs:
    """Records runs as CUDA graphs that share memory, because they are replayed one after another."""

    def __init__(self):
        self._pool: Any = None

    def __call__(self, run: Callable[[], Any], generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], Any]:
        """Record a run on the current device, after some runs without recording."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # around all, so that a failure leaves the stream as it was
            for _ in range(_WARM_UP):
                run()
            with _no_reads():
                run()
            for generator in generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                outputs = run()
        torch.cuda.current_stream().wait_stream(side)
        return graph.replay, outputs


@contextmanager
def _no_reads() -> Iterator[None]:
    """Raise RuntimeError if the host waits for the device: such a run cannot be recorded, and a recording that fails is not undone cleanly."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

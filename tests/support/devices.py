"""A device without a GPU: tensors on torch's `meta` device have shapes but no values, so a value that is read shows itself."""

import traceback
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.operations import READS

COPIES = ("_to_copy", "copy_")


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.faults: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        target = kwargs.get("device")
        if name in COPIES and len(devices | ({target.type} if target is not None else set())) > 1:
            self.faults.append(f"a copy between devices: {name} at {_place()}")
        if name in READS and "meta" in devices:
            self.faults.append(f"a value is read: {name} at {_place()}")
            raise AssertionError(self.faults[-1])
        return func(*args, **kwargs)


def _place() -> str:
    ours = [frame for frame in traceback.extract_stack() if "/difftori/" in frame.filename]
    return f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "the test"


@contextmanager
def never_waits():
    """Fail if the body reads a value of a tensor on the device `meta`, or copies between it and the CPU."""
    watch = _Watch()
    with watch:
        yield
    assert not watch.faults, "\n".join(watch.faults)


def halves(*shape, generator=None, **options):
    """In place of `torch.rand`, which takes no generator on the device `meta`."""
    return torch.full(shape if isinstance(shape[0], int) else shape[0], 0.5, **options)


def rerun(run, generators):
    """In place of a CUDA graph: a replay runs the function again and writes its results to the tensors of the first run."""
    outputs = run()

    def replay():
        for old, new in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
            if isinstance(old, torch.Tensor):
                old.detach().copy_(new)

    return replay, outputs

"""Rows stored by slot number, in memory, in a file or on a device, and gathered by index into batches."""

import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Literal, TypeAlias, final

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from difftori.errors import DataError

Storage: TypeAlias = Literal["memory", "device", "mmap"]
"""`memory`: this process's memory; `device`: the device of the batches; `mmap`: a memory-mapped file."""

_SPARE = 2


@final
class Column:
    """`size` rows of `width` numbers. `gather` copies selected rows to `device`.

    Rows on `device` are gathered there. Other rows are gathered into a reused buffer, because allocating new pages costs
    more than the copy. The buffer is pinned for CUDA; on the CPU it is not reused while a tensor still refers to it.
    """

    def __init__(self, rows: Shaped[Tensor, "size width"], device: torch.device):
        self._rows = rows
        self._device = device
        self._lent: list[tuple[np.ndarray, weakref.ref]] = []
        self._pinned: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def write(self, start: int, values: Shaped[np.ndarray, "B width"]) -> None:
        """Write rows to slots start, start + 1, …, wrapping to 0 after the last. At most as many rows as slots."""
        size = len(self._rows)
        first = min(len(values), size - start)
        self._rows[start : start + first] = torch.from_numpy(values[:first]).to(self._rows.device)
        self._rows[: len(values) - first] = torch.from_numpy(values[first:]).to(self._rows.device)

    def read(self, start: int, count: int) -> Shaped[np.ndarray, "count width"]:
        """Return a copy of `count` rows from slot `start`, wrapping to 0 after the last."""
        slots = (start + torch.arange(count)) % len(self._rows)
        return self._rows.index_select(0, slots.to(self._rows.device)).cpu().numpy()

    def to_rows(self, slots: Int[np.ndarray, "B"]) -> Int[Tensor, "B"]:
        """Return slots as an index on the device where the rows are."""
        return torch.from_numpy(slots).to(self._rows.device)

    def gather(self, slots: Int[np.ndarray, "B"] | Int[Tensor, "B"]) -> Shaped[Tensor, "B width"]:
        """Return the rows of these slots, on `device`. `slots` may be a result of `to_rows`."""
        index = self.to_rows(slots) if isinstance(slots, np.ndarray) else slots
        if self._rows.device.type != "cpu":
            return self._rows.index_select(0, index)
        if self._device.type == "cpu":
            return self._gather_reused(index)
        if self._device.type == "cuda":
            return self._gather_pinned(index)
        return self._rows.index_select(0, index).to(self._device)

    def _gather_reused(self, index: Tensor) -> Tensor:
        free = [buffer for buffer, user in self._lent if user() is None and len(buffer) >= len(index)]
        rows = self._rows.numpy()
        buffer = free[0] if free else np.empty((len(index), rows.shape[1]), rows.dtype)
        # Every tensor made from this array, and every view of it, holds a reference to it, so it dies after all of them.
        view = buffer[: len(index)]
        out = torch.from_numpy(view)
        torch.index_select(self._rows, 0, index, out=out)
        others = [(other, user) for other, user in self._lent if other is not buffer]
        self._lent = [*others, (buffer, weakref.ref(view))][-_SPARE:]
        return out

    def _gather_pinned(self, index: Tensor) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        if self._pinned is None or len(self._pinned) < len(index):
            shape = (len(index), self._rows.shape[1])
            self._pinned = torch.empty(shape, dtype=self._rows.dtype, pin_memory=True)
        out = self._pinned[: len(index)]
        torch.index_select(self._rows, 0, index, out=out)
        batch = out.to(self._device, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(self._device))
        return batch


def make_rows(
    size: int,
    width: int,
    dtype: torch.dtype,
    *,
    storage: Storage,
    folder: Path | None,
    device: torch.device,
    owner: str = "replay",
    less: str = "lower the capacity",
) -> Shaped[Tensor, "size width"]:
    """Allocate `size` rows of `width` numbers.

    "memory" takes pages when they are first written; "device" and "mmap" take all of them at once. The mapped file has
    no name in `folder`, so nothing remains there after a kill.
    Raises DataError if the allocation fails; the message names the `owner` and suggests `less`, a way to need less.
    """
    count = size * width * dtype.itemsize
    try:
        if storage == "device":
            return torch.empty((size, width), dtype=dtype, device=device)
        # numpy allocates in huge pages where the system offers them; torch does not.
        content = np.empty(count, np.uint8) if storage == "memory" else _map_file(count, folder)
        return torch.from_numpy(content).view(dtype).view(size, width)
    except (OSError, RuntimeError, MemoryError, ValueError, OverflowError) as error:
        place = {"memory": "memory", "device": f"memory on {device}", "mmap": f"disk space in {folder}"}[storage]
        raise DataError(
            f"{owner}: no {count / 1e9:.2f} GB of {place} for {size} rows of {width} {dtype} ({error}). "
            f"Fix: free some, {less}, or choose another storage"
        ) from error


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, and 0 for another device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _map_file(count: int, folder: Path | None) -> np.ndarray:
    """Map `count` bytes of an unnamed file. The space is reserved first, because a later write to a full disk kills the process."""
    if sys.platform != "linux":
        raise OSError(f"disk space cannot be reserved on {sys.platform}")
    if folder is None:
        raise OSError("no folder was given")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, count)
        return np.memmap(file, dtype=np.uint8, mode="r+", shape=(count,))

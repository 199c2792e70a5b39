"""Checkpoints that survive a kill, a full disk and a flipped byte.

A checkpoint is a directory `step-N` with `state.pt` and `MANIFEST.json`. It is written under the name `step-N.tmp`,
with the sha256 of what is written in the manifest; the files and the directory are flushed to the disk; only then is
it renamed, and the parent flushed. A reader therefore meets a whole checkpoint or none. Because a flipped byte loads
silently in torch.load, the reader compares the hashes first; a damaged directory is set aside as `corrupt-step-N` and
the one before it is used.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from difftori.errors import CheckpointError

State: TypeAlias = dict[str, Any]
"""Tensors, numbers, text, None, and lists, tuples and dictionaries of them: what can be read back without pickled code."""

_FORMAT = 1
_STATE = "state.pt"
_MANIFEST = "MANIFEST.json"
_BEST = "BEST"
_SUPERSEDED = ".superseded"
_PLAIN = (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device)
_READ_FAULTS = (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, ImportError)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as read: the step it was taken at, where it lies, and its state, on the CPU."""

    step: int
    path: Path
    state: State


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, in the directory `root`; the last `keep` stay, and the one marked best."""

    root: Path
    keep: int = 2

    def save(self, step: int, state: State, *, best: bool = False) -> Path:
        """Write `state` as `step-N`, then drop what is older than the last `keep`.

        One of the same step is replaced if its state is another. `best` also marks this one as the best, which keeps it.
        Raises CheckpointError if the state holds what cannot be read back safely, or if it cannot be written; then
        the earlier checkpoints are intact and nothing half-written is left.
        """
        content = pack(state)
        final = self.root / f"step-{step}"
        partial = self.root / f"step-{step}.tmp"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            if final.exists() and _fault(final, step) is not None:
                _quarantine(final)
            if not final.exists() or json.loads((final / _MANIFEST).read_bytes()) != _manifest(step, content):
                _write(partial, step, content)
                if final.exists():
                    os.rename(final, final.with_name(final.name + _SUPERSEDED))
                os.rename(partial, final)
                flush_directory(self.root)
                self._settle()
            if best:
                replace_file(self.root / _BEST, f"{final.name}\n".encode())
        except (OSError, RuntimeError, MemoryError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{final}: cannot be written ({error}); the earlier checkpoints are intact. "
                "Free space on that disk, or give another directory, and start the same command again"
            ) from error
        self._prune()
        return final

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, valid or not, ascending."""
        names = [p.name.removeprefix("step-") for p in self.root.glob("step-*") if p.is_dir()]
        return sorted(int(name) for name in names if _is_step(name))

    def latest(self, *, repair: bool = True) -> Checkpoint | None:
        """The newest valid checkpoint; None if there has never been one.

        Damaged ones that are newer are renamed to `corrupt-…` (with `repair=False` only passed over) and reported in
        the log. Raises CheckpointError if there are only damaged ones.
        """
        faults = []
        if repair:
            self._settle()
        for step in reversed(self.steps()):
            path = self.root / f"step-{step}"
            try:
                found = Checkpoint(step, path, _read(path, step))
            except CheckpointError as error:
                faults.append(_pass_over(error, _quarantine(path) if repair else path))
                continue
            return found
        damaged = sorted(p.name for p in self.root.glob("corrupt-*"))
        if faults or damaged:
            raise CheckpointError(
                f"{self.root}: no valid checkpoint is left; damaged: {'; '.join(faults or damaged)}. Nothing was "
                "overwritten: restore a copy, or start again in another directory"
            )
        return None

    def set_aside(self, step: int, fault: Exception) -> None:
        """Rename a checkpoint whose companions are damaged, so that `latest` finds the one before."""
        _pass_over(fault, _quarantine(self.root / f"step-{step}"))

    def best(self) -> Checkpoint:
        """The checkpoint marked best. Raises CheckpointError if none is marked or it is damaged."""
        try:
            name = (self.root / _BEST).read_text().strip()
        except OSError as error:
            raise CheckpointError(f"{self.root}: no checkpoint is marked best ({error})") from error
        step = name.removeprefix("step-")
        if not _is_step(step):
            raise CheckpointError(f"{self.root / _BEST}: holds {name!r} instead of the name of a checkpoint")
        path = self.root / f"step-{step}"
        return Checkpoint(int(step), path, _read(path, int(step)))

    def _settle(self) -> None:
        """Drop checkpoints whose successor of the same step is there; put those back that a kill left without one."""
        for old in self.root.glob(f"step-*{_SUPERSEDED}"):
            final = old.with_name(old.name.removesuffix(_SUPERSEDED))
            if final.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, final)

    def _sweep(self) -> None:
        self._settle()
        for leftover in self.root.glob("*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def _prune(self) -> None:
        """Drop old checkpoints; each is renamed first, so that a kill leaves none that is only half there."""
        best = self.root / _BEST
        marked = best.read_text().strip() if best.exists() else ""
        for step in self.steps()[: -self.keep]:
            path = self.root / f"step-{step}"
            if path.name == marked:
                continue
            doomed = path.with_name(f"{path.name}.old.tmp")
            try:
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                _log.warning("an old checkpoint could not be removed: %s", error)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill, sees the old content or the new, never a part. Raises OSError."""
    partial = path.with_name(path.name + ".tmp")
    try:
        _write_flushed(partial, content)
        os.replace(partial, path)
        flush_directory(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def flush_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(state: State) -> bytes:
    """`state` as the bytes of a torch file that `unpack` reads back. Raises CheckpointError naming what cannot be."""
    _require_plain(state, "state")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpack(content: bytes, source: Path) -> State:
    """Read a torch file without running any code that it may hold. Raises CheckpointError naming `source`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on foreign pickles before it refuses them
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_READ_FAULTS) as error:
        raise CheckpointError(
            f"{source}: refused, it is damaged or holds more than tensors and plain values ({_first_line(error)})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{source}: holds a {type(state).__name__}, not the dictionary of a checkpoint")
    return state


def digest(content: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_weights(path: Path, state: State) -> None:
    """Write a finished run's weights, with the sha256 in a file beside them. Raises CheckpointError if it cannot."""
    content = pack(state)
    try:
        replace_file(path, content)
        replace_file(path.with_name(f"{path.name}.sha256"), f"{digest(content)}  {path.name}\n".encode())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); free space and start again") from error


def read_weights(path: Path) -> State:
    """What `write_weights` wrote, or, if the run of that directory is not finished, the state of its newest checkpoint.

    Raises CheckpointError if neither is there, or the weights are damaged.
    """
    if not path.exists():
        found = Checkpoints(path.parent / "checkpoints").latest(repair=False)
        if found is None:
            raise CheckpointError(f"{path.parent}: neither {path.name} nor a checkpoint; train it first")
        return found.state["state"]
    record = path.with_name(f"{path.name}.sha256")
    try:
        content = path.read_bytes()
        expected = record.read_text().split()[:1]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read with its sha256 ({error})") from error
    if expected != [digest(content)]:
        raise CheckpointError(
            f"{path}: its sha256 is not the one in {record.name}: damaged; remove both to use the last checkpoint"
        )
    return unpack(content, path)


def weights_digest(module: nn.Module) -> str:
    """The sha256 of a module's parameters and buffers, names included: equal only if every bit is."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(name.encode())
        if isinstance(value, Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _write(partial: Path, step: int, content: bytes) -> None:
    partial.mkdir()
    _write_flushed(partial / _STATE, content)
    _write_flushed(partial / _MANIFEST, json.dumps(_manifest(step, content), indent=1).encode())
    flush_directory(partial)


def _manifest(step: int, content: bytes) -> dict[str, Any]:
    files = {_STATE: {"sha256": digest(content), "bytes": len(content)}}
    return {"format": _FORMAT, "step": step, "files": files}


def _write_flushed(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, step: int) -> State:
    """The state of one checkpoint, once its hash is found right; CheckpointError otherwise."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        content = (path / _STATE).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {_first_line(error)}") from error
    if manifest != _manifest(step, content):
        raise CheckpointError(
            f"{path}: {_STATE} ({len(content)} bytes, sha256 {digest(content)[:12]}…) is not what {_MANIFEST} says "
            f"it is, or the manifest is not of format {_FORMAT}"
        )
    return unpack(content, path / _STATE)


def _fault(path: Path, step: int) -> str | None:
    try:
        _read(path, step)
    except CheckpointError as error:
        return str(error)
    return None


def _pass_over(fault: Exception, where: Path) -> str:
    """Say that a damaged checkpoint is passed over, and return what was said of it."""
    said = f"{fault} [kept as {where.name}]"
    _log.warning("damaged checkpoint passed over: %s", said)
    return said


def _quarantine(path: Path) -> Path:
    """Rename a damaged checkpoint, to a name that is free: renaming onto an existing directory fails."""
    count = 0
    while True:
        target = path.with_name(f"corrupt-{path.name}" + (f"-{count}" if count else ""))
        if not target.exists():
            os.rename(path, target)
            flush_directory(path.parent)
            return target
        count += 1


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdigit() and str(int(text)) == text


def _require_plain(value: object, place: str) -> None:
    """Refuse at writing what the safe reader would refuse at reading."""
    if isinstance(value, Mapping):
        if type(value) not in (dict, OrderedDict):
            raise CheckpointError(f"{place} is a {type(value).__name__}; make it a dict")
        for key, item in value.items():
            _require_plain(key, f"a key of {place}")
            _require_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            _require_plain(item, f"{place}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise CheckpointError(
            f"{place} is a {type(value).__module__}.{type(value).__name__}, which cannot be read back without running "
            "pickled code; turn it into tensors, numbers or text"
        )


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no details'}"

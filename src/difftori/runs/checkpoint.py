"""Checkpoints that survive a kill, a full disk and a flipped byte.

A checkpoint is a directory `step-N` with `state.pt` and `MANIFEST.json`. It is written as `step-N.tmp`, with the sha256 of
the content in the manifest. The files and the directory are flushed to the disk, then the directory is renamed and its
parent flushed. A reader therefore finds a complete checkpoint or none. torch.load does not detect a flipped byte, so the
reader compares the hashes first. A damaged directory is renamed to `corrupt-step-N`, and the previous checkpoint is used.
"""

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from difftori.errors import CheckpointError, NonFiniteError, brief

State: TypeAlias = dict[str, Any]
"""Tensors, numbers, text, None, and lists, tuples and dictionaries of them. These can be read without pickled code."""

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
    """A checkpoint that was read: its step, its path, and its state on the CPU."""

    step: int
    path: Path
    state: State


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, in the directory `root`. The last `keep` (default: 2) and the best one are kept."""

    root: Path
    keep: int = 2

    def save(self, step: int, state: State, *, best: bool = False) -> Path:
        """Write `state` as `step-N`, then delete checkpoints older than the last `keep`.

        A checkpoint of the same step is replaced if its state differs. `best` also marks this checkpoint as the best, so it
        is not deleted. Raises CheckpointError if the state contains values that cannot be read back safely, or if it cannot
        be written. The earlier checkpoints are then intact, and no partial checkpoint remains.
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
                f"{final}: cannot be written ({error}); the earlier checkpoints are intact. Fix: free space on that disk, or "
                "choose another directory, and re-run the same command to resume"
            ) from error
        self._prune()
        return final

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, valid or not, in ascending order."""
        names = [p.name.removeprefix("step-") for p in self.root.glob("step-*") if p.is_dir()]
        return sorted(int(name) for name in names if _is_step(name))

    def latest(self, *, repair: bool = True) -> Checkpoint | None:
        """Return the newest valid checkpoint, or None if there has never been one.

        Newer, damaged checkpoints are renamed to `corrupt-…` and logged; with `repair=False` they are only skipped and
        logged. Raises CheckpointError if all checkpoints are damaged.
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
                "overwritten. Fix: restore a copy, or start over in another directory"
            )
        return None

    def set_aside(self, step: int, fault: Exception) -> None:
        """Rename a checkpoint whose associated files are damaged, so that `latest` returns the previous one."""
        _pass_over(fault, _quarantine(self.root / f"step-{step}"))

    def best(self) -> Checkpoint:
        """Return the checkpoint marked as best. Raises CheckpointError if none is marked, or it is damaged."""
        try:
            name = (self.root / _BEST).read_text().strip()
        except OSError as error:
            raise CheckpointError(f"{self.root}: no checkpoint is marked best ({error})") from error
        step = name.removeprefix("step-")
        if not _is_step(step):
            raise CheckpointError(
                f"{self.root / _BEST}: contains {name!r} instead of the name of a checkpoint. Fix: write the name into it"
            )
        path = self.root / f"step-{step}"
        return Checkpoint(int(step), path, _read(path, int(step)))

    def _settle(self) -> None:
        """Delete replaced checkpoints. Restore those whose replacement was interrupted by a kill."""
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
        """Delete old checkpoints. Each is renamed first, so that a kill leaves no partial checkpoint."""
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
    """Replace a file atomically: after a kill it has the old content or the new one. Raises OSError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # other processes may replace the same file
    try:
        _write_flushed(partial, content)
        os.replace(partial, path)
        flush_directory(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def flush_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(state: State) -> bytes:
    """Serialise `state` to the bytes of a torch file for `unpack`. Raises CheckpointError naming a value that cannot be.

    Equal states give equal bytes, also if one was read from a file.
    """
    _require_plain(state, "state")
    buffer = io.BytesIO()
    torch.save(_rebuilt(state), buffer)
    return buffer.getvalue()


def unpack(content: bytes, source: Path) -> State:
    """Read a torch file without running code that it may contain. Raises CheckpointError naming `source`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about other pickles before it refuses them
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_READ_FAULTS) as error:
        raise CheckpointError(
            f"{source}: refused, because it is damaged or contains other things than tensors and plain values "
            f"({brief(error)}). Fix: restore a copy"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{source}: contains a {type(state).__name__}, not the dictionary of a checkpoint. Fix: restore a copy"
        )
    return state


def digest(content: bytes) -> str:
    """Return the sha256 of `content`, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_weights(path: Path, state: State) -> None:
    """Write the weights of a finished run, and their sha256 into a file next to them. Raises CheckpointError if it fails."""
    content = pack(state)
    try:
        replace_file(path, content)
        replace_file(path.with_name(f"{path.name}.sha256"), f"{digest(content)}  {path.name}\n".encode())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}). Fix: free space, and re-run the same command to resume"
        ) from error


def read_weights(path: Path) -> State:
    """Read the weights of `write_weights`. If the run is not finished, return the state of its newest checkpoint instead.

    Raises CheckpointError if neither exists, or the weights are damaged.
    """
    if not path.exists():
        found = Checkpoints(path.parent / "checkpoints").latest(repair=False)
        if found is None:
            raise CheckpointError(f"{path.parent}: contains neither {path.name} nor a checkpoint. Fix: train it first")
        return found.state["state"]
    record = path.with_name(f"{path.name}.sha256")
    try:
        content = path.read_bytes()
        expected = record.read_text().split()[:1]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read with its sha256 ({error}). Fix: remove both files to use the last checkpoint"
        ) from error
    if expected != [digest(content)]:
        raise CheckpointError(
            f"{path}: damaged, its sha256 is not the one in {record.name}. Fix: remove both files to use the last checkpoint"
        )
    return unpack(content, path)


def check_finite(weights: Mapping[str, Any], place: str) -> None:
    """Raise NonFiniteError, naming up to five, if any of these weights or buffers is NaN or Inf: a solve would hide it."""
    broken = [
        name
        for name, value in weights.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_extra_state")
        if not value.isfinite().all()
    ]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise NonFiniteError(f"{place}: NaN or Inf in {', '.join(broken[:5])}{more}. Fix: train again")


def weights_digest(module: nn.Module) -> str:
    """Return the sha256 of a module's parameters and buffers with their names. It is equal only if every bit is equal."""
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
    """Read the state of a checkpoint after a check of its hash. Raises CheckpointError if it is damaged."""
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        content = (path / _STATE).read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {brief(error)}") from error
    if manifest != _manifest(step, content):
        raise CheckpointError(
            f"{path}: {_STATE} ({len(content)} bytes, sha256 {digest(content)[:12]}…) does not match {_MANIFEST}, "
            f"or the manifest does not have format {_FORMAT}"
        )
    return unpack(content, path / _STATE)


def _fault(path: Path, step: int) -> str | None:
    try:
        _read(path, step)
    except CheckpointError as error:
        return str(error)
    return None


def _pass_over(fault: Exception, where: Path) -> str:
    """Log that a damaged checkpoint is skipped, and return the message."""
    message = f"{fault} [stored as {where.name}]"
    _log.warning("damaged checkpoint skipped: %s", message)
    return message


def _quarantine(path: Path) -> Path:
    """Rename a damaged checkpoint to an unused name. Renaming to an existing directory would fail."""
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
    """Raise CheckpointError for values that the safe reader would refuse."""
    if isinstance(value, Mapping):
        if type(value) not in (dict, OrderedDict):
            raise CheckpointError(f"{place} is a {type(value).__name__}. Fix: convert it to a dict")
        for key, item in value.items():
            _require_plain(key, f"a key of {place}")
            _require_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):  # type: ignore[arg-type]
            _require_plain(item, f"{place}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise CheckpointError(
            f"{place} is a {type(value).__module__}.{type(value).__name__}, which cannot be read back without running "
            "pickled code. Fix: convert it to tensors, numbers or text"
        )


def _rebuilt(value: Any) -> Any:
    """The same value with one object for equal texts and no shared containers: a pickle tells which of its objects are the same one."""
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, Mapping):
        copy = type(value)((_rebuilt(key), _rebuilt(item)) for key, item in value.items())  # type: ignore[call-arg]
        if isinstance(value, OrderedDict):  # torch keeps the versions of modules in attributes of a state_dict
            copy.__dict__.update(_rebuilt(value.__dict__))
        return copy
    return type(value)(map(_rebuilt, value)) if type(value) in (list, tuple) else value

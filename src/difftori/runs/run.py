"""The run directory, which every trainer uses: configuration, log, checkpoints, exact resumption.

- `config.yaml`: the whole configuration; `versions.json`: software, machine, source; `command.txt`: one line per start
- `metrics.jsonl`: one row per `log`, the primary record; `tensorboard/`: the same numbers for TensorBoard,
  and with `wandb` in Weights & Biases
- `checkpoints/`: see checkpoint.py
- `summary.json`: written last, so it marks the run as finished; `report.html`: all of this on one page
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ValidationError

from difftori.errors import CheckpointError, ConfigError, DataError
from difftori.runs.checkpoint import Checkpoint, Checkpoints, State, replace_file
from difftori.runs.loggers import Logger, TensorBoard, WeightsAndBiases, uses_wandb
from difftori.runs.page import render
from difftori.runs.process import hold, is_held, removed_on_error, versions, wait_for
from difftori.runs.records import flat, is_finished, read_config, read_metrics, read_summary, to_yaml
from difftori.types import Metrics

_RESERVED = ("step", "time", "warning")
_BEFORE_CONFIG = {"run.lock", "versions.json", "command.txt"}

_log = logging.getLogger(__name__)


def seeded(seed: int, name: str, device: str = "cpu") -> torch.Generator:
    """Create the random generator for a purpose. Each `name` has a separate stream for the same seed."""
    number = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    return torch.Generator(device=device).manual_seed(int.from_bytes(number, "little") >> 1)


def flush_tiny_numbers() -> None:
    """Round numbers below 1e-38 to 0, until `torch.set_flush_denormal(False)`.

    Operations on such numbers are many times slower, and weights near zero produce many of them.
    """
    # NumPy measures its number types on first use, and warns if that is after the switch.
    _ = str(np.finfo(np.float32)), str(np.finfo(np.float64))
    torch.set_flush_denormal(True)


class Run:
    """An open run directory. Use it as a context manager: at the end, the files are closed and torch's settings restored.

    A new directory is removed again if an error ends the run before its first log row and checkpoint. While it is open, torch
    uses `threads` threads and its global generator is seeded, because networks sample their initial weights from it.
    Everything else samples from `generator(name)`.
    """

    def __init__(self, path: Path, config: BaseModel, *, seed: int, threads: int, device: str, wandb: bool = False):
        self.path = path
        self.seed = seed
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._generators: dict[str, torch.Generator] = {}
        self._restored: State = {}
        self._outside = (torch.get_rng_state(), torch.get_num_threads())
        self._close = contextlib.ExitStack()
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(removed_on_error(path, self._must_stay))
        self._rows: TextIO | None = None
        self._logged = 0
        self._locked = False
        self._loggers: list[Logger] = []
        self._purge_from: int | None = None
        try:
            self._claim()
            torch.set_num_threads(threads)
            flush_tiny_numbers()
            torch.manual_seed(seed)
            with _writing(path):
                _prepare(path, config, device)
                if not self.finished and (wandb or uses_wandb(path)):
                    self._loggers.append(WeightsAndBiases(path, config.model_dump(mode="json")))
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
        self._undo.__exit__(kind, error, at)

    def close(self) -> None:
        """Close the files, release the directory, and restore torch's generator and number of threads."""
        self._close_logs()
        self._close.close()
        state, threads = self._outside
        torch.set_rng_state(state)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)

    def generator(self, name: str, device: str = "cpu") -> torch.Generator:
        """Return the generator of that name. It is created once from the seed, and saved and restored with checkpoints."""
        if name not in self._generators:
            self._generators[name] = seeded(self.seed, name, device)
            if name in self._restored:
                self._generators[name].set_state(self._restored[name])
        return self._generators[name]

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Append a row to the log. NaN and Inf are written as null, and listed in a `warning` column."""
        taken = [name for name in metrics if name in _RESERVED]
        if taken:
            raise DataError(f"metrics named {', '.join(taken)}: these names are reserved for the log. Fix: rename them")
        row: dict[str, float | int | str | None] = {"step": step}
        row |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row["time"] = round(time.time(), 3)
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            row["warning"] = "; ".join(bad)
            _log.warning("step %d: %s", step, row["warning"])
        with _writing(self.path):
            self._append(step, json.dumps(row, allow_nan=False), metrics)

    def save(self, step: int, state: State, *, best: bool = False) -> Path:
        """Write a checkpoint of `state`, torch's global generators and every generator of this run."""
        if self._rows is not None:
            os.fsync(self._rows.fileno())
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        own = {
            "torch": torch.get_rng_state(),
            "cuda": cuda,
            "generators": {name: g.get_state() for name, g in self._generators.items()},
            "threads": torch.get_num_threads(),
            "rows": self._logged,
        }
        return self.checkpoints.save(step, {"run": own, "state": state}, best=best)

    def restore(self) -> Checkpoint | None:
        """Return the newest valid checkpoint with the caller's `state`, or None if there is none yet.

        Restores all generators, and removes the rows that were logged after the checkpoint. Call it before the first `log`.
        Raises CheckpointError if there are checkpoints but none is valid. Nothing is changed then.
        """
        found = self.checkpoints.latest()
        if found is None:
            self._drop_rows_after(0)
            return None
        try:
            own, state = found.state["run"], found.state["state"]
            torch.set_rng_state(own["torch"])
            if own["cuda"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(own["cuda"][: torch.cuda.device_count()])  # it may see fewer now
            self._restored = own["generators"]
            threads, logged = own["threads"], own["rows"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{found.path}: not a checkpoint of a run ({error!r}). Fix: restore a copy"
            ) from error
        for name, generator in self._generators.items():
            if name in self._restored:
                generator.set_state(self._restored[name])
        if threads != torch.get_num_threads():
            _log.warning(
                "saved with %d threads, resumed with %d: the last bits may differ", threads, torch.get_num_threads()
            )
        self._drop_rows_after(logged)
        self._purge_from = found.step + 1
        return Checkpoint(found.step, found.path, state)

    def load_from_main(self, other: Path) -> Checkpoint | None:
        """Return the newest valid checkpoint, with the caller's `state`, of the run that the main process has in `other`."""
        found = Checkpoints(other / "checkpoints").latest(repair=False)
        return None if found is None else Checkpoint(found.step, found.path, found.state["state"])

    @property
    def finished(self) -> bool:
        """Whether `finish` was called on this directory, by this process or an earlier one."""
        return is_finished(self.path)

    def finish(self, summary: Metrics) -> None:
        """Write the report, then `summary.json`, which marks the run as finished."""
        for logger in self._loggers:
            logger.finish(summary)
        self._close_logs()
        plain = {name: value if math.isfinite(value) else None for name, value in summary.items()}
        with _writing(self.path):
            replace_file(self.path / "report.html", render(self.path, summary).encode())
            replace_file(self.path / "summary.json", (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode())

    def summary(self) -> Metrics:
        """Read the summary that `finish` wrote."""
        return read_summary(self.path)

    def _must_stay(self) -> bool:
        return not self._locked or self._logged > 0 or (self.path / "checkpoints").exists()

    def _claim(self) -> None:
        """Lock the directory against other processes. The system releases the lock when this process ends."""
        _refuse_strangers(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = self._close.enter_context((self.path / "run.lock").open("a"))
        except OSError as error:
            raise ConfigError(
                [f"out: {self.path} cannot be a run directory ({error}). Fix: choose another directory"]
            ) from error
        try:
            hold(handle)
        except BlockingIOError as error:
            raise ConfigError(
                [f"out: {self.path} is in use by another process. Fix: wait, or choose another directory"]
            ) from error
        self._locked = True

    def _append(self, step: int, row: str, metrics: Mapping[str, float | int]) -> None:
        if self._rows is None:
            self._rows = (self.path / "metrics.jsonl").open("a")
            self._loggers.append(TensorBoard(self.path / "tensorboard", self._purge_from))
        self._rows.write(row + "\n")
        self._rows.flush()
        self._logged += 1
        for logger in self._loggers:
            logger.log(step, metrics)

    def _close_logs(self) -> None:
        for log in (*self._loggers, *([self._rows] if self._rows else [])):
            try:
                log.close()
            except OSError as error:
                _log.warning("%s: the end of a log is lost (%s)", self.path, error)
        self._rows, self._loggers = None, []

    def _drop_rows_after(self, count: int) -> None:
        """Truncate the log to its first `count` rows, the rows at the time of the checkpoint."""
        self._logged = count
        rows = self.path / "metrics.jsonl"
        if rows.exists():
            first = [json.dumps(row) + "\n" for row in read_metrics(self.path, count)]
            with _writing(self.path):
                replace_file(rows, "".join(first).encode())


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Convert an OSError, such as of a full disk, to CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}). Fix: free space, and re-run the same command to resume"
        ) from error


def _refuse_strangers(path: Path) -> None:
    """Raise ConfigError if the directory contains something else than a run, before anything is written."""
    if not path.is_dir() or (path / "config.yaml").exists():
        return
    strangers = sorted(p.name for p in path.iterdir() if p.name not in _BEFORE_CONFIG and p.suffix != ".tmp")
    if strangers:
        raise ConfigError(
            [
                f"out: {path} is not a run directory; it contains {', '.join(strangers[:5])}. Fix: choose another directory"
            ]
        )


def _prepare(path: Path, config: BaseModel, device: str) -> None:
    """Compare the configuration with the stored one, or write it. Then record versions and command."""
    text = to_yaml(config)
    if (again := type(config).model_validate(yaml.safe_load(text))) != config:
        raise ConfigError([f"config: {config!r} reads back from YAML as {again!r}. Fix: use types that YAML preserves"])
    new = not (path / "config.yaml").exists()
    if not new:
        refuse_another(path, config)
    if is_finished(path):
        return
    record = path / "versions.json"
    replace_file(record, (json.dumps(_versions(record, device), indent=1) + "\n").encode())
    with (path / "command.txt").open("a") as commands:
        commands.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}  {shlex.join(sys.argv)}\n")
    if new:  # written last: its presence marks the directory as complete
        replace_file(path / "config.yaml", text.encode())


def _versions(record: Path, device: str) -> dict:
    """Return the current versions, with those of earlier starts of this run under `earlier`. Logs a warning if they changed."""
    now: dict = dict(versions(device))
    try:
        before = dict(json.loads(record.read_bytes()))
    except (OSError, ValueError, TypeError):
        return now
    earlier = before.pop("earlier", [])
    changed = [f"{name} {before.get(name)} → {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        _log.warning("resumed with other versions, so the last bits may differ: %s", "; ".join(changed))
        earlier = [before, *earlier]
    return now | ({"earlier": earlier} if earlier else {})


def extend(path: Path, config: BaseModel) -> None:
    """Give the run in this directory a configuration with which it goes on after its end, and record the earlier one.

    The summary of a finished run is kept as `summary-N.json`, its weights as `agent-N.pt` or `policy-N.pt`, and its configuration as
    `config-N.yaml`, N = 1, 2, … Raises ConfigError if a process is training the run.
    """
    with _writing(path), (path / "config.yaml").open("a") as before:
        wait_for(before)  # every process of torchrun extends the run; the first one replaces this file last
        if not differences(read_config(path), config):
            return
        if is_held(path / "run.lock"):
            raise ConfigError([f"out: {path} is in use by another process. Fix: extend the run after it has ended"])
        number, earlier = len(list(path.glob("config-*.yaml"))), (path / "config.yaml").read_bytes()
        # If the last one is the same, a kill ended this before.
        if number == 0 or (path / f"config-{number}.yaml").read_bytes() != earlier:
            number += 1
            replace_file(path / f"config-{number}.yaml", earlier)
        # A kill in between leaves a run of the earlier length, whose newest checkpoint has these weights.
        for name in ("agent.pt", "agent.pt.sha256", "policy.pt", "policy.pt.sha256", "summary.json"):
            if (path / name).exists():
                stem, dot, ending = name.partition(".")
                (path / name).rename(path / f"{stem}-{number}{dot}{ending}")
        replace_file(path / "config.yaml", to_yaml(config).encode())


def refuse_another(path: Path, config: BaseModel) -> None:
    """Raise ConfigError, naming the keys, if the run in the directory has a different configuration."""
    if faults := differences(read_config(path), config):
        raise ConfigError(
            [*faults, f"out: {path} contains a run of another configuration. Fix: choose another directory"]
        )


def differences(before: dict, config: BaseModel) -> list[str]:
    """Return one message per key whose value differs. A key that is missing in the older file has its default."""
    with contextlib.suppress(ValidationError):
        before = type(config).model_validate(before).model_dump(mode="json")
    old, new = flat(before), flat(config.model_dump(mode="json"))
    return [
        f"{key}: {new.get(key, 'absent')!r} here, {old.get(key, 'absent')!r} in the directory's config.yaml"
        for key in sorted(old.keys() | new.keys())
        if repr(old.get(key)) != repr(new.get(key))
    ]

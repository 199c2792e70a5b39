"""Objective mismatch: when is a model trained for return, by the policy gradient through the planner, better than one trained for prediction?

Model predictive control of a pendulum and a cart-pole with friction, by a model that lacks it. Its parameters are learned by
system identification, by the policy gradient through the planner with a learned critic, by both, and, as controls, by the
gradient with the wrong sign and by the exact one. The more friction, the more wrong is the class of the model. Inspired by
Lambert et al. (2020, arXiv 2002.04523), Amos et al. (2018, arXiv 1810.13400) and Nikishin et al. (2022, arXiv 2106.03273).

A finished level (a system with a friction and a horizon) is recorded in `levels.jsonl` and not repeated; re-run the same command
to resume.
"""

import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from difftori.experiments.paper.mismatch_loop import Closed
from difftori.experiments.paper.mismatch_report import LevelRecord, write_report
from difftori.experiments.paper.mismatch_systems import SYSTEMS
from difftori.experiments.paper.mismatch_training import Budget, Level, run_level
from difftori.experiments.records import append_line, read_lines
from difftori.runs.process import versions
from difftori.runs.progress import Progress

SystemName = Literal["pendulum", "cartpole"]
FULL_FRICTIONS, FULL_SEEDS, FULL_EPOCHS = (0.0, 0.5, 1.0, 2.0, 3.0), 8, 12
_STEPS = 40
_QUICK = {"systems": ("pendulum",), "frictions": (1.0,), "horizons": (8,), "seeds": 2, "epochs": 2}


class Config(BaseModel):
    """Model parameters for prediction and for return, over the degree of mismatch."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    systems: tuple[SystemName, ...] = Field(default=("pendulum", "cartpole"), min_length=1)
    """Systems to control."""
    frictions: tuple[float, ...] = Field(default=FULL_FRICTIONS, min_length=1)
    """Coefficients of friction that the model lacks: of the pendulum per inertia in 1/s, of the cart in N s/m. 0: the class is right."""
    horizons: tuple[int, ...] = Field(default=(15,), min_length=1)
    """Planning horizons H, in steps of 0.05 s."""
    seeds: int = Field(default=FULL_SEEDS, ge=2)
    """Number of seeds: of initial parameters, starts, exploration and critic."""
    epochs: int = Field(default=FULL_EPOCHS, ge=1)
    """Steps of the parameters after identification, each with 4 episodes of 40 steps."""
    out: Path = Path("results/mismatch")
    """Directory of records, tables and the figure; tables and figure of a partial study are in its folder `partial`."""
    budget: float | None = Field(default=None, ge=0)
    """Minutes after which no further level is started (default: no limit). 0 only writes tables and figure of the finished ones."""
    quick: bool = False
    """Run one small level, to check that everything works."""


@dataclass(frozen=True)
class _Key:
    """What determines a level's numbers."""

    system: SystemName
    friction: float
    horizon: int
    steps: int
    budget: Budget

    @property
    def head(self) -> bytes:
        """The beginning of the level's line."""
        return f'{{"level": {json.dumps(asdict(self))}, '.encode()


def run(config: Config) -> None:
    """Run the missing levels, record them in `out/levels.jsonl`, and write tables and the figure to `out`, or `out/partial`."""
    if config.quick:
        config = config.model_copy(update=_QUICK)
    torch.set_num_threads(1)
    began, console, file = time.monotonic(), Console(), config.out / "levels.jsonl"
    keys = _keys(config)
    done = _read(file, keys)
    with Progress(True) as progress, progress.phase("levels", len(keys)) as levels:
        for number, key in enumerate(keys):
            levels.update(number, f"{key.system}, friction {key.friction:g}, horizon {key.horizon}")
            spent = (time.monotonic() - began) / 60
            if key.head not in done and (config.budget is None or spent < config.budget):
                done[key.head] = _train(key, file, progress)
    records = [done[key.head] for key in keys if key.head in done]
    reasons = partial_reasons(config)
    if len(records) < len(keys):
        reasons = [*reasons, f"{len(records)} of {len(keys)} levels"]
    label = f"partial ({', '.join(reasons)})" if reasons else "full"
    write_report(records, config.out / "partial" if reasons else config.out, label=label, console=console)


def partial_reasons(config: Config) -> list[str]:
    """Return the reasons why the configuration is less than the full study; empty if it is the full study."""
    checks = {
        "quick": config.quick,
        f"{config.seeds} of {FULL_SEEDS} seeds": config.seeds < FULL_SEEDS,
        f"{config.epochs} of {FULL_EPOCHS} epochs": config.epochs < FULL_EPOCHS,
        "not every system": len(set(config.systems)) < len(SYSTEMS),
        "not every friction": not set(FULL_FRICTIONS) <= set(config.frictions),
    }
    return [reason for reason, holds in checks.items() if holds]


def _keys(config: Config) -> list[_Key]:
    budget = Budget(seeds=config.seeds, epochs=config.epochs)
    levels = [
        _Key(system, friction, horizon, _STEPS, budget)
        for system in config.systems
        for horizon in config.horizons
        for friction in config.frictions
    ]
    return list(dict.fromkeys(levels))


def _train(key: _Key, path: Path, progress: Progress) -> LevelRecord:
    began = time.monotonic()
    loop = Closed(SYSTEMS[key.system], key.friction, key.horizon, key.steps)
    with progress.phase("epochs", key.budget.epochs) as phase:
        level = run_level(loop, key.budget, phase.update)
    machine = versions("cpu")
    plain = _plain(level) | {
        "seconds": round(time.monotonic() - began, 1),
        "hardware": f"{machine['cpu']}, 1 thread",
        "versions": {name: machine[name] for name in ("difftori", "git_commit", "torch", "python")},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    append_line(path, key.head, json.dumps(plain)[1:].encode())
    return _read(path, [key])[key.head]


def _plain(level: Level) -> dict[str, Any]:
    """Convert to lists of numbers with six digits."""

    def short(values: np.ndarray) -> list[list[float]]:
        return [[float(f"{value:.6g}") for value in row] for row in values]

    return {
        "costs": {name: short(values) for name, values in level.costs.items()},
        "parameters": {name: short(values) for name, values in level.parameters.items()},
        "history": {form: {k: short(v) for k, v in rows.items()} for form, rows in level.history.items()},
    }


def _read(path: Path, keys: list[_Key]) -> dict[bytes, LevelRecord]:
    """Read the records of these levels by the beginnings of their lines. Raises DataError if one is damaged."""

    def parse(line: bytes) -> tuple[bytes, LevelRecord] | None:
        key = next((key for key in keys if line.startswith(key.head)), None)
        return None if key is None else (key.head, _record(key, json.loads(line)))

    return dict(read_lines(path, parse))


def _record(key: _Key, plain: dict[str, Any]) -> LevelRecord:
    return LevelRecord(
        system=key.system,
        friction=key.friction,
        horizon=key.horizon,
        seconds=float(plain["seconds"]),
        hardware=plain["hardware"],
        command=plain["command"],
        costs={name: np.array(values) for name, values in plain["costs"].items()},
        parameters={name: np.array(values) for name, values in plain["parameters"].items()},
        history={
            form: {name: np.array(values) for name, values in rows.items()} for form, rows in plain["history"].items()
        },
    )

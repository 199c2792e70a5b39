"""Time of acting and updating at two commits, side by side: `bench rl` of each commit's own checkout, in turn.

Every round runs both, the second round in the opposite order, and so on. The results are medians over all measurements of a
commit, and the ratio of the medians of a round, as median and range over rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, PositiveInt

from benchmarks.records import RESULTS, as_text, write_csv, write_record
from difftori.errors import ConfigError

_ROOT = Path(__file__).parents[1]
Samples: TypeAlias = dict[str, list[float]]
"""Milliseconds by "METHOD: PART", the parts being `act`, `update`, `sample` and `end_episode`."""


class Config(BaseModel):
    """Settings of the comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    before: str = "459b0f3"
    """Commit to compare with. Default: the last one before operations were reduced."""
    after: str = "HEAD"
    """Commit to compare."""
    obs: Literal["state", "pixels"] = "state"
    """Observation type."""
    preset: str = "small"
    """Preset of the agents."""
    rounds: PositiveInt = 4
    """Number of times that both are run."""
    repeats: PositiveInt = 5
    """Number of interleaved repeats of all parts in each run."""
    out: Path = RESULTS
    """Folder for `versions-OBS-PRESET.csv` and `.json`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `versions-OBS-PRESET.csv` and `.json` to `out`, and return the table. Raises ConfigError for an unknown commit."""
    commits = {name: _commit(name) for name in (config.before, config.after)}
    rounds: dict[str, list[Samples]] = {config.before: [], config.after: []}
    with _checkout(commits[config.before]) as before, _checkout(commits[config.after]) as after:
        for number in range(config.rounds):
            both = ((config.before, before), (config.after, after))
            for name, folder in both if number % 2 == 0 else both[::-1]:
                rounds[name].append(_bench(folder, config))
                print(f"round {number + 1} of {config.rounds}: {name} done", file=sys.stderr)
    rows = compare(rounds[config.before], rounds[config.after])
    stem = config.out / f"versions-{config.obs}-{config.preset}"
    write_csv(stem.with_suffix(".csv"), rows)
    record = {"commits": list(commits.values()), "raw_ms": rounds}
    write_record(stem.with_suffix(".json"), record, config=config.model_dump(mode="json"), device="cpu")
    return as_text(rows)


def compare(before: list[Samples], after: list[Samples]) -> list[dict[str, Any]]:
    """One row for each method and part of acting and updating that both have, from the measurements of each round."""
    rows = []
    for key in before[0]:
        method, _, part = key.partition(": ")
        if part not in ("act", "update") or key not in after[0]:
            continue
        ratios = [
            statistics.median(new[key]) / statistics.median(old[key]) for old, new in zip(before, after, strict=True)
        ]
        median = [statistics.median(value for each in side for value in each[key]) for side in (before, after)]
        rows.append(
            {
                "method": method,
                "part": part,
                "before_ms": median[0],
                "after_ms": median[1],
                "ratio": statistics.median(ratios),
                "lowest_ratio": min(ratios),
                "highest_ratio": max(ratios),
            }
        )
    return rows


def _commit(name: str) -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], cwd=_ROOT, capture_output=True, text=True
    )
    if found.returncode != 0:
        raise ConfigError(
            [f"{name!r} is no commit of the repository {_ROOT}. Fix: --before COMMIT --after COMMIT, from `git log`"]
        )
    return found.stdout.strip()


@contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    """In the body, the commit's files in a folder of their own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkout"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=_ROOT, check=True)
        try:
            yield folder
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=_ROOT, check=True)


def _bench(folder: Path, config: Config) -> Samples:
    """The milliseconds of `bench rl` of a checkout."""
    options = {"obs": config.obs, "preset": config.preset, "repeats": config.repeats, "out": folder / "measured"}
    command = [sys.executable, "-m", "difftori.cli", "bench", "rl"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"bench rl failed at {folder}:\n{done.stderr[-2000:]}")
    return json.loads((folder / "measured" / f"rl-{config.obs}-{config.preset}.json").read_text())["raw_ms"]

"""Time of acting and updating at two commits, side by side: the same calls with each commit's own `difftori`, in turn.

Sizes of cheetah-run from states, random segments, one thread. Two processes make every call once in each round, one after the
other; the first is the other one in the next round. The results are medians, and the quartiles of the ratio within a round.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.measuring import progress_bar, quartiles
from benchmarks.records import RESULTS, as_text, write_csv, write_record
from difftori.errors import ConfigError

_ROOT, _WARM_UP = Path(__file__).parents[1], 3
Samples: TypeAlias = dict[str, float]
"""Milliseconds by "METHOD: PART", the parts being `act` and `update`."""


class Config(BaseModel):
    """Settings of the comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    before: str = "459b0f3"
    """Commit to compare with. Default: the last one before operations were reduced."""
    after: str = "HEAD"
    """Commit to compare."""
    preset: str = "small"
    """Preset of the agents."""
    rounds: int = Field(default=60, ge=2)
    """Number of times that both make every call."""
    out: Path = RESULTS
    """Folder for `versions-PRESET.csv` and `.json`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `versions-PRESET.csv` and `.json` to `out`, and return the table. Raises ConfigError for an unknown commit."""
    commits = [_commit(config.before), _commit(config.after)]
    with ExitStack() as stack:
        both = [stack.enter_context(_measuring(commit, config.preset)) for commit in commits]
        for measure in both * _WARM_UP:
            measure()
        before, after = samples = [list[Samples](), list[Samples]()]
        with progress_bar(config.rounds) as (_, advance):
            for number in range(config.rounds):
                for side in (0, 1) if number % 2 == 0 else (1, 0):
                    samples[side].append(both[side]())
                advance()
    rows = compare(before, after)
    stem = config.out / f"versions-{config.preset}"
    write_csv(stem.with_suffix(".csv"), rows)
    record = {"commits": commits, "raw_ms": {key: [[r[key] for r in side] for side in samples] for key in before[0]}}
    write_record(stem.with_suffix(".json"), record, config=config.model_dump(mode="json"), device="cpu")
    return as_text(rows)


def compare(before: list[Samples], after: list[Samples]) -> list[dict[str, Any]]:
    """One row for each method and part. `ratio`: after over before within a round, median and quartiles."""
    rows = []
    for key in before[0]:
        method, _, part = key.partition(": ")
        pairs = [(old[key], new[key]) for old, new in zip(before, after, strict=True)]
        low, ratio, high = quartiles([new / old for old, new in pairs])
        old, new = (statistics.median(side) for side in zip(*pairs, strict=True))
        row = {"method": method, "part": part, "before_ms": old, "after_ms": new}
        rows.append(row | {"ratio": ratio, "lower_quartile": low, "upper_quartile": high})
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


@contextmanager
def _measuring(commit: str, preset: str) -> Iterator[Callable[[], Samples]]:
    """In the body, a function that makes every call once with the commit's `difftori`, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("versions_child.py")), "--preset", preset]
    with _checkout(commit) as folder:
        environment = os.environ | {"PYTHONPATH": str(folder / "src")}
        with subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True, bufsize=1) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            lines, answers = child.stdin, child.stdout

            def measure() -> Samples:
                lines.write("\n")
                answer = answers.readline()
                if not answer:
                    raise RuntimeError(f"the measurement of {commit} has ended; see above")
                return json.loads(answer)

            yield measure

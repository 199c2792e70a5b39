"""Everything that needs a GPU, in one command: tests, speed, and learning from pixels, into one folder.

    make gpu-check                                        # on a machine with a CUDA device, about eight minutes
    difftori bench gpu-check --device cpu --quick         # a trial of the same steps on any machine

Each step is a process of its own with a time limit, so a failure or a slow step costs only itself. `summary.md` says how each
step ended, and repeats the tables. Of the runs, the folder keeps configurations, logs and summaries, not the weights.
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, PositiveFloat

from benchmarks.measuring import Device
from benchmarks.records import write_csv, write_record
from difftori.errors import DifftoriError
from difftori.runs.records import read_metrics, read_summary

KEPT = ("config.yaml", "metrics.jsonl", "summary.json", "versions.json")
TASKS = ("cup-catch", "cheetah-run")
AGENTS = ("tdmpc", "difftori")
SHARING = (1, 2, 4, 8)
_SLOW = 3
"""The time limits are those of a GPU; a trial may run on a slow machine."""
PASSED, FAILED = "passed", "FAILED"
PARTS = ("acting", "environment", "sampling", "update", "end_episode")
"""Parts of the time of a run, without evaluation."""


class Config(BaseModel):
    """Where it runs, for how long, and where the results go."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: Device = "cuda"
    """Device of all steps. `cpu`: a trial, which records no CUDA graph."""
    quick: bool = False
    """Tiny sizes, to check that every step runs. The numbers are meaningless."""
    minutes: PositiveFloat = 8.0
    """Time limit of all steps together."""
    out: Path = Path("results/gpu")
    """Folder of the results, less than 16 MB."""


@dataclass(frozen=True)
class Step:
    """A command with its time limit in seconds. One that is stopped in time saves what it has (`train`)."""

    name: str
    words: tuple[str, ...]
    seconds: float
    ends_early: bool = False
    """Whether it may be stopped in time, or not be begun."""


def run(config: Config) -> list[dict[str, Any]]:
    """Run all steps, write the results, and return how each step ended. Raises DifftoriError, after all, if a step failed."""
    config.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * config.minutes
    ended: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        planned = steps(config, Path(folder))
        for step in planned:
            seconds = _SLOW * step.seconds if config.quick else step.seconds
            row = _run(step, min(seconds, until - time.monotonic()), config)
            print(f"{row['step']}: {row['result']}, {row['seconds']:.0f} s", file=sys.stderr)
            ended.append(row)
        curves = _kept(Path(folder) / "learning", config.out / "learning")
        sharing = _sharing(Path(folder))
    write_csv(config.out / "steps.csv", ended)
    for name, rows in (("learning", curves), ("sharing", sharing)):
        if rows:
            write_csv(config.out / f"{name}.csv", rows)
    write_record(
        config.out / "machine.json", {"gpu": _gpu()}, config=config.model_dump(mode="json"), device=config.device
    )
    (config.out / "summary.md").write_text(_summary(config.out))
    if failed := [row["step"] for row, step in zip(ended, planned, strict=True) if _failed(step, row["result"])]:
        raise DifftoriError(f"gpu-check: failed: {', '.join(failed)}. Fix: read {config.out / 'logs'}")
    return [{**row, "seconds": f"{row['seconds']:.0f}"} for row in ended]


def steps(config: Config, folder: Path) -> list[Step]:
    """The steps in the order of their importance."""
    device = ("--device", config.device)
    bench = ("-m", "difftori.cli", "bench")
    repeats = ("--repeats", "2" if config.quick else "7")
    out = ("--out", str(config.out))
    env = ("--env", "probe:delayed-reward", "--preset", "small", "--episodes", "1") if config.quick else ()
    pixels = () if config.quick else ("--obs", "pixels")
    states = ("--states", "1", "2") if config.quick else ()
    return [
        Step("tests", ("-m", "pytest", "-m", "gpu", "-q", "tests/gpu", *_elsewhere(config)), 90),
        Step("captured", (*bench, "captured", *device, *out, *repeats, *states), 60),
        Step("rl from pixels", (*bench, "rl", *pixels, *device, *out, *repeats, *env), 75),
        Step("learning", _sweep(config, folder / "learning", AGENTS, TASKS, 1, 0.25), 110, ends_early=True),
        Step("rl from states", (*bench, "rl", "--obs", "state", *device, *out, *repeats, *env), 60),
        Step("il", (*bench, "il", *device, *out, *repeats), 60),
        *(
            Step(
                f"sharing by {count}",
                _sweep(config, folder / f"sharing-{count}", AGENTS[:1], TASKS[:1], count, 1 / count),
                40,
                ends_early=True,
            )
            for count in SHARING[: 2 if config.quick else None]
        ),
    ]


def _failed(step: Step, result: str) -> bool:
    return result != PASSED and (result.startswith(FAILED) or not step.ends_early)


def _elsewhere(config: Config) -> tuple[str, ...]:
    return ("tests/data",) if config.device.startswith("cuda") else ()


def _sweep(
    config: Config, out: Path, agents: Sequence[str], tasks: Sequence[str], seeds: int, gpus: float
) -> tuple[str, ...]:
    """A sweep of short runs that share the GPU. Its runs end in time: they are stopped and save, so that their curves are partial."""
    learning = out.name == "learning"
    common: dict[str, Any] = {"preset": "compact", "device": config.device, "eval_every": 5000 if learning else 10**6}
    common |= {"steps": 100_000 if learning else 4000, "seed_steps": 500, "eval_episodes": 5, "save_every": 10**6}
    common |= {"obs": "pixels", "keep_episodes": False}
    if config.quick:
        common |= {"obs": "state", "preset": "small", "steps": 60, "eval_every": 60, "seed_steps": 20, "horizon": 1}
        tasks = ("one-step",)
    family = "probe" if config.quick else "dmc"
    sweep: dict[str, Any] = {"out": str(out), "common": common, "variants": [{"train": name} for name in agents]}
    sweep |= {"grid": {"env": [f"{family}:{task}" for task in tasks], "seed": list(range(seeds))}}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(sweep))
    share = ("--gpus-per-run", str(gpus)) if config.device.startswith("cuda") else ("--jobs", str(min(seeds, 2)))
    return ("-m", "difftori.cli", "sweep", str(path), *share)


def _run(step: Step, seconds: float, config: Config) -> dict[str, Any]:
    """Run a step, with its output in `logs/`. At the time limit it gets SIGTERM, and half a minute to save."""
    if seconds < 5:
        return {"step": step.name, "result": "not begun: no time left", "seconds": 0.0}
    log = config.out / "logs" / f"{step.name.replace(' ', '-')}.txt"
    log.parent.mkdir(exist_ok=True)
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *step.words],
            stdout=output,
            stderr=output,
            env={**os.environ, **_one_gpu(), "DIFFTORI_TEST_DEVICE": config.device, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            result = PASSED if process.wait(seconds) == 0 else f"{FAILED} with status {process.returncode}, see {log}"
        except subprocess.TimeoutExpired:
            result = _stopped(process)
    return {"step": step.name, "result": result, "seconds": time.monotonic() - began}


def _one_gpu() -> dict[str, str]:
    """All steps use one GPU, the first of those that are visible, which runs share."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[0]}


def _stopped(process: subprocess.Popen[bytes]) -> str:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "stopped at its time limit"


def _kept(runs: Path, out: Path) -> list[dict[str, Any]]:
    """Copy the small files of the runs, and return one row for each: the last evaluation, and the speed."""
    rows: list[dict[str, Any]] = []
    shutil.rmtree(out, ignore_errors=True)
    for folder in sorted(path.parent for path in runs.rglob("config.yaml")):
        place = out / folder.relative_to(runs)
        for name in KEPT:
            if (folder / name).exists():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, place / name)
        evaluated = [row for row in read_metrics(folder) if "eval/return" in row]
        if evaluated:
            last = evaluated[-1]
            spent = sum(last[f"seconds/{part}"] for part in PARTS)
            rows.append(
                {
                    "run": str(folder.relative_to(runs)),
                    "env_steps": last["step"],
                    "updates": last["updates"],
                    "return": last["eval/return"],
                    "seconds": spent,
                    "ms_per_decision": 1e3 * spent / max(last["updates"], 1),
                }
            )
    return rows


def _sharing(folder: Path) -> list[dict[str, Any]]:
    """Decisions per second of all runs together, over the number of runs that share the device. Each decision has one update."""
    rows: list[dict[str, Any]] = []
    for count in SHARING:
        summaries = [read_summary(path.parent) for path in (folder / f"sharing-{count}").rglob("summary.json")]
        speeds = [summary["updates"] / sum(summary[f"seconds/{part}"] for part in PARTS) for summary in summaries]
        if speeds:
            rows.append({"runs": count, "finished": len(speeds), "decisions_per_second": sum(speeds)})
    return rows


def _gpu() -> str:
    if not (tool := shutil.which("nvidia-smi")):
        return "no nvidia-smi"
    query = [tool, "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def _summary(out: Path) -> str:
    """All tables in Markdown."""
    parts = ["# GPU check\n", "Machine and versions: `machine.json`. Raw numbers: the JSON files.\n"]
    for path in sorted(out.glob("*.csv")):
        with path.open() as file:
            rows = list(csv.reader(file))
        lines = [" | ".join(row) for row in rows]
        if len(lines) > 1:
            parts += [f"## {path.stem}\n", f"| {lines[0]} |", "|---" * len(rows[0]) + "|"]
            parts += [f"| {line} |" for line in lines[1:]] + [""]
    return "\n".join(parts)

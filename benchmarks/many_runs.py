"""The cost of ten thousand runs in files, bytes and waiting time: each method is trained once, then copied to all tasks and seeds.

Ten variants of four policies on a MetaWorld task from states are trained for 200 updates, one seed each. Their directories are
copied to 50 tasks × 20 seeds (an agent is also trained, for its size only): configurations are rewritten, successes are
sampled so that there is data to analyse, and weights and checkpoints are hard links, because no measured command reads them.
Then the commands that a user waits for are timed, each in its own process. Their output is based on synthetic successes and
is discarded.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt

from benchmarks.records import RESULTS, write_csv, write_record
from difftori.envs.metaworld import TASKS
from difftori.experiments.plan import Sweep, plan

TRUE = "reach"
LARGE = 50_000
"""Size in bytes from which a file is linked instead of copied."""
BASE = "OUT/{env}/bc/seed-{seed}"
VARIANTS = [
    {"train": "bc"},
    {"train": "bc", "lr": 0.003},
    {"train": "bc", "hidden": [64]},
    {"train": "bc", "hidden": [512]},
    {"train": "diffusion", "preset": "small"},
    {"train": "residual", "base": BASE},
    {"train": "residual", "base": BASE, "base_noise": 0.3},
    *({"train": "difftori-il", "base": BASE, "base_noise": noise} for noise in (0.0, 0.3, 1.0)),
]


class Config(BaseModel):
    """Number of runs, and folders."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    folder: Path
    """Empty folder for the runs, on a disk with several GB free."""
    tasks: PositiveInt = 50
    """Number of MetaWorld tasks."""
    seeds: PositiveInt = 20
    """Number of seeds for each task."""
    out: Path = RESULTS
    """Folder for `many_runs.json`, `many_runs_waits.csv` and `many_runs_sizes.csv`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Train, copy, time, write the files to `out`, and return the waiting times."""
    folder = config.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [TRUE, *(task for task in TASKS if task != TRUE)][: config.tasks]
    collect = f"collect --env metaworld:{TRUE} --obs state --episodes 10 --out {folder / 'demos'}"
    timed(collect.split(), folder / "collect.log")
    timed(["sweep", str(sweep_file(folder, [TRUE], 1))], folder / "train.log")
    agent = folder / "agent" / "tdmpc, 10000 steps" / "seed-0"
    steps = "--env dmc:cheetah-run --obs state --preset small --steps 10000 --action-repeat 4 --eval-every 5000"
    timed(
        ["train", "tdmpc", *steps.split(), "--eval-episodes", "2", "--out", str(agent), "--quiet"], folder / "agent.log"
    )
    true = [agent, *(run for run in sorted(folder.glob(f"runs/metaworld.{TRUE}/*/seed-0")) if run.is_dir())]
    by_variant = {run.parent.name: sizes(run) for run in true}
    whole = sweep_file(folder, tasks, config.seeds)
    spread_out(folder, whole)
    against = ["report", str(folder / "runs"), "--reference", "diffusion", "--out", str(folder / "against")]
    report = ["report", str(folder / "runs"), "--out", str(folder / "report")]
    took = {
        "sweep --status": timed(["sweep", str(whole), "--status"], folder / "status.log"),
        "report --reference diffusion": timed(against, folder / "against.log"),
        "report": timed(report, folder / "report.log"),
        "sweep, finished": timed(["sweep", str(whole)], folder / "again.log"),
    }
    found = {
        "runs": config.tasks * config.seeds * len(VARIANTS),
        "bytes_by_variant": by_variant,
        "page_bytes": (folder / "report" / "report.html").stat().st_size,
        "commands": took,
    }
    write_record(config.out / "many_runs.json", found, config=config.model_dump(mode="json"))
    waits = [{"command": name, **{k: f"{v:.0f}" for k, v in used.items()}} for name, used in took.items()]
    write_csv(config.out / "many_runs_waits.csv", waits)
    write_csv(config.out / "many_runs_sizes.csv", [size_row(name, found) for name, found in by_variant.items()])
    return waits


def sweep_file(folder: Path, tasks: Sequence[str], seeds: int) -> Path:
    """Write the sweep over `seeds` seeds of the tasks, all in one folder of runs."""
    out = folder / "runs"
    variants = [{k: str(v).replace("OUT", str(out)) if k == "base" else v for k, v in one.items()} for one in VARIANTS]
    path = folder / f"{len(tasks)}-{seeds}.yaml"
    grid = {"env": [f"metaworld:{task}" for task in tasks], "seed": list(range(seeds))}
    common = {
        "obs": "state",
        "demos": str(folder / "demos" / f"metaworld.{TRUE}-0.zarr"),
        "updates": 200,
        "eval_episodes": 50,
    }
    path.write_text(yaml.safe_dump({"out": str(out), "common": common, "grid": grid, "variants": variants}))
    return path


def timed(words: Sequence[str], log: Path) -> dict[str, float]:
    """Run a command in its own process. Returns its seconds and peak memory. Raises SystemExit if it fails."""
    began = time.perf_counter()
    with log.open("wb") as said:
        process = subprocess.Popen([sys.executable, "-m", "difftori.cli", *words], stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"difftori {' '.join(words)} failed. Fix: see {log}")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}


def spread_out(folder: Path, path: Path) -> None:
    """Copy the directory of each variant's trained run to all runs of the variant."""
    sweep = Sweep.model_validate(yaml.safe_load(path.read_text()))
    runs = plan(sweep)
    true = {run.folder.parent.name: run.folder for run in runs if run.finished}
    generator = np.random.default_rng(0)
    for run in runs:
        if run.finished:
            continue
        source = true[run.folder.parent.name]
        task, seed = run.folder.parts[-3].removeprefix("metaworld."), run.folder.name.removeprefix("seed-")
        shutil.copytree(source, run.folder, copy_function=linked_if_large)
        shutil.copy(source.with_name("seed-0.log"), run.folder.with_name(f"{run.folder.name}.log"))
        config = yaml.safe_load((source / "config.yaml").read_text())
        config |= {"env": f"metaworld:{task}", "seed": int(seed)}
        if config.get("base"):
            config["data_seed"] = int(seed)
            config["base"] = str(sweep.out / run.folder.parts[-3] / "bc" / run.folder.name)
        write(run.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        summary, episodes = (json.loads((source / name).read_text()) for name in ("summary.json", "episodes.json"))
        drawn = (generator.random(50) < generator.beta(2, 2)).astype(float).tolist()
        episodes["last"]["success"] = drawn
        summary["last/success"] = sum(drawn) / 50
        write(run.folder / "summary.json", json.dumps(summary))
        write(run.folder / "episodes.json", json.dumps(episodes))


def linked_if_large(source: str, target: str) -> None:
    """Copy a small file, or link a large one."""
    if os.path.getsize(source) > LARGE:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


def write(path: Path, text: str) -> None:
    """Replace a file, which may be a link."""
    path.unlink()
    path.write_text(text)


def sizes(run: Path) -> dict[str, int]:
    """Bytes by first name below a run's directory, and the number of files and directories."""
    found: dict[str, int] = defaultdict(int)
    for path in run.rglob("*"):
        found["entries"] += 1
        if path.is_file():
            found[path.relative_to(run).parts[0]] += path.stat().st_size
    return dict(found)


def size_row(name: str, found: dict[str, int]) -> dict[str, Any]:
    """The size of a run in MB: in total, and by type of file."""
    parts = {part: size for part, size in found.items() if part != "entries"}
    weights = sum(size for part, size in parts.items() if part.endswith(".pt"))
    whole, checkpoints = sum(parts.values()), parts["checkpoints"]
    sizes_mb = {"whole": whole, "checkpoints": checkpoints, "weights": weights, "rest": whole - checkpoints - weights}
    return {"run": name, **{k: f"{v / 1e6:.2f}" for k, v in sizes_mb.items()}, "entries": found["entries"]}

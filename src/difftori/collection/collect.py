"""Collecting so many episodes of an expert, whatever interrupts it."""

import inspect
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from difftori.collection.attempts import Attempts, close_attempts, open_attempts, read_plan, refuse_other
from difftori.collection.dataset import need_zarr, read_episodes, read_manifest, write_dataset, write_manifest
from difftori.collection.play import Attempt, play
from difftori.envs.base import numeric_faults
from difftori.envs.demonstrator import Demonstrator
from difftori.errors import ConfigError, DataError
from difftori.registry import find_demonstrator
from difftori.rl.collector import episode_seed
from difftori.runs.versions import versions

SUCCESSES = "success at any step"
EVERYTHING = "none"
_MACHINE = ("difftori", "git_commit", "python", "numpy", "platform", "cpu")


@dataclass(frozen=True)
class Collection:
    """What is wanted: `episodes` of the expert of `env`, into `out`/NAME.zarr with NAME = ENV-SEED.

    Episodes are numbered, and the seed of each follows from `seed` and its number; the first that succeed are kept, or the
    first ones if `keep_failures`. So what comes out does not depend on `workers`, the processes, or on interruptions.
    `obs` None is what the environment's demonstrator has as its default. After `max_tries` episodes collecting gives up;
    None allows ten for each that is wanted.
    """

    env: str
    out: Path
    episodes: int = 10
    seed: int = 0
    obs: str | None = None
    workers: int = 1
    keep_failures: bool = False
    max_tries: int | None = None

    @property
    def tries(self) -> int:
        """Episodes that may be played."""
        return 10 * self.episodes if self.max_tries is None else self.max_tries


def collect(wish: Collection, *, progress: bool = True) -> dict[str, Any]:
    """Collect, or go on where an earlier process was stopped, and return what there is then.

    A data set that has enough episodes is left as it is; one that has too few is added to. Raises `ConfigError` (a faulty
    wish, another collection in that place), `DataError` (too few successes, damaged or unwritable files),
    `MissingExtraError`, and what the environment raises.
    """
    maker, task, name = find_demonstrator(wish.env)
    _refuse_faults(wish)
    need_zarr()
    obs = wish.obs or inspect.signature(maker).parameters["obs"].default
    plan = {"env": name, "obs": obs, "seed": wish.seed, "filter": EVERYTHING if wish.keep_failures else SUCCESSES}
    path = wish.out / f"{name.replace(':', '.')}-{wish.seed}.zarr"
    folder, beside = path.with_suffix(".attempts"), path.with_suffix(".json")
    finished = _finished(path, folder, beside)
    if finished is not None:
        refuse_other({key: finished.get(key) for key in plan}, plan, beside)
        if finished["episodes"] >= wish.episodes:
            return _summary(path, finished, played=0, seconds=0.0)
    workers = min(wish.workers, wish.episodes)
    kind = "async" if workers > 1 else "sync"
    began = time.monotonic()
    demonstrator = maker(task, num_envs=workers, seed=wish.seed, obs=obs, workers=kind)
    with closing(demonstrator.env):
        plan["versions"] = _versions(demonstrator)
        if finished is not None:
            refuse_other({key: finished.get(key) for key in plan}, plan, beside)
        earlier = _earlier(path, finished) if finished is not None else iter(())
        with open_attempts(folder, plan, earlier) as attempts:
            with _bar(name, wish.episodes, progress) as show:
                played = _play_until_enough(wish, demonstrator, attempts, show)
            chosen, tried = _kept(wish, attempts)
            manifest = _manifest(plan, attempts, chosen, tried)
            lengths = [attempts[index].steps for index in chosen]
            write_dataset(path, lengths, lambda episode: attempts.load(chosen[episode]), manifest)
            write_manifest(beside, manifest)
            close_attempts(folder)
    return _summary(path, manifest, played=played, seconds=time.monotonic() - began)


def _finished(path: Path, folder: Path, beside: Path) -> dict[str, Any] | None:
    """The manifest of a data set that is whole. `ConfigError` for one that was not collected, and must not be lost."""
    if not path.exists() or read_plan(folder) is not None:
        return None
    manifest = read_manifest(beside)
    if manifest is None:
        raise ConfigError([f"out: {path} is there without {beside.name}; move it away, or choose another --out"])
    return manifest


def _play_until_enough(
    wish: Collection, demonstrator: Demonstrator, attempts: Attempts, show: Callable[[int, int], None]
) -> int:
    """Play and record what is missing; how many episodes that took. Raises `DataError` when too many have failed."""
    missing = (index for index in itertools.count() if index not in attempts)
    episodes = play(demonstrator, ((index, episode_seed(wish.seed, "demonstrations", index)) for index in missing))
    played = 0
    while True:
        kept, tried = _kept(wish, attempts)
        show(len(kept), tried)
        if len(kept) == wish.episodes:
            return played
        if tried >= wish.tries:
            raise DataError(
                f"{wish.env}: {len(kept)} of the first {tried} episodes succeeded, and {wish.episodes} are wanted; allow "
                "more by --max-tries, or take them all by --keep-failures"
            )
        attempt = next(episodes)
        played += 1
        attempts.record(attempt if attempt.success or wish.keep_failures else replace(attempt, arrays={}))


def _kept(wish: Collection, attempts: Attempts) -> tuple[list[int], int]:
    """The numbers of the episodes that are kept, and of how many the first ones: up to the last wanted or a missing one."""
    kept: list[int] = []
    tried = 0
    while len(kept) < wish.episodes and tried in attempts:
        if wish.keep_failures or attempts[tried].success:
            kept.append(tried)
        tried += 1
    return kept, tried


def _manifest(plan: dict[str, Any], attempts: Attempts, chosen: list[int], tried: int) -> dict[str, Any]:
    """What is told beside the data, the same whatever happened on the way, but for the machine in `made_with`."""
    heads = [attempts[index] for index in range(tried)]
    machine = versions("cpu")
    return {
        **plan,
        "episodes": len(chosen),
        "steps": sum(attempts[index].steps for index in chosen),
        "success_rate": sum(head.success for head in heads) / tried,
        "actions": "clipped to [-1, 1], as executed",
        "arrays": {name: [str(v.dtype), *v.shape[1:]] for name, v in sorted(attempts.load(chosen[0]).items())},
        "tried": [
            {
                "number": head.index,
                "seed": head.seed,
                "steps": head.steps,
                "first_success": head.first_success,
                "kept": head.index in chosen,
            }
            for head in heads
        ],
        "made_with": {name: machine[name] for name in _MACHINE},
    }


def _earlier(path: Path, manifest: dict[str, Any]) -> Iterator[Attempt]:
    """The attempts from which a finished data set was made."""
    stored = read_episodes(path)
    for row in manifest["tried"]:
        arrays = next(stored) if row["kept"] else {}
        yield Attempt(row["number"], row["seed"], row["steps"], row["first_success"], arrays)


def _versions(demonstrator: Demonstrator) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in demonstrator.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _refuse_faults(wish: Collection) -> None:
    faults = numeric_faults(episodes=wish.episodes, workers=wish.workers, max_tries=wish.max_tries)
    if wish.seed < 0:
        faults.append(f"seed is {wish.seed}; give 0 or more")
    if wish.max_tries is not None and wish.max_tries < wish.episodes:
        faults.append(f"max_tries is {wish.max_tries}, but {wish.episodes} episodes are wanted; allow at least as many")
    if faults:
        raise ConfigError(faults)


def _summary(path: Path, manifest: dict[str, Any], *, played: int, seconds: float) -> dict[str, Any]:
    return {
        "env": manifest["env"],
        "episodes": manifest["episodes"],
        "tried": len(manifest["tried"]),
        "success_rate": manifest["success_rate"],
        "played_now": played,
        "seconds": seconds,
        "data": str(path),
    }


@contextmanager
def _bar(name: str, total: int, progress: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over the episodes that are kept; yields a function that shows how many are kept and tried."""
    columns = (
        TextColumn(name),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        line = bar.add_task("collect", total=total, note="")

        def show(kept: int, tried: int) -> None:
            bar.update(line, completed=kept, note=f"{tried} tried")

        yield show

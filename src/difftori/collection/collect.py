"""Collects a given number of episodes from a scripted expert. An interrupted collection can be resumed."""

import hashlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gymnasium.spaces import Box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from difftori.collection.dataset import need_zarr, read_episodes, read_manifest, write_dataset, write_manifest
from difftori.collection.episode_log import EpisodeLog, open_log, read_plan, refuse_other, remove_log
from difftori.collection.play import ExpertEpisode, play
from difftori.envs.base import numeric_faults
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import Expert, ResolvedEnv
from difftori.envs.workers import launch
from difftori.errors import ConfigError, DataError
from difftori.registry import env_families, resolve_env
from difftori.rollout import episode_seed
from difftori.runs.process import versions

SUCCESSES = "success at any step"
EVERYTHING = "none"
_MACHINE = ("difftori", "git_commit", "python", "numpy", "platform", "cpu")


@dataclass(frozen=True)
class CollectRequest:
    """A request to collect `episodes` episodes of the expert of `env` into `out`/NAME.zarr, where NAME is ENV-SEED.

    Episodes are numbered. The seed of an episode is derived from `seed` and its number. The data set contains the first
    successful episodes, or with `keep_failures` the first ones, so it does not depend on `workers` (processes) or interruptions.
    `obs`: observation type (default: the expert's). `max_tries`: raise `DataError` after this number of episodes (default: ten
    times `episodes`).
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
        """The largest number of episodes to run."""
        return 10 * self.episodes if self.max_tries is None else self.max_tries


def collect(request: CollectRequest, *, progress: bool = True) -> dict[str, Any]:
    """Collect episodes, or resume an interrupted collection, and return a summary.

    A data set with enough episodes is not changed; one with too few is extended. Raises `ConfigError` (an invalid request, or
    another collection in that place), `DataError` (too few successes, damaged or unwritable files), `MissingExtraError`, and
    the errors of the environment.
    """
    env = _with_expert(request.env)
    _refuse_faults(request)
    if request.obs is not None and not env.expert_obs:
        raise ConfigError([f"--obs: the expert of {request.env!r} has no parameter `obs`. Fix: remove {request.obs!r}"])
    need_zarr()
    name, obs = env.name, env.expert_obs if request.obs is None else request.obs
    kept = EVERYTHING if request.keep_failures else SUCCESSES
    plan: dict[str, Any] = {"env": name, "obs": obs, "seed": request.seed, "filter": kept, "code": _code(env)}
    path = Path(request.out) / f"{name.replace(':', '.')}-{request.seed}.zarr"
    folder, beside = path.with_suffix(".attempts"), path.with_suffix(".json")
    finished = _finished(path, folder, beside)
    if finished is not None:
        finished.setdefault("code", plan["code"])  # not recorded by earlier versions
        refuse_other({key: finished.get(key) for key in plan}, plan, beside)
        if finished["episodes"] >= request.episodes:
            return _summary(path, finished, played=0, seconds=0.0)
    workers = min(request.workers, request.episodes)
    kind = "async" if workers > 1 else "sync"
    began = time.monotonic()
    expert = env.make_expert(obs)
    copies = launch(expert.build, name=name, num_envs=workers, seed=request.seed, workers=kind)
    with closing(copies):
        plan["versions"] = _versions(expert)
        if finished is not None:
            refuse_other({key: finished.get(key) for key in plan}, plan, beside)
        earlier = _earlier(path, finished) if finished is not None else iter(())
        with open_log(folder, plan, earlier) as log:
            with _bar(name, request.episodes, progress) as show:
                played = _play_until_enough(request, play(copies, expert, _missing(request, log)), log, show)
            chosen, tried = _kept(request, log)
            manifest = _manifest(plan, _bounds(copies), log, chosen, tried)
            lengths = [log[index].steps for index in chosen]
            write_dataset(path, lengths, lambda episode: log.load(chosen[episode]), manifest)
            write_manifest(beside, manifest)
            remove_log(folder)
    return _summary(path, manifest, played=played, seconds=time.monotonic() - began)


def _with_expert(name: str) -> ResolvedEnv:
    """Return the environment of that name. Raises `ConfigError` if it is unknown or has no scripted expert."""
    env = resolve_env(name)
    if env.family.expert is None:
        known = ", ".join(f"{family}:…" for family, record in env_families().items() if record.expert is not None)
        raise ConfigError(
            [
                f"env: {name!r} has no scripted expert. Fix: choose an environment that has one: {known}; or name your EnvFamily "
                "with an expert, my_package.my_module:FAMILY"
            ]
        )
    return env


def _finished(path: Path, folder: Path, beside: Path) -> dict[str, Any] | None:
    """Return the manifest of a complete data set, or None. Raises `ConfigError` for a data set without manifest, which is not overwritten."""
    if not path.exists() or read_plan(folder) is not None:
        return None
    manifest = read_manifest(beside)
    if manifest is None:
        raise ConfigError([f"out: {path} exists without {beside.name}. Fix: move it away, or choose another --out"])
    return manifest


def _play_until_enough(
    request: CollectRequest, episodes: Iterator[ExpertEpisode], log: EpisodeLog, show: Callable[[int, int], None]
) -> int:
    """Run and record the missing episodes, and return how many were run. Raises `DataError` if too many failed."""
    played = 0
    while True:
        kept, tried = _kept(request, log)
        show(len(kept), tried)
        if len(kept) == request.episodes:
            return played
        if tried >= request.tries:
            raise DataError(
                f"{request.env}: {len(kept)} of the first {tried} episodes succeeded, but {request.episodes} were requested. "
                "Fix: increase --max-tries, or record all episodes with --keep-failures"
            )
        episode = next(episodes)
        played += 1
        log.record(episode if episode.success or request.keep_failures else replace(episode, arrays={}))


def _missing(request: CollectRequest, log: EpisodeLog) -> Iterator[tuple[int, int]]:
    """Yield the numbers and seeds of the episodes that are not in the log, without end."""
    for index in itertools.count():
        if index not in log:
            yield index, episode_seed(request.seed, "demonstrations", index)


def _kept(request: CollectRequest, log: EpisodeLog) -> tuple[list[int], int]:
    """Return the numbers of the selected episodes, and how many consecutive episodes were examined to find them."""
    kept: list[int] = []
    tried = 0
    while len(kept) < request.episodes and tried in log:
        if request.keep_failures or log[tried].success:
            kept.append(tried)
        tried += 1
    return kept, tried


def _bounds(env: CheckedVectorEnv) -> str:
    """Return the range of all actions, or of each if they differ."""
    space = env.single_action_space
    assert isinstance(space, Box)
    pairs = [f"[{low:g}, {high:g}]" for low, high in zip(space.low.ravel(), space.high.ravel(), strict=True)]
    return pairs[0] if len(set(pairs)) == 1 else " ".join(pairs)


def _manifest(plan: dict[str, Any], bounds: str, log: EpisodeLog, chosen: list[int], tried: int) -> dict[str, Any]:
    """Return the description of the data set. Only `made_with`, the machine, depends on how it was collected."""
    heads = [log[index] for index in range(tried)]
    machine = versions("cpu")
    return {
        **plan,
        "episodes": len(chosen),
        "steps": sum(log[index].steps for index in chosen),
        "success_rate": sum(head.success for head in heads) / tried,
        "actions": f"clipped to {bounds}, as executed",
        "arrays": {name: [str(v.dtype), *v.shape[1:]] for name, v in sorted(log.load(chosen[0]).items())},
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


def _earlier(path: Path, manifest: dict[str, Any]) -> Iterator[ExpertEpisode]:
    """Yield the episodes of a finished data set, including those that were not selected."""
    stored = read_episodes(path)
    for row in manifest["tried"]:
        arrays = next(stored) if row["kept"] else {}
        yield ExpertEpisode(row["number"], row["seed"], row["steps"], row["first_success"], arrays)


def _code(env: ResolvedEnv) -> str | None:
    """Return a digest of the module that an environment of the user's is named by; None for others."""
    name = env.name.partition(":")[0]
    file = None if name in env_families() else getattr(sys.modules.get(name), "__file__", None)
    return None if file is None else f"{name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]}"


def _versions(expert: Expert) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in expert.packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _refuse_faults(request: CollectRequest) -> None:
    faults = numeric_faults(episodes=request.episodes, workers=request.workers, max_tries=request.max_tries)
    if request.seed < 0:
        faults.append(f"seed is {request.seed}. Fix: give 0 or more")
    if request.max_tries is not None and request.max_tries < request.episodes:
        faults.append(
            f"--max-tries is {request.max_tries}, but {request.episodes} episodes are requested. Fix: give at least {request.episodes}"
        )
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
    """Show a progress bar over the selected episodes. Yields a function that updates the numbers of selected and tried episodes."""
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

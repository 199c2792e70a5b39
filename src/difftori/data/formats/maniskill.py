"""Reads ManiSkill's trajectories: an HDF5 file with `traj_k/actions` (T A) and `traj_k/obs` (T+1 …), and a JSON file beside it.

The keys are `actions`, and `state` of files with the observation mode `state`, or `point_cloud` (1200 6) and `agent_pos` of
files with the mode `pointcloud`. The clouds are computed episode by episode, as the environment `maniskill` computes them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data._filling import Field
from difftori.data.formats._hdf5 import array_in, group_in, member, names_in, open_file, reading
from difftori.data.formats._source import Source, need, read_json
from difftori.envs.maniskill_cloud import policy_cloud, robot_state
from difftori.envs.maniskill_names import CONTROL, MANISKILL2
from difftori.errors import DataError

_NAME = re.compile(r"traj_(\d+)")
_METADATA = ("env_id", "control_mode", "obs_mode", "robot_uids")
_CONVERTIBLE = "pd_joint_pos"
_CLOUD, _ROBOT = "point_cloud", "agent_pos"


@final
@dataclass(frozen=True)
class ManiskillSource(Source):
    """A file of ManiSkill: its trajectories, groups in the order of `ends`, and the seeds of their episodes."""

    trajectories: tuple[Any, ...]
    seeds: tuple[int, ...]

    def field(self, key: str) -> Field:
        """Return the rows of a key, one block per trajectory; of T+1 observations the first T."""
        rows = {"actions": self._rows("actions"), "state": self._rows("obs"), _CLOUD: self._cloud, _ROBOT: self._robot}
        read, first = rows[key], self.trajectories[0]
        with reading(f"{self.path}: {first.name}, {key}"):
            shape = read(first, self.seeds[0], 1).shape[1:]
        return Field(f"{self.path}: {key}", tuple(shape), self._blocks(key, read))

    def _blocks(self, key: str, read: Callable[[Any, int, int], np.ndarray]) -> Iterator[np.ndarray]:
        lengths = np.diff(np.concatenate([[0], self.ends]))
        for trajectory, seed, length in zip(self.trajectories, self.seeds, lengths, strict=True):
            with reading(f"{self.path}: {trajectory.name}, {key}"):
                block = read(trajectory, seed, int(length))
            yield block

    def _rows(self, key: str) -> Callable[[Any, int, int], np.ndarray]:
        return lambda trajectory, seed, length: self._first(trajectory, key, length)

    def _first(self, trajectory: Any, key: str, length: int) -> np.ndarray:
        """Return the first `length` steps of an array. Raises DataError if it has fewer."""
        array = array_in(trajectory, key, self.path)
        if array.shape[0] < length:
            raise DataError(
                f"{self.path}: {trajectory.name}/{key} has {array.shape[0]} steps, but its actions {length}. Fix: create the "
                "file again"
            )
        return array[:length]

    def _robot(self, trajectory: Any, seed: int, length: int) -> np.ndarray:
        joints = (self._first(trajectory, f"obs/agent/{part}", length) for part in ("qpos", "qvel"))
        return robot_state(*joints, self._extra(trajectory, "tcp_pose", length))

    def _extra(self, trajectory: Any, name: str, length: int) -> np.ndarray | None:
        """Return an array that only some tasks show: two-armed robots have no `tcp_pose`, and most tasks no `goal_pos`."""
        shown = group_in(group_in(trajectory, "obs", self.path), "extra", self.path)
        return self._first(shown, name, length) if name in names_in(shown, self.path) else None

    def _cloud(self, trajectory: Any, seed: int, length: int) -> np.ndarray:
        xyzw, rgb = (self._first(trajectory, f"obs/pointcloud/{part}", length) for part in ("xyzw", "rgb"))
        extra = [self._extra(trajectory, name, length) for name in ("tcp_pose", "goal_pos")]
        tcp, goals = ([None] * length if part is None else part for part in extra)
        draws = np.random.default_rng(seed)
        shown = zip(xyzw, rgb, tcp, goals, strict=True)
        return np.stack([policy_cloud(*step, draws) for step in shown])


def holds_trajectories(path: Path) -> bool:
    """Return whether an HDF5 file is ManiSkill's: it contains `traj_k`. Damaged files are not."""
    try:
        with open_file(path) as file:
            return any(_NAME.fullmatch(name) for name in names_in(file, path))
    except DataError:
        return False


@contextmanager
def open_maniskill(path: Path) -> Iterator[ManiskillSource]:
    """Open the file and its JSON file, and check them. The trajectories are those of the JSON file, in its order.

    Raises DataError, also for actions of another control mode, and MissingExtraError without the extra `data`.
    """
    about = _described(path)
    with open_file(path) as file:
        names = [f"traj_{episode['episode_id']}" for episode in about["episodes"]]
        trajectories = tuple(group_in(file, name, path) for name in names)
        ends = np.cumsum([_length(trajectory, path) for trajectory in trajectories])
        _refuse_other_frame(about["env_id"], trajectories[0], path)
        observed = _observations(trajectories[0], path)
        seeds = tuple(_seed(episode, path) for episode in about["episodes"])
        entries = {name: name for name in observed}
        metadata = {name: about[name] for name in _METADATA if name in about}
        yield ManiskillSource(path, ("actions", *observed), "actions", entries, ends, metadata, trajectories, seeds)


def _described(path: Path) -> dict[str, Any]:
    """Read the JSON file beside `path`: `env_id`, `control_mode`, `obs_mode`, and `episodes`, a list of objects, not empty.

    `robot_uids` is one name; it is absent if the file was recorded with the default robot of the task.
    """
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise DataError(f"{path}: there is no {beside.name} beside it. Fix: copy it there; ManiSkill writes both files")
    content = read_json(beside)
    try:
        info, episodes = content["env_info"], [dict(episode) for episode in content["episodes"]]
        about = {"env_id": str(info["env_id"]), "episodes": episodes}
        about |= {name: str(info["env_kwargs"][name]) for name in ("control_mode", "obs_mode")}
        if robots := info["env_kwargs"].get("robot_uids"):
            about["robot_uids"] = robots if isinstance(robots, str) else ", ".join(str(robot) for robot in robots)
        modes = {str(episode.get("control_mode", about["control_mode"])) for episode in episodes}
        numbers = [int(episode["episode_id"]) for episode in episodes]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{beside}: not ManiSkill's description of trajectories ({error!r}). Fix: restore it"
        ) from error
    if not numbers:
        raise DataError(f"{beside}: lists no episodes. Fix: record successful episodes, or pass another file")
    task = about["env_id"].rpartition("-")[0]
    _, control = MANISKILL2.get(task, ("", CONTROL))
    package, backend = ("mani_skill2", "") if task in MANISKILL2 else ("mani_skill", " --sim-backend physx_cpu")
    replay = (
        f"Fix: python -m {package}.trajectory.replay_trajectory --traj-path {path} -o state -c {control} --save-traj{backend} "
        "(or -o pointcloud), and pass the file that it writes"
    )
    if wrong := sorted(modes - {control}):
        # ManiSkill's tool converts actions of this mode only.
        fix = replay if wrong == [_CONVERTIBLE] else f"Fix: give demonstrations in {control} or {_CONVERTIBLE}"
        raise DataError(f"{path}: its actions are {', '.join(wrong)}; the environment's are {control}. {fix}")
    if about["obs_mode"] not in ("state", "pointcloud"):
        raise DataError(f"{path}: its observations are {about['obs_mode']!r}, neither state nor pointcloud. {replay}")
    return about


def _refuse_other_frame(env_id: str, trajectory: Any, path: Path) -> None:
    """Raise DataError for a file of ManiSkill 2, whose names end in -v0 or whose simulator states are one array."""
    is_array = "env_states" in names_in(trajectory, path) and isinstance(
        member(trajectory, "env_states", path), need("h5py").Dataset
    )
    second = env_id.endswith("-v0") or is_array
    if second and env_id.rpartition("-")[0] not in MANISKILL2:
        raise DataError(
            f"{path}: is of ManiSkill 2 ({env_id}), whose actions are in the frame of the hand; those of ManiSkill 3 are in the "
            "frame of the base. Fix: use demonstrations of ManiSkill 3, from its download_demo or difftori collect"
        )


def _observations(trajectory: Any, path: Path) -> tuple[str, ...]:
    """Return the observations of a file: the state is one array, and the mode `pointcloud` a group."""
    if "obs" not in names_in(trajectory, path):
        raise DataError(f"{path}: {trajectory.name} has no obs. Fix: create the file again, with observations")
    is_group = isinstance(member(trajectory, "obs", path), need("h5py").Group)
    return (_CLOUD, _ROBOT) if is_group else ("state",)


def _length(trajectory: Any, path: Path) -> int:
    steps = int(array_in(trajectory, "actions", path).shape[0])
    if steps == 0:
        raise DataError(f"{path}: {trajectory.name} has no steps. Fix: remove it from the JSON file")
    return steps


def _seed(episode: Mapping[str, Any], path: Path) -> int:
    """Return the seed of an episode, a number or a list of one."""
    seed = episode.get("episode_seed")
    seed = seed[0] if isinstance(seed, list) and len(seed) == 1 else seed
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(
            f"{path.with_suffix('.json')}: episode {episode['episode_id']} has the seed {seed!r}. Fix: give a number from 0"
        )
    return seed

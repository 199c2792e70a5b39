"""Runs episodes of a scripted expert, several in parallel."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.data.trajectories import RESERVED, is_entry_name
from difftori.envs.base import EnvironmentRestarted, Observation
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import Expert
from difftori.errors import ConfigError, ShapeError
from difftori.rollout import run_episodes


@dataclass(frozen=True)
class ExpertEpisode:
    """An episode of T steps: its number and seed, and the number of steps until its first success (None: no success).

    `arrays` (T …) holds the observation before each step, by its name in the data set, and `action` (T A), as executed.
    """

    index: int
    seed: int
    steps: int
    first_success: int | None
    arrays: dict[str, np.ndarray]

    @property
    def success(self) -> bool:
        """Whether the episode succeeded at any step."""
        return self.first_success is not None


@dataclass
class _Track:
    """A running episode."""

    index: int
    seed: int
    first_success: int | None = None
    seen: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def note(self, name: str, value: np.ndarray) -> None:
        self.seen.setdefault(name, []).append(value)

    def ended(self) -> ExpertEpisode:
        arrays = {name: np.stack(values) for name, values in self.seen.items()}
        return ExpertEpisode(self.index, self.seed, len(arrays["action"]), self.first_success, arrays)


def play(env: CheckedVectorEnv, expert: Expert, wanted: Iterator[tuple[int, int]]) -> Iterator[ExpertEpisode]:
    """Run the episodes of `wanted`, an iterator of numbers and seeds, and yield each when it ends.

    All rows of the environment run in parallel, so episodes may end out of order. The expert's actions are clipped to the
    action space. When a failed environment is restarted, the running episodes start again.

    Raises `ConfigError` if `info` has no `success` or the expert's `arrays` are not those of the environment, `ShapeError` for
    actions of another shape than (num_envs, A), and the errors of the environment.
    """
    _refuse_arrays(env, expert)
    lost: list[tuple[int, int]] = []
    while True:
        running: dict[int, _Track] = {}
        try:
            yield from _run(env, expert, chain(lost, wanted), running)
            return
        except EnvironmentRestarted:
            lost = [(track.index, track.seed) for track in running.values()]


def _refuse_arrays(env: CheckedVectorEnv, expert: Expert) -> None:
    """Raise `ConfigError` if the expert stores nothing, or under a name that is not allowed, or what the environment does not observe."""
    space = env.single_observation_space
    known = list(space.spaces) if isinstance(space, Dict) else []
    faults = [] if known else [f"{env.name}: its observations are {space}. Fix: return a dictionary of arrays"]
    if not expert.arrays:
        faults.append(f"{env.name}: the expert's `arrays` are empty. Fix: name the observations to store")
    for stored, name in expert.arrays.items():
        if not is_entry_name(stored):
            faults.append(
                f"{env.name}: arrays has the name {stored!r}. Fix: letters, digits and _, and not {', '.join(RESERVED)}"
            )
        if known and name not in known:
            faults.append(
                f"{env.name}: arrays stores {name!r}, which is not observed. Fix: choose from {', '.join(known)}"
            )
    if faults:
        raise ConfigError(faults)


def _run(
    env: CheckedVectorEnv, expert: Expert, wanted: Iterator[tuple[int, int]], running: dict[int, _Track]
) -> Iterator[ExpertEpisode]:
    """Run the episodes of `wanted`, until the environment fails. `running` holds those that have begun and not ended."""
    box = env.action_space
    assert isinstance(box, Box)

    def seeds() -> Iterator[int]:
        for number, (index, seed) in enumerate(wanted):
            running[number] = _Track(index, seed)
            yield seed

    def act(obs: Observation, first: np.ndarray, active: np.ndarray) -> np.ndarray:
        assert isinstance(obs, dict)
        actions = np.asarray(expert.act(obs))
        if actions.shape != box.shape or actions.dtype.kind not in "biuf":
            raise ShapeError(
                f"{env.name}: the expert returned actions of shape {actions.shape} and type {actions.dtype}. Fix: return numbers "
                f"{box.shape}, one row for each of the {env.num_envs} environments"
            )
        return np.clip(actions, box.low, box.high).astype(box.dtype)

    for step in run_episodes(env, act, seeds()):
        if step.success is None:
            raise ConfigError(
                [f'{env.name}: "success" is missing from the info of a step. Fix: report it in every step']
            )
        assert isinstance(step.obs, dict)
        for row, number in step.active():
            track = running[number]
            for stored, name in expert.arrays.items():
                track.note(stored, step.obs[name][row])
            track.note("action", step.actions[row])
            if track.first_success is None and step.success[row]:
                track.first_success = len(track.seen["action"])
            if step.ended[row]:
                yield running.pop(number).ended()

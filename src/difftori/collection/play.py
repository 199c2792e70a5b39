"""Runs episodes of a scripted expert, several in parallel."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from gymnasium.spaces import Box

from difftori.envs.base import EnvironmentRestarted, Observation
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import Expert
from difftori.errors import ConfigError
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

    Raises `ConfigError` if `info` has no `success`, and the errors of the environment.
    """
    lost: list[tuple[int, int]] = []
    while True:
        running: dict[int, _Track] = {}
        try:
            yield from _run(env, expert, chain(lost, wanted), running)
            return
        except EnvironmentRestarted:
            lost = [(track.index, track.seed) for track in running.values()]


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
        return np.clip(expert.act(obs), box.low, box.high).astype(box.dtype)

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

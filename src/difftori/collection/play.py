"""Runs episodes of a scripted expert, several in parallel."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from gymnasium.spaces import Box

from difftori.envs.base import EnvironmentRestarted
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import Expert
from difftori.errors import ConfigError


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
    """The running episode of one row."""

    index: int
    seed: int
    first_success: int | None = None
    seen: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def note(self, name: str, value: np.ndarray) -> None:
        self.seen.setdefault(name, []).append(value)

    def restart(self) -> None:
        self.first_success, self.seen = None, {}

    def ended(self) -> ExpertEpisode:
        arrays = {name: np.stack(values) for name, values in self.seen.items()}
        return ExpertEpisode(self.index, self.seed, len(arrays["action"]), self.first_success, arrays)


def play(env: CheckedVectorEnv, expert: Expert, wanted: Iterator[tuple[int, int]]) -> Iterator[ExpertEpisode]:
    """Run the episodes of `wanted`, an endless iterator of numbers and seeds, and yield each when it ends.

    All rows of the environment run in parallel, so episodes may end out of order. The expert's actions are clipped to the
    action space. When a failed environment is restarted, the running episodes start again.

    Raises `ConfigError` if `info` has no `success`, and the errors of the environment.
    """
    box = env.action_space
    assert isinstance(box, Box)
    tracks = [_Track(*next(wanted)) for _ in range(env.num_envs)]
    fresh = np.ones(env.num_envs, dtype=bool)
    observations: dict[str, np.ndarray] = {}
    while True:
        try:
            if fresh.any():
                seeds = [track.seed for track in tracks]
                observations, _ = env.reset(seed=seeds, options={"reset_mask": fresh})
                fresh[:] = False
            actions = np.clip(expert.act(observations), box.low, box.high).astype(box.dtype)
            following, _, terminated, truncated, info = env.step(actions)
        except EnvironmentRestarted:
            for track in tracks:
                track.restart()
            fresh[:] = True
            continue
        if "success" not in info:
            raise ConfigError(
                [f'{env.name}: "success" is missing from the info of a step. Fix: report it in every step']
            )
        for row, track in enumerate(tracks):
            for stored, name in expert.arrays.items():
                track.note(stored, observations[name][row])
            track.note("action", actions[row])
            if track.first_success is None and info["success"][row]:
                track.first_success = len(track.seen["action"])
            if terminated[row] or truncated[row]:
                yield track.ended()
                tracks[row] = _Track(*next(wanted))
                fresh[row] = True
        observations = following

"""An expert plays episodes, several at once."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from gymnasium.spaces import Box

from difftori.envs.base import EnvironmentRestarted
from difftori.envs.demonstrator import Demonstrator
from difftori.errors import ConfigError


@dataclass(frozen=True)
class Attempt:
    """One episode of T steps: its number and seed, the step after which it first counted as done (None: never).

    `arrays` (T …) holds what was seen before each step, by its name in the data set, and `action` (T A) as executed.
    """

    index: int
    seed: int
    steps: int
    first_success: int | None
    arrays: dict[str, np.ndarray]

    @property
    def success(self) -> bool:
        """Whether the task was done at any step."""
        return self.first_success is not None


@dataclass
class _Track:
    """A running episode of one row."""

    index: int
    seed: int
    first_success: int | None = None
    seen: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def note(self, name: str, value: np.ndarray) -> None:
        self.seen.setdefault(name, []).append(value)

    def restart(self) -> None:
        self.first_success, self.seen = None, {}

    def ended(self) -> Attempt:
        arrays = {name: np.stack(values) for name, values in self.seen.items()}
        return Attempt(self.index, self.seed, len(arrays["action"]), self.first_success, arrays)


def play(demonstrator: Demonstrator, wanted: Iterator[tuple[int, int]]) -> Iterator[Attempt]:
    """The episodes of `wanted`, pairs of number and seed without end, as they end; the caller stops asking.

    All rows of the environment play at once, so episodes may come out of order. What is executed is the expert's action
    clipped to the box. A copy that fails costs the running episodes, which are played again from their start.

    Raises `ConfigError` for an environment that does not say whether it succeeded, and what the environment raises.
    """
    env = demonstrator.env
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
            actions = np.clip(demonstrator.act(observations), box.low, box.high).astype(box.dtype)
            following, _, terminated, truncated, info = env.step(actions)
        except EnvironmentRestarted:
            for track in tracks:
                track.restart()
            fresh[:] = True
            continue
        if "success" not in info:
            raise ConfigError([f'{env.name}: its info has no "success", so nobody knows which episodes to keep'])
        for row, track in enumerate(tracks):
            for stored, name in demonstrator.arrays.items():
                track.note(stored, observations[name][row])
            track.note("action", actions[row])
            if track.first_success is None and info["success"][row]:
                track.first_success = len(track.seen["action"])
            if terminated[row] or truncated[row]:
                yield track.ended()
                tracks[row] = _Track(*next(wanted))
                fresh[row] = True
        observations = following

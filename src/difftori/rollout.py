"""Executes an imitation policy in an environment: observation histories, plans, and the result of each episode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from difftori.envs.base import EnvironmentRestarted, Observation
from difftori.envs.checked import CheckedVectorEnv
from difftori.errors import ConfigError
from difftori.types import Plans, TaskSpec, WindowObs

Act: TypeAlias = Callable[[WindowObs], Plans]
"""A policy as a function from the last O observations of B rows, by name, to the actions (B H A)."""


@dataclass
class Episode:
    """The result of one episode: success at any step, score (0 or 1 for success if the environment has none), return, length in steps."""

    seed: int
    success: bool = False
    score: float = 0.0
    total: float = 0.0
    length: int = 0


def named(observation: Observation) -> dict[str, np.ndarray]:
    """Return the observations of all rows by name, as policies get them. A single array is named `state`; images have channels last."""
    entries = observation if isinstance(observation, dict) else {"state": observation}
    return {
        name: values.transpose(0, 2, 3, 1) if values.dtype == np.uint8 and values.ndim == 4 else values
        for name, values in entries.items()
    }


def play(env: CheckedVectorEnv, act: Act, spec: TaskSpec, seeds: Sequence[int]) -> list[Episode]:
    """Run one episode from each seed, `env.num_envs` in parallel, and return them in the order of the seeds.

    A row computes a new plan after executing the `n_action_steps` actions of the previous one. The first observation of an
    episode is repeated in place of earlier ones. An episode ends when it succeeds. If the environment fails and is restarted,
    all episodes are run again; EnvironmentFailed is raised when no restarts are left.
    """
    while True:
        try:
            return _Play(env, act, spec, seeds).run()
        except EnvironmentRestarted:
            continue


def make_step_policy(act: Act, spec: TaskSpec) -> Callable[[Observation], np.ndarray]:
    """Return a function from one row's observation to its next action (1 A), for one episode."""
    history: dict[str, list[np.ndarray]] = {}
    waiting: list[np.ndarray] = []

    def step(observation: Observation) -> np.ndarray:
        for name, values in named(observation).items():
            history[name] = [*history.get(name, [values] * spec.n_obs_steps)[1:], values]
        if not waiting:
            obs: WindowObs = {name: torch.from_numpy(np.stack(values, 1)) for name, values in history.items()}
            waiting.extend(act(obs)[0, spec.present].cpu().numpy())
        return waiting.pop(0)[None]

    return step


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a success rate (Wilson, 1927), which is valid for few trials and rates near 0 or 1. z = 1.96: 95 %."""
    rate, weight = successes / trials, z * z / trials
    middle = (rate + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * (rate * (1 - rate) / trials + weight / (4 * trials)) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)


class _Play:
    """The state of one call of `play`."""

    def __init__(self, env: CheckedVectorEnv, act: Act, spec: TaskSpec, seeds: Sequence[int]):
        self.env, self.act, self.spec = env, act, spec
        self.episodes = [Episode(seed) for seed in seeds]
        self.waiting = list(range(len(seeds)))[::-1]
        rows = env.num_envs
        self.playing: list[int | None] = [None] * rows  # the episode in each row
        self.cursor = np.full(rows, spec.n_action_steps)  # number of executed actions of each row's plan
        self.plans = np.zeros((rows, spec.n_action_steps, spec.action_dim), dtype=np.float32)
        self.history: dict[str, np.ndarray] = {}  # (rows O …)

    def run(self) -> list[Episode]:
        """Run all episodes."""
        self._begin(np.ones(self.env.num_envs, dtype=bool))
        while any(episode is not None for episode in self.playing):
            self._plan()
            rows = np.arange(self.env.num_envs)
            actions = self.plans[rows, np.minimum(self.cursor, self.spec.n_action_steps - 1)]
            self.cursor += 1
            seen, rewards, terminated, truncated, info = self.env.step(actions)
            if "success" not in info:
                raise ConfigError(
                    [f"env: {self.env.name} has no `success` in the info of its steps. Fix: report it in every step"]
                )
            self._push(named(seen))
            over = terminated | truncated
            for row, number in enumerate(self.playing):
                if number is None:
                    continue
                episode = self.episodes[number]
                episode.total += float(rewards[row])
                episode.length += 1
                episode.success = bool(info["success"][row])
                episode.score = max(episode.score, float(info["score"][row] if "score" in info else episode.success))
                over[row] |= episode.success
            if over.any():
                self._begin(over)
        return self.episodes

    def _begin(self, rows: np.ndarray) -> None:
        """Start the next episodes in these rows. A row without an episode idles."""
        seeds: list[int | None] = [0] * len(rows)
        for row in np.flatnonzero(rows):
            self.playing[row] = self.waiting.pop() if self.waiting else None
            number = self.playing[row]
            seeds[row] = self.episodes[-1 if number is None else number].seed
        if all(episode is None for episode in self.playing):
            return
        seen, _ = self.env.reset(seed=seeds, options={"reset_mask": rows})
        first = named(seen)
        if not self.history:
            self.history = {name: np.repeat(v[:, None], self.spec.n_obs_steps, 1) for name, v in first.items()}
        for name, values in first.items():
            self.history[name][rows] = values[rows, None]
        self.cursor[rows] = self.spec.n_action_steps

    def _push(self, seen: dict[str, np.ndarray]) -> None:
        for name, values in seen.items():
            self.history[name] = np.concatenate((self.history[name][:, 1:], values[:, None]), 1)

    def _plan(self) -> None:
        """Compute new plans for the active rows that have executed their plans."""
        due = (self.cursor >= self.spec.n_action_steps) & np.array([episode is not None for episode in self.playing])
        if due.any():
            obs: WindowObs = {name: torch.from_numpy(values[due]) for name, values in self.history.items()}
            self.plans[due] = self.act(obs)[:, self.spec.present].cpu().numpy()
            self.cursor[due] = 0

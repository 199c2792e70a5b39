"""Executing a policy of imitation in an environment: histories of observations, plans, and what came of each episode."""

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
"""A policy as the task sees it: the last O observations of B rows, by name, to the actions (B H A)."""


@dataclass
class Episode:
    """How one episode went: whether it succeeded at any step, its score where the environment keeps one, its return, its length."""

    seed: int
    success: bool = False
    score: float = 0.0
    total: float = 0.0
    length: int = 0


def named(observation: Observation) -> dict[str, np.ndarray]:
    """Observations of all rows by name, as policies see them: one array is `state`, images have their channels last."""
    entries = observation if isinstance(observation, dict) else {"state": observation}
    return {
        name: values.transpose(0, 2, 3, 1) if values.dtype == np.uint8 and values.ndim == 4 else values
        for name, values in entries.items()
    }


def play(env: CheckedVectorEnv, act: Act, spec: TaskSpec, seeds: Sequence[int]) -> list[Episode]:
    """One episode from each seed, in their order, as many at once as `env` has rows.

    Each row asks for a new plan when the `n_action_steps` actions of its last one are spent. Before an episode's first step
    its first observation stands for earlier ones. An episode counts as over when it has succeeded. After a failure of the
    environment all is played again, until its budget of restarts is spent (EnvironmentFailed).
    """
    while True:
        try:
            return _Play(env, act, spec, seeds).run()
        except EnvironmentRestarted:
            continue


def make_step_policy(act: Act, spec: TaskSpec) -> Callable[[Observation], np.ndarray]:
    """The policy as a function from one row's observation to its next action (1 A), for one episode."""
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
    """The interval of a success rate at 95 % (Wilson, 1927), which holds for few trials and rates near 0 or 1."""
    rate, weight = successes / trials, z * z / trials
    middle = (rate + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * (rate * (1 - rate) / trials + weight / (4 * trials)) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)


class _Play:
    """The rows of one call of `play`."""

    def __init__(self, env: CheckedVectorEnv, act: Act, spec: TaskSpec, seeds: Sequence[int]):
        self.env, self.act, self.spec = env, act, spec
        self.episodes = [Episode(seed) for seed in seeds]
        self.waiting = list(range(len(seeds)))[::-1]
        rows = env.num_envs
        self.playing: list[int | None] = [None] * rows  # the episode in each row
        self.cursor = np.full(rows, spec.n_action_steps)  # actions of the row's plan that are spent
        self.plans = np.zeros((rows, spec.n_action_steps, spec.action_dim), dtype=np.float32)
        self.history: dict[str, np.ndarray] = {}  # (rows O …)

    def run(self) -> list[Episode]:
        """Play them all."""
        self._begin(np.ones(self.env.num_envs, dtype=bool))
        while any(episode is not None for episode in self.playing):
            self._plan()
            rows = np.arange(self.env.num_envs)
            actions = self.plans[rows, np.minimum(self.cursor, self.spec.n_action_steps - 1)]
            self.cursor += 1
            seen, rewards, terminated, truncated, info = self.env.step(actions)
            if "success" not in info:
                raise ConfigError(
                    [f"env: {self.env.name} does not say `success` in the info of its steps; let it, to be measured in"]
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
        """Give these rows the next episodes; a row without one idles."""
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
        """New plans for the playing rows whose plans are spent."""
        due = (self.cursor >= self.spec.n_action_steps) & np.array([episode is not None for episode in self.playing])
        if due.any():
            obs: WindowObs = {name: torch.from_numpy(values[due]) for name, values in self.history.items()}
            self.plans[due] = self.act(obs)[:, self.spec.present].cpu().numpy()
            self.cursor[due] = 0

"""Collects training episodes in a vector of environments."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from difftori.data.replay import Replay
from difftori.envs.base import EnvironmentRestarted
from difftori.envs.checked import CheckedVectorEnv
from difftori.errors import CheckpointError
from difftori.interfaces import Memory
from difftori.rollout import episode_seed
from difftori.runs.checkpoint import State
from difftori.types import Actions, Observations, RowFlags

ActInEnvs: TypeAlias = Callable[[Observations, "Memory | None", RowFlags], tuple[Actions, Memory]]
"""(observations (N *S), memory, first (N)) → actions (N A) and the memory for the next call."""


_log = logging.getLogger(__name__)


class EpisodeSummary(NamedTuple):
    """One episode that has ended: its observations (L *S), without the last, its return, its length in agent steps, and its number
    among the finished ones, from 1.
    """

    obs: np.ndarray
    total: float
    length: int
    number: int


@dataclass
class _Row:
    """One environment's running episode."""

    seed: int
    obs: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    total: float = 0.0


class Collector:
    """Steps `env`, passes whole episodes to `replay`, and can be restored in the middle of an episode.

    Each episode has its own seed, counted up from the run's seed, so a resumed run gets the same episodes. A running episode
    is saved as its seed and actions, and replayed. A failed environment discards the running episodes.
    """

    def __init__(self, env: CheckedVectorEnv, replay: Replay, seed: int):
        self.env, self.replay, self.seed = env, replay, seed
        self.agent_steps = 0
        self.episodes, self.finished = 0, 0
        self.memory: Memory | None = None
        self.seconds = {"acting": 0.0, "environment": 0.0}
        self._rows: list[_Row] = []
        self._obs = np.zeros(0)
        self._first = np.zeros(0, dtype=bool)

    def begin(self) -> None:
        """Start an episode in every environment."""
        self.memory = None
        self._rows = [self._next_episode() for _ in range(self.env.num_envs)]
        self._obs, _ = self.env.reset(seed=[row.seed for row in self._rows])
        self._first = np.ones(self.env.num_envs, dtype=bool)
        for row in range(self.env.num_envs):
            self.replay.begin(row, self._obs[row])

    def step(self, act: ActInEnvs, meanwhile: Callable[[], None] | None = None) -> list[EpisodeSummary]:
        """Take one agent step in every environment. Returns the episodes that ended at this step.

        `meanwhile` is called while the environments step; see `CheckedVectorEnv.step`. Its time is not counted as theirs.
        """
        began = time.perf_counter()
        actions, self.memory = act(torch.from_numpy(self._obs), self.memory, torch.from_numpy(self._first))
        chosen = actions.cpu().numpy()
        acted = time.perf_counter()
        self.seconds["acting"] += acted - began
        elsewhere = 0.0

        def timed() -> None:
            nonlocal elsewhere
            began = time.perf_counter()
            if meanwhile is not None:
                meanwhile()
            elsewhere = time.perf_counter() - began

        try:
            return self._execute(chosen, None if meanwhile is None else timed)
        except EnvironmentRestarted:
            self._restart()
            return []
        finally:
            self.seconds["environment"] += time.perf_counter() - acted - elsewhere

    def _execute(self, actions: np.ndarray, meanwhile: Callable[[], None] | None) -> list[EpisodeSummary]:
        next_obs, rewards, terminated, truncated, _ = self.env.step(actions, meanwhile)
        ends = terminated | truncated
        ended = []
        for index, row in enumerate(self._rows):
            row.obs.append(self._obs[index])
            row.actions.append(actions[index])
            row.total += float(rewards[index])
            self.replay.add(
                index,
                actions[index],
                rewards[index],
                next_obs[index],
                terminated=bool(terminated[index]),
                truncated=bool(truncated[index]),
            )
            if ends[index]:
                self.finished += 1
                ended.append(EpisodeSummary(np.stack(row.obs), row.total, len(row.actions), self.finished))
        self.agent_steps += len(self._rows)
        self._obs, self._first = next_obs, ends
        if ends.any():
            try:
                self._begin_rows(ends)
            except EnvironmentRestarted:
                self._restart()
        return ended

    def _restart(self) -> None:
        """After a failure: discard the running episodes. Retries until an environment works or the restarts are used up."""
        while True:
            for row in range(self.env.num_envs):
                self.replay.drop(row)
            try:
                return self.begin()
            except EnvironmentRestarted:
                continue

    def _begin_rows(self, ends: np.ndarray) -> None:
        for index in np.flatnonzero(ends):
            self._rows[index] = self._next_episode()
        self._obs, _ = self.env.reset(seed=[row.seed for row in self._rows], options={"reset_mask": ends})
        for index in np.flatnonzero(ends):
            self.replay.begin(int(index), self._obs[index])

    def _next_episode(self) -> _Row:
        self.episodes += 1
        return _Row(episode_seed(self.seed, "training", self.episodes))

    def state(self) -> State:
        """Counters, and each running episode as its seed and actions."""
        rows = [
            {"seed": row.seed, "actions": torch.from_numpy(np.array(row.actions, dtype=np.float32))}
            for row in self._rows
        ]
        return {
            "agent_steps": self.agent_steps,
            "episodes": self.episodes,
            "finished": self.finished,
            "rows": rows,
            "memory": self.memory,
            "obs": torch.from_numpy(self._obs.copy()),
            "first": torch.from_numpy(self._first.copy()),
        }

    def load(self, state: State) -> None:
        """Replay the running episodes, and discard them with a warning if each replay gives another result.

        `replay` must already contain the partial episodes. Raises CheckpointError if the result always is the same other one.
        """
        self.agent_steps, self.episodes = int(state["agent_steps"]), int(state["episodes"])
        self.finished = int(state.get("finished", max(self.episodes - len(state["rows"]), 0)))
        self.memory, self._first = state["memory"], state["first"].numpy()
        self._obs, recorded = self._replayed(state), state["obs"].numpy()
        if np.array_equal(self._obs, recorded):
            return
        if np.array_equal(self._obs, self._replayed(state)):
            raise CheckpointError(
                f"{self.env.name}: the running episodes, replayed from their seeds, give different observations: this environment "
                "has another version. Fix: install the same version, or start a new run."
            )
        _log.warning(
            "%s: the running episodes, replayed from their seeds, give different observations each time: random numbers do not come from "
            "the seed. These episodes are discarded. Fix: draw them from self.np_random after super().reset(seed=seed)",
            self.env.name,
        )
        self._restart()

    def _replayed(self, state: State) -> np.ndarray:
        """The observations after the running episodes.

        All environments step together: the longest episode begins first, and each other one begins later by the difference in length.
        """
        self._rows = [_Row(int(row["seed"])) for row in state["rows"]]
        plans = [row["actions"].numpy() for row in state["rows"]]
        longest = max(len(plan) for plan in plans)
        seeds: list[int | None] = [row.seed for row in self._rows]
        obs, _ = self.env.reset(seed=seeds)
        over = np.zeros(len(plans), dtype=bool)
        for time_step in range(longest):
            starting = np.array([longest - len(plan) == time_step and time_step > 0 for plan in plans])
            if (starting | over).any():
                obs, _ = self.env.reset(seed=seeds, options={"reset_mask": starting | over})
            done = [time_step - (longest - len(plan)) for plan in plans]
            actions = np.stack([plan[k] if k >= 0 else self._idle() for plan, k in zip(plans, done, strict=True)])
            for row, plan, k, seen in zip(self._rows, plans, done, obs, strict=True):
                if k >= 0:
                    row.obs.append(seen)
                    row.actions.append(plan[k])
            obs, rewards, terminated, truncated, _ = self.env.step(actions)
            over = terminated | truncated
            for row, k, reward in zip(self._rows, done, rewards, strict=True):
                row.total += float(reward) if k >= 0 else 0.0
        fresh = np.array([len(plan) == 0 for plan in plans])
        if longest and (over | fresh).any():
            obs, _ = self.env.reset(seed=seeds, options={"reset_mask": over | fresh})
        return obs

    def _idle(self) -> np.ndarray:
        return np.zeros(self.env.single_action_space.shape or (), dtype=np.float32)

"""`agent.update` and `agent.end_episode` with their random generator, and what they log; on a CUDA device as CUDA graphs."""

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from difftori.interfaces import Agent, LearningSchedule
from difftori.optim import MAX_SKIPS
from difftori.runs.averages import Averages
from difftori.solver import Captured
from difftori.solver.cuda_graphs import Recorder
from difftori.types import Metrics, Observations, Rows, Scalars, Segment


class Learning:
    """An agent that learns with one generator, and the averages of its metrics.

    On a CUDA device, unless the agent is compiled, updates are replayed as one CUDA graph for each of the agent's learning
    schedules; nothing waits for the device but `read`, and a check for NaN every ten updates. `recorder`: see `Captured`.
    """

    def __init__(self, agent: Agent, generator: torch.Generator, *, recorder: Recorder | None = None):
        self.agent, self.generator = agent, generator
        self.averages = Averages()
        options = {"generators": [generator], "changing": lambda: list(_changing_state(agent)), "recorder": recorder}
        self._update = Captured(self._run_update, **options)
        self._end_episode = Captured(self._run_end_episode, **options)
        self._unchecked = 0

    def update(self, segment: Segment) -> Rows:
        """Make one update, and return the new priorities (B), on the agent's device."""
        schedule = self._schedule()
        if schedule is None:
            priorities, metrics = self.agent.update(segment, generator=self.generator)
        else:
            parts = (segment.obs, segment.actions, segment.rewards, segment.terminated, segment.mask, segment.weights)
            priorities, metrics = self._update(*parts, schedule.update)
            self.agent.updates += 1
        self.averages.add(metrics)
        self._unchecked += 1
        if self._unchecked >= MAX_SKIPS:
            self.check()
        return priorities

    def end_episode(self, obs: Observations) -> Metrics:
        """The agent's `end_episode`, and its metrics as numbers."""
        schedule = self._schedule()
        if schedule is None or schedule.end_episode is None:
            metrics = self.agent.end_episode(obs, generator=self.generator)
        else:
            metrics = self._end_episode(obs, schedule.end_episode)
        return {name: float(value) for name, value in metrics.items()}

    def read(self) -> Metrics:
        """The averages of the metrics since the last reading. Raises NonFiniteError; see `GuardedOptimizer`."""
        self.check()
        return self.averages.read()

    def check(self) -> None:
        """Raise NonFiniteError if too many consecutive updates were skipped."""
        self._unchecked = 0
        for optimizer in self.agent.optimizers.values():
            optimizer.check()

    def _schedule(self) -> LearningSchedule | None:
        """The agent's learning schedule, or None if nothing is recorded."""
        recorded = self._update.records(self.generator.device) and not self.agent.compiles
        return self.agent.learning_schedule() if recorded else None

    def _run_update(self, *arguments: Any) -> tuple[Rows, Scalars]:
        *parts, _ = arguments
        weights = parts[-1]
        segment = Segment(*parts, index=torch.zeros_like(weights, dtype=torch.long))  # agents do not use the index
        before = self.agent.updates
        try:
            return self.agent.update(segment, generator=self.generator)
        finally:
            self.agent.updates = before

    def _run_end_episode(self, obs: Observations, schedule: Hashable) -> Scalars:
        return self.agent.end_episode(obs, generator=self.generator)


def _changing_state(agent: Agent) -> Iterator[Tensor]:
    """Every tensor that learning changes in place."""
    yield from agent.parameters()
    yield from agent.buffers()
    for optimizer in agent.optimizers.values():
        yield from optimizer.changing_state()

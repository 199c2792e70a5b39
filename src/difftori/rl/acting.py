"""`agent.act` with its random generator; on a CUDA device as one CUDA graph."""

from collections.abc import Hashable

import torch

from difftori.interfaces import Agent, Memory
from difftori.solver import Captured
from difftori.types import Actions, Observations, RowFlags


class Acting:
    """An agent that acts with one generator. On a CUDA device, unless it is compiled, its actions are replayed as one CUDA graph.

    `explore`: add exploration noise. A graph is recorded once the agent's schedules stand still: while the noise still
    decreases from step to step, the agent acts kernel by kernel.
    """

    def __init__(self, agent: Agent, generator: torch.Generator, *, explore: bool):
        self.agent, self.generator, self.explore = agent, generator, explore
        self._step = 0
        self._captured = Captured(self._act, generators=[generator])

    def __call__(
        self, obs: Observations, memory: Memory | None, first: RowFlags, *, step: int
    ) -> tuple[Actions, Memory]:
        """Return `agent.act` of these inputs, which are moved to the generator's device."""
        self._step, device = step, self.generator.device
        on_device = {name: value.to(device) for name, value in memory.items()} if memory else None
        inputs = obs.to(device), on_device, first.to(device)
        if self.agent.compiles:
            return self._act(*inputs, ())
        return self._captured(*inputs, self.agent.schedule(step, explore=self.explore))

    def _act(
        self, obs: Observations, memory: Memory | None, first: RowFlags, schedule: Hashable
    ) -> tuple[Actions, Memory]:
        """Act at the present step; any other step with the same `schedule` gives the same actions."""
        options = {"step": self._step, "explore": self.explore, "generator": self.generator}
        return self.agent.act(obs, memory, first=first, **options)

"""`agent.act` with its random generator; on a CUDA device as one CUDA graph."""

from collections.abc import Hashable
from typing import Any

import torch

from difftori.interfaces import Agent, Memory
from difftori.solver import Captured
from difftori.solver.captured import Recorder
from difftori.types import Actions, Observations, RowFlags, Scalar


class Acting:
    """An agent that acts with one generator. On a CUDA device, unless it is compiled, its actions are replayed as one CUDA graph.

    `explore`: add exploration noise. `recorder`: see `Captured`.
    """

    def __init__(self, agent: Agent, generator: torch.Generator, *, explore: bool, recorder: Recorder | None = None):
        self.agent, self.generator, self.explore = agent, generator, explore
        self._step = 0
        self._captured = Captured(self._act, generators=[generator], recorder=recorder)

    def __call__(
        self, obs: Observations, memory: Memory | None, first: RowFlags, *, step: int
    ) -> tuple[Actions, Memory]:
        """Return `agent.act` of these inputs, which are moved to the generator's device."""
        self._step, device = step, self.generator.device
        on_device = {name: value.to(device) for name, value in memory.items()} if memory else None
        inputs = obs.to(device), on_device, first.to(device)
        schedule = self.agent.schedule(step, explore=self.explore)
        if schedule is None or self.agent.compiles:
            return self.agent.act(*inputs[:2], first=inputs[2], **self._options)
        std = torch.full((), schedule.std, device=device)
        return self._captured(*inputs, std, schedule.fixed)

    @property
    def _options(self) -> dict[str, Any]:
        return {"step": self._step, "explore": self.explore, "generator": self.generator}

    def _act(
        self, obs: Observations, memory: Memory | None, first: RowFlags, std: Scalar, fixed: Hashable
    ) -> tuple[Actions, Memory]:
        """Act at the present step; every step with the same `fixed` and `std` gives the same actions."""
        return self.agent.act(obs, memory, first=first, std=std, **self._options)

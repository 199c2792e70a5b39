"""`agent.act` with its random generator; on a CUDA device as one CUDA graph."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from difftori.interfaces import Agent, Memory
from difftori.solver import Captured
from difftori.solver.cuda_graphs import Recorder
from difftori.steering import Steering
from difftori.types import Actions, Observations, RowFlags, Scalar


class Acting:
    """An agent that acts with one generator. On a CUDA device, unless it is compiled, its actions are replayed as one CUDA graph.

    `explore`: add exploration noise. `recorder`: see `Captured`.
    """

    def __init__(self, agent: Agent, generator: torch.Generator, *, explore: bool, recorder: Recorder | None = None):
        self._call = _Call(agent, generator, explore)
        self._captured = Captured(self._call, generators=[generator], recorder=recorder)

    def __call__(
        self,
        obs: Observations,
        memory: Memory | None,
        first: RowFlags,
        *,
        step: int,
        steering: Steering | None = None,
    ) -> tuple[Actions, Memory]:
        """Return `agent.act` of these inputs, which are moved to the generator's device. With `steering`, nothing is recorded."""
        call, device = self._call, self._call.generator.device
        call.step = step
        on_device = {name: value.to(device) for name, value in memory.items()} if memory else None
        inputs = obs.to(device), on_device, first.to(device)
        if steering is not None:
            return call(*inputs, steering=steering)
        recorded = self._captured.records(device) and not call.agent.compiles
        schedule = call.agent.schedule(step) if recorded else None
        if schedule is None:
            return call(*inputs)
        return self._captured(*inputs, torch.full((), schedule.std, device=device), schedule.fixed)


@dataclass
class _Call:
    """`agent.act` at `step`. What is recorded holds for every step with the same `fixed` and `std`."""

    agent: Agent
    generator: torch.Generator
    explore: bool
    step: int = 0

    def __call__(
        self,
        obs: Observations,
        memory: Memory | None,
        first: RowFlags,
        std: Scalar | None = None,
        fixed: Hashable = None,
        steering: Steering | None = None,
    ) -> tuple[Actions, Memory]:
        options: dict[str, Any] = {"step": self.step, "explore": self.explore, "generator": self.generator}
        if std is not None:  # agents without a schedule need no such argument
            options["std"] = std
        if steering is not None:
            options["steering"] = steering
        return self.agent.act(obs, memory, first=first, **options)

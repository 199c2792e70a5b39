"""What an imitation run is given: demonstrations to learn from, others to choose by, and a way to measure a policy.

A task of one's own is a function `make(*, seed, num_train) -> ImitationTask`, named `my_pkg.my_task:make`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import numpy as np
import torch

from difftori.components import load, suggest
from difftori.data.demos import Demos
from difftori.envs.pendulum import Pendulum, pendulum, sample_starts
from difftori.errors import ConfigError
from difftori.types import Metrics, Observations, Plans, States, TaskSpec

Act: TypeAlias = Callable[[Observations], Plans]
"""A policy as the task sees it: observations (B S) to the next H actions (B H A)."""

PENDULUM_VALIDATION = 10
"""Validation trajectories, as Amos et al. use."""


@dataclass(frozen=True)
class ImitationTask(ABC):
    """`train` is learned from, `validation` chooses among the weights, `evaluate` says how good a policy is."""

    spec: TaskSpec
    train: Demos
    validation: Demos

    @abstractmethod
    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Metrics:
        """Named results of executing the policy from `episodes` starts that are drawn from `generator` (CPU).

        The same generator state means the same starts, so that policies are compared on common ones.
        """


TaskFactory: TypeAlias = Callable[..., ImitationTask]
"""`(*, seed: int, num_train: int) -> ImitationTask`: the same seed gives the same demonstrations, bit by bit."""


def find_task(name: str) -> TaskFactory:
    """The factory of that name in `TASKS`, or the one `my_pkg.my_task:make` refers to; ConfigError if there is none."""
    if name in TASKS:
        return TASKS[name]
    families = {known.partition(":")[0] for known in TASKS}
    if ":" not in name or name.partition(":")[0] in families:
        raise ConfigError([f"env: {name!r} is unknown{suggest(name, TASKS)} (or give my_pkg.my_task:make)"])
    factory = load(name)
    if not callable(factory):
        raise ConfigError([f"env: {name!r} is a {type(factory).__name__}, not a function that makes a task"])
    return cast(TaskFactory, factory)


def make_task(name: str, *, seed: int, num_train: int) -> ImitationTask:
    """The task of that name, with its demonstrations made from the seed."""
    task = find_task(name)(seed=seed, num_train=num_train)
    if not isinstance(task, ImitationTask):
        raise ConfigError([f"env: {name!r} made a {type(task).__name__}, not an ImitationTask"])
    return task


@dataclass(frozen=True)
class PendulumTask(ImitationTask):
    """Imitating the expert's open-loop torques on the pendulum of Amos et al. (2018), arXiv 1810.13400."""

    problem: Pendulum

    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Metrics:
        """Mean true cost of the policy and of the expert from common starts, and the paired difference."""
        numbers = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        starts = sample_starts(episodes, numbers)
        cost = self.problem.cost(starts, act(starts))
        expert = self.problem.cost(starts, expert_plans(self.problem, starts))
        excess = cost - expert
        error = excess.std().item() / episodes**0.5 if episodes > 1 else float("nan")
        return {
            "cost": cost.mean().item(),
            "expert_cost": expert.mean().item(),
            "excess_cost": excess.mean().item(),
            "excess_cost_stderr": error,
        }


def expert_plans(problem: Pendulum, starts: States) -> Plans:
    """The expert's H torques (B H 1) from each start (B 3): box-constrained iLQR on the true dynamics."""
    from difftori.policies.mpc import expert

    return expert(problem, starts)


def pendulum_task(damped: bool, *, seed: int, num_train: int) -> PendulumTask:
    """`num_train` training and 10 validation trajectories of the expert, from starts drawn from `seed`."""
    problem = pendulum("damped" if damped else "undamped")

    def demos(count: int, stream: int) -> Demos:
        starts = sample_starts(count, np.random.default_rng([seed, stream]))
        return Demos(starts, expert_plans(problem, starts))

    return PendulumTask(problem.spec, demos(num_train, 0), demos(PENDULUM_VALIDATION, 1), problem)


TASKS: dict[str, TaskFactory] = {
    "pendulum": partial(pendulum_task, False),
    "pendulum:damped": partial(pendulum_task, True),
}

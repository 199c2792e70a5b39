"""What an imitation run is given: demonstrations to learn from, others to watch, and a way to measure a policy.

A task of one's own is a function `make(*, seed, num_train) -> ImitationTask`, named `my_pkg.my_task:make`. An environment
together with `--demos` is one too (env_task.py).
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from difftori.components import load, module_names, suggest
from difftori.data.demos import Demos
from difftori.envs.pendulum import Pendulum, pendulum, sample_starts
from difftori.errors import ConfigError
from difftori.interfaces import Examples
from difftori.types import Metrics, Plans, States, TaskSpec, WindowObs, state_obs

Act: TypeAlias = Callable[[WindowObs], Plans]
"""A policy as the task sees it: the last O observations of B rows, by name, to the actions (B H A)."""

PENDULUM_TRAIN, PENDULUM_VALIDATION = 100, 10
"""Trajectories, as Amos et al. use."""


@dataclass(frozen=True)
class Evaluation:
    """`metrics`, what they were made of, episode by episode, in columns of one length, and where the starts came from."""

    metrics: Metrics
    episodes: dict[str, list[float]]


@dataclass(frozen=True)
class ImitationTask(ABC):
    """`train` is learned from, `validation` watches the error, `evaluate` says how good a policy is."""

    spec: TaskSpec
    train: Examples
    validation: Examples

    @abstractmethod
    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """The results of executing the policy from `episodes` starts that are drawn from `generator` (CPU), or are fixed.

        The same generator state means the same starts, so that policies are compared on common ones.
        """


TaskFactory: TypeAlias = Callable[..., ImitationTask]
"""`(*, seed: int, num_train: int | None, …) -> ImitationTask`: the same seed gives the same demonstrations, bit by bit."""


def find_task(name: str, *, demos: bool = False) -> TaskFactory:
    """The factory of that name in `TASKS`; with `demos`, that of the environment of that name; or the one that
    `my_pkg.my_task:make` refers to. ConfigError if there is none.
    """
    if demos:
        from difftori.training.env_task import env_task, imitation_env

        imitation_env(name)
        return partial(env_task, name)
    if name in TASKS:
        return TASKS[name]
    family, colon, _ = name.partition(":")
    if family in module_names("difftori.envs") and family not in {known.partition(":")[0] for known in TASKS}:
        raise ConfigError([f"demos: {name!r} is imitated from demonstrations; name them by --demos PATH"])
    if not colon or family in module_names("difftori.envs"):
        raise ConfigError([f"env: {name!r} is unknown{suggest(name, TASKS)} (or give my_pkg.my_task:make)"])
    factory = load(name)
    if not callable(factory):
        raise ConfigError([f"env: {name!r} is a {type(factory).__name__}, not a function that makes a task"])
    return cast(TaskFactory, factory)


def task_options(factory: TaskFactory) -> dict[str, bool]:
    """The keyword options of a factory, and whether each must be given."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:
        raise ConfigError([f"env: {factory} is not a function that makes a task ({error})"]) from error
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


def make_task(name: str, **options: Any) -> ImitationTask:
    """The task of that name; `options` are those of its factory, of which None means its own default.

    Raises ConfigError for an option that it does not have.
    """
    factory = find_task(name, demos=options.get("demos") is not None)
    known = task_options(factory)
    given = {option: value for option, value in options.items() if value is not None}
    faults = [f"{option}: {name!r} takes none{suggest(option, known)}" for option in given.keys() - known.keys()]
    faults += [f"{option}: {name!r} needs one" for option, needed in known.items() if needed and option not in given]
    if faults:
        raise ConfigError(sorted(faults))
    task = factory(**given)
    if not isinstance(task, ImitationTask):
        raise ConfigError([f"env: {name!r} made a {type(task).__name__}, not an ImitationTask"])
    return task


@dataclass(frozen=True)
class PendulumTask(ImitationTask):
    """Imitating the expert's open-loop torques on the pendulum of Amos et al. (2018), arXiv 1810.13400."""

    problem: Pendulum

    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """Mean true cost of the policy and of the expert from common starts, and the paired difference."""
        numbers = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        starts = sample_starts(episodes, numbers)
        cost = self.problem.cost(starts, act(state_obs(starts)))
        expert = self.problem.cost(starts, expert_plans(self.problem, starts))
        excess = cost - expert
        error = excess.std().item() / episodes**0.5 if episodes > 1 else float("nan")
        metrics = {
            "cost": cost.mean().item(),
            "expert_cost": expert.mean().item(),
            "excess_cost": excess.mean().item(),
            "excess_cost_stderr": error,
        }
        return Evaluation(metrics, {"cost": cost.tolist(), "expert_cost": expert.tolist()})


def expert_plans(problem: Pendulum, starts: States) -> Plans:
    """The expert's H torques (B H 1) from each start (B 3): box-constrained iLQR on the true dynamics."""
    from difftori.policies.mpc import expert

    return expert(problem, starts)


def pendulum_task(damped: bool, *, seed: int, num_train: int = PENDULUM_TRAIN) -> PendulumTask:
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

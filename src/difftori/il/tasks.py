"""What an imitation run is given: demonstrations to learn from, others to watch, and a way to measure a policy.

A task of one's own is a function `make(*, seed, num_train) -> ImitationTask`, named `my_pkg.my_task:make`. An environment
together with `--demos` is one too (env_task.py), and so is the pendulum (pendulum_task.py); task_names.py knows them by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from difftori.interfaces import Dataset
from difftori.rollout import Act
from difftori.types import Metrics, TaskSpec


@dataclass(frozen=True)
class Evaluation:
    """`metrics`, what they were made of, episode by episode, in columns of one length, and where the starts came from."""

    metrics: Metrics
    episodes: dict[str, list[float]]


@dataclass(frozen=True)
class ImitationTask(ABC):
    """`train` is learned from, `validation` watches the error, `evaluate` says how good a policy is."""

    spec: TaskSpec
    train: Dataset
    validation: Dataset

    @abstractmethod
    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """The results of executing the policy from `episodes` starts that are drawn from `generator` (CPU), or are fixed.

        The same generator state means the same starts, so that policies are compared on common ones.
        """


TaskFactory: TypeAlias = Callable[..., ImitationTask]
"""`(*, seed: int, num_train: int | None, …) -> ImitationTask`: the same seed gives the same demonstrations, bit by bit."""

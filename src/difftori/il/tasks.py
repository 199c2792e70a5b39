"""The interface of an imitation task: training demonstrations, validation demonstrations, and an evaluation.

Your own task is a function `make(*, seed, num_train) -> ImitationTask`, named `my_pkg.my_task:make`. An environment together
with `--demos` is a task (env_task.py), demonstrations alone are one (demos_task.py), and so is the pendulum
(pendulum_task.py). task_names.py resolves names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from difftori.data.fingerprint import Fingerprint
from difftori.interfaces import Dataset
from difftori.rollout import Act
from difftori.types import Metrics, TaskSpec


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: `metrics`, and `episodes`, the results and seeds of each episode in columns of equal length."""

    metrics: Metrics
    episodes: dict[str, list[float]]


@dataclass(frozen=True)
class ImitationTask(ABC):
    """A task: `train` and `validation` demonstrations (None: nothing is held out), and `evaluate`, which measures a policy."""

    spec: TaskSpec
    train: Dataset
    validation: Dataset | None
    data: Fingerprint | None = field(default=None, kw_only=True)
    """The fingerprint of recorded demonstrations; None if they are generated."""

    def watched(self, watch: Callable[[int], None]) -> "ImitationTask":
        """Return the task with an evaluation that calls `watch` with the number of finished episodes, and ends with what it raises.

        By default, evaluations are not watched.
        """
        return self

    @abstractmethod
    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """Execute the policy from `episodes` starts, which are fixed or sampled from `generator` (CPU), and return the results.

        The same generator state must give the same starts, so that policies are compared on common starts.
        """


TaskFactory: TypeAlias = Callable[..., ImitationTask]
"""`(*, seed: int, num_train: int | None, …) -> ImitationTask`. The same seed must give the same demonstrations, bit by bit."""

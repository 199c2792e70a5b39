"""The pendulum of Amos et al. (2018) as an imitation task."""

from dataclasses import dataclass

import numpy as np
import torch

from difftori.data.demos import Demos
from difftori.envs.pendulum import Pendulum, pendulum, sample_starts
from difftori.il.tasks import Act, Evaluation, ImitationTask
from difftori.types import Plans, States, state_obs

PENDULUM_TRAIN, PENDULUM_VALIDATION = 100, 10
"""Numbers of trajectories, as in Amos et al."""


@dataclass(frozen=True)
class PendulumTask(ImitationTask):
    """Imitation of the expert's open-loop torques on the pendulum of Amos et al. (2018), arXiv 1810.13400."""

    problem: Pendulum

    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """Return the mean true costs of the policy and of the expert from common starts, and their paired difference."""
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
    """Return the expert's H torques (B H 1) from each start (B 3): box-constrained iLQR on the true dynamics."""
    from difftori.policies.mpc import expert

    return expert(problem, starts)


def pendulum_task(damped: bool, *, seed: int, num_train: int = PENDULUM_TRAIN) -> PendulumTask:
    """Create the task, with `num_train` training and 10 validation trajectories of the expert, from starts sampled by `seed`."""
    problem = pendulum("damped" if damped else "undamped")

    def demos(count: int, stream: int) -> Demos:
        starts = sample_starts(count, np.random.default_rng([seed, stream]))
        return Demos(starts, expert_plans(problem, starts))

    return PendulumTask(problem.spec, demos(num_train, 0), demos(PENDULUM_VALIDATION, 1), problem)

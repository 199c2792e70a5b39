"""A task in one file: push a cart to the origin; the expert is optimal control."""

from dataclasses import dataclass

import torch

import difftori
from difftori.data.demos import Demos
from difftori.il.tasks import Evaluation, ImitationTask
from difftori.types import TaskSpec, state_obs

H, DT = 10, 0.2
SPEC = TaskSpec.rows(obs_dim=2, action_dim=1, horizon=H, low=(-1.0,), high=(1.0,))


def dynamics(s, a):
    velocity = s[:, 1] + DT * a[:, 0]
    return torch.stack((s[:, 0] + DT * velocity, velocity), 1)


def reward(s, a):
    return -s[..., 0].square() - 0.1 * s[..., 1].square() - 0.01 * a[..., 0].square()


def value(s):
    return -10 * s.square().sum(-1)


def expert(starts):
    with torch.no_grad():
        return difftori.plan(dynamics, reward, value, starts, starts.new_zeros(len(starts), H, 1)).actions


def cost(state, plan):
    total = torch.zeros(len(state))
    for a in plan.unbind(1):
        total = total - reward(state, a)
        state = dynamics(state, a)
    return total - value(state)


@dataclass(frozen=True)
class Cart(ImitationTask):
    """What is learned from, what chooses among the weights, and how good a policy is."""

    def evaluate(self, act, *, episodes, generator):
        starts = 2 * torch.rand(episodes, 2, generator=generator) - 1
        mine, best = cost(starts, act(state_obs(starts))), cost(starts, expert(starts))
        means = {"cost": mine.mean().item(), "expert_cost": best.mean().item(), "excess": (mine - best).mean().item()}
        return Evaluation(means, {"cost": mine.tolist(), "expert_cost": best.tolist()})


def make(*, seed, num_train=100):
    """The same seed gives the same demonstrations."""

    def demos(count, stream):
        starts = 2 * torch.rand(count, 2, generator=torch.Generator().manual_seed(2 * seed + stream)) - 1
        return Demos(starts, expert(starts))

    return Cart(SPEC, demos(num_train, 0), demos(20, 1))

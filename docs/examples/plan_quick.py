import torch

import difftori

drag = torch.tensor(0.3, requires_grad=True)  # anything the model uses can be differentiated


def dynamics(s, a):  # (B, 2), (B, 1) -> (B, 2): position and speed of a boat
    speed = s[:, 1] + 0.1 * (a[:, 0] - drag * s[:, 1] * s[:, 1].abs())
    return torch.stack((s[:, 0] + 0.1 * speed, speed), 1)


def reward(s, a):
    return -(s[..., 0] - 1.0).square() - 0.2 * a[..., 0].square()


start = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
plan = difftori.plan(dynamics, reward, None, start, init_actions=torch.zeros(2, 15, 1), low=-2.0, high=2.0)
print("first thrusts", plan.actions[0, :4, 0].tolist())
print("value        ", plan.value.tolist(), "trusted", plan.solution.gradient_valid.tolist())
plan.actions[:, 8].sum().backward()
print("d/d(drag)    ", drag.grad.item())

"""Drive a unicycle around three circular obstacles; how would the path change with their size?"""

import control_figures
import torch

import difftori
from difftori.solver import AugmentedLagrangian, Status

F64 = torch.float64
H, DT = 30, 0.15
GOAL = torch.tensor([4.5, 0.3], dtype=F64)
CENTERS = torch.tensor([[1.5, 0.1], [2.7, -0.7], [3.2, 0.9]], dtype=F64)


def dynamics(s, a):  # state (x, y, heading, speed), action (acceleration, turn rate)
    x, y, heading, speed = s.unbind(-1)
    rate = torch.stack((speed * torch.cos(heading), speed * torch.sin(heading), a[..., 1], a[..., 0]), -1)
    return s + DT * rate


def reward(s, a):
    return -0.05 * (s[..., :2] - GOAL).square().sum(-1) - 0.05 * a.square().sum(-1)


def terminal_value(s):
    return -10 * (s[..., :2] - GOAL).square().sum(-1) - s[..., 3].square()


def drive(radius, start=(0.0, 0.0), init_actions=None, **options):
    def outside(s):  # (B, 4) -> (B, 3): radius² − distance² to each center, at most 0 outside, in m²
        return radius**2 - (s[..., None, :2] - CENTERS).square().sum(-1)

    return difftori.plan(
        dynamics,
        reward,
        terminal_value,
        torch.tensor([[*start, 0.0, 0.0]], dtype=F64),
        torch.full((1, H, 2), 0.1, dtype=F64) if init_actions is None else init_actions,
        low=-2.0,
        high=2.0,
        constraint=lambda s, a: outside(s),  # at s_0 … s_{H−1}
        terminal_constraint=outside,  # at s_H
        **options,
    )


def report(name, plan):
    solution = plan.solution
    print(
        f"{name:16s} {Status(solution.status.item()).name:10s} cost {solution.cost.item():8.3f}"
        f"  violation {solution.violation.item():.0e} m²  gradient valid {solution.gradient_valid.item()}"
    )


radius = torch.full((3,), 0.6, dtype=F64, requires_grad=True)
plan = drive(radius)
report("radius 0.6 m", plan)
distances = (plan.states[0, :, None, :2] - CENTERS).norm(dim=-1).min(0).values
print("closest approach", [f"{d:.4f}" for d in distances.tolist()], "m")

# How much does y in the middle of the path move with each radius?
height = plan.states[0, 15, 1]
(gradient,) = torch.autograd.grad(height, radius)
print("d(y at t = 15)/d(radius)", [f"{g:.4f}" for g in gradient.tolist()])
EPS, numeric = 1e-4, []
exact = {
    "init_actions": plan.actions.detach(),
    "multipliers": plan.solution.multipliers,
    "augmented": AugmentedLagrangian(tolerance=1e-9),
    "tolerance": 1e-10,
}
for i in range(3):
    change = EPS * torch.eye(3, dtype=F64)[i]
    above, below = (drive(radius.detach() + sign * change, **exact).states[0, 15, 1].item() for sign in (1, -1))
    numeric.append((above - below) / (2 * EPS))
print("central differences     ", [f"{g:.4f}" for g in numeric])

small = drive(torch.full((3,), 0.4, dtype=F64))
report("radius 0.4 m", small)
report("start inside", drive(radius.detach(), start=(1.4, 0.3), max_steps=50))

control_figures.path_plot(
    "obstacles",
    {
        "radius 0.6 m": plan.states[0, :, :2].detach().T,
        "planned for radius 0.4 m": small.states[0, :, :2].detach().T,
    },
    CENTERS.tolist(),
    0.6,
    GOAL.tolist(),
)

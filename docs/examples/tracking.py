"""A boat follows a reference position that is known in advance."""

import control_figures
import torch

import difftori

F64, DT, H, STEPS = torch.float64, 0.1, 20, 120
time = torch.arange(STEPS + H + 1)
reference = torch.where(time < 30, 0.0, torch.where(time < 75, 1.0, -0.5)).to(F64)  # m, one value for each step


def dynamics(s, a):  # state (position, speed), action (thrust)
    speed = s[..., 1] + DT * (a[..., 0] - 0.3 * s[..., 1] * s[..., 1].abs())
    return torch.stack((s[..., 0] + DT * speed, speed), -1)


def reward(s, a, t):  # t is the step since the last reset: first_step + 0 … H−1
    return -(s[..., 0] - reference[t]).square() - 0.02 * a[..., 0].square()


controller = difftori.Controller(dynamics, reward, horizon=H, action_dim=1, low=-2.0, high=2.0)
state, positions, thrusts = torch.zeros(2, dtype=F64), [], []
for _ in range(STEPS):
    thrust = controller(state)  # (2,) -> (1,)
    positions.append(state[0])
    thrusts.append(thrust[0])
    state = dynamics(state, thrust)

for step in (20, 25, 30, 35, 60, 75, 119):
    print(f"t = {DT * step:4.1f} s  reference {reference[step]:5.2f} m  position {positions[step]:6.3f} m")
print("controller.step", controller.step)

# The same plan without a Controller: first_step is the step of the first action.
plan = difftori.plan(
    dynamics, reward, None, torch.zeros(1, 2, dtype=F64), torch.zeros(1, H, 1, dtype=F64), -2.0, 2.0, first_step=25
)
print("thrusts planned at step 25", [round(a, 2) for a in plan.actions[0, :4, 0].tolist()])

control_figures.time_plot(
    "tracking",
    DT * torch.arange(STEPS),
    [
        ("position [m]", {"boat": torch.stack(positions), "reference": reference[:STEPS]}, None),
        ("thrust [N]", {"thrust": torch.stack(thrusts)}, (-2.0, 2.0)),
    ],
)

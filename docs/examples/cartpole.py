"""A cart-pole: state (x, angle, speed, angular speed), angle 0 upright, one force in N. Swing-up cost included."""

import math

import torch

DT = 0.05  # s


def cartpole(pole_mass=0.1, half_length=0.5):
    """Dynamics for given parameters; either parameter may be a tensor that requires grad."""

    def derivative(s, a):
        _, angle, speed, spin = s.unbind(-1)
        sin, cos, total = torch.sin(angle), torch.cos(angle), 1.0 + pole_mass
        push = (a[..., 0] + pole_mass * half_length * spin * spin * sin) / total
        spin_rate = (9.81 * sin - cos * push) / (half_length * (4 / 3 - pole_mass * cos * cos / total))
        return torch.stack((speed, spin, push - pole_mass * half_length * spin_rate * cos / total, spin_rate), -1)

    def dynamics(s, a):  # one Runge-Kutta step of 0.05 s
        k1 = derivative(s, a)
        k2 = derivative(s + DT / 2 * k1, a)
        k3 = derivative(s + DT / 2 * k2, a)
        k4 = derivative(s + DT * k3, a)
        return s + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return dynamics


def reward(s, a):  # minus the stage cost
    x, angle, speed, spin = s.unbind(-1)
    return -(0.1 * x**2 + 1 - torch.cos(angle) + 0.01 * speed**2 + 0.01 * spin**2 + 0.001 * a[..., 0] ** 2)


def terminal_value(s):  # minus the terminal cost
    x, angle, speed, spin = s.unbind(-1)
    return -(10 * x**2 + 100 * (1 - torch.cos(angle)) + 10 * speed**2 + 10 * spin**2)


HANGING = torch.tensor([[0.0, math.pi, 0.0, 0.0]], dtype=torch.float64)

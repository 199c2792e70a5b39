"""A denoising network and its noise as formulas: nothing depends on a generator of random numbers."""

import torch

STEPS = 100
SHAPE = (2, 4, 3)


def predicted(x, step):
    """The "network's" prediction at a step."""
    return 0.9 * torch.tanh(0.7 * x + torch.sin(torch.tensor(0.1 * step)))


def noise(number):
    """The noise of a step, and with −1 that to start from."""
    count = torch.arange(24, dtype=torch.float64).reshape(SHAPE)
    return (1.4 * torch.sin(12.9898 * (count + 1) + 78.233 * (number + 2))).float()

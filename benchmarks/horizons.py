"""How the default gradient grows with the horizon: solve and differentiate a latent plan, by each way to solve the linear system.

Networks of the paper's sizes (latent 50, 512-512), 6 actions, 16 rows, float32, one thread; medians of interleaved repeats.

    python benchmarks/horizons.py --horizons 5 10 20 40 --repeats 5
"""

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from difftori.objectives import ReturnObjective
from difftori.solver import Box, Implicit, ProjectedGradient, solve

ROWS, LATENT, ACTIONS = 16, 50, 6
LINEAR: tuple[Literal["auto", "dense", "cg"], ...] = ("auto", "dense", "cg")


def main() -> None:
    """Measure and write benchmarks/results/horizons.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--horizons", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/horizons.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dynamics, reward, value = _mlp(LATENT), _mlp(1), _mlp(1, LATENT)
    parameters = [p for net in (dynamics, reward, value) for p in net.parameters()]
    state = torch.randn(ROWS, LATENT)
    rows = []
    for horizon in arguments.horizons:
        objective = ReturnObjective(
            lambda s, a: torch.tanh(dynamics(torch.cat([s, a], -1))),
            lambda s, a: reward(torch.cat([s, a], -1))[..., 0] - 0.5 * a.square().sum(-1),
            lambda s: value(s)[..., 0],
            state,
            horizon,
            ACTIONS,
            0.99,
        )
        start = torch.zeros(ROWS, horizon * ACTIONS)
        times: dict[str, list[float]] = {name: [] for name in LINEAR}
        valid: dict[str, float] = {}
        for repeat in range(arguments.repeats + 1):
            for name in LINEAR:
                began = time.perf_counter()
                found = solve(
                    objective,
                    start,
                    solver=ProjectedGradient(window=5),
                    adjoint=Implicit(linear=name),
                    box=Box(-1.0, 1.0),
                    max_steps=10,
                    tolerance=0.0,
                )
                torch.autograd.grad(found.x.square().sum(), parameters, allow_unused=True)
                if repeat:
                    times[name].append(1e3 * (time.perf_counter() - began))
                else:
                    valid[name] = float(found.gradient_valid.float().mean())
        for name, samples in times.items():
            rows.append(
                {
                    "horizon": horizon,
                    "linear": name,
                    "median_ms": f"{statistics.median(samples):.1f}",
                    "valid_rows": f"{valid[name]:.2f}",
                    "raw_ms": " ".join(f"{ms:.1f}" for ms in samples),
                }
            )
            print(rows[-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _mlp(outputs: int, inputs: int = LATENT + ACTIONS) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 512), nn.ELU(), nn.Linear(512, 512), nn.ELU(), nn.Linear(512, outputs))


if __name__ == "__main__":
    main()

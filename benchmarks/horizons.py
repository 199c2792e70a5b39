"""Time of the default gradient against the horizon: solve and differentiate a latent plan with each linear solver.

Networks of the paper's sizes (latent 50, 512-512), 6 actions, 16 rows, float32. Medians of interleaved repeats.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

from benchmarks.measuring import as_in_runs, measure, medians
from benchmarks.records import RESULTS, as_text, write_csv
from difftori.models.nets import mlp
from difftori.objectives import ReturnObjective
from difftori.solver import Box, Implicit, ProjectedGradient, Solution, solve

ROWS, LATENT, ACTIONS = 16, 50, 6
LINEAR: tuple[Literal["auto", "dense", "cg"], ...] = ("auto", "dense", "cg")


class Config(BaseModel):
    """Settings of the measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    horizons: tuple[PositiveInt, ...] = (5, 10, 20, 40)
    """Planning horizons to measure, in steps."""
    repeats: PositiveInt = 5
    """Number of interleaved repeats."""
    threads: PositiveInt = 1
    """Number of threads of torch."""
    out: Path = RESULTS
    """Folder for `horizons.csv`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `horizons.csv` to `out`, and return the table."""
    torch.manual_seed(0)
    joint = LATENT + ACTIONS
    dynamics, reward, value = (
        mlp((inputs, 512, 512, outputs), torch.nn.ELU) for inputs, outputs in ((joint, LATENT), (joint, 1), (LATENT, 1))
    )
    parameters = [p for net in (dynamics, reward, value) for p in net.parameters()]
    state, rows = torch.randn(ROWS, LATENT), []
    for horizon in config.horizons:
        objective = ReturnObjective(
            lambda s, a: torch.tanh(dynamics(torch.cat([s, a], -1))),
            lambda s, a: reward(torch.cat([s, a], -1))[..., 0] - 0.5 * a.square().sum(-1),
            lambda s: value(s)[..., 0],
            state,
            horizon,
            ACTIONS,
            0.99,
        )
        parts = {linear: partial(_differentiate, objective, linear, parameters) for linear in LINEAR}
        with as_in_runs(config.threads):
            samples = measure(parts, repeats=config.repeats)
            valid = {linear: part().gradient_valid.float().mean().item() for linear, part in parts.items()}
        median = medians(samples)
        for linear, raw in samples.items():
            times = {"median_ms": f"{median[linear]:.1f}", "valid_rows": f"{valid[linear]:.2f}"}
            raw_ms = " ".join(f"{ms:.1f}" for ms in raw)
            rows.append({"horizon": horizon, "linear": linear, **times, "raw_ms": raw_ms})
    write_csv(config.out / "horizons.csv", rows)
    return as_text(rows)


def _differentiate(
    objective: ReturnObjective, linear: Literal["auto", "dense", "cg"], parameters: list[torch.nn.Parameter]
) -> Solution:
    found = solve(
        objective,
        torch.zeros(ROWS, objective.horizon * ACTIONS),
        solver=ProjectedGradient(window=5),
        adjoint=Implicit(linear=linear),
        box=Box(-1.0, 1.0),
        max_steps=10,
        tolerance=0.0,
    )
    torch.autograd.grad(found.x.square().sum(), parameters, allow_unused=True)
    return found

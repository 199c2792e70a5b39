"""Milliseconds of an action, kernel by kernel and as one CUDA graph, over the number of states.

Agents have the sizes of a preset and random weights. All parts run in turn, in rotating order; the results are medians. On a CPU
nothing can be recorded, so both columns are the same call.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from benchmarks.measuring import Device, Job, as_in_runs, measure, medians
from benchmarks.records import RESULTS, as_text, raw_ms, write_csv, write_record
from benchmarks.rl import TRAINED
from difftori.interfaces import Agent
from difftori.registry import find_agent
from difftori.rl.acting import Acting
from difftori.runs.run import seeded
from difftori.types import EnvSpec

AGENTS = {"tdmpc": 256, "difftori": 4096}
"""Agents, and the most states that they are timed for: MPPI's 537 samples of 4096 states would take 50 GB."""


class Config(BaseModel):
    """Settings of the measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    states: tuple[PositiveInt, ...] = (1, 64, 256, 4096)
    """Numbers of states for which the agents act at once."""
    preset: str = "paper"
    """Preset of the agents."""
    repeats: PositiveInt = 15
    """Number of interleaved repeats."""
    device: Device = "cuda"
    """Device of the agents."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights and the states."""
    out: Path = RESULTS
    """Folder for `captured.csv` and `captured.json`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `captured.csv` and `.json` to `out`, and return the table."""
    with as_in_runs(1):
        samples = measure(_parts(config), repeats=config.repeats, device=config.device)
    median = medians(samples)
    rows: list[dict[str, Any]] = []
    for name, most in AGENTS.items():
        for count in (count for count in config.states if count <= most):
            eager, captured = (median[f"{name}, {count}", kind] for kind in ("eager", "captured"))
            rows.append(
                {"agent": name, "states": count, "eager_ms": eager, "captured_ms": captured, "ratio": eager / captured}
            )
    write_csv(config.out / "captured.csv", rows)
    record = {"raw_ms": raw_ms(samples)}
    write_record(config.out / "captured.json", record, config=config.model_dump(mode="json"), device=config.device)
    return as_text(rows)


def _parts(config: Config) -> dict[tuple[str, str], Job]:
    spec = EnvSpec("dmc:cheetah-run", (17,), "float32", 6, 1000, 1)
    parts: dict[tuple[str, str], Job] = {}
    for name, most in AGENTS.items():
        torch.manual_seed(config.seed)
        kind = find_agent(name)
        agent = kind(kind.Config.model_validate({"preset": config.preset}), spec)
        with torch.no_grad():  # the last layers are zero at first, and a solve on a constant stands still
            for parameter in agent.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        agent = agent.to(config.device)
        for count in (count for count in config.states if count <= most):
            obs = torch.randn(count, 17, generator=seeded(config.seed, "states")).to(config.device)
            parts[f"{name}, {count}", "eager"] = _eager(agent, obs, config)
            parts[f"{name}, {count}", "captured"] = _captured(agent, obs, config)
    return parts


def _eager(agent: Agent, obs: torch.Tensor, config: Config) -> Job:
    first, generator = torch.ones(len(obs), dtype=torch.bool, device=config.device), seeded(0, "eager", config.device)
    options = {"first": first, "step": TRAINED, "explore": True, "generator": generator}
    return lambda: agent.act(obs, None, **options)[0].cpu()


def _captured(agent: Agent, obs: torch.Tensor, config: Config) -> Job:
    acting = Acting(agent, seeded(0, "captured", config.device), explore=True)
    first = torch.ones(len(obs), dtype=torch.bool, device=config.device)
    return lambda: acting(obs, None, first, step=TRAINED)[0].cpu()

"""Several agents in one process: compare computing their gradients of Eq. 3 one after another and with vmap over stacked weights.

The result shows whether stacking seeds is faster than `--jobs`, which runs each seed in its own process. Interleaved medians,
states of 24 numbers, 6 actions, presets compact and small.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks.measuring import Device, Job, as_in_runs, measure, medians
from benchmarks.records import RESULTS, as_text, write_record
from difftori.agents.losses import model_loss
from difftori.agents.tdmpc import TDMPC, TDMPCConfig
from difftori.types import EnvSpec, Segment

SPEC = EnvSpec("made up", (24,), "float32", 6, 1000, 4)


def td_loss(agent: TDMPC, segment: Segment, noise: Tensor) -> Tensor:
    """Eq. 3 of one agent."""
    return model_loss(agent.model, agent.target, segment, segment.obs, noise, agent.settings.coefficients()).total


class Config(BaseModel):
    """Settings of the measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    repeats: PositiveInt = 15
    """Number of interleaved repeats."""
    device: Device = "cpu"
    """Device of the agents."""
    threads: PositiveInt = 1
    """Number of threads of torch."""
    out: Path = RESULTS
    """Folder for `seeds.json`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `seeds.json` to `out`, and return the table."""
    rows: list[dict[str, Any]] = []
    with as_in_runs(config.threads):
        for preset in ("small", "compact"):
            for count in (1, 4, 8):
                times = measure(methods(preset, count, config.device), repeats=config.repeats, device=config.device)
                raw = {name: [round(value, 4) for value in values] for name, values in times.items()}
                rows.append({"preset": preset, "agents": count, "median_ms": medians(times), "raw_ms": raw})
    write_record(config.out / "seeds.json", {"rows": rows}, config=config.model_dump(mode="json"), device=config.device)
    return as_text([{"preset": row["preset"], "agents": row["agents"], **row["median_ms"]} for row in rows])


class Loss(nn.Module):
    """Eq. 3 of one agent, as a module with exchangeable weights."""

    def __init__(self, agent: TDMPC, segment: Segment):
        super().__init__()
        self.agent, self.segment = agent, segment

    def forward(self, noise: Tensor) -> Tensor:
        """`noise` (T B A) → the loss."""
        return td_loss(self.agent, self.segment, noise)


def methods(preset: str, count: int, device: str) -> dict[str, Job]:
    """Both methods for `count` agents of a preset."""
    config = TDMPCConfig.model_validate({"preset": preset})
    agents = []
    for seed in range(count):
        torch.manual_seed(seed)
        agents.append(TDMPC(config, SPEC).to(device))
    segment = made_up(config.horizon, agents[0].batch_size, device)
    noise = torch.zeros(count, *segment.actions.shape, device=device)
    weights, _ = stack_module_state(agents)
    learned = {name for name, parameter in agents[0].named_parameters() if parameter.requires_grad}
    moving = {f"agent.{name}": value for name, value in weights.items() if name in learned}
    still = {f"agent.{name}": value for name, value in weights.items() if name not in learned}
    loss = Loss(copy.deepcopy(agents[0]), segment)
    stacked = vmap(grad(lambda one, rest, drawn: functional_call(loss, {**one, **rest}, (drawn,))))

    def separate() -> None:
        for agent, drawn in zip(agents, noise, strict=True):
            agent.optimizer.gradient(td_loss(agent, segment, drawn))

    return {"separate": separate, "stacked": lambda: stacked(moving, still, noise)}


def made_up(steps: int, rows: int, device: str) -> Segment:
    """A random segment."""
    generator = torch.Generator().manual_seed(0)
    return Segment(
        torch.randn(steps + 1, rows, *SPEC.obs_shape, generator=generator),
        2 * torch.rand(steps, rows, SPEC.action_dim, generator=generator) - 1,
        torch.rand(steps, rows, generator=generator),
        torch.zeros(steps, rows, dtype=torch.bool),
        torch.ones(steps, rows),
        torch.ones(rows),
        torch.arange(rows),
    ).to(device)

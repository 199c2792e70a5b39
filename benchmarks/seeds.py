"""Several agents in one process: their gradients of Eq. 3 one after another, or all at once by vmap over stacked weights.

    OMP_NUM_THREADS=1 python benchmarks/seeds.py                  writes benchmarks/results/seeds.json

It decides whether seeds are worth stacking, beside `--jobs`, which runs each in a process of its own. Interleaved medians, one
thread, states of 24 numbers, 6 actions, presets compact and small.
"""

import argparse
import copy
import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks.measuring import as_in_runs, measure, medians
from difftori.agents.tdmpc import TDMPC, TDMPCConfig
from difftori.runs.versions import versions
from difftori.types import EnvSpec, Segment

SPEC = EnvSpec("made up", (24,), "float32", 6, 1000, 4)


class Loss(nn.Module):
    """Eq. 3 of one agent, as a module whose weights can be exchanged."""

    def __init__(self, agent: TDMPC, segment: Segment):
        super().__init__()
        self.agent, self.segment = agent, segment

    def forward(self, noise: Tensor) -> Tensor:
        """`noise` (T B A) → the loss."""
        return TDMPC.model_loss(self.agent, self.segment, self.segment.obs, noise).total


def contestants(preset: str, count: int, device: str) -> dict[str, Callable[[], object]]:
    """Both ways for `count` agents of a preset."""
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
            agent.descent.gradient(TDMPC.model_loss(agent, segment, segment.obs, drawn).total)

    return {"separate": separate, "stacked": lambda: stacked(moving, still, noise)}


def made_up(steps: int, rows: int, device: str) -> Segment:
    """A random slice."""
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


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "seeds.json")
    options = parser.parse_args()
    rows = []
    with as_in_runs(1):
        for preset in ("small", "compact"):
            for count in (1, 4, 8):
                works = contestants(preset, count, options.device)
                parts = {(name, "gradient"): work for name, work in works.items()}
                times = measure(parts, repeats=options.repeats, device=options.device)
                found = {name: value for (name, _), value in medians(times).items()}
                raw = {name: [round(value, 4) for value in values] for (name, _), values in times.items()}
                rows.append({"preset": preset, "agents": count, "median_ms": found, "raw_ms": raw})
                print(preset, count, {name: round(value, 2) for name, value in found.items()}, flush=True)
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(options.device),
        "load_average": os.getloadavg(),
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

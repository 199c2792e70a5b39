"""Operations and arithmetic of acting and updating: counts, which do not depend on the machine.

On a GPU, the time of an action is roughly proportional to the number of operations, because each is a launch of a kernel and
the kernels are small. The time of an update from images is bound by arithmetic. Views are not counted, because they launch
nothing.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.records import RESULTS, as_text, write_csv
from benchmarks.rl import METHODS, TRAINED
from difftori.interfaces import Agent
from difftori.registry import find_agent
from difftori.types import EnvSpec, Segment

BATCH = 8
"""Rows of the batch that is counted. Operations do not depend on it, and arithmetic is proportional to it."""


class Config(BaseModel):
    """Settings of the count."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preset: str = "paper"
    """Preset of the agents."""
    action_dim: PositiveInt = 6
    """Size of the action; 6 is cheetah-run's."""
    rows: PositiveInt = Field(256)
    """Batch size for which the arithmetic of an update is given."""
    out: Path = RESULTS
    """Folder for `operations.csv`."""


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(job: Callable[[], object]) -> tuple[int, float]:
    """The number of operations that a call dispatches, without views, and its multiplications and additions in units of 1e9."""
    with _Operations() as operations:
        job()
    with FlopCounterMode(display=False) as arithmetic:
        job()
    return sum(operations.counts.values()), arithmetic.get_total_flops() / 1e9


def run(config: Config) -> list[dict[str, Any]]:
    """Count, write `operations.csv` to `out`, and return the table."""
    specs = {
        "state": EnvSpec("dmc:cheetah-run", (17,), "float32", config.action_dim, 1000, 1),
        "pixels": EnvSpec("dmc:cheetah-run", (9, 84, 84), "uint8", config.action_dim, 1000, 1),
    }
    rows = []
    for obs, spec in specs.items():
        for method in METHODS:
            kind = find_agent(method.component)
            torch.manual_seed(0)
            agent = kind(kind.Config(**{"preset": config.preset, **method.settings}), spec)
            with torch.no_grad():  # the last layers are zero at first, and a solve on a constant stops at once
                for parameter in agent.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            rows.append({"obs": obs, "method": method.name, **_counts(agent, spec, config.rows)})
    write_csv(config.out / "operations.csv", rows)
    return as_text(rows)


def _counts(agent: Agent, spec: EnvSpec, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    segment = _segment(spec, agent.config.horizon)
    first = torch.ones(1, dtype=torch.bool)
    row = segment.obs[0, :1]
    for _ in range(2):
        agent.update(segment, generator=generator)
    vars(agent).update(updates=TRAINED)  # the longest planning horizon
    act, act_gflop = count(lambda: agent.act(row, None, first=first, step=TRAINED, explore=True, generator=generator))
    update, update_gflop = count(lambda: agent.update(segment, generator=generator))
    return {"act": act, "update": update, "act_gflop": act_gflop, "update_gflop": update_gflop * batch / BATCH}


def _segment(spec: EnvSpec, steps: int) -> Segment:
    shape = (steps + 1, BATCH, *spec.obs_shape)
    pixels = spec.obs_dtype == "uint8"
    obs = torch.randint(0, 256, shape, dtype=torch.uint8) if pixels else torch.randn(shape)
    actions = 2 * torch.rand(steps, BATCH, spec.action_dim) - 1
    flags = torch.zeros(steps, BATCH, dtype=torch.bool)
    return Segment(
        obs, actions, torch.randn(steps, BATCH), flags, torch.ones(steps, BATCH), torch.ones(BATCH), torch.arange(BATCH)
    )

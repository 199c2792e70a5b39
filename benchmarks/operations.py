"""Operations and arithmetic of acting and updating: counts, which do not depend on the machine.

On a GPU, the time of an action is roughly proportional to the number of operations, because each is a launch of a kernel and
the kernels are small. The time of an update from images is bound by arithmetic. Views are not counted, because they launch
nothing. Reads are operations that wait for the device, to bring a value to the CPU.

The tensors are on torch's `meta` device: they have shapes but no values, so nothing is computed.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Method
from benchmarks.records import RESULTS, as_text, write_csv
from benchmarks.rl import METHODS, TRAINED
from difftori.interfaces import Agent
from difftori.registry import find_agent
from difftori.types import EnvSpec, Segment

_OTHERS = (
    Method("difftori pg=per-episode obs-q-steps=5", "difftori", {"obs_q_steps": 5}),
    Method("difftori pg=off obs-q-coef=0", "difftori", {"pg": "off", "obs_q_coef": 0.0}),
)


class Config(BaseModel):
    """Settings of the count."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preset: str = "paper"
    """Preset of the agents."""
    action_dim: PositiveInt = 6
    """Size of the action; 6 is cheetah-run's."""
    rows: PositiveInt = 256
    """Batch size of an update."""
    out: Path = RESULTS
    """Folder for `operations.csv`."""


READS = frozenset(("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"))
"""Operations that read values of tensors on the CPU."""


_FUSED = "_get_fused_kernels_supported_devices"


@contextmanager
def optimizers_without_values() -> Iterator[None]:
    """In the body, the fused Adam accepts tensors on `meta`, which torch otherwise refuses."""
    with ExitStack() as stack:
        for name in ("torch.optim.optimizer", "torch.optim.adam"):
            module = importlib.import_module(name)
            if hasattr(module, _FUSED):
                stack.enter_context(mock.patch.object(module, _FUSED, return_value=["cpu", "meta"]))
        yield


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(job: Callable[[], object]) -> tuple[int, int, float]:
    """The number of operations that a call dispatches, without views, of reads, and of multiplications and additions in units of 1e9."""
    with _Operations() as operations:
        job()
    with FlopCounterMode(display=False) as arithmetic:
        job()
    reads = sum(operations.counts[name] for name in READS)
    return sum(operations.counts.values()), reads, arithmetic.get_total_flops() / 1e9


def run(config: Config) -> list[dict[str, Any]]:
    """Count, write `operations.csv` to `out`, and return the table."""
    specs = {
        "state": EnvSpec("dmc:cheetah-run", (17,), "float32", config.action_dim, 1000, 1),
        "pixels": EnvSpec("dmc:cheetah-run", (9, 84, 84), "uint8", config.action_dim, 1000, 1),
    }
    rows = []
    for obs, spec in specs.items():
        for method in (*METHODS, *_OTHERS):
            kind = find_agent(method.component)
            with optimizers_without_values():
                with torch.device("meta"):
                    agent = kind(kind.Config(**{"preset": config.preset, **method.settings}), spec)
                rows.append({"obs": obs, "method": method.name, **_counts(agent, spec, config.rows)})
    write_csv(config.out / "operations.csv", rows)
    return as_text(rows)


def _counts(agent: Agent, spec: EnvSpec, rows: int) -> dict[str, Any]:
    generator = torch.Generator()
    segment = _segment(spec, agent.config.horizon, rows)
    first, row = segment.terminated[0, :1], segment.obs[0, :1]
    for _ in range(2):
        agent.update(segment, generator=generator)
    agent.updates = TRAINED  # the longest planning horizon
    jobs: dict[str, Callable[[], object]] = {
        "act": lambda: agent.act(row, None, first=first, step=TRAINED, explore=True, generator=generator),
        "update": lambda: agent.update(segment, generator=generator),
    }
    counts: dict[str, Any] = {}
    for name, job in jobs.items():
        counts[name], counts[f"{name}_reads"], counts[f"{name}_gflop"] = count(job)
    return counts


def _segment(spec: EnvSpec, steps: int, rows: int) -> Segment:
    with torch.device("meta"):
        obs = torch.empty((steps + 1, rows, *spec.obs_shape), dtype=getattr(torch, spec.obs_dtype))
        actions, numbers = torch.empty(steps, rows, spec.action_dim), torch.empty(steps, rows)
        return Segment(obs, actions, numbers, numbers > 0, numbers, numbers[0], torch.empty(rows, dtype=torch.long))

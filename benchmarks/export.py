"""The time of an action by an exported file, ONNX and pt2, against the same policy or agent in PyTorch.

One row on `threads` threads. Networks are freshly initialised, which does not change the times, because every solve takes its full
number of steps. Layers that begin at zero are not left there: all plans would be equally good, and rounding would choose among them.
"""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from benchmarks.il import made_up_task
from benchmarks.measuring import as_in_runs
from benchmarks.records import RESULTS, as_text, write_csv, write_record
from benchmarks.rl import TRAINED
from benchmarks.serving import normalized
from difftori.export import Exported, export_model
from difftori.published import Published
from difftori.registry import find_agent
from difftori.types import EnvSpec


class Config(BaseModel):
    """Settings of the measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    preset: str = "compact"
    """Preset of the agents."""
    threads: PositiveInt = 1
    """Number of threads of torch and of ONNX Runtime."""
    seed: int = Field(default=0, ge=0)
    """Seed of the networks."""
    out: Path = RESULTS
    """Folder for `export.csv` and `export.json`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Export, measure, write `export.csv` and `.json` to `out`, and return the table."""
    rows = []
    with as_in_runs(config.threads), tempfile.TemporaryDirectory() as folder:
        for name, model in _models(config):
            pt2 = export_model(model, Path(folder) / "model.pt2", format="pt2")
            onnx = export_model(model, Path(folder) / "model.onnx", format="onnx")
            rows.append(_row(name, pt2, onnx))
    write_csv(config.out / "export.csv", rows)
    write_record(config.out / "export.json", {"rows": rows}, config=config.model_dump(mode="json"))
    return as_text(rows)


def _row(name: str, pt2: Exported, onnx: Exported) -> dict[str, Any]:
    return {
        "policy": name,
        "pytorch_ms": statistics.mean((pt2.original_ms, onnx.original_ms)),
        "pt2_ms": pt2.exported_ms,
        "onnx_ms": onnx.exported_ms,
        "onnx_speedup": onnx.original_ms / onnx.exported_ms,
        "onnx_megabytes": onnx.size / 1e6,
        "pt2_difference": f"{pt2.difference:.1e}",
        "onnx_difference": f"{onnx.difference:.1e}",
    }


def _models(config: Config) -> Iterator[tuple[str, Published]]:
    task = made_up_task()
    base = normalized("bc", {}, task, None, config.seed)
    yield "bc", Published(base, config.seed, "last")
    yield "difftori-il on bc", Published(normalized("difftori-il", {}, task, base, config.seed), config.seed, "last")
    small = {"dims": (64, 128), "inference_steps": 10}
    diffusion = normalized("diffusion", small, task, None, config.seed)
    yield "diffusion, widths 64 128, 10 steps", Published(diffusion, config.seed, "last")
    spec = EnvSpec("benchmark", (17,), "float32", 6, 500, 2)
    for name in ("sac", "tdmpc", "difftori"):
        torch.manual_seed(config.seed)
        kind = find_agent(name)
        agent = kind(kind.Config.model_validate({"preset": config.preset}), spec).eval()
        for parameter in agent.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
        yield f"agent {name}, {config.preset}", Published(agent, config.seed, "last", TRAINED)

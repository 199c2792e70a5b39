"""Parts of contestants timed side by side: each repeat runs every part once, in rotating order."""

import csv
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from difftori.config import device_faults
from difftori.runs.run import flush_tiny_numbers
from difftori.runs.versions import versions

Key: TypeAlias = tuple[str, str]
"""Contestant and part."""


def _there(name: str) -> str:
    if faults := device_faults(name):
        raise ValueError("; ".join(faults))
    return name


Device: TypeAlias = Annotated[str, AfterValidator(_there)]
"""Where something computes, as torch names it."""


@contextmanager
def as_in_runs(threads: int) -> Iterator[None]:
    """So many threads of torch, and numbers below 1e-38 count as zero, as `difftori train` has them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    flush_tiny_numbers()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


def measure(parts: Mapping[Key, Callable[[], object]], *, repeats: int, device: str) -> dict[Key, list[float]]:
    """Milliseconds of each part, `repeats` times; the first call of each, with what it compiles or loads, is not counted."""
    for job in parts.values():
        job()
    samples: dict[Key, list[float]] = {key: [] for key in parts}
    keys = list(parts)
    with Progress(BarColumn(), MofNCompleteColumn(), console=Console(stderr=True)) as progress:
        for repeat in progress.track(range(repeats)):
            shift = repeat % len(keys)
            for key in keys[shift:] + keys[:shift]:
                samples[key].append(_milliseconds(parts[key], device))
    return samples


def medians(samples: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """Of each part."""
    return {key: statistics.median(values) for key, values in samples.items()}


def write(
    stem: Path,
    config: BaseModel,
    device: str,
    rows: Sequence[Mapping[str, Any]],
    samples: Mapping[Key, Sequence[float]],
) -> None:
    """The table as `stem`.csv; what was measured, on what machine and by which settings, as `stem`.json."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if isinstance(v, str) else f"{v:.5g}" for k, v in row.items()} for row in rows)
    record = {
        "config": config.model_dump(mode="json"),
        "versions": versions(device),
        "load_average": os.getloadavg(),
        "raw_ms": {f"{name}: {part}": [round(v, 4) for v in values] for (name, part), values in samples.items()},
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def _milliseconds(job: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    job()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - began)

"""Measure methods interleaved: each repeat runs every method once, in rotating order."""

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias, TypeVar

import torch
from pydantic import AfterValidator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from difftori.config import device_faults
from difftori.runs.run import flush_tiny_numbers

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Job: TypeAlias = Callable[[], object]


def _there(name: str) -> str:
    if faults := device_faults(name):
        raise ValueError("; ".join(faults))
    return name


Device: TypeAlias = Annotated[str, AfterValidator(_there)]
"""A device, as named by torch."""


_WARM_UP = 5
"""Calls of a part on a GPU before it is timed: a CUDA graph is recorded at the second call of each of the agent's two schedules."""


@dataclass(frozen=True)
class Method:
    """A policy or agent with some settings, and its name in the table."""

    name: str
    component: str
    settings: dict[str, Any] = field(default_factory=dict)


@contextmanager
def as_in_runs(threads: int) -> Iterator[None]:
    """Use `threads` threads of torch and flush numbers below 1e-38 to zero, as `difftori train` does."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    flush_tiny_numbers()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


@contextmanager
def progress_bar(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A progress bar on stderr: a function that sets its text, and one that advances it by one of `total`."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)


def interleaved(items: Sequence[Item], repeats: int, seconds: float = math.inf) -> Iterator[tuple[int, Item]]:
    """(repeat, item) for every item in each repeat, in rotating order.

    After three repeats, none begins once `seconds` have passed.
    """
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= 3 and time.perf_counter() - began > seconds:
            return
        shift = repeat % max(len(items), 1)
        for item in (*items[shift:], *items[:shift]):
            yield repeat, item


def measure(parts: Mapping[Key, Job], *, repeats: int, device: str = "cpu") -> dict[Key, list[float]]:
    """Milliseconds of each part, interleaved. The first calls of each, which may compile, load or record, are not counted."""
    for job in parts.values():
        for _ in range(1 if device == "cpu" else _WARM_UP):
            job()
    samples: dict[Key, list[float]] = {key: [] for key in parts}
    with progress_bar(repeats * len(parts)) as (_, advance):
        for _, key in interleaved(list(parts), repeats):
            samples[key].append(milliseconds(parts[key], device))
            advance()
    return samples


def milliseconds(job: Job, device: str = "cpu") -> float:
    """The duration of a call in milliseconds, including all work that it queues on a CUDA device."""
    _synchronise(device)
    began = time.perf_counter()
    job()
    _synchronise(device)
    return 1e3 * (time.perf_counter() - began)


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def medians(samples: Mapping[Key, Sequence[float]]) -> dict[Key, float]:
    """The median of each part."""
    return {key: statistics.median(values) for key, values in samples.items()}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile. NaN if there are no values, or if a value is NaN."""
    if not values or any(math.isnan(value) for value in values):
        return math.nan, math.nan, math.nan
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high

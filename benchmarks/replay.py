"""Time and memory of the replay buffer, compared with a plain numpy implementation, interleaved in one run.

Pixels: 100,000 steps in episodes of 125, segments of T = 5 with stacks of 3 RGB frames of 84×84, batch 256 on the CPU.
The plain implementation indexes the same frames once per stacked observation, into new memory, and samples with numpy's
`choice`. The lower bound is one copy of the same number of bytes, already in order. Sampling and updating are also timed
alone, over a million priorities, and compared with one cumulative sum with a binary search.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt

from benchmarks.measuring import Job, as_in_runs, measure, quartiles
from benchmarks.records import RESULTS, as_text, write_record
from difftori.data._sum_tree import SumTree
from difftori.data.replay import Replay

FRAME, STACK, T, BATCH, EPISODE = (3, 84, 84), 3, 5, 256, 125


class Config(BaseModel):
    """Settings of the measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    repeats: PositiveInt = 50
    """Number of interleaved repeats."""
    steps: PositiveInt = 100_000
    """Number of pixel steps in the buffer. State steps and priorities are ten times as many."""
    threads: PositiveInt = 1
    """Number of threads of torch."""
    out: Path = RESULTS
    """Folder for `replay.json`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `replay.json` to `out`, and return the table."""
    load = {"load_average_before": os.getloadavg()}
    with as_in_runs(config.threads):
        results = {
            "tree": tree(10 * config.repeats, 10 * config.steps),
            "states": states(config.repeats, 10 * config.steps),
            "pixels": pixels(config.repeats, config.steps),
        }
    write_record(config.out / "replay.json", load | results, config=config.model_dump(mode="json"))
    times = {(part, name): found for part, result in results.items() for name, found in result["times"].items()}
    return as_text([{"part": part, "work": name, "ms": found["median_ms"]} for (part, name), found in times.items()])


def summary(milliseconds: list[float]) -> dict:
    """Median, quartiles and the raw numbers."""
    low, middle, high = quartiles(milliseconds)
    return {"median_ms": middle, "quartiles_ms": [low, high], "raw_ms": [round(value, 5) for value in milliseconds]}


def timed(works: dict[str, Job], repeats: int) -> dict[str, dict]:
    """Milliseconds of each function, interleaved."""
    return {name: summary(values) for name, values in measure(works, repeats=repeats).items()}


def rss() -> int:
    """The resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def record(replay: Replay, frames: np.ndarray, length: int) -> None:
    """Record one episode of frames from a pool."""
    stack = [frames[0]] * STACK if frames.dtype == np.uint8 else [frames[0]]
    replay.begin(0, np.concatenate(stack))
    action = np.zeros(replay.action_dim)
    for t in range(length):
        stack = [*stack[1:], frames[t + 1]]
        replay.add(0, action, 1.0, np.concatenate(stack), terminated=False, truncated=t + 1 == length)


def plain_sample(frames: np.ndarray, chances: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The plain implementation: numpy's choice, then (T+1 B k·C H W) by indexing into new memory."""
    starts = rng.choice(len(chances), BATCH, p=chances)
    index = starts[None, :, None] + np.arange(T + 1)[:, None, None] + np.arange(STACK)
    return frames[index].reshape(T + 1, BATCH, STACK * FRAME[0], *FRAME[1:])


def pixels(repeats: int, steps: int) -> dict:
    """Measure sampling, memory, recording, saving and loading of pixel episodes."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    pool = rng.integers(0, 256, (EPISODE + 1, *FRAME), dtype=np.uint8)
    shape = (STACK * FRAME[0], *FRAME[1:])
    options = {"obs_shape": shape, "obs_dtype": np.uint8, "action_dim": 6, "length": T, "stack": STACK}
    before = rss()
    replay = Replay(steps, **options)
    episodes = []
    for _ in range(steps // EPISODE):
        start = time.perf_counter()
        record(replay, pool, EPISODE)
        episodes.append(1e3 * (time.perf_counter() - start) / EPISODE)
    held = rss() - before
    frames = np.tile(
        pool, (min(steps, 20_000) // EPISODE, 1, 1, 1)
    )  # fewer frames can only favour the plain implementation
    chances = np.full(len(frames) - T - STACK, 1.0)
    chances /= chances.sum()

    def update() -> None:
        segment = replay.sample(BATCH, generator=generator)
        replay.update_priorities(segment.index, segment.weights)

    block, target = frames[: BATCH * (T + STACK)], np.empty((BATCH * (T + STACK), *FRAME), np.uint8)
    times = timed(
        {
            "sample": lambda: replay.sample(BATCH, generator=generator),
            "sample and update": update,
            "plain sample": lambda: plain_sample(frames, chances, rng),
            "one copy of as many bytes": lambda: np.copyto(target, block),
        },
        repeats,
    )
    return {
        "steps": len(replay),
        "gigabytes": held / 1e9,
        "gigabytes_per_100k_steps": held / 1e9 / len(replay) * 1e5,
        "times": times | {"record one step": summary(episodes)} | files(pool, options),
        "plain_over_ours": times["plain sample"]["median_ms"] / times["sample"]["median_ms"],
        "ours_over_one_copy": times["sample"]["median_ms"] / times["one copy of as many bytes"]["median_ms"],
    }


def files(pool: np.ndarray, options: dict) -> dict:
    """Measure saving and loading of episodes, including the flush to the disk."""
    replay = Replay(4000, **options)
    saves, loads = [], []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(30):
            record(replay, pool, EPISODE)
            start = time.perf_counter()
            state = replay.save(Path(name))
            saves.append(1e3 * (time.perf_counter() - start))
        for _ in range(5):
            start = time.perf_counter()
            replay.load(Path(name), state)
            loads.append(1e3 * (time.perf_counter() - start) / 30)
    return {"save one new episode": summary(saves), "load, of each episode": summary(loads)}


def states(repeats: int, steps: int) -> dict:
    """Measure sampling of states, 24 numbers each, batch 512."""
    generator = torch.Generator().manual_seed(0)
    replay = Replay(steps, obs_shape=(24,), obs_dtype=np.float32, action_dim=6, length=T)
    pool = np.random.default_rng(0).normal(size=(1001, 24)).astype(np.float32)
    for _ in range(steps // 1000):
        record(replay, pool, 1000)

    def update() -> None:
        segment = replay.sample(512, generator=generator)
        replay.update_priorities(segment.index, segment.weights)

    works: dict[str, Job] = {
        "sample": lambda: replay.sample(512, generator=generator),
        "sample and update": update,
        "record an episode of 1000, overwriting one": lambda: record(replay, pool, 1000),
    }
    return {"steps": len(replay), "times": timed(works, repeats)}


def tree(repeats: int, size: int) -> dict:
    """Measure sampling and updating 256 of `size` priorities."""
    rng = np.random.default_rng(0)
    leaves = rng.uniform(0.1, 2.0, size)
    ours, total = SumTree(size), leaves.sum()
    ours.fill(leaves)
    index, values = rng.integers(0, size, BATCH), rng.uniform(0.1, 2.0, BATCH)

    def plain() -> np.ndarray:
        return np.searchsorted(np.cumsum(leaves), rng.random(BATCH) * total)

    works: dict[str, Job] = {
        "draw": lambda: ours.find(rng.random(BATCH) * ours.total),
        "update": lambda: ours.set(index, values),
        "plain draw": plain,
    }
    times = timed(works, repeats)
    return {
        "size": size,
        "times": times,
        "plain_over_ours": times["plain draw"]["median_ms"] / times["draw"]["median_ms"],
    }

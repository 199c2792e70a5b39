"""The cost of refinement: time of an update and of an action, for a base policy and for each refiner on top of it.

All parts of all methods run in turn, in rotating order. The results are medians in milliseconds, on `threads` threads. The
task is synthetic and has the sizes of MetaWorld's states: two observations of 39 numbers, plans of 4 actions of 4 numbers, 3
of them executed. Networks are freshly initialised, which does not change the times, because every solve takes its full number
of steps. Operations (without views) and floating-point operations of an update are counted; they do not depend on the machine.
The update of a refiner does not include its base (the base actions are precomputed); its action does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from benchmarks.measuring import Device, Job, Method, as_in_runs, measure, medians
from benchmarks.operations import count
from benchmarks.records import RESULTS, as_text, raw_ms, write_csv, write_record
from difftori.il.base import base_actions
from difftori.il.learner import Learner
from difftori.policies.normalized import NormalizedPolicy
from difftori.registry import find_policy
from difftori.runs.run import seeded
from difftori.types import EntrySpec, Moments, Plans, TaskSpec, Window, WindowObs

OBS, ACTIONS = 39, 4


class Config(BaseModel):
    """Settings of the measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: Literal["bc", "diffusion"] = "bc"
    """Base policy to refine: a multilayer perceptron, 2 × 256, or the small diffusion policy."""
    rows: PositiveInt = 1
    """Number of environments that act at once."""
    repeats: PositiveInt = 15
    """Number of interleaved repeats."""
    device: Device = "cpu"
    """Device of the policies."""
    threads: PositiveInt = 1
    """Number of threads of torch."""
    seed: int = Field(default=0, ge=0)
    """Seed of the networks and the synthetic data."""
    out: Path = RESULTS
    """Folder for `il-BASE.csv` and `il-BASE.json`."""


REFINERS = (
    Method("residual", "residual"),
    Method("ibc from base, small", "ibc-base", {"preset": "small"}),
    Method("DiffTORI", "difftori-il"),
    Method("DiffTORI, 2 steps", "difftori-il", {"max_steps": 2}),
    Method("DiffTORI, 2 steps, one layer", "difftori-il", {"max_steps": 2, "score_hidden": (256,)}),
    Method("DiffTORI, spectral", "difftori-il", {"solver": "spectral"}),
    Method("DiffTORI, release", "difftori-il", {"preset": "reference", "batch_size": 64}),
)


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `il-BASE.csv` and `.json` to `out`, and return the table."""
    with as_in_runs(config.threads):
        parts = _parts(config)
        samples = measure(parts, repeats=config.repeats, device=config.device)
        counts = {name: count(job) for (name, part), job in parts.items() if part == "update"}
    median = medians(samples)
    rows = [
        {
            "method": name,
            "update_ms": median[name, "update"],
            "act_ms": median[name, "act"],
            "update_ratio": median[name, "update"] / median[config.base, "update"],
            "act_ratio": median[name, "act"] / median[config.base, "act"],
            "update_operations": operations,
            "update_gflop": gflop,
        }
        for name, (operations, _, gflop) in counts.items()
    ]
    stem = config.out / f"il-{config.base}"
    write_csv(stem.with_suffix(".csv"), rows)
    record = {"raw_ms": raw_ms(samples)}
    write_record(stem.with_suffix(".json"), record, config=config.model_dump(mode="json"), device=config.device)
    return as_text(rows)


def _parts(config: Config) -> dict[tuple[str, str], Job]:
    """The functions to time, by method and part."""
    spec, settings = made_up_task(), {"hidden": (256, 256)} if config.base == "bc" else {"preset": "small"}
    base = _policy(Method(config.base, config.base, {**settings, "batch_size": 64}), spec, None, config)
    policies = {config.base: base}
    policies |= {each.name: _policy(each, spec, base, config) for each in REFINERS}
    parts: dict[tuple[str, str], Job] = {}
    obs = windows(spec, config.rows, config.seed, config.device).obs
    for name, policy in policies.items():
        settings = policy.policy.config
        batch = windows(spec, settings.batch_size, config.seed, config.device)
        if policy.base is not None:
            actions = base_actions(policy, _Once(batch), seeded(0, "base actions", config.device))
            batch = replace(batch, base=actions.to(config.device))
        learner, noise = Learner(policy, settings, 10**6), seeded(0, "learning", config.device)

        def update(learner: Learner = learner, batch: Window = batch, noise: torch.Generator = noise) -> None:
            learner.update(batch, noise)

        def act(policy: NormalizedPolicy = policy, noise: torch.Generator = noise) -> Plans:
            return policy.act(obs, generator=noise)

        parts |= {(name, "update"): update, (name, "act"): act}
    return parts


def _policy(method: Method, spec: TaskSpec, base: NormalizedPolicy | None, config: Config) -> NormalizedPolicy:
    torch.manual_seed(config.seed)
    kind = find_policy(method.component)
    settings = kind.Config.model_validate(method.settings)
    return NormalizedPolicy(kind(settings, spec).to(config.device), base)


def made_up_task() -> TaskSpec:
    """A synthetic task with the sizes of MetaWorld's states. All numbers are within ±1."""

    def unit(size: int) -> Moments:
        return Moments((-1.0,) * size, (1.0,) * size, (0.0,) * size, (0.5,) * size)

    low, high = (-1.0,) * ACTIONS, (1.0,) * ACTIONS
    obs = {"state": EntrySpec((OBS,), moments=unit(OBS))}
    return TaskSpec(obs, ACTIONS, 4, low, high, n_obs_steps=2, n_action_steps=3, moments=unit(ACTIONS))


def windows(spec: TaskSpec, rows: int, seed: int, device: str) -> Window:
    """Random windows."""
    generator = seeded(seed, "windows")
    obs: WindowObs = {"state": (2 * torch.rand(rows, spec.n_obs_steps, OBS, generator=generator) - 1).to(device)}
    actions = 2 * torch.rand(rows, spec.horizon, ACTIONS, generator=generator) - 1
    return Window(obs, actions.to(device), torch.arange(rows))


@dataclass(frozen=True)
class _Once:
    """A dataset that contains a single batch."""

    batch: Window

    def __len__(self) -> int:
        return len(self.batch.actions)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Window]:
        yield self.batch

    def in_order(self, batch_size: int = 0) -> Iterator[Window]:
        yield self.batch

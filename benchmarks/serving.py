"""The time of an action through `difftori serve`, against the same policy in process, for one and for eight clients.

Clients are processes on the same machine, which act as fast as the server answers. Networks are freshly initialised, which does not
change the times. Every action is computed anew (plans of which one action is executed). In process, a batch of eight observations
is timed too: what a server would need that batches the observations of its clients.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from benchmarks.il import made_up_task
from benchmarks.measuring import as_in_runs, interleaved, milliseconds
from benchmarks.records import RESULTS, as_text, write_csv, write_record
from difftori.loading import LoadedPolicy
from difftori.policies.normalized import NormalizedPolicy
from difftori.registry import find_policy
from difftori.rollout import PolicyInRows
from difftori.runs.run import seeded
from difftori.serving.server import PolicyServer, in_thread
from difftori.types import EntrySpec, Plans, TaskSpec, WindowObs

CLIENTS = 8
_SIDE = 96


class Config(BaseModel):
    """Settings of the measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    actions: PositiveInt = 100
    """Number of actions of each client in each repeat."""
    repeats: PositiveInt = 3
    """Number of interleaved repeats."""
    threads: PositiveInt = 1
    """Number of threads of torch."""
    seed: int = Field(default=0, ge=0)
    """Seed of the networks and the synthetic observations."""
    out: Path = RESULTS
    """Folder for `serving.csv` and `serving.json`."""


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `serving.csv` and `.json` to `out`, and return the table."""
    policies = _policies(config.seed)
    ways = ("in process", "in process, batch of 8", "1 client", "8 clients")
    raw: dict[str, list[float]] = {f"{name}: {way}": [] for name in policies for way in ways}
    rates: dict[str, list[float]] = {name: [] for name in policies}
    with as_in_runs(config.threads):
        for _, (name, way) in interleaved([(name, way) for name in policies for way in ways], config.repeats):
            if way.startswith("in process"):
                times = list(_in_process(policies[name], CLIENTS if "batch" in way else None, config))
            else:
                clients = int(way.split()[0])
                times, seconds = _served(policies[name], clients, config.actions)
                rates[name] += [clients * config.actions / seconds] if clients > 1 else []
            raw[f"{name}: {way}"] += times
    rows = [_row(name, raw, rates[name]) for name in policies]
    write_csv(config.out / "serving.csv", rows)
    record = {"raw_ms": {key: [round(value, 4) for value in times] for key, times in raw.items()}, "rates": rates}
    write_record(config.out / "serving.json", record, config=config.model_dump(mode="json"))
    return as_text(rows)


def _row(name: str, raw: Mapping[str, list[float]], rates: list[float]) -> dict[str, Any]:
    alone, served = (statistics.median(raw[f"{name}: {way}"]) for way in ("in process", "1 client"))
    return {
        "policy": name,
        "in_process_ms": alone,
        "batch_of_8_ms": statistics.median(raw[f"{name}: in process, batch of 8"]),
        "one_client_ms": served,
        "added_ms": served - alone,
        "one_client_p95_ms": float(np.quantile(raw[f"{name}: 1 client"], 0.95)),
        "eight_clients_ms": statistics.median(raw[f"{name}: 8 clients"]),
        "eight_clients_p95_ms": float(np.quantile(raw[f"{name}: 8 clients"], 0.95)),
        "actions_per_second": statistics.median(rates),
    }


def _policies(seed: int) -> dict[str, LoadedPolicy]:
    states = replace(made_up_task(), n_action_steps=1)
    image = EntrySpec((_SIDE, _SIDE, 3), dtype="uint8")
    base = normalized("bc", {"hidden": (256, 256)}, states, None, seed)
    return {
        "bc, 39 numbers": _loaded(base, states),
        "DiffTORI on bc, 39 numbers": _loaded(normalized("difftori-il", {}, states, base, seed), states),
        f"bc, image {_SIDE}×{_SIDE}": _loaded(
            normalized("bc", {}, image_task := replace(states, obs={"image": image}), None, seed), image_task
        ),
    }


def normalized(
    name: str, settings: dict[str, Any], spec: TaskSpec, base: NormalizedPolicy | None, seed: int
) -> NormalizedPolicy:
    """Build a policy with fresh weights, on a base policy or alone."""
    torch.manual_seed(seed)
    kind = find_policy(name)
    return NormalizedPolicy(kind(kind.Config.model_validate(settings), spec).eval(), base)


def _loaded(policy: NormalizedPolicy, spec: TaskSpec) -> LoadedPolicy:
    def made() -> PolicyInRows:
        generator = seeded(0, "policy")

        def act(obs: WindowObs) -> Plans:
            return policy.act(obs, generator=generator).detach()

        return PolicyInRows(act, spec)

    name = policy.policy.name
    return LoadedPolicy(made, name, spec.obs, spec.low, spec.high, scaled=False, n_obs_steps=spec.n_obs_steps)


def _in_process(policy: LoadedPolicy, rows: int | None, config: Config) -> Iterator[float]:
    rng, own = np.random.default_rng(config.seed), policy.fork()
    obs = {}
    for name, entry in policy.obs.items():
        shape = entry.shape if rows is None else (rows, *entry.shape)
        uint8 = entry.dtype == "uint8"
        obs[name] = rng.integers(0, 255, shape, np.uint8) if uint8 else rng.uniform(-1, 1, shape).astype(np.float32)
    own.act(obs)
    for _ in range(config.actions):
        yield milliseconds(lambda: own.act(obs))


def _served(policy: LoadedPolicy, clients: int, actions: int) -> tuple[list[float], float]:
    """The milliseconds of every action of all clients, and the seconds until the last one."""
    with in_thread(PolicyServer(policy)) as port:
        command = [sys.executable, "-m", "benchmarks.serving_client", f"ws://127.0.0.1:{port}", str(actions)]
        started = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(clients)
        ]
        pipes = [(each.stdin, each.stdout) for each in started if each.stdin and each.stdout]
        for _, out in pipes:
            out.readline()
        began = time.perf_counter()
        for to, _ in pipes:
            to.write("\n")
            to.flush()
        times = [time_ms for _, out in pipes for time_ms in json.loads(out.readline())]
        seconds = time.perf_counter() - began
        for each in started:
            each.communicate()
    return times, seconds

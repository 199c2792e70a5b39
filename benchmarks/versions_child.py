"""The measurement of `bench versions`: acting and updating of every agent, with the `difftori` that is imported.

A program of its own, which every commit runs unchanged: it needs only what all of them have. For each line of its input it
makes every call once, and prints the milliseconds by "METHOD: PART", as JSON.
"""

import argparse
import json
import sys
import time

import torch

from difftori.registry import find_agent
from difftori.runs.run import flush_tiny_numbers
from difftori.types import EnvSpec, Segment

TRAINED = 30_000
"""Number of agent steps after which the schedules have ended and the planning horizon is longest."""
_OBS, _ACTIONS = 17, 6
_METHODS = {
    "tdmpc": ("tdmpc", {}),
    "difftori pg=off": ("difftori", {"pg": "off"}),
    "difftori pg=replay": ("difftori", {"pg": "replay"}),
    "sac": ("sac", {}),
    "drqv2": ("drqv2", {}),
}


def main() -> None:
    """Measure all parts in turn, once for each line of the input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_tiny_numbers()
    spec = EnvSpec("dmc:cheetah-run", (_OBS,), "float32", _ACTIONS, 1000, 1)
    jobs = {}
    for name, (kind, settings) in _METHODS.items():
        torch.manual_seed(0)
        agent = find_agent(kind)(find_agent(kind).Config(preset=options.preset, **settings), spec)
        generator = torch.Generator().manual_seed(0)
        segment = _segment(agent.config.horizon, agent.batch_size, generator)
        agent.updates = TRAINED
        jobs[f"{name}: act"] = lambda agent=agent, row=segment.obs[0, :1], generator=generator: agent.act(
            row, None, first=torch.ones(1, dtype=torch.bool), step=TRAINED, explore=True, generator=generator
        )
        jobs[f"{name}: update"] = lambda agent=agent, segment=segment, generator=generator: agent.update(
            segment, generator=generator
        )
    for _ in sys.stdin:
        samples = {}
        for key, job in jobs.items():
            began = time.perf_counter()
            job()
            samples[key] = round(1e3 * (time.perf_counter() - began), 4)
        print(json.dumps(samples), flush=True)


def _segment(steps: int, rows: int, generator: torch.Generator) -> Segment:
    numbers = torch.rand(steps, rows, generator=generator)
    return Segment(
        torch.randn(steps + 1, rows, _OBS, generator=generator),
        2 * torch.rand(steps, rows, _ACTIONS, generator=generator) - 1,
        numbers,
        torch.zeros(steps, rows, dtype=torch.bool),
        torch.ones(steps, rows),
        torch.ones(rows),
        torch.arange(rows),
    )


if __name__ == "__main__":
    main()

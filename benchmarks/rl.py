"""Time of the parts of reinforcement learning: acting, environment steps, sampling and updates, for all agents.

All parts of all methods run in turn, in rotating order. The results are medians in milliseconds, on `threads` threads.
Networks are freshly initialised and the replay buffer contains random episodes of the environment, which does not change the
times, because every solve takes its full number of steps. The environment step is measured once, because all methods share it.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from benchmarks.measuring import Device, Job, Method, as_in_runs, measure, medians
from benchmarks.records import RESULTS, as_text, raw_ms, write_csv, write_record
from difftori.data.replay import Replay
from difftori.envs.base import env_spec
from difftori.envs.checked import CheckedVectorEnv
from difftori.interfaces import Agent
from difftori.registry import find_agent
from difftori.rl.acting import Acting
from difftori.rl.collector import Collector, EpisodeSummary
from difftori.rl.config import parse_rl_config
from difftori.rl.learning import Learning
from difftori.runs.run import seeded
from difftori.types import EnvSpec

TRAINED = 30_000
"""Number of agent steps after which the schedules have ended and the planning horizon is longest."""


class Config(BaseModel):
    """Settings of the measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    env: str = "dmc:cheetah-run"
    """Environment, as for `difftori train`."""
    obs: Literal["state", "pixels"] = "state"
    """Observation type."""
    preset: str = "paper"
    """Preset of the agents."""
    num_envs: PositiveInt = 1
    """Number of environments that run in parallel."""
    repeats: PositiveInt = 15
    """Number of interleaved repeats."""
    episodes: PositiveInt = 2
    """Number of random episodes in the replay buffer."""
    device: Device = "cpu"
    """Device of the agents."""
    threads: PositiveInt = 1
    """Number of threads of torch."""
    compile: bool = False
    """Compile the agents, as `difftori train --compile` does."""
    seed: int = Field(default=0, ge=0)
    """Seed of the networks and the episodes."""
    out: Path = RESULTS
    """Folder for `rl-OBS-PRESET.csv` and `.json`. With `--compile` the names are `rl-OBS-PRESET-compiled`."""


METHODS = (
    Method("tdmpc", "tdmpc"),
    Method("difftori pg=off", "difftori", {"pg": "off"}),
    Method("difftori pg=per-episode", "difftori", {"pg": "per-episode"}),
    Method("difftori pg=replay", "difftori", {"pg": "replay"}),
    Method("sac", "sac"),
    Method("drqv2", "drqv2"),
)


def run(config: Config) -> list[dict[str, Any]]:
    """Measure, write `rl-OBS-PRESET.csv` and `.json` to `out`, and return the table."""
    with as_in_runs(config.threads):
        return _measure(config)


def _measure(config: Config) -> list[dict[str, Any]]:
    settings = {"preset": config.preset}
    base = parse_rl_config(
        {"agent": "tdmpc", "env": config.env, "obs": config.obs, "seed": config.seed, "settings": settings}
    )
    env = base.open_env(config.num_envs)
    try:
        spec = env_spec(env)
        agents = {each.name: _agent(each, spec, config) for each in METHODS}
        parts, seconds_of_step = _parts(agents, env, spec, config)
    finally:
        env.close()
    samples = measure(parts, repeats=config.repeats, device=config.device)
    rows = _table(medians(samples), seconds_of_step, agents, config)
    stem = config.out / f"rl-{config.obs}-{config.preset}{'-compiled' if config.compile else ''}"
    write_csv(stem.with_suffix(".csv"), rows)
    record = {"raw_ms": raw_ms(samples)}
    write_record(stem.with_suffix(".json"), record, config=config.model_dump(mode="json"), device=config.device)
    shown = ("method", "act_ms", "update_ms", "episode_ms", "agent_step_ms", "training_ratio")
    return as_text([{name: row[name] for name in shown} for row in rows])


def _agent(method: Method, spec: EnvSpec, config: Config) -> Agent:
    torch.manual_seed(config.seed)
    kind = find_agent(method.component)
    agent = kind(kind.Config(**{"preset": config.preset, **method.settings}), spec).to(config.device)
    agent.compiles = config.compile
    return agent


def _parts(
    agents: dict[str, Agent], env: CheckedVectorEnv, spec: EnvSpec, config: Config
) -> tuple[dict[tuple[str, str], Job], float]:
    """The functions to time, by method and part, and the milliseconds of one environment step of all copies."""
    replays: dict[int, Replay] = {}
    for length in sorted({agent.config.horizon for agent in agents.values()}):
        replays[length], ended, step = _recorded(env, spec, length, config)
    episode = torch.from_numpy(ended[0].obs).to(config.device)
    starts = [ended[row % len(ended)].obs[0] for row in range(config.num_envs)]
    obs = torch.from_numpy(np.stack(starts))
    first = torch.ones(config.num_envs, dtype=torch.bool)
    sampling = seeded(0, "sampling")
    parts: dict[tuple[str, str], Job] = {}
    for name, agent in agents.items():
        replay = replays[agent.config.horizon]
        segment = replay.sample(agent.batch_size, generator=sampling)
        # As in a run: on a GPU, actions and updates are replayed as CUDA graphs.
        acting = Acting(agent, seeded(0, "acting", config.device), explore=True)
        learning = Learning(agent, seeded(0, "learning", config.device))

        def act(acting: Acting = acting) -> object:
            return acting(obs, None, first, step=TRAINED)[0].cpu()

        def update(learning: Learning = learning, segment=segment) -> object:
            return learning.update(segment).cpu()

        def sample(agent: Agent = agent, replay: Replay = replay) -> object:
            return replay.sample(agent.batch_size, generator=sampling)

        def end_episode(learning: Learning = learning) -> object:
            return learning.end_episode(episode)

        parts |= {(name, "act"): act, (name, "update"): update, (name, "sample"): sample}
        agent.updates = TRAINED  # with the longest planning horizon
        if getattr(agent.config, "pg", "off").startswith("per-"):
            parts[name, "end_episode"] = end_episode
    return parts, step


def _recorded(
    env: CheckedVectorEnv, spec: EnvSpec, length: int, config: Config
) -> tuple[Replay, list[EpisodeSummary], float]:
    """A replay buffer of segments of `length` steps with random episodes, these, and the milliseconds of a step of all copies."""
    replay = Replay(
        config.episodes * config.num_envs * (spec.max_agent_steps or 1000) + 1,
        obs_shape=spec.obs_shape,
        obs_dtype=spec.obs_dtype,
        action_dim=spec.action_dim,
        length=length,
        stack=3 if len(spec.obs_shape) == 3 else 1,
        num_rows=config.num_envs,
        storage="auto",
        device=config.device,
    )
    collector = Collector(env, replay, config.seed)
    collector.begin()
    noise = seeded(config.seed, "random actions")
    ended: list[EpisodeSummary] = []
    while len(ended) < config.episodes * config.num_envs:
        ended += collector.step(lambda obs, *_: (2 * torch.rand(len(obs), spec.action_dim, generator=noise) - 1, {}))
    return replay, ended, 1e3 * collector.seconds["environment"] / max(collector.agent_steps // config.num_envs, 1)


def _table(
    median: dict[tuple[str, str], float], environment: float, agents: dict[str, Agent], config: Config
) -> list[dict[str, Any]]:
    """One row per method. `agent_step_ms`: the total time of one agent step of one environment in training."""
    rows: list[dict[str, Any]] = []
    for name, agent in agents.items():
        act, update, sample = (median[name, part] for part in ("act", "update", "sample"))
        length = 1000 if agent.spec.max_agent_steps is None else agent.spec.max_agent_steps
        episode = median.get((name, "end_episode"), 0.0) / length
        learning = agent.config.updates_per_step * (sample + update) + episode
        total = (act + environment) / config.num_envs + learning
        rows.append(
            {
                "method": name,
                "act_ms": act,
                "environment_ms": environment,
                "sample_ms": sample,
                "update_ms": update,
                "episode_ms": median.get((name, "end_episode"), 0.0),
                "agent_step_ms": total,
                "act_ratio": act / median["tdmpc", "act"],
                "update_ratio": update / median["tdmpc", "update"],
            }
        )
    for row in rows:
        row["training_ratio"] = row["agent_step_ms"] / rows[0]["agent_step_ms"]
    return rows

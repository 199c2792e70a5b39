"""An environment and recorded demonstrations of it as an imitation task: `--env pusht --demos PATH`."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from difftori.data.download import find_demos
from difftori.data.formats import read_demos
from difftori.data.normalize import measured_spec
from difftori.data.trajectories import Trajectories
from difftori.data.windows import Windows
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import EnvFamily, ResolvedEnv
from difftori.envs.video import record, write_gif
from difftori.errors import ConfigError
from difftori.il.tasks import Act, Evaluation, ImitationTask
from difftori.rollout import Episode, make_step_policy, named, play, wilson_interval
from difftori.runs.run import seeded
from difftori.types import TaskSpec

_log = logging.getLogger(__name__)

VALIDATION = 0.02
"""Share of the episodes that is held out, at least one, as in Diffusion Policy and DP3."""
TEST_SEED = 100_000
"""The first seed of evaluation episodes, which count up from there; collecting uses others."""
WINDOW = (2, 16, 8)
"""Observations seen, actions predicted and executed, where neither the policy nor the environment says."""
EVAL_ROWS = 25
"""Episodes that are evaluated at once."""


@dataclass(frozen=True)
class EnvEvaluator:
    """Evaluates a policy in an environment, `num_envs` episodes at once. Options that are None take its defaults."""

    env: ResolvedEnv
    obs: str | None = None
    num_envs: int = EVAL_ROWS
    workers: str | None = None

    def evaluate(self, act: Act, spec: TaskSpec, *, episodes: int) -> Evaluation:
        """Success at any step, with its Wilson interval at 95 %, and mean score, over episodes from fixed seeds.

        The seeds count up from `TEST_SEED`, the same for every policy and run.
        """
        env = self.open(min(self.num_envs, episodes))
        try:
            played = play(env, act, spec, range(TEST_SEED, TEST_SEED + episodes))
        finally:
            env.close()
        return Evaluation(_metrics(played), _columns(played))

    def film(self, act: Act, spec: TaskSpec, path: Path) -> None:
        """Write the first evaluation episode as a GIF. RenderingError where the environment draws nothing."""
        env = self.open(1)
        try:
            path.parent.mkdir(exist_ok=True)
            write_gif(record(env, make_step_policy(act, spec), seed=TEST_SEED), path)
        finally:
            env.close()

    def open(self, num_envs: int) -> CheckedVectorEnv:
        """`num_envs` copies of the environment."""
        options: dict[str, Any] = {"obs": self.obs, "workers": self.workers}
        given = {name: value for name, value in options.items() if value is not None}
        # Recorded actions are in the environment's own units.
        return self.env.make(num_envs=num_envs, seed=TEST_SEED, unit_actions=False, **given)


@dataclass(frozen=True)
class EnvTask(ImitationTask):
    """Imitating recorded episodes of an environment, and measured in it."""

    evaluator: EnvEvaluator

    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """See `EnvEvaluator.evaluate`; nothing is drawn from `generator`."""
        return self.evaluator.evaluate(act, self.spec, episodes=episodes)


def env_task(
    env: ResolvedEnv,
    *,
    seed: int,
    demos: str,
    num_train: int | None = None,
    obs: str | None = None,
    n_obs_steps: int | None = None,
    horizon: int | None = None,
    n_action_steps: int | None = None,
    num_envs: int = EVAL_ROWS,
    workers: str | None = None,
) -> EnvTask:
    """Windows of the demonstrations at `demos`, and the environment to evaluate in.

    `num_train` episodes are learned from, drawn by `seed`, all but the held out ones unless given. `obs` is the
    environment's option; `n_obs_steps`, `horizon` and `n_action_steps` are O, H, and the actions executed of a plan.
    Raises ConfigError, DataError for data that do not fit the environment.
    """
    own = env.family.window or WINDOW
    n_obs_steps = own[0] if n_obs_steps is None else n_obs_steps
    horizon = own[1] if horizon is None else horizon
    n_action_steps = own[2] if n_action_steps is None else n_action_steps
    single = EnvEvaluator(env, obs).open(1)
    try:
        space = single.single_action_space
        assert isinstance(space, Box)
        low, high = (tuple(float(v) for v in bound) for bound in (space.low, space.high))
        seen = {key: values.shape[1:] for key, values in named(single.reset(seed=TEST_SEED)[0]).items()}
    finally:
        single.close()
    shown_obs = obs or str(env.options.get("obs", ""))
    whole = _recorded(find_demos(demos, _log.warning), env.family, shown_obs, seen, len(low))
    train, validation = whole.split(VALIDATION, seeded(seed, "held out episodes"))
    if num_train is not None:
        if num_train > len(train):
            raise ConfigError([f"num_train: {num_train}: {demos} has {len(train)} episodes beside the held out ones"])
        order = torch.randperm(len(train), generator=seeded(seed, "training episodes"))[:num_train]
        train = train.select(sorted(order.tolist()))
    spec = measured_spec(
        train, low=low, high=high, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps
    )
    # Every step is the present of one window, whatever is executed: arms that replan more often learn from the same data.
    reach = max(n_action_steps, horizon - n_obs_steps + 1)
    sets = [
        Windows(part, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=reach) for part in (train, validation)
    ]
    return EnvTask(spec, sets[0], sets[1], EnvEvaluator(env, obs, num_envs, workers))


def _recorded(
    path: Path, family: EnvFamily, obs: str, seen: dict[str, tuple[int, ...]], action_dim: int
) -> Trajectories:
    """The demonstrations as the environment shows them. By default they have the same names."""
    recorded = family.recorded or {obs: tuple(seen)}
    if obs not in recorded:
        raise ConfigError([f"obs: {obs!r} cannot be imitated here; choose one of {', '.join(recorded)}"])
    stored = read_demos(path, {name: name for name in recorded[obs]})
    if family.from_recorded is not None:
        arrays = {name: values.numpy() for name, values in stored.obs.items()}
        obs_arrays, actions = family.from_recorded(arrays, stored.actions.numpy(), obs)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in obs_arrays.items()}
        actions = torch.from_numpy(np.ascontiguousarray(actions, dtype=np.float32))
        stored = replace(stored, obs=tensors, actions=actions)
    found = {name: tuple(values.shape[1:]) for name, values in stored.obs.items()}
    faults = []
    if found != seen:
        faults.append(
            f"demos: {path} holds {found}, and the environment shows {seen}; collect anew, or choose another obs"
        )
    if stored.actions.shape[1] != action_dim:
        faults.append(
            f"demos: {path} holds actions of {stored.actions.shape[1]} numbers; the environment takes {action_dim}"
        )
    if faults:
        raise ConfigError(faults)
    return stored


def _metrics(played: list[Episode]) -> dict[str, float]:
    successes = sum(episode.success for episode in played)
    low, high = wilson_interval(successes, len(played))
    return {
        "success": successes / len(played),
        "success_low": low,
        "success_high": high,
        "score": float(np.mean([episode.score for episode in played])),
        "return": float(np.mean([episode.total for episode in played])),
        "length": float(np.mean([episode.length for episode in played])),
        "episodes": float(len(played)),
    }


def _columns(played: list[Episode]) -> dict[str, list[float]]:
    return {
        "seed": [float(episode.seed) for episode in played],
        "success": [float(episode.success) for episode in played],
        "score": [episode.score for episode in played],
        "return": [episode.total for episode in played],
        "length": [float(episode.length) for episode in played],
    }

"""An imitation task from an environment and recorded demonstrations: `--env pusht --demos PATH`."""

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
from difftori.envs.video import write_video
from difftori.errors import ConfigError
from difftori.il.tasks import Act, Evaluation, ImitationTask
from difftori.rollout import Episode, PolicyInRows, check_episode, evaluate_policy, named, record, wilson_interval
from difftori.runs.run import seeded
from difftori.types import TaskSpec

_log = logging.getLogger(__name__)

VALIDATION = 0.02
"""Share of the episodes that is held out for validation, at least one, as in Diffusion Policy and DP3."""
TEST_SEED = 100_000
"""Seed of the first evaluation episode; the next ones count up. `difftori collect` uses other seeds."""
WINDOW = (2, 16, 8)
"""Default n_obs_steps, horizon and n_action_steps, if neither the policy nor the environment has its own."""
EVAL_ROWS = 25
"""Default number of environments that run in parallel during an evaluation."""


@dataclass(frozen=True)
class EnvEvaluator:
    """Evaluates a policy in an environment, with `num_envs` episodes in parallel. Options that are None use the environment's defaults."""

    env: ResolvedEnv
    obs: str | None = None
    num_envs: int = EVAL_ROWS
    workers: str | None = None
    max_episode_steps: int | None = None

    def evaluate(self, act: Act, spec: TaskSpec, *, episodes: int) -> Evaluation:
        """Run episodes from fixed seeds. Returns the rate of success at any step, its Wilson 95 % interval, and the mean score.

        The seeds count up from `TEST_SEED`, the same for every policy and run.
        """
        env = self.open(min(self.num_envs, episodes))
        try:
            played = evaluate_policy(env, act, spec, range(TEST_SEED, TEST_SEED + episodes))
        finally:
            env.close()
        return Evaluation(_metrics(played), _columns(played))

    def film(self, act: Act, spec: TaskSpec, run_dir: Path) -> Path:
        """Record the first evaluation episode in the run's `media/`. Raises RenderingError if the environment cannot render."""
        env = self.open(1)
        try:
            recording = record(env, PolicyInRows(act, spec), seed=TEST_SEED, until_success=True)
        finally:
            env.close()
        return write_video(recording, run_dir / "media", "episode")

    def open(self, num_envs: int) -> CheckedVectorEnv:
        """Create `num_envs` copies of the environment."""
        options: dict[str, Any] = {
            "obs": self.obs,
            "workers": self.workers,
            "max_episode_steps": self.max_episode_steps,
        }
        given = {name: value for name, value in options.items() if value is not None}
        # Recorded actions are in the environment's units, so actions are not rescaled.
        return self.env.make(num_envs=num_envs, seed=TEST_SEED, unit_actions=False, **given)


@dataclass(frozen=True)
class EnvTask(ImitationTask):
    """Imitation of recorded episodes of an environment, with evaluation in it."""

    evaluator: EnvEvaluator

    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """See `EnvEvaluator.evaluate`. `generator` is not used."""
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
    max_episode_steps: int | None = None,
) -> EnvTask:
    """Create the task: windows of the demonstrations at `demos`, and the environment for evaluation.

    `num_train` is the number of training episodes, sampled by `seed` (default: all except the held-out ones). `obs` is the
    observation type of the environment. `n_obs_steps`, `horizon` and `n_action_steps` are O, H, and the number of executed
    actions of a plan. Raises ConfigError or DataError for data that do not match the environment.
    """
    own = env.family.window or WINDOW
    n_obs_steps = own[0] if n_obs_steps is None else n_obs_steps
    horizon = own[1] if horizon is None else horizon
    n_action_steps = own[2] if n_action_steps is None else n_action_steps
    evaluator = EnvEvaluator(env, obs, num_envs, workers, max_episode_steps)
    single = replace(evaluator, workers=None).open(1)
    try:
        space = single.single_action_space
        assert isinstance(space, Box)
        low, high = (tuple(float(v) for v in bound) for bound in (space.low, space.high))
        seen = {key: values.shape[1:] for key, values in named(single.reset(seed=TEST_SEED)[0]).items()}
        check_episode(single, success=True)
    finally:
        single.close()
    shown_obs = obs or str(env.options.get("obs", ""))
    whole = _recorded(find_demos(demos, _log.warning), env.family, shown_obs, seen, len(low))
    train, validation = whole.split(VALIDATION, seeded(seed, "held out episodes"))
    if num_train is not None:
        if num_train > len(train):
            raise ConfigError(
                [
                    f"num_train: {num_train} is too large; {demos} has {len(train)} training episodes after holding out "
                    f"{len(validation)}. Fix: give at most {len(train)}"
                ]
            )
        order = torch.randperm(len(train), generator=seeded(seed, "training episodes"))[:num_train]
        train = train.select(sorted(order.tolist()))
    spec = measured_spec(
        train, low=low, high=high, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps
    )
    # Every step is the present step of one window, for any n_action_steps: methods that replan more often use the same data.
    reach = max(n_action_steps, horizon - n_obs_steps + 1)
    sets = [
        Windows(part, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=reach) for part in (train, validation)
    ]
    return EnvTask(spec, sets[0], sets[1], evaluator)


def _recorded(
    path: Path, family: EnvFamily, obs: str, seen: dict[str, tuple[int, ...]], action_dim: int
) -> Trajectories:
    """Read the demonstrations and convert them to the environment's observations. By default, the names are the same."""
    recorded = family.recorded or {obs: tuple(seen)}
    if obs not in recorded:
        raise ConfigError([f"obs: {obs!r} is not in the demonstrations. Fix: choose one of {', '.join(recorded)}"])
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
            f"demos: {path} has observations {found}, but the environment has {seen}. "
            "Fix: collect new demonstrations, or choose another --obs"
        )
    if stored.actions.shape[1] != action_dim:
        faults.append(
            f"demos: {path} has actions of size {stored.actions.shape[1]}, but the environment needs {action_dim}. "
            "Fix: give demonstrations of this environment"
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

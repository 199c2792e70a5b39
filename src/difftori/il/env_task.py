"""An imitation task from an environment and recorded demonstrations: `--env pusht --demos PATH`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box

from difftori.data.fingerprint import fingerprint
from difftori.data.normalize import measured_spec
from difftori.data.trajectories import Trajectories
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import ResolvedEnv
from difftori.envs.video import write_video
from difftori.errors import ConfigError
from difftori.il.contract import Bounds, Shown, check_fit, conform
from difftori.il.recorded import WINDOW, DemosOptions, hold_out, make_windows
from difftori.il.tasks import Act, Evaluation, ImitationTask
from difftori.rollout import (
    EpisodeResult,
    PolicyInRows,
    check_episode,
    episode_seed,
    evaluate_policy,
    named,
    record,
    wilson_interval,
)
from difftori.types import TaskSpec

HELD_OUT = 0.02
"""Default share of the episodes that is held out for validation, at least one, as in Diffusion Policy and DP3."""
TEST_SEED = 100_000
"""Seed of the first evaluation episode; the next ones count up. `difftori collect` uses other seeds."""
SEPARATE = ("obs",)
"""Options of an environment's builder that are options of the command line."""
EVAL_ROWS = 25
"""Default number of environments that run in parallel during an evaluation."""


@dataclass(frozen=True)
class EnvEvaluator:
    """Evaluates a policy in an environment, with `num_envs` episodes in parallel. Options that are None use the environment's defaults.

    `env_options` are further options of the environment, NAME=VALUE. Raises ConfigError for invalid ones. `seed`: other episodes than
    those that all runs are evaluated on. `watch` is called after every step with the number of episodes that have ended.
    """

    env: ResolvedEnv
    obs: str | None = None
    num_envs: int = EVAL_ROWS
    workers: str | None = None
    max_episode_steps: int | None = None
    env_options: Sequence[str] = ()
    seed: int | None = None
    watch: Callable[[int], None] = lambda ended: None

    def evaluate(self, act: Act, spec: TaskSpec, *, episodes: int) -> Evaluation:
        """Run episodes from fixed seeds. Returns the rate of success at any step, its Wilson 95 % interval, and the mean score."""
        env = self.open(min(self.num_envs, episodes))
        try:
            seeds = [self.episode_seed(number) for number in range(episodes)]
            played = evaluate_policy(env, _choosing(act, spec), spec, seeds, watch=self.watch)
        finally:
            env.close()
        return Evaluation(_metrics(played), _columns(played))

    def film(self, act: Act, spec: TaskSpec, run_dir: Path) -> Path:
        """Record the first evaluation episode in the run's `media/`. Raises RenderingError if the environment cannot render."""
        env = self.open(1)
        try:
            rows = PolicyInRows(_choosing(act, spec), spec)
            recording = record(env, rows, seed=self.episode_seed(0), until_success=True)
        finally:
            env.close()
        return write_video(recording, run_dir / "media", "episode")

    def episode_seed(self, number: int) -> int:
        """Return the seed of an evaluation episode: they count up from `TEST_SEED`, the same for every policy and run, unless `seed` is given."""
        return TEST_SEED + number if self.seed is None else episode_seed(self.seed, "evaluation", number)

    def check(self, spec: TaskSpec) -> None:
        """Raise ConfigError if the policy of `spec` does not fit the environment, or an evaluation in it would end without a result."""
        with closing(replace(self, workers=None).open(1)) as single:
            bounds, shown = _interface(single)
            check_fit(spec, shown, bounds, env=self.env.name)
            check_episode(single, success=True)

    @property
    def options(self) -> dict[str, Any]:
        """The values of `env_options`."""
        return self.env.read_options(self.env_options, other=SEPARATE)

    @property
    def shown_obs(self) -> str:
        """The observation type of the environment, or "" if it has none."""
        return self.obs or str(self.env.options.get("obs", ""))

    def open(self, num_envs: int) -> CheckedVectorEnv:
        """Create `num_envs` copies of the environment."""
        options: dict[str, Any] = {
            "obs": self.obs,
            "workers": self.workers,
            "max_episode_steps": self.max_episode_steps,
        }
        given = {name: value for name, value in options.items() if value is not None}
        # Recorded actions are in the environment's units, so actions are not rescaled.
        return self.env.make(num_envs=num_envs, seed=TEST_SEED, unit_actions=False, **given, **self.options)


@dataclass(frozen=True)
class EnvTask(ImitationTask):
    """Imitation of recorded episodes of an environment, with evaluation in it."""

    evaluator: EnvEvaluator

    def watched(self, watch: Callable[[int], None]) -> "EnvTask":
        """See `ImitationTask.watched`."""
        return replace(self, evaluator=replace(self.evaluator, watch=watch))

    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """See `EnvEvaluator.evaluate`. `generator` is not used."""
        return self.evaluator.evaluate(act, self.spec, episodes=episodes)


def env_task(
    env: ResolvedEnv,
    *,
    seed: int,
    demos: str,
    obs_keys: Sequence[str] | None = None,
    action_key: str | None = None,
    episodes: Sequence[str] | None = None,
    held_out: float = HELD_OUT,
    num_train: int | None = None,
    obs: str | None = None,
    env_options: Sequence[str] = (),
    n_obs_steps: int | None = None,
    horizon: int | None = None,
    n_action_steps: int | None = None,
    num_envs: int = EVAL_ROWS,
    workers: str | None = None,
    max_episode_steps: int | None = None,
) -> EnvTask:
    """Create the task: windows of the demonstrations at `demos`, and the environment for evaluation.

    `obs` is the observation type of the environment; `env_options` are its other options, NAME=VALUE. `n_obs_steps`, `horizon`
    and `n_action_steps` are O, H, and the number of executed actions of a plan. See `DemosOptions` and `hold_out` for the data. Raises ConfigError or DataError for data that do
    not match the environment.
    """
    own = env.family.window or WINDOW
    given = {"n_obs_steps": n_obs_steps, "horizon": horizon, "n_action_steps": n_action_steps}
    window = {name: own[i] if size is None else size for i, (name, size) in enumerate(given.items())}
    evaluator = EnvEvaluator(env, obs, num_envs, workers, max_episode_steps, env_options)
    options = DemosOptions(demos, obs_keys, action_key, episodes)
    with closing(replace(evaluator, workers=None).open(1)) as single:
        bounds, shown = _interface(single)
        stored = _recorded(options, evaluator, shown)
        whole = conform(_converted(stored, options, evaluator), shown, bounds, place=demos, env=env.name)
        check_episode(single, success=True)
    train, held = hold_out(whole, held_out, seed, num_train, demos)
    spec = measured_spec(train, low=bounds[0], high=bounds[1], **window)
    validation = None if held is None else make_windows(held, **window)
    return EnvTask(spec, make_windows(train, **window), validation, evaluator, data=fingerprint(_used(stored, options)))


def _interface(env: CheckedVectorEnv) -> tuple[Bounds, dict[str, Shown]]:
    """Return the bounds of the environment's actions, and its observations."""
    space = env.single_action_space
    assert isinstance(space, Box)
    low, high = (tuple(float(v) for v in bound) for bound in (space.low, space.high))
    first = named(env.reset(seed=TEST_SEED)[0])
    if single := [name for name, values in first.items() if values.ndim == 1]:
        raise ConfigError(
            [
                f"env: the observation {single[0]!r} of {env.name} is one number, of shape (). Fix: give it the shape (1,)"
            ]
        )
    return (low, high), {name: Shown(values.shape[1:], str(values.dtype)) for name, values in first.items()}


def _recorded(options: DemosOptions, evaluator: EnvEvaluator, shown: Mapping[str, Shown]) -> Trajectories:
    """Read the arrays that the environment's observations are computed from. By default, the names are the same.

    Raises ConfigError for `obs_keys` that would replace what the environment computes from such arrays.
    """
    env, obs = evaluator.env, evaluator.shown_obs
    recorded = env.recorded or {obs: tuple(shown)}
    if obs not in recorded:
        raise ConfigError([f"obs: {obs!r} is not in the demonstrations. Fix: choose one of {', '.join(recorded)}"])
    if options.obs_keys is not None and env.family.from_recorded is not None and options.have(recorded[obs]):
        if other := [word for word in options.obs_keys if word not in shown]:
            raise ConfigError(
                [
                    f"obs_keys: {other[0]!r} is no observation of {env.name}, which computes them from these demonstrations: "
                    f"{', '.join(shown)}. Fix: choose among these, or remove --obs-keys"
                ]
            )
        options = replace(options, obs_keys=None)
    return options.read({name: name for name in recorded[obs]})


def _converted(stored: Trajectories, options: DemosOptions, evaluator: EnvEvaluator) -> Trajectories:
    """Convert recorded arrays to the environment's observations, of which `obs_keys` are kept, and actions.

    Observations under other names are those of the environment already.
    """
    env, obs = evaluator.env, evaluator.shown_obs
    if env.family.from_recorded is None or not set(env.recorded[obs]) <= stored.obs.keys():
        return stored
    given = {**env.options, **evaluator.options, "obs": obs, "about": stored.about, "action_key": options.action_key}
    arrays = {name: values.numpy() for name, values in stored.obs.items()}
    obs_arrays, actions = env.from_recorded(arrays, stored.actions.numpy(), given)
    kept = _selected(options, obs_arrays) or tuple(obs_arrays)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(obs_arrays[name])) for name in kept}
    return replace(stored, obs=tensors, actions=torch.from_numpy(np.ascontiguousarray(actions, dtype=np.float32)))


def _selected(options: DemosOptions, obs: Collection[str]) -> tuple[str, ...]:
    """Return the observations that `obs_keys` select by their names. Empty: they name other keys of the file, or are not given."""
    words = tuple(options.obs_keys or ())
    return words if all(word in obs for word in words) else ()


def _used(stored: Trajectories, options: DemosOptions) -> Trajectories:
    """Return the recorded arrays that a selection by `obs_keys` uses, if each is an array of the file, otherwise all."""
    names = _selected(options, stored.obs)
    return replace(stored, obs={name: stored.obs[name] for name in names}) if names else stored


def _choosing(act: Act, spec: TaskSpec) -> Act:
    """Return the policy as a function of all observations of an environment, of which it gets its own, in their order."""
    return lambda obs: act({name: obs[name] for name in spec.obs})


def _metrics(played: list[EpisodeResult]) -> dict[str, float]:
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


def _columns(played: list[EpisodeResult]) -> dict[str, list[float]]:
    return {
        "seed": [float(episode.seed) for episode in played],
        "success": [float(episode.success) for episode in played],
        "score": [episode.score for episode in played],
        "return": [episode.total for episode in played],
        "length": [float(episode.length) for episode in played],
    }

"""Evaluate the policy of an imitation run, at the end of training and from its run directory."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from difftori.errors import ConfigError
from difftori.il.config import TrainConfig
from difftori.il.demos_task import NONE
from difftori.il.env_task import EVAL_ROWS, EnvEvaluator
from difftori.il.recorded import warn_of_changes
from difftori.il.tasks import Act, Evaluation, ImitationTask
from difftori.il.weights import Which, default_weights, load_policy
from difftori.policies.normalized import NormalizedPolicy
from difftori.registry import resolve_env
from difftori.runs.page import keep_evaluation
from difftori.runs.progress import Progress
from difftori.runs.run import seeded
from difftori.steering import Steering
from difftori.types import Metrics, Plans, WindowObs, to_device


def evaluate(
    policy: NormalizedPolicy,
    task: ImitationTask,
    config: TrainConfig,
    *,
    episodes: int,
    watch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate a policy by the task's own measure, from starts that depend only on the seed and the number of episodes."""
    act = seeded_actor(policy, seed=config.seed, device=config.device, watch=watch)
    return task.evaluate(act, episodes=episodes, generator=seeded(config.seed, "evaluation: starts"))


def evaluate_run(
    run_dir: Path,
    *,
    which: Which | None = None,
    episodes: int | None = None,
    device: str = "cpu",
    changes: Mapping[str, Any] | None = None,
    video: bool = False,
    progress: bool = False,
) -> Metrics:
    """Evaluate the policy of a run on `episodes` episodes (default: the run's own number).

    `which`: the weights (default: `last` for runs with `demos`, otherwise `best`). `changes`: entries of the run's configuration to
    replace, such as `env` for another environment with the same observations and actions, or `seed` for other episodes. `video`: record
    the first episode in the folder `media` of the run. The demonstrations are not needed if there is an environment. The result
    is kept in the run's `eval.json`. Raises ConfigError if the environment does not fit the policy, and the errors of `load_policy`.
    """
    changes = dict(changes or {})
    policy, config = load_policy(run_dir, which, device=device, changes=changes)
    count = episodes or config.eval_episodes
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with Progress(progress) as bar:
            if config.demos is None or config.env == NONE:
                result = _evaluate_in_task(policy, config, run_dir, count, bar, video)
            else:
                result = _evaluate_in_env(policy, config, run_dir, count, bar, video, changes)
    finally:
        torch.set_num_threads(threads)
    settings = {"weights": which or default_weights(config), "device": config.device, "changes": changes}
    keep_evaluation(run_dir, result.metrics, result.episodes, settings)
    return result.metrics


def _evaluate_in_task(
    policy: NormalizedPolicy, config: TrainConfig, run_dir: Path, episodes: int, bar: Progress, video: bool
) -> Evaluation:
    if video:
        raise ConfigError([f"--video: {config.env} is not an environment and cannot render. Fix: remove --video"])
    task = config.open_task()
    warn_of_changes(run_dir, task.data)
    with bar.phase(f"evaluation: {episodes} episodes"):
        return evaluate(policy, task, config, episodes=episodes)


def _evaluate_in_env(
    policy: NormalizedPolicy,
    config: TrainConfig,
    run_dir: Path,
    episodes: int,
    bar: Progress,
    video: bool,
    changes: Mapping[str, Any],
) -> Evaluation:
    evaluator = EnvEvaluator(
        resolve_env(config.env),
        config.obs,
        config.num_envs or EVAL_ROWS,
        config.workers,
        config.max_episode_steps,
        config.env_options or (),
        changes.get("seed"),
    )
    if changes.keys() - {"seed"}:
        evaluator.check(policy.spec)
    actor = partial(seeded_actor, policy, seed=config.seed, device=config.device)
    if video:
        with bar.phase("recording the first episode"):
            evaluator.film(actor(), policy.spec, run_dir)
    with bar.phase("evaluation: episodes", episodes) as phase:
        return replace(evaluator, watch=phase.update).evaluate(actor(), policy.spec, episodes=episodes)


def seeded_actor(policy: NormalizedPolicy, *, seed: int, device: str, watch: Callable[[], None] = lambda: None) -> Act:
    """Return the policy as a function with inputs and outputs on the CPU, and with its own seeded generator.

    `watch` is called before every plan; what it raises ends the evaluation.
    """
    policy.policy.eval()
    generator = seeded(seed, "evaluation: policy", device)

    def act(obs: WindowObs, steering: Steering | None = None) -> Plans:
        watch()
        inputs = to_device(obs, generator.device)
        return policy.act(inputs, generator=generator, steering=steering).detach().cpu()

    return act

"""Evaluate the policy of an imitation run, at the end of training and from its run directory; load the policy of a run."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from difftori.errors import CheckpointError, ConfigError
from difftori.il.config import TrainConfig, parse_config
from difftori.il.demos_task import NONE
from difftori.il.env_task import EVAL_ROWS, EnvEvaluator
from difftori.il.learner import Learner
from difftori.il.recorded import warn_of_changes
from difftori.il.tasks import Act, Evaluation, ImitationTask
from difftori.policies.normalized import NormalizedPolicy
from difftori.registry import resolve_env
from difftori.runs.checkpoint import State, read_weights, write_weights
from difftori.runs.page import keep_evaluation
from difftori.runs.progress import Progress
from difftori.runs.records import read_config
from difftori.runs.run import seeded
from difftori.steering import Steering
from difftori.types import Metrics, Plans, TaskSpec, WindowObs, to_device

Which: TypeAlias = Literal["best", "last"]
"""Weights of a run: those with the least validation error, or those of the last update."""


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


def default_weights(config: TrainConfig) -> Which:
    """Return the weights to act with: `last` for runs with `demos`, because few episodes are held out, otherwise `best`."""
    return "best" if config.demos is None else "last"


def write_policy(out: Path, config: TrainConfig, learner: Learner, spec: TaskSpec) -> None:
    """Write `policy.pt` and its sha256: the best and the last weights, and everything needed to build the policy.

    A refiner's file includes its base policy, so that it does not depend on the base's run.
    """
    weights = {"policy": learner.acting.policy.state_dict(), "best": learner.best}
    base = read_weights(out / "base.pt") if config.base is not None else None
    plain = config.model_dump(mode="json")
    write_weights(out / "policy.pt", {"learner": weights, "spec": asdict(spec), "config": plain, "base": base})


def load_policy(
    run_dir: Path, which: Which | None = None, *, device: str = "cpu", changes: Mapping[str, Any] | None = None
) -> tuple[NormalizedPolicy, TrainConfig]:
    """Load the policy of a run, for inference on `device`. Returns it with the run's configuration (with that device, and `changes`).

    `which`: the weights (default: `last` for runs with `demos`, otherwise `best`). For an unfinished run, the weights are
    those of its newest valid checkpoint. The environment need not be installed. Raises ConfigError if `run_dir` is not a run, its
    policy is unknown, or `which` is `best` and nothing was held out, and CheckpointError if the weights are missing or damaged.
    """
    stored = read_config(run_dir)
    if stored.get("data_seed") is None:  # another seed changes the evaluation, not what was held out
        stored["data_seed"] = stored.get("seed")
    config = parse_config({**stored, "device": device, **(changes or {})}, check_env=False)
    state = read_weights(run_dir / "policy.pt")
    if which == "best" and not state["learner"].get("best"):
        raise ConfigError(
            [
                "which: 'best' is not available, because the run has not been validated on held-out demonstrations. Fix: use 'last'"
            ]
        )
    if config.base is not None and "base" not in state:  # a checkpoint of an unfinished run
        state = {**state, "base": read_weights(run_dir / "base.pt")}
    return _restored(state, config, which or default_weights(config), str(run_dir)), config


def _restored(state: State, config: TrainConfig, which: Which, place: str) -> NormalizedPolicy:
    """Build a policy, with its base, from the state written by `export` or a checkpoint."""
    try:
        below = state.get("base")
        base = None if below is None else restored_base(below, config, f"{place}, base")
        policy = config.policy_type(config.settings, TaskSpec.from_plain(state["spec"]))
        learner = state["learner"]
        last = learner.get("average") or learner["policy"]
        policy.load_state_dict(learner["best"] or last if which == "best" else last)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{place}: the weights do not match {config.policy!r}: {error}. Fix: train again"
        ) from error
    return NormalizedPolicy(policy.to(config.device).eval(), base)


def restored_base(state: State, config: TrainConfig, place: str) -> NormalizedPolicy:
    """Build the base policy from its exported state, on the device of the run that refines it."""
    plain = {**state["config"], "device": config.device, "base": None}
    return _restored(state, parse_config(plain, check_env=False), "last", place)


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

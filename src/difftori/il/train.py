"""Imitation runs: trains a policy in a run directory, and loads and evaluates the policy of a run."""

import json
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from difftori.errors import CheckpointError, ConfigError
from difftori.il.base import WithBase, copy_base, kept_base_actions, warn_of_split
from difftori.il.config import TASK_OPTIONS, TrainConfig, parse_config
from difftori.il.demos_task import NONE
from difftori.il.distributed import Distributed
from difftori.il.env_task import EVAL_ROWS, EnvEvaluator
from difftori.il.learner import Learner, TrainLoop, run_length
from difftori.il.recorded import check_base_data, check_data, warn_of_changes
from difftori.il.task_names import make_task
from difftori.il.tasks import Act, Evaluation, ImitationTask
from difftori.interfaces import Dataset, PolicyConfig
from difftori.policies.normalized import NormalizedPolicy, described
from difftori.registry import resolve_env
from difftori.runs.checkpoint import Checkpoint, State, read_weights, replace_file, write_weights
from difftori.runs.page import keep_evaluation
from difftori.runs.process import StopRequested, StopSignal
from difftori.runs.progress import LongRunHint, Progress
from difftori.runs.records import is_finished, read_config, read_summary
from difftori.runs.run import Run, refuse_another, seeded
from difftori.steering import Steering
from difftori.types import Metrics, Plans, TaskSpec, WindowObs, to_device

_log = logging.getLogger(__name__)

Which: TypeAlias = Literal["best", "last"]
"""Weights of a run: those with the least validation error, or those of the last update."""


def train(
    config: TrainConfig, out: Path, *, progress: bool = True, wandb: bool = False, accept_changed_data: bool = False
) -> Metrics:
    """Train a policy by imitation in the run directory `out`, and return the run's summary.

    An unfinished run of the same configuration in `out` is resumed from its last checkpoint, on the CPU bit by bit as if it had
    never stopped. A finished run is not repeated; its summary is returned. A run whose demonstrations have changed is resumed
    with `accept_changed_data` only; it keeps its normalisation. `wandb`: also log to Weights & Biases (`runs.loggers`).

    Raises ConfigError (invalid configuration, another one in `out`, or changed demonstrations), DataError (invalid
    demonstrations), CheckpointError (no valid checkpoint, disk full), NonFiniteError (too many consecutive updates with NaN
    or Inf). On SIGTERM or SIGINT, saves a checkpoint and raises SystemExit with status 143 or 130. Under torchrun, all
    processes train this one run (distributed.py).
    """
    if (distributed := Distributed.of_torchrun(config.device)).count == 1:
        return _train(config, out, progress, distributed, accept_changed_data, wandb=wandb)
    if is_finished(out):
        refuse_another(out, config)
        return read_summary(out)
    with distributed:
        if distributed.is_main:
            summary = _train(config, out, progress, distributed, accept_changed_data, wandb=wandb)
            distributed.wait()
            return summary
        with tempfile.TemporaryDirectory() as scratch:
            _train(config, Path(scratch) / "run", False, distributed, accept_changed_data, out)
        distributed.wait()
        return read_summary(out)


def _train(
    config: TrainConfig,
    out: Path,
    progress: bool,
    distributed: Distributed,
    accept_changed_data: bool,
    main_dir: Path | None = None,
    wandb: bool = False,
) -> Metrics:
    """Run `train` in one process. A process other than the main one uses a temporary directory and loads the checkpoints of `main_dir`."""
    settings, device = config.settings, config.device
    with (
        Run(out, config, seed=config.seed, threads=config.threads, device=device, wandb=wandb) as run,
        Progress(progress) as bar,
    ):
        if run.finished:
            return run.summary()
        with bar.phase("loading data"):
            task = open_task(config)
        if task.validation is None and config.weights is not None and config.weights != "last":
            raise ConfigError(
                [
                    f"weights: {config.weights!r} needs held-out demonstrations, but there are none. Fix: give --weights last"
                ]
            )
        check_data(out, task.data, accept=accept_changed_data)
        base = _base(config, task, out, distributed, main_dir)
        checkpoint = run.restore()
        distributed.wait()  # the main process has repaired its checkpoints
        if main_dir is not None:
            checkpoint = run.load_from_main(main_dir)
        spec = task.spec if checkpoint is None else _stored_spec(checkpoint, task.spec)
        with torch.random.fork_rng(devices=[], enabled=checkpoint is not None):
            policy = NormalizedPolicy(config.policy_type(settings, spec).to(device), base)
        epochs, updates = run_length(settings, len(task.train))
        learner = Learner(policy, settings, epochs, distributed)
        _warn_of_warmup(settings, updates)
        generator = run.generator("loss", device)
        with bar.phase("base actions"):
            windows = _windows(policy, task, config, out)
        loop = TrainLoop(learner, windows, config.seed, generator)
        if checkpoint is not None:
            learner.load(checkpoint.state["learner"])

        watched = config.eval_every or (1 if config.demos is None else max(1, epochs // 20))
        hint = LongRunHint(updates, ["fewer --updates"] if device.startswith("cuda") else ["--device cuda"])
        with StopSignal() as stop, bar.phase("training: updates", updates, learner.train_state.step) as phase:

            def before_update() -> None:
                phase.update(learner.train_state.step)
                hint(learner.train_state.step, learner.train_state.seconds)
                if distributed.any(stop.requested):
                    run.save(learner.train_state.step, _state(learner, spec))
                    stop.leave()

            for row in loop.epochs(before_update):
                epoch = learner.train_state.epoch
                last = epoch == epochs
                if task.validation is not None and distributed.is_main and (last or epoch % watched == 0):
                    with bar.phase("validation"):
                        row |= learner.validate(task.validation, seeded(config.seed, "validation", device))
                run.log(learner.train_state.step, row)
                if last or epoch % config.save_every == 0:
                    run.save(learner.train_state.step, _state(learner, spec))
                names = [n for n in ("train/loss", "validation/error") if n in row]
                note = "  ".join([f"epoch {epoch}/{epochs}", *(f"{n} {row[n]:.4g}" for n in names)])
                phase.update(learner.train_state.step, note)
            if distributed.any(stop.requested):  # requested at the end of the last epoch, which is saved
                stop.leave()
            if not distributed.is_main:
                return {}
            export(out, config, learner, spec)
            try:
                with bar.phase("evaluation: episodes", config.eval_episodes) as evaluation:

                    def watch(ended: int) -> None:
                        evaluation.update(ended)
                        stop.check()

                    summary, episodes = summarise(learner, task.watched(watch), config, stop.check)
            except StopRequested:  # the evaluation is repeated when the run is resumed
                stop.leave()
        if not summary["updates"]:
            _log.warning("%s: all updates were skipped because of NaN or Inf, so nothing was learned", out)
        replace_file(out / "episodes.json", (json.dumps(episodes) + "\n").encode())
        run.finish(summary)
        return summary


def open_task(config: TrainConfig) -> ImitationTask:
    """Create the task of a configuration. Raises ConfigError for an option that the task does not have, and the errors of its factory."""
    seed = config.seed if config.data_seed is None else config.data_seed
    return make_task(
        config.env, config.task_factory, seed=seed, **{name: getattr(config, name) for name in TASK_OPTIONS}
    )


def _stored_spec(checkpoint: Checkpoint, now: TaskSpec) -> TaskSpec:
    """Return the spec that a run began with: its ranges belong to its weights. Raises ConfigError if its observations or actions differ."""
    try:
        stored = TaskSpec.from_plain(checkpoint.state["spec"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: not a checkpoint of a policy ({error!r}). Fix: restore it"
        ) from error
    if described(stored) != described(now):
        raise ConfigError(
            [
                f"demos: the run began with {described(stored)}, but the data have {described(now)}. Fix: choose another run directory"
            ]
        )
    return stored


def _base(
    config: TrainConfig, task: ImitationTask, out: Path, distributed: Distributed, main_dir: Path | None
) -> NormalizedPolicy | None:
    """Load the base policy. The run stores a copy, `base.pt`; processes other than the main one copy the main one's."""
    if config.base is None:
        return None
    if config.demos is not None and Path(config.base, "config.yaml").exists():
        below = read_config(Path(config.base))
        if (below.get("demos"), below.get("episodes")) == (config.demos, config.model_dump(mode="json")["episodes"]):
            check_base_data(Path(config.base), task.data)
            warn_of_split(below, config)
    if distributed.is_main and not (out / "base.pt").exists():
        copy_base(Path(config.base), out)
    distributed.wait()
    if main_dir is not None:
        copy_base(main_dir, out, "base.pt")
    return _restored_base(read_weights(out / "base.pt"), config, f"{out}, base")


def _windows(policy: NormalizedPolicy, task: ImitationTask, config: TrainConfig, out: Path) -> Dataset:
    """Return the training windows, with the base's actions at each if there is a base."""
    if policy.base is None:
        return task.train
    generator = seeded(config.seed, "base actions", config.device)
    digest = (out / "base.pt.sha256").read_text(encoding="utf-8")
    base = f"{digest} {config.seed} {config.device} {config.threads}"
    folder = Path(config.base or out)
    folder = folder if folder.is_dir() else out
    return WithBase(task.train, kept_base_actions(policy, task.train, generator, base=base, folder=folder))


def _warn_of_warmup(settings: PolicyConfig, updates: int) -> None:
    if settings.warmup >= updates:
        _log.warning(
            "warmup is %d of %d updates, so the learning rate never reaches %g. Fix: decrease --warmup",
            settings.warmup,
            updates,
            settings.lr,
        )


def summarise(
    learner: Learner, task: ImitationTask, config: TrainConfig, watch: Callable[[], None]
) -> tuple[Metrics, dict[str, dict[str, list[float]]]]:
    """Evaluate the weights named in the configuration, all from the same starts. Returns the summary, and the results by episode.

    `watch` is called before every plan; what it raises ends the evaluation.
    """
    train_state = learner.train_state
    summary: Metrics = {
        "epochs": float(train_state.epoch),
        "updates": float(train_state.step - train_state.skipped),
        "skipped": float(train_state.skipped),
        "seconds": train_state.seconds,
        "parameters": float(sum(p.numel() for p in learner.policy.parameters())),
        "best_epoch": float(train_state.best_epoch),
        "last/validation_error": train_state.error,
        "best/validation_error": math.nan if learner.best is None else train_state.best_error,
    }
    which = config.weights or ("both" if config.demos is None else "last")
    found: dict[str, Evaluation] = {}
    if which != "best":
        found["last"] = evaluate(learner.acting, task, config, episodes=config.eval_episodes, watch=watch)
    if which != "last":
        if learner.best is not None and (train_state.best_epoch != train_state.epoch or "last" not in found):
            learner.acting.policy.load_state_dict(learner.best)
            found["best"] = evaluate(learner.acting, task, config, episodes=config.eval_episodes, watch=watch)
        else:
            found["best"] = found["last"]
    for name, result in found.items():
        summary |= {f"{name}/{metric}": value for metric, value in result.metrics.items()}
    return summary, {name: result.episodes for name, result in found.items()}


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
    video: bool = False,
    progress: bool = False,
) -> Metrics:
    """Evaluate the policy of a run on `episodes` episodes (default: the run's own number).

    `which`: the weights (default: `last` for runs with `demos`, otherwise `best`). `video`: record the first episode in the
    folder `media` of the run. The demonstrations are not needed if the run has an environment. The result is kept in the run's
    `eval.json`.
    """
    policy, config = load_policy(run_dir, which, device=device)
    count = episodes or config.eval_episodes
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        if config.demos is None or config.env == NONE:
            if video:
                raise ConfigError(
                    [f"--video: {config.env} is not an environment and cannot render. Fix: remove --video"]
                )
            task = open_task(config)
            warn_of_changes(run_dir, task.data)
            with Progress(progress) as bar, bar.phase(f"evaluation: {count} episodes"):
                result = evaluate(policy, task, config, episodes=count)
        else:
            env, num_envs = resolve_env(config.env), config.num_envs or EVAL_ROWS
            limit, further = config.max_episode_steps, config.env_options or ()
            evaluator = EnvEvaluator(env, config.obs, num_envs, config.workers, limit, further)
            actor = partial(seeded_actor, policy, seed=config.seed, device=config.device)
            with Progress(progress) as bar:
                if video:
                    with bar.phase("recording the first episode"):
                        evaluator.film(actor(), policy.spec, run_dir)
                with bar.phase("evaluation: episodes", count) as phase:
                    evaluator = replace(evaluator, watch=phase.update)
                    result = evaluator.evaluate(actor(), policy.spec, episodes=count)
    finally:
        torch.set_num_threads(threads)
    settings = {"weights": which or default_weights(config), "device": config.device}
    keep_evaluation(run_dir, result.metrics, result.episodes, settings)
    return result.metrics


def default_weights(config: TrainConfig) -> Which:
    """Return the weights to act with: `last` for runs with `demos`, because few episodes are held out, otherwise `best`."""
    return "best" if config.demos is None else "last"


def export(out: Path, config: TrainConfig, learner: Learner, spec: TaskSpec) -> None:
    """Write `policy.pt` and its sha256: the best and the last weights, and everything needed to build the policy.

    A refiner's file includes its base policy, so that it does not depend on the base's run.
    """
    weights = {"policy": learner.acting.policy.state_dict(), "best": learner.best}
    base = read_weights(out / "base.pt") if config.base is not None else None
    plain = config.model_dump(mode="json")
    write_weights(out / "policy.pt", {"learner": weights, "spec": asdict(spec), "config": plain, "base": base})


def load_policy(
    run_dir: Path, which: Which | None = None, *, device: str = "cpu"
) -> tuple[NormalizedPolicy, TrainConfig]:
    """Load the policy of a run, for inference on `device`. Returns it with the run's configuration (with that device).

    `which`: the weights (default: `last` for runs with `demos`, otherwise `best`). For an unfinished run, the weights are
    those of its newest valid checkpoint. The environment need not be installed. Raises ConfigError if `run_dir` is not a run, its
    policy is unknown, or `which` is `best` and nothing was held out, and CheckpointError if the weights are missing or damaged.
    """
    config = parse_config({**read_config(run_dir), "device": device}, check_env=False)
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
        base = None if below is None else _restored_base(below, config, f"{place}, base")
        policy = config.policy_type(config.settings, TaskSpec.from_plain(state["spec"]))
        learner = state["learner"]
        last = learner.get("average") or learner["policy"]
        policy.load_state_dict(learner["best"] or last if which == "best" else last)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{place}: the weights do not match {config.policy!r}: {error}. Fix: train again"
        ) from error
    return NormalizedPolicy(policy.to(config.device).eval(), base)


def _restored_base(state: State, config: TrainConfig, place: str) -> NormalizedPolicy:
    """Build the base policy from its exported state, on the device of the run that refines it."""
    plain = {**state["config"], "device": config.device, "base": None}
    return _restored(state, parse_config(plain, check_env=False), "last", place)


def _state(learner: Learner, spec: TaskSpec) -> State:
    return {"learner": learner.state(), "spec": asdict(spec)}


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

"""Imitation runs: trains a policy in a run directory."""

import json
import logging
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from difftori.data.normalize import FLAT
from difftori.errors import CheckpointError, ConfigError
from difftori.il.base import WithBase, copy_base, kept_base_actions, warn_of_split
from difftori.il.config import TrainConfig
from difftori.il.distributed import Distributed
from difftori.il.evaluate import evaluate
from difftori.il.learner import Learner, TrainLoop, run_length
from difftori.il.recorded import check_base_data, check_data
from difftori.il.tasks import Evaluation, ImitationTask
from difftori.il.weights import restored_base, write_policy
from difftori.interfaces import Dataset, PolicyConfig
from difftori.policies.normalized import NormalizedPolicy, described
from difftori.runs.checkpoint import Checkpoint, State, read_weights, replace_file
from difftori.runs.process import StopRequested, StopSignal
from difftori.runs.progress import LongRunHint, Progress
from difftori.runs.records import is_finished, read_config, read_summary
from difftori.runs.run import Run, refuse_another, seeded
from difftori.types import Metrics, TaskSpec

_log = logging.getLogger(__name__)


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
            task = config.open_task()
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
        _warn_of_units(config, spec)
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
                    if distributed.is_main:
                        run.save(learner.train_state.step, _state(learner, spec))
                    stop.leave()

            for row in loop.epochs(before_update):
                epoch = learner.train_state.epoch
                last = epoch == epochs
                if task.validation is not None and distributed.is_main and (last or epoch % watched == 0):
                    with bar.phase("validation"):
                        row |= learner.validate(task.validation, seeded(config.seed, "validation", device))
                if distributed.is_main:  # the others write nothing that is kept
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
            write_policy(out, config, learner, spec)
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
    _warn_of_new_range(stored, now)
    return stored


def _warn_of_new_range(stored: TaskSpec, now: TaskSpec) -> None:
    """Warn if the data have actions outside of the range by which the run normalises, by more than a hundredth of it."""
    if stored.moments is None or now.moments is None:
        return
    ends = zip(stored.moments.low, stored.moments.high, now.moments.low, now.moments.high, strict=True)
    beyond = [
        i for i, (low, high, least, most) in enumerate(ends) if max(low - least, most - high) > 0.01 * (high - low)
    ]
    if beyond:
        _log.warning(
            "demos: dimension %s of the actions has values outside of the range of the data that the run began with, which a "
            "policy of normalised actions cannot reach. Fix: train a new run",
            ", ".join(map(str, beyond)),
        )


def _warn_of_units(config: TrainConfig, spec: TaskSpec) -> None:
    """Warn if a loss in the units of the actions hardly counts dimensions of small range."""
    if config.policy_type.NORMALIZES == "all" or getattr(config.settings, "error_units", "task") != "task":
        return
    if spec.moments is None:
        return
    ranges = [high - low for low, high in zip(spec.moments.low, spec.moments.high, strict=True)]
    moving = [size for size in ranges if size >= FLAT]
    if moving and max(moving) > 10 * min(moving):
        own = hasattr(config.settings, "error_units")
        _log.warning(
            "the ranges of the actions are %s, and %s counts squared errors in these units, so dimensions of small range are hardly "
            "learned. Fix: %s",
            ", ".join(f"{size:.3g}" for size in ranges),
            config.policy,
            "--error-units range" if own else "a policy of normalised actions, or bc --error-units range",
        )


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
    return restored_base(read_weights(out / "base.pt"), config, f"{out}, base")


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
        "updates": float(train_state.step - learner.skipped),
        "skipped": float(learner.skipped),
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


def _state(learner: Learner, spec: TaskSpec) -> State:
    return {"learner": learner.state(), "spec": asdict(spec)}

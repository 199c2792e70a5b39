"""Imitation: the loop, and the way from a run directory back to a policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from difftori.components import find_policy
from difftori.errors import CheckpointError
from difftori.interfaces import Policy
from difftori.training.checkpoint import State, read_weights, write_weights
from difftori.training.config import TrainConfig, normalised, parse_config
from difftori.training.learner import Learner
from difftori.training.records import read_config
from difftori.training.run import Run, seeded
from difftori.training.signals import StopSignal
from difftori.training.tasks import Act, ImitationTask, make_task
from difftori.types import Metrics, Observations, Plans, TaskSpec

Which: TypeAlias = Literal["best", "last"]
"""The weights with the least validation error, or those of the last update."""


def train(config: TrainConfig, out: Path, *, progress: bool = True) -> Metrics:
    """Train a policy by imitation in the directory `out`, and return the run's summary.

    If `out` holds an unfinished run of the same configuration, it goes on from its last checkpoint, on the CPU bit by
    bit as if it had never stopped; if it holds a finished one, its summary is returned at once.

    Raises ConfigError (a faulty configuration, or another one in `out`), CheckpointError (no valid checkpoint, disk
    full), NonFiniteError (too many updates in a row with NaN or Inf). On SIGTERM or SIGINT it saves a checkpoint and
    raises SystemExit with status 143 or 130.
    """
    config = normalised(config)
    settings, device = config.settings, config.device
    with Run(out, config, seed=config.seed, threads=config.threads, device=device) as run:
        if run.finished:
            return run.summary()
        task = make_task(config.env, seed=config.seed, num_train=config.num_train)
        policy = find_policy(config.policy)(settings, task.spec).to(device)
        learner = Learner(policy, settings)
        noise = run.generator("loss", device)
        if (checkpoint := run.restore()) is not None:
            learner.load(checkpoint.state["learner"])

        with StopSignal() as stop, _bar(settings.epochs, learner.place.epoch, progress) as show:
            while (epoch := learner.place.epoch) < settings.epochs:
                batches = task.train.batches(settings.batch_size, seeded(config.seed, f"order of epoch {epoch}"))
                for batch in islice(batches, learner.place.batch, None):
                    if stop.requested:
                        run.save(learner.place.step, _state(learner, task.spec))
                        stop.leave()
                    learner.update(batch.to(device), noise)
                row = learner.close_epoch()
                last = epoch + 1 == settings.epochs
                if last or (epoch + 1) % config.eval_every == 0:
                    row |= learner.validate(task.validation, seeded(config.seed, "validation", device))
                run.log(learner.place.step, row)
                if last or (epoch + 1) % config.save_every == 0:
                    run.save(learner.place.step, _state(learner, task.spec))
                show(row)

        export(out, config, learner, task.spec)
        summary = summarise(learner, task, episodes=config.eval_episodes, seed=config.seed, device=device)
        run.finish(summary)
        return summary


def summarise(learner: Learner, task: ImitationTask, *, episodes: int, seed: int, device: str) -> Metrics:
    """Evaluate the last and the best weights from the same starts; the policy is left with the best."""
    policy, place = learner.policy, learner.place
    summary: Metrics = {
        "epochs": float(place.epoch),
        "updates": float(place.step - place.skipped),
        "skipped": float(place.skipped),
        "seconds": place.seconds,
        "parameters": float(sum(p.numel() for p in policy.parameters())),
        "best_epoch": float(place.best_epoch),
        "last/validation_error": place.error,
        "best/validation_error": place.best_error,
    }
    results = evaluate(policy, task, episodes=episodes, seed=seed, device=device)
    summary |= {f"last/{name}": value for name, value in results.items()}
    if learner.best is not None and place.best_epoch != place.epoch:
        policy.load_state_dict(learner.best)
        results = evaluate(policy, task, episodes=episodes, seed=seed, device=device)
    return summary | {f"best/{name}": value for name, value in results.items()}


def evaluate(policy: Policy, task: ImitationTask, *, episodes: int, seed: int, device: str) -> Metrics:
    """The task's own measure of a policy. The starts depend on the seed alone, the same for every policy."""
    policy.eval()
    act = _actor(policy, seeded(seed, "evaluation: policy", device))
    return task.evaluate(act, episodes=episodes, generator=seeded(seed, "evaluation: starts"))


def evaluate_run(run_dir: Path, *, which: Which = "best", episodes: int | None = None, device: str = "cpu") -> Metrics:
    """Evaluate a run's policy again, from as many starts as wished; None takes the run's own number."""
    policy, config = load_policy(run_dir, which, device=device)
    task = make_task(config.env, seed=config.seed, num_train=config.num_train)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return evaluate(policy, task, episodes=episodes or config.eval_episodes, seed=config.seed, device=device)
    finally:
        torch.set_num_threads(threads)


def export(out: Path, config: TrainConfig, learner: Learner, spec: TaskSpec) -> None:
    """Write `policy.pt`, with the best and the last weights and all that is needed to build the policy, and its sha256."""
    weights = {"policy": learner.policy.state_dict(), "best": learner.best}
    write_weights(
        out / "policy.pt", {"learner": weights, "spec": asdict(spec), "config": config.model_dump(mode="json")}
    )


def load_policy(run_dir: Path, which: Which = "best", *, device: str = "cpu") -> tuple[Policy, TrainConfig]:
    """The policy of a run, ready to act on `device`, and the run's configuration (with that device).

    An unfinished run gives the weights of its newest valid checkpoint. Raises ConfigError if `run_dir` is no run or its
    policy is unknown, CheckpointError if the weights are absent or damaged.
    """
    config = parse_config({**read_config(run_dir), "device": device})
    state = read_weights(run_dir / "policy.pt")
    try:
        policy = find_policy(config.policy)(config.settings, TaskSpec(**state["spec"])).to(device)
        policy.load_state_dict(state["learner"]["best" if which == "best" else "policy"] or state["learner"]["policy"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{run_dir}: its weights do not fit {config.policy!r}: {error}") from error
    return policy.eval(), config


def _state(learner: Learner, spec: TaskSpec) -> State:
    return {"learner": learner.state(), "spec": asdict(spec)}


def _actor(policy: Policy, generator: torch.Generator) -> Act:
    """The policy as a task calls it: any device in, the same device out."""

    def act(obs: Observations) -> Plans:
        return policy.act(obs.to(generator.device), generator=generator).detach().to(obs.device)

    return act


@contextmanager
def _bar(total: int, done: int, progress: bool) -> Iterator:
    """A progress bar over epochs; yields a function that shows an epoch's row."""
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        line = bar.add_task("train", total=total, completed=done, note="")

        def show(row: Metrics) -> None:
            names = [n for n in ("train/loss", "validation/error") if n in row]
            bar.update(line, advance=1, note="  ".join(f"{n} {row[n]:.4g}" for n in names))

        yield show

"""Steering: what a cost on the planned actions does to trained policies, by five methods.

A diffusion policy, a residual and DiffTORI on it are trained without the cost. Then each acts with it, with rising weight: plans
are projected (base, residual, DiffTORI), the diffusion is guided in its denoising steps, or the cost is added to DiffTORI's learned
objective. The study reports the success, and the steps that violate the requirement behind the cost.

A finished evaluation is recorded in `results/steering/evaluations-….jsonl` and not repeated; re-run the same command to resume.
"""

import json
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from pydantic import Field, field_validator
from rich.console import Console

from difftori.envs.base import EnvironmentRestarted, RenderingError
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.video import Recording
from difftori.errors import ConfigError, DifftoriError
from difftori.experiments.il_study import Case, ILStudy, run_imitation, shortfalls
from difftori.experiments.paper.manipulation import DATA, PUBLIC_NAME, SMALL_BASE_SAMPLES
from difftori.experiments.paper.steering_cases import (
    REQUIREMENTS,
    TASKS,
    RequirementName,
    SteeringTask,
    requirement,
)
from difftori.experiments.paper.steering_film import write_side_by_side
from difftori.experiments.paper.steering_report import Evaluated, SteeringMethod, write_report
from difftori.experiments.pool import RunsFailedError, report_failures
from difftori.experiments.records import SOFTWARE, append_line, read_lines
from difftori.experiments.study import Method, Result
from difftori.il.env_task import EVAL_ROWS, TEST_SEED, EnvEvaluator
from difftori.il.evaluate import seeded_actor
from difftori.il.weights import load_policy
from difftori.registry import resolve_env
from difftori.rollout import PolicyInRows, named, record, run_episodes
from difftori.runs.process import versions
from difftori.runs.progress import Progress
from difftori.steering import Steering
from difftori.types import Plans, WindowObs

FULL_UPDATES, FULL_EPISODES, DEMONSTRATIONS = 2500, 20, 10
WEIGHTS = (0.1, 1.0, 10.0, 100.0)
BASE, RESIDUAL, DIFFTORI = "base", "residual", "DiffTORI"
_BASE_UPDATES = 2
"""Length of the base's training, as a multiple of the refiners'."""


METHODS = (
    SteeringMethod("base, projected", BASE, True),
    SteeringMethod("base, guided", BASE, False),
    SteeringMethod("residual, projected", RESIDUAL, True),
    SteeringMethod("DiffTORI, projected", DIFFTORI, True),
    SteeringMethod("DiffTORI, cost in the objective", DIFFTORI, False),
)


class Config(ILStudy):
    """Costs at test time: projected plans, guided diffusion, and DiffTORI's objective. Evaluations run one after another, whatever `--jobs`."""

    tasks: tuple[str, ...] = Field(default=tuple(task.name for task in TASKS), min_length=1)
    """Tasks: `pusht`, `sweep-into`, `pick-out-of-hole` (MetaWorld)."""
    updates: int = Field(default=FULL_UPDATES, ge=1)
    """Number of updates of the refiners; the base gets twice as many."""
    episodes: int = Field(default=FULL_EPISODES, ge=1)
    """Number of evaluation episodes of every policy and weight, with the same seeds."""
    weights: tuple[float, ...] = Field(default=WEIGHTS, min_length=1)
    """Weights of the cost. Without cost (weight 0) every policy is evaluated too."""

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        names = [task.name for task in TASKS]
        if unknown := [task for task in tasks if task not in names]:
            raise ValueError(f"{unknown[0]!r} is unknown. Fix: choose from {', '.join(names)}")
        return tuple(dict.fromkeys(tasks))

    @field_validator("weights")
    @classmethod
    def _positive(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [weight for weight in weights if not 0 < weight < float("inf")]:
            raise ValueError(
                f"{wrong[0]} is not a finite number > 0. Fix: remove it; the policies without cost are always evaluated"
            )
        return tuple(sorted(set(weights)))


_Setting: TypeAlias = tuple[RequirementName | None, str, bool, float]
"""Requirement, policy, whether its plan is projected, and weight."""


@dataclass(frozen=True)
class _Job:
    """An evaluation, with all that determines its numbers. Without cost, `requirement` is None and `weight` 0. `trained`: digest of the weights."""

    task: str
    requirement: RequirementName | None
    policy: str
    project: bool
    weight: float
    seed: int
    episodes: int
    trained: str | None
    version: int

    @property
    def prefix(self) -> bytes:
        """The beginning of its record."""
        return f'{{"job": {json.dumps(asdict(self))}, '.encode()


def run(config: Config) -> None:
    """Train the missing policies, run the missing evaluations within the budget, and write `out/steering`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _run(config)
    finally:
        torch.set_num_threads(threads)


def _run(config: Config) -> None:
    console, began = Console(), time.monotonic()
    tasks = [task for task in TASKS if task.name in config.tasks]
    checks = {
        **shortfalls(config, updates=FULL_UPDATES, episodes=FULL_EPISODES),
        f"{len(tasks)} of {len(TASKS)} tasks": len(tasks) < len(TASKS),
        "other weights": set(config.weights) != set(WEIGHTS),
    }
    results = run_imitation(
        config,
        [_case(config, task) for task in tasks],
        _methods(),
        study=f"steering/{config.updates}",
        reasons=[reason for reason, holds in checks.items() if holds],
        say=lambda text: console.print(text, highlight=False, soft_wrap=True),
    )
    file = config.out / "steering" / f"evaluations-{config.updates}.jsonl"
    trained = {(r.run.task, r.run.method.label, r.seed): r for r in results.runs if r.finished}
    weights = {key: result.record.weights for key, result in trained.items()}
    jobs = [job for seed in range(config.seeds) for task in tasks for job in _jobs(config, task, seed, weights)]
    done, failed, by_name = _read(file, jobs), list[str](), {task.name: task for task in tasks}
    with Progress(True) as progress, progress.phase("evaluations", len(jobs)) as phase:
        for number, job in enumerate(jobs):
            name = f"{job.task}, {job.requirement or 'no cost'}, {job.policy}, weight {job.weight:g}, seed {job.seed}"
            phase.update(number, name)
            late = config.budget is not None and (time.monotonic() - began) / 60 >= config.budget
            if job.prefix in done or late:
                continue
            try:
                found = evaluate(by_name[job.task], job, trained[job.task, job.policy, job.seed], config.device)
            except (DifftoriError, RuntimeError) as error:
                failed.append(f"{name}: {error}")
                continue
            _record(file, job, found, config.device)
            done |= _read(file, [job])
    reasons = list(results.reasons)
    if len(done) < len(jobs):
        reasons.append(f"{len(done)} of {len(jobs)} evaluations")
    results = replace(results, reasons=tuple(reasons))
    folder = results.folder("steering", str(config.updates))
    evaluated = [_evaluated(job, done[job.prefix]) for job in jobs if job.prefix in done]
    write_report(evaluated, METHODS, folder, label=results.label, console=console)
    if config.budget is None or (time.monotonic() - began) / 60 < config.budget:
        _films(trained, config.weights[-1], config.device, folder, console)
    for line in failed:
        console.print(f"failed: {line}", highlight=False, soft_wrap=True)
    report_failures(results.failures)
    if failed:
        raise RunsFailedError(
            f"{len(failed)} evaluations failed. Fix: see above, then run the command again, which repeats them"
        )


@dataclass(frozen=True)
class _Actor:
    """A job's policy in closed loop, and its environment."""

    begin: Callable[[], PolicyInRows]
    """Returns the policy as after loading, and forgets the times."""
    env: CheckedVectorEnv
    milliseconds: list[float]
    """Of the plans of all rows at once."""


@contextmanager
def _acting(task: SteeringTask, job: _Job, result: Result, device: str, num_envs: int) -> Iterator[_Actor]:
    """Load the policy, and open its environment."""
    folder = result.run.spec.folder
    if not (folder / "policy.pt").exists():
        raise ConfigError(
            [f"runs: {folder} is needed for evaluations, but exists only as a record. Fix: give the --runs that has it"]
        )
    policy, config = load_policy(folder, "last", device=device)
    steering = None
    if job.requirement is not None:
        steering = Steering(requirement(task, job.requirement).cost, job.weight, project=job.project)
    milliseconds = list[float]()

    def begin() -> PolicyInRows:
        act = seeded_actor(policy, seed=job.seed, device=device)
        milliseconds.clear()

        def timed(obs: WindowObs) -> Plans:
            start = time.perf_counter()
            plans = act({name: obs[name] for name in policy.spec.obs}, steering)
            if len(plans) == num_envs:
                milliseconds.append(1e3 * (time.perf_counter() - start))
            return plans

        return PolicyInRows(timed, policy.spec)

    evaluator = EnvEvaluator(
        resolve_env(config.env), config.obs, num_envs, None, config.max_episode_steps, config.env_options or ()
    )
    with closing(evaluator.open(num_envs)) as env:
        yield _Actor(begin, env, milliseconds)


def evaluate(task: SteeringTask, job: _Job, result: Result, device: str) -> dict[str, Any]:
    """Run a job's episodes, and return its record: lists over episodes, and milliseconds for planning all rows at once."""
    rows = min(job.episodes, EVAL_ROWS)
    with _acting(task, job, result, device, rows) as actor:
        while True:
            states, success, score = defaultdict(list), np.zeros(job.episodes, bool), np.zeros(job.episodes)
            try:
                seeds = range(TEST_SEED, TEST_SEED + job.episodes)
                for step in run_episodes(actor.env, actor.begin(), seeds, until_success=True):
                    shown, reached = named(step.obs)["state"], step.success
                    assert reached is not None
                    for row, number in step.active():
                        states[number].append(shown[row])
                        success[number] |= bool(reached[row])
                        reward = reached[row] if step.score is None else step.score[row]
                        score[number] = max(score[number], float(reward))
                break
            except EnvironmentRestarted:  # all episodes are lost; after too many restarts, EnvironmentFailed is raised
                continue
    paths = [np.array(states[number], dtype=np.float64) for number in range(job.episodes)]
    measured = REQUIREMENTS[task.name] if job.requirement is None else (job.requirement,)
    return {
        "success": success.tolist(),
        "score": [float(f"{value:.4g}") for value in score],
        "length": [len(path) for path in paths],
        "violations": {name: [requirement(task, name).violations(path) for path in paths] for name in measured},
        "rows": rows,
        "milliseconds": float(f"{np.median(actor.milliseconds[1:] or actor.milliseconds):.3g}"),
    }


def _films(
    trained: Mapping[tuple[str, str, int], Result], weight: float, device: str, out: Path, console: Console
) -> None:
    """Film an episode of Push-T by DiffTORI of seed 0, without cost and with each cost in its objective, if its policy is on this machine."""
    task = next(task for task in TASKS if task.env == "pusht")
    result = trained.get((task.name, DIFFTORI, 0))
    if result is None or not (result.run.spec.folder / "policy.pt").exists():
        return

    def filmed(name: RequirementName | None) -> Recording:
        job = _Job(task.name, name, DIFFTORI, False, weight, 0, 1, result.record.weights, task.version)
        with _acting(task, job, result, device, 1) as actor:
            return record(actor.env, actor.begin(), seed=TEST_SEED, until_success=True)

    try:
        without = filmed(None)
        for name in REQUIREMENTS[task.name]:
            path = out / f"{name}-weight-{weight:g}.gif"
            write_side_by_side(without, filmed(name), task.ball if name == "keep-out" else None, path)
    except RenderingError as error:
        console.print(f"no films: {error}", highlight=False, soft_wrap=True)


def _case(config: Config, task: SteeringTask) -> Case:
    if task.env == "pusht":
        local = config.demos / DATA
        return Case(task.env, task.obs, str(local) if local.exists() else PUBLIC_NAME, options=task.window)
    place = f"{{demos}}/{task.env.replace(':', '.')}-{{seed}}.zarr"
    return Case(task.env, task.obs, place, DEMONSTRATIONS, task.window)


def _methods() -> list[Method]:
    samples = {"base_samples": SMALL_BASE_SAMPLES}
    return [
        Method(BASE, "diffusion", {"preset": "small"}, updates=_BASE_UPDATES),
        Method(RESIDUAL, "residual", samples, base=BASE),
        Method(DIFFTORI, "difftori-il", samples, base=BASE),
    ]


def _jobs(
    config: Config, task: SteeringTask, seed: int, trained: Mapping[tuple[str, str, int], str | None]
) -> list[_Job]:
    """Return the evaluations of a task and seed: first without cost, then by rising weight.

    `trained`: digests of the weights of the trained policies, by task, policy and seed.
    """
    plain: list[_Setting] = [(None, policy, False, 0.0) for policy in (BASE, RESIDUAL, DIFFTORI)]
    steered: list[_Setting] = [
        (name, method.policy, method.project, weight)
        for name in REQUIREMENTS[task.name]
        for weight in config.weights
        for method in METHODS
    ]
    return [
        _Job(task.name, name, policy, project, weight, seed, config.episodes, trained[key], task.version)
        for name, policy, project, weight in (*plain, *steered)
        if (key := (task.name, policy, seed)) in trained
    ]


def _record(file: Path, job: _Job, found: dict[str, Any], device: str) -> None:
    machine = versions(device)
    origin = {
        "hardware": f"{machine.get('device_name') or machine['cpu']}, {torch.get_num_threads()} thread(s)",
        "versions": {name: machine[name] for name in SOFTWARE},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    append_line(file, job.prefix, json.dumps(found | origin)[1:].encode())


def _read(path: Path, jobs: Sequence[_Job]) -> dict[bytes, dict[str, Any]]:
    """Read the records of these jobs by the beginnings of their lines. Raises DataError if one is damaged."""
    by_prefix = {job.prefix: job for job in jobs}

    def parse(line: bytes) -> tuple[bytes, dict[str, Any]] | None:
        plain = json.loads(line)
        prefix = f'{{"job": {json.dumps(plain["job"])}, '.encode()
        if prefix not in by_prefix:
            return None
        _evaluated(by_prefix[prefix], plain)  # raises an error if it is damaged
        return prefix, plain

    return dict(read_lines(path, parse))


def _evaluated(job: _Job, record: dict[str, Any]) -> Evaluated:
    return Evaluated(
        task=job.task,
        requirement=job.requirement,
        policy=job.policy,
        project=job.project,
        weight=job.weight,
        seed=job.seed,
        episodes=job.episodes,
        success=np.array(record["success"], dtype=float),
        score=np.array(record["score"], dtype=float),
        violations={name: np.array(values, dtype=float) for name, values in record["violations"].items()},
        milliseconds=float(record["milliseconds"]),
        hardware=record["hardware"],
        command=record["command"],
    )

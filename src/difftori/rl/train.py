"""The training loop of reinforcement learning."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from difftori.data.replay import DamagedEpisodeError, Replay, prune
from difftori.envs.base import EnvironmentFailed, EnvironmentRestarted, RenderingError, env_spec
from difftori.errors import CheckpointError
from difftori.interfaces import Memory
from difftori.rl.acting import Acting
from difftori.rl.collector import Collector, EpisodeSummary
from difftori.rl.config import RLConfig
from difftori.rl.evaluate import EvalResult, eval_metrics, evaluate_agent, open_evaluation
from difftori.rl.learning import Learning
from difftori.rl.weights import spec_state, write_agent
from difftori.rollout import check_episode, check_seeding
from difftori.runs.checkpoint import State
from difftori.runs.process import StopRequested, StopSignal
from difftori.runs.progress import LongRunHint, Phase, Progress
from difftori.runs.run import Run, seeded
from difftori.types import Actions, Metrics, Observations, RowFlags

_STACK = 3
_log = logging.getLogger(__name__)


def train(config: RLConfig, out: Path, *, progress: bool = True, wandb: bool = False) -> Metrics:
    """Train an agent in the directory `out`, and return the run's summary.

    If `out` contains an unfinished run of the same configuration, it is resumed from its last checkpoint; on the CPU the
    results are bitwise identical. If it contains a finished run, its summary is returned at once. `wandb`: also log to Weights &
    Biases (`runs.loggers`).

    Raises ConfigError (the configuration is invalid or differs from that in `out`), CheckpointError, NonFiniteError (NaN from
    the environment, or divergence: the message names environment and step, or the networks), EnvironmentFailed. On SIGTERM
    or SIGINT it saves a checkpoint and raises SystemExit with status 143 or 130.
    """
    with Run(out, config, seed=config.seed, threads=config.threads, device=config.device, wandb=wandb) as run:
        if run.finished:
            return run.summary()
        with ExitStack() as environments:
            session = _Session(config, run, environments)
            with StopSignal() as stop, Progress(progress) as session.bar, session.bar.phase("") as phase:
                session.run_to_end(stop, phase)
            write_agent(out, session.agent, config, session.collector.agent_steps)
            summary = session.summary()
            if not session.updates:
                _log.warning("%s: the agent was never updated; it acts with its initial weights", out)
        run.finish(summary)
        if not (config.obs == "state" if config.keep_episodes is None else config.keep_episodes):
            shutil.rmtree(out / "episodes", ignore_errors=True)
        return summary


@contextmanager
def _fast_products(config: RLConfig) -> Iterator[None]:
    """From images on a GPU, TF32 for products of float32 matrices, unless the agent's `precision` is float32."""
    before, exact = torch.get_float32_matmul_precision(), getattr(config.settings, "precision", "float32") == "float32"
    if config.device.startswith("cuda") and config.obs == "pixels" and not exact:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _with_restarts(call: Callable[[], None]) -> None:
    """Repeat what an environment's failure interrupts, until its restarts are used up."""
    while True:
        try:
            return call()
        except EnvironmentRestarted:
            continue


class _Session:
    """The parts of a run: environment, agent, replay buffer, generators and counters. `environments` closes those that it opens."""

    def __init__(self, config: RLConfig, run: Run, environments: ExitStack):
        self.config, self.out, self.run, self._environments = config, run.path, run, environments
        env = environments.enter_context(closing(config.open_env(config.num_envs)))
        self.spec = env_spec(env)
        if self.spec.max_episode_steps is None:
            with closing(config.open_env(1)) as single:
                _with_restarts(lambda: check_episode(single, success=False))
        else:
            _with_restarts(lambda: check_seeding(env))
        self.agent = config.agent_type(config.settings, self.spec).to(config.device)
        self.agent.compiles = config.compile
        agent_steps = -(-config.steps // self.spec.action_repeat)
        if agent_steps < self.agent.config.seed_steps:
            _log.warning(
                "%d agent steps are fewer than the %d random ones, so the agent is never updated. Fix: increase --steps, or "
                "decrease --seed-steps",
                agent_steps,
                self.agent.config.seed_steps,
            )
        longest = self.spec.max_agent_steps or agent_steps
        if config.capacity < min(self.spec.max_agent_steps or 1, -(-agent_steps // config.num_envs)):
            _log.warning(
                "capacity: %d agent steps hold no episode of up to %d, and a longer one ends the run. Fix: --capacity %d or more",
                config.capacity,
                longest,
                longest,
            )
        pixels = len(self.spec.obs_shape) == 3
        self.replay = Replay(
            min(config.capacity, agent_steps + longest * config.num_envs),
            obs_shape=self.spec.obs_shape,
            obs_dtype=self.spec.obs_dtype,
            action_dim=self.spec.action_dim,
            length=self.agent.config.horizon,
            stack=_STACK if pixels else 1,
            num_rows=config.num_envs,
            alpha=self.agent.config.priority_alpha,
            short=self.agent.SHORT_SEGMENTS,
            storage=config.storage,
            folder=run.path if config.storage == "mmap" else None,
            device=config.device,
        )
        self.collector = Collector(env, self.replay, config.seed)
        self.acting = run.generator("acting", config.device)
        self.explore = Acting(self.agent, self.acting, explore=True)
        self.learning = Learning(self.agent, run.generator("learning", config.device))
        self.sampling = run.generator("sampling")
        self.updates, self.updates_due = 0, 0.0
        self.collecting = False
        self.seconds = {"sampling": 0.0, "update": 0.0, "end_episode": 0.0, "evaluation": 0.0}
        self.before = 0.0
        self.evaluations: list[tuple[int, float]] = []
        self.saved_at = 0
        self._saved: dict[int, State] = {}  # the state of the replay buffer by checkpoint
        self._eval_env = None
        self.bar, self._notes = Progress(False), dict[str, str]()
        total = round(config.steps / self.spec.action_repeat * self.agent.config.updates_per_step)
        self._hint = LongRunHint(total, _remedies(config))
        self._clock = time.perf_counter()
        while (checkpoint := run.restore()) is not None:
            try:
                self._load(checkpoint.state)
                break
            except DamagedEpisodeError as error:
                run.checkpoints.set_aside(checkpoint.step, error)
        else:
            self.collector.begin()

    @property
    def env_steps(self) -> int:
        """Number of environment steps so far."""
        return self.collector.agent_steps * self.spec.action_repeat

    def run_to_end(self, stop: StopSignal, phase: Phase) -> None:
        """Collect an episode, make the updates due, evaluate and save, until all steps are taken. Can resume within an episode."""
        self._show(phase)
        while True:
            if not self.collecting:
                self._learn(stop)
                if stop.requested:
                    self.save()
                    stop.leave()
                try:
                    self._evaluate_and_save(stop, phase)
                except StopRequested:  # the evaluation is repeated when the run is resumed
                    self.save()
                    stop.leave()
                if self.env_steps >= self.config.steps:
                    return
            self.collecting = True
            ended: list[EpisodeSummary] = []
            while not ended and not stop.requested and self.env_steps < self.config.steps:
                ended = self._step()
                self._show(phase)
            if not ended and self.env_steps < self.config.steps:
                self.save()
                stop.leave()
            self.collecting = False
            self._account(ended, phase)

    def _step(self) -> list[EpisodeSummary]:
        """Take one agent step in every environment, with `interleave` during the updates of the steps before."""
        before = self.collector.agent_steps
        if not self.config.interleave:
            return self.collector.step(self._act)
        ended = self.collector.step(self._act, self._update_during_step if self.updates else None)
        self.updates_due += (self.collector.agent_steps - before) * self.agent.config.updates_per_step
        return ended

    def _update_during_step(self) -> None:
        while self.updates_due >= 1:
            self._update()

    def _show(self, phase: Phase, row: Metrics | None = None) -> None:
        """Show the environment steps, and the last returns, in the phase of the seed steps or of the training."""
        repeat = self.spec.action_repeat
        seeds = min(self.agent.config.seed_steps * repeat, self.config.steps)
        label, total = (
            ("seed steps", seeds)
            if seeds and (self.env_steps < seeds or not self.updates)
            else ("training: environment steps", self.config.steps)
        )
        if phase.label != label:
            phase.restart(label, total, self.env_steps)
        shown = {"train/return": "return", "eval/return": "eval return"}
        self._notes |= {label: f"{label} {row[n]:.4g}" for n, label in shown.items() if row and n in row}
        phase.update(self.env_steps, "  ".join([f"{self.updates} updates", *self._notes.values()]))

    def _act(self, obs: Observations, memory: Memory | None, first: RowFlags) -> tuple[Actions, Memory]:
        """Random actions for the first agent steps, then actions of the agent with exploration."""
        step, device = self.collector.agent_steps, self.config.device
        if step < self.agent.config.seed_steps:
            shape = (len(obs), self.spec.action_dim)
            return 2.0 * torch.rand(shape, generator=self.acting, device=device) - 1.0, {}
        return self.explore(obs, memory, first, step=step)

    def _account(self, ended: list[EpisodeSummary], phase: Phase) -> None:
        """Log the episodes, pass each one to the agent's `end_episode`, and count the updates that are due for them."""
        trained = self.updates > 0
        for episode in ended:
            row: Metrics = {"train/return": episode.total, "train/length": float(episode.length)}
            if trained:
                began = time.perf_counter()
                row |= {
                    f"train/{name}": value
                    for name, value in self.learning.end_episode(
                        torch.from_numpy(episode.obs).to(self.config.device)
                    ).items()
                }
                self.seconds["end_episode"] += time.perf_counter() - began
            self.run.log(self.env_steps, {**row, "episode": float(episode.number)})
            self._show(phase, row)
            if not self.config.interleave:
                self.updates_due += episode.length * self.agent.config.updates_per_step

    def _learn(self, stop: StopSignal) -> None:
        """Make the updates that are due, after the random agent steps."""
        if self.collector.agent_steps < self.agent.config.seed_steps or not len(self.replay):
            return
        if due := int(self.updates_due):
            with self.bar.phase("updates" if self.updates else "seed updates", due) as phase:
                while self.updates_due >= 1 and not stop.requested:
                    self._update()
                    phase.update(due - int(self.updates_due))
                    self._hint(self.updates, self.seconds["update"] + self.seconds["sampling"])
        if not stop.requested and (averages := self.learning.read()):
            row = {f"update/{name}": value for name, value in averages.items()}
            self.run.log(self.env_steps, row | {"updates": self.updates})

    def _update(self) -> None:
        """Sample a batch of segments and make one update."""
        began = time.perf_counter()
        segment = self.replay.sample(self.agent.batch_size, generator=self.sampling)
        sampled = time.perf_counter()
        with _fast_products(self.config):
            priorities = self.learning.update(segment).cpu()
        sound = priorities.isfinite()
        self.replay.update_priorities(segment.index[sound], priorities[sound])
        self.seconds["sampling"] += sampled - began
        self.seconds["update"] += time.perf_counter() - sampled
        self.updates_due -= 1
        self.updates += 1

    def _evaluate_and_save(self, stop: StopSignal, phase: Phase) -> None:
        if not self.evaluations or self._due(self.evaluations[-1][0], self.config.eval_every):
            with self.bar.phase("evaluation: episodes", self.config.eval_episodes) as evaluation:

                def watch(ended: int) -> None:
                    evaluation.update(ended)
                    stop.check()

                row = self.evaluate(watch)
            self.run.log(self.env_steps, row)
            self._show(phase, row)
        if self._due(self.saved_at, self.config.save_every):
            with self.bar.phase("saving"):
                self.save()

    def _due(self, before: int, every: int) -> bool:
        """Whether a multiple of `every` was passed since `before`, or the run has ended."""
        now, last = self.env_steps, self.env_steps >= self.config.steps
        return now > before and (last or now // every > before // every)

    def evaluate(self, watch: Callable[[int], None]) -> Metrics:
        """Evaluate the agent, and compute its diagnostics. See `rl.evaluate.evaluate` for `watch`."""
        began = time.perf_counter()
        if self._eval_env is None:
            opened = open_evaluation(self.config, self.config.eval_episodes)
            self._eval_env = self._environments.enter_context(closing(opened))
        result = evaluate_agent(self.agent, self._eval_env, self.config, self.collector.agent_steps, watch=watch)
        self.evaluations.append((self.env_steps, float(result.returns.mean())))
        row = eval_metrics(result) | self._value_calibration(result)
        if self.updates:
            generator = seeded(self.config.seed, f"diagnosis at {self.env_steps}")
            segment = self.replay.sample(self.agent.batch_size, generator=generator)
            noise = seeded(self.config.seed, f"diagnosis at {self.env_steps}", self.config.device)
            row |= {f"diagnosis/{k}": v for k, v in self.agent.diagnose(segment, generator=noise).items()}
        self.seconds["evaluation"] += time.perf_counter() - began
        row |= {f"seconds/{name}": total for name, total in {**self.seconds, **self.collector.seconds}.items()}
        return row | {"updates": self.updates, "seconds/total": self._elapsed()}

    def _value_calibration(self, result: EvalResult) -> Metrics:
        device = self.config.device
        parts = (torch.from_numpy(part).to(device) for part in (result.obs, result.actions, result.returns_to_go))
        return (
            {f"eval/{name}": value for name, value in self.agent.value_calibration(*parts).items()}
            if self.updates
            else {}
        )

    def _elapsed(self) -> float:
        return self.before + time.perf_counter() - self._clock

    # Saving

    def save(self) -> None:
        """Write a checkpoint. The episodes next to it are written once each."""
        episodes = self.out / "episodes"
        state = {
            "agent": self.agent.state_dict(),
            "training": self.agent.training_state(),
            "replay": self.replay.save(episodes),
            "collector": self.collector.state(),
            "spec": spec_state(self.spec),
            "updates": self.updates,
            "updates_due": self.updates_due,
            "collecting": self.collecting,
            "averages": self.learning.averages.state(),
            "evaluations": self.evaluations,
            "seconds": {**self.seconds, **self.collector.seconds, "total": self._elapsed()},
        }
        self.run.save(self.env_steps, state)
        self.saved_at = self.env_steps
        self._saved[self.env_steps] = state["replay"]
        kept = self.run.checkpoints.steps()
        if self._saved.keys() >= set(kept):  # otherwise an earlier process wrote one of them
            self._saved = {step: self._saved[step] for step in kept}
            prune(episodes, self._saved.values())

    def _load(self, state: State) -> None:
        try:
            self.agent.load_state_dict(state["agent"])
            self.agent.load_training_state(state["training"])
            self.replay.load(self.out / "episodes", state["replay"])
            _with_restarts(lambda: self.collector.load(state["collector"]))
            self.updates, self.updates_due = int(state["updates"]), float(state["updates_due"])
            self.collecting = bool(state["collecting"])
            self.learning.averages.load(state["averages"])
            self.evaluations = [tuple(pair) for pair in state["evaluations"]]
            seconds = dict(state["seconds"])
        except (CheckpointError, EnvironmentFailed, RenderingError):
            raise
        except KeyError as error:
            raise CheckpointError(
                f"{self.out}: the checkpoint lacks {error}; another version of difftori wrote it. Fix: resume with the version "
                "named in versions.json, or start a new run"
            ) from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.out}: the checkpoint does not fit this agent: {error}. Fix: start a new run"
            ) from error
        self.before = seconds.pop("total")
        for name, value in seconds.items():
            (self.seconds if name in self.seconds else self.collector.seconds)[name] = value
        self.saved_at = self.env_steps
        self._saved[self.env_steps] = state["replay"]

    def summary(self) -> Metrics:
        """The last evaluation, the mean of all evaluations, counts and times."""
        returns = [value for _, value in self.evaluations]
        spent = {**self.seconds, **self.collector.seconds}
        busy = sum(value for name, value in spent.items() if name != "evaluation")
        return {
            "env_steps": float(self.env_steps),
            "agent_steps": float(self.collector.agent_steps),
            "episodes": float(self.collector.finished),
            "updates": float(self.updates),
            "return": returns[-1],
            "mean_return": float(np.mean(returns)),
            "seconds": self._elapsed(),
            "env_steps_per_second": self.env_steps / max(busy, 1e-9),
            "updates_per_second": self.updates / max(self.seconds["sampling"] + self.seconds["update"], 1e-9),
            **{f"seconds/{name}": total for name, total in spent.items()},
            "parameters": float(sum(p.numel() for p in self.agent.parameters())),
        }


def _remedies(config: RLConfig) -> list[str]:
    """Return the options that make a run faster."""
    settings = config.settings
    return [
        *(["--preset compact"] if "compact" in settings.PRESETS and settings.preset == "paper" else []),
        *([] if config.device.startswith("cuda") else ["--device cuda"]),
        *([] if config.compile else ["--compile"]),
        "fewer --steps",
    ]

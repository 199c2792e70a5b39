"""Runs copies of a single environment, in this process or in one process each, as one vector environment.

A process that raises, dies or does not answer in time becomes a `WorkerError` that names the row: nothing waits for
ever. Processes are spawned, not forked, since a fork beside torch's threads or an OpenGL context can hang.
"""

import multiprocessing
import pickle
import signal
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from difftori.envs.base import (
    WORKERS,
    Observation,
    RenderingError,
    WorkerError,
    choice_fault,
    numeric_faults,
    stacked,
)
from difftori.envs.checked import CheckedVectorEnv
from difftori.errors import ConfigError, DifftoriError, MissingExtraError

TIMEOUT = 120.0
"""Seconds that a process may take to start, reset or step; a first frame on a busy machine takes several."""
GRACE = 3.0
"""Seconds that a process may take to close before it is killed."""

Builder: TypeAlias = Callable[[], gymnasium.Env]


def launch(
    build: Builder,
    *,
    name: str,
    num_envs: int,
    seed: int,
    workers: str = "sync",
    timeout: float = TIMEOUT,
    restarts: int = 3,
) -> CheckedVectorEnv:
    """`num_envs` checked copies of the environment that `build` makes, with actions in a Box.

    `build` is called in the worker's process, so with `workers="async"` it must pickle (cloudpickle, so lambdas do).
    Faults of the configuration raise `ConfigError`, `MissingExtraError` or `RenderingError` at once; see
    `CheckedVectorEnv` for what comes later. `timeout` in seconds binds processes only.
    """
    faults = numeric_faults(num_envs=num_envs) + choice_fault("workers", workers, WORKERS)
    if timeout <= 0:
        faults.append(f"timeout is {timeout}; give seconds above 0")
    if restarts < 0 or seed < 0:
        faults.append(f"restarts is {restarts} and seed is {seed}; give 0 or more")
    if faults:
        raise ConfigError(faults)

    def start() -> VectorEnv:
        started: list[Worker] = []
        try:
            for row in range(num_envs):
                started.append(LocalWorker(build) if workers == "sync" else ProcessWorker(build, name, row))
            return WorkerVectorEnv(started, name=name, timeout=timeout)
        except BaseException:
            _close_all(started)
            raise

    return CheckedVectorEnv(start(), start, name=name, seed=seed, restarts=restarts)


class _Fault(Exception):
    """What happened to a process, in words that need no type beside them."""


class Worker(ABC):
    """One copy of an environment: `send` a request, then `receive` its answer."""

    @abstractmethod
    def send(self, command: str, *values: Any) -> None:
        """`spaces`, `reset` (seed, options), `step` (action), `render`."""

    @abstractmethod
    def receive(self, deadline: float) -> Any:
        """The answer. Whatever went wrong is raised, as is a silence beyond `deadline` (`time.monotonic`)."""

    @abstractmethod
    def close(self, deadline: float) -> None:
        """Let go of everything, by force after `deadline`. Raises nothing."""


class LocalWorker(Worker):
    """A copy in this process. It answers when it is asked, so that nothing can time out."""

    def __init__(self, build: Builder):
        self._env = build()
        self._answer: Any = None

    def send(self, command: str, *values: Any) -> None:
        """Do it at once."""
        self._answer = _execute(self._env, command, values)

    def receive(self, deadline: float) -> Any:
        """What `send` computed."""
        return self._answer

    def close(self, deadline: float) -> None:
        """Close the environment; a fault in closing is nobody's loss."""
        try:
            self._env.close()
        except Exception as error:
            gymnasium.logger.warn(f"closing {self._env} failed: {error!r}")


class ProcessWorker(Worker):
    """A copy in a process of its own."""

    def __init__(self, build: Builder, name: str, row: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(CloudpickleWrapper(build), theirs), name=f"{name}[{row}]", daemon=True
        )
        try:
            self._process.start()
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ConfigError([f"{name}: the environment cannot be sent to a process: {error}"]) from error
        theirs.close()

    def send(self, command: str, *values: Any) -> None:
        """Raises `_Fault` if the process has gone."""
        try:
            self._pipe.send((command, values))
        except OSError as error:
            raise self._death() from error

    def receive(self, deadline: float) -> Any:
        """A dead process shows as its closed pipe."""
        if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            raise _Fault("no answer in time")
        try:
            worked, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if worked:
            return answer
        kind, text, trace = answer
        if kind in _SPEAKING:
            raise _SPEAKING[kind](text)
        raise _Fault(f"{text}\n{trace}")

    def _death(self) -> "_Fault":
        self._process.join(GRACE)
        return _Fault(f"its process died with exit code {self._process.exitcode}")

    def close(self, deadline: float) -> None:
        """The closed pipe tells the process to end."""
        if self._pipe.closed:
            return
        self._pipe.close()
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


_SPEAKING: dict[str, Callable[[str], DifftoriError]] = {
    "ConfigError": lambda text: ConfigError([text]),
    "MissingExtraError": MissingExtraError,
    "RenderingError": RenderingError,
}
"""Errors of the configuration: they keep their type on the way out of a process, and are no reason to restart."""


def _execute(env: gymnasium.Env, command: str, values: tuple) -> Any:
    """One request to one environment."""
    if command == "spaces":
        limit = {} if env.spec is None else {"max_episode_steps": env.spec.max_episode_steps}
        return env.observation_space, env.action_space, limit | env.metadata, env.render_mode
    if command == "reset":
        return env.reset(seed=values[0], options=values[1])
    if command == "step":
        return env.step(values[0])
    return env.render()


def _serve(build: CloudpickleWrapper, pipe: Connection) -> None:
    """The life of a worker's process: answer until the pipe closes or something raises."""
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    env = None
    try:
        env = build.fn()
        while True:
            command, values = pipe.recv()
            try:
                answer = True, _execute(env, command, values)
            except (ConfigError, MissingExtraError, RenderingError) as error:
                answer = False, (type(error).__name__, str(error), "")
            pipe.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        _report(pipe, error)
    finally:
        if env is not None:
            env.close()


def _report(pipe: Connection, error: Exception) -> None:
    """Tell the parent what went wrong, as text: not every exception survives pickling."""
    kind, text = type(error).__name__, str(error)
    answer = kind, text if kind in _SPEAKING else f"{kind}: {text}", traceback.format_exc()
    try:
        pipe.send((False, answer))
    except OSError:
        return


class WorkerVectorEnv(VectorEnv):
    """The copies as one environment without autoreset. `reset` takes one seed per row; use it through `launch`."""

    def __init__(self, workers: Sequence[Worker], *, name: str, timeout: float):
        self.num_envs = len(workers)
        self.name = name
        self.timeout = timeout
        self._workers = list(workers)
        spaces = self._ask("spaces", [()] * self.num_envs)
        self.single_observation_space, self.single_action_space, metadata, self.render_mode = spaces[0]
        different = [row for row, other in enumerate(spaces) if other[:2] != spaces[0][:2]]
        if different:
            raise ConfigError([f"{name}: rows {different[:8]} have other spaces than row 0; copies must be alike"])
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {**metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self._observations: list[Observation] = [np.empty(0)] * self.num_envs

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Reset the rows of `options["reset_mask"]`, or all, with the seeds of the list `seed` (num_envs)."""
        rest = dict(options or {})
        rows = np.flatnonzero(rest.pop("reset_mask", np.ones(self.num_envs, dtype=bool))).tolist()
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * self.num_envs
        answers = self._ask("reset", [(seeds[row], rest or None) for row in rows], rows)
        infos: dict[str, Any] = {}
        for row, (observation, info) in zip(rows, answers, strict=True):
            self._observations[row] = observation
            infos = self._add_info(infos, info, row)
        return stacked(self._observations), infos

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every row."""
        answers = self._ask("step", [(action,) for action in actions])
        infos: dict[str, Any] = {}
        for row, answer in enumerate(answers):
            self._observations[row] = answer[0]
            infos = self._add_info(infos, answer[4], row)
        rewards = np.array([answer[1] for answer in answers], dtype=np.float64)
        terminated, truncated = (np.array([answer[i] for answer in answers], dtype=bool) for i in (2, 3))
        return stacked(self._observations), rewards, terminated, truncated, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A frame of every row."""
        return tuple(self._ask("render", [()] * self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """End all workers."""
        _close_all(self._workers)

    def _ask(self, command: str, values: Sequence[tuple], rows: Sequence[int] | None = None) -> list[Any]:
        """Ask the rows at once and wait for all answers; then `WorkerError` for the first row that failed."""
        rows = range(self.num_envs) if rows is None else rows
        deadline = time.monotonic() + self.timeout
        answers, failures, asked = [], {}, []
        for row, value in zip(rows, values, strict=True):
            try:
                self._workers[row].send(command, *value)
                asked.append(row)
            except Exception as error:
                failures[row] = error
        # Every answer is taken, even after a failure: one left in its pipe would be mistaken for the next.
        for row in asked:
            try:
                answers.append(self._workers[row].receive(deadline))
            except Exception as error:
                failures[row] = error
        for row, error in failures.items():
            if isinstance(error, (ConfigError, MissingExtraError, RenderingError)):
                raise error
            what = str(error) if isinstance(error, _Fault) else f"{type(error).__name__}: {error}"
            raise WorkerError(
                f"{self.name}, row {row}, in {command} (limit {self.timeout:g} s): {what}", row=row
            ) from error
        return answers


def _close_all(workers: Sequence[Worker]) -> None:
    deadline = time.monotonic() + GRACE
    for worker in workers:
        worker.close(deadline)

"""Runs copies of a single environment, in this process or in one process each, as one vector environment.

A process that raises an exception, crashes or times out causes a `WorkerError` with its row, so nothing waits forever.
Processes are spawned, not forked, because a fork with torch's threads or an OpenGL context can hang.
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
    UNRECOVERABLE,
    WORKERS,
    Observation,
    RenderingError,
    WorkerError,
    choice_fault,
    numeric_faults,
    stacked,
)
from difftori.envs.checked import CheckedVectorEnv
from difftori.errors import ConfigError, DifftoriError, MissingExtraError, NonFiniteError, ShapeError

TIMEOUT = 120.0
"""Default time limit of a process to start, reset or step, in seconds. A first frame on a busy machine takes several."""
GRACE = 3.0
"""Time limit of a process to close before it is killed, in seconds."""

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
    """Create `num_envs` checked copies of the environment that `build` returns, which must have Box actions.

    `build` is called in the worker's process, so with `workers="async"` it must be picklable by cloudpickle; lambdas are.
    `timeout` is the time limit of worker processes in seconds; default: 120. `restarts`: default: 3.
    Invalid configurations raise `ConfigError`, `MissingExtraError` or `RenderingError` immediately. See `CheckedVectorEnv`
    for later errors.
    """
    faults = numeric_faults(num_envs=num_envs) + choice_fault("workers", workers, WORKERS)
    if timeout <= 0:
        faults.append(f"timeout is {timeout}; it must be above 0 seconds")
    if restarts < 0 or seed < 0:
        faults.append(f"restarts is {restarts} and seed is {seed}; both must be 0 or more")
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
    """A failure of a process, with a complete message that needs no exception type."""


class Worker(ABC):
    """One copy of an environment. `send` a request, then `receive` the result."""

    @abstractmethod
    def send(self, command: str, *values: Any) -> None:
        """Send a request: `spaces`, `reset` (seed, options), `step` (action) or `render`."""

    @abstractmethod
    def receive(self, deadline: float) -> Any:
        """Return the result. Raises the errors of the request, and an error after `deadline` (`time.monotonic`)."""

    @abstractmethod
    def close(self, deadline: float) -> None:
        """Release all resources, by force after `deadline`. Raises nothing."""


class LocalWorker(Worker):
    """A copy in this process. `send` executes the request, so it cannot time out."""

    def __init__(self, build: Builder):
        self._env = build()
        self._answer: Any = None

    def send(self, command: str, *values: Any) -> None:
        """Execute the request immediately."""
        self._answer = _execute(self._env, command, values)

    def receive(self, deadline: float) -> Any:
        """Return the result of `send`."""
        return self._answer

    def close(self, deadline: float) -> None:
        """Close the environment. Errors are only logged."""
        try:
            self._env.close()
        except Exception as error:
            gymnasium.logger.warn(f"closing {self._env} failed: {error!r}")


class ProcessWorker(Worker):
    """A copy in a separate process."""

    def __init__(self, build: Builder, name: str, row: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(CloudpickleWrapper(build), far_end), name=f"{name}[{row}]", daemon=True
        )
        try:
            self._process.start()
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise ConfigError(
                [
                    f"{name}: the environment cannot be sent to a process: {error}. Fix: make it picklable, or workers='sync'"
                ]
            ) from error
        far_end.close()

    def send(self, command: str, *values: Any) -> None:
        """Send the request. Raises `_Fault` if the process has ended."""
        try:
            self._pipe.send((command, values))
        except OSError as error:
            raise self._death() from error

    def receive(self, deadline: float) -> Any:
        """Return the result. A process that crashed is detected by its closed pipe."""
        if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            raise _Fault("timed out")
        try:
            worked, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if worked:
            return answer
        kind, text, trace = answer
        if kind in _TYPED_ERRORS:
            raise _TYPED_ERRORS[kind](text)
        raise _Fault(f"{text}\n{trace}")

    def _death(self) -> "_Fault":
        self._process.join(GRACE)
        return _Fault(f"its process crashed with exit code {self._process.exitcode}")

    def close(self, deadline: float) -> None:
        """Close the pipe, which ends the process."""
        if self._pipe.closed:
            return
        self._pipe.close()
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


_TYPED_ERRORS: dict[str, Callable[[str], DifftoriError]] = {
    "ConfigError": lambda text: ConfigError([text]),
    "MissingExtraError": MissingExtraError,
    "NonFiniteError": NonFiniteError,
    "RenderingError": RenderingError,
    "ShapeError": ShapeError,
}
"""The errors `UNRECOVERABLE`. Their type is preserved across processes."""


def _execute(env: gymnasium.Env, command: str, values: tuple) -> Any:
    """Execute a request in an environment."""
    if command == "spaces":
        limit = {} if env.spec is None else {"max_episode_steps": env.spec.max_episode_steps}
        return env.observation_space, env.action_space, limit | env.metadata, env.render_mode
    if command == "reset":
        return env.reset(seed=values[0], options=values[1])
    if command == "step":
        return env.step(values[0])
    return env.render()


def _serve(build: CloudpickleWrapper, pipe: Connection) -> None:
    """Serve requests in a worker's process until the pipe is closed or an exception is raised."""
    # Ctrl-C is sent to the whole process group; the parent process handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    env = None
    try:
        env = build.fn()
        while True:
            command, values = pipe.recv()
            try:
                answer = True, _execute(env, command, values)
            except UNRECOVERABLE as error:
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
    """Send the error to the parent process as text, because not every exception can be pickled."""
    kind, text = type(error).__name__, str(error)
    answer = kind, text if kind in _TYPED_ERRORS else f"{kind}: {text}", traceback.format_exc()
    try:
        pipe.send((False, answer))
    except OSError:
        return


_Sent: TypeAlias = tuple[str, list[int], dict[int, Exception]]
"""A request to several rows: the command, the rows that will answer, and the errors of the others."""


class WorkerVectorEnv(VectorEnv):
    """The copies as one vector environment without autoreset. `reset` takes one seed per row. Use `launch` to create it."""

    def __init__(self, workers: Sequence[Worker], *, name: str, timeout: float):
        self.num_envs = len(workers)
        self.name = name
        self.timeout = timeout
        self._workers = list(workers)
        self._stepping: _Sent = ("step", [], {})
        spaces = self._request("spaces", [()] * self.num_envs)
        self.single_observation_space, self.single_action_space, metadata, self.render_mode = spaces[0]
        different = [row for row, other in enumerate(spaces) if other[:2] != spaces[0][:2]]
        if different:
            raise ConfigError(
                [f"{name}: rows {different[:8]} have other spaces than row 0. Fix: build copies with equal spaces"]
            )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {**metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self._observations: list[Observation] = [np.empty(0)] * self.num_envs

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Reset the rows of `options["reset_mask"]` (default: all) with the seeds of the list `seed` (num_envs)."""
        rest = dict(options or {})
        rows = np.flatnonzero(rest.pop("reset_mask", np.ones(self.num_envs, dtype=bool))).tolist()
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * self.num_envs
        answers = self._request("reset", [(seeds[row], rest or None) for row in rows], rows)
        infos: dict[str, Any] = {}
        for row, (observation, info) in zip(rows, answers, strict=True):
            self._observations[row] = observation
            infos = self._add_info(infos, info, row)
        return stacked(self._observations), infos

    def step(self, actions: np.ndarray) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one step in every row."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: np.ndarray) -> None:
        """Begin a step in every row."""
        self._stepping = self._send("step", [(action,) for action in actions])

    def step_wait(self) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Wait for the end of the step in every row."""
        answers = self._receive(*self._stepping)
        infos: dict[str, Any] = {}
        for row, answer in enumerate(answers):
            self._observations[row] = answer[0]
            infos = self._add_info(infos, answer[4], row)
        rewards = np.array([answer[1] for answer in answers], dtype=np.float64)
        terminated, truncated = (np.array([answer[i] for answer in answers], dtype=bool) for i in (2, 3))
        return stacked(self._observations), rewards, terminated, truncated, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return a frame of every row."""
        return tuple(self._request("render", [()] * self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """End all workers."""
        _close_all(self._workers)

    def _request(self, command: str, values: Sequence[tuple], rows: Sequence[int] | None = None) -> list[Any]:
        """Send a request to the rows and receive all results. Raises `WorkerError` for the first row that failed."""
        return self._receive(*self._send(command, values, rows))

    def _send(self, command: str, values: Sequence[tuple], rows: Sequence[int] | None = None) -> _Sent:
        """Send a request without waiting for the results."""
        pending, failures = [], {}
        for row, value in zip(range(self.num_envs) if rows is None else rows, values, strict=True):
            try:
                self._workers[row].send(command, *value)
                pending.append(row)
            except Exception as error:
                failures[row] = error
        return command, pending, failures

    def _receive(self, command: str, pending: list[int], failures: dict[int, Exception]) -> list[Any]:
        """Receive the results of a request. Raises `WorkerError` for the first row that failed."""
        answers, deadline = [], time.monotonic() + self.timeout
        # Every result is received, even after a failure: one left in its pipe would be taken for the next one.
        for row in pending:
            try:
                answers.append(self._workers[row].receive(deadline))
            except Exception as error:
                failures[row] = error
        for row, error in failures.items():
            if isinstance(error, (ShapeError, NonFiniteError)):
                raise type(error)(f"{error} (row {row})") from error
            if isinstance(error, UNRECOVERABLE):
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

"""Runs episodes in a vector of environments: the one loop of evaluation, demonstration and video; and policies in closed loop."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from difftori.envs.base import EnvironmentRestarted, Observation
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.spaces import SUCCESS
from difftori.envs.video import Recording, frame
from difftori.errors import ConfigError, NonFiniteError
from difftori.steering import Steering
from difftori.types import Plans, TaskSpec, WindowObs

ActInRows: TypeAlias = Callable[[Observation, np.ndarray, np.ndarray], np.ndarray]
"""(observation (N …), first (N), active (N)) → actions (N A). `first`: rows whose episode begins with this observation, so that
what was kept from earlier steps is not valid for them. `active`: rows with an episode; the actions of the others do not matter."""

Act: TypeAlias = Callable[..., Plans]
"""A policy as a function from the last O observations of B rows, by name, to the actions (B H A). A second argument may be a `Steering`."""


_log = logging.getLogger(__name__)

CHECKED_STEPS = 5_000
"""Steps within which an episode of random actions must end in an environment without a declared limit."""


class EnvStep(NamedTuple):
    """One agent step of all N rows.

    `episodes` (N): the number of the episode in each row, counted from 0 in the order of the seeds; None for a row without one.
    `obs`: the observation before the step; `success` and `score` (N): the environment's, None if it reports none. `ended` (N):
    rows whose episode ended with this step.
    """

    episodes: list[int | None]
    obs: Observation
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    success: np.ndarray | None
    score: np.ndarray | None
    ended: np.ndarray

    def active(self) -> Iterator[tuple[int, int]]:
        """The rows with an episode, and the numbers of their episodes."""
        return ((row, number) for row, number in enumerate(self.episodes) if number is not None)


def run_episodes(
    env: CheckedVectorEnv, act: ActInRows, seeds: Iterable[int], *, until_success: bool = False
) -> Iterator[EnvStep]:
    """Run one episode from each seed, `env.num_envs` in parallel, and yield every agent step of all rows.

    `until_success`: an episode also ends when it succeeds. `seeds` is read when a row becomes free. Raises the environment's
    errors; after `EnvironmentRestarted`, all running episodes are lost.
    """
    waiting = enumerate(seeds)
    episodes: list[int | None] = [None] * env.num_envs
    row_seeds: list[int | None] = [0] * env.num_envs
    first = np.ones(env.num_envs, dtype=bool)
    obs: Observation = np.empty(0)
    while True:
        for row in np.flatnonzero(first):
            # a row without an episode idles in that of the last seed
            episodes[row], row_seeds[row] = next(waiting, (None, row_seeds[row]))
        active = np.array([number is not None for number in episodes])
        if not active.any():
            return
        if first.any():
            obs, _ = env.reset(seed=row_seeds, options={"reset_mask": first})
        actions = act(obs, first, active)
        next_obs, rewards, terminated, truncated, info = env.step(actions)
        success = next((info[name] for name in SUCCESS if name in info), None)
        score = info.get("score")
        first = terminated | truncated
        if until_success and success is not None:
            first |= success.astype(bool) & active
        yield EnvStep(list(episodes), obs, actions, rewards, terminated, success, score, first & active)
        obs = next_obs


def check_episode(env: CheckedVectorEnv, *, success: bool) -> None:
    """Run an episode of random actions as far as needed to know that episodes end, and, if `success`, that success is reported.

    One step is enough in an environment with a limit of steps. Warns as `check_seeding` does. Raises
    `ConfigError`, and the environment's own errors: this is called before training, to find then what an evaluation would find
    after it.
    """
    limited = env.metadata.get("max_episode_steps") is not None
    draw = _random_actions(env)

    def act(obs: Observation, first: np.ndarray, active: np.ndarray) -> np.ndarray:
        return draw()

    check_seeding(env)
    reported = not success
    for count, step in enumerate(run_episodes(env, act, [0]), 1):
        reported |= step.success is not None
        if reported and (limited or step.ended.any()):
            return
        if not limited and count >= CHECKED_STEPS:
            raise ConfigError(
                [
                    f"env: an episode of {env.name} with random actions did not end within {count} steps, and no limit is declared. "
                    "Fix: give --max-episode-steps"
                ]
            )
    if not reported:
        raise _no_success(env)


def check_seeding(env: CheckedVectorEnv) -> None:
    """Warn if two episodes with the same seed and actions begin differently, within two steps."""
    draw, found = _random_actions(env), []
    actions = [draw(), draw()]
    for _ in range(2):
        track = [_copied(env.reset(seed=[0] * env.num_envs)[0])]
        for action in actions:
            obs, rewards, terminated, truncated, _ = env.step(action)
            track.append({**_copied(obs), "reward": rewards.copy()})
            if (terminated | truncated).any():
                break
        found.append(track)
    if len(found[0]) != len(found[1]) or not all(map(_same, *found)):
        _log.warning(
            "env: two episodes of %s with the same seed begin differently, also with the same actions: policies are not compared on the "
            "same episodes, and a run that is interrupted discards its running ones. Fix: draw random numbers from self.np_random after super().reset(seed=seed)",
            env.name,
        )


def _random_actions(env: CheckedVectorEnv) -> Callable[[], np.ndarray]:
    """Return a function that draws actions for all rows."""
    box, numbers = env.action_space, np.random.default_rng(0)
    low, high = (np.nan_to_num(bound, posinf=1.0, neginf=-1.0) for bound in (box.low, box.high))
    return lambda: numbers.uniform(low, high).astype(box.dtype)


def _copied(obs: Observation) -> dict[str, np.ndarray]:
    return {name: values.copy() for name, values in named(obs).items()}


def _same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)


@dataclass
class EpisodeResult:
    """The result of one episode: success at any step, score (0 or 1 for success if the environment has none), return, length in steps."""

    seed: int
    success: bool = False
    score: float = 0.0
    total: float = 0.0
    length: int = 0


def evaluate_policy(
    env: CheckedVectorEnv,
    act: Act,
    spec: TaskSpec,
    seeds: Sequence[int],
    *,
    watch: Callable[[int], None] = lambda ended: None,
) -> list[EpisodeResult]:
    """Run a policy for one episode from each seed, and return the results in the order of the seeds. An episode ends when it succeeds.

    `watch` is called after every step with the number of episodes that have ended; what it raises ends the evaluation. If the
    environment fails and is restarted, all episodes are run again; EnvironmentFailed is raised when no restarts are left.
    Raises ConfigError if the environment never reports success.
    """
    while True:
        episodes, reported, ended = [EpisodeResult(seed) for seed in seeds], False, 0
        try:
            for step in run_episodes(env, PolicyInRows(act, spec), seeds, until_success=True):
                reported |= step.success is not None
                for row, number in step.active():
                    _add(episodes[number], step, row)
                ended += int(step.ended.sum())
                watch(ended)
        except EnvironmentRestarted:
            continue
        if not reported:
            raise _no_success(env)
        return episodes


class PolicyInRows:
    """A policy in closed loop: keeps each row's last O observations and the actions of its plan that are not yet executed.

    A row computes a new plan after executing the `n_action_steps` actions of the previous one. The first observation of an
    episode is repeated in place of earlier ones.
    """

    def __init__(self, act: Act, spec: TaskSpec):
        self.act, self.spec = act, spec
        self._history: dict[str, np.ndarray] = {}  # (N O …)
        self._plans = np.zeros((0, spec.n_action_steps, spec.action_dim), dtype=np.float32)
        self._executed = np.zeros(0, dtype=np.int64)  # number of executed actions of each row's plan

    def __call__(
        self, obs: Observation, first: np.ndarray, active: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        """Return the next action of each row (N A); see `ActInRows`. `steering` applies to the plans that are made in this call."""
        rows, length = len(first), self.spec.n_action_steps
        known = len(self._executed) == rows
        plans = self._plans if known else np.zeros((rows, length, self.spec.action_dim), dtype=np.float32)
        executed = np.where(first, length, self._executed) if known else np.full(rows, length)
        history = {name: self._appended(name if known else None, values, first) for name, values in named(obs).items()}
        due = (executed >= length) & active
        if due.any():
            window: WindowObs = {name: torch.from_numpy(values[due]) for name, values in history.items()}
            planned = self.act(window) if steering is None else self.act(window, steering)
            plans, executed[due] = plans.copy(), 0
            plans[due] = planned[:, self.spec.present].cpu().numpy()
            if not np.isfinite(plans[due]).all():
                raise NonFiniteError("the policy's plan has NaN or Inf. Fix: check the range of the observations")
        # an error changes nothing of what is kept
        self._plans, self._executed, self._history = plans, executed + 1, history
        return plans[np.arange(rows), np.minimum(executed, length - 1)]

    def _appended(self, name: str | None, values: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Return the last O observations (N O …) of an entry with this one, which is repeated where an episode begins. None: begin anew."""
        if name not in self._history:
            return np.repeat(values[:, None], self.spec.n_obs_steps, 1)
        history = np.concatenate((self._history[name][:, 1:], values[:, None]), 1)
        history[first] = values[first, None]
        return history


def named(observation: Observation) -> dict[str, np.ndarray]:
    """Return the observations of all rows by name, as policies get them. A single array is named `state`; images have channels last."""
    entries = observation if isinstance(observation, dict) else {"state": observation}
    return {
        name: values.transpose(0, 2, 3, 1) if values.dtype == np.uint8 and values.ndim == 4 else values
        for name, values in entries.items()
    }


def record(env: CheckedVectorEnv, act: ActInRows, *, seed: int, until_success: bool = False) -> Recording:
    """Record the episode of a seed in an environment of one copy. Raises `RenderingError` if it renders no frames."""
    if env.num_envs != 1:
        raise ConfigError(
            [f"{env.num_envs} copies of the environment cannot be recorded. Fix: create it with num_envs=1"]
        )
    frames: list[np.ndarray] = []

    def watched(obs: Observation, first: np.ndarray, active: np.ndarray) -> np.ndarray:
        frames.append(frame(env))
        return act(obs, first, active)

    rewards = []
    for step in run_episodes(env, watched, [seed], until_success=until_success):
        rewards.append(float(step.rewards[0]))
    frames.append(frame(env))
    return Recording(np.stack(frames), np.array(rewards), float(env.metadata.get("render_fps", 30)))


def episode_seed(seed: int, stream: str, index: int) -> int:
    """Return the seed of one episode. `stream` separates training, evaluation and demonstrations."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()[:4], "little") >> 1


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a success rate (Wilson, 1927), which is valid for few trials and rates near 0 or 1. z = 1.96: 95 %."""
    rate, weight = successes / trials, z * z / trials
    middle = (rate + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * (rate * (1 - rate) / trials + weight / (4 * trials)) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _add(episode: EpisodeResult, step: EnvStep, row: int) -> None:
    """Add one step of a row to the result of its episode."""
    episode.total += float(step.rewards[row])
    episode.length += 1
    episode.success = step.success is not None and bool(step.success[row])
    score = episode.success if step.score is None else step.score[row]
    episode.score = max(episode.score, float(score))


def _no_success(env: CheckedVectorEnv) -> ConfigError:
    return ConfigError(
        [f"env: {env.name} has no `success` (or `is_success`) in the info of its steps. Fix: report it in every step"]
    )

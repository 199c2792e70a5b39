"""The wrapper of every training environment: checks, episode seeds, and a limited number of restarts."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
from gymnasium.spaces import Box, Dict, Space
from gymnasium.vector import AutoresetMode, VectorEnv

from difftori.envs.base import (
    UNRECOVERABLE,
    EnvironmentFailed,
    EnvironmentRestarted,
    Observation,
    ResetNeededError,
    WorkerError,
    clip_actions,
)
from difftori.errors import ConfigError, NonFiniteError, ShapeError

SEEDS = 2**31
"""Upper bound of sampled seeds, exclusive."""
ObsT = TypeVar("ObsT", bound=Observation)
"""One array (num_envs, …) or a dictionary of arrays, according to the environment's observation space."""


class CheckedVectorEnv(VectorEnv[ObsT, np.ndarray, np.ndarray]):
    """A vector environment with checks for NaN and shapes, a seed for each episode, and restarts after failures.

    The caller resets rows (`AutoresetMode.DISABLED`): after the end of an episode, `reset(options={"reset_mask": rows})`.
    Each episode has its own seed; the seed and the actions reproduce the episode exactly. After a failure, `build` creates
    a new `env`, at most `restarts` times (default: 3). Do not share it between threads.

    Raised by `reset` and `step`: `EnvironmentRestarted` (all episodes are lost; reset every row), `EnvironmentFailed`
    (too many restarts), `NonFiniteError` (NaN or Inf in observations, rewards or actions, with rows and step), `ShapeError`,
    `ResetNeededError`.
    """

    def __init__(self, env: VectorEnv, build: Callable[[], VectorEnv], *, name: str, seed: int, restarts: int = 3):
        self.name = name
        self.restarts = 0
        self.budget = restarts
        self._build = build
        self._env = env
        mode, actions = self._env.metadata.get("autoreset_mode"), self._env.action_space
        if mode is not AutoresetMode.DISABLED or not isinstance(actions, Box):
            self._env.close()
            raise ConfigError(
                [
                    f"{name}: autoreset mode {mode}, actions {actions}. Fix: create it with AutoresetMode.DISABLED and Box "
                    "actions, or return a single environment, which the library copies"
                ]
            )
        self.num_envs = self._env.num_envs
        self.single_observation_space = self._env.single_observation_space
        self.single_action_space = self._env.single_action_space
        self.observation_space = self._env.observation_space
        self.action_space: Box = actions
        self.metadata = {**self._env.metadata, "name": name}
        self.render_mode = self._env.render_mode
        self._seeds = np.random.default_rng(seed)
        self._episode_seeds = np.zeros(self.num_envs, dtype=np.int64)
        self._begun = np.zeros(self.num_envs, dtype=bool)
        self._running = np.zeros(self.num_envs, dtype=bool)
        self._clipped = np.zeros(self.num_envs, dtype=np.int64)
        self._steps = 0

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ObsT, dict[str, Any]]:
        """Begin new episodes in the rows of `options["reset_mask"]` (num_envs, bool). Default: all rows.

        `seed`: a list with the seed of each row's episode (None: sampled; rows outside the mask ignore theirs), or one
        number that seeds the sampling of this and all later seeds. Default: seeds are sampled from the seed of `make`.
        `info["episode_seed"]` (num_envs) contains the seeds. Rows outside the mask return their last observations.
        """
        rest = dict(options or {})
        mask = self._mask(rest.pop("reset_mask", None))
        if not (self._begun | mask).all():
            raise ResetNeededError(
                f"{self.name}: reset_mask omits rows that have no episode yet. Fix: reset all rows at first, and after a restart"
            )
        seeds = self._chosen_seeds(seed, mask)
        forwarded = rest if mask.all() else {**rest, "reset_mask": mask}
        # The base class declares one seed only; vector environments that reset by mask take a list.
        observations, info = self._survive(
            lambda: self._env.reset(seed=seeds, options=forwarded or None)  # pyright: ignore[reportArgumentType]
        )
        observations = self._owned(observations)
        if mask.all():
            self._steps = 0
        self._begun[:] = True
        self._running[mask] = True
        self._clipped[mask] = 0
        self._episode_seeds[mask] = np.asarray(seeds)[mask]
        return observations, self._info(info)

    def step(
        self, actions: np.ndarray, meanwhile: Callable[[], None] | None = None
    ) -> tuple[ObsT, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one agent step in each row.

        Actions (num_envs, A) are clipped to the box; `info["clipped"]` (num_envs) counts the clipped actions of the running
        episodes. The returned arrays are copies. `meanwhile` is called while worker processes step, or after the step if the
        environments run in this process; default: nothing.
        """
        executed, cut = clip_actions(actions, self.action_space, env=self.name, step=self._steps)
        if not self._running.all():
            rows = np.flatnonzero(~self._running).tolist()
            raise ResetNeededError(
                f"{self.name}, step {self._steps}: rows {rows[:8]} have no running episode. Fix: reset them first, with "
                'reset(options={"reset_mask": rows})'
            )
        executed = executed.astype(self.action_space.dtype)
        begin = getattr(self._env, "step_async", None)
        if meanwhile is None or begin is None:
            result = self._survive(lambda: self._env.step(executed))
            if meanwhile is not None:
                meanwhile()
        else:
            self._survive(lambda: begin(executed))
            try:
                meanwhile()
            except BaseException:
                with suppress(Exception):  # an answer left in its pipe would be taken for the next one
                    self._env.step_wait()  # pyright: ignore[reportAttributeAccessIssue]
                raise
            result = self._survive(lambda: self._env.step_wait())  # pyright: ignore[reportAttributeAccessIssue]
        observations, rewards, terminated, truncated, info = result
        observations = self._owned(observations)
        rewards = self._finite("rewards", rewards).astype(np.float64)
        self._steps += 1
        self._clipped += cut.any(axis=1)
        terminated, truncated = self._flags("terminated", terminated), self._flags("truncated", truncated)
        self._running = ~(terminated | truncated)
        return observations, rewards, terminated, truncated, self._info(info)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one RGB frame (height, width, 3) uint8 per row, if the environment renders frames."""
        return self._survive(self._env.render)

    def close_extras(self, **kwargs: Any) -> None:
        """Close the wrapped environment."""
        self._env.close()

    def _info(self, info: dict[str, Any]) -> dict[str, Any]:
        return {**info, "clipped": self._clipped.copy(), "episode_seed": self._episode_seeds.copy()}

    def _mask(self, given: object) -> np.ndarray:
        if given is None:
            return np.ones(self.num_envs, dtype=bool)
        mask = np.array(given)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ShapeError(
                f"{self.name}: reset_mask is {mask.dtype} {mask.shape} with {np.count_nonzero(mask)} rows. Fix: pass "
                f"({self.num_envs},) booleans, at least one of them True"
            )
        return mask

    def _chosen_seeds(self, seed: int | Sequence[int | None] | None, mask: np.ndarray) -> list[int]:
        """Return a seed for each row. Only missing seeds of rows in the mask are sampled from the generator."""
        if isinstance(seed, (int, np.integer)):
            self._seeds = np.random.default_rng(_valid_seed(int(seed), self.name))
            seed = None
        given = [None] * self.num_envs if seed is None else list(seed)
        if len(given) != self.num_envs:
            raise ShapeError(f"{self.name}: {len(given)} seeds for {self.num_envs} rows. Fix: pass one per row")
        chosen = []
        for one, wanted in zip(given, mask, strict=True):
            sampled = wanted and one is None
            chosen.append(int(self._seeds.integers(SEEDS)) if sampled else _valid_seed(int(one or 0), self.name))
        return chosen

    def _owned(self, observations: Any) -> Any:
        """Return a copy of the observations. Raises ShapeError for other shapes than the space's, and NonFiniteError for NaN or Inf."""
        space = self.observation_space
        if isinstance(space, Dict):
            if set(observations) != set(space):
                raise ShapeError(
                    f"{self.name}, step {self._steps}: the observations are {', '.join(observations)}, but their space has "
                    f"{', '.join(space)}. Fix: return all of them"
                )
            return {
                name: self._shaped(f"observations {name!r}", values, space[name])
                for name, values in observations.items()
            }
        return self._shaped("observations", observations, space)

    def _shaped(self, what: str, values: np.ndarray, box: Space) -> np.ndarray:
        """Return a copy of the values (num_envs, …), with the type of the box."""
        values = np.asarray(values)
        if values.shape != box.shape or not np.can_cast(values.dtype, box.dtype, "same_kind"):
            raise ShapeError(
                f"{self.name}, step {self._steps}: the {what} are {values.dtype} {values.shape}, but their space is {box.dtype} "
                f"{box.shape}. Fix: return the declared shape and type"
            )
        return self._finite(what, values.astype(box.dtype, copy=False))

    def _flags(self, what: str, values: np.ndarray) -> np.ndarray:
        """Return a copy of the flags (num_envs)."""
        if np.shape(values) != (self.num_envs,):
            raise ShapeError(
                f"{self.name}, step {self._steps}: {what} has shape {np.shape(values)}. Fix: return one flag per row"
            )
        return np.array(values, dtype=bool)

    def _finite(self, what: str, values: np.ndarray) -> np.ndarray:
        """Return a copy of the values (num_envs, …). Raises NonFiniteError for NaN or Inf."""
        values = np.array(values)
        if np.issubdtype(values.dtype, np.floating):
            rows = np.flatnonzero(~np.isfinite(values.reshape(self.num_envs, -1)).all(axis=1)).tolist()
            if rows:
                raise NonFiniteError(
                    f"{self.name}, step {self._steps}: NaN or Inf in the {what} of rows {rows[:8]} (episode seeds "
                    f"{self._episode_seeds[rows[:8]].tolist()}); the simulation diverged there, or the environment computes them wrongly. "
                    "Fix: check the actions and the environment; a run that is resumed meets the same episode again"
                )
        return values

    def _survive(self, call: Callable[[], Any]) -> Any:
        """Return the result of `call`. If it fails, restart the environment and raise `EnvironmentRestarted`."""
        try:
            return call()
        except UNRECOVERABLE:
            raise
        except Exception as error:
            self._begun[:] = False
            self._running[:] = False
            self._restart(error)
            raise EnvironmentRestarted(
                f"{self.name}, step {self._steps}: restarted ({self.restarts} of {self.budget}) after {_named(error)}. "
                "Unfinished episodes are dropped. Fix: reset all rows",
                restarts=self.restarts,
            ) from error

    def _restart(self, error: Exception) -> None:
        """Restart the wrapped environment. Failed attempts count as restarts too."""
        while self.restarts < self.budget:
            self.restarts += 1
            # A failed environment may also fail to close; this must not prevent the restart.
            with suppress(Exception):
                self._env.close()
            try:
                self._env = self._build()
                return
            except Exception as again:
                error = again
        with suppress(Exception):
            self._env.close()
        raise EnvironmentFailed(
            f"{self.name}, step {self._steps}: failed once more after {self.restarts} restarts: {_named(error)}. Fix: correct "
            "the environment, or increase `restarts`"
        ) from error


def _named(error: Exception) -> str:
    """Return the message of an error, with its type unless it is a `WorkerError`."""
    return str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"


def _valid_seed(seed: int, name: str) -> int:
    if not 0 <= seed < 2**63:
        raise ConfigError([f"{name}: seed is {seed}. Fix: pass a number from 0 to 2⁶³ − 1"])
    return seed

"""The interface of an environment file, and its conversion to a checked vector environment.

A module of this package is an environment if it defines `FAMILY`, for instance

    FAMILY = EnvFamily(build=MyEnv, tasks=("reach", "push"))

where `MyEnv` is an ordinary `gymnasium.Env`. The library adds the rest: copies in this process or in worker processes,
checks for NaN and ranges, episode seeds, and restarts. Your own module can define an `EnvFamily` too, or only the class.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, cast

import gymnasium
import numpy as np
import yaml
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv

from difftori.envs.base import chosen_task, numeric_faults
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.distractors import Distractors
from difftori.envs.spaces import ActionRepeat, CheckedEnv, flat_observations, unit_actions
from difftori.envs.workers import TIMEOUT, launch
from difftori.errors import ConfigError, suggest

_log = logging.getLogger(__name__)

Arrays: TypeAlias = dict[str, np.ndarray]
"""Named arrays, each with the same leading dimension."""

Recorded: TypeAlias = Mapping[str, tuple[str, ...]]
"""Maps observation types to names of recorded arrays."""

FILLED = ("task", "seed", "render_mode", "num_envs")
"""Parameters of a builder that the library fills in; the others are the environment's options."""


@dataclass(frozen=True)
class Expert:
    """A scripted expert and the environment in which it acts.

    `build` creates one environment with named observations and `info["success"]`, true if the episode has succeeded so far.
    `act` maps batched observations to actions (num_envs, A), which are clipped to the action space. `arrays` maps each name
    in the data set to the observation that is stored under it. The versions of `packages` are recorded.
    """

    build: Callable[[], gymnasium.Env]
    act: Callable[[Arrays], np.ndarray]
    arrays: Mapping[str, str]
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class EnvFamily:
    """A family of environments: how to build them, and how to imitate in them. Only `build` is required."""

    build: Callable[..., gymnasium.Env | VectorEnv]
    """A `gymnasium.Env` class, or a function that returns one environment. The library fills in the parameters `task`,
    `seed` and `render_mode` where the function has them; its other parameters are options, checked by name. A function
    with a parameter `num_envs` returns a `VectorEnv` without autoreset instead."""
    tasks: tuple[str, ...] = ("",)
    """Names of the tasks; the first is the default."""
    full_name: Callable[[str], str] | None = None
    """Maps the user's spelling to the name of a task, or raises `ConfigError`. Default: the name must be in `tasks`."""
    expert: Callable[..., Expert] | None = None
    """Creates the scripted expert for `difftori collect`. Parameters: `task` and `obs`, each optional. Default: no expert."""
    window: tuple[int, int, int] | None = None
    """`n_obs_steps`, `horizon` and `n_action_steps` of imitation policies. Default: (2, 16, 8)."""
    recorded: Recorded | Callable[[str], Recorded] = field(default_factory=dict)
    """For each observation type `obs`, the arrays of a data set that it is computed from; or a function that returns this for a
    task. Default: the observation's names."""
    from_recorded: Callable[..., tuple[Arrays, np.ndarray]] | None = None
    """Maps recorded arrays (T, …) and recorded actions (T, A) to observations and actions of the environment. Optional keyword
    parameters: `task`, `obs`, `about` (the metadata of the data set), `action_key` (that of `--action-key`, or None), and the
    builder's options. Default: they are the same."""

    def task_name(self, task: str, *, env: str) -> str:
        """The name of the task that `task` refers to; "" is the default task. Raises `ConfigError` if there is none."""
        if self.full_name is not None:
            return self.full_name(task)
        if task and self.tasks == ("",):
            raise ConfigError([f"env: {env!r} takes no task. Fix: remove {task!r}"])
        return chosen_task(task, self.tasks, env=env)


def family_of(member: object, name: str) -> EnvFamily:
    """Return `member` if it is an `EnvFamily`, else the family of a `gymnasium.Env` class or of a function that builds one."""
    if isinstance(member, EnvFamily):
        return member
    if not callable(member) or (inspect.isclass(member) and not issubclass(member, gymnasium.Env)):
        kind = member.__name__ if inspect.isclass(member) else type(member).__name__
        raise ConfigError(
            [
                f"env: {name!r} is a {kind}. Fix: pass a gymnasium.Env class, a function that returns one, or an EnvFamily"
            ]
        )
    build = cast(Callable[..., gymnasium.Env | VectorEnv], member)
    return EnvFamily(build, full_name=str if "task" in _parameters(build, name) else None)


@dataclass(frozen=True)
class ResolvedEnv:
    """A task of an environment family. `name` is its full name, such as `dmc:ball-in-cup-catch`."""

    name: str
    family: EnvFamily
    task: str

    @property
    def options(self) -> dict[str, object]:
        """The builder's options and their defaults (`inspect.Parameter.empty` if an option is required)."""
        parameters = _parameters(self.family.build, self.name)
        return {name: parameter.default for name, parameter in parameters.items() if name not in FILLED}

    @property
    def recorded(self) -> Recorded:
        """For each observation type, the arrays of a data set that it is computed from; empty: those of its own names."""
        recorded = self.family.recorded
        return recorded(self.task) if callable(recorded) else recorded

    def from_recorded(
        self, stored: Arrays, actions: np.ndarray, given: Mapping[str, object]
    ) -> tuple[Arrays, np.ndarray]:
        """Convert recorded arrays and actions (T, …) by the family's function. See `EnvFamily.from_recorded`.

        The function gets the task and those of `given` that it has keyword parameters for.
        """
        convert = self.family.from_recorded
        if convert is None:
            return stored, actions
        known = {"task": self.task, **given}
        for positional in list(_parameters(convert, self.name))[:2]:
            known.pop(positional, None)
        return convert(stored, actions, **self._accepted(convert, known))

    def read_options(self, words: Sequence[str], *, other: Sequence[str] = ()) -> dict[str, Any]:
        """Return the builder's options in words NAME=VALUE, such as `max_steps=500`, in the types of their defaults.

        `other`: options of the builder that have an option of the command line, and are refused here. Raises `ConfigError`,
        which lists all errors.
        """
        known = {name: default for name, default in self.options.items() if name not in other}
        read, faults = {}, []
        for word in words:
            name, sign, text = word.partition("=")
            if not sign:
                faults.append(f"env_options: {word!r} has no value. Fix: write NAME=VALUE")
            elif name in other:
                faults.append(f"env_options: {name!r} has an option of its own. Fix: --{name.replace('_', '-')} {text}")
            elif name in read:
                faults.append(f"env_options: {name!r} is given twice. Fix: give it once")
            elif name not in known:
                faults.append(f"env_options: {self.name!r} takes no option {name!r}{suggest(name, known)}")
            else:
                read[name], wrong = _typed(text, known[name])
                faults += [f"env_options: {name} is {text!r}. Fix: give {wrong}"] if wrong else []
        if faults:
            raise ConfigError(faults)
        return read

    def make(
        self,
        *,
        num_envs: int,
        seed: int,
        workers: str = "sync",
        timeout: float = TIMEOUT,
        restarts: int = 3,
        unit_actions: bool = True,
        flatten_obs: bool = False,
        max_episode_steps: int | None = None,
        distractors: int = 0,
        action_repeat: int | None = None,
        **options: object,
    ) -> CheckedVectorEnv:
        """Create `num_envs` checked copies. `options` are the builder's; see `launch` for `workers`, `timeout` and `restarts`.

        `unit_actions` maps actions in [−1, 1] to the environment's own bounds, which agents need; False leaves the actions
        unchanged. Default: True. `flatten_obs` makes one vector of a Dict observation. `max_episode_steps` truncates episodes
        after this number of environment steps, a multiple of the action repeat. `distractors` appends this number of
        `Distractors` to vector observations. `action_repeat`: environment steps per action; default: the builder's, or 1. Raises
        `ConfigError`, and the errors of the builder.
        """
        build, repeat = self.family.build, 1
        if action_repeat is not None:
            if self._vector or "action_repeat" in self.options:
                options = {**options, "action_repeat": action_repeat}
            elif faults := numeric_faults(action_repeat=action_repeat):
                raise ConfigError(faults)
            else:
                repeat = action_repeat
        if self._vector and workers != "sync":
            options = {**options, "workers": workers}
        self._refuse_unknown(options)
        arguments = _filled(build, self, seed, num_envs) | options
        if not self._vector:
            build_one = partial(
                _build, build, arguments, self.name, unit_actions, flatten_obs, max_episode_steps, distractors, repeat
            )
            env = launch(
                build_one,
                name=self.name,
                num_envs=num_envs,
                seed=seed,
                workers=workers,
                timeout=timeout,
                restarts=restarts,
            )
            own = env.metadata.get("max_episode_steps")
            if own is not None and max_episode_steps is not None and own < max_episode_steps:
                _log.warning(
                    "max_episode_steps: %d has no effect, because %s ends its episodes after %d steps. Fix: change the limit of the "
                    "environment itself (--env-options, if it has such an option)",
                    max_episode_steps,
                    self.name,
                    own,
                )
            return env
        if flatten_obs or distractors or max_episode_steps is not None:
            raise ConfigError(
                [
                    f"flatten_obs, max_episode_steps, distractors: {self.name!r} builds a vector environment, which these do not change. "
                    "Fix: remove them, or return a single environment"
                ]
            )
        build_all = partial(_build_vector, build, arguments, self.name, unit_actions)
        env = build_all()
        if isinstance(env, CheckedVectorEnv):
            return env
        return CheckedVectorEnv(env, build_all, name=self.name, seed=seed, restarts=restarts)

    @property
    def expert_obs(self) -> str:
        """The default of the expert's parameter `obs`, or "" if it has none."""
        assert self.family.expert is not None
        parameter = _parameters(self.family.expert, self.name).get("obs")
        return "" if parameter is None else str(parameter.default)

    def make_expert(self, obs: str) -> Expert:
        """Create the family's expert for this task, with the observation type `obs`."""
        assert self.family.expert is not None
        return self.family.expert(**self._accepted(self.family.expert, {"task": self.task, "obs": obs}))

    def _accepted(self, function: Callable[..., object], given: Mapping[str, object]) -> dict[str, Any]:
        """Return those of `given` that the function has keyword parameters for."""
        names = _parameters(function, self.name)
        return {name: value for name, value in given.items() if name in names}

    @property
    def _vector(self) -> bool:
        """Whether the builder returns a vector environment."""
        return "num_envs" in _parameters(self.family.build, self.name)

    def _refuse_unknown(self, given: Mapping[str, object]) -> None:
        known = [*self.options, *([] if self._vector else ("workers", "timeout", "restarts"))]
        faults = [
            f"env: {self.name!r} takes no option {name!r}{suggest(name, known)}" for name in given if name not in known
        ]
        faults += [
            f"env: {self.name!r} needs the option {name!r}. Fix: pass it"
            for name, default in self.options.items()
            if default is inspect.Parameter.empty and name not in given
        ]
        if faults:
            raise ConfigError(faults)


def _typed(text: str, default: object) -> tuple[object, str]:
    """Return the text as a value of the default's type, and "", or a description of that type if the text is none of it.

    Without a default value, it is read as a value in YAML.
    """
    if isinstance(default, str):
        return text, ""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text, "a value, such as 1, true or a word"
    if isinstance(default, bool):
        return value, "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return value, "" if isinstance(value, int) and not isinstance(value, bool) else "an integer"
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return (float(value), "") if number else (text, "a number")
    return value, ""


def _filled(build: Callable[..., object], env: ResolvedEnv, seed: int, num_envs: int) -> dict[str, object]:
    """Return the values of those parameters in `FILLED` that the builder has."""
    parameters = _parameters(build, env.name)
    values = {"task": env.task, "seed": seed, "num_envs": num_envs, "render_mode": "rgb_array"}
    if not env.task and "task" in parameters and parameters["task"].default is not inspect.Parameter.empty:
        del values["task"]
    if (
        inspect.isclass(build)
        and issubclass(build, gymnasium.Env)
        and "rgb_array" not in build.metadata.get("render_modes", ())
    ):
        del values["render_mode"]
    return {name: value for name, value in values.items() if name in parameters}


def _parameters(build: Callable[..., object], name: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of a builder that can be passed by name."""
    try:
        parameters = inspect.signature(build).parameters.values()
    except ValueError as error:
        raise ConfigError(
            [f"env: {name!r} is not a function that builds an environment ({error}). Fix: use a Python function"]
        ) from error
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in parameters if parameter.kind in by_name}


def _build(
    build: Callable[..., object],
    arguments: dict[str, Any],
    name: str,
    unit: bool,
    flat: bool,
    limit: int | None,
    distractors: int,
    repeat: int,
) -> gymnasium.Env:
    """Build one environment and convert it to the library's conventions. Runs in the worker's process."""
    env = build(**arguments)
    if not isinstance(env, gymnasium.Env):
        fix = "add the parameter num_envs to the function" if isinstance(env, VectorEnv) else "return a gymnasium.Env"
        raise ConfigError([f"env: {name!r} returned a {type(env).__name__}, not a gymnasium.Env. Fix: {fix}"])
    env = flat_observations(env, name=name) if flat else env
    own = env.metadata.get("action_repeat", 1)
    if limit is not None and limit % own:
        near = " or ".join(str(steps) for steps in (limit - limit % own, limit - limit % own + own) if steps)
        raise ConfigError(
            [f"max_episode_steps: {limit} is no multiple of the action repeat {own} of {name}. Fix: {near}"]
        )
    steps = None if limit is None else limit // own
    env = CheckedEnv(env, name=name, max_episode_steps=steps)
    env = ActionRepeat(env, repeat) if repeat > 1 else env
    env = Distractors(env, distractors, name=name) if distractors else env
    return unit_actions(env, name=name) if unit else env


def _build_vector(build: Callable[..., object], arguments: dict[str, Any], name: str, unit: bool) -> VectorEnv:
    """Build the vector environment of a builder with the parameter `num_envs`."""
    env = build(**arguments)
    if not isinstance(env, VectorEnv):
        fix = "remove the parameter num_envs" if isinstance(env, gymnasium.Env) else "return a VectorEnv"
        raise ConfigError(
            [f"env: {name!r} returned a {type(env).__name__}, not a gymnasium.vector.VectorEnv. Fix: {fix}"]
        )
    actions = env.single_action_space
    if unit and isinstance(actions, Box) and not (np.all(actions.low == -1) and np.all(actions.high == 1)):
        env.close()
        raise ConfigError([f"{name}: its actions are {actions}. Fix: scale them to ±1, or return a single environment"])
    return env

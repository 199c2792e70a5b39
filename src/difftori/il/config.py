"""The configuration of an imitation run, from YAML and the command line. All errors are listed at once."""

from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from difftori.config import describe, device_faults, resolved, validated
from difftori.errors import ConfigError, DifftoriError
from difftori.il.demos_task import NONE
from difftori.il.env_task import SEPARATE
from difftori.il.task_names import default_held_out, find_task, make_task
from difftori.il.tasks import ImitationTask, TaskFactory
from difftori.interfaces import Policy, PolicyConfig
from difftori.registry import find_policy, resolve_env
from difftori.runs.records import read_config

SettingsT = TypeVar("SettingsT", bound=PolicyConfig)


class TrainConfig(BaseModel, Generic[SettingsT]):
    """The complete configuration of an imitation run. `settings` are those of the policy."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    policy: str
    """Name of the policy, or your own, `my_pkg.my_policy:MyPolicy`."""
    env: str = "pendulum"
    """Task: `pendulum`, `pendulum:damped`, an environment together with `--demos`, `none` for demonstrations without an environment,
    or your own, `my_pkg.my_task:make` (default: `none` with `--demos`)."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Random seed of the demonstrations, the initial weights and all random numbers of the run."""
    demos: str | None = None
    """Demonstrations: a LeRobot, robomimic or zarr data set, such as those of `difftori collect`, or a folder with one of them
    (docs/imitation.md) (default: the task generates its demonstrations)."""
    obs_keys: tuple[str, ...] | None = None
    """Observations to read from `--demos`, as `NAME=KEY`; `NAME=KEY,KEY` concatenates vectors, and a key alone keeps its short name
    (default: those of the environment; without one, all)."""
    action_key: str | None = None
    """Key of the actions in `--demos` (default: `action` or `actions`)."""
    episodes: tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...] | None = None
    """Episodes to read from `--demos`, as numbers and ranges, such as `0:50 60`, or the text of a task of LeRobot, or the name of
    a list in robomimic's `mask/` (default: all)."""
    held_out: float | None = Field(default=None, ge=0, lt=1)
    """Share of the demonstration episodes that is held out for validation, at least one; 0 holds out none (default: 0.02, or 0.1
    without an environment)."""
    base: str | None = None
    """Run directory of the base policy to refine. Environment, data, seed, window and number of evaluation episodes are taken from it;
    options on the command line override them."""
    obs: str | None = None
    """Observation type of the environment, such as `state`, `points` or `image` (default: the environment's)."""
    env_options: tuple[str, ...] | None = None
    """Further options of the environment, as `NAME=VALUE`, such as `actions=absolute max_steps=500` (default: the environment's)."""
    n_obs_steps: int | None = Field(default=None, ge=1)
    """Number of observations that the policy gets, those of the last steps (default: the policy's, or the environment's)."""
    horizon: int | None = Field(default=None, ge=1)
    """Number of predicted actions, from the oldest observation on (default: the policy's, or the environment's)."""
    n_action_steps: int | None = Field(default=None, ge=1)
    """Number of predicted actions to execute, from the present step on, before the next prediction (default: the policy's, or the
    environment's)."""
    data_seed: int | None = Field(default=None, ge=0, lt=2**62)
    """Random seed of the demonstrations and of the selection of held-out ones (default: `--seed`; for a refiner, that of its base, so
    that both hold out the same episodes)."""
    num_train: int | None = Field(default=None, ge=1)
    """Number of training demonstrations (default: all that are not held out, or the task's number)."""
    eval_every: int | None = Field(default=None, ge=1)
    """Number of epochs between validations (default: 1; with `--demos`, a twentieth of all epochs)."""
    save_every: int = Field(default=10, ge=1)
    """Number of epochs between checkpoints."""
    eval_episodes: int = Field(default=100, ge=1)
    """Number of episodes of the final evaluation."""
    weights: Literal["best", "last", "both"] | None = None
    """Weights of the final evaluation: those with the least validation error, the last ones, or both (default: `both`; with `--demos`
    `last`, because few episodes are held out)."""
    num_envs: int | None = Field(default=None, ge=1)
    """Number of environments that run in parallel during an evaluation (default: 25)."""
    max_episode_steps: int | None = Field(default=None, ge=1)
    """Number of environment steps after which an evaluation episode is truncated (default: the environment's limit)."""
    workers: str | None = None
    """Execution of parallel environments: `sync` in one process, or `async` in one process each (default: the environment's)."""
    device: str = "cpu"
    """Device for training and inference: `cpu`, `cuda`, `cuda:1`, …"""
    threads: int = Field(default=1, ge=1, le=1024)
    """Number of CPU threads of PyTorch. Results depend on it."""
    settings: SettingsT
    """Settings of the policy and of its training."""

    @cached_property
    def policy_type(self) -> type[Policy]:
        """The policy's class. Raises ConfigError if the name is unknown."""
        return find_policy(self.policy)

    @cached_property
    def task_factory(self) -> TaskFactory:
        """The function that creates the task. Raises ConfigError if the name is unknown."""
        return find_task(self.env, demos=self.demos is not None)

    def open_task(self) -> ImitationTask:
        """Create the task. Raises ConfigError for an option that it does not have, and the errors of its factory."""
        seed = self.seed if self.data_seed is None else self.data_seed
        options = {name: getattr(self, name) for name in TASK_OPTIONS}
        return make_task(self.env, self.task_factory, seed=seed, **options)


def parse_config(
    values: Mapping[str, Any],
    policy: type[Policy] | None = None,
    *,
    also: Iterable[str] = (),
    check_env: bool = True,
) -> TrainConfig:
    """Return a configuration from plain values, such as those of a YAML file, with its policy and task resolved.

    `policy`: the policy's class, if the caller has already resolved it. `also` names further options to suggest for a misspelt
    one. `check_env`: resolve the task now, instead of where it is used; acting does not need it. Raises ConfigError, which lists
    every error.
    """
    given, faults = _with_base({"settings": {}, **values})
    policy = policy or resolved(find_policy, given.get("policy"), faults)
    if policy is None:
        given["settings"] = {}  # an unknown policy's settings cannot be checked, but the other options can
    if given.get("demos") is not None:
        given.setdefault("env", NONE)
    config, found = validated(TrainConfig[PolicyConfig if policy is None else policy.Config], given, also)
    faults += found + _range_faults(given["settings"], found)
    find = partial(find_task, demos=given.get("demos") is not None)
    name = given.get("env", TrainConfig.model_fields["env"].default)
    task = resolved(find, name, faults) if check_env else None
    if config is not None and config.env_options and config.demos is not None and task is not None:
        resolved(partial(_check_env_options, config.env_options), config.env, faults)
    if isinstance(given.get("device"), str):
        faults += device_faults(given["device"])
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    assert policy is not None
    config = _with_window(config, policy)
    vars(config).update(policy_type=policy)
    if task is not None:
        vars(config).update(task_factory=task)
    return config


TASK_OPTIONS = (
    "demos",
    "obs_keys",
    "action_key",
    "episodes",
    "held_out",
    "obs",
    "env_options",
    "n_obs_steps",
    "horizon",
    "n_action_steps",
    "num_train",
    "num_envs",
    "workers",
    "max_episode_steps",
)
"""Options of the environment and its demonstrations; a task rejects those that it does not have."""
INHERITED = ("env", "seed", "data_seed", "eval_episodes", *TASK_OPTIONS)
"""Options whose defaults a refiner takes from its base's run."""


def inherited(below: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that a refiner takes from its base's configuration. The base's seed becomes the default of `data_seed`."""
    taken = {name: below[name] for name in INHERITED if below.get(name) is not None}
    if "seed" in taken:
        taken.setdefault("data_seed", taken["seed"])
    return taken


def _with_base(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fill in missing values from the base's run. Returns the values, and the errors of that run."""
    given = dict(values)
    if not isinstance(given.get("base"), str):
        return given, []
    try:
        below = read_config(Path(given["base"]))
    except DifftoriError as error:
        # A run's stored configuration is complete, so its base's run may be missing.
        return given, [] if "env" in given else [f"base: {error}"]
    if "policy" not in below:
        return given, [f"base: {given['base']} is the run of an agent. Fix: give the run of an imitation policy"]
    given = inherited(below) | given
    # The defaults with and without an environment differ.
    if below.get("demos") is not None and "held_out" not in given and given.get("env") != below.get("env"):
        given["held_out"] = default_held_out(str(below.get("env")))
    return given, []


def _check_env_options(words: tuple[str, ...], env: str) -> None:
    """Raise ConfigError if these are no options of the environment."""
    if env != NONE:
        resolve_env(env).read_options(words, other=SEPARATE)


def _with_window(config: TrainConfig, policy: type[Policy]) -> TrainConfig:
    """Fill in the policy's default window, if it has one, for demonstrations of an environment."""
    if policy.WINDOW is None or config.demos is None:
        return config
    names = ("n_obs_steps", "horizon", "n_action_steps")
    own = {name: size for name, size in zip(names, policy.WINDOW, strict=True) if getattr(config, name) is None}
    return config.model_copy(update=own)


def _range_faults(settings: Any, found: list[str]) -> list[str]:
    """Return range errors of the training settings, except of those that already have an error in `found`."""
    if not isinstance(settings, Mapping):
        return []
    try:
        # A policy that overrides a field's default may have dropped its range; the base class still has it.
        PolicyConfig.model_validate({n: v for n, v in settings.items() if n in PolicyConfig.model_fields})
    except ValidationError as error:
        faults = [
            (str(e["loc"][0]), describe({**e, "loc": ("settings", *e["loc"])}, TrainConfig, ())) for e in error.errors()
        ]
        return [fault for name, fault in faults if not any(f.startswith(f"settings.{name}:") for f in found)]
    return []

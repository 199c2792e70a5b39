"""The configuration of an imitation run: from YAML and the command line, with every fault listed at once."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from difftori.config import describe, device_faults, validated
from difftori.errors import ConfigError, DifftoriError
from difftori.il.task_names import find_task
from difftori.il.tasks import TaskFactory
from difftori.interfaces import Policy, PolicyConfig
from difftori.registry import find_policy
from difftori.runs.records import read_config

SettingsT = TypeVar("SettingsT", bound=PolicyConfig)


class TrainConfig(BaseModel, Generic[SettingsT]):
    """All that decides how an imitation run comes out. `settings` are the policy's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    policy: Annotated[str, tyro.conf.Suppress]
    """A policy's name, or `my_pkg.my_policy:MyPolicy`."""
    env: str = "pendulum"
    """A task's name, or `my_pkg.my_task:make`."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Decides the demonstrations, the initial weights and every draw."""
    demos: str | None = None
    """Demonstrations of the environment that `env` names: what `difftori collect` wrote, or other data (docs/imitation.md)."""
    base: str | None = None
    """Run of the policy to refine. What is not given of task and data, `seed` too, is taken from it."""
    obs: str | None = None
    """What is seen of the environment: its own option, such as `state`, `points`, `image`."""
    n_obs_steps: int | None = Field(None, ge=1)
    """Observations that are seen, of the last steps; the policy's or the environment's number unless given."""
    horizon: int | None = Field(None, ge=1)
    """Actions that are predicted, from the oldest observation on; likewise."""
    n_action_steps: int | None = Field(None, ge=1)
    """Actions that are executed of these, from the present on, before the next prediction; likewise."""
    data_seed: int | None = Field(None, ge=0, lt=2**62)
    """Decides the demonstrations and which are held out: `seed` unless given, and the base's of a refiner, so that it
    holds out what its base has not seen."""
    num_train: int | None = Field(None, ge=1)
    """Demonstrations to learn from: all that are not held out, or as many as the task makes, unless given."""
    eval_every: int | None = Field(None, ge=1)
    """Epochs between validations: 1, or with `demos` a twentieth of all, unless given."""
    save_every: int = Field(10, ge=1)
    """Epochs between checkpoints."""
    eval_episodes: int = Field(100, ge=1)
    """Episodes, or starts, of the evaluation at the end."""
    weights: Literal["best", "last", "both"] | None = None
    """Which are evaluated at the end: those of least validation error, the last, or both; with `demos` the last unless
    given, because held out episodes are few."""
    num_envs: int | None = Field(None, ge=1)
    """Environments that an evaluation plays at once."""
    workers: str | None = None
    """`sync`, or `async` for a process each."""
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1`, …"""
    threads: int = Field(1, ge=1, le=1024)
    """Threads of torch on the CPU; results differ between thread counts."""
    settings: Annotated[SettingsT, tyro.conf.arg(name="")]
    """The policy's own settings and how it learns."""

    @cached_property
    def policy_type(self) -> type[Policy]:
        """The policy's class. Raises ConfigError if there is none of that name."""
        return find_policy(self.policy)

    @cached_property
    def task_factory(self) -> TaskFactory:
        """The function that makes the task. Raises ConfigError if there is none of that name."""
        return find_task(self.env, demos=self.demos is not None)


def parse_config(
    values: Mapping[str, Any], policy: type[Policy] | None = None, *, also: Iterable[str] = ()
) -> TrainConfig:
    """A configuration from plain values, as YAML gives them, with its policy and task resolved.

    `policy`: its class, where the caller has found it already. `also` names further options to suggest for a misspelt one.
    Raises ConfigError that lists every error.
    """
    given, faults = _with_base({"settings": {}, **values})
    if policy is None and isinstance(given.get("policy"), str):
        try:
            policy = find_policy(given["policy"])
        except ConfigError as error:
            faults += error.faults
    if policy is None:
        given["settings"] = {}  # without the policy its settings cannot be checked; the rest can
    config, found = validated(TrainConfig[PolicyConfig if policy is None else policy.Config], given, also)
    faults += found + _range_faults(given["settings"], found)
    task: TaskFactory | None = None
    if isinstance(name := given.get("env", TrainConfig.model_fields["env"].default), str):
        try:
            task = find_task(name, demos=given.get("demos") is not None)
        except ConfigError as error:
            faults += error.faults
    if isinstance(given.get("device"), str):
        faults += device_faults(given["device"])
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    assert policy is not None
    config = _with_window(config, policy)
    vars(config).update(policy_type=policy, task_factory=task)
    return config


INHERITED = (
    "env",
    "seed",
    "data_seed",
    "demos",
    "obs",
    "n_obs_steps",
    "horizon",
    "n_action_steps",
    "num_train",
    "num_envs",
    "workers",
)
"""What a refiner takes from its base's run unless it is given."""


def inherited(below: Mapping[str, Any]) -> dict[str, Any]:
    """What a refiner takes from its base's configuration; its data are drawn as the base's were."""
    taken = {name: below[name] for name in INHERITED if below.get(name) is not None}
    if "seed" in taken:
        taken.setdefault("data_seed", taken["seed"])
    return taken


def _with_base(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values with those of the base's run where none are given, and what is wrong with that run."""
    given = dict(values)
    if not isinstance(given.get("base"), str):
        return given, []
    try:
        below = read_config(Path(given["base"]))
    except DifftoriError as error:
        # What is given already, as in a run's own configuration, needs no base to be read from.
        return given, [] if "env" in given else [f"base: {error}"]
    if "policy" not in below:
        return given, [f"base: {given['base']} is the run of an agent; give the run of an imitation policy"]
    given |= {name: value for name, value in inherited(below).items() if given.get(name) is None}
    return given, []


def _with_window(config: TrainConfig, policy: type[Policy]) -> TrainConfig:
    """The configuration with the policy's own window where it has one and none is given."""
    if policy.WINDOW is None or config.demos is None:
        return config
    names = ("n_obs_steps", "horizon", "n_action_steps")
    own = {name: size for name, size in zip(names, policy.WINDOW, strict=True) if getattr(config, name) is None}
    return config.model_copy(update=own)


def _range_faults(settings: Any, found: list[str]) -> list[str]:
    """Faults of the learning settings that their types alone allow, unless the type was wrong already."""
    if not isinstance(settings, Mapping):
        return []
    try:
        # A policy that gives a field another default may have dropped its range: the base class still knows it.
        PolicyConfig.model_validate({n: v for n, v in settings.items() if n in PolicyConfig.model_fields})
    except ValidationError as error:
        faults = [
            (str(e["loc"][0]), describe({**e, "loc": ("settings", *e["loc"])}, TrainConfig, ())) for e in error.errors()
        ]
        return [fault for name, fault in faults if not any(f.startswith(f"settings.{name}:") for f in found)]
    return []

"""The configuration of an imitation run: from YAML and the command line, with every fault listed at once."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from difftori.config import describe, device_faults, validated
from difftori.errors import ConfigError, DifftoriError
from difftori.il.task_names import find_task
from difftori.interfaces import PolicyConfig
from difftori.registry import find_policy
from difftori.runs.records import read_config, to_yaml

SettingsT = TypeVar("SettingsT", bound=PolicyConfig)
ModelT = TypeVar("ModelT", bound=BaseModel)


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
    observe: int | None = Field(None, ge=1)
    """Observations that are seen, of the last steps; the policy's or the environment's number unless given."""
    horizon: int | None = Field(None, ge=1)
    """Actions that are predicted, from the oldest observation on; likewise."""
    execute: int | None = Field(None, ge=1)
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


def parse_config(values: Mapping[str, Any], *, also: Iterable[str] = ()) -> TrainConfig:
    """A configuration from plain values, as YAML gives them.

    `also` names further options to suggest for a misspelt one. Raises ConfigError with every fault there is.
    """
    faults: list[str] = []
    given, found = _with_base(values)
    faults += found
    config_type: type[TrainConfig] | None = None
    if isinstance(given.get("policy"), str):
        try:
            config_type = TrainConfig[find_policy(given["policy"]).Config]
        except ConfigError as error:
            faults += error.faults
    given.setdefault("settings", {})
    if config_type is None:
        # Without the policy its settings cannot be judged; the rest can.
        config, found = validated(TrainConfig[PolicyConfig], {**given, "settings": {}}, also)
        faults += found
    else:
        config, found = validated(config_type, given, also)
        faults += found + _range_faults(given["settings"], found)
    faults += _environment_faults(given)
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    return _with_window(config)


INHERITED = (
    "env",
    "seed",
    "data_seed",
    "demos",
    "obs",
    "observe",
    "horizon",
    "execute",
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


def _with_window(config: TrainConfig) -> TrainConfig:
    """The configuration with the policy's own window where it has one and none is given."""
    window = find_policy(config.policy).WINDOW
    if window is None or config.demos is None:
        return config
    names = ("observe", "horizon", "execute")
    return config.model_copy(
        update={name: own for name, own in zip(names, window, strict=True) if getattr(config, name) is None}
    )


def normalised(config: TrainConfig) -> TrainConfig:
    """The same configuration, checked as one from a file is, and sure to survive being written and read again."""
    again = parse_config(yaml.safe_load(to_yaml(config)))
    if again.settings != config.settings:
        raise ConfigError([f"settings: {config.settings!r} reads back from YAML as {again.settings!r}; mend its types"])
    return again


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


def _environment_faults(given: Mapping[str, Any]) -> list[str]:
    """Faults of names that mean something outside the configuration: the task and the device."""
    faults = []
    if isinstance(given.get("env"), str):
        try:
            find_task(given["env"], demos=given.get("demos") is not None)
        except ConfigError as error:
            faults += error.faults
    if isinstance(given.get("device"), str):
        faults += device_faults(given["device"])
    return faults

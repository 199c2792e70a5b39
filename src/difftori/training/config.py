"""The configuration of an imitation run: from YAML and the command line, with every fault listed at once."""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import torch
import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from difftori.components import find_policy, suggest
from difftori.errors import ConfigError, DifftoriError
from difftori.interfaces import PolicyConfig
from difftori.training.records import YAML_FAULTS, read_config
from difftori.training.task_names import find_task

SettingsT = TypeVar("SettingsT", bound=PolicyConfig)
ModelT = TypeVar("ModelT", bound=BaseModel)

_MOST_VALUES = 100_000


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a configuration file. Raises ConfigError if it cannot be read or is no mapping."""
    try:
        values = yaml.load(path.read_text(), _PlainLoader)
    except YAML_FAULTS as error:
        raise ConfigError([f"{path}: cannot be read as YAML: {error}"]) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: a mapping of names to values is expected, not a {type(values).__name__}"])
    faults: list[str] = []
    if _weight(values, {}, faults) > _MOST_VALUES:
        faults.append(f"stands for more than {_MOST_VALUES} values by & and *; write out what is meant")
    if faults:
        raise ConfigError([f"{path}: {fault}" for fault in dict.fromkeys(faults)])
    return values


def _weight(value: Any, known: dict[int, int], faults: list[str]) -> int:
    """How many values this stands for, those that a file repeats by reference counted each time; and names that are no text."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES + 1  # until it is known: whoever meets it again inside itself has no end
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str):
                faults.append(f"{name!r}: is no name; put it in quotes")
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_weight(one, known, faults) for one in inner)
    return known[id(value)]


class _PlainLoader(yaml.SafeLoader):
    """Takes only `true` and `false` for booleans, as YAML 1.2 does: `pg: off` is a word."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool" or letter in "tTfF"]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def to_yaml(config: BaseModel) -> str:
    """A configuration as YAML that its parser reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def normalised(config: TrainConfig) -> TrainConfig:
    """The same configuration, checked as one from a file is, and sure to survive being written and read again."""
    again = parse_config(yaml.safe_load(to_yaml(config)))
    if again.settings != config.settings:
        raise ConfigError([f"settings: {config.settings!r} reads back from YAML as {again.settings!r}; mend its types"])
    return again


def fields_of(model: Any) -> dict[str, Any]:
    """Names and types of the fields of a pydantic model or a dataclass; empty for anything else."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    if isinstance(model, type) and dataclasses.is_dataclass(model):
        return {field.name: field.type for field in dataclasses.fields(model)}
    return {}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def validated(config_type: type[ModelT], given: dict[str, Any], also: Iterable[str]) -> tuple[ModelT | None, list[str]]:
    """The configuration, or None with a fault for everything that is wrong with the values."""
    try:
        return config_type.model_validate(given), []
    except ValidationError as error:
        return None, [_describe(e, config_type, also) for e in error.errors()]


def _describe(error: ErrorDetails, config_type: type[BaseModel], also: Iterable[str]) -> str:
    """One fault: the place, the value, and the mend."""
    place = [str(part) for part in error["loc"]]
    shown = ".".join(place)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known(config_type, place[:-1])
        if len(place) > 1:
            return f"{shown}: unknown{suggest(place[-1], known)}"
        inner = _known(config_type, ["settings"]) - known
        return f"{shown}: unknown{suggest(shown, known | inner | set(also), {n: f'settings.{n}' for n in inner})}"
    if error["type"] == "missing":
        return f"{shown}: missing; give it a value"
    value = repr(error["input"])
    return f"{shown}: {value if len(value) <= 60 else value[:60] + '…'}: {error['msg']}"


def _known(model: Any, place: list[str]) -> set[str]:
    """The names that stand at a place. A part of the place that is no field tells which member of a union was tried."""
    for part in place:
        model = next((fields_of(m)[part] for m in alternatives(model) if part in fields_of(m)), model)
    return {name for member in alternatives(model) for name in fields_of(member)}


def _range_faults(settings: Any, found: list[str]) -> list[str]:
    """Faults of the learning settings that their types alone allow, unless the type was wrong already."""
    if not isinstance(settings, Mapping):
        return []
    try:
        # A policy that gives a field another default may have dropped its range: the base class still knows it.
        PolicyConfig.model_validate({n: v for n, v in settings.items() if n in PolicyConfig.model_fields})
    except ValidationError as error:
        faults = [
            (str(e["loc"][0]), _describe({**e, "loc": ("settings", *e["loc"])}, TrainConfig, ()))
            for e in error.errors()
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


def device_faults(name: str) -> list[str]:
    """What is wrong with the name of a device, if anything."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"device: {name!r} is no device; give cpu, cuda or cuda:N"]
    if device.type == "cpu":
        return []
    if device.type == "cuda":
        count = torch.cuda.device_count()
        return (
            [] if (device.index or 0) < count else [f"device: {name!r} is not here, {count} CUDA devices are; give cpu"]
        )
    return [f"device: {name!r} is not supported; give cpu, cuda or cuda:N"]

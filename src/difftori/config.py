"""Reads configurations from YAML and the command line, and validates them with pydantic. All errors are listed at once.

`read_tokens` and `overlay` turn options into plain values, and `validated` lists the errors of file and command line together.
"""

import dataclasses
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import torch
import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError

from difftori.errors import ConfigError
from difftori.registry import suggest
from difftori.runs.records import YAML_FAULTS

ValueT = TypeVar("ValueT")
ModelT = TypeVar("ModelT", bound=BaseModel)

_MOST_VALUES = 100_000
_FOREIGN = {
    "batch": "batch_size",
    "bs": "batch_size",
    "buffer_size": "capacity",
    "checkpoint_freq": "save_every",
    "chunk_size": "horizon",
    "config_path": "config",
    "cuda": "device",
    "data": "demos",
    "dataset": "demos",
    "repo_id": "demos",
    "env_id": "env",
    "eval_freq": "eval_every",
    "exp_name": "out",
    "frame_skip": "action_repeat",
    "gamma": "discount",
    "grad_clip_norm": "clip_norm",
    "gradient_steps": "updates_per_step",
    "job_name": "out",
    "learning_rate": "lr",
    "learning_starts": "seed_steps",
    "logdir": "out",
    "log_dir": "out",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "warmup",
    "max_grad_norm": "clip_norm",
    "mlp_dim": "width",
    "n_action_pred": "horizon",
    "n_envs": "num_envs",
    "n_epochs": "epochs",
    "n_eval_episodes": "eval_episodes",
    "num_demos": "num_train",
    "num_episodes": "episodes",
    "num_epochs": "epochs",
    "num_seeds": "seeds",
    "num_workers": "workers",
    "output_dir": "out",
    "planer": "planner",
    "save_freq": "save_every",
    "steps": "updates",
    "task": "env",
    "tau": "ema",
    "total_timesteps": "steps",
    "track": "wandb",
    "use_wandb": "wandb",
    "train_steps": "steps",
    "training_steps": "steps",
    "utd_ratio": "updates_per_step",
    "verbose": "quiet",
    "warmup_steps": "warmup",
    "wandb_project_name": "wandb",
    "wd": "weight_decay",
    "work_dir": "out",
}
"""Option names of Stable-Baselines3, CleanRL, LeRobot, Diffusion Policy and TD-MPC, and ours for the same thing."""


_SEEDS = {"seed": ", or train one run per seed with `difftori sweep FILE`, where FILE has `grid: {seed: [0, 1, 2]}`"}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the values of a configuration file. Raises ConfigError if it cannot be read or is not a mapping."""
    try:
        values = yaml.load(path.read_text(), _PlainLoader)
    except YAML_FAULTS as error:
        raise ConfigError([f"{path}: cannot be read as YAML: {error}. Fix: check the path and the syntax"]) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            [f"{path}: holds a {type(values).__name__}, not a mapping. Fix: write one `name: value` per line"]
        )
    faults: list[str] = []
    if _weight(values, {}, faults) > _MOST_VALUES:
        faults.append(f"expands to more than {_MOST_VALUES} values through & and *. Fix: write the values out")
    if faults:
        raise ConfigError([f"{path}: {fault}" for fault in dict.fromkeys(faults)])
    return {name: _in_home(value) for name, value in values.items()}


def _in_home(value: Any) -> Any:
    """Return a value in which a `~` at the beginning of a path is the home directory, as a shell has it."""
    if isinstance(value, dict):
        return {name: _in_home(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_in_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _weight(value: Any, known: dict[int, int], faults: list[str]) -> int:
    """Count the values, with aliases (`*name`) counted each time. Adds an error to `faults` for each key that is not a string."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES + 1  # until it is counted: a value that contains itself is infinite
        for name in value if isinstance(value, dict) else ():
            if not isinstance(name, str):
                faults.append(f"{name!r}: the key is not a string. Fix: put it in quotes")
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_weight(one, known, faults) for one in inner)
    return known[id(value)]


class _PlainLoader(yaml.SafeLoader):
    """Reads only `true` and `false` as booleans, and no numbers to the base 60, as in YAML 1.2: `off` and `10:50` are strings.

    A key that is given twice is an error.
    """

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:bool" or letter in "tTfF"]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the node of a mapping."""
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ComposerError(None, None, f"the key {twice[0]!r} is given twice", node.start_mark)
        return node

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """Return the tag of a node; see `yaml.resolver`."""
        tag = super().resolve(kind, value, implicit)
        sixties = (
            kind is yaml.ScalarNode and ":" in value and tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        )
        return self.DEFAULT_SCALAR_TAG if sixties else tag


def fields_of(model: Any) -> dict[str, Any]:
    """Return the names and types of the fields of a pydantic model or a dataclass; empty for any other type."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    if isinstance(model, type) and dataclasses.is_dataclass(model):
        return {field.name: field.type for field in dataclasses.fields(model)}
    return {}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself as the only member."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def validated(config_type: type[ModelT], given: dict[str, Any], also: Iterable[str]) -> tuple[ModelT | None, list[str]]:
    """Return the configuration and no errors, or None and one message for each invalid value.

    `also` names further options to suggest for a misspelt one.
    """
    try:
        return config_type.model_validate(_with_integers(given, config_type)), []
    except ValidationError as error:
        errors = error.errors()
        places = {
            e["loc"][:-1] for e in errors
        }  # of elements, which then are missing in a sequence that is "too short"
        return None, [
            describe(e, config_type, also) for e in errors if e["type"] != "too_short" or e["loc"] not in places
        ]


def _with_integers(value: Any, kind: Any) -> Any:
    """Return the value with integers for texts such as `1e6`, wherever the type is an integer."""
    if isinstance(value, Mapping):
        types = {name: t for member in alternatives(kind) for name, t in fields_of(member).items()}
        return {name: _with_integers(inner, types.get(name)) for name, inner in value.items()}
    members = [get_args(m)[0] if get_origin(m) is Annotated else m for m in alternatives(kind)]
    if isinstance(value, list):
        inner = next((get_args(m)[0] for m in members if get_args(m)), None)
        return [_with_integers(one, inner) for one in value]
    if isinstance(value, str) and int in members and re.fullmatch(r"[+-]?\d+(\.\d*)?e\+?\d{1,2}", value, re.I):
        number = Decimal(value)
        return int(number) if number == int(number) else value
    return value


def describe(error: ErrorDetails, config_type: type[BaseModel], also: Iterable[str]) -> str:
    """Return the message of one error: the place, the value, and what is wrong."""
    place = [str(part) for part in error["loc"]]
    shown = ".".join(place)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known(config_type, place[:-1])
        if len(place) > 1:
            return f"{shown}: unknown{_meant(place[-1], known, {})}"
        inner = _known(config_type, ["settings"]) - known
        return f"{shown}: unknown{_meant(shown, known | inner | set(also), {n: f'settings.{n}' for n in inner})}"
    if error["type"] == "missing":
        return f"{shown}: missing. Fix: give a value"
    if error["type"] == "value_error" and isinstance(error["input"], Mapping):
        # about several options, which the message names
        return f"{shown}: {error['msg'].removeprefix('Value error, ')}"
    value = repr(error["input"])
    meaning = _meaning(config_type, place) if place and error["type"] != "value_error" else ""
    return f"{shown}: {value if len(value) <= 60 else value[:60] + '…'}: {error['msg']}" + (meaning and f" ({meaning})")


def _meaning(model: Any, place: list[str]) -> str:
    """Return the first sentence about an option, without its default; empty if it has none."""
    holders = _at(model, place[:-1])
    fields = [m.model_fields for m in holders if isinstance(m, type) and issubclass(m, BaseModel)]
    text = next((found[place[-1]].description or "" for found in fields if place[-1] in found), "")
    return " ".join(text.split()).partition(". ")[0].partition(" (default")[0].removesuffix(".")


def _meant(name: str, known: set[str], written: Mapping[str, str]) -> str:
    """Suggest a known option: the one that other libraries call `name`, otherwise the nearest."""
    last = name.rpartition(".")[2]
    for word in (_FOREIGN.get(name), _FOREIGN.get(last), _FOREIGN.get(_FOREIGN.get(last, "")), last):
        if word in known:
            return suggest(word, [word], written)
    return suggest(name, known, written)


def _known(model: Any, place: list[str]) -> set[str]:
    """Return the field names at a place."""
    return {name for member in _at(model, place) for name in fields_of(member)}


def _at(model: Any, place: list[str]) -> tuple[Any, ...]:
    """Return the types at a place. A part of the place that is not a field names the member of a union, and is skipped."""
    for part in place:
        model = next((fields_of(m)[part] for m in alternatives(model) if part in fields_of(m)), model)
    return alternatives(model)


def resolved(find: Callable[[str], ValueT], name: Any, faults: list[str]) -> ValueT | None:
    """Return find(name). None if the name is invalid: `find`'s errors are added to `faults`, and validation reports a name that is not text."""
    if not isinstance(name, str):
        return None
    try:
        return find(name)
    except ConfigError as error:
        faults += error.faults
        return None


def device_faults(name: str) -> list[str]:
    """Return the error of a device name in a list; empty if the device is valid and available."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return [f"device: {name!r} is not a device. Fix: give cpu, cuda or cuda:N"]
    if device.type == "cpu":
        return []
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) < count:
            return []
        return [f"device: {name!r} is not available; this machine has {count} CUDA devices. Fix: give cpu"]
    return [f"device: {name!r} is not supported. Fix: give cpu, cuda or cuda:N"]


def read_tokens(tokens: Sequence[str]) -> dict[str, list[str]]:
    """Parse options and the words that follow each: `--hidden 64 64 --quick` is {"hidden": ["64", "64"], "quick": []}.

    Accepts `--name=value`, and underscores in names. Raises ConfigError for a word that belongs to no option, or an option
    that is given twice.
    """
    options: dict[str, list[str]] = {}
    faults = []
    words: list[str] | None = None
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            name, sign, value = token[2:].partition("=")
            name = name.replace("-", "_")
            if name in options:
                faults.append(f"{_option(name)}: given twice. Fix: give it once")
            words = options[name] = [value] if sign else []
        elif words is None:
            faults.append(f"{token!r}: belongs to no option. Fix: write --NAME {token}")
        else:
            words.append(token)
    if faults:
        raise ConfigError(faults)
    return options


def with_option_names(errors: Sequence[str], options: Iterable[str]) -> list[str]:
    """Write the errors of values given on the command line with option names: `num_train: …` becomes `--num-train: …`."""
    given, named = set(options), []
    for error in errors:
        place, colon, text = error.partition(": ")
        name = place.removeprefix("settings.")
        if colon and given & {place, name, re.sub(r"\.\d+$", "", name)}:
            place = _option(re.sub(r"\.\d+$", "", name))
            if text.startswith("unknown; "):  # the suggestions are names of options too
                head, mark, names = text.partition("known: ") if "; known: " in text else text.partition("meant ")
                text = head + mark + re.sub(r"(?:settings\.)?(\w[\w.]*)", lambda m: _option(m[1]), names)
        named.append(place + colon + text)
    return named


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def overlay(base: Mapping[str, Any], options: Mapping[str, list[str]], config_type: type[BaseModel]) -> dict[str, Any]:
    """Return a copy of `base` with the options set. The prefix `settings.` may be omitted if the name is unambiguous.

    Values remain strings, which pydantic converts; settings that are sequences get a list of strings. Raises ConfigError for
    an option without a value.
    """
    merged = _copy(base)
    faults = []
    for name, words in options.items():
        path = _resolve(name, config_type)
        kind, negated = _kind(config_type, path), False
        if kind is None and path[-1].startswith("no_"):
            positive = _resolve(".".join([*path[:-1], path[-1].removeprefix("no_")]), config_type)
            negated = bool in alternatives(_kind(config_type, positive)) and not words
            path, kind = (positive, bool) if negated else (path, kind)
        members = alternatives(kind)
        most = capacity(kind, words)
        if most < len(words) or (most == 1 and not words):
            found = (
                f"takes {'one' if most else 'no'} value, but got {' '.join(map(repr, words))}"
                if words
                else "needs a value"
            )
            fix = (
                f"give one{_SEEDS.get(name, '') if words else ''}"
                if most
                else f"remove it, or write --no-{_option(name)[2:]}"
            )
            faults.append(f"{_option(name)}: {found}. Fix: {fix}")
            continue
        _put(merged, path, not negated if not words and not _is_sequence(members) else _value(words, members), faults)
    if faults:
        raise ConfigError(faults)
    return merged


def _resolve(name: str, config_type: type[BaseModel]) -> list[str]:
    path = name.split(".")
    top = fields_of(config_type)
    if path[0] not in top and path[0].removeprefix("no_") not in top:
        inner = fields_of(top.get("settings"))
        if path[0] in inner or path[0].removeprefix("no_") in inner:
            path = ["settings", *path]
    holder = _kind(config_type, path[:-1])
    inside = path[0] == "settings" if holder is None else any(fields_of(member) for member in alternatives(holder))
    return path if inside else [name]


def _kind(model: Any, path: Sequence[str]) -> Any:
    """Return the type annotation at a place of the configuration; None if the place does not exist."""
    for part in path:
        found = [fields_of(member)[part] for member in alternatives(model) if part in fields_of(member)]
        if not found:
            return None
        model = found[0]
    return model


def capacity(kind: Any, words: Sequence[str] = ()) -> int:
    """Return the largest number of values of an option of this type. A switch takes none, or a word such as `true` if it follows."""
    members = alternatives(kind)
    if kind is None or _is_sequence(members):
        return sys.maxsize
    if bool in members:
        return 1 if words and words[0].lower() in ("true", "false", "on", "off", "yes", "no") else 0
    return 1


def _is_sequence(members: Sequence[Any]) -> bool:
    return any((get_origin(member) or member) in (list, tuple, set, frozenset) for member in members)


def _value(words: list[str], members: Sequence[Any]) -> Any:
    if len(words) == 1 and words[0] in ("None", "none", "null") and type(None) in members:
        return None
    if _is_sequence(members) or len(words) > 1:
        return list(words)
    return words[0]


def _put(values: dict[str, Any], path: Sequence[str], value: Any, faults: list[str]) -> None:
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            option = ".".join(path).replace("_", "-")
            faults.append(f"--{option}: {part} is {inner!r} in the file. Fix: make it a mapping, or remove it")
            return
        values = inner
    values[path[-1]] = value


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, Mapping) else value for name, value in values.items()}

"""Command-line options as plain values, to be laid over those of a file and judged together with them.

tyro prints the help but stops at the first faulty option; here the options only become values, and `parse_config`
then lists every fault of file and command line at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from pydantic import BaseModel

from difftori.errors import ConfigError
from difftori.training.config import alternatives, fields_of


def read_tokens(tokens: Sequence[str]) -> dict[str, list[str]]:
    """Options and the words that follow each: `--hidden 64 64 --quick` is {"hidden": ["64", "64"], "quick": []}.

    `--name=value` is allowed too. Raises ConfigError for a word that belongs to no option, or an option given twice.
    """
    options: dict[str, list[str]] = {}
    faults = []
    words: list[str] | None = None
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            name, sign, value = token[2:].partition("=")
            name = name.replace("-", "_")
            if name in options:
                faults.append(f"--{name.replace('_', '-')}: given twice; give it once")
            words = options[name] = [value] if sign else []
        elif words is None:
            faults.append(f"{token!r}: belongs to no option; write --name {token}")
        else:
            words.append(token)
    if faults:
        raise ConfigError(faults)
    return options


def overlay(base: Mapping[str, Any], options: Mapping[str, list[str]], config_type: type[BaseModel]) -> dict[str, Any]:
    """`base` with the options laid over it. A name that only the settings have needs no `settings.`.

    Words stay text, which pydantic converts; a list is made where the setting is one. Raises ConfigError for an option
    without a value.
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
        if not words and kind is not None and bool not in members and not _is_sequence(members):
            faults.append(f"--{name.replace('_', '-')}: needs a value")
            continue
        _put(merged, path, not negated if not words and not _is_sequence(members) else _value(words, members), faults)
    if faults:
        raise ConfigError(faults)
    return merged


def _resolve(name: str, config_type: type[BaseModel]) -> list[str]:
    path = name.split(".")
    top = fields_of(config_type)
    if path[0] not in top and path[0].removeprefix("no_") not in top:
        inner = fields_of(top["settings"])
        if path[0] in inner or path[0].removeprefix("no_") in inner:
            return ["settings", *path]
    return path


def _kind(model: Any, path: Sequence[str]) -> Any:
    """The annotation at a place of the configuration; None if there is no such place."""
    for part in path:
        found = [fields_of(member)[part] for member in alternatives(model) if part in fields_of(member)]
        if not found:
            return None
        model = found[0]
    return model


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
            faults.append(f"--{'.'.join(path)}: {part} is {inner!r} in the file, which has no settings of its own")
            return
        values = inner
    values[path[-1]] = value


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, Mapping) else value for name, value in values.items()}

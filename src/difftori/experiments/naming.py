"""Names of tasks and methods in reports: by what tells runs apart."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_NOT_DISTINGUISHING = {
    "agent",
    "policy",
    "env",
    "distractors",
    "seed",
    "data_seed",
    "demos",
    "base",
    "device",
    "threads",
    "workers",
    "save_every",
    "storage",
    "keep_episodes",
    "compile",
    "settings.preset",
}
"""Keys that do not distinguish methods: task, seed, data (but see `DATA`) and machine. A preset is visible in its settings. The number
of environments changes the results of an agent, and not of a policy (it is that of the evaluation)."""


def task_names(configs: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """Return the name of each run's task: the environment, or without one the name of its data, the observation type, distractors, and
    the options and the length of its episodes where those of one environment differ.
    """
    data = told_apart(data_path(config) for config in configs.values() if config.get("env") == "none")
    words: dict[Path, tuple[str, list[str]]] = {}
    for place, config in configs.items():
        name = data[data_path(config)] if config.get("env") == "none" else str(config.get("env"))
        seen, count = config.get("obs"), config.get("distractors")
        words[place] = name, [*([str(seen)] if seen else []), *([f"{count} distractors"] if count else [])]
    alike: dict[tuple[str, ...], list[Path]] = {}
    for place, (name, further) in words.items():
        alike.setdefault((name, *further), []).append(place)
    for places in alike.values():
        for key, text_of in (("env_options", _shown_options), ("max_episode_steps", _shown_limit)):
            values = [text_of(configs[place].get(key)) for place in places]
            if len(set(values)) > 1:
                for place, value in zip(places, values, strict=True):
                    words[place][1].append(value)
    return {place: f"{name} ({', '.join(further)})" if further else name for place, (name, further) in words.items()}


def _shown_options(options: Any) -> str:
    words = map(str, options if isinstance(options, list) else [options])
    return " ".join(sorted(words)) if options else "default options"


def _shown_limit(steps: Any) -> str:
    return "default length" if steps is None else f"at most {steps} steps"


def data_path(config: Mapping[str, Any]) -> str:
    """Return the absolute path of a run's demonstrations."""
    return os.path.abspath(str(config.get("demos")))


def told_apart(paths: Iterable[str]) -> dict[str, str]:
    """Return for each path its end, without the suffix, with as many folders as tell it from the other paths."""
    parts = {path: (*Path(path).parts[:-1], Path(path).stem) for path in paths}
    ends = Counter(own[-n:] for own in parts.values() for n in range(1, len(own) + 1))
    counts = {
        path: next((n for n in range(1, len(own)) if ends[own[-n:]] == 1), len(own)) for path, own in parts.items()
    }
    return {path: "/".join(own[-counts[path] :]) for path, own in parts.items()}


def distinguished(found: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[tuple[str, list[str]]]:
    """Return the name of each (name, task, flat configuration) with the settings in which those of that name differ on some task."""
    same: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for name, task, config in found:
        same.setdefault((name, task), []).append(config)
    keys: dict[str, set[str]] = {}
    for (name, _), configs in same.items():
        keys.setdefault(name, set()).update(differing(configs))
    return [
        (name, [f"{k.removeprefix('settings.')} {shown(v)}" for k, v in config.items() if k in keys[name]])
        for name, _, config in found
    ]


def differing(configs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the settings in which configurations differ. One that an earlier version did not write is no difference."""
    execution = {"num_envs"} if any("policy" in config for config in configs) else set()
    keys = {key for config in configs for key in config} - _NOT_DISTINGUISHING - execution
    return {key for key in keys if len({repr(config[key]) for config in configs if key in config}) > 1}


def shown(value: Any) -> str:
    """Format the value of a setting."""
    if value is None:
        return "default"
    if isinstance(value, list):
        return "×".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)

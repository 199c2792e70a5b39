"""Reads the files of a run directory: metrics, summary, configuration. Invalid files raise typed errors."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from difftori.errors import ConfigError, DataError
from difftori.types import Metrics

YAML_FAULTS = (OSError, ValueError, RecursionError, yaml.YAMLError)
"""Exceptions of reading YAML: invalid dates and numbers are ValueErrors, and deep nesting overflows the stack."""
_QUICK: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's loader takes a fifth of the time, which matters when thousands of runs are read."""
_SHORT = 4000
"""Longest text, in characters, for libyaml's loader, which does not check for nesting that overflows the stack."""

MODEL = "model.safetensors"
"""File with the weights of a published folder, which a run directory does not have."""

ANY_VALUE = object()
RETIRED: dict[str, dict[str, object]] = {
    "difftori": {
        **dict.fromkeys(("samples", "prior_samples", "iterations", "elites", "temperature", "momentum"), ANY_VALUE),
        "obs_q_lambda": 0.0,
    }
}
"""Settings of agents that earlier versions wrote although the agent does not use them, with the value that has no effect."""

RENAMED = {"observe": "n_obs_steps", "execute": "n_action_steps", "pictures": "images"}
"""Names of options in earlier versions, and their current names."""
RENAMED_METRICS = {
    "decisions": "agent_steps",
    "judged/obs_q": "eval/obs_q",
    "judged/discounted_return": "eval/discounted_return",
    "judged/obs_q_correlation": "eval/obs_q_correlation",
}
"""Names of metrics in earlier versions, and their current names."""


def is_finished(path: Path) -> bool:
    """Whether the run in this directory has finished."""
    return (path / "summary.json").exists()


def read_metrics(path: Path, count: int | None = None) -> list[dict]:
    """Read the rows of a run's `metrics.jsonl`, or only the first `count`. Skips a last line that a kill truncated; other invalid
    lines raise DataError.
    """
    source = path / "metrics.jsonl"
    lines = source.read_text().splitlines() if source.exists() else []
    rows = []
    for number, line in enumerate(lines[:count], start=1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise TypeError("step is not an integer")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise DataError(
                f"{source}, line {number}: not a row of metrics ({error}). Fix: remove that line"
            ) from error
        rows.append(current_metrics(row))
    return rows


def read_summary(path: Path) -> Metrics:
    """Read the summary of a finished run, with null as NaN. Raises DataError if it is missing or damaged."""
    source = path / "summary.json"
    try:
        plain = json.loads(source.read_bytes())
        return {name: math.nan if value is None else float(value) for name, value in current_metrics(plain).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{source}: no readable summary ({error}). Fix: re-run the run's command to finish it"
        ) from error


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to one with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def read_config(path: Path) -> dict:
    """Read a run's configuration as plain values. Raises ConfigError if it is missing or not YAML, and for a published folder."""
    source = path / "config.yaml"
    if (path / MODEL).exists():
        raise ConfigError(
            [
                f"{path}: a published folder, not the directory of a run. Fix: act with it by difftori.load, or give a run"
            ]
        )
    try:
        text = source.read_text()
        values = yaml.load(text, _QUICK if len(text) <= _SHORT else yaml.SafeLoader)
    except YAML_FAULTS as error:
        raise ConfigError(
            [f"{source}: no readable configuration ({error}). Fix: check that {path} is the directory of a run"]
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(
            [f"{source}: not a mapping of names to values. Fix: restore the file, or use another directory"]
        )
    return current_config(values)


def to_yaml(config: BaseModel) -> str:
    """Convert a configuration to YAML that its parser can read."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def current_config(config: dict) -> dict:
    """Return a stored configuration with the current names, without settings that had no effect on the run."""
    config = _renamed(config)
    if isinstance(config.get("settings"), dict):
        retired = RETIRED.get(str(config.get("agent")), {})
        settings = _renamed(config["settings"])
        config["settings"] = {n: v for n, v in settings.items() if n not in retired or retired[n] not in (ANY_VALUE, v)}
        if config.get("device", "cpu") == "cpu" and settings.get("precision") == "float32":
            del config["settings"]["precision"]  # the default of before, and on a CPU that of now
    return config


def current_metrics(row: dict[str, Any]) -> dict[str, Any]:
    """Return a stored row of metrics, or a summary, with the current names."""
    return {RENAMED_METRICS.get(name, name): value for name, value in row.items()}


def _renamed(values: dict) -> dict:
    return {RENAMED.get(name, name): value for name, value in values.items()}

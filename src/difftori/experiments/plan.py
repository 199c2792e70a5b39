"""Reads a sweep, a YAML file with common and varying options, and plans its runs.

```yaml
out: runs/cartpole            # default: runs/ and the file's name
common: {env: dmc:cartpole-swingup, obs: state, preset: small, steps: 20000}
grid:                         # every combination …
  seed: [0, 1, 2]
variants:                     # … of each of these
  - {train: tdmpc}
  - {train: difftori, pg: per-episode}
```
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from difftori.config import read_tokens, read_yaml, validated
from difftori.errors import ConfigError
from difftori.il.config import inherited
from difftori.runs.process import is_held
from difftori.runs.records import flat, is_finished, read_config
from difftori.runs.run import differences
from difftori.trainers import read_options

_NAMED_APART = ("train", "env", "seed")
_SHOWN = 8
_MACHINE = ("device", "threads")


class Sweep(BaseModel):
    """The content of a sweep file. Options are those of `difftori train`; `train` is the name of the policy or the agent."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    out: Path
    """Folder of the runs, `OUT/ENV/NAME_OPTIONS/seed-N`."""
    common: dict[str, Any] = {}
    """Options of every run."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Options with lists of values; every combination is a run."""
    variants: list[dict[str, Any]] = Field([{}], min_length=1)
    """Sets of options, each combined with the whole grid."""
    retries: int = Field(2, ge=0)
    """Number of restarts of a crashed run, from its last checkpoint, before it counts as failed."""
    cpus: float = Field(1.0, gt=0)
    """Number of processor cores of each run on Ray and Slurm."""
    gpus: float = Field(0.0, ge=0)
    """Number of GPUs of each run. A fraction lets several runs share a GPU, on this machine and on Ray."""
    slurm: dict[str, Any] = {}
    """Further parameters of submitit, such as `timeout_min` and `slurm_partition`."""


@dataclass(frozen=True)
class RunSpec:
    """A run, or another command: the `words` after `difftori`, and the folder that it writes.

    A run that was started before is resumed with its stored options.
    """

    name: str
    words: tuple[str, ...]
    folder: Path
    base: "RunSpec | None" = None
    """The run that it refines, if that is part of the same plan."""
    length: int | None = None
    """Number of environment steps of an agent, or of updates of a policy; None if the length is given in epochs."""

    @property
    def depth(self) -> int:
        """Number of runs that must finish, one after another, before this one can start."""
        return 0 if self.base is None else 1 + self.base.depth

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that starts the run, or that resumes it."""
        begun = (self.folder / "config.yaml").exists()
        return ("train", "--resume", str(self.folder), "--quiet") if begun else self.words

    @property
    def log(self) -> Path:
        """The file with the output of its processes."""
        return beside(self.folder, ".log")

    @property
    def finished(self) -> bool:
        """Whether the folder holds a finished run."""
        return is_finished(self.folder)

    @property
    def locked(self) -> bool:
        """Whether a process works in the folder."""
        return is_held(self.folder / "run.lock")


def beside(folder: Path, suffix: str) -> Path:
    """Return the path of a file next to a run's folder: `.log` is the output of its processes, `.failed.json` its error."""
    return folder.with_name(folder.name + suffix)


def option_words(name: str, value: Any) -> list[str]:
    """Return the words of a command-line option with its value."""
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{word}" if value else f"--no-{word}"]
    words = [str(part) for part in value] if isinstance(value, tuple | list) else [str(value)]
    return [f"--{word}", *words]


def plan_run(
    name: str,
    component: object,
    options: Mapping[str, Any],
    folder: Path,
    base: tuple[RunSpec | None, BaseModel | None] = (None, None),
) -> tuple[RunSpec, BaseModel]:
    """Plan a run of a policy or an agent with these options of `difftori train`. Returns the run and its configuration.

    `base` is the run that it refines, whose task and data are the defaults. Raises ConfigError, which lists all errors.
    """
    if not isinstance(component, str):
        raise ConfigError([f"train: {component!r} is not a name. Fix: give the name of a policy or an agent"])
    words = [word for option, value in options.items() for word in option_words(option, value)]
    below = {} if base[1] is None else inherited(base[1].model_dump())
    _, config = read_options(component, below, read_tokens(words))
    words = ("train", component, *words, "--out", str(folder), "--quiet")
    length = getattr(config, "steps", None) or getattr(getattr(config, "settings", None), "updates", None)
    return RunSpec(name, words, folder, base[0], length), config


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises ConfigError, which lists the errors of the file; `plan` finds those of its runs."""
    given = {"out": Path("runs") / path.stem, **read_yaml(path)}
    sweep, faults = validated(Sweep, given, ())
    if sweep is None:
        raise ConfigError([f"{path}: {fault}" for fault in faults])
    return sweep


def plan(sweep: Sweep) -> list[RunSpec]:
    """Plan all runs. Raises ConfigError, which lists the errors of all runs, each once, and folders that hold other runs."""
    faults, mismatches = list[str](), list[str]()
    requests: dict[Path, dict[str, Any]] = {}
    combinations = list(_combinations(sweep))
    varying = _varying(sweep)
    for options in combinations:
        folder = sweep.out / _place(options, varying)
        if folder in requests:
            faults.append(
                f"two runs have the folder {folder}: {_shown(requests[folder])} and {_shown(options)}. Fix: remove one"
            )
        requests[folder] = options
    filled = {folder: _filled(options, faults) for folder, options in requests.items()}
    bases = {str(options["base"]) for options in filled.values() if "base" in options}
    nowhere = [base for base in bases if Path(base) not in filled and not (Path(base) / "config.yaml").exists()]
    faults += [
        f"base: {base} is neither a run of this sweep nor an existing run. Fix: give the folder of a run"
        for base in sorted(nowhere)
    ]
    found: dict[Path, RunSpec] = {}
    configs: dict[Path, BaseModel] = {}
    while filled:
        ready = [folder for folder, options in filled.items() if Path(str(options.get("base"))) not in filled]
        if not ready:
            faults.append(f"base: {', '.join(map(str, filled))} refine each other. Fix: give one of them another base")
            break
        for folder in ready:
            options = filled.pop(folder)
            base = Path(str(options["base"])) if "base" in options else None
            below = (found.get(base), configs.get(base)) if base else (None, None)
            component, name = options.pop("train", None), str(folder.relative_to(sweep.out))
            try:
                found[folder], configs[folder] = plan_run(name, component, options, folder, below)
                mismatches += _mismatches(folder, configs[folder])
            except ConfigError as error:
                faults += error.faults
    if mismatches:
        faults += [*mismatches[:_SHOWN], f"out: {sweep.out} holds runs of other settings. Fix: choose another `out`"]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return [found[folder] for folder in requests]


def _combinations(sweep: Sweep) -> list[dict[str, Any]]:
    values = itertools.product(*sweep.grid.values())
    points = [dict(zip(sweep.grid, point, strict=True)) for point in values]
    common = _flat(sweep.common)
    return [{**common, **_flat(point), **_flat(variant)} for variant in sweep.variants for point in points]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names, as on the command line."""
    return {name.replace("-", "_"): value for name, value in flat(values).items()}


def _varying(sweep: Sweep) -> list[str]:
    """Return the options of the grid and the variants, which are part of folder names, so that a sweep can grow."""
    return list(dict.fromkeys(name for given in (sweep.grid, *sweep.variants) for name in _flat(given)))


def _place(options: Mapping[str, Any], varying: Sequence[str]) -> Path:
    """Return the folder ENV/NAME_OPTIONS/seed-N of a run, in characters that every file system accepts."""
    own = [f"{name}-{_choice(options, name)}" for name in varying if name in options and name not in _NAMED_APART]
    parts = (options.get("env", "env"), "_".join([_word(options.get("train")), *own]), f"seed-{options.get('seed', 0)}")
    return Path(*map(_word, parts))


def _choice(options: Mapping[str, Any], name: str) -> str:
    """Return a value as part of a folder's name. For a base, the folder named after its policy."""
    return _word(Path(str(options[name])).parent.name if name == "base" else options[name])


def _word(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", ".", text, flags=re.ASCII).strip(".") or "none"


def _filled(options: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Replace {names} in strings by the run's own values, in the form used in folder names."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in options:
            faults.append(f"{match[0]} in {match.string!r}: the run has no option {match[1]!r}. Fix: add the option")
        return _word(options.get(match[1]))

    return {k: re.sub(r"\{(\w+)\}", value_of, v) if isinstance(v, str) else v for k, v in options.items()}


def _mismatches(folder: Path, config: BaseModel) -> list[str]:
    """Return the differences between the existing run in the folder and this configuration."""
    if not (folder / "config.yaml").exists():
        return []
    before = read_config(folder)
    here = config.model_copy(update={name: before.get(name, getattr(config, name)) for name in _MACHINE})
    return [f"{folder}: {fault}" for fault in differences(before, here)]


def _shown(options: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(options), default_flow_style=True, width=10_000).strip()

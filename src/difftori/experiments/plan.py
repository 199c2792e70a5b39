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

import hashlib
import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from difftori.config import read_tokens, read_yaml, validated
from difftori.errors import ConfigError, DifftoriError
from difftori.il.config import inherited
from difftori.runs.process import is_held
from difftori.runs.records import flat, is_finished, read_config
from difftori.runs.run import differences
from difftori.trainers import LENGTHS, read_options

_NAMED_APART = ("train", "env", "seed")
_SHOWN = 8
_MACHINE = ("device", "threads")
_LONGEST = 200
"""Largest number of bytes of a folder's name, of 255 in most file systems."""


class Sweep(BaseModel):
    """The content of a sweep file. Options are those of `difftori train`; `train` is the name of the policy or the agent."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    out: Path
    """Folder of the runs, `OUT/ENV/NAME_OPTIONS/seed-N`."""
    common: dict[str, Any] = {}
    """Options of every run."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Options with lists of values; every combination is a run."""
    variants: list[dict[str, Any]] = Field(default=[{}], min_length=1)
    """Sets of options, each combined with the whole grid."""
    retries: int = Field(default=2, ge=0)
    """Number of restarts of a crashed run, from its last checkpoint, before it counts as failed."""
    cpus: float = Field(default=1.0, gt=0)
    """Number of processor cores of each run on Ray and Slurm."""
    gpus: float = Field(default=0.0, ge=0)
    """Number of GPUs of each run. A fraction lets several runs share a GPU, on this machine and on Ray."""
    slurm: dict[str, Any] = {}
    """Further parameters of submitit, such as `timeout_min` and `slurm_partition`."""
    wandb: bool = False
    """Whether the runs are also logged to Weights & Biases."""


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
    config: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """The planned configuration, with dotted names, for `conflict`."""

    @property
    def depth(self) -> int:
        """Number of runs that must finish, one after another, before this one can start."""
        return 0 if self.base is None else 1 + self.base.depth

    @property
    def ready(self) -> bool:
        """Whether the base that it refines is finished, or it has none."""
        return self.base is None or self.base.finished

    @property
    def command(self) -> tuple[str, ...]:
        """The command line that starts the run, or that resumes it."""
        begun = (self.folder / "config.yaml").exists()
        return ("train", "--resume", str(self.folder), "--quiet") if begun else self.words

    def conflict(self) -> str | None:
        """Return an error if the folder holds a run of other settings, such as that of another sweep which shares the folder."""
        if not self.config or not (self.folder / "config.yaml").exists():
            return None
        try:
            before = flat(read_config(self.folder))
        except DifftoriError as error:
            return str(error)
        keys = [key for key in self.config if key in before and key not in _MACHINE and before[key] != self.config[key]]
        shown = "; ".join(f"{key}: {self.config[key]!r} here, {before[key]!r} in its config.yaml" for key in keys)
        return (
            f"out: {self.folder} holds a run of other settings ({shown}). Fix: choose another `out`" if keys else None
        )

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


FAILED = ".failed.json"
"""Suffix of the file next to a run's folder that says why it failed."""


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


def _words(options: Mapping[str, Any]) -> list[str]:
    return [word for option, value in options.items() for word in option_words(option, value)]


def plan_run(
    name: str,
    component: object,
    options: Mapping[str, Any],
    folder: Path,
    base: tuple[RunSpec | None, BaseModel | None] = (None, None),
    *,
    check_device: bool = True,
    flags: Sequence[str] = (),
) -> tuple[RunSpec, BaseModel]:
    """Plan a run of a policy or an agent with these options of `difftori train`. Returns the run and its configuration.

    `base` is the run that it refines, whose task and data are the defaults. `check_device`: whether this machine must have the
    device. `flags`: further words, which are no part of the configuration. Raises ConfigError, which lists all errors.
    """
    if not isinstance(component, str):
        raise ConfigError([f"train: {component!r} is not a name. Fix: give the name of a policy or an agent"])
    device = options.get("device")
    hidden = not check_device and isinstance(device, str) and re.fullmatch(r"cuda(:\d+)?", device) is not None
    checked = {**options, "device": "cpu"} if hidden else options
    below = {} if base[1] is None else inherited(base[1].model_dump())
    _, config = read_options(component, below, read_tokens(_words(checked)))
    if hidden:
        config = config.model_copy(update={"device": device})
    words = ("train", component, *_words(options), *flags, "--out", str(folder), "--quiet")
    length = getattr(config, "steps", None) or getattr(getattr(config, "settings", None), "updates", None)
    return RunSpec(name, words, folder, base[0], length), config


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises ConfigError, which lists the errors of the file; `plan` finds those of its runs."""
    given = {"out": Path("runs") / path.stem, **read_yaml(path)}
    sweep, faults = validated(Sweep, given, ())
    if sweep is not None and sweep.out.exists() and not sweep.out.is_dir():
        faults.append(f"out: {sweep.out} is a file. Fix: give a directory")
    if sweep is None or faults:
        raise ConfigError([f"{path}: {fault}" for fault in faults])
    return sweep


def plan(sweep: Sweep, *, gpus: float | None = None, elsewhere: bool = False) -> list[RunSpec]:
    """Plan all runs. Raises ConfigError, which lists the errors of all runs, each once, and folders that hold other runs.

    `gpus`: of each run, instead of the sweep's. `elsewhere`: the runs are on other machines, so this one need not have their devices.
    """
    gpus = sweep.gpus if gpus is None else gpus
    local, flags = not elsewhere and not gpus, ("--wandb",) if sweep.wandb else ()
    faults, mismatches = list[str](), list[str]()
    requests: dict[Path, dict[str, Any]] = {}
    combinations = _combinations(sweep)
    order = list(dict.fromkeys(name for _, own in combinations for name in own))
    for options, own in combinations:
        folder = sweep.out / _place(options, own, order)
        if folder in requests:
            faults.append(
                f"two runs have the folder {folder}: {_shown(requests[folder])} and {_shown(options)}. Fix: remove one"
            )
        requests[folder] = options
    filled = {folder: _filled(options, faults) for folder, options in requests.items()}
    folders = {folder.absolute(): folder for folder in filled}
    for options in filled.values():  # a run of this sweep by the name that it has here, whether or not that is absolute
        if "base" in options:
            options["base"] = str(folders.get(Path(os.path.abspath(str(options["base"]))), options["base"]))
    bases = {str(options["base"]) for options in filled.values() if "base" in options}
    nowhere = [base for base in bases if Path(base) not in filled and not (Path(base) / "config.yaml").exists()]
    faults += [
        f"base: {base} is neither a run of this sweep nor an existing run. Fix: give the folder of a run"
        for base in sorted(nowhere)
    ]
    found: dict[Path, RunSpec] = {}
    configs: dict[Path, BaseModel] = {}
    alike: dict[str, Path] = {}
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
            faults += _gpu_faults(options, gpus)
            try:
                spec, config = plan_run(name, component, options, folder, below, check_device=local, flags=flags)
                mismatches += _mismatches(folder, config)
            except ConfigError as error:
                faults += error.faults
            else:
                values = flat(config.model_dump(mode="json"))
                found[folder], configs[folder] = replace(spec, config=values), config
                same = alike.setdefault(repr(sorted(values.items())), folder)
                if same != folder:
                    faults.append(f"{same} and {folder} would have the same settings. Fix: remove one")
    if mismatches:
        fix = "choose another `out`"
        if all(re.search(rf": (settings\.)?({'|'.join(LENGTHS)}): ", line) for line in mismatches):
            fix = f"extend each run, difftori train --resume RUN --{' or --'.join(LENGTHS)} N, or {fix}"
        faults += [*mismatches[:_SHOWN], f"out: {sweep.out} holds runs of other settings. Fix: {fix}"]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    return [found[folder] for folder in requests]


def _combinations(sweep: Sweep) -> list[tuple[dict[str, Any], list[str]]]:
    """Return the options of each run, and the names of its own ones, those of the grid and of its variant.

    The own options are part of its folder's name, so that a sweep can grow.
    """
    values = itertools.product(*sweep.grid.values())
    points = [_flat(dict(zip(sweep.grid, point, strict=True))) for point in values]
    common = _flat(sweep.common)
    pairs = [(point, _flat(variant)) for variant in sweep.variants for point in points]
    return [({**common, **point, **variant}, list(dict.fromkeys((*point, *variant)))) for point, variant in pairs]


def _gpu_faults(options: Mapping[str, Any], gpus: float) -> list[str]:
    """Return the error of a device that a run with `gpus` GPUs cannot have: it sees its own ones only."""
    device = str(options.get("device", "cpu"))
    if not gpus or device == "cuda" or (gpus > 1 and device.startswith("cuda")):
        return []
    if device.startswith("cuda:") and device != "cuda:0":
        return [f"device: {device!r} with gpus: {gpus:g}, where a run sees its own GPU only. Fix: give cuda"]
    if device.startswith("cpu"):
        return [f"gpus: {gpus:g} for a run whose device is {device!r}. Fix: add `device: cuda`, or give gpus: 0"]
    return []


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names, as on the command line."""
    return {name.replace("-", "_"): value for name, value in flat(values).items()}


def _place(options: Mapping[str, Any], own: Collection[str], order: Sequence[str]) -> Path:
    """Return the folder ENV/NAME_OPTIONS/seed-N of a run, in characters that every file system accepts."""
    varying = [f"{name}-{_choice(options, name)}" for name in order if name in own and name not in _NAMED_APART]
    parts = (
        options.get("env", "env"),
        "_".join([_word(options.get("train")), *varying]),
        f"seed-{options.get('seed', 0)}",
    )
    return Path(*map(_short, map(_word, parts)))


def _choice(options: Mapping[str, Any], name: str) -> str:
    """Return a value as part of a folder's name. For a base, its folder; of a sweep's run NAME_OPTIONS/seed-N, its first part."""
    if name != "base":
        return _word(options[name])
    base = Path(str(options[name]))
    return _word(base.parent.name if base.name.startswith("seed-") else base.name)


def _word(value: Any) -> str:
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", ".", text).strip(".") or "none"


def _short(word: str) -> str:
    """Return a name that file systems accept with a suffix: of a long one, its beginning and a digest."""
    if len(word.encode()) <= _LONGEST:
        return word
    begin = word.encode()[: _LONGEST - 13].decode(errors="ignore")
    return f"{begin}-{hashlib.sha256(word.encode()).hexdigest()[:12]}"


def _filled(options: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """Replace {names} in strings by the run's own values, in the form used in folder names."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in options:
            faults.append(f"{match[0]} in {match.string!r}: the run has no option {match[1]!r}. Fix: add the option")
        return _word(options.get(match[1]))

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return re.sub(r"\{(\w+)\}", value_of, value) if isinstance(value, str) else value

    return {name: filled(value) for name, value in options.items()}


def _mismatches(folder: Path, config: BaseModel) -> list[str]:
    """Return the differences between the existing run in the folder and this configuration."""
    if not (folder / "config.yaml").exists():
        return []
    before = read_config(folder)
    here = config.model_copy(update={name: before.get(name, getattr(config, name)) for name in _MACHINE})
    return [f"{folder}: {fault}" for fault in differences(before, here)]


def _shown(options: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(options), default_flow_style=True, width=10_000).strip()

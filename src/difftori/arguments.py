"""The arguments of each command: their types and defaults, how they are read, and the help."""

import ast
import contextlib
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticUndefined

from difftori.config import alternatives, capacity, fields_of, overlay, read_tokens, validated, with_option_names
from difftori.errors import ConfigError
from difftori.terminal import option_list, paragraphs

ModelT = TypeVar("ModelT", bound=BaseModel)

_SHOWN = 6
"""A longer list of names is in the description instead of the type."""


class Arguments(BaseModel):
    """Base class of the arguments of a command."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DemoArguments(Arguments):
    """Train DiffTORI on the pendulum from an optimal expert, and evaluate it on 1000 starts: about a minute on one core."""

    out: Path = Path("runs/demo")
    """Run directory."""
    quiet: bool = False
    """Show no progress bar."""


class CollectArguments(Arguments):
    """Record demonstrations of scripted experts: a data set OUT/ENV-SEED.zarr and its manifest OUT/ENV-SEED.json.

    Re-run the same command to resume an interrupted collection.
    """

    env: tuple[str, ...] = Field(min_length=1)
    """Environments with a scripted expert, such as `metaworld:assembly`, or your own, `my_env:FAMILY`."""
    episodes: int = 10
    """Number of episodes to record for each environment."""
    out: Path = Path("demos")
    """Directory of the data sets."""
    seed: int = 0
    """Random seed. The seed of an episode is derived from it and the number of the episode."""
    obs: str | None = None
    """Observation type to record (default: the expert's). `state` records states, `points` point clouds and the robot's state,
    `image` the cameras' images and the robot's state; for MetaWorld also the full state."""
    workers: int | None = None
    """Number of worker processes (default: one per core). The data set does not depend on it."""
    keep_failures: bool = False
    """Record every episode. By default, only episodes that succeed at any step are recorded."""
    max_tries: int | None = None
    """Stop with an error after playing this number of episodes (default: ten times `--episodes`)."""
    quiet: bool = False
    """Show no progress bar."""


class DataArguments(Arguments):
    """Describe a data set of demonstrations: its episodes, its keys, and the names under which `difftori train --demos` reads them.

    `difftori data render --help` describes how to render the images of a raw robomimic file.
    """

    path: Path
    """LeRobot folder, zarr folder, robomimic or ManiSkill file, or a folder with one of them."""


class RenderArguments(Arguments):
    """Render the images of a raw robomimic file from its states: a copy of the file with the images.

    Low-dimensional observations are added if they are missing. Re-run the same command to resume an interrupted run.
    """

    file: Path
    """Robomimic file (HDF5) of `lift`, `can`, `square`, `transport` or `tool_hang`, with states."""
    out: Path | None = None
    """New file (default: FILE_image.hdf5)."""
    reflections: bool = True
    """Draw reflections, as in robomimic's own images. Without, rendering takes half the time."""
    quiet: bool = False
    """Show no progress bar."""


class TrainArguments(Arguments):
    """Train a policy by imitation, or an agent by reinforcement learning. Re-run the same command to resume an interrupted run."""

    out: Path | None = None
    """Run directory (default: runs/NAME-ENV-SEED)."""
    config: Path | None = None
    """YAML file with options. Options on the command line override it."""
    resume: Path | None = None
    """Resume the run in this directory with its stored configuration. Of other options, only `--quiet`, `--wandb` and
    `--accept-changed-data` are allowed, and a larger
    `--steps`, `--updates` or `--epochs`, to extend the run."""
    accept_changed_data: bool = False
    """Resume a run although its demonstrations have changed."""
    quiet: bool = False
    """Show no progress bar."""
    wandb: bool = False
    """Also log to Weights & Biases, in the project WANDB_PROJECT (default: difftori). A resumed run continues there. Requires
    `difftori[wandb]`. TensorBoard files are always written."""


class EvalArguments(Arguments):
    """Evaluate a trained policy or agent. Runs of one seed, and evaluations with one `--seed`, are on the same episodes."""

    run: Path
    """Run directory."""
    episodes: int | None = Field(default=None, ge=1)
    """Number of evaluation episodes (default: the run's own number)."""
    which: Literal["best", "last"] | None = None
    """Weights of a policy to evaluate: those with the least validation error, or the last ones (default: `last` for runs with
    `--demos`, otherwise `best`). Runs of agents store the last weights only."""
    env: str | None = None
    """Another environment with the same observations and actions, such as a simulation for a policy that was trained on recordings of
    a robot (default: the run's)."""
    obs: str | None = None
    """Observation type of the environment (default: the run's)."""
    env_options: tuple[str, ...] | None = None
    """Further options of the environment, as `NAME=VALUE` (default: the run's)."""
    max_episode_steps: int | None = Field(default=None, ge=1)
    """Number of environment steps after which an episode is truncated (default: the run's)."""
    seed: int | None = Field(default=None, ge=0, lt=2**62)
    """Seed of other episodes, and of the policy's random numbers (default: the episodes of the evaluation after training)."""
    device: str = "cpu"
    """Device for inference, such as `cpu` or `cuda`."""
    video: bool = False
    """Record a video of one evaluation episode in the folder `media` of the run directory."""
    quiet: bool = False
    """Show no status while it runs."""


class ExportArguments(Arguments):
    """Write a trained policy or agent, its solve included, as one file that runs without this package (docs/export.md)."""

    run: str
    """Run directory, published folder, or `hub:USER/NAME`."""
    format: Literal["onnx", "pt2"] = "onnx"
    """`onnx`: for ONNX Runtime and others; requires `difftori[onnx]`. `pt2`: for `torch.export.load`."""
    out: Path | None = None
    """File to write (default: `exported.onnx` or `exported.pt2`, in the run directory if it is one)."""
    which: Literal["best", "last"] | None = None
    """Weights of a policy; see `difftori eval`."""
    tolerance: float = Field(default=1e-5, gt=0)
    """Largest difference from the original of an action, as a share of its range. If it is larger, no file is kept."""
    trust_code: tuple[str, ...] = ()
    """Installed modules outside this package that a published folder may name, such as `my_pkg.my_policy`; see `difftori.load`."""
    quiet: bool = False
    """Show no status while it runs."""


class ServeArguments(Arguments):
    """Serve a trained policy or agent over the network, in openpi's wire protocol (docs/serving.md). SIGINT and SIGTERM end it."""

    run: str
    """Run directory, published folder, or `hub:USER/NAME`."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's loopback needs `--token-file`; `0.0.0.0` is all addresses."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen at. 0 chooses a free one."""
    token_file: Path | None = None
    """File with the token that clients must send, at least 16 characters, which only you can read (mode 600)."""
    chunks: bool = False
    """Answer with the `n_action_steps` actions of a plan, for clients that execute them one by one. By default, with the next action."""
    max_clients: int = Field(default=32, ge=1)
    """Number of clients at once. Further ones are refused."""
    threads: int = Field(default=1, ge=1)
    """Number of threads for inference on the CPU."""
    which: Literal["best", "last"] | None = None
    """Weights of a policy: those with the least validation error, or the last ones (default: `last` for runs with `--demos`,
    otherwise `best`). Runs of agents store the last weights only."""
    device: str = "cpu"
    """Device for inference, such as `cpu` or `cuda`."""
    trust_code: tuple[str, ...] = ()
    """Installed modules outside this package that a published folder may name, such as `my_pkg.my_policy`; see `difftori.load`."""


class PublishArguments(Arguments):
    """Share a trained policy or agent with its evidence: weights as safetensors, configuration, and a model card with evaluation, data
    and licence. `difftori.load` acts with it (docs/publishing.md).
    """

    run: Path
    """Run directory."""
    to: str
    """Folder to write, or `hub:USER/NAME` for the Hugging Face Hub, which requires `difftori[hub]`."""
    which: Literal["best", "last"] | None = None
    """Weights of a policy (default: `last` for runs with `--demos`, otherwise `best`). Runs of agents store the last weights only."""
    name: str | None = None
    """Title of the model card (default: NAME-ENV-SEED)."""
    license: str | None = None
    """Licence of the weights, as an identifier of the Hub such as `mit` (default: none)."""
    dataset: str | None = None
    """Name of the demonstrations on the Hub, such as `lerobot/pusht` (default: the file name of `--demos`)."""
    dataset_license: str | None = None
    """Licence of the demonstrations (default: none)."""
    private: bool = False
    """Make the repository on the Hub private."""
    unfinished: bool = False
    """Publish a run that has not finished, or weights that were not evaluated. The card says so first."""


class SweepArguments(Arguments):
    """Train every combination of the options in a YAML file (docs/sweeps.md).

    Finished runs are never repeated. Re-run the same command to resume a sweep that was stopped or killed.
    """

    file: Path
    """YAML file with `common` options, a `grid` of values, and `variants`."""
    jobs: int | None = Field(default=None, ge=1)
    """Number of concurrent runs on this machine, each a process with one thread. Default: as many as fit on the GPUs with
    `--gpus-per-run`, otherwise 1."""
    gpus_per_run: float | None = Field(default=None, ge=0)
    """GPUs of each run; a fraction, such as 0.25, lets several runs share one. Default: `gpus` of the sweep file."""
    ray: str | None = None
    """Run on a Ray cluster: `auto` for this machine's, an address, or `local` to start one here (default: no cluster). Requires
    `difftori[ray]`."""
    slurm: bool = False
    """Submit each run as a Slurm job. Requires `difftori[slurm]`."""
    status: bool = False
    """Show the states of the runs and start nothing."""
    quiet: bool = False
    """Show no progress bar, only the states of the runs at the end."""


class ReportArguments(Arguments):
    """Compare runs on one static page, OUT/report.html. The same numbers are written as CSV and LaTeX files next to it."""

    runs: tuple[Path, ...] = Field(min_length=1)
    """Run directories, directories that contain runs at any depth, or record files of studies."""
    out: Path | None = None
    """Directory of the report (default: the folder `report` in the given directory, or in the working directory if several are given)."""
    title: str | None = None
    """Title of the page (default: the paths of the runs)."""
    reference: str | None = None
    """Method to compare the others with, by its name in the report (default: compare every pair)."""
    evaluation: Literal["training", "latest"] = "training"
    """Results of the evaluation at the end of the training, or of the latest `difftori eval` of each run. Finished runs without one
    are excluded then, with the reason."""


def read_arguments(
    model: type[ModelT], words: Sequence[str], command: str, *, positional: str | None = None, about: str | None = None
) -> ModelT:
    """Return the arguments of `difftori COMMAND` from the words that follow it. With `--help`, prints the help and exits.

    `positional`: the field that gets the words that belong to no option. `about`: the description in the help (default: the
    model's docstring). Raises ConfigError, which lists all errors.
    """
    if "--help" in words or "-h" in words:
        print(_help(model, command, positional, about))
        raise SystemExit(0)
    types = fields_of(model)
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    options, places = read_tokens(words[first:]), list(words[:first])
    if positional is None and places:
        raise ConfigError([f"{places[0]!r}: belongs to no option. Fix: write --NAME {places[0]}"])
    if positional is not None:
        for name, given in options.items():
            count = min(len(given), capacity(types.get(name), given))
            options[name], places = given[:count], [*places, *given[count:]]
        options |= {positional: places} if places else {}
    try:
        arguments, faults = validated(model, overlay({}, options, model), ())
    except ConfigError as error:
        arguments, faults = None, error.faults
    if arguments is None:
        named = with_option_names(faults, {*options, *types})
        raise ConfigError([_as_positional(fault, positional) for fault in named])
    return arguments


def _as_positional(fault: str, positional: str | None) -> str:
    name = f"--{positional}: "
    return f"{name[2:].upper()}{fault.removeprefix(name)}" if fault.startswith(name) else fault


def _help(model: type[BaseModel], command: str, positional: str | None, about: str | None) -> str:
    place = "" if positional is None else " " + positional.upper()
    if positional is not None and capacity(fields_of(model)[positional]) > 1:
        place += "…"
    defaults = {name: field.get_default(call_default_factory=True) for name, field in model.model_fields.items()}
    (rows,) = option_rows(model, defaults, lambda owner: "options").values()
    rows = [(place.strip() if name.split()[0] == f"--{positional}" else name, text) for name, text in rows]
    return f"usage: difftori {command}{place} [OPTIONS]\n\n{paragraphs(about or model.__doc__ or '')}\n\n{option_list('options', rows)}"


def option_rows(
    model: type,
    values: Mapping[str, Any],
    section: Callable[[type], str],
    *,
    prefix: str = "",
    hidden: Sequence[str] = (),
) -> dict[str, list[tuple[str, str]]]:
    """Return each option with its type, and its description with its default, by section.

    `values` are the defaults. `section` returns the section of a class's own fields; an inherited field is in the section of
    the class that defines it first. The fields named `settings` and those of components, such as `images.width`, are options too.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for name, kind in fields_of(model).items():
        presets = vars(model).get("PRESETS") if name == "preset" else None
        kind = Literal[tuple(presets)] if presets else kind
        owner = next(c for c in reversed(model.__mro__) if name in inspect.get_annotations(c))
        value = values[name]
        inner = next((member for member in (type(value), *alternatives(kind)) if fields_of(member)), None)
        if name in hidden:
            continue
        if inner is None:
            text = _described(_docs(model)[name], value, kind)
            option = _option(prefix + name, value, kind)
            if issubclass(model, Arguments):  # there is no file with a value that `none` could replace
                option = option.removesuffix(" or none")
            found.setdefault(section(owner), []).append((option, text))
            continue
        parts = {part: getattr(value, part) for part in fields_of(inner)}
        inner_section, inner_prefix = (section, "") if name == "settings" else (lambda _: name, f"{prefix}{name}.")  # noqa: B023
        for title, rows in option_rows(inner, parts, inner_section, prefix=inner_prefix).items():
            found.setdefault(title, []).extend(rows)
    return found


def _option(name: str, value: Any, kind: Any) -> str:
    option = "--" + name.replace("_", "-")
    if bool in alternatives(kind):
        return f"{option}, --no-{option[2:]}" if value is True else option
    return f"{option} {_type_name(kind)}"


def _type_name(kind: Any) -> str:
    """Return the type as it is written in the help: `INT`, `{a,b}`, `[FLOAT …]`, `INT or none`."""
    names = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", bool: "{true,false}", type(None): "none"}
    if kind in names:
        return names[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return "{" + ",".join(map(str, args)) + "}" if len(args) <= _SHOWN else "NAME"
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(member) for member in args)
    if args[-1:] == (...,) or len(args) == 1:
        return f"[{_type_name(args[0])} …]"
    return " ".join(map(_type_name, args)) or "VALUE"


def _described(text: str, value: Any, kind: Any) -> str:
    """Return the description with its list of names, if that is long, and its default, if the text states none."""
    names = next((get_args(k) for k in (kind, *get_args(kind)) if get_origin(k) is Literal), ())
    if len(names) > _SHOWN:
        text += f" Names: {', '.join(names)}."
    if value is PydanticUndefined:
        return f"{text} Required.".strip()
    if value is None or re.search(r"\bdefault: ", text, re.I):
        return text
    if isinstance(value, bool):
        shown = "on" if value else "off"
    else:
        shown = " ".join(map(str, value)) or "none" if isinstance(value, tuple | list) else str(value)
    return f"{text} Default: {shown}.".strip() if shown else text


@cache
def _docs(model: type) -> dict[str, str]:
    """Return the docstring of each field: the text below it in the source of the class that defines it, in one line."""
    found = dict.fromkeys(fields_of(model), "")
    for owner in reversed(model.__mro__):
        if not found.keys() & inspect.get_annotations(owner).keys():
            continue
        with contextlib.suppress(OSError, TypeError):  # a class without source, such as a parametrised one
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
            for field, doc in itertools.pairwise(getattr(tree, "body", [])):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(doc, ast.Expr)
                ):
                    if isinstance(doc.value, ast.Constant):
                        found[field.target.id] = " ".join(str(doc.value.value).split())
    return found

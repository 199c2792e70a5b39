"""The command line: `difftori collect`, `train`, `eval`, `sweep`, `report`, `study`, `bench`.

Nothing heavy is imported before a command is known to need it, so that `--help` and `--version` answer at once.
Exit status: 0 done, 1 a failure while working, 2 a fault in what was asked, 130 and 143 after SIGINT and SIGTERM.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from difftori import __version__
from difftori.errors import ConfigError, DifftoriError
from difftori.registry import find_module, module_names, source_checkout, suggest

_USAGE = """usage: difftori COMMAND …

  collect --env TASK --episodes N --out DIR   let a scripted expert play, and keep what it did as demonstrations
  train NAME [--out DIR] [--config FILE] [--env TASK] [--seed N] …   train a policy by imitation, an agent by reward
  train --resume RUN            go on with a run that was interrupted
  eval RUN [--episodes N] [--video]   execute what was trained and measure it
  sweep FILE [--jobs N | --ray ADDRESS | --slurm] [--status]   train many: tasks × seeds × options
  report DIR… [--out DIR]       any number of runs on one page, with intervals and protocol
  study NAME …                  make a table or figure of the paper anew
  bench NAME …                  measure speed and precision (in a source checkout)
  --version, --help

`difftori COMMAND --help` tells more. DIFFTORI_DEBUG=1 shows where an error came from.
"""
_TRAIN_OPTIONS = {"out", "config", "resume", "quiet", "help"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Errors raised on purpose become a message, not a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # out-of-tree components lie where the user works
    logging.basicConfig(format="difftori: %(message)s", level=logging.WARNING)
    try:
        return _dispatch(words)
    except ConfigError as error:
        _complain(error.faults)
        return _status(error, 2)
    except DifftoriError as error:
        _complain([str(error)])
        return _status(error, 1)
    except BrokenPipeError:  # whoever read our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        _complain(["interrupted"])
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        print(_USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"difftori {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], None]] = {
        "collect": _collect,
        "train": _train,
        "eval": _eval,
        "sweep": _sweep,
        "report": _report,
        "study": lambda rest: _module_command("study", "difftori.experiments.paper", rest),
        "bench": _bench,
    }
    if words[0] not in commands:
        raise ConfigError([f"{words[0]!r} is not a command{suggest(words[0], commands)}; see difftori --help"])
    commands[words[0]](words[1:])
    return 0


def _collect(words: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Collect demonstrations from scripted experts: a data set OUT/ENV-SEED.zarr and its manifest OUT/ENV-SEED.json.

        Re-run the same command to resume an interrupted collection.
        """

        env: tuple[str, ...]
        """Environments with a scripted expert: `metaworld:assembly`, several of them, or `my_env:FAMILY`."""
        episodes: int = 10
        """Number of episodes to keep for each environment."""
        out: Path = Path("demos")
        """Folder to write the data sets to."""
        seed: int = 0
        """The seed of each episode follows from this number and the number of the episode."""
        obs: str | None = None
        """Observation type to record. MetaWorld: `points` (the default) records point clouds and states, `state` only states."""
        workers: int | None = None
        """Number of worker processes, default: one per core. The result does not depend on it."""
        keep_failures: bool = False
        """Keep every episode, instead of only those that succeeded at any step."""
        max_tries: int | None = None
        """Stop with an error after so many episodes, default: ten for each one requested."""
        quiet: bool = False
        """No progress bar."""

    options = tyro.cli(Options, prog="difftori collect", args=words)
    if not options.env:
        raise ConfigError(["--env: needs at least one value"])
    from difftori.collection.collect import CollectRequest, collect

    rows = []
    for env in options.env:
        request = CollectRequest(
            env=env,
            out=options.out,
            episodes=options.episodes,
            seed=options.seed,
            obs=options.obs,
            workers=_cores() if options.workers is None else options.workers,
            keep_failures=options.keep_failures,
            max_tries=options.max_tries,
        )
        rows.append(collect(request, progress=not options.quiet))
    _print_table("collected", rows if len(rows) > 1 else [{"": name, "value": v} for name, v in rows[0].items()])


def _cores() -> int:
    """The processor cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _train(words: list[str]) -> None:
    from difftori.config import read_tokens
    from difftori.trainers import read_options, trainer_of

    named = bool(words) and not words[0].startswith("-")
    name = words[0] if named else None
    options = read_tokens(["--help" if word == "-h" else word for word in words[named:]])
    own = {option: options.pop(option) for option in _TRAIN_OPTIONS & options.keys()}
    if "help" in own:
        _train_help(name, options)
        return
    faults = [f"--{option}: needs one value" for option, given in own.items() if option != "quiet" and len(given) != 1]
    if own.get("quiet"):
        faults.append(f"--quiet: takes no value, not {' '.join(own['quiet'])}")
    if "resume" in own and (name or options or own.keys() - {"resume", "quiet"}):
        faults.append("--resume: takes the whole configuration from the run; give nothing else beside it")
    if faults:
        raise ConfigError(faults)
    if "resume" in own:
        from difftori.runs.records import read_config

        out = Path(own["resume"][0])
        values = read_config(out)
        trainer = trainer_of(values)
        config = trainer.parse(values)
    else:
        from difftori.config import read_yaml

        values = read_yaml(Path(own["config"][0])) if "config" in own else {}
        trainer, config = read_options(name, values, options, _TRAIN_OPTIONS)
        default = f"{getattr(config, trainer.key)}-{config.env}-{config.seed}".replace(":", ".")
        out = Path(own["out"][0]) if "out" in own else Path("runs") / default
    summary = trainer.train(config, out, progress="quiet" not in own)
    if os.environ.get("RANK", "0") != "0":  # under torchrun, the first process speaks for all
        return
    _print_table(f"{getattr(config, trainer.key)} on {config.env}: {out}", _side_by_side(summary))


def _train_help(name: str | None, options: Mapping[str, list[str]]) -> None:
    import tyro

    from difftori.trainers import known_names, trainer_for

    if name is None:
        names = ", ".join(known_names())
        print(f"{_USAGE}\npolicies and agents: {names}\n\n`difftori train NAME --help` lists its options.")
        return
    print("--out DIR     where the run goes; the same command again resumes it there (default: runs/NAME-ENV-SEED)")
    print("--config FILE options from YAML; those on the command line win")
    print("--quiet       no progress bar")
    env = _first("env", options)
    trainer = trainer_for(name)
    default = trainer.parse({trainer.key: name, **env})
    prog = f"difftori train {name}"
    tyro.cli(type(default), prog=prog, default=default, args=["--help"], config=(tyro.conf.AvoidSubcommands,))


def _first(name: str, options: Mapping[str, list[str]]) -> dict[str, str]:
    """An option by its name, if it was given a word."""
    words = options.get(name)
    return {name: words[0]} if words else {}


def _eval(words: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Execute a trained policy or agent from common starts and measure it."""

        run: Annotated[Path, tyro.conf.Positional]
        """Directory of a run."""
        episodes: int | None = None
        """Starts; as many as the run's own evaluation took if not given."""
        which: Literal["best", "last"] | None = None
        """Of a policy: the weights with the least validation error, or the last (the default with `demos`). Agents keep
        the last."""
        device: str = "cpu"
        """Where it computes."""
        video: bool = False
        """Film one evaluation episode into the run's `media/`."""

    options = tyro.cli(Options, prog="difftori eval", args=words)
    if options.episodes is not None and options.episodes < 1:
        raise ConfigError([f"episodes: {options.episodes}: must be at least 1"])
    from rich.console import Console

    from difftori.runs.records import read_config
    from difftori.trainers import trainer_of

    trainer = trainer_of(read_config(options.run))
    given: dict[str, Any] = {"episodes": options.episodes, "device": options.device, "video": options.video}
    if trainer.key == "policy":
        given["which"] = options.which
    elif options.which == "best":
        raise ConfigError(["--which best: an agent's run keeps its last weights only"])
    with Console(stderr=True).status(f"evaluating {options.run}"):
        results = trainer.evaluate(options.run, **given)
    title = str(options.run) if options.which is None else f"{options.run} ({options.which})"
    _print_table(title, [{"": name, "value": value} for name, value in results.items()])


def _sweep(words: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Train every combination of the options that FILE names (docs/sweeps.md).

        A finished run is never repeated. Re-run the same command to resume a sweep that was stopped or killed.
        """

        file: Annotated[Path, tyro.conf.Positional]
        """YAML file with `common` options, a `grid` of values, and `variants`."""
        jobs: int = 1
        """Number of runs at once on this machine, each a process with one thread."""
        ray: str | None = None
        """Run on a Ray cluster: `auto`, its address, or `local` to start one here (default: processes of this machine). Needs
        `difftori[ray]`."""
        slurm: bool = False
        """Submit each run as a Slurm job. Needs `difftori[slurm]`."""
        status: bool = False
        """Only show the states of the runs."""

    options = tyro.cli(Options, prog="difftori sweep", args=words)
    if options.jobs < 1:
        raise ConfigError([f"jobs: {options.jobs}: must be at least 1"])
    if options.slurm and options.ray is not None:
        raise ConfigError(["--ray and --slurm: give one of them"])
    from difftori.experiments.plan import plan, read_sweep
    from difftori.experiments.pool import report_failures
    from difftori.experiments.status import counts, run_status, table

    sweep = read_sweep(options.file)
    runs = plan(sweep)
    failures = []
    if not options.status:
        from difftori.experiments.sweep import local, run_sweep

        if options.ray is not None:
            from difftori.experiments.ray_cluster import on_ray

            engine = on_ray(options.ray, cpus=sweep.cpus, gpus=sweep.gpus, retries=sweep.retries)
        elif options.slurm:
            from difftori.experiments.slurm import on_slurm

            place = sweep.out / "slurm"
            engine = on_slurm(place, cpus=sweep.cpus, gpus=sweep.gpus, retries=sweep.retries, parameters=sweep.slurm)
        else:
            engine = local(options.jobs, sweep.retries)
        with _run_bar(len(runs), sum(run.finished for run in runs)) as (say, done):
            failures = run_sweep(runs, engine, say=say, done=done)
    found = [run_status(run) for run in runs]
    _print_table(f"{options.file.name}: {counts(found)}", table(found))
    try:
        if not options.status and any(s.state == "finished" for s in found):
            from difftori.experiments.report import write_report

            ended = [s.run.folder for s in found if s.state == "finished"]
            print(write_report(ended, sweep.out / "report", title=options.file.stem).page)
    finally:
        report_failures(failures)


def _report(words: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Merge runs into one static page, OUT/report.html, with the same numbers as CSV and LaTeX beside it."""

        runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """Directories of runs, or directories with runs somewhere below them; also record files of studies."""
        out: Path | None = None
        """Directory of the report (default: `report` in the directory if there is only one, else `report`)."""
        title: str | None = None
        """Title of the page (default: the names of the directories)."""
        reference: str | None = None
        """Method that the others are compared with, as the report names it (default: every pair is compared)."""

    options = tyro.cli(Options, prog="difftori report", args=words)
    if not options.runs:
        raise ConfigError(["report: give at least one directory of runs"])
    from difftori.experiments.report import write_report

    only = options.runs[0] if len(options.runs) == 1 and options.runs[0].is_dir() else None
    out = options.out or (Path("report") if only is None else only / "report")
    report = write_report(options.runs, out, title=options.title, reference=options.reference)
    from rich.console import Console

    from difftori.experiments.tables import screen_table

    console = Console()
    for tables in report.tables:
        for caption, columns in list(tables.items())[:2]:
            console.print(screen_table(caption, columns))
    console.print(f"{report.page}", soft_wrap=True, highlight=False)


@contextmanager
def _run_bar(total: int, finished: int) -> Iterator[tuple[Callable[[str], None], Callable[[object], None]]]:
    """A progress bar over runs: a function that prints above it, and one that hears of each run that is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    columns = (TextColumn("runs"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("runs", total=total, completed=finished)
        yield lambda text: bar.console.print(Text(text), soft_wrap=True), lambda _: bar.advance(line)


def _bench(words: list[str]) -> None:
    """Run a benchmark of the source checkout, or a module of the user's own, whose name has a dot."""
    if not words or "." not in words[0]:
        sys.path.insert(0, str(source_checkout()))
    _module_command("bench", "benchmarks", words)


def _module_command(kind: str, package: str, words: list[str]) -> None:
    """Run a module of `package` that has a `Config` and a `run(config)`; the options are the fields of `Config`."""
    import tyro

    if not words or words[0] in ("--help", "-h"):
        names = [name for name in module_names(package) if _is_runnable(find_module(name, package, kind))]
        print(f"usage: difftori {kind} NAME [options]\n\nnames: {', '.join(sorted(names)) or 'none yet'}")
        if not words:
            raise ConfigError([f"{kind}: a name is missing"])
        return
    known = module_names(package)
    if "." not in words[0] and words[0].replace("_", "-") not in known:
        known = {name: full for name, full in known.items() if _is_runnable(find_module(name, package, kind))}
        raise ConfigError([f"{words[0]!r} is not a {kind}{suggest(words[0], known)}"])
    module = find_module(words[0], package, kind)
    if not _is_runnable(module):
        raise ConfigError([f"{words[0]!r} is not a {kind}: {module.__name__} has no Config and run(config)"])
    prog = f"difftori {kind} {words[0]}"
    config = tyro.cli(vars(module)["Config"], prog=prog, description=module.__doc__, args=words[1:])
    rows = vars(module)["run"](config)
    if isinstance(rows, Mapping):
        rows = [{"": name, "value": value} for name, value in rows.items()]
    if rows:
        _print_table(f"{kind} {words[0]}", rows)


def _is_runnable(module: ModuleType) -> bool:
    return "Config" in vars(module) and callable(vars(module).get("run"))


def _side_by_side(summary: Mapping[str, float]) -> list[dict[str, Any]]:
    """A run's summary with the results of the best and the last weights in two columns, where there are both."""
    if "best/validation_error" not in summary:
        return [{"": name, "value": value} for name, value in summary.items()]
    plain = [{"": name, "best": value, "last": value} for name, value in summary.items() if "/" not in name]
    names = dict.fromkeys(name.partition("/")[2] for name in summary if "/" in name)
    return plain + [{"": n, "best": summary.get(f"best/{n}"), "last": summary.get(f"last/{n}")} for n in names]


def _print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), Table()
    names = list(dict.fromkeys(name for row in rows for name in row))
    for index, name in enumerate(names):
        table.add_column(Text(name), justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(row.get(name))) for name in names))
    console.print(Text(title, style="bold"))
    console.print(table)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _complain(faults: Sequence[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)
    for fault in faults:
        console.print(Text("error: ", style="bold red") + Text(fault))


def _status(error: DifftoriError, status: int) -> int:
    """The exit status, unless the whole traceback is wished for."""
    if os.environ.get("DIFFTORI_DEBUG") == "1":
        raise error
    return status


if __name__ == "__main__":
    sys.exit(main())

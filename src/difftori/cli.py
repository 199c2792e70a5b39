"""The command line: `difftori collect`, `train`, `eval`, `sweep`, `report`, `study`, `bench`.

Heavy packages are imported by the command that needs them, so that `--help` and `--version` are fast.
Exit codes: 0 success, 1 failure at run time, 2 invalid arguments, 130 and 143 after SIGINT and SIGTERM.
"""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from difftori import __version__
from difftori.errors import ConfigError, DifftoriError
from difftori.registry import source_checkout, suggest
from difftori.terminal import best_and_last, print_errors, print_table, run_progress

_USAGE = """usage: difftori COMMAND …

  collect --env TASK --episodes N --out DIR   record demonstrations of a scripted expert
  train NAME [--out DIR] [--config FILE] [--env TASK] [--seed N] …
                                train a policy by imitation, or an agent by reinforcement learning
  train --resume RUN            resume an interrupted run
  eval RUN [--episodes N] [--video]   evaluate a trained policy or agent
  sweep FILE [--jobs N | --ray ADDRESS | --slurm] [--status]
                                train many runs: tasks × seeds × options
  report DIR… [--out DIR]       compare any number of runs on one page
  study NAME …                  reproduce a table or figure of the paper
  bench NAME …                  measure speed and precision (in a source checkout)
  --version                     print the version
  --help                        print this text

`difftori COMMAND --help` lists the options of a command. DIFFTORI_DEBUG=1 shows the traceback of an error.
"""
_TRAIN_USAGE = """usage: difftori train {name} [--out DIR] [--config FILE] [--quiet] [OPTIONS]
       difftori train --resume RUN [--quiet]

Train a policy by imitation, or an agent by reinforcement learning. Re-run the same command to resume an interrupted run.

  --out DIR       run directory (default: runs/NAME-ENV-SEED)
  --config FILE   YAML file with options; options on the command line override it
  --resume RUN    resume the run in this directory with its stored configuration; takes no other option except --quiet and
                  --accept-changed-data
  --accept-changed-data
                  resume a run although its demonstrations have changed
  --quiet         show no progress bar
"""
_FLAGS = {"quiet", "accept_changed_data"}
_TRAIN_OPTIONS = {"out", "config", "resume", "help", *_FLAGS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A `DifftoriError` is printed as a message, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # your own components are importable from the working directory
    logging.basicConfig(format="difftori: %(message)s", level=logging.WARNING)
    try:
        return _dispatch(words)
    except ConfigError as error:
        print_errors(error.faults)
        return _exit_code(error, 2)
    except DifftoriError as error:
        print_errors([str(error)])
        return _exit_code(error, 1)
    except BrokenPipeError:  # the reader of the output, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print_errors(["interrupted"])
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
        "study": _study,
        "bench": _bench,
    }
    if words[0] not in commands:
        raise ConfigError(
            [f"{words[0]!r} is not a command{suggest(words[0], commands)}. Fix: choose a command of `difftori --help`"]
        )
    commands[words[0]](words[1:])
    return 0


def _collect(words: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Record demonstrations of scripted experts: a data set OUT/ENV-SEED.zarr and its manifest OUT/ENV-SEED.json.

        Re-run the same command to resume an interrupted collection.
        """

        env: tuple[str, ...]
        """Environments with a scripted expert, such as `metaworld:assembly`, or your own, `my_env:FAMILY`."""
        episodes: int = 10
        """Number of episodes to record for each environment."""
        out: Path = Path("demos")
        """Directory of the data sets."""
        seed: int = 0
        """Random seed. The seed of an episode is derived from it and the number of the episode."""
        obs: str | None = None
        """Observation type to record (default: the expert's). For MetaWorld, `points` records point clouds and states, `state` only states."""
        workers: int | None = None
        """Number of worker processes (default: one per core). The data set does not depend on it."""
        keep_failures: bool = False
        """Record every episode. By default, only episodes that succeed at any step are recorded."""
        max_tries: int | None = None
        """Stop with an error after playing this number of episodes (default: ten times `--episodes`)."""
        quiet: bool = False
        """Show no progress bar."""

    options = tyro.cli(Options, prog="difftori collect", args=words)
    if not options.env:
        raise ConfigError(["--env: no value given. Fix: name at least one environment with a scripted expert"])
    from difftori.collection.collect import CollectRequest, collect

    rows = []
    for env in options.env:
        request = CollectRequest(
            env=env,
            out=options.out,
            episodes=options.episodes,
            seed=options.seed,
            obs=options.obs,
            workers=_num_cores() if options.workers is None else options.workers,
            keep_failures=options.keep_failures,
            max_tries=options.max_tries,
        )
        rows.append(collect(request, progress=not options.quiet))
    print_table("collected", rows if len(rows) > 1 else [{"": name, "value": v} for name, v in rows[0].items()])


def _num_cores() -> int:
    """Number of processor cores that this process may use."""
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
    faults = [
        f"--{option}: {len(given)} values given. Fix: give one value"
        for option, given in own.items()
        if option not in _FLAGS and len(given) != 1
    ]
    faults += [
        f"--{flag.replace('_', '-')}: takes no value, but {' '.join(own[flag])!r} was given. Fix: remove the value"
        for flag in sorted(_FLAGS)
        if own.get(flag)
    ]
    if "resume" in own and (name or options or own.keys() - {"resume", *_FLAGS}):
        faults.append(
            "--resume: the configuration is read from the run, so no other option is allowed. "
            "Fix: remove the other options, except --quiet and --accept-changed-data"
        )
    if faults:
        raise ConfigError(faults)
    if "resume" in own:
        from difftori.runs.records import read_config

        out = Path(own["resume"][0])
        values = read_config(out)
        trainer = trainer_of(values)
        config = trainer.parse(values)
    else:
        from difftori.config import read_yaml, with_option_names

        values = read_yaml(Path(own["config"][0])) if "config" in own else {}
        try:
            trainer, config = read_options(name, values, options, _TRAIN_OPTIONS)
        except ConfigError as error:
            raise ConfigError(with_option_names(error.faults, options)) from error
        task = Path(config.demos).stem if config.env == "none" else config.env
        default = f"{getattr(config, trainer.key)}-{task}-{config.seed}".replace(":", ".")
        out = Path(own["out"][0]) if "out" in own else Path("runs") / default
    accept = {"accept_changed_data": True} if "accept_changed_data" in own else {}
    if accept and trainer.key != "policy":
        raise ConfigError(["--accept-changed-data: agents have no demonstrations. Fix: remove it"])
    summary = trainer.train(config, out, progress="quiet" not in own, **accept)
    if os.environ.get("RANK", "0") != "0":  # under torchrun, only the main process prints
        return
    print_table(f"{getattr(config, trainer.key)} on {config.env}: {out}", best_and_last(summary))


def _train_help(name: str | None, options: Mapping[str, list[str]]) -> None:
    import tyro

    from difftori.trainers import known_names, trainer_for

    print(_TRAIN_USAGE.format(name=name or "NAME"))
    if name is None:
        print(f"policies and agents: {', '.join(known_names())}\n\n`difftori train NAME --help` lists their options.")
        return
    env = _first("env", options)
    trainer = trainer_for(name)
    default = trainer.parse({trainer.key: name, **env})
    prog = f"difftori train {name}"
    tyro.cli(type(default), prog=prog, default=default, args=["--help"], config=(tyro.conf.AvoidSubcommands,))


def _first(name: str, options: Mapping[str, list[str]]) -> dict[str, str]:
    """The first value of an option as a dictionary; empty if the option has no value."""
    words = options.get(name)
    return {name: words[0]} if words else {}


def _eval(words: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Evaluate a trained policy or agent. Runs of one seed are evaluated on the same episodes."""

        run: Annotated[Path, tyro.conf.Positional]
        """Run directory."""
        episodes: int | None = None
        """Number of evaluation episodes (default: the run's own number)."""
        which: Literal["best", "last"] | None = None
        """Weights of a policy to evaluate: those with the least validation error, or the last ones (default: `last` for runs with
        `--demos`, otherwise `best`). Runs of agents store the last weights only."""
        device: str = "cpu"
        """Device for inference, such as `cpu` or `cuda`."""
        video: bool = False
        """Record a video of one evaluation episode in the folder `media` of the run directory."""

    options = tyro.cli(Options, prog="difftori eval", args=words)
    if options.episodes is not None and options.episodes < 1:
        raise ConfigError([f"--episodes: {options.episodes} is too small. Fix: give at least 1"])
    from rich.console import Console

    from difftori.runs.records import read_config
    from difftori.trainers import trainer_of

    trainer = trainer_of(read_config(options.run))
    given: dict[str, Any] = {"episodes": options.episodes, "device": options.device, "video": options.video}
    if trainer.key == "policy":
        given["which"] = options.which
    elif options.which == "best":
        raise ConfigError(
            [
                "--which: 'best' is not available, because an agent's run stores its last weights only. Fix: use --which last"
            ]
        )
    with Console(stderr=True).status(f"evaluating {options.run}"):
        results = trainer.evaluate(options.run, **given)
    title = str(options.run) if options.which is None else f"{options.run} ({options.which})"
    print_table(title, [{"": name, "value": value} for name, value in results.items()])


def _sweep(words: list[str]) -> None:
    import tyro

    @dataclass(frozen=True)
    class Options:
        """Train every combination of the options in a YAML file (docs/sweeps.md).

        Finished runs are never repeated. Re-run the same command to resume a sweep that was stopped or killed.
        """

        file: Annotated[Path, tyro.conf.Positional]
        """YAML file with `common` options, a `grid` of values, and `variants`."""
        jobs: int = 1
        """Number of concurrent runs on this machine, each a process with one thread."""
        ray: str | None = None
        """Run on a Ray cluster: `auto` for this machine's, an address, or `local` to start one here (default: no cluster). Requires
        `difftori[ray]`."""
        slurm: bool = False
        """Submit each run as a Slurm job. Requires `difftori[slurm]`."""
        status: bool = False
        """Show the states of the runs and start nothing."""

    options = tyro.cli(Options, prog="difftori sweep", args=words)
    if options.jobs < 1:
        raise ConfigError([f"--jobs: {options.jobs} is too small. Fix: give at least 1"])
    if options.slurm and options.ray is not None:
        raise ConfigError(["--ray and --slurm: both were given. Fix: give one of them"])
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
        with run_progress(len(runs), sum(run.finished for run in runs)) as (say, done):
            failures = run_sweep(runs, engine, say=say, done=done)
    found = [run_status(run) for run in runs]
    print_table(f"{options.file.name}: {counts(found)}", table(found))
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
        """Compare runs on one static page, OUT/report.html. The same numbers are written as CSV and LaTeX files next to it."""

        runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
        """Run directories, directories that contain runs at any depth, or record files of studies."""
        out: Path | None = None
        """Directory of the report (default: the folder `report` in the given directory, or in the working directory if several are given)."""
        title: str | None = None
        """Title of the page (default: the paths of the runs)."""
        reference: str | None = None
        """Method to compare the others with, by its name in the report (default: compare every pair)."""

    options = tyro.cli(Options, prog="difftori report", args=words)
    if not options.runs:
        raise ConfigError(["report: no runs given. Fix: give at least one run directory"])
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


def _study(words: list[str]) -> None:
    """Run a study of this package, or your own module, named with a dot."""
    from difftori.experiments.modules import run_module

    run_module("study", "difftori.experiments.paper", words)


def _bench(words: list[str]) -> None:
    """Run a benchmark of the source checkout, or your own module, named with a dot."""
    from difftori.experiments.modules import run_module

    if not words or "." not in words[0]:
        sys.path.insert(0, str(source_checkout()))
    run_module("bench", "benchmarks", words)


def _exit_code(error: DifftoriError, code: int) -> int:
    """Return the exit code. With DIFFTORI_DEBUG=1, raise the error instead, to show the traceback."""
    if os.environ.get("DIFFTORI_DEBUG") == "1":
        raise error
    return code


if __name__ == "__main__":
    sys.exit(main())

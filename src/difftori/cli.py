"""The command line: `difftori demo`, `collect`, `data`, `train`, `eval`, `export`, `publish`, `serve`, `sweep`, `report`, `study`, `bench`.

Heavy packages are imported by the command that needs them, so that `--help` and `--version` are fast.
Exit codes: 0 success, 1 failure at run time, 2 invalid arguments, 130 and 143 after SIGINT and SIGTERM (`serve`: 0).
"""

import errno
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from difftori import __version__
from difftori.errors import ConfigError, DifftoriError, suggest
from difftori.terminal import (
    best_and_last,
    first_sentence,
    option_list,
    paragraphs,
    print_errors,
    print_table,
    run_progress,
    status,
)

_USAGE = """usage: difftori COMMAND …

  demo                          train DiffTORI on the pendulum and evaluate it: about a minute
  collect --env TASK --episodes N --out DIR   record demonstrations of a scripted expert
  data PATH                                   describe a data set of demonstrations
  data render FILE [--out FILE]               render the images of a raw robomimic file
  train NAME [--out DIR] [--config FILE] [--env TASK] [--seed N] …
                                train a policy by imitation, or an agent by reinforcement learning
  train --resume RUN [--steps N | --updates N | --epochs N]
                                resume an interrupted run, or extend a finished one
  train --resume RUN --demos PATH             the same, if its demonstrations have moved
  eval RUN [--episodes N] [--video]   evaluate a trained policy or agent
  export RUN [--format onnx | pt2] [--out FILE]
                                write a policy or agent as one file, its solve included
  serve RUN [--host HOST] [--port PORT] [--token-file FILE]
                                let other programs act with a policy or agent, over the network
  publish RUN --to FOLDER | hub:USER/NAME
                                share a trained policy or agent with its evidence
  sweep FILE [--jobs N | --ray ADDRESS | --slurm] [--status]
                                train many runs: tasks × seeds × options
  report DIR… [--out DIR]       compare any number of runs on one page
  study NAME …                  reproduce a table or figure of the paper
  bench NAME …                  measure speed and precision (in a source checkout)
  --version                     print the version
  --help                        print this text

`difftori COMMAND --help` lists the options of a command. DIFFTORI_DEBUG=1 shows the traceback of an error.
"""


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
    except OSError as error:
        fixes = {errno.EACCES: "check the permissions"} | dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space")
        if error.errno not in fixes:
            raise
        print_errors([f"{error}. Fix: {fixes[error.errno]}"])
        return _exit_code(error, 1)
    except KeyboardInterrupt:
        print_errors(["interrupted. Fix: re-run the same command to continue"])
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h"):
        print(_USAGE)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"difftori {__version__}")
        return 0
    commands: dict[str, Callable[[list[str]], None]] = {
        "demo": _demo,
        "collect": _collect,
        "data": _data,
        "train": _train,
        "eval": _eval,
        "export": _export,
        "serve": _serve,
        "publish": _publish,
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


def _demo(words: list[str]) -> None:
    from difftori.arguments import DemoArguments, read_arguments

    options = read_arguments(DemoArguments, words, "demo")
    settings = "difftori-il --preset pendulum --env pendulum --seed 0 --epochs 120 --eval-every 5 --eval-episodes 500"
    quiet = ["--quiet"] if options.quiet else []
    train = [*settings.split(), "--out", str(options.out)]
    evaluate = [str(options.out), "--episodes", "1000"]
    print(f"$ difftori train {' '.join(train)}", flush=True)
    _train([*train, *quiet])
    print(f"$ difftori eval {' '.join(evaluate)}", flush=True)
    _eval([*evaluate, *quiet])
    print(f"The run on one page: {options.out / 'report.html'}")


def _collect(words: list[str]) -> None:
    from difftori.arguments import CollectArguments, read_arguments

    options = read_arguments(CollectArguments, words, "collect")
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


def _data(words: list[str]) -> None:
    if words[:1] == ["render"]:
        _render(words[1:])
        return
    from difftori.arguments import DataArguments, read_arguments

    options = read_arguments(DataArguments, words, "data", positional="path")
    from difftori.data.formats import describe_demos

    found = describe_demos(options.path)
    print_table(found.title(), found.table())
    if found.tasks:
        print_table("tasks: choose one with --episodes TASK", found.task_table())


def _render(words: list[str]) -> None:
    from difftori.arguments import RenderArguments, read_arguments

    options = read_arguments(RenderArguments, words, "data render", positional="file")
    from difftori.collection.render import RenderRequest, render
    from difftori.terminal import count_progress

    request = RenderRequest(options.file, options.out, options.reflections)
    with count_progress("demonstrations", shown=not options.quiet) as show:
        summary = render(request, show)
    print_table("rendered", [{"": name, "value": value} for name, value in summary.items()])


def _num_cores() -> int:
    """Number of processor cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _train(words: list[str]) -> None:
    from difftori.arguments import TrainArguments
    from difftori.config import fields_of, overlay, read_tokens, read_yaml, validated, with_option_names
    from difftori.trainers import read_options, read_resumed

    named = bool(words) and not words[0].startswith("-")
    name = words[0] if named else None
    options = read_tokens(["--help" if word == "-h" else word for word in words[named:]])
    if options.pop("help", None) is not None:
        print(_train_help(name, options))
        return
    own = {option: options.pop(option) for option in fields_of(TrainArguments).keys() & options.keys()}
    given, faults = validated(TrainArguments, overlay({}, own, TrainArguments), ())
    if given is None:
        raise ConfigError(with_option_names(faults, own))
    if given.resume is not None:
        others = own.keys() - {"resume", "quiet", "wandb", "accept_changed_data"}
        if name or others:
            words = [*([name] if name else []), *(f"--{option}" for option in sorted(others))]
            raise ConfigError(
                [f"{', '.join(words)}: not allowed with --resume. Fix: remove {'it' if len(words) == 1 else 'them'}"]
            )
        out = given.resume
        trainer, config = read_resumed(out, options)
    else:
        values = {} if given.config is None else read_yaml(given.config)
        try:
            trainer, config = read_options(name, values, options, {*fields_of(TrainArguments), "help"})
        except ConfigError as error:
            raise ConfigError(with_option_names(error.faults, options)) from error
        task = Path(config.demos).stem if config.env == "none" else config.env
        default = f"{getattr(config, trainer.key)}-{task}-{config.seed}".replace(":", ".")
        out = given.out or Path("runs") / default
    if given.accept_changed_data and trainer.key != "policy":
        raise ConfigError(["--accept-changed-data: agents have no demonstrations. Fix: remove it"])
    accept = {"accept_changed_data": True} if given.accept_changed_data else {}
    summary = trainer.train(config, out, progress=not given.quiet, wandb=given.wandb, **accept)
    if os.environ.get("RANK", "0") != "0":  # under torchrun, only the main process prints
        return
    print_table(f"{getattr(config, trainer.key)} on {config.env}: {out}", best_and_last(summary))


def _train_help(name: str | None, options: Mapping[str, list[str]]) -> str:
    """Return the help of `train`, or of one policy or agent, with the defaults of the environment and preset in `options`."""
    from difftori.arguments import TrainArguments, option_rows
    from difftori.interfaces import AgentConfig, PolicyConfig
    from difftori.registry import find_agents, find_policies
    from difftori.trainers import read_options

    about = paragraphs(TrainArguments.__doc__ or "")
    (rows,) = option_rows(TrainArguments, dict(TrainArguments()), lambda _: "").values()
    resumed = ("[--steps N | --updates N | --epochs N]", "--demos PATH")
    lines = [f"usage: difftori train {name or 'NAME'} [OPTIONS]"]
    lines += [f"       difftori train --resume RUN {words}" for words in resumed]
    usage = "\n".join([*lines, "", about])
    if name is None:
        lists = [("policies", find_policies()), ("agents", find_agents())]
        rows_of = {t: [(n, first_sentence(sys.modules[c.__module__].__doc__)) for n, c in f.items()] for t, f in lists}
        text = [option_list(title, rows) for title, rows in rows_of.items()]
        return "\n\n".join([usage, *text, "`difftori train NAME --help` lists the options of a policy or an agent."])
    chosen = {option: options[option] for option in ("env", "preset") if option in options}
    trainer, config = read_options(name, {}, chosen)
    titles = {PolicyConfig: "training", AgentConfig: "training", **dict.fromkeys(type(config).__mro__, "run")}
    found = option_rows(type(config), dict(config), lambda owner: titles.get(owner, name), hidden=[trainer.key])
    found["run"] = rows + found["run"]
    return "\n\n".join([usage, *(option_list(title, rows) for title, rows in found.items())])


def _eval(words: list[str]) -> None:
    from difftori.arguments import EvalArguments, read_arguments

    options = read_arguments(EvalArguments, words, "eval", positional="run")
    from difftori.runs.records import read_config
    from difftori.trainers import trainer_of

    trainer = trainer_of(read_config(options.run))
    changes = {name: getattr(options, name) for name in ("env", "obs", "env_options", "max_episode_steps", "seed")}
    given: dict[str, Any] = {
        "episodes": options.episodes,
        "device": options.device,
        "video": options.video,
        "changes": {name: value for name, value in changes.items() if value is not None},
    }
    if trainer.key == "policy":
        given["which"] = options.which
    elif options.which == "best":
        raise ConfigError(
            [
                "--which: 'best' is not available, because an agent's run stores its last weights only. Fix: use --which last"
            ]
        )
    results = trainer.evaluate(options.run, **given, progress=not options.quiet)
    title = str(options.run) if options.which is None else f"{options.run} ({options.which})"
    print_table(title, [{"": name, "value": value} for name, value in results.items()])


def _export(words: list[str]) -> None:
    from difftori.arguments import ExportArguments, read_arguments

    options = read_arguments(ExportArguments, words, "export", positional="run")
    from difftori.export import export

    folder = Path(options.run)
    beside = folder if (folder / "metrics.jsonl").exists() else Path()
    out = options.out or beside / f"exported.{options.format}"
    with status(f"exporting {options.run}", shown=not options.quiet):
        done = export(
            options.run,
            out,
            format=options.format,
            which=options.which,
            tolerance=options.tolerance,
            trust_code=options.trust_code,
        )
    rows = {
        "size": f"{done.size / 1e6:.2f} MB",
        "largest difference of an action, as a share of its range": f"{done.difference:.1e}",
        "milliseconds for one row, PyTorch": f"{done.original_ms:.2f}",
        f"milliseconds for one row, {options.format}": f"{done.exported_ms:.2f}",
    }
    print_table(str(out), [{"": name, "value": value} for name, value in rows.items()])


def _serve(words: list[str]) -> None:
    from difftori.arguments import ServeArguments, read_arguments

    options = read_arguments(ServeArguments, words, "serve", positional="run")
    from difftori.serving.command import serve_run

    traffic = serve_run(options, lambda line: print(line, flush=True))
    print_table(options.run, traffic.table())


def _publish(words: list[str]) -> None:
    from difftori.arguments import PublishArguments, read_arguments

    options = read_arguments(PublishArguments, words, "publish", positional="run")
    from difftori.publishing.publish import PublishRequest, publish

    published = publish(PublishRequest(**dict(options)))
    print_table(f"published {options.run}", [{"": name, "value": value} for name, value in published.items()])


def _sweep(words: list[str]) -> None:
    from difftori.arguments import SweepArguments, read_arguments

    options = read_arguments(SweepArguments, words, "sweep", positional="file")
    if options.slurm and options.ray is not None:
        raise ConfigError(["--ray and --slurm: both were given. Fix: give one of them"])
    from difftori.experiments.plan import plan, read_sweep
    from difftori.experiments.pool import report_failures
    from difftori.experiments.status import counts, run_status, table

    sweep = read_sweep(options.file)
    gpus = sweep.gpus if options.gpus_per_run is None else options.gpus_per_run
    runs = plan(sweep, gpus=gpus, elsewhere=options.status or options.slurm or options.ray is not None)
    failures = []
    if not options.status:
        from difftori.experiments.sweep import local, run_sweep

        if options.ray is not None:
            from difftori.experiments.ray_cluster import on_ray

            engine = on_ray(options.ray, cpus=sweep.cpus, gpus=gpus, retries=sweep.retries)
        elif options.slurm:
            from difftori.experiments.slurm import on_slurm

            place = sweep.out / "slurm"
            engine = on_slurm(place, cpus=sweep.cpus, gpus=gpus, retries=sweep.retries, parameters=sweep.slurm)
        else:
            engine = local(options.jobs, sweep.retries, gpus=gpus)
        with run_progress(len(runs), sum(run.finished for run in runs), shown=not options.quiet) as (say, done):
            failures = run_sweep(runs, engine, say=say, done=done)
    found = [run_status(run) for run in runs]
    print_table(f"{options.file.name}: {counts(found)}", table(found))
    try:
        if not options.status and any(s.state == "finished" for s in found):
            from difftori.experiments.report import write_report
            from difftori.runs.records import is_finished

            # Also the runs of other sweeps in this folder, so that they do not overwrite each other's report.
            ended = [folder for folder in sorted(sweep.out.glob("*/*/seed-*")) if is_finished(folder)]
            print(write_report(ended, sweep.out / "report", title=sweep.out.name).page)
    finally:
        report_failures(failures)


def _report(words: list[str]) -> None:
    from difftori.arguments import ReportArguments, read_arguments

    options = read_arguments(ReportArguments, words, "report", positional="runs")
    from difftori.experiments.report import write_report

    only = options.runs[0] if len(options.runs) == 1 and options.runs[0].is_dir() else None
    out = options.out or (Path("report") if only is None else only / "report")
    given = {"title": options.title, "reference": options.reference, "evaluation": options.evaluation}
    report = write_report(options.runs, out, **given)
    from rich.console import Console

    from difftori.experiments.tables import screen_table

    console = Console()
    for tables in report.tables:
        for caption, columns in tables.items():
            console.print(screen_table(caption, columns))
    console.print(f"{report.page}", soft_wrap=True, highlight=False)


def _study(words: list[str]) -> None:
    """Run a study of this package, or your own module, named with a dot."""
    from difftori.experiments.modules import run_module

    run_module("study", "difftori.experiments.paper", words)


def _bench(words: list[str]) -> None:
    """Run a benchmark of the source checkout, or your own module, named with a dot."""
    from difftori.experiments.modules import run_module
    from difftori.registry import source_checkout

    if not words or "." not in words[0]:
        sys.path.insert(0, str(source_checkout()))
    run_module("bench", "benchmarks", words)


def _exit_code(error: Exception, code: int) -> int:
    """Return the exit code. With DIFFTORI_DEBUG=1, raise the error instead, to show the traceback."""
    if os.environ.get("DIFFTORI_DEBUG") == "1":
        raise error
    return code


if __name__ == "__main__":
    sys.exit(main())

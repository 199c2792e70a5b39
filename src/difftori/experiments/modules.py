"""Studies and benchmarks as commands: modules with a `Config` and a function `run(config)`."""

from collections.abc import Mapping
from types import ModuleType

import tyro

from difftori.errors import ConfigError
from difftori.registry import find_module, module_names, suggest
from difftori.terminal import print_table


def run_module(kind: str, package: str, words: list[str]) -> None:
    """Run the module named by the first word with the options that follow, the fields of its `Config`, and print the rows it returns.

    `kind` is the command, `study` or `bench`. The module is part of `package`, or your own, named with a dot. Raises ConfigError
    without a name, or for a name that is unknown.
    """
    if not words or words[0] in ("--help", "-h"):
        print(_usage(kind, package))
        if not words:
            raise ConfigError([f"{kind}: a name is missing. Fix: give one of the names above"])
        return
    known = module_names(package)
    if "." not in words[0] and words[0].replace("_", "-") not in known:
        raise ConfigError([f"{words[0]!r} is not a {kind}{suggest(words[0], _runnable(kind, package))}"])
    module = find_module(words[0], package, kind)
    if not _is_runnable(module):
        raise ConfigError(
            [
                f"{words[0]!r} is not a {kind}: {module.__name__} has no Config and run(config). "
                f"Fix: define both, or choose a name of `difftori {kind} --help`"
            ]
        )
    prog = f"difftori {kind} {words[0]}"
    config = tyro.cli(vars(module)["Config"], prog=prog, description=module.__doc__, args=words[1:])
    rows = vars(module)["run"](config)
    if isinstance(rows, Mapping):
        rows = [{"": name, "value": value} for name, value in rows.items()]
    if rows:
        print_table(f"{kind} {words[0]}", rows)


def _usage(kind: str, package: str) -> str:
    does = {"study": "Reproduce a table or figure of the paper.", "bench": "Measure speed and precision."}[kind]
    return (
        f"usage: difftori {kind} NAME [OPTIONS]\n\n{does} `difftori {kind} NAME --help` lists the options.\n\n"
        f"names: {', '.join(_runnable(kind, package)) or 'none yet'}"
    )


def _runnable(kind: str, package: str) -> list[str]:
    """The names of the runnable modules of a package, sorted."""
    return sorted(name for name in module_names(package) if _is_runnable(find_module(name, package, kind)))


def _is_runnable(module: ModuleType) -> bool:
    return "Config" in vars(module) and callable(vars(module).get("run"))

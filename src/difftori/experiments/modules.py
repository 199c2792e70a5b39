"""Studies and benchmarks as commands: modules with a pydantic model `Config` and a function `run(config)`."""

from collections.abc import Mapping
from types import ModuleType

from pydantic import BaseModel

from difftori.arguments import read_arguments
from difftori.errors import ConfigError
from difftori.registry import find_module, module_names, suggest
from difftori.terminal import first_sentence, option_list, paragraphs, print_table


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
                f"{words[0]!r} is not a {kind}: {module.__name__} has no pydantic model Config and run(config). "
                f"Fix: define both, or choose a name of `difftori {kind} --help`"
            ]
        )
    config = read_arguments(vars(module)["Config"], words[1:], f"{kind} {words[0]}", about=module.__doc__)
    rows = vars(module)["run"](config)
    if isinstance(rows, Mapping):
        rows = [{"": name, "value": value} for name, value in rows.items()]
    if rows:
        print_table(f"{kind} {words[0]}", rows)


def _usage(kind: str, package: str) -> str:
    does = {"study": "Reproduce a table or figure of the paper.", "bench": "Measure speed and precision."}[kind]
    rows = [(name, first_sentence(module.__doc__)) for name, module in _runnable(kind, package).items()]
    return (
        f"usage: difftori {kind} NAME [OPTIONS]\n\n"
        + paragraphs(f"{does} `difftori {kind} NAME --help` lists the options.")
        + f"\n\n{option_list('names', rows)}"
    )


def _runnable(kind: str, package: str) -> dict[str, ModuleType]:
    """The runnable modules of a package by their names, sorted."""
    found = {name: find_module(name, package, kind) for name in sorted(module_names(package))}
    return {name: module for name, module in found.items() if _is_runnable(module)}


def _is_runnable(module: ModuleType) -> bool:
    config = vars(module).get("Config")
    return isinstance(config, type) and issubclass(config, BaseModel) and callable(vars(module).get("run"))

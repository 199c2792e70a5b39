"""Finds what a name means: policies, environments and studies of this package, or `my_pkg.my_module:Name` of a user's own.

Nothing is registered. A component is found because its file lies in the package that is walked.
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from difftori.errors import ConfigError

if TYPE_CHECKING:
    from difftori.envs.checked import CheckedVectorEnv
    from difftori.envs.demonstrator import Demonstrator
    from difftori.interfaces import Agent, Policy


Component = TypeVar("Component")


def suggest(word: str, known: Iterable[str], written: Mapping[str, str] | None = None) -> str:
    """The end of an error message: the nearest known name, or all of them when none is near.

    `written` says how to write some of the names, where that is not the name itself.
    """
    names = sorted(known)
    shown = {name: name for name in names} | dict(written or {})
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; perhaps you meant {shown[near[0]]!r}"
    return f"; known: {', '.join(shown[name] for name in names)}" if names else "; none is known"


def module_names(package: str) -> dict[str, str]:
    """Short name to full name of every module of a package, without importing them; empty if there is no package.

    Names that begin with an underscore are private helpers and are left out. An underscore inside a name is written
    as a hyphen: `solver_speed.py` is `solver-speed`.
    """
    if importlib.util.find_spec(package) is None:
        return {}
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return {m.name.replace("_", "-"): f"{package}.{m.name}" for m in found if not m.name.startswith("_")}


def source_checkout() -> Path:
    """The source checkout: the one that this package is imported from, or the current directory or one of its parents.

    Raises ConfigError if there is none: an installed package has no benchmarks.
    """
    here = Path.cwd()
    for folder in (Path(__file__).parents[2], here, *here.parents):
        if (folder / "src" / "difftori").is_dir() and (folder / "benchmarks" / "__init__.py").is_file():
            return folder
    raise ConfigError(
        [
            "bench: the benchmarks are in the source checkout, not in the installed package. "
            "Fix: run the command in a checkout, or name a module of your own: difftori bench my_pkg.my_bench"
        ]
    )


def find_module(name: str, package: str, kind: str) -> ModuleType:
    """The module that `name` means: one of `package`, or, with a dot in the name, a user's own.

    Raises ConfigError with a suggestion if there is none.
    """
    if "." in name:
        return _import(name)
    known = module_names(package)
    full = known.get(name.replace("_", "-"))
    if full is None:
        raise ConfigError([f"{name!r} is not a {kind}{suggest(name, known)}"])
    return importlib.import_module(full)


def load(reference: str) -> object:
    """What `my_pkg.my_module:Name` refers to. Raises ConfigError if the module or the name in it does not exist."""
    module_name, _, attribute = reference.partition(":")
    names = vars(_import(module_name))
    if attribute not in names:
        public = [n for n in names if not n.startswith("_")]
        raise ConfigError([f"{reference!r}: {module_name} has no {attribute!r}{suggest(attribute, public)}"])
    return names[attribute]


def make_env(name: str, *, num_envs: int, seed: int, **options: object) -> "CheckedVectorEnv":
    """The environment to learn from that `name` means, checked: NaN, out-of-range actions, failures (see the class).

    `dmc:cheetah-run`, `gym:Pendulum-v1`, `probe:two-step`: a module of `difftori.envs` and what its `make` calls a
    task. `my_pkg.my_env:make`: a function of one's own, `make(task, *, num_envs, seed, ...) -> VectorEnv`, which gets
    the task "". `options` (obs, action_repeat, render, workers, …) are those that this `make` has. Raises `ConfigError`
    for an unknown name or option, and what `make` raises.
    """
    from gymnasium.vector import VectorEnv

    from difftori.envs.checked import CheckedVectorEnv

    make, task = find_env(name)
    known = env_options(name)
    faults = [
        f"env: {name!r} takes no option {option!r}{suggest(option, known)}" for option in set(options) - set(known)
    ]
    if faults:
        raise ConfigError(faults)

    def build() -> VectorEnv:
        env = make(task, num_envs=num_envs, seed=seed, **options)
        if not isinstance(env, VectorEnv):
            raise ConfigError([f"env: {name!r} made a {type(env).__name__}, not a gymnasium.vector.VectorEnv"])
        return env

    env = build()
    return env if isinstance(env, CheckedVectorEnv) else CheckedVectorEnv(env, build, name=name, seed=seed)


def env_options(name: str) -> list[str]:
    """The keyword options of an environment's `make`."""
    make, _ = find_env(name)
    return [p.name for p in inspect.signature(make).parameters.values() if p.kind is p.KEYWORD_ONLY]


def find_env(name: str) -> tuple[Callable[..., object], str]:
    """The function that makes an environment of that name, and the task to give it; ConfigError if there is none.

    A module whose tasks are a list says by a function `full_name(task)` which one is meant, or raises ConfigError.
    """
    prefix, _, task = name.partition(":")
    if "." in prefix:
        maker = load(name)
        if not callable(maker):
            raise ConfigError([f"env: {name!r} is a {type(maker).__name__}, not a function that makes an environment"])
        return maker, ""
    modules = _env_modules()
    makers = {short: members["make"] for short, members in modules.items() if "make" in members}
    if prefix not in makers:
        raise ConfigError([f"env: {name!r} is unknown{_suggest_env(prefix, makers)} (or give my_pkg.my_env:make)"])
    if "full_name" in modules[prefix]:
        modules[prefix]["full_name"](task)
    return makers[prefix], task


def find_demonstrator(name: str) -> tuple[Callable[..., "Demonstrator"], str, str]:
    """The function that makes an expert with its environment, the task to give it, and the name written in full.

    `metaworld:assembly`, or `my_pkg.my_env:demonstrator`, a function as `difftori.envs.demonstrator` describes it.
    ConfigError if there is none, or the environment has no expert.
    """
    prefix, _, task = name.partition(":")
    if "." in prefix:
        maker = load(name)
        if not callable(maker):
            raise ConfigError([f"env: {name!r} is a {type(maker).__name__}, not a function that makes a demonstrator"])
        return cast(Callable[..., "Demonstrator"], maker), "", name
    modules = _env_modules()
    offering = {short: members["demonstrator"] for short, members in modules.items() if "demonstrator" in members}
    if prefix not in offering:
        known = ", ".join(f"{short}:…" for short in offering)
        if "make" in modules.get(prefix, {}):
            raise ConfigError([f"env: {name!r} has no scripted expert; these have: {known}"])
        own = "(or give my_pkg.my_env:demonstrator)"
        raise ConfigError([f"env: {name!r} is unknown{_suggest_env(prefix, offering)} {own}"])
    full = modules[prefix]["full_name"](task) if "full_name" in modules[prefix] else task
    return offering[prefix], full, f"{prefix}:{full}"


def _env_modules() -> dict[str, dict[str, Any]]:
    """What the modules of `difftori.envs` define, by their short names."""
    return {short: vars(importlib.import_module(full)) for short, full in module_names("difftori.envs").items()}


def _suggest_env(prefix: str, known: Iterable[str]) -> str:
    names = list(known)
    return suggest(prefix, names, {short: f"{short}:…" for short in names})


def find_policy(name: str) -> type["Policy"]:
    """The policy of that name, or the one that `my_pkg.my_policy:MyPolicy` refers to; ConfigError if there is none."""
    from difftori.interfaces import Policy
    from difftori.policies import find_policies

    return _find(name, Policy, find_policies)


def find_agent(name: str) -> type["Agent"]:
    """The agent of that name, or the one that `my_pkg.my_agent:MyAgent` refers to; ConfigError if there is none."""
    from difftori.agents import find_agents
    from difftori.interfaces import Agent

    return _find(name, Agent, find_agents)


def _find(name: str, base: type[Component], known: Callable[[], dict[str, type[Component]]]) -> type[Component]:
    """A class of this library by its name, or a user's own by reference."""
    kind = base.__name__.lower()
    if ":" in name:
        member = load(name)
        if not inspect.isclass(member) or not issubclass(member, base) or inspect.isabstract(member):
            raise ConfigError([f"{kind}: {name!r} is not a concrete difftori.interfaces.{base.__name__}"])
        return member
    found = known()
    if name not in found:
        own = f"my_pkg.my_{kind}:My{base.__name__}"
        raise ConfigError([f"{kind}: {name!r} is unknown{suggest(name, found)} (or give {own})"])
    return found[name]


def _import(name: str) -> ModuleType:
    """A module by its full name; an absent one is a ConfigError, a fault inside it stays what it is."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError([f"{name!r} is not the name of a module"])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(missing + "."):
            raise
        raise ConfigError(
            [f"there is no module {missing!r} to import {name!r} from; is its folder on sys.path?"]
        ) from error

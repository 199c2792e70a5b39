"""Resolves names: policies, agents, environments and studies of this package, or `my_pkg.my_module:Name` in your own code.

There is no registration. A component is found because its file is in the package that is searched.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from difftori.errors import ConfigError, suggest

if TYPE_CHECKING:
    from difftori.envs.checked import CheckedVectorEnv
    from difftori.envs.family import EnvFamily, ResolvedEnv
    from difftori.interfaces import Agent, Policy


Component = TypeVar("Component")


def module_names(package: str) -> dict[str, str]:
    """Map the short name of every module of a package to its full name, without importing it; empty if the package does not exist.

    Modules whose names begin with an underscore are private and are omitted. Underscores inside a name become hyphens:
    `solver_speed.py` is `solver-speed`.
    """
    if importlib.util.find_spec(package) is None:
        return {}
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return {m.name.replace("_", "-"): f"{package}.{m.name}" for m in found if not m.name.startswith("_")}


def source_checkout() -> Path:
    """Return the source checkout: the one that this package is imported from, or the working directory or one of its parents.

    Raises ConfigError if there is none, because the installed package does not contain the benchmarks.
    """
    here = Path.cwd()
    for folder in (Path(__file__).parents[2], here, *here.parents):
        if (folder / "src" / "difftori").is_dir() and (folder / "benchmarks" / "__init__.py").is_file():
            return folder
    raise ConfigError(
        [
            "bench: the benchmarks are in the source checkout, not in the installed package. "
            "Fix: run the command in a checkout, or name your own module: difftori bench my_pkg.my_bench"
        ]
    )


def find_module(name: str, package: str, kind: str) -> ModuleType:
    """Import and return a module by its name: one of `package`, or your own if the name has a dot.

    Raises ConfigError, with a suggestion, if the name is unknown.
    """
    if "." in name:
        return _import(name)
    known = module_names(package)
    full = known.get(name.replace("_", "-"))
    if full is None:
        raise ConfigError([f"{name!r} is not a {kind}{suggest(name, known)}"])
    return importlib.import_module(full)


def load(reference: str) -> object:
    """Return the object that `my_pkg.my_module:Name` refers to. Raises ConfigError if the module or the name does not exist."""
    module_name, _, attribute = reference.partition(":")
    names = vars(_import(module_name))
    if attribute not in names:
        public = [n for n in names if not n.startswith("_")]
        raise ConfigError([f"{reference!r}: {module_name} has no {attribute!r}{suggest(attribute, public)}"])
    return names[attribute]


def make_env(name: str, *, num_envs: int, seed: int, **options: Any) -> "CheckedVectorEnv":
    """Create `num_envs` checked copies of the environment that `name` refers to (see `resolve_env`).

    `options` are those of `difftori.envs.family.ResolvedEnv.make` (workers, timeout, restarts, unit_actions) and of the
    environment's builder (obs, action_repeat, …). Raises `ConfigError` for an unknown name or option, and the errors of the
    builder.
    """
    return resolve_env(name).make(num_envs=num_envs, seed=seed, **options)


def resolve_env(name: str) -> "ResolvedEnv":
    """Return the environment family and task that `name` refers to. Raises `ConfigError` if the name is unknown.

    `dmc:cheetah-run`, `gym:Pendulum-v1`, `pusht`: a module of `difftori.envs` and one of its tasks (default: the first).
    `my_module:MyEnv`: a name in your own module: an `EnvFamily`, a `gymnasium.Env` class, or a function that builds an
    environment. `my_module:MyEnv:task` selects its task.
    """
    from difftori.envs.family import ResolvedEnv, family_of

    prefix, _, rest = name.partition(":")
    family = _built_in_family(prefix)
    if family is not None:
        task = family.task_name(rest, env=prefix)
        return ResolvedEnv(f"{prefix}:{task}", family, task)
    member, _, task = rest.partition(":")
    if not member.isidentifier() or not ("." in prefix or _importable(prefix)):
        written = {known: f"{known}:…" for known in env_families()}
        raise ConfigError(
            [
                f"env: {name!r} is unknown{suggest(prefix, written, written)} (or give your own environment, my_module:MyEnv)"
            ]
        )
    reference = f"{prefix}:{member}"
    family = family_of(load(reference), reference)
    task = family.task_name(task, env=reference)
    return ResolvedEnv(f"{reference}:{task}" if task else reference, family, task)


def env_families() -> "dict[str, EnvFamily]":
    """Return all environment families of `difftori.envs`, by the names of their modules."""
    found = {name: _built_in_family(name) for name in module_names("difftori.envs")}
    return {name: family for name, family in found.items() if family is not None}


def _built_in_family(name: str) -> "EnvFamily | None":
    """Return the `FAMILY` of a module of `difftori.envs`; None if the module does not exist or defines none."""
    module = module_names("difftori.envs").get(name)
    return None if module is None else vars(importlib.import_module(module)).get("FAMILY")


def _importable(module: str) -> bool:
    """Return whether a top-level module has this name."""
    return module.isidentifier() and (module in sys.modules or importlib.util.find_spec(module) is not None)


@cache
def find_policies() -> dict[str, type]:
    """Return all concrete policies of this library by their names. Raises `ConfigError` if two share a name."""
    from difftori.interfaces import Policy

    return concrete_members("difftori.policies", Policy)


@cache
def find_agents() -> dict[str, type]:
    """Return all concrete agents of this library by their names. Raises `ConfigError` if two share a name."""
    from difftori.interfaces import Agent

    return concrete_members("difftori.agents", Agent)


def find_policy(name: str) -> type["Policy"]:
    """Return the policy class of that name, or the one that `my_pkg.my_policy:MyPolicy` refers to. Raises ConfigError if there is none."""
    from difftori.interfaces import Policy

    return _find(name, Policy, find_policies())


def find_agent(name: str) -> type["Agent"]:
    """Return the agent class of that name, or the one that `my_pkg.my_agent:MyAgent` refers to. Raises ConfigError if there is none."""
    from difftori.interfaces import Agent

    return _find(name, Agent, find_agents())


def _find(name: str, base: type[Component], known: dict[str, type]) -> type[Component]:
    """Return a class of this library by its name, or your own class by reference."""
    kind = base.__name__.lower()
    if ":" in name:
        member = load(name)
        if not inspect.isclass(member) or not issubclass(member, base) or inspect.isabstract(member):
            raise ConfigError(
                [
                    f"{kind}: {name!r} is not a concrete subclass of difftori.interfaces.{base.__name__}. "
                    "Fix: derive it from that class and define its abstract methods"
                ]
            )
        return member
    if name not in known:
        own = f"my_pkg.my_{kind}:My{base.__name__}"
        raise ConfigError([f"{kind}: {name!r} is unknown{suggest(name, known)} (or give {own})"])
    return known[name]


def concrete_members(package: str, base: Any) -> dict[str, Any]:
    """Return every concrete subclass of `base`, `Policy` or `Agent`, that a module of the package defines, by its `name`.

    Modules whose names begin with an underscore are private and are omitted. Raises `ConfigError` if two classes share a name.
    """
    found: dict[str, Any] = {}
    for entry in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if entry.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package}.{entry.name}")
        for member in vars(module).values():
            own = inspect.isclass(member) and member.__module__ == module.__name__
            if not own or not issubclass(member, base) or inspect.isabstract(member):
                continue
            name = vars(member)["name"]
            if name in found:
                raise ConfigError([f"two classes are named {name!r}: {found[name]} and {member}. Fix: rename one"])
            found[name] = member
    return found


def _import(name: str) -> ModuleType:
    """Import a module by its full name. Raises ConfigError if it does not exist; an error inside the module propagates."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError([f"{name!r} is not the name of a module. Fix: write my_pkg.my_module"])
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(missing + "."):
            raise
        raise ConfigError(
            [f"{name!r}: no module {missing!r}. Fix: run the command in its folder, or add the folder to PYTHONPATH"]
        ) from error

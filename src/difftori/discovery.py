"""Finds the components of a package, one file each. Nothing is registered."""

from importlib import import_module
from inspect import isabstract, isclass
from pkgutil import iter_modules
from typing import TypeVar

from difftori.errors import ConfigError
from difftori.interfaces import Agent, Policy

Component = TypeVar("Component", bound=Policy | Agent)


def concrete_members(package: str, base: type[Component]) -> dict[str, type[Component]]:
    """Return every concrete subclass of `base` that a module of the package defines, by its `name`.

    Modules whose names begin with an underscore are private and are omitted. Raises `ConfigError` if two classes share a name.
    """
    found: dict[str, type[Component]] = {}
    for entry in iter_modules(import_module(package).__path__):
        if entry.name.startswith("_"):
            continue
        module = import_module(f"{package}.{entry.name}")
        for member in vars(module).values():
            own = isclass(member) and member.__module__ == module.__name__
            if not own or not issubclass(member, base) or isabstract(member):
                continue
            if member.name in found:
                raise ConfigError(
                    [f"two classes are named {member.name!r}: {found[member.name]} and {member}. Fix: rename one"]
                )
            found[member.name] = member
    return found

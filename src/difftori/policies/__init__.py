"""Imitation policies: one file each, found by walking this package."""

from importlib import import_module
from inspect import isabstract, isclass
from pkgutil import iter_modules

from difftori.errors import ConfigError
from difftori.interfaces import Policy


def find_policies() -> dict[str, type[Policy]]:
    """Every concrete policy of this package by its `name`; `ConfigError` if two share one."""
    found: dict[str, type[Policy]] = {}
    for entry in iter_modules(__path__):
        module = import_module(f"{__name__}.{entry.name}")
        for member in vars(module).values():
            own = isclass(member) and member.__module__ == module.__name__
            if not own or not issubclass(member, Policy) or isabstract(member):
                continue
            if member.name in found:
                raise ConfigError(
                    [f"two policies are named {member.name!r}: {found[member.name]} and {member}; rename one"]
                )
            found[member.name] = member
    return found

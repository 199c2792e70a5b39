"""Agents of reinforcement learning: one file each, found by walking this package."""

from importlib import import_module
from inspect import isabstract, isclass
from pkgutil import iter_modules

from difftori.interfaces import Agent


def find_agents() -> dict[str, type[Agent]]:
    """Every concrete agent of this package by its `name`."""
    found: dict[str, type[Agent]] = {}
    for entry in iter_modules(__path__):
        if entry.name.startswith("_"):
            continue
        module = import_module(f"{__name__}.{entry.name}")
        for member in vars(module).values():
            own = isclass(member) and member.__module__ == module.__name__
            if own and issubclass(member, Agent) and not isabstract(member):
                found[member.name] = member
    return found

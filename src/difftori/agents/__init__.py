"""Agents of reinforcement learning, one file each, found by walking this package."""

from difftori.discovery import concrete_members
from difftori.interfaces import Agent


def find_agents() -> dict[str, type[Agent]]:
    """All concrete agents of this package, by `name`. Raises ConfigError if two have the same name."""
    return concrete_members(__name__, Agent)

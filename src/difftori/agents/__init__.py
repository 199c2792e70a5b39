"""Agents of reinforcement learning: one file each, found by walking this package."""

from difftori.discovery import concrete_members
from difftori.interfaces import Agent


def find_agents() -> dict[str, type[Agent]]:
    """Every concrete agent of this package by its `name`; `ConfigError` if two share one."""
    return concrete_members(__name__, Agent)

"""Imitation policies: one file each, found by walking this package."""

from difftori.discovery import concrete_members
from difftori.interfaces import Policy


def find_policies() -> dict[str, type[Policy]]:
    """Every concrete policy of this package by its `name`; `ConfigError` if two share one."""
    return concrete_members(__name__, Policy)

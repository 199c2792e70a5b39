"""Imitation policies, one file each. A policy is found because its file is in this package."""

from difftori.discovery import concrete_members
from difftori.interfaces import Policy


def find_policies() -> dict[str, type[Policy]]:
    """Return all concrete policies of this package by their names. Raises `ConfigError` if two share a name."""
    return concrete_members(__name__, Policy)

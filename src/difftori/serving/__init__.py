"""A policy over the network: `difftori serve RUN`, and `Client` for the process of a robot, which needs no torch."""

from difftori.serving.client import Client

__all__ = ["Client"]

"""Environments, one file each. Every environment file defines `FAMILY`, see `difftori.envs.family`."""

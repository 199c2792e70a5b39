"""Environments: one file each, offering what `difftori.envs.base` names."""

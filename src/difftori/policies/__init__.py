"""Imitation policies, one file each. A policy is found because its file is in this package."""

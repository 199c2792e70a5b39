"""Agents of reinforcement learning, one file each. An agent is found because its file is in this package."""

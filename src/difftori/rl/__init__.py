"""Reinforcement learning: collect, update, evaluate."""

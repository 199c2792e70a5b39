"""Imitation learning: tasks, training, refinement."""

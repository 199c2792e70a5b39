"""Measurements side by side: how fast and how right, against the baselines where they are installed."""

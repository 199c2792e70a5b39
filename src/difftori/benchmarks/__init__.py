"""Measurements side by side: how fast and how right, against the peers where they are installed."""

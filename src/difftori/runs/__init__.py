"""The directory of a run: configuration, checkpoints, metrics, locks, signals and report."""

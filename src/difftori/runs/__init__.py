"""One run's directory: configuration, checkpoints, metrics, locks, signals, its page."""

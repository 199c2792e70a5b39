"""Benchmarks of speed and precision, compared with the baselines if they are installed."""

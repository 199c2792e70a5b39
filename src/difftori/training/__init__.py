"""Training: the loops, and the run machinery (directory, log, checkpoints, report) that they share."""

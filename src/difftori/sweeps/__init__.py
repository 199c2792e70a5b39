"""Many runs: processes on this machine, on a Ray cluster, on Slurm."""

"""Publishing a trained policy or agent together with its evidence: `difftori publish`."""

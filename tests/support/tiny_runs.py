"""Runs that train in a second or two."""

from pathlib import Path

from tiny_env.reach import ENV, write_demos

from difftori.trainers import read_options

BC = {"hidden": "16", "epochs": "2", "eval-episodes": "2"}
"""A policy that trains in a second."""
PLANNER = {
    "env": "gym:Pendulum-v1",
    "steps": "70",
    "max-episode-steps": "40",
    "seed-steps": "50",
    "eval-episodes": "1",
    "horizon": "1",
    "width": "16",
    "latent-dim": "4",
    "batch-size": "8",
    "action-repeat": "1",
    "updates-per-step": "0.05",
}
"""An agent that plans: `tdmpc` or `difftori`."""
AGENT = PLANNER | {"init-std": "0", "plan-steps": "1"}
"""`difftori`."""


def trained(name: str, out: Path, **options: str) -> Path:
    """The run directory, after training."""
    trainer, config = read_options(name, {}, {key.replace("-", "_"): [value] for key, value in options.items()})
    trainer.train(config, out, progress=False)
    return out


def policy_run(folder: Path, **options: str) -> Path:
    """A policy that was trained from demonstrations of `tiny_env.reach`."""
    demos = write_demos(folder / "demos.zarr")
    return trained("bc", folder / "run", env=ENV, demos=demos, **BC | options)


def agent_run(folder: Path) -> Path:
    """An agent that was trained on the pendulum."""
    return trained("difftori", folder / "run", **AGENT)

"""The weights of an imitation run: written at the end of training, and loaded for inference or as a base policy."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

from difftori.errors import CheckpointError, ConfigError
from difftori.il.config import TrainConfig, parse_config
from difftori.il.learner import Learner
from difftori.policies.normalized import NormalizedPolicy
from difftori.runs.checkpoint import State, check_finite, read_weights, write_weights
from difftori.runs.records import read_config
from difftori.types import TaskSpec

Which: TypeAlias = Literal["best", "last"]
"""Weights of a run: those with the least validation error, or those of the last update."""


def default_weights(config: TrainConfig) -> Which:
    """Return the weights to act with: `last` for runs with `demos`, because few episodes are held out, otherwise `best`."""
    return "best" if config.demos is None else "last"


def write_policy(out: Path, config: TrainConfig, learner: Learner, spec: TaskSpec) -> None:
    """Write `policy.pt` and its sha256: the best and the last weights, and everything needed to build the policy.

    A refiner's file includes its base policy, so that it does not depend on the base's run.
    """
    weights = {"policy": learner.acting.policy.state_dict(), "best": learner.best}
    base = read_weights(out / "base.pt") if config.base is not None else None
    plain = config.model_dump(mode="json")
    write_weights(out / "policy.pt", {"learner": weights, "spec": asdict(spec), "config": plain, "base": base})


def load_policy(
    run_dir: Path, which: Which | None = None, *, device: str = "cpu", changes: Mapping[str, Any] | None = None
) -> tuple[NormalizedPolicy, TrainConfig]:
    """Load the policy of a run, for inference on `device`. Returns it with the run's configuration (with that device, and `changes`).

    `which`: the weights (default: `last` for runs with `demos`, otherwise `best`). For an unfinished run, the weights are
    those of its newest valid checkpoint. The environment need not be installed. Raises ConfigError if `run_dir` is not a run, its
    policy is unknown, or `which` is `best` and nothing was held out, CheckpointError if the weights are missing or damaged, and
    NonFiniteError if they have NaN or Inf.
    """
    stored = read_config(run_dir)
    if stored.get("data_seed") is None:  # another seed changes the evaluation, not what was held out
        stored["data_seed"] = stored.get("seed")
    config = parse_config({**stored, "device": device, **(changes or {})}, check_env=False)
    state = read_weights(run_dir / "policy.pt")
    if which == "best" and not state["learner"].get("best"):
        raise ConfigError(
            [
                "which: 'best' is not available, because the run has not been validated on held-out demonstrations. Fix: use 'last'"
            ]
        )
    if config.base is not None and "base" not in state:  # a checkpoint of an unfinished run
        state = {**state, "base": read_weights(run_dir / "base.pt")}
    return _restored(state, config, which or default_weights(config), str(run_dir)), config


def _restored(state: State, config: TrainConfig, which: Which, place: str) -> NormalizedPolicy:
    """Build a policy, with its base, from the state written by `export` or a checkpoint."""
    try:
        below = state.get("base")
        base = None if below is None else restored_base(below, config, f"{place}, base")
        policy = config.policy_type(config.settings, TaskSpec.from_plain(state["spec"]))
        learner = state["learner"]
        last = learner.get("average") or learner["policy"]
        policy.load_state_dict(learner["best"] or last if which == "best" else last)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{place}: the weights do not match {config.policy!r}: {error}. Fix: train again"
        ) from error
    check_finite(policy.state_dict(), place)
    return NormalizedPolicy(policy.to(config.device).eval(), base)


def restored_base(state: State, config: TrainConfig, place: str) -> NormalizedPolicy:
    """Build the base policy from its exported state, on the device of the run that refines it."""
    plain = {**state["config"], "device": config.device, "base": None}
    return _restored(state, parse_config(plain, check_env=False), "last", place)

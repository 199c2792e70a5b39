"""The weights of a reinforcement learning run: written during training, and loaded for inference."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from difftori.errors import CheckpointError
from difftori.interfaces import Agent
from difftori.rl.config import RLConfig, parse_rl_config
from difftori.runs.checkpoint import State, check_finite, read_weights, write_weights
from difftori.runs.records import read_config
from difftori.types import EnvSpec


def write_agent(run_dir: Path, agent: Agent, config: RLConfig, agent_steps: int) -> None:
    """Write `agent.pt` with the agent's weights and everything that `load_agent` needs to build it, and its sha256."""
    write_weights(
        run_dir / "agent.pt",
        {
            "agent": agent.state_dict(),
            "spec": spec_state(agent.spec),
            "collector": {"agent_steps": agent_steps},
            "config": config.model_dump(mode="json"),
        },
    )


def load_agent(
    run_dir: Path, *, device: str = "cpu", changes: Mapping[str, Any] | None = None
) -> tuple[Agent, RLConfig, int]:
    """Load the agent of a run on `device`. Returns the agent, its configuration (with `changes`), and its number of agent steps.

    For an unfinished run, the weights of its newest valid checkpoint are loaded. The environment need not be installed.
    Raises CheckpointError for missing or damaged weights, and NonFiniteError for NaN or Inf.
    """
    config = parse_rl_config({**read_config(run_dir), "device": device, **(changes or {})}, check_env=False)
    state = read_weights(run_dir / "agent.pt")
    agent = config.agent_type(config.settings, spec_from(state["spec"])).to(device)
    agent.compiles = config.compile
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError as error:
        raise CheckpointError(f"{run_dir}: its weights do not fit {config.agent!r}: {error}") from error
    check_finite(agent.state_dict(), str(run_dir))
    counts = state["collector"]
    steps = counts["agent_steps"] if "agent_steps" in counts else counts["decisions"]  # the earlier name
    return agent.eval(), config, int(steps)


def spec_state(spec: EnvSpec) -> State:
    """Convert a specification to plain values."""
    return {**asdict(spec), "obs_shape": list(spec.obs_shape)}


def spec_from(state: State) -> EnvSpec:
    """Restore a specification from the output of `spec_state`."""
    parts = state.get("flattened")
    if parts is not None:
        parts = tuple((str(name), tuple(shape)) for name, shape in parts)
    return EnvSpec(**{**state, "obs_shape": tuple(state["obs_shape"]), "flattened": parts})

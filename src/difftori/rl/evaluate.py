"""Evaluate an agent during training, and from a run directory."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from difftori.envs.base import EnvironmentRestarted
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.video import record, write_gif
from difftori.errors import CheckpointError
from difftori.interfaces import Agent, Memory
from difftori.rl.collector import ActInEnvs, EvalResult, episode_seed, evaluate
from difftori.rl.config import RLConfig, parse_rl_config
from difftori.runs.checkpoint import State, read_weights, write_weights
from difftori.runs.records import read_config
from difftori.runs.run import seeded
from difftori.types import Actions, EnvSpec, Metrics, Observations, RowFlags

_ROWS = 10


def open_evaluation(config: RLConfig, episodes: int) -> CheckedVectorEnv:
    """Open the environments to evaluate this many episodes, at most ten at once."""
    return config.open_env(min(_ROWS, episodes))


def evaluate_agent(
    agent: Agent, env: CheckedVectorEnv, config: RLConfig, agent_steps: int, episodes: int | None = None
) -> EvalResult:
    """Run episodes on the evaluation seeds, without exploration. The same call gives the same numbers."""
    discount = getattr(agent.config, "discount", 0.99)
    while True:  # until an evaluation finishes without a failure, or the restarts are used up
        act = _deterministic(agent, config, agent_steps)
        try:
            return evaluate(env, act, seed=config.seed, episodes=episodes or config.eval_episodes, discount=discount)
        except EnvironmentRestarted:
            continue


def _deterministic(agent: Agent, config: RLConfig, agent_steps: int) -> ActInEnvs:
    """The agent without exploration, with its own generator for evaluation."""
    generator = seeded(config.seed, "evaluation", config.device)

    def act(obs: Observations, memory: Memory | None, first: RowFlags) -> tuple[Actions, Memory]:
        return agent.act(
            obs.to(config.device),
            memory,
            first=first.to(config.device),
            step=agent_steps,
            explore=False,
            generator=generator,
        )

    return act


def eval_metrics(result: EvalResult) -> Metrics:
    """Mean and standard deviation of the returns of evaluation episodes."""
    return {
        "eval/return": float(result.returns.mean()),
        "eval/return_std": float(result.returns.std()),
        "eval/length": float(result.lengths.mean()),
        "eval/episodes": float(len(result.returns)),
    }


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


def load_agent(run_dir: Path, *, device: str = "cpu") -> tuple[Agent, RLConfig, int]:
    """Load the agent of a run on `device`. Returns the agent, its configuration, and its number of agent steps.

    For an unfinished run, the weights of its newest valid checkpoint are loaded.
    """
    config = parse_rl_config({**read_config(run_dir), "device": device})
    state = read_weights(run_dir / "agent.pt")
    agent = config.agent_type(config.settings, spec_from(state["spec"])).to(device)
    agent.compiles = config.compile
    try:
        agent.load_state_dict(state["agent"])
    except RuntimeError as error:
        raise CheckpointError(f"{run_dir}: its weights do not fit {config.agent!r}: {error}") from error
    counts = state["collector"]
    return (
        agent.eval(),
        config,
        int(counts["agent_steps" if "agent_steps" in counts else "decisions"]),
    )  # the earlier name


def evaluate_run(run_dir: Path, *, episodes: int | None = None, device: str = "cpu", video: bool = False) -> Metrics:
    """Evaluate the agent of a run again on `episodes` evaluation seeds. Default: the run's `eval_episodes`.

    `video`: record the first of these episodes in the run's `media/`. Default: False.
    """
    agent, config, agent_steps = load_agent(run_dir, device=device)
    count = episodes or config.eval_episodes
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    env = open_evaluation(config, count)
    try:
        if video:
            film(agent, config, agent_steps, run_dir / "media" / "episode.gif")
        return eval_metrics(evaluate_agent(agent, env, config, agent_steps, count))
    finally:
        env.close()
        torch.set_num_threads(threads)


def film(agent: Agent, config: RLConfig, agent_steps: int, path: Path) -> None:
    """Write the first evaluation episode as a GIF. Raises RenderingError if the environment renders nothing."""
    env = config.open_env(1)
    act = _deterministic(agent, config, agent_steps)
    memory: Memory | None = None

    def step(obs: np.ndarray) -> np.ndarray:
        nonlocal memory
        first = torch.full((len(obs),), memory is None)
        actions, memory = act(torch.from_numpy(obs), memory, first)
        return actions.cpu().numpy()

    try:
        path.parent.mkdir(exist_ok=True)
        write_gif(record(env, step, seed=episode_seed(config.seed, "evaluation", 0)), path)
    finally:
        env.close()


def spec_state(spec: EnvSpec) -> State:
    """Convert a specification to plain values."""
    return {**asdict(spec), "obs_shape": list(spec.obs_shape)}


def spec_from(state: State) -> EnvSpec:
    """Restore a specification from the output of `spec_state`."""
    return EnvSpec(**{**state, "obs_shape": tuple(state["obs_shape"])})

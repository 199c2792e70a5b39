"""Evaluate an agent during training, and from a run directory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difftori.envs.base import EnvironmentRestarted, Observation, env_spec
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.video import write_video
from difftori.errors import ConfigError
from difftori.interfaces import Agent, Memory
from difftori.rl.acting import Acting
from difftori.rl.config import RLConfig
from difftori.rl.weights import load_agent
from difftori.rollout import ActInRows, episode_seed, record, run_episodes
from difftori.runs.page import keep_evaluation
from difftori.runs.progress import Progress
from difftori.runs.run import seeded
from difftori.steering import Steering
from difftori.types import EnvSpec, Metrics

_ROWS = 10


def open_evaluation(config: RLConfig, episodes: int) -> CheckedVectorEnv:
    """Open the environments to evaluate this many episodes, at most ten at once."""
    return config.open_env(min(_ROWS, episodes))


@dataclass(frozen=True)
class EvalResult:
    """Evaluation episodes: their returns (N) and lengths (N) in agent steps, and observations and actions, one entry per kept agent step.

    `success` (N): whether an episode succeeded at any step; None if the environment does not report it. `returns_to_go` is the discounted return that followed. After a time limit it is continued with the mean reward of the
    second half of the episode, because values extend beyond time limits.
    """

    returns: np.ndarray
    lengths: np.ndarray
    success: np.ndarray | None
    obs: np.ndarray
    actions: np.ndarray
    returns_to_go: np.ndarray


def evaluate_agent(
    agent: Agent,
    env: CheckedVectorEnv,
    config: RLConfig,
    agent_steps: int,
    episodes: int | None = None,
    watch: Callable[[int], None] = lambda ended: None,
) -> EvalResult:
    """Run episodes on the evaluation seeds, without exploration. The same call gives the same numbers. See `evaluate`."""
    discount = getattr(agent.config, "discount", 0.99)
    count = episodes or config.eval_episodes
    while True:  # until an evaluation finishes without a failure, or the restarts are used up
        act = _deterministic(agent, config, agent_steps)
        try:
            return evaluate(env, act, seed=config.seed, episodes=count, discount=discount, watch=watch)
        except EnvironmentRestarted:
            continue


def evaluate(
    env: CheckedVectorEnv,
    act: ActInRows,
    *,
    seed: int,
    episodes: int,
    discount: float,
    keep_every: int = 10,
    watch: Callable[[int], None] = lambda ended: None,
) -> EvalResult:
    """Run `episodes` episodes, in parallel in all copies of `env`, with seeds that depend only on `seed` and their number.

    The result has the observation, the action and the discounted return of every `keep_every`-th agent step. Truncated
    episodes contribute their first half only. `watch` is called after every agent step with the number of episodes that have
    ended; what it raises ends the evaluation.
    """
    ended = 0
    tracks: list[list[tuple[np.ndarray, np.ndarray, float]]] = [[] for _ in range(episodes)]
    terminated, success, reported = np.zeros(episodes, dtype=bool), np.zeros(episodes, dtype=bool), False
    seeds = [episode_seed(seed, "evaluation", number) for number in range(episodes)]
    for step in run_episodes(env, act, seeds):
        assert isinstance(step.obs, np.ndarray)
        reported |= step.success is not None
        for row, number in step.active():
            success[number] |= step.success is not None and bool(step.success[row])
            track = tracks[number]
            kept = step.obs[row] if len(track) % keep_every == 0 else step.obs[row][:0]
            track.append((kept, step.actions[row], float(step.rewards[row])))
            terminated[number] = step.terminated[row]
        ended += int(step.ended.sum())
        watch(ended)
    returns = np.array([sum(reward for _, _, reward in track) for track in tracks])
    records = [
        record
        for track, final in zip(tracks, terminated, strict=True)
        for record in _returns_to_go(track, bool(final), discount, keep_every)
    ]
    obs, actions, returns_to_go = (np.stack(part) for part in zip(*records, strict=True))
    lengths = np.array([len(track) for track in tracks])
    return EvalResult(returns, lengths, success if reported else None, obs, actions, returns_to_go.astype(np.float32))


class AgentInRows:
    """An agent in closed loop, without exploration: keeps its memory between steps.

    `step`: number of agent steps of its training, for schedules.
    """

    def __init__(self, agent: Agent, *, step: int, generator: torch.Generator):
        self.step = step
        self._agent, self._device = agent, generator.device
        self._acting = Acting(agent, generator, explore=False)
        self._memory: Memory | None = None
        self._rows = 0

    def __call__(
        self, obs: Observation, first: np.ndarray, active: np.ndarray, steering: Steering | None = None
    ) -> np.ndarray:
        """Return the action of each row (N A) in [−1, 1]; see `ActInRows`. `steering` is in the environment's units."""
        if self._rows != len(first):
            self._rows, self._memory = len(first), None
        inputs, projects = torch.as_tensor(np.ascontiguousarray(obs)), False
        if steering is not None:
            inputs = inputs.to(self._device)
            low, high = (
                torch.tensor(bound, device=self._device) for bound in (self._agent.spec.low, self._agent.spec.high)
            )
            steering.check(self._agent)
            projects = steering.projects(self._agent)
            steering = steering.within(lambda actions: in_units(actions, low, high), {"state": inputs})
        planning = None if projects else steering
        actions, memory = self._acting(inputs, self._memory, torch.from_numpy(first), step=self.step, steering=planning)
        if steering is not None and projects:
            actions = steering.projected(actions[:, None])[:, 0]
        found = actions.cpu().numpy()
        if np.isfinite(found).all():  # an error, also that of the caller, changes nothing of what is kept
            self._memory = memory
        return found


def in_units(actions: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Convert an agent's actions (… A) from [−1, 1] to the environment's units, with a gradient; `envs.base.rescaled` also clips."""
    return low + (actions + 1.0) * 0.5 * (high - low)


def _deterministic(agent: Agent, config: RLConfig, agent_steps: int) -> AgentInRows:
    """The agent without exploration, with its own generator for evaluation."""
    return AgentInRows(agent, step=agent_steps, generator=seeded(config.seed, "evaluation", config.device))


def eval_metrics(result: EvalResult) -> Metrics:
    """Mean and standard deviation of the returns of evaluation episodes, and the share with success at any step if it is reported."""
    success = {} if result.success is None else {"eval/success": float(result.success.mean())}
    return {
        "eval/return": float(result.returns.mean()),
        "eval/return_std": float(result.returns.std()),
        "eval/length": float(result.lengths.mean()),
        "eval/episodes": float(len(result.returns)),
        **success,
    }


def evaluate_run(
    run_dir: Path,
    *,
    episodes: int | None = None,
    device: str = "cpu",
    changes: Mapping[str, Any] | None = None,
    video: bool = False,
    progress: bool = False,
) -> Metrics:
    """Evaluate the agent of a run again on `episodes` evaluation seeds. Default: the run's `eval_episodes`.

    `changes`: entries of the run's configuration to replace, such as `env` for another environment with the same observations and actions, or
    `seed` for other episodes. `video`: record the first of these episodes in the run's `media/`. Default: False. The result is
    kept in the run's `eval.json`. Raises ConfigError if the environment does not fit the agent.
    """
    changes = dict(changes or {})
    agent, config, agent_steps = load_agent(run_dir, device=device, changes=changes)
    count = episodes or config.eval_episodes
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    env = open_evaluation(config, count)
    try:
        _check_fit(agent.spec, env_spec(env))
        with Progress(progress) as bar:
            if video:
                with bar.phase("recording the first episode"):
                    film(agent, config, agent_steps, run_dir)
            with bar.phase("evaluation: episodes", count) as phase:
                result = evaluate_agent(agent, env, config, agent_steps, count, watch=phase.update)
        columns = {"return": result.returns.tolist(), "length": result.lengths.tolist()}
        metrics = eval_metrics(result)
        keep_evaluation(run_dir, metrics, columns, {"weights": "last", "device": device, "changes": changes})
        return metrics
    finally:
        env.close()
        torch.set_num_threads(threads)


def _check_fit(trained: EnvSpec, now: EnvSpec) -> None:
    """Raise ConfigError if the observations or the actions of an environment differ from those that the agent was trained with."""
    names = ("obs_shape", "obs_dtype", "action_dim", "action_repeat")
    if faults := [
        f"env: {name} is {getattr(now, name)} in {now.name}, but the agent was trained with {getattr(trained, name)}. "
        "Fix: choose another --env, --obs or --env-options"
        for name in names
        if getattr(now, name) != getattr(trained, name)
    ]:
        raise ConfigError(faults)


def film(agent: Agent, config: RLConfig, agent_steps: int, run_dir: Path) -> Path:
    """Record the first evaluation episode in the run's `media/`. Raises RenderingError if the environment renders nothing."""
    env = config.open_env(1)
    try:
        act = _deterministic(agent, config, agent_steps)
        recording = record(env, act, seed=episode_seed(config.seed, "evaluation", 0))
    finally:
        env.close()
    return write_video(recording, run_dir / "media", "episode")


def _returns_to_go(
    track: list[tuple[np.ndarray, np.ndarray, float]], terminated: bool, discount: float, keep_every: int
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    second_half = [reward for _, _, reward in track[len(track) // 2 :]]
    endless = sum(second_half) / len(second_half) / (1 - discount) if discount < 1 else 0.0
    total, found = (0.0 if terminated else endless), []
    for index in reversed(range(len(track))):
        seen, action, reward = track[index]
        total = reward + discount * total
        if index % keep_every == 0 and (terminated or index <= len(track) // 2):
            found.append((seen, action, total))
    return found

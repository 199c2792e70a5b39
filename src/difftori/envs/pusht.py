"""Push-T (Chi et al. 2023, Diffusion Policy, arXiv 2303.04137): a disc pushes a T-shaped block onto its outline.

    state    (x, y) of the agent, (x, y) and angle of the block: pixels of a 512×512 plane, and radians in [0, 2π)
    action   where the agent is to go, −1 and 1 standing for pixels 0 and 512, at 10 Hz
    reward   coverage / 0.95, at most 1, where coverage is the share of the outline that the block covers

An episode terminates with success, which is coverage above 0.95, and is truncated after 300 steps. Both measures in use
are in `info`: `success`, and `score`, the greatest reward of the episode so far, whose mean over episodes is what
Diffusion Policy reports.

The start of seed s is that of Diffusion Policy's evaluation, whose 50 test seeds count up from `TEST_SEED`: drawn alike,
and set with its fault, position before angle, which moves the block by tens of pixels. A state that is asked for is set
rightly, so that recorded episodes can be replayed.
"""

import importlib.util
import os
import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from difftori.envs.base import (
    FrameStack,
    Observation,
    choice_fault,
    episode_metadata,
    numeric_faults,
    rescaled,
)
from difftori.envs.family import EnvFamily
from difftori.errors import ConfigError, MissingExtraError

OBSERVE = ("state", "pose", "pixels", "image")
EPISODE_STEPS = 300
TEST_SEED = 100_000
"""The first evaluation seed of Diffusion Policy."""
PLANE = 512.0
"""Pixels along a side; actions and states live in them."""
IMAGE_SIZE = 96
VIDEO = 240
FRAMES = 3
FPS = 10.0
APART = (50.0, 50.0, 256.0, 256.0, 0.0)
"""A state in which nothing touches, from which any other is set."""


class PushTEnv(gymnasium.Env[Observation, np.ndarray]):
    """One board; see the head of this file. The seed or the state of a reset and the actions determine the episode.

    `obs`: `state`, float32 (5), in pixels and radians; `pose`, the same (6) with the angle's cosine and sine; `pixels`,
    the last three images of 96×96 as uint8 (9, 96, 96); `image`, a dictionary of the last image `image` (3, 96, 96) uint8
    and the agent's position `agent_pos` (2) float32 in pixels. `max_steps`: the step after which an episode is truncated.

    Raises `ConfigError` and `MissingExtraError` (extra `pusht`).
    """

    def __init__(self, *, obs: str = "state", max_steps: int = EPISODE_STEPS):
        if faults := numeric_faults(max_steps=max_steps) + choice_fault("obs", obs, OBSERVE):
            raise ConfigError(faults)
        self._env = _board(images=obs in ("pixels", "image"))
        self._obs = obs
        self._frames = FrameStack(FRAMES)
        self._max_steps = max_steps
        self._steps, self._score, self._success = 0, 0.0, False
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)
        image = Box(0, 255, (3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        self.observation_space = {
            "state": Box(-np.inf, np.inf, (5,), np.float32),
            "pose": Box(-np.inf, np.inf, (6,), np.float32),
            "pixels": Box(0, 255, (3 * FRAMES, IMAGE_SIZE, IMAGE_SIZE), np.uint8),
            "image": Dict({"image": image, "agent_pos": Box(-np.inf, np.inf, (2,), np.float32)}),
        }[obs]
        self.render_mode = "rgb_array"
        self.metadata = episode_metadata("pusht:push-t", max_episode_steps=max_steps, action_repeat=1, fps=FPS)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """A new episode, from the seed or from `options["reset_to_state"]` (5), a state as observations give it."""
        super().reset(seed=seed)
        state = _requested_state(options)
        if state is not None:
            self._env.reset(options={"reset_to_state": np.array(APART)})
            self._place(state)
        else:
            drawn = int(self.np_random.integers(2**31)) if seed is None else seed
            self._env.reset(options={"reset_to_state": diffusion_policy_start(drawn)})
        self._steps, self._score, self._success = 0, 0.0, False
        return self._observation(self._env.get_obs(), first=True), {"success": False, "score": 0.0}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Go towards where the action (2) says, for a tenth of a second."""
        target = rescaled(action, np.zeros(2), np.full(2, PLANE))
        seen, reward, terminated, _, info = self._env.step(target)
        self._steps += 1
        self._score = max(self._score, float(reward))
        self._success = self._success or bool(info["is_success"])
        told = {"success": self._success, "score": self._score, "coverage": float(info["coverage"])}
        truncated = not terminated and self._steps >= self._max_steps
        return self._observation(seen, first=False), float(reward), bool(terminated), truncated, told

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A frame (240, 240, 3) uint8 for a film, with a red cross where the agent is to go."""
        return np.ascontiguousarray(self._env.render())

    def close(self) -> None:
        """There is nothing to free."""
        self._env.close()

    def _place(self, state: np.ndarray) -> None:
        """Set the state (5). The angle comes first: turning the block moves its position."""
        self._env.agent.position = state[:2].tolist()
        self._env.block.angle = float(state[4])
        self._env.block.position = state[2:4].tolist()
        self._env.space.step(self._env.dt)

    def _observation(self, seen: np.ndarray, *, first: bool) -> Observation:
        """What `obs` names, from what the board shows: its state (5), or an image (96, 96, 3) without the cross."""
        if self._obs == "state":
            return seen.astype(np.float32)
        if self._obs == "pose":
            return pose(seen)
        if self._obs == "pixels":
            return self._frames.restart(seen) if first else self._frames.push(seen)
        return {"image": seen.transpose(2, 0, 1), "agent_pos": np.array(self._env.agent.position, dtype=np.float32)}


def pose(state: np.ndarray) -> np.ndarray:
    """States (… 5) without the jump of the angle at 2π: (… 6) float32, the last two its cosine and sine."""
    angle = state[..., 4:5]
    return np.concatenate([state[..., :4], np.cos(angle), np.sin(angle)], -1).astype(np.float32)


def from_recorded(
    stored: dict[str, np.ndarray], actions: np.ndarray, obs: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Observations and actions (T, …) of the environment, from the arrays of Diffusion Policy's data set."""
    entries = {
        "state": lambda: {"state": stored["state"]},
        "pose": lambda: {"state": pose(stored["state"])},
        "image": lambda: {"image": stored["img"], "agent_pos": stored["state"][:, :2]},
    }[obs]()
    return entries, actions / (PLANE / 2) - 1


def diffusion_policy_start(seed: int) -> np.ndarray:
    """The state (5) that Diffusion Policy's evaluation draws from a seed, before it is set in its faulty order."""
    draw = np.random.RandomState(seed % 2**32)
    agent = [draw.randint(50, 450), draw.randint(50, 450)]
    block = [draw.randint(100, 400), draw.randint(100, 400)]
    return np.array([*agent, *block, draw.randn() * 2 * np.pi - np.pi])


FAMILY = EnvFamily(
    build=PushTEnv,
    tasks=("push-t",),
    # As in Diffusion Policy, whose data set holds these arrays.
    window=(2, 16, 8),
    recorded={"state": ("state",), "pose": ("state",), "image": ("img", "state")},
    from_recorded=from_recorded,
)


def _board(*, images: bool) -> Any:
    """gym-pusht's environment, which shows its state or images; imported without greetings."""
    if importlib.util.find_spec("gym_pusht") is None:
        raise MissingExtraError("Push-T needs the extra `pusht`: pip install 'difftori[pusht]'")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        # pygame 2.6 asks setuptools for pkg_resources, which announces its end.
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        from gym_pusht.envs.pusht import PushTEnv as Board
    return Board(
        obs_type="pixels" if images else "state",
        observation_width=IMAGE_SIZE,
        observation_height=IMAGE_SIZE,
        visualization_width=VIDEO,
        visualization_height=VIDEO,
    )


def _requested_state(options: dict[str, Any] | None) -> np.ndarray | None:
    """What `reset_to_state` asks for, (5) finite numbers, or None. `ConfigError` for anything else."""
    rest = dict(options or {})
    requested = rest.pop("reset_to_state", None)
    if rest:
        raise ConfigError([f"pusht: reset options {sorted(rest)} are unknown; there is reset_to_state"])
    if requested is None:
        return None
    try:
        state = np.asarray(requested, dtype=np.float64)
    except (TypeError, ValueError):
        state = np.empty(0)
    if state.shape != (5,) or not np.isfinite(state).all():
        raise ConfigError(
            [f"pusht: reset_to_state is {requested!r}; give five finite numbers: agent x y, block x y, angle"]
        )
    return state

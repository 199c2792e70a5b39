"""Push-T (Chi et al. 2023, Diffusion Policy, arXiv 2303.04137): a disc pushes a T-shaped block onto its outline.

    state    (x, y) of the agent, (x, y) and angle of the block: pixels of a 512×512 plane, and radians in [0, 2π)
    action   the agent's target position, ±1 for pixels 0 and 512, at 10 Hz
    reward   coverage / 0.95, at most 1; coverage is the share of the outline that the block covers

An episode terminates with success, which is coverage above 0.95, and is truncated after 300 steps. `info` has both metrics:
`success`, and `score`, the greatest reward of the episode so far. Diffusion Policy reports the mean score.

The start of seed s equals the start that Diffusion Policy's evaluation samples from s; its 50 test seeds start at
`TEST_SEED`. This includes its bug: the position is set before the angle, which moves the block by tens of pixels. A state in
`reset_to_state` is set correctly, so that recorded episodes can be replayed.
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
    as_numbers,
    choice_fault,
    episode_metadata,
    numeric_faults,
    refuse_options,
    rescaled,
)
from difftori.envs.family import EnvFamily
from difftori.errors import ConfigError, MissingExtraError

OBS_TYPES = ("state", "pose", "pixels", "image")
EPISODE_STEPS = 300
TEST_SEED = 100_000
"""The first evaluation seed of Diffusion Policy."""
PLANE = 512.0
"""Side of the plane, in pixels, the unit of actions and states."""
IMAGE_SIZE = 96
VIDEO = 240
FRAMES = 3
FPS = 10.0
APART = (50.0, 50.0, 256.0, 256.0, 0.0)
"""A state without contacts, from which any other state is set."""


class PushTEnv(gymnasium.Env[Observation, np.ndarray]):
    """Push-T, as described at the head of this file. The seed or state of the reset and the actions determine the episode.

    `obs`: `state`, float32 (5), in pixels and radians; `pose`, the same (6) with the angle's cosine and sine; `pixels`,
    the last three images of 96×96 as uint8 (9, 96, 96); `image`, a dictionary of the last image `image` (3, 96, 96) uint8
    and the agent's position `agent_pos` (2) float32 in pixels. Default: `state`. `max_steps`: the step after which an
    episode is truncated; default: 300.

    Raises `ConfigError` and `MissingExtraError` (extra `pusht`).
    """

    def __init__(self, *, obs: str = "state", max_steps: int = EPISODE_STEPS):
        if faults := numeric_faults(max_steps=max_steps) + choice_fault("obs", obs, OBS_TYPES):
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
        """Begin a new episode from the seed, or from `options["reset_to_state"]` (5), a state as in the observations."""
        super().reset(seed=seed)
        state = _requested_state(options)
        if state is not None:
            self._env.reset(options={"reset_to_state": np.array(APART)})
            self._place(state)
        else:
            start_seed = int(self.np_random.integers(2**31)) if seed is None else seed
            self._env.reset(options={"reset_to_state": diffusion_policy_start(start_seed)})
        self._steps, self._score, self._success = 0, 0.0, False
        return self._observation(self._env.get_obs(), first=True), {"success": False, "score": 0.0}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Move the agent towards the target position (2) for 0.1 s."""
        target = rescaled(action, np.zeros(2), np.full(2, PLANE))
        raw, reward, terminated, _, info = self._env.step(target)
        self._steps += 1
        self._score = max(self._score, float(reward))
        self._success = self._success or bool(info["is_success"])
        metrics = {"success": self._success, "score": self._score, "coverage": float(info["coverage"])}
        truncated = not terminated and self._steps >= self._max_steps
        return self._observation(raw, first=False), float(reward), bool(terminated), truncated, metrics

    def render(self) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Render a frame (240, 240, 3) uint8 for a video, with a red cross at the target position."""
        return np.ascontiguousarray(self._env.render())

    def close(self) -> None:
        """Close the wrapped environment."""
        self._env.close()

    def _place(self, state: np.ndarray) -> None:
        """Set the state (5). The angle is set first, because rotating the block moves its position."""
        self._env.agent.position = state[:2].tolist()
        self._env.block.angle = float(state[4])
        self._env.block.position = state[2:4].tolist()
        self._env.space.step(self._env.dt)

    def _observation(self, raw: np.ndarray, *, first: bool) -> Observation:
        """Convert gym-pusht's observation, a state (5) or an image (96, 96, 3) without the cross, to the type `obs`."""
        if self._obs == "state":
            return raw.astype(np.float32)
        if self._obs == "pose":
            return pose(raw)
        if self._obs == "pixels":
            return self._frames.restart(raw) if first else self._frames.push(raw)
        return {"image": raw.transpose(2, 0, 1), "agent_pos": np.array(self._env.agent.position, dtype=np.float32)}


def pose(state: np.ndarray) -> np.ndarray:
    """Convert states (… 5) to float32 (… 6), with the angle's cosine and sine instead of the angle, which jumps at 2π."""
    angle = state[..., 4:5]
    return np.concatenate([state[..., :4], np.cos(angle), np.sin(angle)], -1).astype(np.float32)


def from_recorded(
    stored: dict[str, np.ndarray], actions: np.ndarray, *, obs: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Convert the arrays of Diffusion Policy's data set to observations and actions (T, …) of the environment."""
    entries = {
        "state": lambda: {"state": stored["state"]},
        "pose": lambda: {"state": pose(stored["state"])},
        "image": lambda: {"image": stored["img"], "agent_pos": stored["state"][:, :2]},
    }[obs]()
    return entries, actions / (PLANE / 2) - 1


def diffusion_policy_start(seed: int) -> np.ndarray:
    """Return the state (5) that Diffusion Policy's evaluation samples from a seed, before it is set in the wrong order."""
    draw = np.random.RandomState(seed % 2**32)
    agent = [draw.randint(50, 450), draw.randint(50, 450)]
    block = [draw.randint(100, 400), draw.randint(100, 400)]
    return np.array([*agent, *block, draw.randn() * 2 * np.pi - np.pi])


FAMILY = EnvFamily(
    build=PushTEnv,
    tasks=("push-t",),
    # As in Diffusion Policy, whose data set contains these arrays.
    window=(2, 16, 8),
    recorded={"state": ("state",), "pose": ("state",), "image": ("img", "state")},
    from_recorded=from_recorded,
)


def _board(*, images: bool) -> Any:
    """Create gym-pusht's environment with state or image observations. It is imported without pygame's banner."""
    if importlib.util.find_spec("gym_pusht") is None:
        raise MissingExtraError("Push-T needs the extra `pusht`. Fix: pip install 'difftori[pusht]'")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    with warnings.catch_warnings():
        # pygame 2.6 imports pkg_resources of setuptools, which is deprecated.
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
    """Return the option `reset_to_state`, (5) finite numbers, or None. Raises `ConfigError` for other values."""
    refuse_options(options, env="pusht", known=("reset_to_state",))
    requested = (options or {}).get("reset_to_state")
    if requested is None:
        return None
    state = as_numbers(requested)
    if state.shape != (5,) or not np.isfinite(state).all():
        raise ConfigError(
            [f"pusht: reset_to_state is {requested!r}. Fix: pass five finite numbers: agent x y, block x y, angle"]
        )
    return state

"""The simulations of ManiSkill 3, with clear errors for what is missing: the extra, Vulkan, or the assets of a task."""

import importlib.util
import sys
import warnings
from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, Literal, NamedTuple, final

import numpy as np
from gymnasium.spaces import Box

from difftori.envs.base import RenderingError
from difftori.envs.maniskill_names import CABINETS, CONTROL, ROBOTS
from difftori.errors import ConfigError, MissingExtraError

FPS = 20.0
PYTHON_END = (3, 12)
"""The first version of Python without the extra's packages: the motion planner's mplib needs NumPy 1."""
VULKAN_HELP = (
    "install a Vulkan driver; Mesa's works without a GPU. On Debian 12: "
    "apt-get install libvulkan1 && apt-get install -t bookworm-backports mesa-vulkan-drivers. "
    "Without root, in a checkout: make vulkan && . .venv/vulkan/activate"
)
_NO_VULKAN = ("vk::", "Vulkan", "rendering device", "physical device")
"""What SAPIEN's errors contain if there is no usable Vulkan driver."""


class Step(NamedTuple):
    """What a simulation shows after a reset or a step: `arrays`, the reward, and whether the task is solved at present.

    `arrays`: `state` (S); or `xyzw` (N 4), `rgb` (N 3), `qpos`, `qvel` (J), and, if the task has them, `tcp_pose` (7) and
    `goal_pos` (3).
    """

    arrays: dict[str, np.ndarray]
    reward: float
    success: bool


class Simulation(ABC):
    """One environment of ManiSkill 3 or 2. `shapes` are those of the arrays that it shows."""

    shapes: dict[str, tuple[int, ...]]
    action_space: Box

    @abstractmethod
    def reset(self, seed: int) -> Step:
        """Begin the episode of that seed, below 2³²."""

    @abstractmethod
    def step(self, action: np.ndarray) -> Step:
        """Take one step with the action (A)."""

    @abstractmethod
    def render(self) -> np.ndarray:
        """Return an image (height width 3) uint8."""

    @abstractmethod
    def close(self) -> None:
        """Free the simulator."""


@final
class LocalSimulation(Simulation):
    """A task of ManiSkill 3 in this process. `obs` is `state` or `points`. Raises the errors of `open_simulation`."""

    def __init__(self, task: str, *, obs: str):
        self._env = open_simulation(task, obs_mode="pointcloud" if obs == "points" else "state")
        space = self._env.single_action_space
        self.action_space = Box(space.low, space.high, dtype=np.float32)
        raw, _ = self._env.reset(seed=0)
        self.shapes = {name: array.shape for name, array in _arrays(raw).items()}

    def reset(self, seed: int) -> Step:
        """See `Simulation`."""
        raw, info = begin_episode(self._env, seed)
        return Step(_arrays(raw), 0.0, bool(info["success"]))

    def step(self, action: np.ndarray) -> Step:
        """See `Simulation`."""
        raw, reward, _, _, info = self._env.step(action)
        return Step(_arrays(raw), float(reward), bool(info["success"]))

    def render(self) -> np.ndarray:
        """See `Simulation`."""
        return to_numpy(self._env.render())

    def close(self) -> None:
        """See `Simulation`."""
        self._env.close()


def _arrays(raw: Any) -> dict[str, np.ndarray]:
    """Return what ManiSkill shows in the modes `state` and `pointcloud`, by the names in `Step`."""
    if not isinstance(raw, dict):
        return {"state": to_numpy(raw)}
    extra = raw["extra"]
    shown = {
        **raw["pointcloud"],
        **raw["agent"],
        **{key: extra[key] for key in ("tcp_pose", "goal_pos") if key in extra},
    }
    return {name: to_numpy(value) for name, value in shown.items() if name != "segmentation"}


def open_simulation(
    task: str, *, obs_mode: str, control: str = CONTROL, num_envs: int = 1, device: Literal["cpu", "cuda"] = "cpu"
) -> Any:
    """Create ManiSkill's environment of a task, on the CPU, without its limit of steps. More copies than one need CUDA.

    `obs_mode` and `control` are ManiSkill's, for instance `state`. Raises `MissingExtraError` (extra `maniskill`),
    `RenderingError` (no Vulkan, which ManiSkill needs for every observation) and `ConfigError` (missing assets).
    """
    gymnasium = _maniskill()
    if task in CABINETS:
        _refuse_missing_assets(task)
    try:
        made = gymnasium.make(
            f"{task}-v1",
            robot_uids=ROBOTS[task],
            obs_mode=obs_mode,
            control_mode=control,
            num_envs=num_envs,
            sim_backend=f"physx_{device}",
            render_backend=device,
            render_mode="rgb_array",
        )
    except RuntimeError as error:
        if any(part in str(error) for part in _NO_VULKAN):
            raise RenderingError(
                f"maniskill: SAPIEN finds no Vulkan driver ({error}); it needs one also for states. Fix: {VULKAN_HELP}"
            ) from error
        raise
    return made.unwrapped


def begin_episode(env: Any, seed: int | None) -> Any:
    """Reset ManiSkill's environment, in a scene that is built again (.2 s).

    In a scene that is used again, PhysX resolves contacts in an order that depends on earlier episodes: the same actions moved the
    robot by up to .1 differently from the first contact on.
    """
    return env.reset(seed=seed, options={"reconfigure": True})


def to_numpy(value: Any) -> np.ndarray:
    """Return ManiSkill's tensor (1 …) of its only environment as an array (…) of its own."""
    return np.array(value[0].cpu().numpy())


def _maniskill() -> Any:
    """Import ManiSkill, which registers its tasks, and return Gymnasium. Raises `MissingExtraError`."""
    if importlib.util.find_spec("mani_skill") is None:
        install = "pip install 'difftori[maniskill]'"
        if sys.version_info >= PYTHON_END:  # the extra is installed there, but without mani-skill
            raise MissingExtraError(
                f"ManiSkill needs Python 3.10 or 3.11, and this is {sys.version_info[0]}.{sys.version_info[1]}. Fix: create an "
                f"environment with one of them (python3.11 -m venv), and there {install}"
            )
        raise MissingExtraError(f"ManiSkill needs the extra `maniskill`. Fix: {install}")
    import gymnasium

    with warnings.catch_warnings():
        # SAPIEN uses its own Vulkan loader if the system has none, and says so.
        warnings.filterwarnings("ignore", module=r"sapien\._vulkan_tricks")
        import_module("mani_skill.envs")
    return gymnasium


def _refuse_missing_assets(task: str) -> None:
    """Raise `ConfigError` if the cabinets are not on the disk. ManiSkill itself would ask for them on the standard input."""
    assets = import_module("mani_skill.utils.assets")
    needed = sorted(assets.expand_data_group_into_individual_data_source_ids("partnet_mobility_cabinet"))
    missing = [name.rpartition("/")[2] for name in needed if not assets.is_data_source_downloaded(name)]
    if missing:
        folder = import_module("mani_skill").ASSET_DIR / "partnet_mobility" / "dataset"
        raise ConfigError(
            [
                f"maniskill:{task} needs {len(needed)} cabinets; {len(missing)} are not in {folder}, such as {missing[0]}. "
                "Fix: python -m mani_skill.utils.download_asset partnet_mobility_cabinet, or set MS_ASSET_DIR to the folder that contains data/partnet_mobility"
            ]
        )

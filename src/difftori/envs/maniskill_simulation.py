"""Creates the simulations of ManiSkill 3, and explains what is missing: the extra, Vulkan, or the assets of a task."""

import importlib.util
import warnings
from typing import Any

import numpy as np

from difftori.envs.base import RenderingError
from difftori.errors import MissingExtraError

CONTROL = "pd_ee_delta_pose"
"""Control mode of the environment: a change of the hand's pose, in the axes of the robot's base."""
FPS = 20.0
VULKAN_HELP = (
    "install a Vulkan driver; Mesa's works without a GPU. On Debian 12: "
    "apt-get install libvulkan1 && apt-get install -t bookworm-backports mesa-vulkan-drivers. "
    "Without root, in a checkout: make vulkan && . .venv/vulkan/activate"
)
_NO_VULKAN = ("vk::", "Vulkan", "rendering device", "physical device")
"""What SAPIEN's errors contain if there is no usable Vulkan driver."""


def open_simulation(task: str, *, obs_mode: str, control: str = CONTROL) -> Any:
    """Create ManiSkill's environment of a task, on the CPU, without its limit of steps.

    `obs_mode` and `control` are ManiSkill's, for instance `state`. Raises `MissingExtraError` (extra `maniskill`) and
    `RenderingError` (no Vulkan, which ManiSkill needs for every observation).
    """
    gymnasium = _maniskill()
    try:
        made = gymnasium.make(
            f"{task}-v1",
            obs_mode=obs_mode,
            control_mode=control,
            num_envs=1,
            sim_backend="physx_cpu",
            render_backend="cpu",
            render_mode="rgb_array",
        )
    except RuntimeError as error:
        if any(part in str(error) for part in _NO_VULKAN):
            raise RenderingError(
                f"maniskill: SAPIEN finds no Vulkan driver ({error}); it needs one also for states. Fix: {VULKAN_HELP}"
            ) from error
        raise
    return made.unwrapped


def to_numpy(value: Any) -> np.ndarray:
    """Return ManiSkill's tensor (1 …) of its only environment as an array (…) of its own."""
    return np.array(value[0].cpu().numpy())


def _maniskill() -> Any:
    """Import ManiSkill, which registers its tasks, and return Gymnasium. Raises `MissingExtraError`."""
    if importlib.util.find_spec("mani_skill") is None:
        raise MissingExtraError("ManiSkill needs the extra `maniskill`. Fix: pip install 'difftori[maniskill]'")
    import gymnasium

    with warnings.catch_warnings():
        # SAPIEN uses its own Vulkan loader if the system has none, and says so.
        warnings.filterwarnings("ignore", module=r"sapien\._vulkan_tricks")
        import mani_skill.envs  # noqa: F401
    return gymnasium

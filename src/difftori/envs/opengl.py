"""Drawing with MuJoCo without a screen."""

import importlib
import os
import sys
import weakref
from types import ModuleType
from typing import Any

from difftori.envs.base import RenderingError

HELP = (
    "install the libraries (Debian, Ubuntu: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri), or set MUJOCO_GL "
    "to a backend that works here (egl, osmesa, glfw)"
)
OFF = ("disable", "disabled", "off", "false", "0")
"""What MUJOCO_GL may say so that nothing is drawn."""


def import_drawing(module: str, *, needs_images: bool) -> ModuleType:
    """Import a module that imports MuJoCo: by EGL unless MUJOCO_GL says otherwise, or without OpenGL where it is missing.

    Raises `RenderingError` if the backend that was asked for does not work, or if there is none and images are needed.
    """
    asked = os.environ.get("MUJOCO_GL")
    if asked is None and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = "egl"
    try:
        found = importlib.import_module(module)
    except (ImportError, AttributeError, RuntimeError) as error:
        # PyOpenGL shows a missing library as an AttributeError.
        if asked is not None or sys.platform != "linux":
            raise RenderingError(f"MUJOCO_GL={asked} does not work ({error}): unset it, or {HELP}") from error
        os.environ["MUJOCO_GL"] = "disable"
        os.environ.pop("PYOPENGL_PLATFORM", None)
        found = importlib.import_module(module)
    if needs_images and os.environ.get("MUJOCO_GL") in OFF:
        raise RenderingError(f"MUJOCO_GL={os.environ['MUJOCO_GL']}, so no image can be drawn: {HELP}")
    return found


def renderer(model: Any, height: int, width: int) -> Any:
    """A `mujoco.Renderer` without shadows and reflections, which is freed at the latest when Python ends.

    Raises `RenderingError` where no image can be drawn.
    """
    mujoco = import_drawing("mujoco", needs_images=True)
    _refuse_windows(mujoco)
    try:
        made = mujoco.Renderer(model, height, width)
    except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:
        # With MUJOCO_GL=disable there is no context to ask for, an AttributeError.
        raise RenderingError(f"no image can be drawn ({error}): {HELP}, before Python starts") from error
    made.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    made.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
    # Freed by the collector after OpenGL has gone, it would complain.
    weakref.finalize(model, made.close)
    return made


def _refuse_windows(mujoco: ModuleType) -> None:
    """Raise `RenderingError` if MuJoCo will open a window and there is no screen for it; it would fail noisily.

    It chooses when it is imported, so whoever imports it before us without MUJOCO_GL gets windows.
    """
    context = getattr(mujoco.gl_context, "GLContext", None)
    windows = getattr(context, "__module__", "").endswith("glfw")
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if windows and sys.platform == "linux" and not screen:
        raise RenderingError(
            "MuJoCo was imported to draw in windows (MUJOCO_GL was not egl then), and there is no screen: set MUJOCO_GL=egl "
            "before Python starts, import mujoco later, or take workers='async', whose processes import it anew"
        )

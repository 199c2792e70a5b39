"""Headless rendering with MuJoCo."""

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
"""Values of MUJOCO_GL that disable rendering."""


def import_drawing(module: str, *, needs_images: bool) -> ModuleType:
    """Import a module that imports MuJoCo, with the backend MUJOCO_GL. Default: EGL, or no OpenGL if EGL is missing.

    Raises `RenderingError` if the backend in MUJOCO_GL does not work, or if there is none and images are needed.
    """
    backend = os.environ.get("MUJOCO_GL")
    if backend is None and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = "egl"
    try:
        found = importlib.import_module(module)
    except (ImportError, AttributeError, RuntimeError) as error:
        # PyOpenGL raises AttributeError for a missing library.
        if backend is not None or sys.platform != "linux":
            raise RenderingError(f"MUJOCO_GL={backend} does not work ({error}). Fix: unset it, or {HELP}") from error
        os.environ["MUJOCO_GL"] = "disable"
        os.environ.pop("PYOPENGL_PLATFORM", None)
        found = importlib.import_module(module)
    if needs_images and os.environ.get("MUJOCO_GL") in OFF:
        raise RenderingError(f"MUJOCO_GL={os.environ['MUJOCO_GL']}, so images cannot be rendered. Fix: {HELP}")
    return found


def renderer(model: Any, height: int, width: int, *, reflections: bool = False) -> Any:
    """Create a `mujoco.Renderer` without shadows. It is freed with the model, at the latest when Python ends.

    `reflections`: whether surfaces reflect. Default: False.

    Raises `RenderingError` if images cannot be rendered.
    """
    mujoco = import_drawing("mujoco", needs_images=True)
    _refuse_windows(mujoco)
    try:
        made = mujoco.Renderer(model, height, width)
    except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:
        # With MUJOCO_GL=disable there is no context, which raises AttributeError.
        raise RenderingError(f"images cannot be rendered ({error}). Fix: {HELP}, before Python starts") from error
    made.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
    made.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = reflections
    # If the garbage collector freed it after OpenGL, it would print errors. A strong reference here would keep the model.
    weakref.finalize(model, _close, weakref.ref(made))
    return made


def _close(reference: weakref.ref) -> None:
    made = reference()
    if made is not None:
        made.close()


def _refuse_windows(mujoco: ModuleType) -> None:
    """Raise `RenderingError` if MuJoCo would open a window without a screen, which fails with unclear errors.

    MuJoCo selects its backend on import, so an earlier import without MUJOCO_GL selects windows.
    """
    context = getattr(mujoco.gl_context, "GLContext", None)
    windows = getattr(context, "__module__", "").endswith("glfw")
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if windows and sys.platform == "linux" and not screen:
        raise RenderingError(
            "MuJoCo was imported with windows for rendering (MUJOCO_GL was not egl), and there is no screen. Fix: set "
            "MUJOCO_GL=egl before Python starts, import mujoco later, or use workers='async', whose processes import it again"
        )

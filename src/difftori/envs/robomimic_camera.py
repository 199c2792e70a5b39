"""Images of the Robomimic environments, equal to robosuite's own.

robosuite's rendering is not used: it does not select its OpenGL context, so that of two environments in one process one gets
the other's images.
"""

from typing import Any

import numpy as np

from difftori.envs.opengl import import_drawing, renderer

GEOM_GROUPS = (0, 1, 1, 0, 0, 0)
SITE_GROUPS = (1, 1, 1, 0, 0, 0)
"""Groups that robosuite shows: visual meshes, no collision shapes."""


class Camera:
    """Renders a robosuite simulation. OpenGL is initialised at the first image.

    `reflections`: whether the table and the floor reflect, as in robomimic's data sets.
    """

    def __init__(self, simulation: Any, *, reflections: bool):
        self._simulation = simulation
        self._reflections = reflections
        self._model: Any = None
        self._renderers: dict[int, Any] = {}
        self._scene: Any = None

    def image(self, name: str, side: int) -> np.ndarray:
        """Return the image of a camera (side, side, 3) uint8."""
        sim = self._simulation.sim
        self._follow(sim.model._model)  # noqa: SLF001 (there is no public way to MuJoCo's own model)
        if side not in self._renderers:
            self._renderers[side] = renderer(self._model, side, side, reflections=self._reflections)
        drawer = self._renderers[side]
        drawer.update_scene(sim.data._data, name, self._scene)  # noqa: SLF001
        return drawer.render()

    def close(self) -> None:
        """Free the OpenGL contexts."""
        for one in self._renderers.values():
            one.close()
        self._renderers.clear()
        self._model = None

    def _follow(self, model: Any) -> None:
        """Begin again with another model: a reset may build a new one."""
        if model is self._model:
            return
        self.close()
        self._model = model
        self._scene = import_drawing("mujoco", needs_images=True).MjvOption()
        self._scene.geomgroup[:] = GEOM_GROUPS
        self._scene.sitegroup[:] = SITE_GROUPS

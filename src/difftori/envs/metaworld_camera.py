"""Point clouds of MetaWorld as in DP3: one camera's depth image, as 512 points (Ze et al. 2024, arXiv 2403.03954).

The camera `corner2` is moved to `POSITION`, with its direction unchanged. Points are in the camera frame, rotated by fixed
angles so that z is vertical: the world's height − 0.8 m. The crop removes the table, whose top is at −0.795, and the background.

Differs from the release of DiffTORI, a fork of DP3, whose wrapper has the camera at (0.75, 0.075, 0.7) and 84×84 pixels.
"""

from typing import Any

import numpy as np

from difftori.envs.opengl import import_drawing, renderer
from difftori.envs.point_cloud import camera_rays, cropped, farthest_points, tilt

POINTS = 512
CAMERA = "corner2"
POSITION = (0.6, 0.295, 0.8)
FIELD_OF_VIEW = 60.0
"""Vertical field of view, in degrees."""
NEAR, FAR = 0.1, 1.5
"""Clipping planes, in units of the model's extent (about 2.3 m)."""
SIDE = 128
TILT = (61.4, -7.0)
LOW = np.array([-0.5, -1.5, -0.795])
HIGH = np.array([1.0, -0.4, 100.0])
VIDEO = 240
"""Side of `image`, in pixels."""


class Camera:
    """Renders a MetaWorld simulation. OpenGL is initialised at the first image."""

    def __init__(self, simulation: Any):
        self._simulation = simulation
        model = simulation.model
        self._camera = model.camera(CAMERA).id
        model.cam_pos[self._camera] = POSITION
        model.cam_fovy[self._camera] = FIELD_OF_VIEW
        model.vis.map.znear, model.vis.map.zfar = NEAR, FAR
        self._rays = camera_rays(SIDE, SIDE, FIELD_OF_VIEW) @ tilt(*TILT).T
        self._depth: Any = None
        self._film: Any = None

    def refresh(self) -> None:
        """Update the scene after a reset, which moves parts of the model without updating the simulator.

        Only positions are computed, so the physics remain identical to MetaWorld's, to the last bit.
        """
        mujoco = import_drawing("mujoco", needs_images=False)
        mujoco.mj_kinematics(self._simulation.model, self._simulation.data)
        mujoco.mj_camlight(self._simulation.model, self._simulation.data)

    def cloud(self) -> np.ndarray:
        """Return the scene as a point cloud (512 3) float32, in metres."""
        if self._depth is None:
            self._depth = renderer(self._simulation.model, SIDE, SIDE)
            self._depth.enable_depth_rendering()
        depth = self._drawn(self._depth)
        return farthest_points(cropped(depth.reshape(-1, 1) * self._rays, LOW, HIGH), POINTS)

    def image(self) -> np.ndarray:
        """Return an image of the scene (240, 240, 3) uint8. It is rotated, because the camera is mounted upside down."""
        if self._film is None:
            self._film = renderer(self._simulation.model, VIDEO, VIDEO)
        return np.ascontiguousarray(self._drawn(self._film)[::-1, ::-1])

    def close(self) -> None:
        """Free the OpenGL contexts."""
        for one in (self._depth, self._film):
            if one is not None:
                one.close()

    def _drawn(self, drawer: Any) -> np.ndarray:
        # MetaWorld moves its goal markers, but the simulator then moves them back to their positions in the model.
        for name, position in self._simulation._target_site_config:  # noqa: SLF001 (there is no public way to them)
            self._simulation.data.site(name).xpos = position[:3]
        drawer.update_scene(self._simulation.data, self._camera)
        return drawer.render()

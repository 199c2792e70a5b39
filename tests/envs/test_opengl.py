"""What is said where nothing can be drawn. In processes of their own, since MuJoCo chooses when it is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest

needs_mujoco = pytest.mark.skipif(
    importlib.util.find_spec("mujoco") is None, reason="needs the extra: pip install 'difftori[metaworld]'"
)
DRAW = """
from difftori.envs import opengl
from difftori.envs.base import RenderingError
{first}
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
try:
    drawer = opengl.renderer(model, 8, 8)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    drawer.update_scene(data)
    print("drew", drawer.render().shape)
except RenderingError as error:
    print("refused:", error)
"""


def drawn(first: str = "", **environment: str) -> subprocess.CompletedProcess:
    """The program's end, in an environment without a screen."""
    plain = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY")}
    program = [sys.executable, "-c", DRAW.format(first=first)]
    return subprocess.run(program, env={**plain, **environment}, capture_output=True, text=True, check=False)


@needs_mujoco
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a screen")
def test_a_drawer_is_freed_quietly_when_python_ends():
    done = drawn("opengl.import_drawing('mujoco', needs_images=True)")
    if "refused" in done.stdout:
        pytest.skip(done.stdout)
    assert (done.stdout, done.stderr) == ("drew (8, 8, 3)\n", "")


@needs_mujoco
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is a screen")
def test_whoever_imported_mujoco_first_is_told_what_to_do():
    done = drawn()
    assert done.stdout.startswith("refused: MuJoCo was imported with windows for rendering")
    assert "MUJOCO_GL=egl before Python starts" in done.stdout
    assert done.stderr == ""


@needs_mujoco
def test_without_opengl_the_message_names_the_packages():
    done = drawn(MUJOCO_GL="disable")
    assert done.stdout.startswith("refused: MUJOCO_GL=disable")
    assert "apt-get install libegl1" in done.stdout

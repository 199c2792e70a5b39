"""ManiSkill 2 in a second interpreter, with a stand-in for mani_skill2: the six real tasks cannot run here."""

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from difftori.cli import main
from difftori.envs import maniskill_server
from difftori.envs.base import RenderingError
from difftori.envs.maniskill import LIMITS, build
from difftori.envs.maniskill_bridge import OUTPUT, VARIABLE, BridgedSimulation
from difftori.envs.maniskill_names import MANISKILL2
from difftori.errors import ConfigError
from difftori.registry import make_env, resolve_env

STAND_IN = """
import importlib.util, os, sys, time
import gymnasium
import numpy as np

assert importlib.util.find_spec("pusht") is None, "the folder of the server hides packages"

print("what a library prints must not reach the frames")
TROUBLE = os.environ.get("TROUBLE", "")

class Task(gymnasium.Env):
    metadata = {"render_modes": ["cameras"]}
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)

    def __init__(self, obs_mode, control_mode, render_mode=None):
        if TROUBLE and not TROUBLE.startswith("later"):
            raise RuntimeError(TROUBLE)
        assert control_mode == "pd_ee_delta_pose"
        self.render_mode, self.mode = render_mode, obs_mode

    def shown(self):
        if self.mode == "state":
            return np.full(5, self.at, np.float64)
        xyzw = self.draws.uniform(0.1, 1, (2000, 4))
        return {
            "agent": {"qpos": np.zeros(9), "qvel": np.ones(9), "base_pose": np.zeros(7)},
            "extra": {"tcp_pose": np.array([0, 0, 0, 1.0, 0, 0, 0]), "target": np.zeros(2)},
            "pointcloud": {"xyzw": xyzw, "rgb": np.full((2000, 3), 255, np.uint8)},
        }

    def reset(self, seed=None, options=None):
        self.draws = np.random.default_rng(seed)
        self.at = self.draws.uniform()
        return self.shown(), {}

    def step(self, action):
        if TROUBLE == "later sleep":
            time.sleep(60)
        if TROUBLE == "later exit":
            print("going down", file=sys.stderr, flush=True)
            os._exit(3)
        self.at += float(action[0])
        return self.shown(), self.at, self.at > 2, False, {"success": self.at > 2}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)

gymnasium.register("Fill-v0", Task)
"""


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Selects an interpreter that has the stand-in."""
    (tmp_path / "with" / "mani_skill2").mkdir(parents=True)
    (tmp_path / "with" / "mani_skill2" / "__init__.py").touch()
    (tmp_path / "with" / "mani_skill2" / "envs.py").write_text(textwrap.dedent(STAND_IN))
    path = script(tmp_path / "python", f'PYTHONPATH={tmp_path / "with"} exec {sys.executable} "$@"')
    monkeypatch.setenv(VARIABLE, path)


def script(path, line: str) -> str:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def test_the_papers_other_tasks_are_named_with_their_limits():
    assert set(MANISKILL2) == {"PushChair", "MoveBucket", "Fill", "Hang", "Excavate", "Pour"}
    assert LIMITS == {"Fill": 250, "Excavate": 250, "Hang": 350, "Pour": 350}


@pytest.mark.parametrize("written", ["Fill", "fill", "Fill-v0"])
def test_states_rewards_and_success_cross_the_bridge(python, written):
    env = make_env(f"maniskill:{written}", num_envs=1, seed=0)
    start, _ = env.reset(seed=[7])
    assert env.name == "maniskill:Fill"
    assert np.allclose(start, np.random.default_rng(7).uniform())
    seen = [env.step(np.ones((1, 7))) for _ in range(3)]
    assert np.allclose([one[1][0] for one in seen], start[0, 0] + np.array([1, 2, 3]))
    assert [bool(one[4]["success"][0]) for one in seen] == [False, True, True]
    assert not any(one[2].any() or one[3].any() for one in seen)
    env.close()


def test_clouds_are_reduced_on_this_side_and_repeat_by_seed(python):
    env = build("Fill", obs="points")
    first, again, other = (env.reset(seed=seed)[0] for seed in (3, 3, 4))
    assert {name: part.shape for name, part in first.items()} == {"point_cloud": (1200, 6), "agent_pos": (25,)}
    assert env.observation_space.contains(first)
    assert np.array_equal(first["point_cloud"], again["point_cloud"])
    assert not np.array_equal(first["point_cloud"], other["point_cloud"])
    assert env.render().shape == (8, 8, 3)
    env.close()


def test_it_runs_in_worker_processes(python):
    env = make_env("maniskill:Fill", num_envs=2, seed=0, workers="async")
    assert env.reset(seed=[1, 2])[0].shape == (2, 5)
    env.close()


def test_closing_ends_the_interpreter_and_so_does_the_end_of_its_input(python):
    simulation = BridgedSimulation("Fill", obs="state")
    simulation.close()
    assert simulation._process.returncode == 0
    other = BridgedSimulation("Fill", obs="state")
    other._process.stdin.close()
    assert other._process.wait(20) == 0
    other.close()


def test_an_interpreter_is_needed_and_must_exist(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="needs a second interpreter.*pip install 'mani_skill2==0.5.3'"):
        build("Hang")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="none', which is not an executable file"):
        build("Hang")


def test_a_file_that_is_no_program_is_refused(monkeypatch, tmp_path):
    (tmp_path / "image").write_bytes(bytes(100))
    (tmp_path / "image").chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "image"))
    with pytest.raises(
        ConfigError, match="image', which cannot be executed .*Exec format error.*Fix: install mani_skill2"
    ):
        build("Hang")


def test_the_end_of_a_long_output_is_kept_and_does_not_block_the_interpreter(monkeypatch, tmp_path):
    path = script(tmp_path / "long", "head -c 10000000 /dev/zero >&2; echo the end >&2; exit 1")
    monkeypatch.setenv(VARIABLE, path)
    with pytest.raises(RuntimeError, match="the end") as caught:
        build("Hang")
    assert len(str(caught.value)) < OUTPUT + 500


@pytest.mark.parametrize("task", ["Fill", "PickCube"])
def test_no_option_names_the_interpreter_so_a_stored_run_cannot(tmp_path, capsys, task):
    program = script(tmp_path / "program", f"touch {tmp_path / 'executed'}")
    with pytest.raises(ConfigError, match="takes no option 'interpreter'"):
        resolve_env(f"maniskill:{task}").read_options([f"interpreter={program}"])
    with pytest.raises(ConfigError, match="takes no option 'interpreter'"):
        make_env(f"maniskill:{task}", num_envs=1, seed=0, interpreter=program)
    options = ["--env", f"maniskill:{task}", "--env-options", f"interpreter={program}", "--demos", "none.h5"]
    assert main(["train", "bc", *options]) == 2
    assert "takes no option 'interpreter'" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


def test_without_mani_skill2_its_installation_is_named(tmp_path, monkeypatch):
    bare = script(tmp_path / "bare", f'exec {sys.executable} -S "$@"')
    monkeypatch.setenv(VARIABLE, bare)
    with pytest.raises(RuntimeError, match="(?s)The end of its output:.*numpy"):  # not even numpy
        BridgedSimulation("Fill", obs="state")
    monkeypatch.setenv(VARIABLE, sys.executable)
    with pytest.raises(ConfigError, match="No module named 'mani_skill2'.*Fix: .*pip install 'mani_skill2==0.5.3'"):
        BridgedSimulation("Fill", obs="state")


@pytest.mark.parametrize(
    ("trouble", "error", "message"),
    [
        ("No valid URDF is found for 3001. Please download Partnet-Mobility", ConfigError, "download_asset Fill-v0"),
        ("Cannot find CUDA toolkit. Please install it first.", ConfigError, "CUDA toolkit"),
        ("vk::createInstanceUnique: ErrorIncompatibleDriver", RenderingError, "Vulkan driver"),
        ("something else", RuntimeError, "something else"),
    ],
)
def test_what_is_missing_there_is_told_with_the_fix(python, monkeypatch, trouble, error, message):
    monkeypatch.setenv("TROUBLE", trouble)
    with pytest.raises(error, match=message):
        build("Fill")


@pytest.mark.parametrize(
    ("trouble", "message"), [("later sleep", "did not answer within 0.5 s"), ("later exit", "(?s)failed.*going down")]
)
def test_a_hanging_or_dying_interpreter_is_an_error_and_leaves_no_process(python, monkeypatch, trouble, message):
    monkeypatch.setenv("TROUBLE", trouble)
    simulation = BridgedSimulation("Fill", obs="state")
    simulation._timeout = 0.5
    with pytest.raises(RuntimeError, match=message):
        simulation.step(np.zeros(7))
    assert simulation._process.poll() is not None
    simulation.close()


def frame(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(4, "big") + header + data


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (frame(b"", size=1 << 30), ValueError),
        (frame(b"[1]"), ValueError),
        (frame(b"not JSON"), ValueError),
        (frame(b'{"arrays": [["a", "object", [1]]]}'), ValueError),
        (frame(b'{"arrays": [["a", "float32", [-1]]]}'), ValueError),
        (frame(b'{"arrays": [["a", "float32", [65536, 65536]]]}'), ValueError),
        (frame(b'{"arrays": [["a", "float32", [2]]]}', b"1234"), EOFError),
        (frame(b"{}"), KeyError),
    ],
)
def test_strange_frames_are_refused(sent, error):
    reading, writing = os.pipe()
    os.write(writing, sent)
    os.close(writing)
    with pytest.raises(error):
        maniskill_server.receive(reading)
    os.close(reading)


def test_a_frame_returns_as_it_was():
    reading, writing = os.pipe()
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 3), np.uint8)}
    maniskill_server.send(writing, {"kind": "x"}, arrays)
    header, found = maniskill_server.receive(reading, time.monotonic() + 5)
    assert header == {"kind": "x"}
    assert all(np.array_equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype for name in arrays)
    with pytest.raises(TimeoutError):
        maniskill_server.receive(reading, time.monotonic() + 0.05)
    os.close(reading)
    os.close(writing)


def test_the_server_imports_nothing_of_difftori():
    code = f"import sys, runpy; runpy.run_path({maniskill_server.__file__!r}, run_name='x'); print('difftori' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

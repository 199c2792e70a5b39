"""Images of raw robomimic files, rendered from their states. Needs the extra `robomimic` and OpenGL."""

import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from difftori import cli
from difftori.collection.render import RenderRequest, render
from difftori.envs import robomimic
from difftori.envs.base import RenderingError
from difftori.errors import ConfigError, DataError, MissingExtraError
from difftori.runs.records import read_summary

needs_robosuite = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="needs the extra: pip install 'difftori[robomimic]'"
)
FILES = Path(__file__).parents[1] / "fixtures" / "robomimic_141"
LOW_DIM = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")


def raw(path: Path, steps: int = 5) -> Path:
    """The first steps of both episodes of Square, without observations, and a list of demonstrations."""
    with h5py.File(FILES / "square.hdf5") as source, h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = source["data"].attrs["env_args"]
        for name, demo in source["data"].items():
            group = data.create_group(name)
            group.attrs["num_samples"] = steps
            for key in ("states", "actions"):
                group[key] = demo[key][:steps]
        # Whatever else a file has is kept.
        file.attrs["creator"] = "a person"
        file["mask/train"] = np.array([b"demo_1"])
        file["data/demo_0/words"] = np.array([b"pick", b"up"])
        file["data/demo_0"].attrs["operator"] = 3
        file["data/demo_1/note"] = 2.5
        file["data/demo_1/obs/object"] = np.zeros((steps, 14))
    return path


def rendered(request: RenderRequest) -> dict:
    try:
        return render(request)
    except RenderingError as error:
        pytest.skip(f"no OpenGL here: {error}")


@needs_robosuite
def test_an_interrupted_run_is_resumed_and_the_file_trains(tmp_path, monkeypatch):
    file, out = raw(tmp_path / "raw.hdf5"), tmp_path / "new.hdf5"
    shown = robomimic.RobomimicEnv.shown
    count = iter(range(8))

    def interrupted(self, state):
        if next(count) == 7:
            raise KeyboardInterrupt
        return shown(self, state)

    monkeypatch.setattr(robomimic.RobomimicEnv, "shown", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rendered(RenderRequest(file, out))
    assert not out.exists()
    (part,) = (tmp_path / "new.hdf5.parts").glob("*.npz")
    part.write_bytes(part.read_bytes()[:-100])  # a damaged part is made again
    monkeypatch.setattr(robomimic.RobomimicEnv, "shown", shown)
    assert cli.main(["data", "render", str(file), "--out", str(out), "--quiet"]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("new")] == ["new.hdf5"]
    assert render(RenderRequest(file, out))["rendered_now"] == 0
    with pytest.raises(ConfigError, match="reflections"):
        render(RenderRequest(file, out, reflections=False))
    _check(out)
    words = ["train", "bc", "--env", "robomimic:square", "--demos", str(out), "--obs", "image", "--images.width", "16"]
    short = ["--updates", "2", "--batch-size", "4", "--eval-episodes", "1", "--num-envs", "1", "--quiet"]
    options = ["--env-options", "actions=absolute", "max_steps=2", "reflections=false"]
    assert cli.main([*words, *short, *options, "--out", str(tmp_path / "run")]) == 0
    assert read_summary(tmp_path / "run")["last/length"] == 2


def _check(out: Path) -> None:
    env = robomimic.build("square", obs="image")
    cameras = ("agentview_image", "robot0_eye_in_hand_image")
    with h5py.File(FILES / "square.hdf5") as source, h5py.File(out) as file:
        assert list(file["mask/train"]) == [b"demo_1"]
        assert file.attrs["creator"] == "a person"
        assert list(file["data/demo_0/words"]) == [b"pick", b"up"]
        assert file["data/demo_0"].attrs["operator"] == 3
        assert file["data/demo_1/note"][()] == 2.5
        for name, demo in file["data"].items():
            first, _ = env.reset(options={"reset_to_state": demo["states"][0]})
            last = env.shown(demo["states"][4])
            assert any(not np.array_equal(first[camera], last[camera]) for camera in cameras)
            for camera in cameras:
                assert demo[f"obs/{camera}"].shape == (5, 84, 84, 3)
                assert demo[f"obs/{camera}"].dtype == np.uint8
                assert np.array_equal(demo[f"obs/{camera}"][0], first[camera].transpose(1, 2, 0))
                assert np.array_equal(demo[f"obs/{camera}"][4], last[camera].transpose(1, 2, 0))
            for key in LOW_DIM:  # recorded observations are one physics step late
                recorded = source[f"data/{name}/obs/{key}"][:5]
                assert np.abs(demo[f"obs/{key}"][()] - recorded).max() < 0.02
                assert np.allclose(demo[f"obs/{key}"][0], recorded[0], atol=1e-5)
    env.close()


@needs_robosuite
def test_what_cannot_be_rendered_is_refused_before(tmp_path):
    file = raw(tmp_path / "raw.hdf5")
    for request, message in [
        (RenderRequest(tmp_path / "none.hdf5"), "does not exist"),
        (RenderRequest(file, file), "file itself"),
        (RenderRequest(file, FILES / "lift.hdf5"), "another request"),
    ]:
        with pytest.raises(ConfigError, match=message):
            render(request)
    with h5py.File(file, "r+") as data:
        data["data/demo_0/states"][0] = np.nan
    with pytest.raises(DataError, match="demo_0.*finite"):
        rendered(RenderRequest(file))
    with h5py.File(file, "r+") as data:
        del data["data/demo_0/states"]
    with pytest.raises(ConfigError, match="no states"):
        render(RenderRequest(file))
    with h5py.File(file, "r+") as data:
        data["data"].attrs["env_args"] = json.dumps({"env_name": "Door", "env_kwargs": {}})
    with pytest.raises(ConfigError, match="Door"):
        render(RenderRequest(file))


@needs_robosuite
def test_links_and_other_shapes_are_refused_before_rendering(tmp_path, monkeypatch):
    monkeypatch.setattr(robomimic.RobomimicEnv, "shown", lambda self, state: pytest.fail("rendered"))
    other = raw(tmp_path / "other.hdf5")
    for number, (change, message) in enumerate(
        [
            (lambda demo: demo.file.__setitem__("far", h5py.ExternalLink(other.name, "/data")), "far.*ExternalLink"),
            (lambda demo: demo.__setitem__("near", h5py.SoftLink("/data")), "near.*SoftLink"),
            (lambda demo: demo.create_dataset("next", (2,), "f8", external=[(tmp_path / "x", 0, 16)]), "another file"),
            (lambda demo: demo.__setitem__("obs", np.zeros(5)), "obs is not a group"),
            (lambda demo: demo["states"].__setitem__((4, 3), np.inf), "demo_0/states.*finite"),
        ]
    ):
        file = raw(tmp_path / f"{number}.hdf5")
        with h5py.File(file, "r+") as data:
            change(data["data/demo_0"])
        with pytest.raises(DataError, match=message):
            render(RenderRequest(file))


@needs_robosuite
def test_a_damaged_plan_is_refused_with_the_fix(tmp_path):
    file = raw(tmp_path / "raw.hdf5")
    (parts := tmp_path / "raw_image.hdf5.parts").mkdir()
    (parts / "plan.json").write_text("{")
    with pytest.raises(DataError, match="plan.json.*Fix: remove"):
        render(RenderRequest(file))


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    file = raw(tmp_path / "raw.hdf5")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"difftori\[robomimic\]"):
        render(RenderRequest(file))

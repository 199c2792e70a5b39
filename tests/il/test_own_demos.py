"""Demonstrations that a user brings: LeRobot v3, robomimic and zarr, with an environment and without one, on the command line."""

import json
import logging
import math
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny_env.reach import ENV

from difftori import cli
from difftori.data.fingerprint import fingerprint
from difftori.data.formats import read_demos, write_zarr
from difftori.data.trajectories import Trajectories
from difftori.errors import ConfigError, DataError
from difftori.il.config import parse_config
from difftori.il.demos_task import DemosTask
from difftori.il.evaluate import evaluate_run
from difftori.il.recorded import DemosOptions
from difftori.il.train import train
from difftori.il.weights import load_policy
from difftori.runs.records import read_summary
from tests.support.own_demos import SIDE, episodes, write_lerobot_set, write_robomimic_set, write_zarr_set

CAMERA = "tiny_env.camera:make"
COMMON = ["--quiet", "--updates", "4", "--batch-size", "8", "--eval-episodes", "2", "--images.width", "16"]
WRITERS = {
    "lerobot": write_lerobot_set,
    "lerobot videos": lambda path, **options: write_lerobot_set(path, videos=True, **options),
    "robomimic": lambda path, **options: write_robomimic_set(path.with_suffix(".hdf5"), **options),
    "zarr": write_zarr_set,
}
RENAMED = {"robomimic": ["--obs-keys", "state=robot0_eef_pos", "image=agentview_image"]}
ALL = {
    "lerobot": {"state": (2,), "top": (SIDE, SIDE, 3)},
    "robomimic": {"robot0_eef_pos": (2,), "agentview_image": (SIDE, SIDE, 3), "agentview_depth": (SIDE, SIDE, 1)},
    "zarr": {"state": (2,), "img": (SIDE, SIDE, 3)},
}


@pytest.fixture(params=list(WRITERS))
def brought(request, tmp_path):
    return request.param, WRITERS[request.param](tmp_path / "brought")


def run(*words, out: Path) -> dict[str, float]:
    assert cli.main(["train", "bc", *map(str, words), *COMMON, "--out", str(out)]) == 0
    return read_summary(out)


def config(demos, policy="bc", **values):
    settings = {"updates": 4, "batch_size": 8, "hidden": (8,)}
    plain = {"policy": policy, "demos": str(demos), "n_obs_steps": 1, "horizon": 4, "n_action_steps": 2}
    return parse_config({**plain, "settings": settings, **values})


def test_every_format_trains_without_an_environment(brought, tmp_path):
    name, demos = brought
    summary = run("--demos", demos, out=tmp_path / "run")
    assert summary["updates"] == 4
    assert 0 < summary["last/action_error"] < 2
    assert summary["last/episodes"] == 1, "of four episodes, one is held out"
    spec = load_policy(tmp_path / "run", "last")[0].spec
    assert {name: entry.shape for name, entry in spec.obs.items()} == ALL[name.partition(" ")[0]]
    assert cli.main(["eval", str(tmp_path / "run")]) == 0
    assert evaluate_run(tmp_path / "run")["action_error"] == pytest.approx(summary["last/action_error"], rel=1e-5)


def test_every_format_trains_for_an_environment(brought, tmp_path):
    name, demos = brought
    keys = RENAMED.get(name, [])
    assert 0 <= run("--env", ENV, "--demos", demos, *keys[:2], out=tmp_path / "state")["last/success"] <= 1
    assert 0 <= run("--env", CAMERA, "--demos", demos, *keys, out=tmp_path / "image")["last/success"] <= 1


def test_every_format_gives_the_same_numbers(tmp_path):
    """Lossless images: the fingerprint of the same episodes is the same, whatever the format and the keys are."""
    sets = [
        read_demos(WRITERS[name](tmp_path / name), {"state": key, "image": "image"})
        for name, key in (("lerobot", "state"), ("robomimic", "robot0_eef_pos"), ("zarr", "state"))
    ]
    assert fingerprint(sets[0]) == fingerprint(sets[1]) == fingerprint(sets[2])


def test_a_key_that_is_not_found_is_told_with_what_there_is(tmp_path, capsys):
    demos = write_robomimic_set(tmp_path / "d.hdf5")
    assert cli.main(["train", "bc", "--env", ENV, "--demos", demos, *COMMON, "--out", str(tmp_path / "run")]) == 1
    told = capsys.readouterr().err
    for words in ("'state'", "obs/robot0_eef_pos (2)", "obs/agentview/depth (40, 40, 1)", "--obs-keys state=KEY"):
        assert words in told


def test_keys_are_chosen_renamed_and_concatenated(tmp_path):
    demos = write_robomimic_set(tmp_path / "d.hdf5")
    words = ("pose=robot0_eef_pos,obs/robot0_eef_pos", "agentview_image", "obs/agentview/depth")
    task = config(demos, obs_keys=words, action_key="next_obs/robot0_eef_pos").open_task()
    assert {name: (entry.shape, entry.dtype) for name, entry in task.spec.obs.items()} == {
        "pose": ((4,), "float32"),
        "agentview_image": ((SIDE, SIDE, 3), "uint8"),
        "agentview_depth": ((SIDE, SIDE, 1), "float32"),
    }
    assert isinstance(task, DemosTask)
    assert torch.equal(task.train.demos.actions, task.train.demos.obs["pose"][:, :2])


@pytest.mark.parametrize("name", ["lerobot", "robomimic", "zarr"])
def test_episodes_are_chosen(tmp_path, name):
    demos = WRITERS[name](tmp_path / "d", count=6)
    whole, some = read_demos(demos), read_demos(demos, episodes=["1:3", 5])
    assert some.lengths == [10, 10, 10]
    for number, episode in enumerate((1, 2, 5)):
        assert torch.equal(some.episode(number)[1], whole.episode(episode)[1])
    task = config(demos, obs_keys=(next(iter(whole.obs)),), episodes=("0:2", "5")).open_task()
    assert isinstance(task, DemosTask)
    assert sorted(task.train.demos.lengths) == [10, 10]
    with pytest.raises(DataError, match="there are no episodes 4:9; the data set has 6"):
        config(demos, episodes=("4:9",)).open_task()


def test_a_list_of_robomimic_is_chosen(tmp_path):
    task = config(write_robomimic_set(tmp_path / "d.hdf5"), episodes=("train",)).open_task()
    assert isinstance(task, DemosTask)
    assert len(task.train.demos) + len(task.validation.demos) == 2


def test_a_damaged_episode_can_be_left_out(tmp_path):
    demos = write_robomimic_set(tmp_path / "d.hdf5")
    with h5py.File(demos, "r+") as file:
        file["data/demo_3/obs/robot0_eef_pos"][4] = np.nan
    with pytest.raises(DataError, match=r"holds nan at step 34 \(episode 3, its step 4\)"):
        read_demos(demos)
    assert len(read_demos(demos, episodes=["0:3"])) == 3
    with pytest.raises(DataError, match=r"holds nan at step 34 \(episode 3, its step 4\)"):
        read_demos(demos, episodes=["2:4"])


def test_what_the_task_is_comes_from_the_data(tmp_path):
    task = config(write_zarr_set(tmp_path / "d.zarr"), obs_keys=("state",)).open_task()
    actions = task.train.demos.actions[task.train.demos.rows()]
    assert task.spec.low == pytest.approx(actions.amin(0).tolist())
    assert task.spec.high == pytest.approx(actions.amax(0).tolist())
    assert task.spec.obs["state"].shape == (2,)


def test_the_action_error_is_the_root_mean_square_on_held_out_episodes(tmp_path):
    task = config(write_zarr_set(tmp_path / "d.zarr", count=20), obs_keys=("state",)).open_task()
    assert isinstance(task, DemosTask)
    held, present = task.validation.demos, task.spec.present
    assert len(held) == 2
    zero = task.evaluate(lambda obs: torch.zeros(len(obs["state"]), 4, 2), episodes=100, generator=torch.Generator())
    batch = task.validation.batch(torch.arange(len(task.validation)))
    assert zero.metrics["action_error"] == pytest.approx(batch.actions[:, present].square().mean().sqrt().item())
    assert zero.metrics["train_action_error"] != zero.metrics["action_error"]
    assert len(zero.episodes["action_error"]) == 2
    first = task.evaluate(lambda obs: torch.zeros(len(obs["state"]), 4, 2), episodes=1, generator=torch.Generator())
    assert first.metrics["action_error"] == pytest.approx(zero.episodes["action_error"][0])


def test_one_demonstration_is_trained_on_and_nothing_is_held_out(tmp_path, caplog):
    demos = write_lerobot_set(tmp_path / "d", count=1)
    summary = run("--demos", demos, "--obs-keys", "state", out=tmp_path / "run")
    assert "has one episode. It is trained on, and nothing is held out" in caplog.text
    assert math.isnan(summary["last/action_error"])
    assert math.isnan(summary["last/validation_error"])
    assert summary["last/train_action_error"] > 0
    assert run("--env", ENV, "--demos", demos, out=tmp_path / "env")["updates"] == 4
    with pytest.raises(ConfigError, match="needs held-out demonstrations"):
        train(config(demos, weights="best"), tmp_path / "best", progress=False)


def test_nothing_is_held_out_if_asked(tmp_path):
    task = config(write_zarr_set(tmp_path / "d.zarr"), held_out=0.0).open_task()
    assert task.validation is None
    assert isinstance(task, DemosTask)
    assert len(task.train.demos) == 4


def test_a_folder_with_one_data_set_is_that_data_set(tmp_path, capsys):
    demos = tmp_path / "demos"
    write_zarr_set(demos / "reach-0.zarr")
    (demos / "reach-0.json").write_text("{}")
    assert run("--env", ENV, "--demos", demos, out=tmp_path / "run")["updates"] == 4
    write_zarr_set(demos / "reach-1.zarr")
    assert cli.main(["train", "bc", "--demos", str(demos), *COMMON, "--out", str(tmp_path / "two")]) == 1
    told = capsys.readouterr().err
    assert f"contains 2 data sets. Fix: choose one of {demos / 'reach-0.zarr'}, {demos / 'reach-1.zarr'}" in told


def test_refiners_and_resuming_need_no_environment(tmp_path, killed_at):
    demos = write_zarr_set(tmp_path / "d.zarr")
    base = config(demos, obs_keys=("state",), settings={"updates": 12, "batch_size": 8, "hidden": (8,)})
    train(base, tmp_path / "base", progress=False)
    small = {"hidden": (8,), "updates": 12, "batch_size": 8}
    refiner = parse_config(
        {"policy": "difftori-il", "base": str(tmp_path / "base"), "settings": small, "save_every": 1}
    )
    assert (refiner.env, refiner.obs_keys, refiner.horizon) == ("none", ("state",), 4)
    straight = train(refiner, tmp_path / "straight", progress=False)
    killed_at(9, refiner, tmp_path / "killed")
    resumed = train(refiner, tmp_path / "killed", progress=False)
    assert resumed["last/action_error"] == straight["last/action_error"]


@pytest.mark.parametrize(("policy", "words"), [("bc", "--error-units range"), ("lstm", "or bc --error-units range")])
def test_a_loss_that_hardly_counts_small_motions_is_warned_of(policy, words, tmp_path, caplog):
    numbers = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    for name, scale in (("mixed", [300.0, 0.02]), ("alike", [300.0, 200.0])):
        write_zarr(
            Trajectories.of({"state": numbers}, numbers * np.float32(scale), [30, 60]), tmp_path / f"{name}.zarr"
        )
        settings = {"updates": 1, "hidden": (4,) if policy == "bc" else 4}
        train(config(tmp_path / f"{name}.zarr", policy=policy, settings=settings), tmp_path / name, progress=False)
        assert ("counts squared errors in these units" in caplog.text) == (name == "mixed")
        assert (words in caplog.text) == (name == "mixed")
        caplog.clear()
    if policy == "bc":
        settings = {"updates": 1, "hidden": (4,), "error_units": "range"}
        train(config(tmp_path / "mixed.zarr", settings=settings), tmp_path / "range", progress=False)
        assert "counts squared errors" not in caplog.text


def replaced(demos, **options):
    shutil.rmtree(demos)
    return write_zarr_set(Path(demos), **options)


def test_a_run_is_not_resumed_with_other_data(tmp_path, killed_at, capsys, caplog):
    demos = write_zarr_set(tmp_path / "d.zarr", count=12)
    settings = {"updates": 40, "batch_size": 8, "hidden": (8,)}
    wish = config(demos, obs_keys=("state",), settings=settings, save_every=1)
    out = tmp_path / "run"
    killed_at(16, wish, out)
    replaced(demos, count=24, sign=-2.0)
    assert cli.main(["train", "--resume", str(out), "--quiet"]) == 2
    told = capsys.readouterr().err
    for words in (
        "changed since the run began: episodes: 12 of 120 steps",
        "24 of 240 steps",
        "changed since the run began: action: float32",
        "changed since the run began: state: float32",
        "--accept-changed-data",
    ):
        assert words in told
    assert not (out / "summary.json").exists()

    before = json.loads((out / "data.json").read_text())["fingerprint"]
    assert cli.main(["train", "--resume", str(out), "--quiet", "--accept-changed-data"]) == 0
    record = json.loads((out / "data.json").read_text())
    assert record["earlier"] == [before]
    assert record["fingerprint"]["episodes"].startswith("24 of 240")
    assert "continuing with changed data" in caplog.text
    assert "some may have been trained on" in caplog.text
    assert "dimension 0, 1 of the actions has values outside of the range" in caplog.text
    policy, _ = load_policy(out, "last")
    assert max(policy.spec.high) <= 1, "the spec, and with it the normaliser, are those that the run began with"


@pytest.mark.parametrize(
    ("change", "part"),
    [({"seed": 1}, "state: "), ({"sign": -1.0}, "action: "), ({"length": 11}, "episodes: ")],
)
def test_the_part_that_changed_is_named(tmp_path, killed_at, change, part):
    demos = write_zarr_set(tmp_path / "d.zarr")
    wish = config(demos, obs_keys=("state",), save_every=1)
    killed_at(3, wish, tmp_path / "run")
    replaced(demos, **change)
    with pytest.raises(ConfigError, match=f"changed since the run began: {part}"):
        train(wish, tmp_path / "run", progress=False)
    replaced(demos)
    assert train(wish, tmp_path / "run", progress=False)["updates"] == 4


def test_an_image_is_part_of_the_fingerprint():
    states, actions, images, ends = episodes()
    images_too = images.copy()
    images_too[17, 3, 4, 1] ^= 1
    one, other = (
        fingerprint(Trajectories.of({"state": states, "image": shown}, actions, ends)) for shown in (images, images_too)
    )
    assert [name for name in one if one[name] != other[name]] == ["image"]


def test_a_refiner_is_not_trained_on_other_data_than_its_base(tmp_path):
    demos = write_zarr_set(tmp_path / "d.zarr")
    train(config(demos, obs_keys=("state",)), tmp_path / "base", progress=False)
    replaced(demos, seed=3)
    refiner = parse_config({"policy": "residual", "base": str(tmp_path / "base"), "settings": {"updates": 3}})
    with pytest.raises(ConfigError, match="changed since the base was trained: action"):
        train(refiner, tmp_path / "refined", progress=False)


@pytest.mark.parametrize(
    ("base", "own", "warned"),
    [
        ({}, {}, False),
        ({"held_out": 0.3}, {}, False),
        ({"held_out": 0.3}, {"held_out": 0.1}, False),
        ({}, {"held_out": 0.3}, True),
        ({}, {"data_seed": 3}, True),
        ({"held_out": 0.0}, {"held_out": 0.1}, True),
    ],
)
def test_episodes_that_the_base_was_trained_on_are_not_held_out_silently(tmp_path, caplog, base, own, warned):
    demos = write_zarr_set(tmp_path / "d.zarr")
    train(config(demos, obs_keys=("state",), **base), tmp_path / "base", progress=False)
    caplog.clear()
    refiner = {"policy": "residual", "base": str(tmp_path / "base"), "settings": {"updates": 3}, **own}
    train(parse_config(refiner), tmp_path / "refined", progress=False)
    assert ("held_out: the base" in caplog.text) == warned


def test_without_an_environment_a_refiner_holds_out_the_share_of_its_base(tmp_path):
    demos = write_zarr_set(tmp_path / "d.zarr")
    train(config(demos, env=ENV, obs_keys=("state",)), tmp_path / "base", progress=False)
    given = {"policy": "residual", "base": str(tmp_path / "base")}
    assert parse_config(given).held_out is None
    assert parse_config({**given, "env": "none"}).held_out == 0.02


def test_a_refiner_sees_what_its_base_saw(tmp_path):
    demos = write_zarr_set(tmp_path / "d.zarr")
    train(config(demos, obs_keys=("state",)), tmp_path / "base", progress=False)
    settings = {"updates": 3, "images": {"width": 16}}
    other = {"policy": "residual", "base": str(tmp_path / "base"), "obs_keys": ("img",), "settings": settings}
    with pytest.raises(ConfigError, match=r"base: it has 1 × \(state \(2,\) float32\).*but the task has 1 × \(img"):
        train(parse_config(other), tmp_path / "refined", progress=False)


def images_as(change) -> Trajectories:
    states, actions, images, ends = episodes()
    return Trajectories.of({"state": states, "image": change(images)}, actions, ends)


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images,
        lambda images: images.transpose(0, 3, 1, 2),
        lambda images: images.astype(np.float32),
        lambda images: images.astype(np.float32) / 255,
        lambda images: (images.astype(np.float32) + 0.25) / 256,
    ],
    ids=["bytes", "channels first", "floats to 255", "floats to 1", "floats to 1 that are no bytes"],
)
def test_images_are_converted_to_what_the_environment_shows(tmp_path, change):
    write_zarr(images_as(change), tmp_path / "d.zarr")
    task = config(tmp_path / "d.zarr", env=CAMERA).open_task()
    assert task.spec.obs["image"].shape == (SIDE, SIDE, 3)
    image = next(iter(task.train.in_order())).obs["image"]
    assert image.dtype == torch.uint8
    own = episodes()[2][task.train.demos.rows()]
    assert np.abs(image[:, 0].int().numpy() - own[: len(image)].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("env", "change", "words"),
    [
        (
            CAMERA,
            lambda images: images[:, :20],
            r"'image' of .* is \(20, 40, 3\) uint8, but .* shows \(40, 40, 3\) uint8",
        ),
        (CAMERA, lambda images: images / 100.0, r"'image' of .* is \(40, 40, 3\) float32, but .* shows .* uint8"),
    ],
)
def test_images_of_another_kind_are_refused_by_name(tmp_path, env, change, words):
    write_zarr(images_as(change), tmp_path / "d.zarr")
    with pytest.raises(ConfigError, match=words):
        config(tmp_path / "d.zarr", env=env).open_task()


def test_bytes_are_no_floats_from_minus_one_to_one(tmp_path):
    write_zarr(images_as(lambda images: images), tmp_path / "d.zarr")
    with pytest.raises(
        ConfigError, match=r"is \(40, 40, 3\) uint8, but tiny_env.camera:make shows \(3, 40, 40\) float32"
    ):
        config(tmp_path / "d.zarr", env=CAMERA, obs="signed").open_task()


def test_a_part_of_what_the_environment_shows_is_enough(tmp_path):
    demos = write_zarr_set(tmp_path / "d.zarr")
    assert run("--env", CAMERA, "--demos", demos, "--obs-keys", "state", out=tmp_path / "run")["last/episodes"] == 2
    with pytest.raises(ConfigError, match="has the observation 'place' .* but .* shows state .*, image"):
        config(demos, env=CAMERA, obs_keys=("place=state",)).open_task()


def test_actions_in_other_units_are_told_before_training(tmp_path, caplog):
    demos = write_zarr_set(tmp_path / "d.zarr", sign=100.0)
    with caplog.at_level(logging.WARNING):
        config(demos, env=ENV).open_task()
    assert "of the actions" in caplog.text
    assert "outside of the bounds of tiny_env.reach:make" in caplog.text
    with pytest.raises(
        ConfigError, match=r"(?s)has actions of size 2, but .* needs 1.*'state' .* shows \(3,\) float32"
    ):
        config(demos, env="pendulum:undamped").open_task()


def test_a_constant_action_is_learned(tmp_path):
    states, actions, _, ends = episodes()
    actions[:, 1] = 0.5
    write_zarr(Trajectories.of({"state": states}, actions, ends), tmp_path / "d.zarr")
    train(config(tmp_path / "d.zarr"), tmp_path / "base", progress=False)
    settings = {"updates": 3, "hidden": (8,)}
    refiner = parse_config({"policy": "difftori-il", "base": str(tmp_path / "base"), "settings": settings})
    train(refiner, tmp_path / "refined", progress=False)
    policy, _ = load_policy(tmp_path / "refined", "last")
    plan = policy.act({"state": torch.zeros(1, 1, 2)}, generator=torch.Generator())
    assert torch.equal(plan[..., 1], torch.full((1, 4), 0.5))


def test_none_needs_demonstrations(capsys):
    assert cli.main(["train", "bc", "--env", "none"]) == 2
    assert "give demonstrations, --demos PATH" in capsys.readouterr().err


def test_a_word_with_letters_is_a_list_of_robomimics(tmp_path):
    demos = write_robomimic_set(tmp_path / "demos.hdf5")
    with h5py.File(demos, "a") as file:
        file["mask/20_percent"] = np.array([b"demo_0", b"demo_2"])
    lengths = [len(DemosOptions(demos, episodes=(word,)).read()) for word in ("20_percent", "1:3", "0")]
    assert lengths == [2, 2, 1]
    with pytest.raises(DataError, match="'1,2' names no episodes"):
        DemosOptions(demos, episodes=("1,2",)).read()

"""Collecting: what is kept, that nothing depends on workers or interruptions, and what is refused."""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from difftori.collection.collect import CollectRequest, collect
from difftori.collection.episode_log import open_log
from difftori.envs.base import EnvironmentFailed
from difftori.errors import ConfigError, DataError, DifftoriError
from difftori.rollout import episode_seed

zarr = pytest.importorskip("zarr", reason="needs zarr: pip install 'difftori[metaworld]'")
ENV = "my_lab.tiny_expert:FAMILY"
FILES = "my_lab.tiny_expert.FAMILY-0"


@pytest.fixture(autouse=True)
def _lab(tmp_path, monkeypatch):
    """A package `my_lab` on sys.path that holds tiny_expert."""
    package = tmp_path / "path" / "my_lab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tiny_expert.py").write_text(
        (Path(__file__).parents[1] / "support" / "out_of_tree" / "tiny_expert.py").read_text()
    )
    for name in [name for name in sys.modules if name.startswith("my_lab")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(package.parent)


@pytest.fixture
def collect_request(tmp_path) -> CollectRequest:
    return CollectRequest(env=ENV, out=tmp_path / "demos", episodes=5)


def gather(collect_request: CollectRequest) -> dict:
    return collect(collect_request, progress=False)


def content(collect_request: CollectRequest) -> tuple[dict[str, np.ndarray], dict]:
    """All arrays of the data set, and its manifest."""
    root = zarr.open_group(collect_request.out / f"{FILES}.zarr", mode="r")
    manifest = json.loads((collect_request.out / f"{FILES}.json").read_text())
    assert dict(root.attrs) == manifest
    arrays = {name: array[:] for name, array in root["data"].arrays()}
    return arrays | {"ends": root["meta/episode_ends"][:]}, manifest


def same(one: tuple[dict, dict], other: tuple[dict, dict]) -> bool:
    return (
        one[0].keys() == other[0].keys()
        and all(np.array_equal(one[0][name], other[0][name]) for name in one[0])
        and one[1] == other[1]
    )


def seeds(count: int) -> list[int]:
    return [episode_seed(0, "demonstrations", index) for index in range(count)]


def test_the_first_successes_are_kept_as_dp3_lays_them_out(collect_request):
    summary = gather(replace(collect_request, obs="image"))
    arrays, manifest = content(collect_request)
    good = [seed for seed in seeds(30) if seed % 3][:5]
    lengths = [3 + seed % 4 for seed in good]
    assert arrays["ends"].tolist() == np.cumsum(lengths).tolist()
    steps = int(arrays["ends"][-1])
    assert {name: (values.shape, values.dtype) for name, values in arrays.items() if name != "ends"} == {
        "action": ((steps, 2), np.float32),
        "state": ((steps, 2), np.float32),
        "image": ((steps, 3, 2), np.uint8),
    }
    assert arrays["image"][:, 0, 0].tolist() == [step for length in lengths for step in range(length)]
    tried = seeds(30).index(good[-1]) + 1
    assert [row["seed"] for row in manifest["tried"]] == seeds(tried)
    assert [row["seed"] for row in manifest["tried"] if row["kept"]] == good
    assert {row["first_success"] for row in manifest["tried"]} <= {2, None}
    assert (manifest["filter"], manifest["success_rate"]) == ("success at any step", 5 / tried)
    assert (summary["episodes"], summary["tried"], summary["played_now"]) == (5, tried, tried)
    assert manifest["versions"] == {"numpy": np.__version__, "no-such-package": None}
    assert not list(collect_request.out.glob("*.attempts"))


def test_actions_are_stored_as_executed(collect_request):
    gather(collect_request)
    arrays, _ = content(collect_request)
    begin = 0
    for end in arrays["ends"]:
        states, actions = arrays["state"][begin:end], arrays["action"][begin:end]
        assert np.array_equal(actions, np.clip(3 * states, -1, 1))
        assert np.allclose(states[1:], np.clip(states[:-1] + actions[:-1], -9, 9))
        begin = end
    assert np.abs(arrays["action"]).max() == 1


def test_failures_are_kept_when_asked_for(collect_request):
    gather(replace(collect_request, keep_failures=True))
    arrays, manifest = content(collect_request)
    assert len(arrays["ends"]) == len(manifest["tried"]) == 5
    assert manifest["filter"] == "none"
    assert not all(row["first_success"] for row in manifest["tried"])


@pytest.mark.parametrize("workers", [2, 3])
def test_what_comes_out_does_not_depend_on_the_workers(collect_request, tmp_path, workers):
    gather(collect_request)
    other = replace(collect_request, out=tmp_path / "other", workers=workers)
    gather(other)
    assert same(content(collect_request), content(other))


def test_a_data_set_that_has_enough_is_left_alone_and_another_grows(collect_request, tmp_path):
    gather(replace(collect_request, episodes=2))
    before = content(collect_request)
    assert gather(replace(collect_request, episodes=1))["played_now"] == 0
    assert same(before, content(collect_request))
    played = gather(collect_request)["played_now"]
    straight = replace(collect_request, out=tmp_path / "straight")
    assert played == gather(straight)["played_now"] - len(before[1]["tried"])
    assert same(content(collect_request), content(straight))


def test_a_failing_environment_costs_the_running_episodes_only(collect_request, tmp_path, monkeypatch):
    gather(collect_request)
    trouble = tmp_path / "trouble"
    trouble.touch()
    monkeypatch.setenv("TINY_EXPERT_TROUBLE", str(trouble))
    other = replace(collect_request, out=tmp_path / "other")
    gather(other)
    assert not trouble.exists()
    assert same(content(collect_request), content(other))


def test_an_environment_that_keeps_failing_ends_it_and_what_was_played_stays(collect_request, monkeypatch):
    from difftori.collection import collect as module

    with pytest.raises(DataError, match="were requested"):
        gather(replace(collect_request, max_tries=5))
    kept = sorted(path.name for path in (collect_request.out / f"{FILES}.attempts").glob("*.npz"))

    def failing(*args):
        raise EnvironmentFailed("beyond mending")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(module, "play", failing)
        with pytest.raises(EnvironmentFailed):
            gather(collect_request)
    assert sorted(path.name for path in (collect_request.out / f"{FILES}.attempts").glob("*.npz")) == kept
    gather(collect_request)
    assert content(collect_request)[1]["episodes"] == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_costs_the_running_episodes_only(collect_request, tmp_path, monkeypatch):
    """SIGKILL while episodes are played, twice; then on to the same data set."""
    folder = collect_request.out / f"{FILES}.attempts"
    monkeypatch.setenv("TINY_EXPERT_SLOW", "0.05")
    for wanted in (1, 3):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):  # a child must never return into pytest
                gather(collect_request)
            os._exit(0)
        limit = time.monotonic() + 60
        while len(list(folder.glob("*.npz"))) < wanted and time.monotonic() < limit:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not (collect_request.out / f"{FILES}.zarr").exists()
    monkeypatch.delenv("TINY_EXPERT_SLOW")
    played_before = len(list(folder.glob("*.npz")))
    straight = replace(collect_request, out=tmp_path / "straight")
    gather(straight)
    assert gather(collect_request)["played_now"] == len(content(straight)[1]["tried"]) - played_before
    assert same(content(collect_request), content(straight))


@pytest.mark.parametrize("phase", ["write_dataset", "write_manifest", "remove_log"])
@pytest.mark.parametrize("episodes_before", [0, 2])
def test_an_end_in_any_phase_of_finishing_loses_nothing(collect_request, tmp_path, monkeypatch, phase, episodes_before):
    from difftori.collection import collect as module

    straight = replace(collect_request, out=tmp_path / "straight")
    gather(straight)
    if episodes_before:
        gather(replace(collect_request, episodes=episodes_before))

    def end(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, phase, end)
        with pytest.raises(KeyboardInterrupt):
            gather(collect_request)
    assert gather(collect_request)["played_now"] == 0
    assert same(content(collect_request), content(straight))


@pytest.mark.parametrize("damage", [b"", b"rubbish"])
def test_a_damaged_episode_is_played_again(collect_request, tmp_path, damage, caplog):
    straight = replace(collect_request, out=tmp_path / "straight")
    gather(straight)
    with pytest.raises(DataError, match=r"of the first 5 episodes succeeded, but 5 were requested.*--max-tries"):
        gather(replace(collect_request, max_tries=5))
    (collect_request.out / f"{FILES}.attempts" / "000001.npz").write_bytes(damage)
    gather(collect_request)
    assert "000001.npz: damaged" in caplog.text
    assert same(content(collect_request), content(straight))


def test_a_flipped_byte_is_noticed(collect_request, caplog):
    with pytest.raises(DataError):
        gather(replace(collect_request, max_tries=5))
    path = collect_request.out / f"{FILES}.attempts" / "000000.npz"
    actions = np.load(path)["action"].tobytes()
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(actions)] ^= 1
    path.write_bytes(damaged)
    gather(collect_request)
    assert f"{path.name}: damaged" in caplog.text


def test_another_collection_in_that_place_is_refused(collect_request):
    gather(collect_request)
    with pytest.raises(ConfigError, match="obs: 'image' here, 'state' there"):
        gather(replace(collect_request, obs="image"))
    begun = replace(collect_request, out=collect_request.out / "begun")
    with pytest.raises(DataError):
        gather(replace(begun, max_tries=5))
    with pytest.raises(ConfigError, match="filter: 'none' here, 'success at any step' there"):
        gather(replace(begun, keep_failures=True))
    (collect_request.out / f"{FILES}.json").unlink()
    with pytest.raises(ConfigError, match=r"exists without .*json. Fix: move it away"):
        gather(collect_request)


def test_a_collection_in_use_is_refused(collect_request):
    pytest.importorskip("fcntl")
    with open_log(collect_request.out / f"{FILES}.attempts", {}, iter(())), pytest.raises(ConfigError, match="in use"):
        gather(collect_request)


def test_a_full_disk_is_a_typed_error_and_leaves_what_was_there(collect_request, tmp_path, monkeypatch):
    from difftori.collection import dataset, episode_log

    straight = replace(collect_request, out=tmp_path / "straight")
    gather(straight)
    gather(replace(collect_request, episodes=2))
    before = content(collect_request)

    def full(*args, **named):
        raise OSError(28, "No space left on device")

    zarr_module, _ = dataset.need_zarr()
    for module, name in ((episode_log, "replace_file"), (zarr_module, "create_group"), (dataset, "replace_file")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(DataError, match=r"No space left on device\). Fix: free space"):
                gather(collect_request)
        if module is not dataset:
            assert same(content(collect_request), before)
    gather(collect_request)
    assert same(content(collect_request), content(straight))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metaworlt:assembly", "'metaworlt:assembly' is unknown; perhaps you meant 'metaworld:…'"),
        ("metaworld:asembly", "perhaps you meant 'assembly'"),
        ("pusht", "'pusht' has no scripted expert. Fix: choose an environment that has one: .*metaworld:…"),
        ("my_lab.tiny_expert:FAMILI", "perhaps you meant 'FAMILY'"),
        ("my_lab.tiny_expert:TROUBLE", "is a str. Fix: pass a gymnasium.Env class"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_a_suggestion(collect_request, name, message):
    with pytest.raises(ConfigError, match=message):
        gather(replace(collect_request, env=name))


def test_every_fault_is_listed(collect_request):
    with pytest.raises(ConfigError) as caught:
        gather(replace(collect_request, episodes=0, workers=0, seed=-1, max_tries=0))
    assert len(caught.value.faults) == 4
    with pytest.raises(ConfigError, match="max-tries is 3, but 5"):
        gather(replace(collect_request, max_tries=3))
    with pytest.raises(ConfigError, match="obs is 'smell'"):
        gather(replace(collect_request, obs="smell"))


def test_an_environment_that_does_not_tell_success_is_refused(collect_request):
    with pytest.raises(ConfigError, match='"success" is missing from the info'):
        gather(replace(collect_request, env="my_lab.tiny_expert:SILENT"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ONE_ROW", r"returned actions of shape \(2,\) and type float32. Fix: return numbers \(2, 2\)"),
        ("WORDS", r"of shape \(2, 2\) and type <U4"),
        ("NOTHING_STORED", "`arrays` are empty"),
        ("RESERVED_NAME", "arrays has the name 'action'"),
        ("NOT_OBSERVED", "stores 'stat', which is not observed. Fix: choose from state, view"),
    ],
)
def test_what_an_expert_does_wrong_is_named(collect_request, name, message):
    with pytest.raises(DifftoriError, match=message):
        gather(replace(collect_request, env=f"my_lab.tiny_expert:{name}", workers=2))
    assert not list(collect_request.out.glob("*.zarr"))


def test_an_observation_type_that_the_expert_does_not_have_is_refused(collect_request):
    with pytest.raises(ConfigError, match="has no parameter `obs`"):
        gather(replace(collect_request, env="my_lab.tiny_expert:NOT_OBSERVED", obs="image"))


def test_success_may_have_its_other_name(collect_request):
    assert gather(replace(collect_request, env="my_lab.tiny_expert:OTHER_NAME"))["episodes"] == 5


def test_demonstrations_of_an_edited_expert_are_not_added_to_those_of_before(collect_request, tmp_path, monkeypatch):
    gather(collect_request)
    module = tmp_path / "path" / "my_lab" / "tiny_expert.py"
    module.write_text(module.read_text().replace("return 3.0 *", "return 2.0 *"))
    for name in [name for name in sys.modules if name.startswith("my_lab")]:
        monkeypatch.delitem(sys.modules, name)
    for episodes in (5, 6):
        with pytest.raises(ConfigError, match=r"code: 'my_lab.tiny_expert .*there"):
            gather(replace(collect_request, episodes=episodes))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_metaworld_demonstrations_replay_to_the_same_success(tmp_path, workers):
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("needs the extra: pip install 'difftori[metaworld]'")
    from difftori.registry import make_env

    collect_request = CollectRequest(env="metaworld:reach", out=tmp_path, episodes=2, workers=workers)
    gather(collect_request)
    root = zarr.open_group(tmp_path / "metaworld.reach-0.zarr", mode="r")
    rows = [row for row in json.loads((tmp_path / "metaworld.reach-0.json").read_text())["tried"] if row["kept"]]
    env = make_env("metaworld:reach", num_envs=1, seed=0)
    for episode, row in enumerate(rows):
        state, _ = env.reset(seed=[row["seed"]])
        for step in range(200 * episode, 200 * (episode + 1)):
            assert np.array_equal(state[0], root["data/full_state"][step])
            state, *_, info = env.step(root["data/action"][step][None])
        assert info["success"][0]
    assert root["data/point_cloud"].shape == (400, 512, 3)
    env.close()

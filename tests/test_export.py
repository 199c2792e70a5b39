"""`difftori export`: the file alone acts as the original does."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import difftori
from difftori import export as exporting
from difftori.cli import main
from difftori.errors import ConfigError, ExportError, MissingExtraError
from difftori.export import export, export_model, files
from difftori.policies.bc import BC
from difftori.policies.bc_pointnet import BCPointNet
from difftori.policies.difftori import DiffTORI
from difftori.policies.normalized import NormalizedPolicy
from difftori.published import Published
from difftori.types import EntrySpec, Moments, TaskSpec
from tests.support import specs, tiny_runs
from tests.support.trainers import TRAINERS

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "run_onnx.py"


@pytest.fixture(scope="module")
def agent_file(agent_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "agent.onnx"
    pytest.importorskip("onnxruntime")
    export(agent_run, out, tolerance=1e-5)
    return out


def session_of(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return session, json.loads(session.get_modelmeta().custom_metadata_map["difftori"])


def test_a_policys_file_acts_as_the_policy_in_closed_loop(policy_run, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["export", str(policy_run)]) == 0
    assert "milliseconds" in capsys.readouterr().out
    session, about = session_of(policy_run / "exported.onnx")
    policy = difftori.load(policy_run)
    (name,) = about["inputs"]
    shape = about["inputs"][name]["shape"]
    assert (shape[0], about["low"], about["high"]) == ("rows", policy.low.tolist(), policy.high.tolist())
    numbers, history, plan = np.random.default_rng(0), [], []
    for _ in range(10):
        obs = numbers.normal(size=(3, *shape[2:])).astype(np.float32)
        history = [*(history or [obs] * shape[1]), obs][-shape[1] :]
        if not plan:
            plan = list(session.run(["actions"], {name: np.stack(history, 1)})[0].swapaxes(0, 1))
        scale = policy.high - policy.low
        assert np.abs((plan.pop(0) - policy.act(obs)) / scale).max() < 1e-5


def test_an_agents_file_acts_without_this_package(agent_file, agent_run, monkeypatch, capsys):
    """The program of docs/export.md, in which torch and this package cannot be imported, beside `difftori.load`."""
    gymnasium = pytest.importorskip("gymnasium")
    agent, returns = difftori.load(agent_run), []
    for episode in range(3):
        env, total, over = gymnasium.make("Pendulum-v1"), 0.0, False
        obs, _ = env.reset(seed=episode)
        agent.reset()
        while not over:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(agent_file), "Pendulum-v1"])
    for name in [*filter(lambda name: name.partition(".")[0] in ("difftori", "torch"), sys.modules)]:
        monkeypatch.setitem(sys.modules, name, None)
    runpy.run_path(str(EXAMPLE))
    assert [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()] == pytest.approx(returns, abs=0.2)


def test_the_program_draws_each_input_by_its_law_and_repeats_actions(monkeypatch, tmp_path, capsys):
    gymnasium, onnxruntime = pytest.importorskip("gymnasium"), pytest.importorskip("onnxruntime")
    inputs = {"state": {"shape": ["rows", 3]}, "normal": {"shape": ["rows", 50], "random": "standard normal"}}
    inputs |= {"uniform": {"shape": ["rows", 50], "random": "uniform in [0, 1)"}}
    about, given, steps = {"inputs": inputs, "outputs": ["actions"], "action_repeat": 3}, [], []

    class Session:
        def __init__(self, path):
            pass

        def get_modelmeta(self):
            return SimpleNamespace(custom_metadata_map={"difftori": json.dumps(about)})

        def run(self, outputs, values):
            given.append(values)
            return [np.zeros((1, 1), np.float32)]

    class Env:
        def reset(self, seed):
            return np.zeros(3), {}

        def step(self, action):
            steps.append(action)
            return np.zeros(3), 1.0, len(steps) % 7 == 0, False, {}

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(gymnasium, "make", lambda name: Env())
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "a.onnx", "Own-v0"])
    runpy.run_path(str(EXAMPLE))
    assert capsys.readouterr().out.count("return 7.0") == 3
    assert (len(given), len(steps)) == (9, 21)
    normal, uniform = (np.stack([values[name] for values in given]) for name in ("normal", "uniform"))
    assert normal.min() < -1.5
    assert 0.0 <= uniform.min() < 0.05
    assert 0.95 < uniform.max() <= 1.0


def test_a_pt2_file_takes_any_number_of_rows(policy_run, tmp_path):
    done = export(policy_run, str(tmp_path / "policy.pt2"), format="pt2")
    assert done.difference <= 1e-6
    extra = {"about.json": ""}
    module = torch.export.load(done.path, extra_files=extra).module()
    about = json.loads(extra["about.json"])
    ((_, entry),) = about["inputs"].items()
    for rows in (1, 7):
        (actions,) = module(torch.zeros(rows, *entry["shape"][1:]))
        assert actions.shape[0] == rows


def test_a_published_folder_is_exported_as_its_run(policy_run, tmp_path, monkeypatch):
    from difftori.publishing.publish import PublishRequest, publish

    publish(PublishRequest(policy_run, str(tmp_path / "folder")))
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(tmp_path / "folder"), "--format", "pt2"]) == 0
    module = torch.export.load("exported.pt2").module()
    policy = difftori.load(policy_run)
    (entry,) = policy.obs.values()
    obs = torch.ones(1, policy.n_obs_steps, *entry.shape)
    assert np.allclose(module(obs)[0][0, 0], policy.act(obs[0, 0].numpy()), atol=1e-6)


def test_a_file_that_computes_other_actions_is_refused_and_not_kept(policy_run, tmp_path, monkeypatch):
    right = files.READERS["pt2"]

    def wrong(path, used, outputs):
        call = right(path, used, outputs)
        return lambda inputs: {name: value + 1e-3 for name, value in call(inputs).items()}

    monkeypatch.setitem(exporting.READERS, "pt2", wrong)
    (tmp_path / "old.pt2").write_text("an earlier file")
    with pytest.raises(ExportError, match="other actions"):
        export(policy_run, tmp_path / "old.pt2", format="pt2")
    assert (tmp_path / "old.pt2").read_text() == "an earlier file"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("size", [7, 13, 97])
def test_observations_of_any_size_are_no_rows(size, tmp_path):
    """torch takes sizes that are equal while a function is traced for the same one."""
    moments = [Moments((-1.0,) * n, (1.0,) * n, (0.0,) * n, (0.5,) * n) for n in (size, 2)]
    obs = {"state": EntrySpec((size,), moments=moments[0])}
    spec = TaskSpec(obs, 2, 4, (-1.0,) * 2, (1.0,) * 2, n_action_steps=3, moments=moments[1])
    policy = NormalizedPolicy(BC(BC.Config(hidden=(8,)), spec).eval(), None)
    assert export_model(Published(policy, 0, "last"), tmp_path / "policy.pt2", format="pt2").difference <= 1e-6


@pytest.mark.parametrize("name", ["actions", "normal"])
def test_an_observation_with_the_name_of_another_input_or_output_is_refused(name, tmp_path):
    moments = [Moments((-1.0,) * n, (1.0,) * n, (0.0,) * n, (0.5,) * n) for n in (3, 2)]
    spec = TaskSpec({name: EntrySpec((3,), moments=moments[0])}, 2, 2, (-1.0,) * 2, (1.0,) * 2, moments=moments[1])
    config = DiffTORI.Config(hidden=(8,), latent_dim=4, init="zero", cvae_dim=2, act_latent="sample")
    policy = NormalizedPolicy(DiffTORI(config, spec).eval(), None)
    with pytest.raises(
        ExportError, match=f"the observation '{name}' has the name of another.*--obs-keys my_{name}={name}"
    ):
        export_model(Published(policy, 0, "last"), tmp_path / "policy.pt2", format="pt2")


def test_several_solves_from_latent_samples(tmp_path):
    moments = [Moments((-1.0,) * n, (1.0,) * n, (0.0,) * n, (0.5,) * n) for n in (3, 2)]
    obs = {"state": EntrySpec((3,), moments=moments[0])}
    spec = TaskSpec(obs, 2, 2, (-1.0,) * 2, (1.0,) * 2, n_action_steps=1, moments=moments[1])
    config = DiffTORI.Config(hidden=(8,), latent_dim=4, init="zero", cvae_dim=2, act_latent="sample", act_samples=3)
    policy = NormalizedPolicy(DiffTORI(config, spec).eval(), None)
    done = export_model(Published(policy, 0, "last"), tmp_path / "policy.pt2", format="pt2")
    assert done.difference <= 1e-6


@pytest.mark.parametrize("policy", [BC, BCPointNet])
def test_policies_on_point_clouds(policy, tmp_path):
    made = NormalizedPolicy(policy(policy.Config(hidden=(8,)), specs.CLOUDS).eval(), None)
    assert export_model(Published(made, 0, "last"), tmp_path / "policy.pt2", format="pt2").difference <= 1e-6


def test_nan_is_no_agreement(policy_run, tmp_path, monkeypatch):
    right = files.READERS["pt2"]

    def nan(path, used, outputs):
        call = right(path, used, outputs)
        return lambda inputs: {name: value * float("nan") for name, value in call(inputs).items()}

    monkeypatch.setitem(exporting.READERS, "pt2", nan)
    with pytest.raises(ExportError, match="nan"):
        export(policy_run, tmp_path / "policy.pt2", format="pt2")


def test_what_decides_by_values_is_refused_with_a_reason(tmp_path):
    run = tiny_runs.trained(
        "mpc", tmp_path / "run", env="pendulum", epochs="1", **{"num-train": "4", "eval-episodes": "2"}
    )
    with pytest.raises(ExportError, match="fixed number of steps"):
        export(run, tmp_path / "mpc.pt2", format="pt2")
    assert not (tmp_path / "mpc.pt2").exists()


def test_wrong_places_are_errors_before_any_work(tmp_path, policy_run, monkeypatch):
    with pytest.raises(ConfigError, match="no readable configuration"):
        export(tmp_path, tmp_path / "x.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"difftori\[onnx\]"):
        export(policy_run, tmp_path / "x.onnx")


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9])
def test_bisection_finds_what_searchsorted_finds(count):
    ends = torch.randint(0, 4, (5, count)).float().cumsum(-1)
    values = torch.cat((ends - 0.5, ends, ends + 0.5), -1)
    torch.testing.assert_close(files._searchsorted(ends, values), torch.searchsorted(ends, values))


@pytest.mark.slow
def test_plans_of_several_actions_are_valid_onnx(tmp_path):
    """torch's optimiser of ONNX files made this one invalid."""
    run = tiny_runs.trained("tdmpc", tmp_path / "run", **tiny_runs.PLANNER | {"horizon": "2", "iterations": "3"})
    assert export(run, tmp_path / "agent.onnx", format="onnx").difference <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "mpc"])
def test_every_policy_and_agent(name, format, tmp_path):
    from tiny_env.reach import write_demos

    write_demos(tmp_path / "demos.zarr")
    short = {"epochs": "1", "steps": "110"}

    def train(name):
        words = TRAINERS[name].format(demos=tmp_path / "demos.zarr", base=tmp_path / "bc").split()
        for option, value in short.items():
            if f"--{option}" in words:
                words[words.index(f"--{option}") + 1] = value
        assert main(["train", name, *words, "--out", str(tmp_path / name), "--quiet"]) == 0

    if "{base}" in TRAINERS[name]:
        train("bc")
    train(name)
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    done = export(tmp_path / name, tmp_path / f"file.{format}", format=format)
    assert done.difference <= 1e-5

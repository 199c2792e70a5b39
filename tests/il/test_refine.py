"""`refine`: your own policy as the base, in Python."""

import warnings

import numpy as np
import pytest
import torch

import difftori
from difftori import published
from difftori.data.trajectories import Trajectories
from difftori.errors import ConfigError, ShapeError
from difftori.export import export
from difftori.il.refine import refine
from difftori.loading import open_model
from difftori.policies.difftori import DiffTORIConfig

LENGTH = 12
TINY = DiffTORIConfig(updates=2, hidden=(8,), latent_dim=4)


def closing(episodes: int = 20) -> Trajectories:
    """Episodes in which the gripper closes in the last three steps."""
    step = np.tile(np.arange(LENGTH), episodes)
    state = np.stack([step / LENGTH, np.random.default_rng(0).normal(size=len(step)) * 0.05], 1)
    actions = np.where(step >= LENGTH - 3, 1.0, -1.0)[:, None]
    return Trajectories.of({"state": state}, actions, np.arange(LENGTH, LENGTH * episodes + 1, LENGTH))


def opened(horizon):
    return lambda obs: torch.full((len(obs["state"]), horizon, 1), -1.0)


def refined(base, low=(-1.0,), high=(1.0,), settings=TINY, **window):
    window = {"n_obs_steps": 1, "horizon": 8, "n_action_steps": 1} | window
    return refine(base, closing(), low=low, high=high, settings=settings, **window)


def test_the_last_steps_of_an_episode_are_learned():
    policy = refined(opened(8), settings=DiffTORIConfig(updates=300, hidden=(32,), latent_dim=8))
    states = torch.stack((torch.arange(LENGTH) / LENGTH, torch.zeros(LENGTH)), 1)[:, None]
    actions = policy.act({"state": states}, generator=torch.Generator())[:, 0, 0]
    assert (actions > 0).tolist() == [False] * 9 + [True] * 3


def test_a_refined_policy_acts_in_closed_loop_without_a_run():
    policy = refined(opened(8), n_obs_steps=2, n_action_steps=3)
    loop = difftori.load(policy)
    states = [torch.tensor([step / LENGTH, 0.0]) for step in range(4)]
    plan = policy.act({"state": torch.stack((states[0], states[0]))[None]}, generator=torch.Generator())
    acted = [loop.act({"state": state}) for state in states]
    assert np.allclose(acted[:3], plan[0, 1:4])
    again = policy.act({"state": torch.stack((states[2], states[3]))[None]}, generator=torch.Generator())
    assert np.allclose(acted[3], again[0, 1])


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ((1.0,), (-1.0,), "is above high"),
        ((-1.0, -1.0), (1.0,), "low: .* is no bound of 1 action"),
        ((-1.0,), (float("nan"),), "high: .* is no bound of 1 action"),
    ],
)
def test_bounds_are_checked(low, high, words):
    with pytest.raises(ConfigError, match=words):
        refined(opened(8), low, high)


@pytest.mark.parametrize("window", [{"n_action_steps": 9}, {"n_action_steps": 0}, {"horizon": 0}])
def test_the_window_is_checked(window):
    with pytest.raises(ConfigError, match="windows: "):
        refined(opened(8), **window)


def test_a_base_may_return_an_array():
    def base(obs):
        return np.full((len(obs["state"]), 8, 1), -1.0)

    obs = {"state": torch.zeros(2, 1, 2)}
    given, same = (refined(one).act(obs, generator=torch.Generator()) for one in (base, opened(8)))
    assert torch.equal(given, same)


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.numpy, lambda obs: obs.numpy().astype(int)])
def test_observations_may_be_of_any_type(convert):
    obs = torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]])
    plans = [refined(opened(8)).act({"state": each}, generator=torch.Generator()) for each in (obs, convert(obs))]
    assert torch.equal(*plans)


@pytest.mark.parametrize("shape", [(2, 2), (2, 1, 3), (2, 2, 2)])
def test_observations_of_another_shape_are_named(shape):
    with pytest.raises(ShapeError, match=r"state has shape \(2, .*\(B, 1, 2\)"):
        refined(opened(8)).act({"state": torch.zeros(shape)}, generator=torch.Generator())


@pytest.mark.parametrize("points", [4, 16])
def test_a_cloud_may_have_another_number_of_points_than_in_training(points):
    clouds = np.random.default_rng(0).normal(size=(LENGTH * 20, 8, 3)).astype(np.float32)
    data = Trajectories.of({"cloud": clouds}, np.ones((len(clouds), 1)), np.arange(LENGTH, len(clouds) + 1, LENGTH))

    def base(obs):
        return torch.full((len(obs["cloud"]), 8, 1), -1.0)

    window = {"n_obs_steps": 1, "horizon": 8, "n_action_steps": 1}
    policy = refine(base, data, low=(-1.0,), high=(1.0,), settings=TINY, **window)
    assert policy.act({"cloud": torch.zeros(2, 1, points, 3)}, generator=torch.Generator()).shape == (2, 8, 1)
    with pytest.raises(ShapeError, match=r"cloud has shape \(2, 1, 8, 2\)"):
        policy.act({"cloud": torch.zeros(2, 1, 8, 2)}, generator=torch.Generator())


@pytest.mark.parametrize("base", [opened(7), lambda obs: None])
def test_other_results_of_a_base_are_refused(base):
    with pytest.raises(ShapeError, match="Fix: return"):
        refined(base)


def test_a_loaded_run_is_refused_with_what_fits(policy_run):
    with pytest.raises(ConfigError, match="open_model"):
        refined(difftori.load(policy_run))
    assert callable(open_model(policy_run).component.act)


def test_a_saved_policy_acts_with_its_base_and_is_exported_without_it(tmp_path):
    policy, base = refined(opened(8), n_action_steps=2), opened(8)
    difftori.save(policy, tmp_path / "kept")
    state = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    wanted = difftori.load(policy).act(state)
    assert np.array_equal(difftori.load(tmp_path / "kept", base=base).act(state), wanted)
    export(tmp_path / "kept", tmp_path / "policy.pt2", format="pt2")
    program = torch.export.load(tmp_path / "policy.pt2").module()
    given = base({"state": state})
    (found,) = program(torch.from_numpy(state)[:, None], given)
    (other,) = program(torch.from_numpy(state)[:, None], -given)
    assert np.allclose(found[:, 0], wanted, atol=1e-5)
    assert not np.allclose(other, found, atol=1e-2)
    assert next(policy.policy.parameters()).requires_grad  # exporting works on a copy


def test_a_refiner_of_a_refiner_is_saved_and_its_own_base_given_again(tmp_path):
    lower = refined(opened(8))
    difftori.save(refined(lower), tmp_path)
    with pytest.raises(ConfigError, match="does not contain the policy that it refines"):
        difftori.load(tmp_path)
    obs = {"state": np.zeros((2, 2), np.float32)}
    assert np.array_equal(difftori.load(tmp_path, base=opened(8)).act(obs), difftori.load(refined(lower)).act(obs))


@pytest.mark.usefixtures("unchecked")
def test_a_base_that_is_of_no_use_or_no_policy_is_refused(tmp_path, policy_run):
    with pytest.raises(ConfigError, match="contains all that it needs"):
        difftori.load(policy_run, base=opened(8))
    difftori.save(refined(opened(8)), tmp_path)
    with pytest.raises(ConfigError, match="'runs/base' is no policy"):
        difftori.load(tmp_path, base="runs/base")
    for choices in ({"which": "best"}, {"base": opened(8)}, {"device": "cpu"}, {"trust_code": ["mine"]}):
        with pytest.raises(ConfigError, match="a policy in memory has no such choice"):
            difftori.load(refined(opened(8)), **choices)
    with pytest.raises(ConfigError, match="a Linear is no path"):
        difftori.load(torch.nn.Linear(2, 2))


def test_a_module_as_a_base_computes_something_and_is_not_in_training_mode(caplog):
    class Chunks(torch.nn.Module):
        """As policies of other libraries are."""

        def select(self, obs):
            return obs["state"]

    class Noisy(Chunks):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, obs):
            return self.dropout(obs["state"])[:, :1, :1].expand(-1, 8, -1)

    with pytest.raises(ConfigError, match=r"Chunks has no forward. Fix: give a function"):
        refined(Chunks())
    example = {"state": torch.zeros(2, 1, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and its files are in use
        traced = torch.jit.trace(Noisy().eval(), (example,), strict=False)
    for module in (Noisy().eval(), traced, torch.compile(Noisy().eval(), backend="eager")):
        refined(module)
    assert "in training mode" not in caplog.text
    refined(Noisy())
    assert "its dropout or batch normalisation is in training mode. Fix: base.eval()" in caplog.text


def test_a_saved_policy_is_refined_further_with_its_base(tmp_path):
    difftori.save(refined(opened(8)), tmp_path)
    again = refined(open_model(tmp_path, base=opened(8)).component)
    assert np.isfinite(difftori.load(again).act(np.zeros((2, 2), np.float32))).all()
    with pytest.raises(ConfigError, match=r"open_model\(FOLDER, base=…\)"):
        refined(open_model(tmp_path).component)


@pytest.mark.parametrize("name", ["README.md", "config.yaml", "notes.txt"])
def test_saving_keeps_the_files_of_others(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=name):
        difftori.save(refined(opened(8)), tmp_path)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.usefixtures("unchecked")
def test_only_a_policy_in_memory_is_saved(tmp_path):
    with pytest.raises(ConfigError, match="LoadedPolicy cannot be saved"):
        difftori.save(difftori.load(refined(opened(8))), tmp_path)


@pytest.mark.parametrize("broken", ["state", "base"])
def test_nan_passes_through_an_exported_file(tmp_path, broken):
    export(refined(opened(8), high=(-1.0,)), tmp_path / "policy.pt2", format="pt2")  # an action dimension that is fixed
    inputs = {"state": torch.zeros(3, 1, 2), "base": torch.full((3, 8, 1), -1.0)}
    inputs[broken][1, 0, 0] = torch.nan
    (actions,) = torch.export.load(tmp_path / "policy.pt2").module()(*inputs.values())
    assert actions.isfinite().flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("written", [0, 1, 2])
def test_saving_that_was_interrupted_can_be_repeated(tmp_path, monkeypatch, written):
    policy, replace_file, done = refined(opened(8)), published.replace_file, []

    def interrupted(path, content):
        if len(done) == written:
            raise KeyboardInterrupt
        done.append(path)
        replace_file(path, content)

    for _ in range(2):  # in a new folder, and over a complete one
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(published, "replace_file", interrupted)
            with pytest.raises(KeyboardInterrupt):
                difftori.save(policy, tmp_path)
        difftori.save(policy, tmp_path)
        difftori.load(tmp_path, base=opened(8))

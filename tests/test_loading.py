"""`difftori.load`: a trained policy or agent in your own loop gives what `difftori eval` measures."""

import shutil
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from tiny_env.reach import Reach

import difftori
from difftori.errors import ConfigError, NonFiniteError, ShapeError
from difftori.il.env_task import TEST_SEED
from difftori.il.evaluate import evaluate_run as evaluate_policy_run
from difftori.loading import LoadedPolicy
from difftori.observations import as_recorded
from difftori.registry import find_agents
from difftori.rl.evaluate import AgentInRows
from difftori.rl.evaluate import evaluate_run as evaluate_agent_run
from difftori.rollout import episode_seed
from difftori.runs.checkpoint import read_weights, write_weights
from difftori.types import EntrySpec, Moments
from tests.support import tiny_runs
from tests.support.agents import build as build_agent
from tests.support.tiny_runs import trained


def test_a_policy_alone_repeats_its_evaluation(policy_run):
    policy = difftori.load(policy_run)
    returns = []
    for seed in (TEST_SEED, TEST_SEED + 1):
        env, total, over = Reach(), 0.0, False
        obs, _ = env.reset(seed=seed)
        policy.reset()
        while not over:
            obs, reward, terminated, truncated, info = env.step(policy.act(obs))
            total, over = total + reward, terminated or truncated or info["success"]
        returns.append(total)
    assert np.mean(returns) == pytest.approx(evaluate_policy_run(policy_run, episodes=2)["return"], rel=1e-6)


def test_an_agent_alone_repeats_its_evaluation_in_the_units_of_the_environment(agent_run):
    agent = difftori.load(agent_run)
    assert (agent.low.tolist(), agent.high.tolist()) == ([-2.0], [2.0])
    env, total, over = gymnasium.make("Pendulum-v1", max_episode_steps=40), 0.0, False
    obs, _ = env.reset(seed=episode_seed(0, "evaluation", 0))
    agent.reset()
    while not over:
        obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
        total, over = total + float(reward), terminated or truncated
    assert total == pytest.approx(evaluate_agent_run(agent_run, episodes=1)["eval/return"], rel=1e-4)


@pytest.mark.parametrize("run", ["policy_run", "agent_run"])
def test_a_batch_acts_as_its_rows_alone_and_rows_can_begin_anew(run, request):
    folder = request.getfixturevalue(run)
    together, alone = difftori.load(folder), [difftori.load(folder) for _ in range(3)]
    shape = next(iter(together.obs.values())).shape
    numbers = np.random.default_rng(0)
    for step in range(6):
        obs = numbers.normal(size=(3, *shape)).astype(np.float32)
        if step == 3:
            together.reset(np.array([False, True, False]))
            alone[1].reset()
        actions = together.act(obs)
        assert np.allclose(actions, [one.act(row) for one, row in zip(alone, obs, strict=True)], atol=1e-5)
    together.reset()
    assert together.act(obs[:2]).shape == (2, len(together.low))


@pytest.mark.parametrize("run", ["policy_run", "agent_run"])
def test_tensors_in_and_out_under_inference_mode(run, request):
    policy, again = (difftori.load(request.getfixturevalue(run)) for _ in range(2))
    obs = torch.zeros(next(iter(policy.obs.values())).shape, dtype=torch.float64)
    with torch.inference_mode():
        action = policy.act({"state": obs, "camera": torch.zeros(3)})
    assert isinstance(action, torch.Tensor)
    assert np.allclose(action.numpy(), again.act(obs.numpy()), atol=1e-6)


def test_what_cannot_be_acted_on_is_named(policy_run, tmp_path):
    policy = difftori.load(policy_run)
    with pytest.raises(ShapeError, match=r"state \(3,\), not \(2,\)|state has shape \(3,\)"):
        policy.act(np.zeros(3, np.float32))
    with pytest.raises(ShapeError, match="state missing; given are place"):
        policy.act({"place": np.zeros(2)})
    with pytest.raises(NonFiniteError, match="state"):
        policy.act(np.array([0.0, np.nan]))
    policy.act(np.zeros((4, 2)))
    with pytest.raises(ShapeError, match="reset"):
        policy.act(np.zeros((2, 2)))
    with pytest.raises(ShapeError, match="4 rows"):
        policy.reset(np.array([True, False]))
    for values, message in ((np.array([1e300, 0]), "float32"), (np.array([1j, 0]), "complex")):
        with pytest.raises((ShapeError, NonFiniteError), match=message):
            difftori.load(policy_run).act({"state": values})
    with pytest.raises(ConfigError, match="run"):
        difftori.load(tmp_path)


def test_an_action_with_nan_is_an_error():
    made = lambda: lambda obs, first, active: np.full((1, 1), np.nan, np.float32)  # noqa: E731
    policy = LoadedPolicy(made, "own", {"state": EntrySpec((3,))}, (-1.0,), (1.0,), scaled=False)
    with pytest.raises(NonFiniteError, match="the action of own"):
        policy.act(np.zeros(3))


def test_an_agent_has_no_best_weights(agent_run):
    with pytest.raises(ConfigError, match="last weights only"):
        difftori.load(agent_run, which="best")


@pytest.mark.parametrize("run", ["policy_run", "agent_run"])
def test_a_fork_shares_weights_and_begins_as_after_loading(run, request):
    folder = request.getfixturevalue(run)
    one, again = difftori.load(folder), difftori.load(folder)
    numbers = np.random.default_rng(0)
    before, after = (numbers.normal(size=(4, *one.obs["state"].shape)) for _ in range(2))
    for obs in before:
        one.act(obs)
    fork = one.fork()
    for obs in after:
        one.act(obs)
        assert np.array_equal(fork.act(obs), again.act(obs))


def test_a_dict_that_was_flattened_in_training_is_flattened_again():
    seen = []

    def act(obs, first, active):
        seen.append(obs)
        return np.zeros((len(obs), 1))

    policy = LoadedPolicy(
        lambda: act,
        "own",
        {"state": EntrySpec((3,))},
        (-1.0,),
        (1.0,),
        scaled=True,
        flattened=(("goal", (2,)), ("place", (1,))),
    )
    assert policy.act({"place": np.array([2.0]), "goal": np.array([0.0, 1.0]), "camera": "off"}).shape == (1,)
    policy.reset()
    assert policy.act({"place": torch.tensor([[2.0]] * 4), "goal": torch.tensor([[0.0, 1.0]] * 4)}).shape == (4, 1)
    assert seen[0].tolist() == [[0.0, 1.0, 2.0]]
    assert seen[1].tolist() == [[0.0, 1.0, 2.0]] * 4
    policy.reset()
    assert policy.act({"place": np.array([[2.0]]), "goal": np.array([[0.0, 1.0]])}).shape == (1, 1)  # a batch of one
    with pytest.raises(ShapeError, match="goal has shape"):
        policy.act({"place": np.array([2.0]), "goal": np.array([0.0])})
    with pytest.raises(ShapeError, match="alike"):
        policy.act({"place": np.array([[2.0]]), "goal": np.array([0.0, 1.0])})


def test_an_agent_with_distractors_says_what_it_needs(tmp_path):
    options = {"env": "probe:two-step", "steps": "16", "seed-steps": "9", "eval-episodes": "2", "horizon": "1"}
    options |= {"width": "8", "latent-dim": "4", "batch-size": "4", "updates-per-step": "0.1", "distractors": "2"}
    options["action-repeat"] = "2"
    policy = difftori.load(trained("difftori", tmp_path / "run", **options))
    assert policy.action_repeat == 2
    (size,) = policy.obs["state"].shape
    state, distractors = np.zeros(size - 2), np.array([0.5, -0.5])
    alone = policy.act(np.concatenate((state, distractors)))
    policy.reset()
    assert policy.act({"state": state, "distractors": distractors}).shape == alone.shape
    with pytest.raises(ShapeError, match=r"which is state \(\d,\) and distractors \(2,\)"):
        policy.act(state)


def test_layouts_of_images_are_the_same_observation():
    image = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    entry = EntrySpec((6, 5, 3), "uint8")
    convert = partial(as_recorded, "image", stacked=False, parts="")
    wanted = image.transpose(0, 3, 1, 2)
    for given in (image, wanted, image / 255.0, (wanted / 255.0).astype(np.float32)):
        assert np.array_equal(convert(given, entry), wanted)
    with pytest.raises(ShapeError, match="from 0 to 255"):
        convert(image.astype(np.float32) * 0 + np.array([0.0, 255.0, 1.0]), entry)
    with pytest.raises(ShapeError, match=r"\(5, 6, 3\), not \(6, 5, 3\)"):
        convert(image.transpose(0, 2, 1, 3), entry)


def test_a_policys_image_may_have_many_channels_and_be_depth():
    convert = partial(as_recorded, "image", stacked=False, parts="")
    two = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 8), dtype=np.uint8)
    entry = EntrySpec((8, 8, 6), "uint8")
    assert np.array_equal(convert(two, entry), two)
    assert np.array_equal(convert(two.transpose(0, 2, 3, 1), entry), two)
    depth = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    for given in (depth, depth.transpose(0, 3, 1, 2)):
        assert np.array_equal(convert(given, EntrySpec((8, 8, 1))), depth)


@pytest.mark.parametrize("run", ["policy_run", "agent_run"])
def test_acting_does_not_need_the_environment(run, request, tmp_path):
    """On a robot, the simulation of training is not installed."""
    folder = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(run), folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"env": "not_installed:make"}))
    policy, same = difftori.load(folder), difftori.load(request.getfixturevalue(run))
    obs = np.zeros(next(iter(policy.obs.values())).shape, np.float32)
    assert np.array_equal(policy.act(obs), same.act(obs))
    evaluate = evaluate_policy_run if run == "policy_run" else evaluate_agent_run
    with pytest.raises(ConfigError, match="not_installed"):
        evaluate(folder, episodes=1)


def test_a_cameras_bytes_are_in_the_units_of_recorded_images_from_0_to_1():
    image = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)
    limits = [Moments((0.1,) * 3, (high,) * 3, (0.4,) * 3, (0.2,) * 3) for high in (0.9, 7.0)]
    recorded, metres = (EntrySpec((6, 5, 3), moments=moments) for moments in limits)
    convert = partial(as_recorded, "image", stacked=False, parts="")
    np.testing.assert_allclose(convert(image, recorded), image / 255.0, rtol=1e-6)
    assert np.array_equal(convert(image.astype(np.float32) / 255, recorded), image.astype(np.float32) / 255)
    dark = image // 200
    np.testing.assert_allclose(convert(dark, recorded), dark / 255.0, rtol=1e-6)
    masks = EntrySpec((6, 5, 3), moments=Moments((0.0,) * 3, (1.0,) * 3, (0.2,) * 3, (0.4,) * 3))
    for mask in (image > 127, dark):
        assert np.array_equal(convert(mask, masks), mask)
    assert np.array_equal(convert(image, metres), image)
    for bright in (image.astype(np.float32), image.astype(np.int64)):
        with pytest.raises(
            ShapeError, match=r"image is .* up to 2\d\d, but was recorded as .* in \[0, 1\]. Fix: give these, or uint8"
        ):
            convert(bright, recorded)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rows", [[0, 1], np.array([1, 0]), torch.tensor([0])])
def test_rows_to_reset_are_a_mask(rows, policy_run):
    policy = difftori.load(policy_run)
    policy.act(np.zeros((2, 2), np.float32))
    with pytest.raises(ShapeError, match="give a mask of booleans, one per row, not indices"):
        policy.reset(rows)
    policy.reset(torch.tensor([True, False]))
    assert policy._first.tolist() == [True, False]


def test_a_run_that_was_not_validated_has_no_best_weights(tmp_path):
    run = tiny_runs.policy_run(tmp_path, **{"held-out": "0"})
    with pytest.raises(ConfigError, match="not been validated"):
        difftori.load(run, which="best")
    assert difftori.load(run).name == "bc"


@pytest.mark.parametrize("name", ["tdmpc", "difftori"])
def test_after_a_reset_an_agent_acts_on_another_number_of_rows(name, tmp_path):
    options = tiny_runs.PLANNER if name == "tdmpc" else tiny_runs.AGENT | {"init": "previous"}
    agent = difftori.load(trained(name, tmp_path / "run", **options))
    for rows in (3, 4, 1):
        agent.reset()
        assert agent.act(np.zeros((rows, 3), np.float32)).shape == (rows, 1)


@pytest.mark.parametrize("run", ["policy_run", "agent_run"])
@pytest.mark.usefixtures("unchecked")
def test_unknown_weights_are_refused(run, request):
    with pytest.raises(ConfigError, match="which: 'Best' is unknown"):
        difftori.load(request.getfixturevalue(run), which="Best")


def test_the_kind_of_the_action_is_that_of_the_observation_that_is_used(policy_run):
    policy = difftori.load(policy_run, device=torch.device("cpu"))
    ((name, entry),) = policy.obs.items()
    for state, kind in ((np.zeros(entry.shape), np.ndarray), (torch.zeros(entry.shape), torch.Tensor)):
        for unused in (np.zeros(1), torch.zeros(1)):
            assert isinstance(policy.act({"unused": unused, name: state}), kind)


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_any_type_and_order(policy_run):
    policy = difftori.load(policy_run)
    ((name, entry),) = policy.obs.items()
    state = np.arange(entry.shape[0], dtype=np.float32)
    expected = policy.act(state)
    for given in (
        state[::-1].copy()[::-1],
        state.astype(">f8"),
        state.tolist(),
        torch.tensor(state, dtype=torch.bfloat16),
    ):
        policy.reset()
        assert np.allclose(policy.act({name: given}), expected, atol=1e-6)
    for given in ([[1.0], [1.0, 2.0]], None, "state"):
        with pytest.raises(ShapeError, match="obs: "):
            policy.act({name: given})


def test_a_grey_image_is_no_frame_of_an_rgb_stack():
    images = np.zeros((2, 84, 84, 1), np.uint8)
    with pytest.raises(ShapeError, match="Fix: give images"):
        as_recorded("state", images, EntrySpec((9, 84, 84), "uint8"), stacked=True, parts="")
    rgb = np.zeros((2, 84, 84, 3), np.uint8)[..., ::-1]
    assert as_recorded("state", rgb, EntrySpec((9, 84, 84), "uint8"), stacked=True, parts="").shape == (2, 3, 84, 84)


def test_frames_that_an_agent_could_not_act_on_are_not_kept():
    shown = []

    def act(obs, first, active):
        shown.append(obs[0, ::3, 0, 0].tolist())
        if len(shown) == 2:
            raise OSError("camera")
        return np.zeros((1, 1), np.float32)

    policy = LoadedPolicy(lambda: act, "own", {"state": EntrySpec((9, 4, 4), "uint8")}, (-1.0,), (1.0,), scaled=True)
    for value in (1, 2, 2):
        try:
            policy.act(np.full((3, 4, 4), value, np.uint8))
        except OSError:
            pass
    assert shown == [[1, 1, 1], [1, 1, 2], [1, 1, 2]]


@pytest.mark.parametrize("run", ["policy_run", "agent_run"])
def test_weights_with_nan_are_refused(run, request, tmp_path):
    """A solve would hide them: it returns its start."""
    folder = shutil.copytree(request.getfixturevalue(run), tmp_path / "run")
    file = folder / ("policy.pt" if run == "policy_run" else "agent.pt")
    state = read_weights(file)
    weights = state["learner"]["policy"] if run == "policy_run" else state["agent"]
    name = next(name for name, value in weights.items() if value.is_floating_point())
    weights[name].view(-1)[0] = torch.nan
    write_weights(file, state)
    with pytest.raises(NonFiniteError, match=f"NaN or Inf in {name}. Fix: train again"):
        difftori.load(folder, which="last" if run == "policy_run" else None)


@pytest.mark.parametrize("name", sorted(find_agents()))
def test_an_observation_beyond_the_networks_range_is_no_action(name):
    agent = build_agent(name)
    rows = AgentInRows(agent.eval(), step=0, generator=torch.Generator())
    policy = LoadedPolicy(lambda: rows, name, agent.spec.obs, (-1.0,) * 2, (1.0,) * 2, scaled=True)
    with torch.no_grad():
        for parameter in agent.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10.0)
    with pytest.raises(NonFiniteError, match=f"the action of {name} has NaN"):
        policy.act(np.full(agent.spec.obs_shape, 3e38, np.float32))


@pytest.mark.parametrize("name", ["difftori", "tdmpc"])
def test_an_agent_keeps_its_plan_after_an_error(name):
    agent = build_agent(name)
    rows = AgentInRows(agent.eval(), step=0, generator=torch.Generator())
    policy = LoadedPolicy(lambda: rows, name, agent.spec.obs, (-1.0,) * 2, (1.0,) * 2, scaled=True)
    usual = np.full(agent.spec.obs_shape, 0.5, np.float32)
    policy.act(usual)
    before = {key: value.clone() for key, value in rows._memory.items()}
    with torch.no_grad():
        for parameter in agent.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10.0)
    with pytest.raises(NonFiniteError):
        policy.act(np.full(agent.spec.obs_shape, 3e38, np.float32))
    assert all(torch.equal(rows._memory[key], value) for key, value in before.items())

"""Costs and constraints that a trained policy or agent gets when it acts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import difftori
from difftori.errors import ConfigError, NonFiniteError, ObjectiveError, ShapeError
from difftori.loading import open_model
from difftori.policies.difftori import DiffTORI
from difftori.policies.normalized import NormalizedPolicy
from difftori.policies.residual import Residual
from difftori.solver import Status, solve
from difftori.steering import Steering
from difftori.types import EntrySpec, Moments, TaskSpec
from tests.support import tiny_runs

REFINER = {
    "init": "zero",
    "decision": "chunk",
    "n-obs-steps": "2",
    "n-action-steps": "3",
    "horizon": "4",
    "hidden": "16",
}


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """A policy that plans, without a base."""
    folder = tmp_path_factory.mktemp("refined")
    demos = tiny_runs.write_demos(folder / "demos.zarr")
    common = {"epochs": "2", "batch-size": "16", "num-train": "4", "eval-episodes": "1"}
    return tiny_runs.trained("difftori-il", folder / "run", env=tiny_runs.ENV, demos=demos, **REFINER | common)


@pytest.fixture(params=["refined", "agent_run"])
def run(request):
    return request.getfixturevalue(request.param)


def observations(policy, rows=3):
    shape = policy.obs["state"].shape
    return np.random.default_rng(0).normal(size=(rows, *shape)).astype(np.float32)


def two_numbers(*names) -> TaskSpec:
    """A task with three planned actions of two numbers, and observations of two numbers with these names."""
    moments = Moments((-1.0,) * 2, (1.0,) * 2, (0.0,) * 2, (0.5,) * 2)
    obs = {name: EntrySpec((2,), moments=moments) for name in names}
    return TaskSpec(obs, 2, 3, (-1.0,) * 2, (1.0,) * 2, n_action_steps=3, moments=moments)


def right(actions):
    """The cost of first numbers below half of the upper bound."""
    return (0.4 - actions[..., 0]).clamp_min(0).square().sum(-1)


def test_a_cost_moves_the_plan_and_no_weight_does_not(run):
    plain, off, on = (difftori.load(run) for _ in range(3))
    obs = observations(plain)
    actions = plain.act(obs)
    np.testing.assert_array_equal(actions, off.act(obs, cost=right, weight=0.0))
    away = -0.4 * np.sign(actions[:, :1]).mean()
    steered = on.act(obs, cost=lambda planned: (planned[..., 0] - away).square().sum(-1), weight=1e4)
    assert abs(actions[:, 0] - away).min() > 0.1
    np.testing.assert_allclose(steered[:, 0], away, atol=0.02)


def test_more_weight_lowers_the_cost_from_the_policys_own_actions_on(refined):
    plain = difftori.load(refined)
    obs = observations(plain)
    actions = plain.act(obs)
    away = -0.4 * np.sign(actions[:, :1]).mean()

    def cost(planned):
        return (planned[..., 0] - away).square().sum(-1)

    steered = [
        difftori.load(refined).act(obs, cost=cost, weight=weight) for weight in (1e-9, 0.1, 1.0, 10.0, 100.0, 1e5)
    ]
    np.testing.assert_allclose(steered[0], actions, atol=1e-4)
    distances = [abs(action[:, 0] - away).sum() for action in steered]
    assert all(after <= before + 1e-3 for before, after in zip(distances, distances[1:], strict=False))


def test_bounds_of_the_data_do_not_stop_the_cost():
    """Rounding puts normalised bounds just outside the box, where a clamp has no gradient."""
    low, high = (-2.8, -0.3), (1.1, 0.7)
    states, actions = (Moments(*pair, (0.0,) * 2, (0.5,) * 2) for pair in (((-1.0,) * 2, (1.0,) * 2), (low, high)))
    obs = {"state": EntrySpec((2,), moments=states)}
    spec = TaskSpec(obs, 2, 3, low, high, n_action_steps=3, moments=actions)
    policy = NormalizedPolicy(DiffTORI(DiffTORI.Config(init="base", hidden=(8,)), spec).eval(), lambda obs: base)
    base = torch.tensor(low).expand(4, 3, 2)
    steering = Steering(lambda planned: (planned[..., 0] - 0.5).square().sum(-1), 1e4)
    found = policy.act({"state": torch.zeros(4, 1, 2)}, generator=torch.Generator(), steering=steering)
    torch.testing.assert_close(found[..., 0], torch.full((4, 3), 0.5), atol=0.01, rtol=0)


@pytest.mark.parametrize("height", [0.02, 0.5])
def test_what_is_constant_in_the_data_stays_so_unless_a_projection_moves_it(height):
    """Inside its box, of ±.03 here, and exactly where the cost is least there."""
    box = (-300.0, -0.03), (300.0, 0.03)
    moments = Moments((-300.0, 0.01), (300.0, 0.01), (0.0, 0.01), (100.0, 0.0))
    states = Moments((-1.0,), (1.0,), (0.0,), (0.5,))
    spec = TaskSpec({"state": EntrySpec((1,), moments=states)}, 2, 3, *box, n_action_steps=3, moments=moments)
    torch.manual_seed(0)
    base = torch.tensor([100.0, 0.008]).expand(4, 3, 2)
    policy = NormalizedPolicy(DiffTORI(DiffTORI.Config(init="base", hidden=(8,)), spec).eval(), lambda obs: base)
    obs, generator = {"state": torch.rand(4, 1, 1)}, torch.Generator().manual_seed(0)
    assert set(policy.act(obs, generator=generator)[..., 1].unique().tolist()) <= {np.float32(0.01), np.float32(0.008)}
    steering = Steering(lambda planned: (planned[..., 1] - height).square().sum(-1), 1e6, project=True)
    found = policy.act(obs, generator=generator, steering=steering)
    torch.testing.assert_close(found[..., 1], torch.full((4, 3), min(height, 0.03)), atol=1e-5, rtol=0)


def test_constraints_hold(run):
    policy = difftori.load(run)
    action = policy.act(observations(policy), constraint=lambda actions: 0.3 - actions[..., 0])
    assert action[:, 0].min() > 0.3 - 1e-3


def test_a_constraint_that_no_plan_satisfies_is_reported(run, caplog):
    policy = difftori.load(run)
    policy.act(observations(policy), constraint=lambda actions: 50.0 - actions[..., 0])
    assert "no plan satisfies it in rows [0, 1, 2] of 3" in caplog.text


def test_each_row_has_its_observation(run):
    """In the environment's units."""
    together, obs = difftori.load(run), observations(difftori.load(run))

    def towards(actions, now):
        assert set(now) == {"state"}
        return (actions[..., 0] - now["state"][:, :1].clamp(-0.5, 0.5)).square().sum(-1)

    actions = together.act(obs, cost=towards, weight=1e4)
    np.testing.assert_allclose(actions[:, 0], obs[:, 0].clip(-0.5, 0.5), atol=0.02)


def test_a_policy_alone_is_steered_as_in_a_batch(refined):
    together, obs = difftori.load(refined), observations(difftori.load(refined))
    batch = together.act(obs, cost=right, weight=3.0)
    for row, expected in zip(obs, batch, strict=True):
        np.testing.assert_allclose(difftori.load(refined).act(row, cost=right, weight=3.0), expected, atol=5e-3)


def test_samples_of_a_latent_share_cost_and_constraint(tmp_path):
    demos = tiny_runs.write_demos(tmp_path / "demos.zarr")
    several = {"cvae-dim": "2", "act-latent": "sample", "act-samples": "4", "epochs": "1", "eval-episodes": "1"}
    run = tiny_runs.trained("difftori-il", tmp_path / "run", env=tiny_runs.ENV, demos=demos, **REFINER | several)
    policy = difftori.load(run)
    obs = observations(policy)
    assert policy.act(obs, cost=right, weight=1e4)[:, 0].min() > 0.39
    policy.reset()
    assert policy.act(obs, constraint=lambda planned: 0.3 - planned[..., 0])[:, 0].min() > 0.3 - 1e-3


def test_a_sample_that_is_not_used_neither_warns_nor_raises(caplog):
    """One of two samples of each observation is infeasible, or NaN; the other one is executed."""
    rows, samples = 3, 2
    status = torch.tensor([Status.CONVERGED, Status.INFEASIBLE, Status.NON_FINITE] + [Status.CONVERGED] * 3)
    solution = solve(lambda x: x.square().sum(-1), torch.ones(rows * samples, 2))
    Steering(cost=right)._report(replace(solution, status=status), rows)
    assert caplog.text == ""
    status[4] = Status.INFEASIBLE
    Steering(cost=right)._report(replace(solution, status=status), rows)
    assert "no plan satisfies it in rows [1] of 3" in caplog.text
    status[5] = Status.NON_FINITE
    with pytest.raises(NonFiniteError, match=r"rows \[2\] of 3"):
        Steering(cost=right)._report(replace(solution, status=status), rows)


@pytest.mark.parametrize("settings", [{"solver": "spectral"}, {"solver": "reference", "max_steps": 5}])
def test_plans_of_other_solvers_are_projected(settings):
    spec = two_numbers("state")
    torch.manual_seed(0)
    policy = NormalizedPolicy(DiffTORI(DiffTORI.Config(init="zero", hidden=(8,), **settings), spec).eval())
    policy.policy.score.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)
    given = {"state": torch.randn(4, 1, 2)}
    plain = policy.act(given, generator=torch.Generator())
    assert plain.abs().max() > 0.01
    steered = policy.act(given, generator=torch.Generator(), steering=Steering(right, 1e-9))
    torch.testing.assert_close(steered, plain, atol=1e-5, rtol=0)
    bounded = policy.act(given, generator=torch.Generator(), steering=Steering(constraint=lambda a: 0.3 - a[..., 0]))
    assert bounded[..., 0].min() > 0.3 - 1e-3


def test_what_a_score_adds_to_each_latent_sample_does_not_choose_the_plan():
    """Adding g(z̃) to the score changes neither the loss nor its gradient."""
    torch.manual_seed(0)
    settings = {"init": "zero", "hidden": (8,), "cvae_dim": 2, "act_latent": "sample", "act_samples": 8}
    policy = DiffTORI(DiffTORI.Config(**settings), two_numbers("state")).eval()
    policy.score.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)
    given, plain = {"state": torch.randn(5, 1, 2)}, policy.objective

    def shifted(state, sample, base):
        objective = plain(state, sample, base)
        cost, both, added = objective.cost, objective.value_and_grad, 30 * sample[:, 0]
        object.__setattr__(objective, "cost", lambda x: cost(x) - added)
        object.__setattr__(objective, "value_and_grad", lambda x: (both(x)[0] - added, both(x)[1]))
        return objective

    found = policy.act(given, generator=torch.Generator().manual_seed(1))
    policy.objective = shifted
    torch.testing.assert_close(policy.act(given, generator=torch.Generator().manual_seed(1)), found)
    policy.settings = policy.settings.model_copy(update={"act_samples": 1})
    assert not torch.allclose(policy.act(given, generator=torch.Generator().manual_seed(1)), found), "there is a choice"


def test_a_sample_with_nan_is_the_last_choice():
    """Random starts below zero are outside of the domain of the constraint, and no plan satisfies it."""
    spec = two_numbers("state")
    torch.manual_seed(0)
    policy = NormalizedPolicy(DiffTORI(DiffTORI.Config(init="random", hidden=(8,), act_samples=40), spec).eval())
    given, generator = {"state": torch.randn(6, 1, 2)}, torch.Generator().manual_seed(2)
    steering = Steering(constraint=lambda actions: torch.where(actions[..., 0] < 0, torch.nan, 5 - actions[..., 0]))
    found = policy.act(given, generator=generator, steering=steering)
    assert (found[..., 0] >= 0).all(), "where the constraint has a value"


def test_without_a_weight_the_cost_is_not_computed(refined):
    def broken(actions):
        raise AssertionError

    obs = observations(difftori.load(refined))
    actions = difftori.load(refined).act(obs, cost=broken, weight=0.0)
    np.testing.assert_array_equal(actions, difftori.load(refined).act(obs))


def test_random_starts_are_several_and_equal_solves_are_told(caplog):
    spec = two_numbers("state")
    for more in ({}, {"cvae_dim": 4}):
        DiffTORI(DiffTORI.Config(init="zero", act_samples=3, **more), spec)
        assert "act_samples has no effect" in caplog.text
        caplog.clear()
    torch.manual_seed(0)
    policy = DiffTORI(DiffTORI.Config(init="random", hidden=(8,), act_samples=20), spec).eval()
    policy.score.apply(lambda m: nn.init.normal_(m.weight) if isinstance(m, nn.Linear) else None)
    state, one = (
        policy.encode({"state": torch.randn(5, 1, 2)}),
        DiffTORI(DiffTORI.Config(init="random", hidden=(8,)), spec),
    )
    one.load_state_dict(policy.state_dict())
    given = {"state": torch.randn(5, 1, 2)}
    state = policy.encode(given)

    def objective(planner):
        found = planner.act(given, generator=torch.Generator().manual_seed(0))
        return -policy.objective(state, state.new_zeros(5, 0), None).cost(found.flatten(1))

    assert (objective(policy) >= objective(one) - 1e-5).all()
    assert (objective(policy) > objective(one) + 1e-3).any()


@pytest.mark.parametrize("where", ["policy", "agent"])
def test_a_cost_whose_own_parameters_have_a_gradient_is_no_cost_of_the_actions(where, refined, agent_run):
    policy = difftori.load(refined if where == "policy" else agent_run)
    net = nn.Linear(1, 1)
    with pytest.raises(ObjectiveError, match="no gradient with respect to the actions"):
        policy.act(observations(policy), cost=lambda actions: net(actions.detach()[:, 0, :1]).squeeze(-1))


def test_a_constraint_that_holds_anyway_changes_no_plan_of_an_agent(agent_run):
    obs = observations(difftori.load(agent_run))
    with_cost = difftori.load(agent_run).act(obs, cost=right, weight=2.0)
    held = difftori.load(agent_run).act(obs, cost=right, weight=2.0, constraint=lambda actions: actions[..., 0] - 50.0)
    np.testing.assert_array_equal(with_cost, held)


def test_observations_may_be_given_in_any_order():
    spec = two_numbers("state", "object")
    policy = NormalizedPolicy(DiffTORI(DiffTORI.Config(init="prior", hidden=(8,)), spec).eval())
    given = {name: torch.randn(4, 1, 2) for name in spec.obs}
    turned = dict(reversed(given.items()))
    assert torch.equal(*(policy.act(each, generator=torch.Generator()) for each in (given, turned)))
    with pytest.raises(ShapeError, match="have state, but not object"):
        policy.act({"state": given["state"]}, generator=torch.Generator())


class Learned(torch.nn.Module):
    """A cost as a module, which takes the observations."""

    def forward(self, actions, now):
        return (actions[..., 0] - now["state"][:, :1].clamp(-0.5, 0.5)).square().sum(-1)


def test_modules_are_costs(refined):
    policy, obs = difftori.load(refined), observations(difftori.load(refined))
    np.testing.assert_allclose(policy.act(obs, cost=Learned(), weight=1e4)[:, 0], obs[:, 0].clip(-0.5, 0.5), atol=0.02)


def test_an_agent_that_samples_plans_is_steered_by_costs_only(tmp_path):
    policy = difftori.load(tiny_runs.trained("tdmpc", tmp_path / "run", **tiny_runs.PLANNER))
    assert policy.act(observations(policy), cost=right, weight=1e4)[:, 0].min() > 0.3
    with pytest.raises(ConfigError, match="constraint: tdmpc plans by sampling"):
        policy.act(observations(policy), constraint=lambda actions: actions[..., 0])
    kept = policy.act(observations(policy), constraint=lambda actions: 0.3 - actions[..., 0], project=True)
    assert kept[:, 0].min() > 0.3 - 1e-3


def test_a_projection_is_the_nearest_plan(policy_run):
    """Of a quadratic cost, in closed form: y = (a + 2 w c) / (1 + 2 w), in half-widths of the training data's range."""
    plain, projected = difftori.load(policy_run), difftori.load(policy_run)
    obs = observations(plain)
    moments = open_model(policy_run).component.spec.moments
    middle, half = (np.array(moments.low) + moments.high) / 2, (np.array(moments.high) - moments.low) / 2
    centre, scale = torch.tensor(middle, dtype=torch.float32), torch.tensor(half, dtype=torch.float32)
    steered = projected.act(obs, cost=lambda a: (((a - centre) / scale - 0.2).square()).sum((1, 2)), weight=3.0)
    actions = (plain.act(obs) - middle) / half
    np.testing.assert_allclose((steered - middle) / half, (actions + 2 * 3 * 0.2) / 7, atol=1e-4)


@pytest.mark.parametrize("weight", [30.0, 300.0, 1e4])
def test_a_projection_solves_stiff_costs(weight):
    """Of third differences, with curvatures up to 128 times the weight, against the linear system in double precision."""
    plans = torch.rand(8, 16, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    found = Steering(lambda actions: actions.diff(3, dim=1).square().sum((1, 2)), weight).projected(plans)
    eye = torch.eye(16, dtype=torch.float64)
    third = eye.diff(3, dim=0)
    exact = torch.linalg.solve(eye + 2 * weight * third.T @ third, plans.double())
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=0)


def test_a_projection_changes_nothing_that_costs_nothing():
    """Also where a plan leaves the range of the training data."""
    plans = 3 * torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(0)) - 1.5
    assert torch.equal(Steering(lambda actions: 0 * actions.sum((1, 2)), 10.0).projected(plans), plans)
    moved = Steering(lambda actions: actions.square().sum((1, 2)), 0.5).projected(plans)
    torch.testing.assert_close(moved, plans / 2)


def test_a_plan_that_is_not_finite_is_named():
    plans = torch.zeros(3, 2, 1)
    plans[1, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the plan is NaN or Inf in rows \[1\] of 3"):
        Steering(right).projected(plans)


@pytest.mark.parametrize("run", ["refined", "policy_run"])
@pytest.mark.parametrize("given", [{"cost": right, "weight": 3.0}, {"constraint": lambda a: 0.3 - a[:, :, 0]}])
def test_steering_under_inference_mode(run, given, request):
    policy, again = (difftori.load(request.getfixturevalue(run)) for _ in range(2))
    obs = torch.from_numpy(observations(policy))
    with torch.inference_mode():
        actions = policy.act(obs, **given)
    torch.testing.assert_close(actions, again.act(obs, **given), atol=1e-5, rtol=0)


def test_costs_may_be_looked_up_in_a_map():
    """Interpolation has no second derivative in torch. The map's values grow to the right, up to the middle."""
    values = torch.linspace(-1, 1, 41).clamp(max=0).square().expand(1, 1, 41, 41)

    def cost(actions):
        places = actions[None]
        return torch.nn.functional.grid_sample(values, places, align_corners=True).sum((0, 1, 3))

    found = Steering(cost, 1e3).projected(torch.full((3, 2, 2), -0.5))
    torch.testing.assert_close(found[..., 0], torch.zeros(3, 2), atol=0.03, rtol=0)
    torch.testing.assert_close(found[..., 1], torch.full((3, 2), -0.5), atol=1e-4, rtol=0)


def test_a_projection_leaves_what_satisfies_the_constraint(run):
    plain, projected = difftori.load(run), difftori.load(run)
    obs = observations(plain)
    actions = plain.act(obs)
    limit = float(np.median(actions[:, 0]))
    moved = projected.act(obs, constraint=lambda planned: limit - planned[:, 0, :1], project=True)
    keeps = actions[:, 0] >= limit
    assert keeps.any()
    assert not keeps.all()
    np.testing.assert_allclose(moved[keeps], actions[keeps], atol=1e-5)
    np.testing.assert_allclose(moved[~keeps, 0], limit, atol=1e-3)


def test_a_projection_leaves_the_steps_that_a_refiner_does_not_plan():
    """It plans 2 of the 4 steps that its base predicts."""
    moments = Moments((-1.0,) * 2, (1.0,) * 2, (0.0,) * 2, (0.5,) * 2)
    spec = TaskSpec({"state": EntrySpec((2,), moments=moments)}, 2, 4, (-1.0,) * 2, (1.0,) * 2, 1, 2, moments)
    base = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    policy = NormalizedPolicy(Residual(Residual.Config(hidden=(8,)), spec).eval(), lambda obs: base)
    steering = Steering(lambda actions: (actions - 0.2).square().sum((1, 2)), 1e4)
    found = policy.act({"state": torch.zeros(3, 1, 2)}, generator=torch.Generator(), steering=steering)
    torch.testing.assert_close(found[:, :2], torch.full((3, 2, 2), 0.2), atol=1e-3, rtol=0)
    assert torch.equal(found[:, 2:], base[:, 2:])


def test_an_agent_without_plans_is_projected_in_its_action(tmp_path):
    sizes = {"env": "gym:Pendulum-v1", "steps": "70", "seed-steps": "50", "eval-episodes": "1", "width": "16"}
    small = {"updates-per-step": "0.05", "batch-size": "8", "action-repeat": "1", "max-episode-steps": "40"}
    policy = difftori.load(tiny_runs.trained("sac", tmp_path / "run", **sizes, **small))
    shapes = []

    def cost(actions):
        shapes.append(actions.shape)
        return right(actions)

    assert policy.act(observations(policy), cost=cost, weight=1e4)[:, 0].min() > 0.39
    assert set(shapes) == {(3, 1, len(policy.low))}


def test_a_diffusion_policy_is_guided_not_only_projected(tmp_path):
    """With equal random numbers: the noise is another after each guided step, so the free numbers change too."""
    demos = tiny_runs.write_demos(tmp_path / "demos.zarr")
    sizes = {"preset": "small", "epochs": "1", "eval-episodes": "1", "num-train": "4"}
    run = tiny_runs.trained("diffusion", tmp_path / "run", env=tiny_runs.ENV, demos=demos, **sizes)
    obs = observations(difftori.load(run))

    def away(actions):
        return (actions[:, 0, 0] + 0.4).square()

    actions = difftori.load(run).act(obs)
    nearly = difftori.load(run).act(obs, cost=away, weight=1e-9)
    guided = difftori.load(run).act(obs, cost=away, weight=1e4)
    projected = difftori.load(run).act(obs, cost=away, weight=1e4, project=True)
    np.testing.assert_allclose(nearly, actions, atol=1e-5)
    for found in (guided, projected):
        np.testing.assert_allclose(found[:, 0], -0.4, atol=0.01)
    np.testing.assert_allclose(projected[:, 1:], actions[:, 1:], atol=1e-4)
    assert abs(guided[:, 1:] - actions[:, 1:]).max() > 1e-3


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"cost": lambda a: a.sum()}, ObjectiveError, r"cost: it returned \(\) for actions"),
        ({"cost": lambda a: a.sum(-1)}, ObjectiveError, "one number per row"),
        ({"cost": lambda a: 0.5}, ObjectiveError, "float"),
        ({"cost": lambda a: (a.sum((1, 2)) - 1e3).sqrt()}, NonFiniteError, "NaN or Inf in rows"),
        ({"project": True}, ConfigError, "project: there is no cost"),
        ({"cost": right, "weight": -1.0}, ConfigError, "weight: -1.0"),
        ({"cost": right, "weight": float("nan")}, ConfigError, "weight: nan"),
        ({"constraint": lambda a: a.sum((1, 2))}, ObjectiveError, r"constraint: it returned \(3,\)"),
        ({"constraint": lambda a: 0.5}, ObjectiveError, "constraint: it returned float"),
        ({"cost": lambda a: (a[:, 0, 0] < 0.3).float()}, ObjectiveError, "cost: it has no gradient"),
    ],
)
def test_wrong_costs_are_refused(refined, wrong, error, message):
    policy = difftori.load(refined)
    with pytest.raises(error, match=message):
        policy.act(observations(policy), **wrong)


def test_acting_builds_no_graph_whatever_the_cost_holds(refined):
    weight = torch.ones(1, requires_grad=True)
    policy = difftori.load(refined)
    action = policy.act(torch.from_numpy(observations(policy)), cost=lambda a: weight * right(a))
    assert not action.requires_grad

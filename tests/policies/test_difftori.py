"""DiffTORI for imitation: what is its own; the rest is in test_every_policy.py."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from difftori import presets
from difftori.errors import BoxError, ConfigError
from difftori.policies.difftori import DiffTORI, DiffTORIConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.solver import Box, Detached
from difftori.types import Plans, TaskSpec, Window, WindowObs
from tests.support.policies import SMALL, constant_base, enlarged, loss_of, refiner, seen
from tests.support.specs import (
    SCALE,
    SHIFT,
    SPECS,
    TINY,
    VECTORS,
    WITHIN,
    demonstrations,
    generator,
    in_other_units,
    observations,
    with_base,
)


def test_a_box_without_bounds_is_refused():
    """Actions are planned in units of the box: an infinite one would make every target 0 or NaN."""
    spec = TaskSpec.rows(obs_dim=2, action_dim=1, horizon=1, low=(-1.0,), high=(float("inf"),))
    with pytest.raises(BoxError, match="finite"):
        NormalizedPolicy(DiffTORI(DiffTORIConfig(preset="pendulum"), spec))


def test_the_largest_curvature_is_still_finite():
    policy = DiffTORI(DiffTORIConfig(preset="pendulum", curvature=80.0), TaskSpec.rows(2, 1, 1, (-1.0,), (1.0,)))
    assert policy.raw_curvature.isfinite()


@pytest.mark.parametrize("settings", [{}, {"init": "zero", "anchor": "base"}])
def test_a_base_is_asked_for_where_it_is_needed(settings):
    with pytest.raises(ConfigError, match="give --base RUN"):
        NormalizedPolicy(DiffTORI(DiffTORIConfig.model_validate({**SMALL, **settings}), VECTORS))
    NormalizedPolicy(DiffTORI(DiffTORIConfig.model_validate({**SMALL, "init": "zero"}), VECTORS))


def test_a_base_that_is_not_needed_is_not_asked():
    def never(obs: WindowObs) -> Plans:
        raise AssertionError("asked")

    policy = NormalizedPolicy(DiffTORI(DiffTORIConfig.model_validate({**SMALL, "init": "random"}), VECTORS), never)
    batch = demonstrations(VECTORS, 3)
    policy.loss(batch, generator=generator())
    actions = policy.act(batch.obs, generator=generator())
    assert torch.equal(actions[:, 0], actions[:, VECTORS.present.start]), "the ends of the plan are repeated"


@pytest.mark.parametrize("spec", [VECTORS, WITHIN["vectors"]], ids=["data fill the box", "data within the box"])
def test_only_what_is_planned_is_changed(spec):
    """Before training the solve hardly moves, so that the first policy is the base; the rest of the plan stays the base's."""
    obs = observations(VECTORS, 3)
    quiet, loud = (NormalizedPolicy(each, constant_base) for each in (refiner(spec), enlarged(refiner(spec))))
    whole = constant_base(obs)
    assert torch.allclose(quiet.act(obs, generator=generator()), whole, atol=0.1)
    acted = loud.act(obs, generator=generator())
    present = VECTORS.present
    assert torch.equal(acted[:, : present.start], whole[:, : present.start])
    assert torch.equal(acted[:, present.stop :], whole[:, present.stop :])
    assert ((acted - whole)[:, present].abs() > 1e-3).all()


@pytest.mark.parametrize("decision", ["chunk", "step"])
@pytest.mark.parametrize("anchor", ["none", "middle", "base"])
def test_the_objective_is_eq_7(decision, anchor):
    """The planner's value of its plan, written out: Σ f(z_t, a_t) − ½k‖a_t − c_t‖² with z_{t+1} = z_t + MLP(z_t, a_t)."""
    policy = enlarged(refiner(decision=decision, anchor=anchor, curvature=0.7))
    if policy.dynamics is not None:
        torch.nn.init.normal_(policy.dynamics[-1].weight, std=0.3)
    state = policy.encode(seen(policy, observations(VECTORS, 3)))
    sample, base = torch.randn(3, 4, generator=generator()), torch.rand(3, 4, 2, generator=generator(1)) - 0.5
    plan = policy.plan(state, sample, base, base, Detached())
    actions = plan.actions.reshape(3, policy.steps, policy.size)
    centres = {"none": actions, "middle": torch.zeros_like(actions), "base": base.reshape(actions.shape)}[anchor]
    total = torch.zeros(3)
    for t in range(policy.steps):
        known = torch.cat((state, sample, actions[:, t]), -1)
        total = total + policy.score(known).squeeze(-1)
        total = total - 0.5 * 0.7 * (actions[:, t] - centres[:, t]).square().sum(-1)
        if policy.dynamics is not None:
            state = state + policy.dynamics(known)
    torch.testing.assert_close(plan.value, total, rtol=1e-4, atol=1e-5)


def test_the_loss_is_eq_9():
    """Mean squared error and β·KL, the divergence over as many numbers as the error's mean."""
    batch = demonstrations(VECTORS, 4)
    for coefficient in (0.0, 0.5, 2.0):
        policy = refiner(kl_coef=coefficient)
        loss, metrics = loss_of(policy, batch, seed=1)
        assert metrics["kl"] > 1e-3
        per_number = metrics["kl"].item() / (VECTORS.n_action_steps * VECTORS.action_dim)
        assert loss.item() == pytest.approx(metrics["action_mse"].item() + coefficient * per_number, rel=1e-5)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_noise_on_the_start_is_in_half_widths_of_the_data(sigma, monkeypatch):
    """In training alone; what it has learned from is a base that lies inside of the data's range."""
    spec = in_other_units(WITHIN["vectors"])
    scale, shift = torch.tensor(SCALE), torch.tensor(SHIFT)
    policy = DiffTORI(DiffTORIConfig.model_validate({**SMALL, "base_noise": sigma}), spec)
    refined = NormalizedPolicy(policy, lambda obs: constant_base(obs) * scale + shift)
    starts, solve = [], policy.plan
    monkeypatch.setattr(policy, "plan", lambda *args, **named: (starts.append(args[2]), solve(*args, **named))[1])
    batch = demonstrations(VECTORS, 500)
    refined.loss(with_base(refined, batch), generator=generator())
    refined.act(batch.obs, generator=generator())
    trained, acted = (start - constant_base(batch.obs)[:, VECTORS.present] for start in starts)
    assert trained.std().item() == pytest.approx(sigma, rel=0.05, abs=1e-6)
    assert trained.mean().abs() <= 0.05 * sigma + 1e-6
    assert acted.abs().max() < 1e-5


@pytest.mark.parametrize("decision", ["chunk", "step"])
def test_the_loss_is_differentiated_through_the_solve(decision):
    """Against finite differences in float64, for the score, the encoder, the posterior and the length of the steps."""
    policy = enlarged(refiner(decision=decision, anchor="base", base_noise=0.1, step_size=0.1)).double()
    batch = demonstrations(VECTORS, 4)
    batch = Window({name: v.double() for name, v in batch.obs.items()}, batch.actions.double(), batch.index)

    def loss() -> torch.Tensor:
        return loss_of(policy, batch, seed=3)[0]

    loss().backward()
    for name in ("score.2.weight", "encoder.0.0.weight", "raw_step_size", "raw_curvature", "posterior.4.bias"):
        parameter = policy.get_parameter(name)
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator(5), dtype=torch.float64)
        with torch.no_grad():
            parameter += 1e-6 * direction
            above = loss()
            parameter -= 2e-6 * direction
            below = loss()
            parameter += 1e-6 * direction
        slope = (parameter.grad * direction).sum()
        assert slope.abs() > 1e-9, name
        torch.testing.assert_close(slope, (above - below) / 2e-6, rtol=1e-4, atol=1e-8, msg=name)


def test_the_divergence_is_the_normals():
    policy = refiner()
    state = torch.randn(5, 8, generator=generator())
    target = torch.randn(5, 4, 2, generator=generator(1))
    assert policy.posterior is not None
    mean, log_variance = policy.posterior(torch.cat((state, target.flatten(1)), -1)).chunk(2, -1)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(-1).mean()
    _, divergence = policy._posterior(state, target, generator())  # noqa: SLF001
    torch.testing.assert_close(divergence, expected)


def test_of_several_samples_the_plan_of_the_greatest_gain_is_kept():
    policy = enlarged(refiner(act_latent="sample", act_samples=6))
    obs = observations(VECTORS, 3)
    acted = NormalizedPolicy(policy, constant_base).act(obs, generator=generator(7))
    state = policy.encode(seen(policy, obs))
    base = constant_base(obs)[:, VECTORS.present]
    samples = torch.randn(18, 4, generator=generator(7)).reshape(6, 3, 4)
    plans = [policy.plan(state, sample, base, base, Detached()) for sample in samples]
    starts = [policy.objective(state, sample, base).cost(base.flatten(1)) for sample in samples]
    best = torch.stack([plan.value + cost for plan, cost in zip(plans, starts, strict=True)]).argmax(0)
    expected = torch.stack([plans[int(k)].actions[row].reshape(4, 2) for row, k in enumerate(best)])
    assert (best > 0).any(), "the first sample is not the best everywhere"
    torch.testing.assert_close(acted[:, VECTORS.present], expected, rtol=1e-5, atol=1e-6)


def test_the_reference_is_the_releases_solve():
    policy = enlarged(refiner(preset="reference"))
    obs = observations(VECTORS, 3)
    state = policy.encode(seen(policy, obs))
    start, sample = constant_base(obs)[:, VECTORS.present], torch.zeros(3, 4)

    def cost(x):
        return -policy.score(torch.cat((state, sample, x), -1)).squeeze(-1)

    expected = presets.reference_il(box=Box(-1.0, 1.0)).acting().solve(cost, start.flatten(1)).x
    plan = policy.plan(state, sample, start, start, Detached())
    assert policy.settings.max_steps == 100
    torch.testing.assert_close(plan.actions.flatten(1), expected)


def test_a_random_start_lies_anywhere_in_the_box():
    policy = DiffTORI(DiffTORIConfig.model_validate({**SMALL, "init": "random"}), VECTORS)
    start = policy.guess(observations(VECTORS, 500), None, generator())
    assert start.abs().max() < 1
    assert start.abs().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "draws"),
    [({}, False), ({"act_latent": "sample"}, True), ({"act_latent": "sample", "cvae_dim": 0}, False)],
)
def test_it_says_whether_it_draws(settings, draws):
    from difftori.policies.bc import BC, BCConfig

    torch.manual_seed(0)
    base = NormalizedPolicy(BC(BCConfig(hidden=(8,)), VECTORS))
    policy = NormalizedPolicy(DiffTORI(DiffTORIConfig.model_validate({**SMALL, **settings}), VECTORS), base)
    assert policy.stochastic is draws


def test_plan_horizon_lies_between_what_is_executed_and_what_there_is():
    assert refiner(plan_horizon=6).planned == 6
    with pytest.raises(ConfigError, match="plan_horizon: 9 is out of range.*the 4 executed actions, and at most the 7"):
        refiner(plan_horizon=9)


def test_it_learns_to_mend_its_base():
    """A base that always does the same; the expert does something else in every state."""
    policy = refiner(base_noise=0.3, hidden=(32, 32), latent_dim=16)
    refined = NormalizedPolicy(policy, constant_base)
    batch = with_base(refined, demonstrations(VECTORS, 32))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    noise = generator(1)
    for _ in range(150):
        loss, metrics = refined.loss(batch, generator=noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    present = VECTORS.present
    error = (refined.act(batch.obs, generator=generator()) - batch.actions)[:, present].square().mean()
    assert error < 0.1 * (constant_base(batch.obs) - batch.actions)[:, present].square().mean()
    assert metrics["start_mse"] > 0


@pytest.mark.parametrize("name", SPECS)
def test_a_prior_sees_what_the_encoder_sees(name):
    """Whatever is shown, clouds and images too; vectors alone it sees as they are."""
    torch.manual_seed(0)
    spec = SPECS[name]
    policy = DiffTORI(DiffTORIConfig(init="prior", images=TINY), spec)
    batch = demonstrations(spec, 3)
    NormalizedPolicy(policy).loss(batch, generator=generator())[0].backward()
    assert policy.prior is not None
    assert all(p.grad is not None for p in policy.prior.parameters())
    assert NormalizedPolicy(policy).act(batch.obs, generator=generator()).shape == batch.actions.shape


def test_a_solve_that_meets_nan_is_reported_apart_and_leaves_the_others_alone():
    policy = refiner(init="zero")
    batch = demonstrations(VECTORS, 4)
    _, metrics = loss_of(policy, batch)
    assert metrics["unsolved"] == 0.0
    batch.obs["state"][2] = torch.inf
    _, metrics = loss_of(policy, batch)
    assert metrics["unsolved"] == 0.25
    assert math.isfinite(metrics["action_mse"])

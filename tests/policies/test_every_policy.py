"""What every imitation policy must do. The package is walked: a new file is tested without being named here."""

import copy

import pytest
import torch
from pydantic import ValidationError

from difftori.errors import ShapeError
from difftori.interfaces import PolicyConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.registry import find_policies
from difftori.steering import Steering
from difftori.types import TaskSpec, Window
from tests.support.devices import halves, never_waits
from tests.support.specs import (
    OBS_SCALE,
    OBS_SHIFT,
    SCALE,
    SHIFT,
    SMALL,
    SPECS,
    WITHIN,
    build,
    demonstrations,
    generator,
    in_other_units,
    observations,
    with_base,
)

LOSS_IN_TASK_UNITS = {"bc", "bc-pointnet"}
"""Their loss is the error of the controls themselves, as the pendulum's literature has it."""
ALL_IN_TASK_UNITS = {"lstm"}
"""Table 8's baseline normalises nothing, as its source."""


@pytest.fixture(params=[f"{name}-{spec}" for name in sorted(find_policies()) for spec in SPECS])
def policy(request) -> NormalizedPolicy:
    name, _, spec = request.param.rpartition("-")
    try:
        return build(find_policies()[name], SPECS[spec], **SMALL.get(name, {}))
    except ShapeError as error:
        pytest.skip(f"not for this task: {error}")


@pytest.fixture
def batch(policy) -> Window:
    """Four demonstrations."""
    return with_base(policy, demonstrations(policy.spec, 4))


def optimiser(policy: NormalizedPolicy) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    settings = policy.policy.config
    return kinds[settings.optimizer](policy.policy.parameters(), lr=max(settings.lr, 1e-3))


def test_training_never_waits_for_the_device(policy, batch, monkeypatch):
    """What is logged stays there too, so that the trainer reads all of it at once."""
    if policy.policy.name == "mpc":
        pytest.skip("its solve ends where it converges")
    monkeypatch.setattr(torch, "rand", halves)  # on the meta device, and only there, it takes no generator
    there = NormalizedPolicy(copy.deepcopy(policy.policy).to("meta"), policy.base)
    batch = batch.to("meta")
    with never_waits():
        loss, metrics = there.loss(batch, generator=torch.Generator())
        loss.backward()
    assert loss.device.type == "meta"
    assert all(value.device.type == "meta" for value in metrics.values())


def test_walking_finds_the_baselines():
    assert {"bc", "lstm", "difftori-il", "diffusion", "dp3", "residual"} <= set(find_policies())


def test_name_and_settings_are_declared(policy):
    policy = policy.policy
    assert policy.name == policy.name.lower()
    assert issubclass(policy.Config, PolicyConfig)
    assert isinstance(policy.config, policy.Config)
    assert policy.Config.model_validate(policy.config.model_dump()) == policy.config


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", "sgd"), ("lr", -1.0), ("epochs", 0), ("batch_size", 0), ("clip_norm", -1.0), ("rmsprop_alpha", 1.0)],
)
@pytest.mark.parametrize("policy_name", sorted(find_policies()))
def test_a_default_of_its_own_keeps_the_range_of_the_setting(policy_name, name, value):
    with pytest.raises(ValidationError, match=name):
        find_policies()[policy_name].Config.model_validate({name: value})


def test_the_spec_survives_being_saved(policy):
    from dataclasses import asdict

    assert TaskSpec.from_plain(asdict(policy.spec)) == policy.spec


def test_loss_falls_on_a_tiny_set(policy, batch):
    optim = optimiser(policy)
    losses = []
    for _ in range(60):
        loss, metrics = policy.loss(batch, generator=generator())
        assert loss.shape == ()
        assert all(value.shape == () and not value.requires_grad for value in metrics.values())
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
        if losses[-1] < 0.8 * losses[0]:
            return
    pytest.fail(f"the loss does not fall: {losses}")


def test_something_is_trainable_and_gets_a_gradient(policy, batch):
    chosen = list(policy.policy.trainable(0))
    policy.loss(batch, generator=generator())[0].backward()
    assert chosen
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in chosen)


@pytest.mark.parametrize("rows", [1, 7])
def test_actions_have_the_documented_shape_and_lie_in_the_box(policy, rows):
    with torch.no_grad():
        for value in policy.policy.parameters():
            value.mul_(3.0)
    spec = policy.spec
    actions = policy.act(observations(spec, rows), generator=generator())
    assert actions.shape == (rows, spec.horizon, spec.action_dim)
    assert not actions.requires_grad
    assert (actions >= torch.tensor(spec.low)).all()
    assert (actions <= torch.tensor(spec.high)).all()


@pytest.mark.parametrize("project", [False, True], ids=["own way", "projected"])
def test_costs_and_constraints_move_the_plan(policy, project):
    """To the middle of the actions' range by a heavy cost, and into its upper half by a constraint."""
    obs = observations(policy.spec, 3)
    shown = policy.spec.moments
    low, high = (policy.spec.low[0], policy.spec.high[0]) if shown is None else (shown.low[0], shown.high[0])
    middle, half = (low + high) / 2, (high - low) / 2

    def above(actions):
        return (actions[..., 0] - middle) / half

    towards = Steering(lambda actions: above(actions).square().sum(-1), 1e4, project=project)
    within = Steering(constraint=lambda actions: 0.1 - above(actions), project=project)
    for steering, lowest, highest in ((towards, -0.02, 0.02), (within, 0.099, 1.001)):
        found = policy.act(obs, generator=generator(), steering=steering)[:, policy.spec.present]
        assert lowest <= above(found).min() <= above(found).max() <= highest


def test_saved_and_loaded_weights_act_alike(policy, tmp_path):
    torch.save(policy.policy.state_dict(), tmp_path / "weights.pt")
    twin = build(type(policy.policy), policy.spec, **policy.policy.config.model_dump())
    with torch.no_grad():
        for value in twin.policy.parameters():
            value.add_(1.0)
    twin.policy.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    obs = observations(policy.spec, 5)
    assert torch.equal(policy.act(obs, generator=generator(3)), twin.act(obs, generator=generator(3)))


def test_equal_generators_give_equal_actions_and_losses(policy, batch):
    first, second = (policy.act(batch.obs, generator=generator(4)) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (policy.loss(batch, generator=generator(4))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_rows_never_interact(policy):
    obs, other = observations(policy.spec, 4), observations(policy.spec, 4, seed=8)
    changed = {name: torch.cat((values[:1], other[name][1:])) for name, values in obs.items()}
    first, second = (policy.act(x, generator=generator())[0] for x in (obs, changed))
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("shown", WITHIN)
@pytest.mark.parametrize("name", sorted(set(find_policies()) - ALL_IN_TASK_UNITS))
def test_units_of_the_task_make_no_difference(name, shown):
    """The same weights on the same task in other units: the same loss, the same actions in those units.

    The data lie inside a wider box, so that neither stands for the other.
    """
    kind, spec = find_policies()[name], WITHIN[shown]
    try:
        twins = [build(kind, each, **SMALL.get(name, {})) for each in (spec, in_other_units(spec))]
    except ShapeError as error:
        pytest.skip(f"not for this task: {error}")
    for policy in twins:
        with torch.no_grad():
            for value in policy.policy.parameters():
                value.mul_(1.5)  # what is quiet at first says something
    scale, shift = torch.tensor(SCALE), torch.tensor(SHIFT)
    batch = demonstrations(SPECS[shown], 6)
    moved = {key: values * OBS_SCALE + OBS_SHIFT for key, values in batch.obs.items()}
    acted, also = (policy.act(x, generator=generator(3)) for policy, x in zip(twins, (batch.obs, moved), strict=True))
    torch.testing.assert_close(acted * scale + shift, also, rtol=1e-3, atol=2e-3)
    if name not in LOSS_IN_TASK_UNITS:
        there = Window(moved, batch.actions * scale + shift, batch.index)
        pairs = zip(twins, (batch, there), strict=True)
        first, second = (each.loss(with_base(each, window), generator=generator(2))[0] for each, window in pairs)
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)

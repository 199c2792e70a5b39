"""What every imitation policy must do. The package is walked: a new file is tested without being named here."""

import pytest
import torch
from pydantic import ValidationError

from difftori.interfaces import Policy, PolicyConfig
from difftori.policies import find_policies
from difftori.types import Chunk, TaskSpec

SPEC = TaskSpec(obs_dim=3, action_dim=1, horizon=6, low=(-2.0,), high=(2.0,))
"""The pendulum's sizes with fewer steps: policies that know the task's dynamics learn on it too."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def observations(rows: int, seed: int = 1) -> torch.Tensor:
    """Pendulum states: on the unit circle, with a velocity."""
    angle, velocity = 3 * torch.rand(2, rows, generator=generator(seed)) - 1.5
    return torch.stack((angle.cos(), angle.sin(), velocity), dim=1)


@pytest.fixture(params=sorted(find_policies()))
def policy(request) -> Policy:
    kind = find_policies()[request.param]
    torch.manual_seed(0)
    return kind(kind.Config(), SPEC)


@pytest.fixture
def batch() -> Chunk:
    """Four demonstrations that push towards upright, ever less."""
    obs = observations(4)
    fading = torch.linspace(1.0, 0.2, SPEC.horizon)
    actions = -1.5 * obs[:, 1, None, None] * fading[None, :, None]
    return Chunk(obs, actions, torch.arange(4))


def optimiser(policy: Policy) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
    return kinds[policy.config.optimizer](policy.parameters(), lr=max(policy.config.lr, 1e-3))


def test_walking_finds_the_baselines():
    assert {"bc", "lstm"} <= set(find_policies())


def test_name_and_settings_are_declared(policy):
    assert policy.name == policy.name.lower()
    assert issubclass(policy.Config, PolicyConfig)
    assert isinstance(policy.config, policy.Config)
    assert policy.Config.model_validate(policy.config.model_dump()) == policy.config


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", "sgd"), ("lr", -1.0), ("epochs", 0), ("batch_size", 0), ("clip_norm", -1.0), ("rmsprop_alpha", 1.0)],
)
def test_a_default_of_its_own_keeps_the_range_of_the_setting(policy, name, value):
    with pytest.raises(ValidationError, match=name):
        policy.Config.model_validate({name: value})


def test_loss_falls_on_a_tiny_set(policy, batch):
    optim = optimiser(policy)
    losses = []
    for _ in range(25):
        loss, metrics = policy.loss(batch, generator=generator())
        assert loss.shape == ()
        assert all(isinstance(value, float) for value in metrics.values())
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
        if losses[-1] < 0.8 * losses[0]:
            return
    pytest.fail(f"the loss does not fall: {losses}")


def test_something_is_trainable_and_gets_a_gradient(policy, batch):
    chosen = list(policy.trainable(0))
    policy.loss(batch, generator=generator())[0].backward()
    assert chosen
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in chosen)


@pytest.mark.parametrize("rows", [1, 7])
def test_actions_have_the_documented_shape_and_lie_in_the_box(policy, rows):
    with torch.no_grad():
        for value in policy.parameters():
            value.mul_(3.0)
    actions = policy.act(observations(rows), generator=generator())
    assert actions.shape == (rows, SPEC.horizon, SPEC.action_dim)
    assert not actions.requires_grad
    assert (actions >= torch.tensor(SPEC.low)).all()
    assert (actions <= torch.tensor(SPEC.high)).all()


def test_saved_and_loaded_weights_act_alike(policy, tmp_path):
    torch.save(policy.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(99)
    twin = type(policy)(policy.config, SPEC)
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    obs = observations(5)
    assert torch.equal(policy.act(obs, generator=generator(3)), twin.act(obs, generator=generator(3)))


def test_equal_generators_give_equal_actions_and_losses(policy, batch):
    first, second = (policy.act(batch.obs, generator=generator(4)) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (policy.loss(batch, generator=generator(4))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_rows_never_interact(policy):
    obs = observations(4)
    changed = obs.clone()
    changed[1:] = observations(3, seed=8)
    first, second = (policy.act(x, generator=generator())[0] for x in (obs, changed))
    assert torch.allclose(first, second, atol=1e-5)

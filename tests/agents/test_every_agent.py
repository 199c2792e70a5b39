"""What every agent of the package must do, whoever adds it."""

import pytest
import torch

from difftori.agents import find_agents
from difftori.errors import ConfigError, NonFiniteError
from difftori.registry import find_agent
from difftori.runs.checkpoint import pack, weights_digest
from difftori.types import EnvSpec, Segment

AGENTS = sorted(find_agents())
STATES = EnvSpec("probe:tiny", (5,), "float32", 2, 100, 1)
PIXELS = EnvSpec("probe:pictures", (9, 84, 84), "uint8", 2, 100, 1)
TINY = {"width": 16, "encoder_width": 16, "latent_dim": 8, "batch_size": 8, "horizon": 3, "samples": 16, "elites": 4}


def build(name: str, spec: EnvSpec = STATES, **settings):
    torch.manual_seed(0)
    kind = find_agent(name)
    tiny = {n: v for n, v in {**TINY, "prior_samples": 2, "channels": 4}.items() if n in kind.Config.model_fields}
    return kind(kind.Config(**{**tiny, **settings}), spec)


def lively(name: str, spec: EnvSpec = STATES, **settings):
    """An agent of random weights throughout: freshly built, its last layers are zeros, and nothing depends on anything."""
    agent = build(name, spec, **{"schedule_steps": 0, **settings})
    g = torch.Generator().manual_seed(7)
    for parameter in agent.parameters():
        parameter.data.normal_(std=0.3, generator=g)
    return agent


def segment(spec: EnvSpec = STATES, *, steps: int = 3, rows: int = 8, seed: int = 0) -> Segment:
    g = torch.Generator().manual_seed(seed)
    shape = (steps + 1, rows, *spec.obs_shape)
    pixels = spec.obs_dtype == "uint8"
    obs = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8) if pixels else torch.randn(shape, generator=g)
    return Segment(
        obs,
        2 * torch.rand(steps, rows, spec.action_dim, generator=g) - 1,
        torch.rand(steps, rows, generator=g),
        torch.zeros(steps, rows, dtype=torch.bool),
        torch.ones(steps, rows),
        torch.ones(rows),
        torch.arange(rows),
    )


def act(agent, obs, memory=None, *, first=None, step=30_000, explore=False, seed=0):
    first = torch.ones(len(obs), dtype=torch.bool) if first is None else first
    generator = torch.Generator().manual_seed(seed)
    return agent.act(obs, memory, first=first, step=step, explore=explore, generator=generator)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("spec", [STATES, PIXELS], ids=["state", "pixels"])
def test_acts_in_the_box_and_learns(name, spec):
    agent = build(name, spec, lr=1e-2)
    batch = segment(spec)
    actions, memory = act(agent, batch.obs[0], explore=True)
    assert actions.shape == (8, 2)
    assert actions.abs().max() <= 1
    assert not actions.requires_grad
    again, _ = act(agent, batch.obs[0], memory, first=torch.zeros(8, dtype=torch.bool))
    assert again.isfinite().all()
    g = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(30):
        priorities, metrics = agent.update(batch, generator=g)
        losses.append(metrics["reward_loss"])
    assert priorities.shape == (8,)
    assert priorities.isfinite().all()
    assert losses[-1] < 0.5 * losses[0]


# Without noise that is drawn row by row: a row alone meets the same as in company.
UNDRAWN = {"tdmpc": {"prior_samples": 0}, "difftori": {"init_std": 0.0}}
WITH_MEMORY = [("tdmpc", {}), ("difftori", {"init": "previous"})]


@pytest.mark.parametrize("name", AGENTS)
def test_a_row_acts_alone_as_in_company(name, monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda weights, count, **options: weights.topk(count, 1).indices)
    agent = lively(name, **UNDRAWN.get(name, {})).double()
    obs, later = segment().obs[:2, :5].double()
    together, memory = act(agent, obs)
    again, _ = act(agent, later, memory, first=torch.zeros(5, dtype=torch.bool))
    assert varied(together)
    assert varied(again)
    for row in range(len(obs)):
        alone, own = act(agent, obs[row, None])
        torch.testing.assert_close(alone, together[row, None], atol=1e-9, rtol=0)
        torch.testing.assert_close(own["plan"], memory["plan"][row, None], atol=1e-9, rtol=0)
        alone, _ = act(agent, later[row, None], own, first=torch.zeros(1, dtype=torch.bool))
        torch.testing.assert_close(alone, again[row, None], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("explore", [False, True])
def test_what_others_see_is_nothing_to_a_row(name, explore):
    agent = lively(name).double()
    obs, others = segment().obs[0].double(), segment(seed=1).obs[0].double()
    before, _ = act(agent, obs, explore=explore)
    assert varied(before)
    for row in (0, 3, 7):
        mixed = others.clone()
        mixed[row] = obs[row]
        after, _ = act(agent, mixed, explore=explore)
        torch.testing.assert_close(after[row], before[row], atol=1e-9, rtol=0)
        assert varied(after)


def varied(actions: torch.Tensor) -> bool:
    """Whether at least half of the rows of (B A) differ by more than rounding, so that a mixture of rows would show."""
    return len(actions.mul(1e3).round().unique(dim=0)) > len(actions) // 2


@pytest.mark.parametrize(("name", "settings"), [*WITH_MEMORY, ("difftori", {"init": "prior"})])
def test_a_first_row_forgets_the_last_episode(name, settings):
    agent = lively(name, **settings)
    obs, earlier = segment().obs[0], segment().obs[1]
    _, memory = act(agent, earlier)
    fresh, _ = act(agent, obs)
    forgotten, _ = act(agent, obs, memory, first=torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(forgotten, fresh, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "settings"), WITH_MEMORY)
def test_each_row_forgets_or_goes_on_by_its_own_flag(name, settings):
    agent = lively(name, **settings)
    obs, earlier = segment().obs[0], segment().obs[1]
    _, memory = act(agent, earlier)
    fresh, _ = act(agent, obs)
    going_on, _ = act(agent, obs, memory, first=torch.zeros(8, dtype=torch.bool))
    assert ((going_on - fresh).abs().amax(1) > 1e-4).any()
    first = torch.arange(8) % 2 == 0
    mixed, _ = act(agent, obs, memory, first=first)
    torch.testing.assert_close(mixed, torch.where(first[:, None], fresh, going_on), rtol=0, atol=0)


@pytest.mark.parametrize("name", AGENTS)
def test_goes_on_exactly_from_its_saved_state(name):
    def run(agent, count, generator):
        for index in range(count):
            agent.update(segment(seed=index), generator=generator)
            agent.end_episode(segment(seed=index).obs[:, 0], generator=generator)

    whole, part = build(name), build(name)
    g, h = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    run(whole, 3, g)
    run(part, 3, h)
    assert weights_digest(whole) == weights_digest(part)
    pack({"weights": part.state_dict(), "training": part.training_state()})  # can be written as a checkpoint
    resumed = build(name)
    resumed.load_state_dict(part.state_dict())
    resumed.load_training_state(part.training_state())
    run(whole, 3, g)
    run(resumed, 3, h)
    assert weights_digest(whole) == weights_digest(resumed)


@pytest.mark.parametrize("name", AGENTS)
def test_nan_leaves_the_weights_and_ends_with_a_name(name):
    agent = build(name)
    batch = segment()
    batch.rewards[0, 0] = float("nan")
    before = [p.clone() for p in agent.optimizer.parameters]
    g = torch.Generator().manual_seed(0)
    for _ in range(9):
        agent.update(batch, generator=g)
    assert all(torch.equal(p, old) for p, old in zip(agent.optimizer.parameters, before, strict=True))
    with pytest.raises(NonFiniteError, match="reward"):
        agent.update(batch, generator=g)


@pytest.mark.parametrize("name", AGENTS)
def test_presets_are_defaults(name):
    config = find_agent(name).Config
    assert config(preset="compact").width == 128
    assert config(preset="compact", width=7).width == 7
    assert config().width == 512
    with pytest.raises(ValueError, match="preset 'huge' is unknown"):
        config(preset="huge")


def test_an_unknown_agent_is_named():
    with pytest.raises(ConfigError, match="perhaps you meant 'tdmpc'"):
        find_agent("tdmpcc")


@pytest.mark.parametrize("name", AGENTS)
def test_half_precision_encodes_the_same_to_three_digits(name):
    agents = [build(name, PIXELS, precision=precision) for precision in ("float32", "bfloat16")]
    obs = segment(PIXELS).obs[0]
    full, half = (agent.model.encode(obs) for agent in agents)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0, atol=0.02 * full.abs().max().item())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in agents[0].parameters() if p.dim() == 4)

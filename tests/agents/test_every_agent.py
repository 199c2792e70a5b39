"""What every agent of the package must do, including your own."""

import pytest
import torch

from benchmarks.operations import optimizers_without_values
from difftori.errors import ConfigError, NonFiniteError
from difftori.models.encoders import PixelEncoder, PixelFeatures
from difftori.registry import find_agent, find_agents
from difftori.runs.checkpoint import pack, weights_digest
from tests.support.agents import PIXELS, STATES, accepted, act, build, randomised, segment
from tests.support.devices import halves, never_waits

AGENTS = sorted(find_agents())


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("spec", [STATES, PIXELS], ids=["state", "pixels"])
def test_acts_in_the_box_and_learns(name, spec):
    agent = build(name, spec, lr=1e-2, discount=0.1)
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
        losses.append(metrics[next(loss for loss in ("reward_loss", "critic_loss") if loss in metrics)])
    assert priorities.shape == (8,)
    assert priorities.isfinite().all()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("explore", [False, True])
def test_acting_never_waits_for_the_device(name, explore, monkeypatch):
    # On the meta device, and only there, this function takes no generator.
    monkeypatch.setattr(torch, "rand", halves)  # the heaviest elite is sampled
    agent = randomised(name).to("meta")
    obs, generator = torch.empty(4, *STATES.obs_shape, device="meta"), torch.Generator()
    options = {"step": 30_000, "explore": explore, "generator": generator}
    with never_waits():
        _, memory = agent.act(obs, None, first=torch.ones(4, dtype=torch.bool, device="meta"), **options)
        agent.act(obs, memory, first=torch.zeros(4, dtype=torch.bool, device="meta"), **options)


@pytest.mark.parametrize("spec", [STATES, PIXELS], ids=["states", "pixels"])
@pytest.mark.parametrize(
    ("name", "settings"), [*((name, {}) for name in AGENTS), ("difftori", {"pg": "replay"})], ids=[*AGENTS, "replay"]
)
def test_learning_never_waits_for_the_device(name, settings, spec):
    with torch.device("meta"):
        agent = build(name, spec, **settings)
    batch, generator = segment(spec).to("meta"), torch.Generator()
    with optimizers_without_values(), never_waits():
        for _ in range(4):
            agent.update(batch, generator=generator)
        agent.end_episode(batch.obs[:, 0], generator=generator)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("explore", [False, True])
def test_the_scheduled_noise_may_be_a_tensor(name, explore):
    agent, obs = randomised(name, **accepted(name, {"schedule_steps": 1000})), segment().obs[0]
    for step in (0, 500, 2000):
        schedule = agent.schedule(step)
        expected, _ = act(agent, obs, step=step, explore=explore)
        found, _ = act(agent, obs, step=step, explore=explore, std=torch.tensor(schedule.std))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", AGENTS)
def test_equal_schedules_have_equal_actions_and_updates(name):
    """What is replayed from a graph was recorded at another step."""
    agent = randomised(name, **accepted(name, {"schedule_steps": 10}))
    assert agent.schedule(10) == agent.schedule(1000)
    seen = [agent.schedule(step) for step in range(11)]
    assert len(set(seen)) == (1 if name == "sac" else 11)
    agent.updates = 1000
    late = agent.learning_schedule()
    agent.updates = 1002
    assert agent.learning_schedule() == late is not None, "otherwise a CUDA graph is never recorded"


# Without noise that is drawn row by row: a row alone meets the same as in company.
UNDRAWN = {"tdmpc": {"prior_samples": 0}, "difftori": {"init_std": 0.0}}
WITH_MEMORY = [("tdmpc", {}), ("difftori", {"init": "previous"})]


@pytest.mark.parametrize("name", AGENTS)
def test_a_row_acts_alone_as_in_company(name, monkeypatch):
    monkeypatch.setattr(torch, "rand", halves)  # the heaviest elite is sampled
    agent = randomised(name, **UNDRAWN.get(name, {})).double()
    obs, later = segment().obs[:2, :5].double()
    together, memory = act(agent, obs)
    again, _ = act(agent, later, memory, first=torch.zeros(5, dtype=torch.bool))
    assert varied(together)
    assert varied(again)
    for row in range(len(obs)):
        alone, own = act(agent, obs[row, None])
        torch.testing.assert_close(alone, together[row, None], atol=1e-9, rtol=0)
        assert own.keys() == memory.keys()
        for key, value in own.items():
            torch.testing.assert_close(value, memory[key][row, None], atol=1e-9, rtol=0)
        alone, _ = act(agent, later[row, None], own, first=torch.zeros(1, dtype=torch.bool))
        torch.testing.assert_close(alone, again[row, None], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("explore", [False, True])
def test_what_others_see_is_nothing_to_a_row(name, explore):
    agent = randomised(name).double()
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
    agent = randomised(name, **settings)
    obs, earlier = segment().obs[0], segment().obs[1]
    _, memory = act(agent, earlier)
    fresh, _ = act(agent, obs)
    forgotten, _ = act(agent, obs, memory, first=torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(forgotten, fresh, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "settings"), WITH_MEMORY)
def test_each_row_forgets_or_goes_on_by_its_own_flag(name, settings):
    agent = randomised(name, **settings)
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
    optimizers = list(agent.optimizers.values())
    before = [[p.clone() for p in optimizer.parameters] for optimizer in optimizers]
    g = torch.Generator().manual_seed(0)
    for _ in range(9):
        agent.update(batch, generator=g)
    hit = [pair for pair in zip(optimizers, before, strict=True) if pair[0].consecutive_skips == 9]
    assert hit
    for optimizer, weights in hit:
        assert all(torch.equal(p, old) for p, old in zip(optimizer.parameters, weights, strict=True))
    assert all(p.isfinite().all() for p in agent.parameters())
    named = [network for optimizer, _ in hit for network in optimizer.networks]
    with pytest.raises(NonFiniteError, match="|".join(named)):
        agent.update(batch, generator=g)


@pytest.mark.parametrize("name", AGENTS)
def test_presets_are_defaults(name):
    config = find_agent(name).Config
    assert {"paper", "compact", "small"} <= set(config.PRESETS)
    for preset, settings in config.PRESETS.items():
        chosen = config(preset=preset)
        assert {key: getattr(chosen, key) for key in settings} == settings
    assert config(preset="compact", width=7).width == 7
    assert config(preset="compact").width < config().width
    assert config() == config(preset="paper")
    with pytest.raises(ValueError, match="preset 'huge' is unknown"):
        config(preset="huge")


def test_an_unknown_agent_is_named():
    with pytest.raises(ConfigError, match="perhaps you meant 'tdmpc'"):
        find_agent("tdmpcc")


@pytest.mark.parametrize("name", AGENTS)
def test_half_precision_encodes_the_same_to_three_digits(name):
    agents = [build(name, PIXELS, precision=precision) for precision in ("float32", "bfloat16")]
    obs = segment(PIXELS).obs[0]
    encoders = [[m for m in agent.modules() if isinstance(m, PixelEncoder | PixelFeatures)][0] for agent in agents]
    full, half = (encoder(obs) for encoder in encoders)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0, atol=0.02 * full.abs().max().item())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in agents[0].parameters() if p.dim() == 4)

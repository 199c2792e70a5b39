"""The same numbers on a GPU as on the CPU, recorded as kernel by kernel: solves, agents, policies, whole runs.

`pytest -m gpu` runs them on a CUDA device, `DIFFTORI_TEST_DEVICE=cpu pytest -m gpu tests/gpu` without one, where nothing is recorded.
"""

import copy

import pytest
import torch

from difftori.errors import ShapeError
from difftori.il.learner import Learner
from difftori.interfaces import Agent
from difftori.policies.normalized import NormalizedPolicy
from difftori.registry import find_agents, find_policies
from difftori.rl.acting import Acting
from difftori.rl.collector import Collector
from difftori.rl.config import parse_rl_config
from difftori.rl.learning import Learning
from difftori.rl.train import train
from difftori.solver import Box, Captured, Detached, ProjectedGradient, solve
from difftori.types import Window
from tests.support.agents import PIXELS, STATES, accepted, build, segment
from tests.support.specs import SMALL, SPECS, demonstrations, with_base
from tests.support.specs import build as build_policy

pytestmark = pytest.mark.gpu

AGENTS = sorted(find_agents())
RUNS = [(name, {}) for name in AGENTS] + [("difftori", {"pg": "replay"})]
EXACT = {"precision": "float32"}


def seeded(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def recorded(captured: Captured, device: str) -> bool:
    """Whether it was recorded, as it must be on a CUDA device."""
    return bool(captured._recordings) == device.startswith("cuda")


def unrecorded(agent: Agent) -> Agent:
    agent.schedule = lambda step: None
    agent.learning_schedule = lambda: None
    return agent


def test_a_captured_solve_equals_the_solve_itself(gpu):
    weights = torch.randn(8, 8, device=gpu)

    def plan(target, x0):
        options = {"max_steps": 10, "tolerance": 0.0, "project_start": True, "adjoint": Detached()}

        def cost(x):
            return ((x @ weights).tanh() - target).square().sum(-1)

        return solve(cost, x0, solver=ProjectedGradient(), box=Box(-1.0, 1.0), **options).x

    captured = Captured(plan)
    for seed in range(4):
        torch.manual_seed(seed)
        target, x0 = torch.randn(5, 8, device=gpu), torch.zeros(5, 8, device=gpu)
        torch.testing.assert_close(captured(target, x0), plan(target, x0))
    weights.mul_(0.5)
    torch.testing.assert_close(captured(target, x0), plan(target, x0))
    assert recorded(captured, gpu)


@pytest.mark.parametrize("spec", [STATES, PIXELS], ids=["states", "pixels"])
@pytest.mark.parametrize(("name", "settings"), RUNS, ids=[*AGENTS, "replay"])
def test_recorded_updates_and_actions_equal_those_kernel_by_kernel(name, settings, spec, gpu):
    first = build(name, spec, **EXACT, **accepted(name, {"schedule_steps": 4}), **settings).to(gpu)
    agents = [first, unrecorded(copy.deepcopy(first))]
    learning = [Learning(agent, seeded(gpu)) for agent in agents]
    acting = [Acting(agent, seeded(gpu, 1), explore=True) for agent in agents]
    memory = [None, None]
    for step in range(8):
        batch = segment(spec, seed=step).to(gpu)
        ours, theirs = (each.update(batch) for each in learning)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        flags = torch.full((8,), step == 0)
        made = [act(batch.obs[0], past, flags, step=step) for act, past in zip(acting, memory, strict=True)]
        memory = [new for _, new in made]
        torch.testing.assert_close(made[0][0], made[1][0], rtol=1e-2, atol=1e-3)
    ended = [each.end_episode(segment(spec).obs[:, 0].to(gpu)) for each in learning]
    assert ended[0] == pytest.approx(ended[1], rel=1e-2, abs=1e-4)
    assert recorded(learning[0]._update, gpu)
    assert recorded(acting[0]._captured, gpu)
    assert not learning[1]._update._recordings


@pytest.mark.parametrize("spec", [STATES, PIXELS], ids=["states", "pixels"])
@pytest.mark.parametrize(
    ("name", "settings"), [("tdmpc", {"std_end": 0.0}), ("difftori", {"std_end": 0.0, "init_std": 0.0})]
)
def test_an_update_equals_that_on_the_cpu(name, settings, spec, gpu):
    """Without random numbers, which differ between the devices; from states, because images are shifted at random."""
    agent = build(name, spec, **EXACT, **settings)
    other = build(name, spec, **EXACT, **settings).to(gpu)
    batch = segment(spec)
    if spec is PIXELS:
        batch.obs[:] = batch.obs[..., :1, :1]  # a shift changes nothing
    for _ in range(3):
        _, ours = agent.update(batch, generator=seeded("cpu"))
        _, theirs = other.update(batch.to(gpu), generator=seeded(gpu))
    found = {key: float(value) for key, value in theirs.items()}
    assert found == pytest.approx({key: float(value) for key, value in ours.items()}, rel=5e-3, abs=1e-4)


def policy_and_batch(name: str, obs: str, device: str) -> tuple[NormalizedPolicy, Window]:
    """A small policy and four demonstrations on the device; skips the test if the policy is not for such observations."""
    try:
        policy = build_policy(find_policies()[name], SPECS[obs], **SMALL.get(name, {}))
    except ShapeError as error:
        pytest.skip(f"not for this task: {error}")
    batch = with_base(policy, demonstrations(policy.spec, 4)).to(device)
    base = None if policy.base is None else NormalizedPolicy(policy.base.policy.to(device))
    return NormalizedPolicy(policy.policy.to(device), base), batch


@pytest.mark.parametrize("obs", ["clouds", "images"])
@pytest.mark.parametrize("name", sorted(find_policies()))
def test_a_policy_learns_and_acts(name, obs, gpu):
    policy, batch = policy_and_batch(name, obs, gpu)
    loss, _ = policy.loss(batch, generator=seeded(gpu))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.policy.parameters())
    policy.policy.eval()
    plan = policy.act(batch.obs, generator=seeded(gpu))
    assert plan.device.type == torch.device(gpu).type
    assert plan.isfinite().all()


@pytest.mark.parametrize("obs", ["clouds", "images"])
@pytest.mark.parametrize("name", ["bc", "difftori-il", "diffusion", "dp3", "residual"])
def test_recorded_imitation_equals_that_kernel_by_kernel(name, obs, gpu):
    def learn(records):
        policy, batch = policy_and_batch(name, obs, gpu)
        learner, noise = Learner(policy, policy.policy.config), seeded(gpu)
        if not records:
            learner._records = lambda device: False
        for _ in range(6):
            learner.update(batch, noise)
        return learner, learner.close_epoch()

    (first, ours), (second, theirs) = learn(True), learn(False)
    assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-4)
    assert second._recorded[1] is None
    if gpu.startswith("cuda"):
        assert recorded(first._recorded[1], gpu)


def test_a_stopped_run_goes_on(gpu, tmp_path, monkeypatch):
    settings = {"preset": "small", "seed_steps": 40, "horizon": 2, "schedule_steps": 20, "updates_per_step": 0.5}
    values = {"agent": "difftori", "env": "probe:two-step", "device": gpu, "save_every": 40, "eval_every": 80}
    values |= {"eval_episodes": 2, "num_envs": 4, "steps": 160, "settings": settings}
    step, calls = Collector.step, []

    def stops_once(self, *arguments):
        calls.append(None)
        if len(calls) == 28:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Collector, "step", stops_once)
    with pytest.raises(KeyboardInterrupt):
        train(parse_rl_config(values), tmp_path, progress=False)
    summary = train(parse_rl_config(values), tmp_path, progress=False)
    assert summary["env_steps"] == 160
    assert summary["updates"] == pytest.approx(80, abs=2)
    assert len(calls) < 28 + 40, "it began anew"

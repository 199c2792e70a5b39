"""Compiled agents compute what eager ones do. Traced by torch.compile but not lowered by default; `-m slow` lowers too."""

import pytest

from tests.support.compiling import BACKENDS, says_equal

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from difftori.solver import compiled
from tests.support.agents import act, build, segment
backend = sys.argv[1]
compiled._compile = __import__("functools").cache(
    lambda function, lean=False: torch.compile(function, fullgraph=True, dynamic=False, backend=backend))
traced = []
call = compiled.torch.compile
compiled.torch.compile = lambda function, **options: traced.append(function.__qualname__) or call(function, **options)
for name, settings in (("tdmpc", {}), ("difftori", {"pg": "replay"}), ("sac", {}), ("drqv2", {})):
    found = []
    for compiles in (False, True):
        agent = build(name, **settings)
        g = torch.Generator().manual_seed(3)
        for parameter in agent.parameters():
            parameter.data.normal_(std=0.3, generator=g)
        agent.double()
        agent.compiles = compiles
        batch = segment()
        for field in ("obs", "actions", "rewards", "mask", "weights"):
            object.__setattr__(batch, field, getattr(batch, field).double())
        for step in range(2):
            agent.update(batch, generator=torch.Generator().manual_seed(step))
        actions, _ = act(agent, batch.obs[0])
        found.append([actions, *agent.parameters()])
    for eager, same in zip(*found, strict=True):
        torch.testing.assert_close(same, eager, rtol=1e-6, atol=1e-8)
expected = {"model_loss", "prior_loss", "critic_loss", "WorldModel.rollout", "_steps", "costs_of_candidates"}
expected |= {"SAC.critic_loss", "SAC.actor_loss", "DrQV2.critic_loss", "DrQV2.actor_loss"}
assert expected <= set(traced), expected - set(traced)
print("equal")
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend):
    says_equal(SCRIPT, backend)

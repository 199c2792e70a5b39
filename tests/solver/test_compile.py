"""Compiled solves equal eager ones. Traced by torch.compile but not lowered in the default suite; `-m slow` lowers too."""

import pytest

from tests.support.compiling import BACKENDS, says_equal

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from difftori.planning import ReturnObjective
from difftori.solver import ILQR, Box, Detached, Implicit, ProjectedGradient, Unrolled, LevenbergMarquardt, MPPI, compiled, solve
backend = sys.argv[1]
compiled._compile = __import__("functools").cache(
    lambda function, lean=False: torch.compile(function, fullgraph=True, dynamic=False, backend=backend))
torch.manual_seed(0)
net = lambda i, o: torch.nn.Sequential(torch.nn.Linear(i, 16), torch.nn.LayerNorm(16), torch.nn.Tanh(), torch.nn.Linear(16, o)).double()
dynamics, reward, value = net(7, 5), net(7, 1), net(5, 1)
parameters = [*dynamics.parameters(), *reward.parameters(), *value.parameters()]
def objective(z):
    return ReturnObjective(lambda s, a: dynamics(torch.cat([s, a], -1)),
        lambda s, a: reward(torch.cat([s, a], -1)).squeeze(-1) - 0.2 * a.square().sum(-1),
        lambda s: value(s).squeeze(-1), z, 3, 2, 0.99)
lm = LevenbergMarquardt(offset=10.0, step_size=0.05, damping=1.0)
pairs = [(ProjectedGradient(polish=1), Implicit()), (lm, Unrolled())]
if backend != "eager":
    pairs += [(ProjectedGradient(), Implicit(linear="cg")), (ProjectedGradient(), Detached()), (ProjectedGradient(), Unrolled()), (lm, Implicit()), (ILQR(), Implicit())]
for solver, adjoint in pairs:
    for seed in (1, 2):  # the second state meets the compiled code again
        z = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        found = []
        for flag in (False, True):
            solution = solve(objective(z), torch.zeros(4, 6, dtype=torch.float64), solver=solver, adjoint=adjoint,
                box=Box(-1.0, 1.0), max_steps=5, tolerance=0.0, compile=flag)
            grads = torch.autograd.grad(solution.x.square().sum(), parameters, materialize_grads=True) if solution.x.requires_grad else []
            found.append((solution.x.detach(), grads))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-9)
        for a, b in zip(*(g for _, g in found), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
from difftori.errors import ObjectiveError, SolverError
from difftori.solver import CEM, Newton
state, start = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(4, 6, dtype=torch.float64)
for solver in (MPPI(16, 4), CEM(8, 2)):  # steps that draw from a generator stay eager, scoring is compiled
    both = [solve(objective(state), start, solver=solver, adjoint=Detached(), max_steps=2, compile=flag,
        candidates=start[None] + 0.1, generator=torch.Generator().manual_seed(0)).x for flag in (False, True)]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-9)
for solver in (Newton(),):
    try:
        solve(objective(state), start, solver=solver, max_steps=2, compile=True)
    except SolverError as error:
        assert "cannot be compiled" in str(error)
    else:
        raise AssertionError(f"{solver} is compiled: the documentation says that it cannot be")
try:
    solve(lambda x: x.square(), start, compile=True)
except ObjectiveError as error:
    assert "one cost per row" in str(error)
pair = torch.ones(2, dtype=torch.float64)
first, second = pair.unbind()
views = ReturnObjective(lambda s, a: first * s + second * a, lambda s, a: -(s.square() + a.square()).sum(-1), None, state[:1, :1] + 1, 3, 1)
try:  # views of one tensor in the dynamics
    solve(views, start[:1, :3], solver=ILQR(), max_steps=1, compile=True)
except SolverError as error:
    assert "clone() each" in str(error), error
else:
    raise AssertionError("torch supports views in compiled loops now: remove the message")
print("equal")
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager(backend):
    says_equal(SCRIPT, backend)

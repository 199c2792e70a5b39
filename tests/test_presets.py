"""The presets: the release number by number, and our own."""

import pytest
import torch

from difftori import presets
from difftori.paper.numbers import paper_settings, paper_tasks
from difftori.solver import Box, LevenbergMarquardt, Truncated, solve
from tests.support.problems import F64, network, quadratic


def test_reference_rl_has_the_papers_numbers():
    rows = {row.task: row for row in paper_tasks()}
    assert len(rows) == 15
    for task, row in rows.items():
        preset = presets.reference_rl(task)
        assert isinstance(preset.solver, LevenbergMarquardt)
        assert preset.max_steps == row.lm_iterations
        assert preset.solver.step_size == row.lm_step_size
        assert preset.solver.damping == row.lm_damping
        assert preset.solver.offset == 1000
        assert preset.adjoint == Truncated(5)


def test_reference_keeps_the_releases_clamp_inside_the_cost():
    """A coordinate that left the box has no gradient any more and stays outside."""
    case = quadratic(scale=50.0)
    solution = presets.reference_rl("walker-walk", Box(-0.01, 0.01)).solve(case.objective, case.x0)
    outside = solution.x.abs() > 0.01
    assert bool(outside.any())
    x = solution.x.detach().requires_grad_()
    cost = case.objective.cost(x.clamp(-0.01, 0.01))
    (grad,) = torch.autograd.grad(cost.sum(), x)
    assert float(grad[outside].abs().max()) == 0


def test_reference_il_is_one_problem_per_batch_where_gradients_are_of_one_size():
    """Per sample with damping λB equals the release's whole-batch problem, residual mean(1000 − f)."""
    batch, n = 6, 3
    target = torch.nn.functional.normalize(torch.randn(batch, n, dtype=F64), dim=-1)

    def cost(x):
        return (x - target).square().sum(-1)

    x0 = torch.zeros(batch, n, dtype=F64)
    alone = presets.reference_il(batch).solve(cost, x0)
    x = x0.clone()
    for _ in range(100):
        point = x.requires_grad_()
        residual = (1000 + cost(point)).mean()
        (jacobian,) = torch.autograd.grad(residual, point)
        x = (x - 3e-5 * residual * jacobian / (jacobian.square().sum() + 0.01)).detach()
    torch.testing.assert_close(alone.x.detach(), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", [presets.fast, presets.accurate])
def test_our_presets_stay_inside_and_differentiate(preset):
    case = network()
    planner = preset(case.box)
    solution = planner.solve(case.objective, case.x0)
    assert bool(case.box.contains(solution.x).all())
    grads = torch.autograd.grad(solution.x.sum(), case.leaves, allow_unused=True)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in grads)
    assert not planner.acting().solve(case.objective, case.x0).x.requires_grad


def test_accurate_is_accurate():
    case = network()
    solution = presets.accurate(case.box).solve(case.objective, case.x0)
    long = solve(case.objective, case.x0, box=case.box, solver=presets.accurate().solver, max_steps=300)
    assert bool(solution.gradient_valid.all())
    torch.testing.assert_close(solution.x, long.x, rtol=0, atol=1e-6)


def test_settings_of_the_paper_ship_with_the_package():
    assert paper_settings()

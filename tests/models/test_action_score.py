"""The closed form of a score's gradient, against autograd: first and second derivatives, with respect to everything."""

from dataclasses import replace

import pytest
import torch

from difftori.errors import ObjectiveError
from difftori.models.action_score import ActionScore
from difftori.objectives import EnergyObjective
from difftori.planning import Planner
from difftori.solver import Box, GradientDescent, Implicit, Newton, Objective, ProjectedGradient, Unrolled
from difftori.solver.derivatives import value_and_grad


def score(hidden=(16, 12)) -> ActionScore:
    torch.manual_seed(0)
    return ActionScore(3, 2, hidden).double()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, 3, generator=generator, dtype=torch.float64),
        3 * torch.randn(5, 2, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("hidden", [(16,), (16, 12), (8, 8, 8)])
def test_value_and_gradient(hidden):
    network, (known, action) = score(hidden), inputs()
    action.requires_grad_()
    whole = network(torch.cat([known, action], -1)).squeeze(-1)
    (wanted,) = torch.autograd.grad(whole.sum(), action)
    part = network.remainder()
    cost, grad = part.cost_and_grad(network.prepare(known), action)
    torch.testing.assert_close(cost, -whole)
    torch.testing.assert_close(part.value(network.prepare(known), action), whole)
    torch.testing.assert_close(grad, -wanted)
    assert grad.abs().max() > 1e-2


def test_the_names_of_the_weights_are_those_of_an_ordinary_network():
    assert [name for name, _ in score().named_parameters()] == [
        f"{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")
    ]


@pytest.mark.parametrize("adjoint", [Unrolled(), Implicit(linear="dense")], ids=["unrolled", "implicit"])
@pytest.mark.parametrize(
    "solver", [GradientDescent(0.3), ProjectedGradient(), Newton()], ids=lambda s: type(s).__name__
)
def test_solves_and_their_derivatives_are_those_of_autograd(solver, adjoint):
    network, (known, start) = score(), inputs()
    known.requires_grad_()
    box = Box(-2.0, 2.0)

    def learn(closed: bool) -> list[torch.Tensor]:
        part = network.remainder()

        def pulled(cost, grad, action):  # a curvature, so that optima lie inside
            return cost + action.square().sum(-1), grad + 2 * action

        objective = EnergyObjective(
            None,
            lambda z, a: part.value(z, a) - a.square().sum(-1),
            network.prepare(known),
            1,
            2,
            cost_and_grad=lambda z, a: pulled(*part.cost_and_grad(z, a), a),
        )
        if not closed:
            objective = replace(objective, cost_and_grad=None)
        assert (objective.value_and_grad(start) is not None) == closed
        planner = Planner(solver, adjoint, box, 6, tolerance=0.0)
        plan = planner.plan(objective, start.clamp(-1, 1).view(5, 1, 2))
        grads = torch.autograd.grad(plan.actions.square().sum(), [known, *network.parameters()], allow_unused=True)
        return [plan.actions, plan.value, *(g for g in grads if g is not None)]

    got, wanted = learn(True), learn(False)
    assert len(got) == len(wanted) >= 6
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_closed_form_of_another_shape_is_named():
    class Wrong(Objective):
        def cost(self, x):
            return x.sum(-1)

        def value_and_grad(self, x):
            return x.sum(-1), torch.ones(5, 3)

    with pytest.raises(ObjectiveError, match=r"Wrong returned a gradient of shape \(5, 3\) for x \(5, 2\)"):
        value_and_grad(Wrong(), torch.zeros(5, 2))


def test_no_graph_is_built_without_need():
    network, (known, action) = score(), inputs()
    part = network.remainder()
    objective = EnergyObjective(None, part.value, network.prepare(known), 1, 2, cost_and_grad=part.cost_and_grad)
    assert not any(part.requires_grad for part in value_and_grad(objective, action))
    assert all(part.requires_grad for part in value_and_grad(objective, action, create_graph=True))
    with torch.no_grad():
        assert all(part.requires_grad for part in value_and_grad(objective, action, create_graph=True))

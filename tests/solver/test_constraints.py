"""Constraints beyond bounds: the augmented Lagrangian's answers, derivatives, statuses and refusals."""

import math

import pytest
import torch

import difftori
from difftori.errors import ObjectiveError, SolverError
from difftori.solver import (
    AugmentedLagrangian,
    Box,
    Detached,
    Implicit,
    Multipliers,
    Newton,
    ProjectedGradient,
    Status,
    Truncated,
    Unrolled,
    check_gradients,
    solve,
)

F64 = torch.float64
SOLVERS = {"newton": Newton(), "projected-gradient": ProjectedGradient(polish=1)}
SHARP = AugmentedLagrangian(tolerance=1e-11)


class Programme:
    """½xᵀPx + qᵀx subject to Gx ≤ h and Ax = b, of each row its own; some inequalities active at the solution."""

    def __init__(self, rows=3, n=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(rows, n, n, generator=generator, dtype=F64)
        self.P = root @ root.transpose(-1, -2) / n + 0.5 * torch.eye(n, dtype=F64)
        self.q = 2 * torch.randn(rows, n, generator=generator, dtype=F64)
        self.G = torch.randn(rows, 3, n, generator=generator, dtype=F64)
        self.A = torch.randn(rows, 1, n, generator=generator, dtype=F64)
        inside = 0.3 * torch.randn(rows, n, generator=generator, dtype=F64).clamp(-2, 2)
        # Feasible at `inside`, and tight enough that the unconstrained optimum is cut off.
        self.h = times(self.G, inside) + 0.1
        self.b = times(self.A, inside)

    def solve(self, solver, box=None, q=None, h=None, b=None, rows=slice(None), **settings):
        q, h, b = (own if given is None else given for own, given in ((self.q, q), (self.h, h), (self.b, b)))
        return solve(
            lambda x: (x * (0.5 * times(self.P[rows], x) + q[rows])).sum(-1),
            torch.zeros_like(self.q[rows]),
            solver=solver,
            box=box,
            max_steps=200,
            inequality=lambda x: times(self.G[rows], x) - h[rows],
            equality=lambda x: times(self.A[rows], x) - b[rows],
            **settings,
        )

    def optimal(self, x, box, slack=1e-5):
        """Whether −∇J lies in the cone of the active constraints' gradients (Karush, Kuhn, Tucker), by row."""
        from scipy.optimize import nnls

        found = []
        for i in range(len(x)):
            grad = (self.P[i] @ x[i] + self.q[i]).detach()
            active = self.G[i][(self.G[i] @ x[i] - self.h[i]).abs() < slack]
            normals = [active, self.A[i], -self.A[i]]
            if box is not None:
                eye = torch.eye(len(grad), dtype=F64)
                normals += [eye[x[i] > box.high - slack], -eye[x[i] < box.low + slack]]
            _, residual = nnls(torch.cat(normals).T.numpy(), -grad.numpy())
            found.append(residual)
        return torch.tensor(found)


def times(matrix, vector):
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("box", [None, Box(-0.6, 0.6)], ids=["free", "box"])
@pytest.mark.parametrize("name", SOLVERS)
def test_quadratic_programmes(name, box):
    for seed in range(3 if name == "newton" else 1):
        problem = Programme(seed=seed)
        solution = problem.solve(SOLVERS[name], box)
        assert solution.converged.all(), (seed, solution.status)
        assert float(solution.violation.max()) <= 1e-6
        x = solution.x.detach()
        assert float((times(problem.G, x) - problem.h).max()) <= 1e-6
        assert float((times(problem.A, x) - problem.b).abs().max()) <= 1e-6
        assert float(problem.optimal(x, box).max()) < 1e-4
        exact = (x * (0.5 * times(problem.P, x) + problem.q)).sum(-1)
        torch.testing.assert_close(solution.cost, exact)
        inequality = solution.multipliers.values[:, :3]
        assert (inequality >= 0).all()
        assert (inequality > 1e-3).any(), "a constraint should be active, or the test says nothing"


@pytest.mark.parametrize("box", [None, Box(-0.6, 0.6)], ids=["free", "box"])
def test_gradient_of_quadratic_programmes(box):
    problem = Programme(seed=1)
    leaves = [part.clone().requires_grad_() for part in (problem.q, problem.h, problem.b)]

    def x(q, h, b):
        return problem.solve(Newton(), box, q, h, b, tolerance=1e-13, augmented=SHARP).x

    # One random direction through everything: three solves instead of fifty.
    assert torch.autograd.gradcheck(x, leaves, eps=1e-5, atol=1e-5, rtol=1e-5, fast_mode=True)
    weights = torch.linspace(-1, 2, 4, dtype=F64)
    exact = torch.autograd.grad((x(*leaves) * weights).sum(), leaves)
    if box is not None:
        return
    other = problem.solve(ProjectedGradient(polish=1), box, *leaves)
    for a, b in zip(torch.autograd.grad((other.x * weights).sum(), leaves), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_reaches_the_constraints_own_parameters(name):
    """min ½‖x − c‖² on a circle of radius r: x = r c/‖c‖, both for h = 0 and for an active g ≤ 0."""
    for kind in ("inequality", "equality"):
        r = torch.tensor([0.5, 0.7], dtype=F64, requires_grad=True)
        c = torch.tensor([[1.0, 0.5], [-0.9, 0.8]], dtype=F64, requires_grad=True)
        constraint = {kind: lambda x, r=r: x.square().sum(-1, keepdim=True) - r.square()[:, None]}
        solution = solve(
            lambda x, c=c: 0.5 * (x - c).square().sum(-1),
            torch.full_like(c, 0.1) * torch.sign(c.detach()),
            # A kink cuts Newton's first steps short.
            solver=Newton(lengths=(1.0, 0.5, 0.25, 0.1, 0.03, 0.01)) if name == "newton" else SOLVERS[name],
            tolerance=1e-12,
            augmented=SHARP,
            **constraint,
        )
        right = r[:, None] * c / c.norm(dim=-1, keepdim=True)
        assert solution.converged.all()
        assert solution.gradient_valid.all()
        torch.testing.assert_close(solution.x, right, rtol=0, atol=1e-8)
        weights = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=F64)
        got = torch.autograd.grad((solution.x * weights).sum(), [r, c])
        wanted = torch.autograd.grad((right * weights).sum(), [r, c])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def in_a_ball(dtype, radius, target, scale=1.0, **settings):
    """min ‖y − c‖² + .1 Σ y⁴ in a ball, in float32 or float64, for y = x / scale."""
    scales = torch.tensor([1.0, scale, 1.0 / scale], dtype=dtype)
    return solve(
        lambda x: (x / scales - target).square().sum(-1) + 0.1 * (x / scales).pow(4).sum(-1),
        0.1 * scales.expand(target.shape),
        inequality=lambda x: (x / scales).square().sum(-1, keepdim=True) - radius,
        max_steps=200,
        **settings,
    )


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", SOLVERS)
def test_single_precision_differentiates_active_constraints(name, scale):
    """No penalty weight is left in the linear system, so float32 gives the gradient of float64."""
    found = {}
    for dtype in (F64, torch.float32):
        target = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        radius = torch.tensor(0.5, dtype=dtype, requires_grad=True)
        solution = in_a_ball(dtype, radius, target, scale, solver=SOLVERS[name])
        assert solution.converged.all(), (dtype, solution.status)
        assert solution.gradient_valid.all()
        total = (solution.x / torch.tensor([1.0, scale, 1.0 / scale], dtype=dtype)).sum()
        found[dtype] = [part.double() for part in torch.autograd.grad(total, [radius, target])]
    for wanted, got in zip(found[F64], found[torch.float32], strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("allowed", [1e-7, 1e-9, 1e-11, 1e-13])
def test_a_sharper_tolerance_of_the_constraints_keeps_the_gradient(allowed, name):
    """The tolerance of x follows that of the constraints; with the default 1e-9, heavy weights would leave multipliers of 0."""
    target = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    radius = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def gradient(tolerance):
        augmented = AugmentedLagrangian(tolerance=tolerance)
        solution = in_a_ball(F64, radius, target, solver=SOLVERS[name], augmented=augmented)
        assert solution.converged.all(), solution.status
        return torch.autograd.grad(solution.x.sum(), [radius, target])

    for wanted, got in zip(gradient(1e-8), gradient(allowed), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_dependent_constraints_share_their_multipliers():
    """Twice the same active constraint: the gradient is that of one."""
    target = torch.tensor([[0.9, 0.2], [0.3, -0.8]], dtype=F64, requires_grad=True)
    bound = torch.tensor(0.5, dtype=F64, requires_grad=True)

    def grads(copies):
        solution = solve(
            lambda x: (x - target).square().sum(-1),
            torch.zeros(2, 2, dtype=F64),
            solver=Newton(),
            inequality=lambda x: (x.square().sum(-1, keepdim=True) - bound).expand(-1, copies),
        )
        assert solution.gradient_valid.all()
        return torch.autograd.grad(solution.x[:, 0].sum(), [target, bound])

    for wanted, got in zip(grads(1), grads(2), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scale", "unit"), [(1.0, 1.0), (1e-8, 1.0), (1e6, 1.0), (1.0, 1e-3), (1.0, 1e3)])
def test_a_variable_without_curvature_in_any_units(scale, unit):
    """min s((x − 1)² + u y) with x − θ = u y: y has no curvature; dy/dθ = −1/u, in float32."""
    theta = torch.tensor([0.3], requires_grad=True)
    solution = solve(
        lambda x: scale * ((x[:, 0] - 1).square() + unit * x[:, 1]),
        torch.tensor([[0.1, 0.1 / unit]]),
        solver=Newton(),
        equality=lambda x: x[:, :1] - theta - unit * x[:, 1:],
    )
    assert solution.converged.all()
    assert solution.gradient_valid.all()
    (grad,) = torch.autograd.grad(unit * solution.x[:, 1].sum(), theta)
    torch.testing.assert_close(grad, torch.tensor([-1.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_a_tolerance_in_the_units_of_small_constraints(scale):
    solution = solve(
        lambda x: (x - 0.7).square().sum(-1) + 0.1 * x.pow(4).sum(-1),
        torch.zeros(2, 3, dtype=F64),
        equality=lambda x: scale * (x.sum(-1, keepdim=True) - 0.5),
        augmented=AugmentedLagrangian(tolerance=1e-6 * scale),
    )
    assert solution.converged.all()
    assert int(solution.steps.max()) <= 80


def test_check_gradients_with_constraints():
    target = torch.tensor([[0.9, 0.2], [0.3, -0.8]], dtype=F64, requires_grad=True)
    bound = torch.tensor(0.5, dtype=F64, requires_grad=True)
    settings = dict(solver=Newton(), equality=lambda x: x[:, :1] - bound)
    start = torch.zeros(2, 2, dtype=F64)
    assert check_gradients(lambda x: (x - target).square().sum(-1), start, **settings).relative_error < 1e-6
    # The limit, which only the constraint uses, is found too.
    found = check_gradients(lambda x: (x - 0.7).square().sum(-1), start, **settings)
    assert found.ok
    assert any(found.numeric)
    assert not check_gradients(lambda x: (x - 0.7).square().sum(-1), start, adjoint=Detached(), **settings).ok


def test_inactive_constraints_change_nothing():
    problem = Programme()
    q = problem.q.clone().requires_grad_()

    def cost(x):
        return (x * (0.5 * times(problem.P, x) + q)).sum(-1)

    start = torch.zeros_like(problem.q)
    plain = solve(cost, start, solver=Newton())
    bound = solve(cost, start, solver=Newton(), inequality=lambda x: x - 100.0)
    torch.testing.assert_close(bound.x, plain.x)
    assert (bound.multipliers.values == 0).all()
    assert (bound.violation == 0).all()
    for a, b in zip(
        torch.autograd.grad(bound.x[:, 0].sum(), q), torch.autograd.grad(plain.x[:, 0].sum(), q), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", SOLVERS)
def test_scales_of_cost_and_constraints_do_not_matter(name):
    problem = Programme(seed=2)
    wanted = problem.solve(SOLVERS[name])
    every = [(1e-6, 1e6), (1e6, 1e-6), (1e6, 1e6), (1e-6, 1.0), (1.0, 1e-6)]
    for s, c in every if name == "newton" else every[:1]:
        q = problem.q.clone().requires_grad_()
        solution = solve(
            lambda x, s=s, q=q: s * (x * (0.5 * times(problem.P, x) + q)).sum(-1),
            torch.zeros_like(q),
            solver=SOLVERS[name],
            max_steps=200,
            inequality=lambda x, c=c: c * (times(problem.G, x) - problem.h),
            equality=lambda x, c=c: c * (times(problem.A, x) - problem.b),
            # The tolerance is in the constraints' own units.
            augmented=AugmentedLagrangian(tolerance=1e-6 * c),
        )
        assert solution.converged.all(), (s, c, solution.status)
        torch.testing.assert_close(solution.x, wanted.x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_contradiction_is_reported_in_its_row_only(name):
    """x ≥ a and x ≤ −a: in the first row a = .5 contradicts itself by .5 at best, in the second a = −.5 does not."""
    a = torch.tensor([0.5, -0.5], dtype=F64)[:, None]
    solution = solve(
        lambda x: (x - 2.0).square().sum(-1),
        torch.zeros(2, 1, dtype=F64),
        solver=SOLVERS[name],
        inequality=lambda x: torch.cat([a - x, x + a], -1),
    )
    assert solution.status.tolist() == [Status.INFEASIBLE, Status.CONVERGED]
    assert float(solution.violation[0]) >= 0.5 - 1e-6
    assert float(solution.violation[1]) <= 1e-6
    torch.testing.assert_close(solution.x.detach()[1], torch.tensor([0.5], dtype=F64), rtol=0, atol=1e-5)
    assert torch.isfinite(solution.x).all()


def test_a_constraint_that_the_box_forbids_is_infeasible():
    solution = solve(
        lambda x: x.square().sum(-1),
        torch.zeros(1, 2, dtype=F64),
        box=Box(-1.0, 1.0),
        solver=Newton(),
        equality=lambda x: x.sum(-1, keepdim=True) - 3.0,
    )
    assert solution.status.tolist() == [Status.INFEASIBLE]
    torch.testing.assert_close(solution.violation, torch.ones(1, dtype=F64), rtol=0, atol=1e-3)


OBSTACLES = torch.tensor([[1.0, 0.15], [1.9, -0.45]], dtype=F64)
STEP = 0.2


def unicycle(state, action):
    x, y, heading = state.unbind(-1)
    v, turn = action.unbind(-1)
    return torch.stack([x + STEP * v * heading.cos(), y + STEP * v * heading.sin(), heading + STEP * turn], -1)


def drive(radius, goal, rows=2, horizon=15, warm=None, **settings):
    """A unicycle from beside the origin to the goal, around obstacles, ending within .02 of the goal's y."""
    start = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.3, -0.2]], dtype=F64)[:rows]

    def clearance(state, action):
        return radius.square() - (state[..., None, :2] - OBSTACLES).square().sum(-1)

    init = torch.tensor([1.0, 0.0], dtype=F64).expand(rows, horizon, 2) if warm is None else warm.actions.detach()
    return difftori.plan(
        unicycle,
        lambda s, u: -(0.1 * (s[..., :2] - goal).square().sum(-1) + 0.05 * u.square().sum(-1)),
        lambda s: -10 * (s[..., :2] - goal).square().sum(-1),
        start,
        init,
        -2.0,
        2.0,
        constraint=clearance,
        terminal_constraint=lambda s: torch.stack([s[..., 1] - goal[1] - 0.02, goal[1] - 0.02 - s[..., 1]], -1),
        multipliers=None if warm is None else warm.solution.multipliers,
        **settings,
    )


@pytest.fixture(scope="module")
def driven():
    torch.set_num_threads(1)
    radius = torch.tensor(0.5, dtype=F64, requires_grad=True)
    goal = torch.tensor([2.6, 0.1], dtype=F64, requires_grad=True)
    return radius, goal, drive(radius, goal, tolerance=1e-11, augmented=AugmentedLagrangian(tolerance=1e-9))


def test_trajectory_keeps_out_of_obstacles(driven):
    radius, goal, plan = driven
    assert plan.solution.converged.all(), plan.solution.status
    states = plan.states.detach()
    assert states.shape == (2, 16, 3)
    for t in range(15):
        torch.testing.assert_close(unicycle(states[:, t], plan.actions[:, t].detach()), states[:, t + 1])
    # The constraint covers the steps that have an action; the last state has its own.
    distance = torch.cdist(states[:, :-1, :2].flatten(0, 1), OBSTACLES)
    assert float(distance.min()) >= 0.5 - 1e-4
    assert float(distance.min()) <= 0.5 + 1e-4, "an obstacle should be in the way"
    assert float((states[:, -1, 1] - goal.detach()[1]).abs().max()) <= 0.02 + 1e-4
    assert float((states[:, -1, :2] - goal.detach()).norm(dim=-1).max()) < 0.2
    assert float(plan.actions.detach().abs().max()) <= 2.0


def test_trajectory_gradient_against_finite_differences(driven):
    radius, goal, plan = driven
    assert plan.solution.gradient_valid.all()
    generator = torch.Generator().manual_seed(0)
    on_actions = torch.randn(plan.actions.shape, generator=generator, dtype=F64)
    on_states = torch.randn(plan.states.shape, generator=generator, dtype=F64)

    def loss(plan):
        return (plan.actions * on_actions).sum(), (plan.states * on_states).sum()

    got = [torch.autograd.grad(part, [radius, goal], retain_graph=True) for part in loss(plan)]
    settings = dict(tolerance=1e-11, augmented=AugmentedLagrangian(tolerance=1e-9), warm=plan)
    eps = 1e-4
    moves = [(eps, (0.0, 0.0)), (0.0, (eps, 0.0)), (0.0, (0.0, eps))]
    for i, (dr, dg) in enumerate(moves):
        with torch.no_grad():
            shift = torch.tensor(dg, dtype=F64)
            above, below = drive(radius + dr, goal + shift, **settings), drive(radius - dr, goal - shift, **settings)
            assert above.solution.converged.all()
            assert below.solution.converged.all()
        for part, (up, down) in enumerate(zip(loss(above), loss(below), strict=True)):
            flat = torch.cat([got[part][0].reshape(1), got[part][1]])
            torch.testing.assert_close(flat[i], (up - down) / (2 * eps), rtol=1e-4, atol=1e-4)


def test_solving_again_from_the_solution_takes_few_steps(driven):
    radius, goal, plan = driven
    with torch.no_grad():
        again = drive(radius, goal, warm=plan)
        moved = drive(radius + 0.01, goal, warm=plan)
    assert again.solution.converged.all()
    assert int(again.solution.steps.max()) <= 3
    torch.testing.assert_close(again.actions, plan.actions.detach(), rtol=0, atol=1e-5)
    assert moved.solution.converged.all()
    assert int(moved.solution.steps.max()) <= int(plan.solution.steps.max()) // 2


def test_multipliers_of_a_programme_start_the_next():
    problem = Programme()
    first = problem.solve(Newton())
    again = solve(
        lambda x: (x * (0.5 * times(problem.P, x) + problem.q)).sum(-1),
        first.x,
        solver=Newton(),
        inequality=lambda x: times(problem.G, x) - problem.h,
        equality=lambda x: times(problem.A, x) - problem.b,
        multipliers=first.multipliers,
    )
    assert again.converged.all()
    assert int(again.steps.max()) <= 2 < int(first.steps.max())
    torch.testing.assert_close(again.x, first.x, rtol=0, atol=1e-6)


def test_mistakes_are_named():
    start = torch.zeros(2, 3, dtype=F64)
    t = torch.ones((), dtype=F64, requires_grad=True)

    def cost(x):
        return (x - t).square().sum(-1)

    def bounded(x):
        return x - 0.5

    with pytest.raises(ObjectiveError, match=r"unsqueeze\(-1\)"):
        solve(cost, start, inequality=lambda x: x[:, 0] - 0.5)
    for wrong in (lambda x: x > 0.5, lambda x: x.float(), lambda x: (x > 0.5).long()):
        with pytest.raises(ObjectiveError, match=r"inequality: returned torch\..*instead of x > limit"):
            solve(cost, start, inequality=wrong)
    with pytest.raises(ObjectiveError, match="equality"):
        solve(cost, start, equality=lambda x: x.sum(-1) - 0.5)
    with pytest.raises(ObjectiveError, match=r"constraint.*unsqueeze\(-1\)"):
        difftori.plan(
            lambda s, u: s + u,
            lambda s, u: -u.square().sum(-1),
            None,
            torch.zeros(2, 1, dtype=F64),
            torch.zeros(2, 4, 1, dtype=F64),
            constraint=lambda s, u: s[..., 0] - 1.0,
        )
    one, two = torch.ones(2, 1, dtype=F64), torch.ones(2, 2, dtype=F64)
    for wrong in (Multipliers(two, two), Multipliers(one, one[:, 0]), Multipliers(one, one, one[:, 0])):
        with pytest.raises(SolverError, match="multipliers"):
            solve(cost, start, inequality=bounded, multipliers=wrong)
    for adjoint in (Unrolled(), Truncated(3)):
        with pytest.raises(SolverError, match=r"Implicit\(\)"):
            solve(cost, start, inequality=bounded, adjoint=adjoint)
    for adjoint in (Implicit(order=2), Implicit(linear="cg")):
        with pytest.raises(SolverError, match="constraints"):
            solve(cost, start, inequality=bounded, adjoint=adjoint)
    with pytest.raises(SolverError, match="rounds"):
        AugmentedLagrangian(rounds=0)
    with pytest.raises(SolverError, match="progress"):
        AugmentedLagrangian(progress=1.5)


def test_rows_do_not_interact():
    problem, order = Programme(), torch.tensor([2, 0, 1])
    whole = problem.solve(Newton())
    permuted = problem.solve(Newton(), rows=order)
    torch.testing.assert_close(permuted.x, whole.x[order], rtol=0, atol=1e-9)
    assert permuted.status.tolist() == whole.status[order].tolist()
    alone = problem.solve(Newton(), rows=order[:1])
    torch.testing.assert_close(alone.x, whole.x[order[:1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "where"),
    [("newton", "cost"), ("newton", "inequality"), ("newton", "equality")],
)
def test_nan_stays_in_its_row(name, where):
    problem = Programme()
    whole = problem.solve(SOLVERS[name])
    parts = {"cost": problem.q, "inequality": problem.h, "equality": problem.b}
    parts = {key: value.clone() for key, value in parts.items()}
    parts[where][1] = math.nan
    q, h, b = parts.values()
    q.requires_grad_()
    solution = problem.solve(SOLVERS[name], q=q, h=h, b=b)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    others = torch.tensor([0, 2])
    torch.testing.assert_close(solution.x[others], whole.x[others], rtol=0, atol=1e-6)
    (grad,) = torch.autograd.grad(solution.x[others].sum(), q)
    assert torch.isfinite(grad[others]).all()


def test_nan_in_a_trajectory_stays_in_its_row():
    def solved(state):
        return difftori.plan(
            lambda s, u: s + 0.5 * u,
            lambda s, u: -(s - 1.0).square().sum(-1) - 0.1 * u.square().sum(-1),
            None,
            state,
            torch.zeros(len(state), 5, 1, dtype=F64),
            constraint=lambda s, u: s - 0.6,
        )

    state = torch.tensor([[0.0], [math.nan], [0.3]], dtype=F64)
    plan = solved(state)
    assert plan.solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    torch.testing.assert_close(plan.actions[[0, 2]], solved(state[[0, 2]]).actions, rtol=0, atol=1e-7)
    assert float(plan.states[[0, 2], :-1].max()) <= 0.6 + 1e-6


def test_without_a_graph_nothing_is_differentiated():
    problem = Programme()
    q = problem.q.clone().requires_grad_()
    with torch.no_grad():
        bare = problem.solve(Newton(), q=q)
    assert not bare.x.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(problem.solve(Newton(), q=q).x, bare.x)


def test_discount_leaves_the_constraints_multipliers_alone():
    """Constraints are not discounted: they hold late in a strongly discounted plan as well."""
    plan = difftori.plan(
        lambda s, u: s + 0.3 * u,
        lambda s, u: s[..., 0],
        None,
        torch.zeros(1, 1, dtype=F64),
        torch.zeros(1, 12, 1, dtype=F64),
        discount=0.5,
        constraint=lambda s, u: s - 0.7,
        terminal_constraint=lambda s: s - 0.7,
    )
    assert float(plan.states.max()) <= 0.7 + 1e-5


def test_a_solution_of_constants_requires_no_gradient():
    assert not Programme().solve(Newton()).x.requires_grad


def test_newton_passes_the_kink_of_a_constraint():
    c = torch.tensor([[1.0, 0.5]], dtype=F64)
    solution = solve(
        lambda x: 0.5 * (x - c).square().sum(-1),
        torch.full_like(c, 0.1),
        solver=Newton(),
        inequality=lambda x: x.square().sum(-1, keepdim=True) - 0.25,
    )
    assert solution.converged.all()
    torch.testing.assert_close(solution.x.detach(), 0.5 * c / c.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("off", [0.0, 1e-9, 1e-3])
def test_starting_at_the_minimum_without_the_constraint(off):
    """The gradient of the cost vanishes there, so it cannot set the weight of the penalty alone."""
    target = torch.tensor([[0.6, 1.8]], dtype=F64)
    solution = solve(
        lambda x: (x - target).square().sum(-1),
        target + off,
        inequality=lambda x: x.square().sum(-1, keepdim=True) - 1,
        max_steps=100,
    )
    assert solution.status.tolist() == [Status.CONVERGED]
    torch.testing.assert_close(solution.x, target / target.norm(), rtol=0, atol=1e-5)


def test_batched_gradients_are_those_one_by_one(driven):
    radius, goal, plan = driven
    forces, each = plan.actions[:, 3].flatten(), torch.eye(4, dtype=F64)
    batched = torch.autograd.grad(forces, [radius, goal], each, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(forces, [radius, goal], one, retain_graph=True) for one in each]
    for together, apart in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(apart))


@pytest.mark.parametrize(
    "further",
    [lambda s, a: 1 - (s[..., :1] - 1e4).square(), lambda s, a: 1e5 * (-a - 50)],
    ids=["a distant obstacle", "a small unit"],
)
def test_a_constraint_far_from_its_limit_does_not_change_the_plan(further):
    def model(state, action):
        return torch.stack((state[..., 0] + 0.1 * state[..., 1], state[..., 1] + 0.1 * action[..., 0]), -1)

    def reward(state, action):
        return -10 * state[..., 0].square() - 0.1 * state[..., 1].square() - 0.01 * action[..., 0].square()

    def speed(state, action=None):
        return -state[..., 1:] - 0.3

    plans = [
        difftori.plan(
            model,
            reward,
            None,
            torch.tensor([[1.0, 0.0]], dtype=torch.float64),
            torch.zeros(1, 8, 1, dtype=torch.float64),
            -8.0,
            8.0,
            constraint=constraint,
            terminal_constraint=speed,
        )
        for constraint in (speed, lambda s, a: torch.cat((speed(s), further(s, a)), -1))
    ]
    assert [Status(int(plan.solution.status)) for plan in plans] == [Status.CONVERGED] * 2
    torch.testing.assert_close(plans[1].actions, plans[0].actions, rtol=0, atol=1e-6)


def sled(mass, unit):
    """A sled that may go backward at most .3 m/s and be pushed back with at most 2 N; the limits are in units of 1/`unit`."""

    def model(state, action):
        return torch.stack((state[..., 0] + 0.1 * state[..., 1], state[..., 1] + 0.1 / mass * action[..., 0]), -1)

    def reward(state, action):
        return -10 * state[..., 0].square() - 0.1 * state[..., 1].square() - 0.01 * action[..., 0].square()

    def speed(state):
        return unit[0] * (-state[..., 1:] - 0.3)

    return difftori.plan(
        model,
        reward,
        None,
        torch.tensor([[1.0, 0.0], [0.5, 0.2]], dtype=mass.dtype),
        torch.zeros(2, 8, 1, dtype=mass.dtype),
        -8.0,
        8.0,
        constraint=lambda s, a: torch.cat((speed(s), unit[1] * (-a - 2)), -1),
        terminal_constraint=speed,
    )


@pytest.mark.parametrize("unit", [(1.0, 1e5), (1e-3, 1e3), (1e3, 1e-3)])
def test_constraints_in_different_units_of_a_plan(unit):
    """With one weight for all, these took 40 times the steps, or all 1000."""
    mass = torch.ones((), dtype=F64, requires_grad=True)
    wanted, plan = sled(mass, (1.0, 1.0)), sled(mass, unit)
    assert plan.solution.converged.all()
    assert plan.solution.gradient_valid.all()
    assert (plan.solution.steps <= wanted.solution.steps + 6).all()
    # Violations up to 1e-6 count as zero, in the unit of each constraint.
    near = 2e-6 / min(unit)
    torch.testing.assert_close(plan.actions, wanted.actions, rtol=0, atol=near)
    speed = plan.solution.multipliers.values[:, :-1:2] * unit[0]
    torch.testing.assert_close(speed, wanted.solution.multipliers.values[:, :-1:2], rtol=1e-2, atol=1e-3)
    grads = [torch.autograd.grad(one.actions.sum(), mass)[0] for one in (plan, wanted)]
    torch.testing.assert_close(*grads, rtol=near, atol=0)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_constraints_in_different_units_of_a_programme(unit):
    problem = Programme()
    units = torch.tensor([1.0, unit, 1 / unit], dtype=F64)
    wanted = problem.solve(Newton())
    problem.G, problem.h = problem.G * units[:, None], problem.h * units
    problem.A, problem.b = problem.A / unit, problem.b / unit
    found = problem.solve(Newton(), augmented=AugmentedLagrangian(tolerance=1e-6 * min(unit, 1 / unit)))
    assert found.converged.all()
    assert (found.steps <= wanted.steps + 10).all()
    torch.testing.assert_close(found.x, wanted.x, rtol=0, atol=1e-5)


def test_multipliers_are_the_shadow_prices():
    problem, step = Programme(), 1e-4
    sharp = AugmentedLagrangian(tolerance=1e-9)
    solution = problem.solve(Newton(), augmented=sharp)
    assert solution.converged.all()
    for i in range(3):
        looser = problem.h.clone()
        looser[:, i] += step
        price = (solution.cost - problem.solve(Newton(), h=looser, augmented=sharp).cost) / step
        torch.testing.assert_close(price, solution.multipliers.values[:, i], rtol=1e-3, atol=1e-3)


def test_a_limit_that_the_first_state_violates_is_not_counted():
    """It begins .1 m/s too fast, which no action changes; from the next state on, it keeps the limit."""

    def model(state, action):
        return torch.stack((state[..., 0] + 0.1 * state[..., 1], state[..., 1] + 0.1 * action[..., 0]), -1)

    def limits(state, action):
        return torch.stack((state[..., 1] - 0.3, action[..., 0] - 1.5, state[..., 1] + 0.1 * action[..., 0] - 0.3), -1)

    plans = [
        difftori.plan(
            model,
            lambda s, a: -(s[..., 0] - 1).square() - 0.01 * a[..., 0].square(),
            None,
            torch.tensor([[0.0, speed]], dtype=F64),
            torch.zeros(1, 8, 1, dtype=F64),
            -8.0,
            8.0,
            constraint=limits,
        )
        for speed in (0.4, 3.0)
    ]
    assert plans[0].solution.converged.all()
    assert plans[0].solution.violation.item() <= 1e-6
    assert plans[0].states[0, 1:, 1].max() <= 0.3 + 1e-6
    # At most −8 m/s² in .1 s: the second state is too fast as well, and that counts.
    assert Status(int(plans[1].solution.status)) == Status.INFEASIBLE


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [4, 7, 16])
def test_a_limit_on_the_first_state_by_a_matrix_is_not_counted(dtype, size):
    """Another kernel rounds its value differently, which is no effect of the actions."""
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randn(size, 3, dtype=dtype, generator=draw)
        start = torch.randn(2, size, dtype=dtype, generator=draw)
        limit = (start @ rows).amin(0) - 0.1
        plan = difftori.plan(
            lambda s, a: 0 * s + a.sum(-1, keepdim=True),
            lambda s, a: -a.square().sum(-1),
            None,
            start,
            torch.zeros(2, 4, 2, dtype=dtype),
            constraint=lambda s, a, rows=rows, limit=limit: s @ rows - limit.clamp(min=0.1),
        )
        assert plan.solution.converged.all(), "(violated by the first state alone)"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ["difference", "share"])
def test_a_limit_on_a_difference_of_actions_at_their_bounds_counts(name, dtype):
    """It does not change if all actions move by the same amount, but depends on them."""
    difference = lambda s, a: a[..., :1] - a[..., 1:] - 1  # noqa: E731
    share = lambda s, a: a.softmax(-1)[..., :1] - 0.7  # noqa: E731
    plan = difftori.plan(
        lambda s, a: s,
        lambda s, a: 1e3 * (a[..., 0] - a[..., 1]),
        None,
        torch.zeros(2, 1, dtype=dtype),
        torch.tensor([1.0, -1.0], dtype=dtype).expand(2, 1, 2),
        constraint=difference if name == "difference" else share,
    )
    values = (difference if name == "difference" else share)(None, plan.actions[:, 0])
    torch.testing.assert_close(plan.solution.violation, values[:, 0].clamp(min=0.0), rtol=0, atol=1e-6)
    assert values.max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("width", [0.3, 0.15, 0.1])
def test_a_constraint_without_a_gradient_at_the_start_beside_another(width, dtype):
    """A smooth bump to keep out of, and a limit of the speed. A weight from the bump's tiny gradient would be 1e7 to 1e85 times as heavy."""
    goal = torch.tensor([2.0, 0.0], dtype=dtype)

    def moved(state, action):
        return torch.cat([state[..., :2] + 0.1 * state[..., 2:], state[..., 2:] + 0.1 * action], -1)

    def reward(state, action):
        return -(state[..., :2] - goal).square().sum(-1) - 0.01 * action.square().sum(-1)

    def kept(state, action):
        bump = torch.exp(-((state[..., :2] - goal / 2 - 0.05).square().sum(-1, keepdim=True)) / (2 * width**2)) - 0.5
        return torch.cat([bump, state[..., 2:3] - 3], -1)

    start = torch.zeros(1, 4, dtype=dtype)
    plan = difftori.plan(moved, reward, None, start, torch.zeros(1, 15, 2, dtype=dtype), -10.0, 10.0, constraint=kept)
    assert plan.solution.violation.max() <= (1e-6 if dtype == F64 else 1e-4)
    assert plan.solution.multipliers.initial[0, 0] < 1e6 * plan.solution.multipliers.initial[0, 1]
    assert plan.states[0, -1, 0] > 1.5


def test_the_accuracy_that_a_constraint_needs_is_that_of_its_own_row():
    """A limit in other units in one row changes nothing in the others."""
    scale = torch.tensor([[1.0], [1e5]])
    target = torch.tensor([[2.0, 1.0], [1.5, 3.0]])

    def plan(rows):
        return solve(
            lambda x: ((x - target[rows]).square() * torch.tensor([1.0, 30.0])).sum(-1) + x.square().square().sum(-1),
            torch.zeros(len(rows), 2),
            inequality=lambda x: scale[rows] * (x.sum(-1, keepdim=True) - 1.0),
            augmented=AugmentedLagrangian(tolerance=1e-3),
            max_steps=200,
        )

    both, alone = plan([0, 1]), plan([0])
    assert torch.equal(both.x[:1], alone.x)
    assert torch.equal(both.steps[:1], alone.steps)
    assert (both.status == Status.CONVERGED).all()

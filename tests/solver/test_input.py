"""Bad input: a typed error that names the value and the fix."""

import functools
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from difftori import presets
from difftori.errors import BoxError, NonFiniteError, ObjectiveError, ShapeError, SolverError
from difftori.solver import (
    CEM,
    ILQR,
    MPPI,
    Box,
    Detached,
    GaussNewton,
    Implicit,
    LevenbergMarquardt,
    Newton,
    ProjectedGradient,
    Truncated,
    Unrolled,
    check_gradients,
    solve,
)
from tests.support.solvers import SOLVERS

X0 = torch.zeros(3, 2)
KNOWN_SOLVERS = list({type(solver).__name__: solver for solver in SOLVERS.values()}.values())


def bowl(x):
    return x.square().sum(-1)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.0, -1.0, "between low 1 and high -1"),
        (float("nan"), 1.0, "low nan"),
        (float("inf"), float("inf"), "low inf and high inf"),
        (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]), r"coordinate \(1,\)"),
        (torch.zeros(2), torch.ones(3), "do not broadcast"),
    ],
)
def test_empty_boxes(low, high, words):
    with pytest.raises(BoxError, match=words):
        Box(low, high)


def test_a_box_of_another_size():
    with pytest.raises(BoxError, match=r"low has shape \(3,\).*\(3, 2\)"):
        solve(bowl, X0, box=Box(-torch.ones(3), torch.ones(3)))


def test_a_start_outside_the_box():
    x0 = X0.clone()
    x0[2, 1] = 1.5
    with pytest.raises(BoxError, match=r"x0\[2, 1\] = 1.5 .*box.project"):
        solve(bowl, x0, box=Box(-1.0, 1.0))


@pytest.mark.parametrize("x0", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(3, 0)])
def test_starts_of_another_shape(x0):
    with pytest.raises((ShapeError, TypeError), match="(x0 has shape)|(x0)"):
        solve(bowl, x0)


def test_integer_starts():
    with pytest.raises((ShapeError, TypeError), match="(floating)|(x0)"):
        solve(bowl, torch.zeros(3, 2, dtype=torch.long))


@pytest.mark.parametrize("cost", [lambda x: x.sum(), lambda x: x.square(), lambda x: x.square().sum(-1, keepdim=True)])
def test_costs_that_are_not_one_per_row(cost):
    with pytest.raises(ObjectiveError, match=r"one cost per row, \(3,\)"):
        solve(cost, X0)


@pytest.mark.parametrize(
    "cost", [lambda x: torch.ones(3), lambda x: x.detach().sum(-1), lambda x: torch.ones(3, requires_grad=True)]
)
def test_costs_that_do_not_depend_on_x(cost):
    with pytest.raises(ObjectiveError, match="does not depend on x"):
        solve(cost, X0)


def test_an_objective_that_is_none():
    with pytest.raises((ShapeError, TypeError)):
        solve(3, X0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Truncated(0),
        lambda: Implicit(linear="cg", products=0),
        lambda: Implicit(eigenvalue_floor=-1.0),
        lambda: Newton(eigenvalue_floor=2.0),
        lambda: LevenbergMarquardt(damping=-1.0),
        lambda: LevenbergMarquardt(step_size=0.0),
        lambda: CEM(samples=3, elites=4),
        lambda: MPPI(elites=0),
        lambda: ProjectedGradient(window=0),
        lambda: ProjectedGradient(first_step=0.0),
        lambda: ProjectedGradient(first_step=float("nan")),
        lambda: presets.reference_rl("cheetah-fly"),
    ],
)
def test_settings_out_of_range(make):
    with pytest.raises(SolverError):
        make()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [-1, -1.0, float("nan"), float("inf"), "1", True, (), (0.5, -1.0)])
@pytest.mark.parametrize("solver", KNOWN_SOLVERS)
def test_every_number_of_every_solver_is_checked(solver, value):
    """Settings that are numbers, or tuples of numbers: bounds differ, but none of these values is ever valid."""
    checked = 0
    for field in fields(solver):
        own = getattr(solver, field.name)
        kinds = (tuple,) if isinstance(own, tuple) else (int, float)
        if isinstance(own, kinds) and not isinstance(own, bool):
            if field.name == "offset" and value in (-1, -1.0) and value is not True:
                continue
            checked += 1
            with pytest.raises(SolverError, match=f"{field.name}=.*Fix: use (a number|a whole number|numbers) in"):
                replace(solver, **{field.name: value})
    assert checked


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_settings_too():
    assert CEM(samples=np.int64(8), elites=np.int32(2), std=np.float32(0.5)).samples == 8


@pytest.mark.parametrize("solver", [GaussNewton(), ILQR()])
def test_solvers_that_need_a_structure(solver):
    with pytest.raises(SolverError, match="needs"):
        solve(bowl, X0, solver=solver)


SCRIPT = """
import numpy, torch
from difftori.errors import DifftoriError
from difftori.solver import CEM, ILQR, GaussNewton, LeastSquaresObjective, LevenbergMarquardt, Newton, solve
x0 = torch.zeros(3, 2)
def bowl(x):
    return x.square().sum(-1)
class Fit(LeastSquaresObjective):
    def residual(self, x):
        return x - 1
def never(x):
    raise AssertionError("the cost is evaluated before the check")
for words, call in {
    "float16. Fix:. float32": lambda: solve(never, x0.half()),
    "bfloat16. Fix:. float32": lambda: solve(never, x0.bfloat16()),
    "complex64. Fix:. float32": lambda: solve(never, x0.to(torch.complex64)),
    "int64. Fix:. float32": lambda: solve(never, x0.long()),
    "ndarray. Fix:. torch.as_tensor": lambda: solve(never, numpy.zeros((3, 2))),
    "list. Fix:. torch.as_tensor": lambda: solve(never, [[0.0, 0.0]]),
    "ndarray. numpy": lambda: solve(lambda x: x.detach().square().sum(-1).numpy(), x0),
    "candidates. ndarray. torch.as_tensor": lambda: solve(never, x0, solver=CEM(), candidates=numpy.zeros((1, 3, 2))),
    "meta. Fix:. move": lambda: solve(lambda x: bowl(x).to("meta"), x0),
    "tolerance": lambda: solve(never, x0, tolerance=-1.0),
    "tolerance=inf": lambda: solve(never, x0, tolerance=float("inf")),
    "Newton. compile=False": lambda: solve(never, x0, solver=Newton(), compile=True),
    "GaussNewton. compile=False": lambda: solve(Fit(), x0, solver=GaussNewton(), compile=True),
    "LevenbergMarquardt. compile=False": lambda: solve(Fit(), x0, solver=LevenbergMarquardt(), compile=True),
}.items():
    try:
        call()
    except DifftoriError as error:
        missing = [word for word in words.split(". ") if word not in str(error)]
        assert not missing, (words, str(error))
    else:
        raise AssertionError(words)
print("refused")
"""


def test_each_unusable_input_is_refused_by_name_before_any_work():
    """In a process of its own: here, annotations are checked first."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused", done.stderr


@pytest.mark.parametrize(
    "cost",
    [
        lambda x: (x - x.mean(0)).square().sum(-1),
        torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1), torch.nn.Flatten(0)),
    ],
)
def test_an_objective_that_mixes_rows_is_named(cost):
    with pytest.raises(ObjectiveError, match="objective: the value of row 1 depends on row 0"):
        solve(cost, X0)
    solve(cost, X0[:1] if not isinstance(cost, torch.nn.Module) else torch.zeros(0, 2))  # one row cannot be mixed


def test_constraints_that_mix_rows_are_named():
    with pytest.raises(ObjectiveError, match="inequality: the value of row 1 depends on row 0"):
        solve(bowl, X0, inequality=lambda x: x - x.mean() - 1)
    with pytest.raises(ObjectiveError, match="equality: the value of row 1 depends on row 0"):
        solve(bowl, X0, equality=lambda x: (x - x.sum(0))[:, :1])


def test_the_check_leaves_random_numbers_and_averages_as_they_are():
    class Averaging(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return (x - 1).square().sum(-1)

    averaging = Averaging()
    solve(averaging, X0)
    assert averaging.mean.isfinite().all()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    solve(lambda x: (x - 0.0 * torch.rand_like(x)).square().sum(-1), X0, max_steps=0, tolerance=0.0)
    drawn = torch.random.get_rng_state()
    torch.manual_seed(0)
    solve(lambda x: x.square().sum(-1), X0, max_steps=0, tolerance=0.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(drawn, before)  # the solve itself draws


@pytest.mark.parametrize(
    "cost", [lambda x: (x - x[-1:] - 1).square().sum(-1), lambda x: (x - x[:1] - 1).square().sum(-1)]
)
def test_a_dependence_on_the_first_or_the_last_row_is_found(cost):
    with pytest.raises(ObjectiveError, match="but rows are independent problems"):
        solve(cost, torch.rand(4, 2, generator=torch.Generator().manual_seed(0)))


def test_decorated_functions_are_checked_each():
    def twice(function):
        @functools.wraps(function)
        def doubled(x):
            return 2 * function(x)

        return doubled

    solve(twice(bowl), X0)
    with pytest.raises(ObjectiveError, match="depends on row"):
        solve(twice(lambda x: (x - x.sum(0)).square().sum(-1)), X0)


def test_rows_with_parameters_of_their_own_and_random_numbers_are_not_mixed():
    own, table = torch.arange(3.0), torch.arange(5.0)
    for cost in (
        lambda x: (x - own[:, None]).square().sum(-1),
        lambda x: (x - torch.rand_like(x)).square().sum(-1),
        lambda x: (
            bowl(x) + table[x[:, 0].detach().long()]
        ),  # NaN has no place in a table: the function cannot be checked
        lambda x: bowl(x).masked_fill(x.detach()[:, 0] == 0, torch.nan),
        lambda x: (x - x.max().detach()).exp().sum(-1).log() + x.max().detach(),  # which changes roundings only
        lambda x: bowl(torch.eye(3) @ x),
    ):
        solve(cost, X0, max_steps=2)


def test_negative_budget():
    with pytest.raises(SolverError, match="max_steps=-1"):
        solve(bowl, X0, max_steps=-1)


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("solver", "newton", "solver=ProjectedGradient()"),
        ("solver", Newton, "solver=ProjectedGradient()"),
        ("adjoint", "implicit", "adjoint=Implicit()"),
        ("box", (-1, 1), r"box=Box\(-1.0, 1.0\)"),
        ("max_steps", 2.5, "max_steps=100"),
        ("tolerance", "small", "tolerance=1e-6"),
    ],
)
def test_arguments_of_another_type_are_named(unchecked, name, value, fix):
    with pytest.raises(SolverError, match=rf"{name}=.*Fix: .*{fix}"):
        solve(bowl, X0, **{name: value})


def test_a_bound_that_is_no_number_is_named(unchecked):
    with pytest.raises(BoxError, match=r"low=None.*low=-math.inf"):
        Box(None, 1.0)


def test_candidates_of_another_shape_or_dtype():
    with pytest.raises(ShapeError, match="candidates"):
        solve(bowl, X0, solver=CEM(), candidates=torch.zeros(5, 2, 2))
    with pytest.raises(ShapeError, match=r"float64 on .* x0 is torch.float32.*candidates.to\(x0\)"):
        solve(bowl, X0, solver=CEM(), candidates=torch.zeros(5, 3, 2, dtype=torch.float64))


@pytest.mark.parametrize("solver", [ProjectedGradient(), CEM(), MPPI()])
@pytest.mark.parametrize("grad", [True, False])
def test_costs_in_another_precision_or_shape(solver, grad):
    target = torch.full((2,), 0.5, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        with pytest.raises(ObjectiveError, match=r"torch.float64 for x in torch.float32"):
            solve(lambda x: (x - target).square().sum(-1), X0, solver=solver)
        with pytest.raises(ObjectiveError, match=r"one cost per row, \(3,\)"):
            solve(lambda x: x.square(), X0, solver=solver)


def test_throw_names_the_rows():
    weights = torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(NonFiniteError, match=r"rows \[1\] \(of 3\)"):
        solve(lambda x: weights * bowl(x), X0, throw=True)


def test_check_gradients_finds_leaves_and_faults():
    target = torch.full((3, 2), 0.3, dtype=torch.float64, requires_grad=True)
    x0 = torch.zeros(3, 2, dtype=torch.float64)

    def cost(x):
        return (x - target).square().sum(-1)

    assert check_gradients(cost, x0).ok
    assert check_gradients(cost, x0, adjoint=Unrolled(), max_steps=2).ok
    assert not check_gradients(cost, x0, adjoint=Detached()).ok
    with pytest.raises(ObjectiveError, match="no leaf tensor"):
        check_gradients(bowl, x0)

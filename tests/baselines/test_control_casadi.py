"""The control problems in CasADi are those in torch, and multiple shooting solves them (`make baselines` installs CasADi)."""

import numpy as np
import pytest
import torch

from benchmarks.control import Config, run
from benchmarks.control_casadi import MultipleShooting, symbols
from benchmarks.control_entries import CasadiSession, Cell
from benchmarks.control_problems import CARTPOLE, PROBLEMS, QUADROTOR, UNICYCLE

pytestmark = pytest.mark.baselines
ca = pytest.importorskip("casadi", reason="CasADi is absent: run `make baselines`")

COSTS = {"cartpole": 47.01338, "unicycle": 24.60120, "quadrotor": 23.56501}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_both_descriptions_agree(problem) -> None:
    parameters = problem.parameters * (1 + 0.1 * torch.randn(len(problem.parameters), dtype=torch.float64))
    f = problem.functions(parameters)
    symbol = [ca.SX.sym("s", problem.state_dim), ca.SX.sym("a", problem.action_dim)]
    given = symbols(problem, ca.DM(parameters.numpy()))
    parts = [given.dynamics(*symbol), given.stage_cost(*symbol), given.terminal_cost(symbol[0])]
    if given.constraint is not None:
        parts.append(given.constraint(symbol[0]))
    function = ca.Function("all", symbol, parts)
    for _ in range(10):
        s = torch.randn(problem.state_dim, dtype=torch.float64)
        a = torch.randn(problem.action_dim, dtype=torch.float64)
        expected = [f.dynamics(s, a), -f.reward(s, a), -f.terminal_value(s)]
        if f.constraint is not None:
            assert f.terminal_constraint is not None
            expected.append(f.constraint(s, a))
            torch.testing.assert_close(f.constraint(s, a), f.terminal_constraint(s))
        found = function(s.numpy(), a.numpy())
        assert len(found) == len(expected)
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_allclose(np.array(theirs).ravel(), ours.numpy().ravel(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["ipopt", "fatrop"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_multiple_shooting_finds_the_known_optimum(problem, method) -> None:
    shooting, parameters = MultipleShooting(problem, method), problem.parameters.numpy()
    start, guess = np.array(problem.start), problem.init_actions(1)[0].numpy()
    found = shooting.solve(start, guess, parameters)
    assert found.solved
    assert found.cost == pytest.approx(COSTS[problem.name], abs=1e-4)
    cost, violation, states = problem.rollout(problem.starts(1), torch.from_numpy(found.actions)[None])
    assert cost.item() == pytest.approx(found.cost, abs=1e-5)
    assert violation.item() < 1e-6
    np.testing.assert_allclose(found.states[1:], states[0].numpy(), atol=1e-6)
    again = shooting.again(found, start, parameters)
    assert again.solved
    assert again.iterations < found.iterations
    np.testing.assert_allclose(again.actions, found.actions, atol=1e-4)
    later = shooting.again(found, found.states[1], parameters, shifted=True)
    assert later.solved


def test_the_gradient_is_that_of_cold_solves() -> None:
    session = CasadiSession(Cell(QUADROTOR, 1), "ipopt", compile=False)
    gradient, parameters = session.gradient(), QUADROTOR.parameters.numpy()
    shooting, guess = MultipleShooting(QUADROTOR), QUADROTOR.init_actions(1)[0].numpy()

    def loss(mass: float) -> float:
        moved = np.array([mass, parameters[1]])
        found = shooting.solve(np.array(QUADROTOR.start), guess, moved)
        return float(QUADROTOR.loss(torch.from_numpy(found.actions)))

    assert gradient[0] == pytest.approx((loss(0.5005) - loss(0.4995)) / 0.001, rel=1e-3)


@pytest.mark.parametrize("problem", [CARTPOLE, UNICYCLE], ids=["unconstrained", "constrained"])
@pytest.mark.parametrize("method", ["ipopt", "fatrop"])
def test_compiled_functions_give_the_same(problem, method, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    short, parameters = problem.shortened(4), problem.parameters.numpy()
    start, guess = np.array(problem.start), short.init_actions(1)[0].numpy()
    plain, compiled = (
        MultipleShooting(short, method, compile=compile).solve(start, guess, parameters) for compile in (False, True)
    )
    np.testing.assert_allclose(compiled.actions, plain.actions, atol=1e-6)
    assert not list(tmp_path.iterdir())  # the C code is gone


def test_a_quick_run_compares_everything(tmp_path) -> None:
    pytest.importorskip("mpc", reason="mpc.pytorch is absent: run `make baselines`")
    rows = run(Config(problems=("cartpole",), quick=True, repeats=1, out=tmp_path))
    assert [row["entry"] for row in rows][:3] == ["CasADi IPOPT", "CasADi fatrop", "mpc.pytorch"]

"""The benchmark of control: its problems, what it writes and how its ratios are made. CasADi is not needed."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.control import Config, Loop, run
from benchmarks.control_entries import Cell, Outcome, Session, entries
from benchmarks.control_problems import CARTPOLE, HOVER, PROBLEMS, QUADROTOR, UNICYCLE
from benchmarks.control_report import Line, Sample, summarise
from difftori.errors import ConfigError, MissingExtraError

F64 = torch.float64


def test_a_quick_run_writes_its_files(tmp_path: Path) -> None:
    rows = run(Config(quick=True, baselines=False, repeats=1, out=tmp_path))
    assert list(dict.fromkeys(row["problem"] for row in rows)) == [f"{name} B=2" for name in PROBLEMS]
    out = tmp_path / "quick"
    with (out / "control-summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert len(summary) == len(rows)
    for row in summary:
        assert all(float(row[f"{part}_ms"]) > 0 for part in ("cold", "warm", "gradient"))
        assert float(row["violation"]) <= 1e-3
    with (out / "control-raw.csv").open() as file:
        assert {row["part"] for row in csv.DictReader(file)} == {"cold", "warm", "gradient"}
    assert json.loads((out / "control.json").read_text())["config"]["finished"]
    assert "<svg" in (out / "control.svg").read_text()
    assert not list(out.glob("*.tmp"))


def test_a_missing_baseline_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "casadi", None)
    with pytest.raises(MissingExtraError, match=r"difftori\[baselines\].*--no-baselines"):
        run(Config(quick=True, out=tmp_path))
    assert not list(tmp_path.iterdir())


def test_an_unknown_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="CasADi IPOPT"):
        run(Config(entries=("SNOPT",), baselines=False, out=tmp_path))


def test_entries_are_chosen_by_what_is_wanted() -> None:
    assert not any(entry.baseline or entry.compiled for entry in entries(CARTPOLE, baselines=False, compile=False))
    assert "mpc.pytorch" not in [entry.name for entry in entries(UNICYCLE, baselines=True, compile=True)]
    (only,) = entries(QUADROTOR, baselines=True, compile=False, only=("CasADi IPOPT",))
    assert only.baseline


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_functions_work_on_any_leading_dimensions(problem) -> None:
    f = problem.functions(problem.parameters)
    states = torch.randn(3, 2, problem.state_dim, dtype=F64)
    actions = torch.randn(3, 2, problem.action_dim, dtype=F64)
    assert f.dynamics(states, actions).shape == states.shape
    torch.testing.assert_close(f.dynamics(states, actions)[1, 0], f.dynamics(states[1, 0], actions[1, 0]))
    assert f.reward(states, actions).shape == f.terminal_value(states).shape == (3, 2)
    if f.constraint is not None:
        assert f.terminal_constraint is not None
        assert f.constraint(states, actions).shape == f.terminal_constraint(states).shape == (3, 2, 3)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_starts_are_the_same_in_every_batch_and_the_guess_is_within_bounds(problem) -> None:
    starts = problem.starts(4)
    assert torch.equal(starts[:2], problem.starts(2))
    assert starts[0].tolist() == list(problem.start)
    guess = problem.init_actions(4)
    assert guess.shape == (4, problem.horizon, problem.action_dim)
    assert (guess >= guess.new_tensor(problem.low)).all()
    assert (guess <= guess.new_tensor(problem.high)).all()
    f = problem.functions(problem.parameters)
    if f.terminal_constraint is not None:
        assert (f.terminal_constraint(problem.starts(64)) < 0).all()


def test_a_hovering_quadrotor_stays_and_an_upright_pole_stands() -> None:
    f, still = QUADROTOR.functions(QUADROTOR.parameters), torch.zeros(12, dtype=F64)
    torch.testing.assert_close(f.dynamics(still, torch.full((4,), HOVER, dtype=F64)), still)
    f, upright = CARTPOLE.functions(CARTPOLE.parameters), torch.zeros(4, dtype=F64)
    assert torch.equal(f.dynamics(upright, torch.zeros(1, dtype=F64)), upright)


def test_a_tilted_quadrotor_conserves_energy_and_angular_momentum() -> None:
    """Without thrust the body falls freely: its energy and its angular momentum in the world stay what they are."""
    f = QUADROTOR.functions(QUADROTOR.parameters)
    state = torch.tensor([0.0, 0, 0, 1, -0.5, 2, 0.3, -0.2, 0.5, 1.0, -0.7, 0.4], dtype=F64)
    inertia = torch.tensor([0.0023, 0.0023, 0.004], dtype=F64)

    def energy(s: torch.Tensor) -> torch.Tensor:
        return 0.5 * 0.5 * s[3:6].square().sum() + 0.5 * 9.81 * s[2] + 0.5 * (inertia * s[9:].square()).sum()

    later = state
    for _ in range(4):
        later = f.dynamics(later, torch.zeros(4, dtype=F64))
    torch.testing.assert_close(energy(later), energy(state), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close((inertia * later[9:]).norm(), (inertia * state[9:]).norm(), rtol=1e-6, atol=1e-8)


def test_a_rollout_reports_cost_violation_and_states() -> None:
    """Straight ahead, the unicycle drives through an obstacle."""
    actions = torch.zeros(1, 30, 2, dtype=F64)
    actions[:, :5, 0] = 1.0
    cost, violation, states = UNICYCLE.rollout(UNICYCLE.starts(1), actions)
    assert states.shape == (1, 30, 4)
    assert cost > 0
    assert 0.05 < violation < 0.6**2
    _, outside, _ = CARTPOLE.rollout(CARTPOLE.starts(1), torch.full((1, 50, 1), 10.5, dtype=F64))
    assert outside.item() == pytest.approx(0.5)


def test_times_of_part_of_a_batch_are_compared_as_they_are_and_ratios_are_of_medians() -> None:
    cell = Cell(CARTPOLE, 2)
    rest = {"problem": "cartpole", "horizon": 50, "batch": 2, "rows": 1, "first_call_ms": 1.0}
    rest |= dict.fromkeys(("iterations", "solved", "warm_cost", "warm_violation"), 0.0)
    rest |= dict.fromkeys(("warm_iterations", "warm_solved", "gradient_error", "cost", "violation"), 0.0)

    def line(name: str, ms: list[float], reference):
        samples = [Sample(str(cell), name, part, i, v) for part in ("cold", "warm") for i, v in enumerate(ms)]
        return Line(entry=name, **rest, **summarise(samples, reference))

    first = line("one", [10.0, 30.0, 20.0], None)
    second = line("two", [5.0], first)
    assert (first.cold_q1, first.cold_ms, first.cold_q3, first.cold_ratio) == (15.0, 20.0, 25.0, 1.0)
    assert (second.cold_ratio, second.warm_ratio) == (4.0, 4.0)
    assert math.isnan(second.gradient_ms)


class _Still(Session):
    """Never acts; notes the states that it is given."""

    rows = 1

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def cold(self) -> Outcome:
        return Outcome(torch.zeros(1, 50, 1, dtype=F64), [1], [True], None)

    def warm(self, states, last) -> Outcome:
        self.seen.append(states)
        return self.cold()

    def gradient(self):
        raise NotImplementedError


def test_the_closed_loop_begins_again_with_the_same_noise() -> None:
    session = _Still()
    loop = Loop(Cell(CARTPOLE, 1), session, session.cold(), 3)
    for _ in range(6):
        loop.advance()()
        loop.record()
    assert torch.equal(torch.cat(session.seen[:3]), torch.cat(session.seen[3:]))
    assert len(set(loop.costs)) == 3

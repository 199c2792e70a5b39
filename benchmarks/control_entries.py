"""The entries of `difftori bench control`: the planner of this library, CasADi with IPOPT or fatrop, and mpc.pytorch.

An entry opens a session on a cell (a problem at a batch size). A session solves from the initial guess, solves the next step
of a closed loop from its last plan, and solves with the gradient. To add an entry, add one line to `ENTRIES`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from benchmarks.baselines import mpc_cartpole
from benchmarks.control_casadi import Method, MultipleShooting, ShootingSolution
from benchmarks.control_problems import ControlProblem
from difftori.controller import Controller
from difftori.planning import plan
from difftori.solver import ILQR, Solver
from difftori.types import Plans, States

Gradient = Float[np.ndarray, "Z"]


@dataclass(frozen=True)
class Cell:
    """One problem at one batch size, and the dtype and device of this library's entries."""

    problem: ControlProblem
    batch: int
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0
    casadi_rows: int = 4
    max_steps: int = 200

    def __str__(self) -> str:
        return f"{self.problem.name} H={self.problem.horizon} B={self.batch}"

    @property
    def starts(self) -> States:
        """The initial states of the plans, float64 on the CPU."""
        return self.problem.starts(self.batch, self.seed)


@dataclass(frozen=True)
class Outcome:
    """Plans (B H A) of the solved rows, the number of iterations of each, and whether the solver reports success.

    `own` is private to the session: the start of its next warm solve.
    """

    actions: Plans
    iterations: list[int]
    solved: list[bool]
    own: Any


class Session(ABC):
    """One entry on one cell. `rows`: the number of rows that it solves; times are scaled by batch / rows."""

    rows: int

    @abstractmethod
    def cold(self) -> Outcome:
        """Solve from the starts and the initial guess."""

    @abstractmethod
    def warm(self, states: States, last: Outcome) -> Outcome:
        """Solve from `states` (rows S), float64 on the CPU, starting from the last plan shifted by one step."""

    @abstractmethod
    def gradient(self) -> Gradient:
        """Solve as in `cold`, and return ∂ Σ_rows loss(plan) / ∂ parameters."""


class OursSession(Session):
    """`difftori.Controller` for the loop and `difftori.plan` for the gradient, with the whole batch at once."""

    def __init__(self, cell: Cell, solver: Solver, compile: bool):
        self._cell, self._solver, self._compile, self.rows = cell, solver, compile, cell.batch
        to = partial(torch.Tensor.to, device=cell.device, dtype=cell.dtype)
        self._to, self._parameters = to, to(cell.problem.parameters)
        self._starts, self._init = to(cell.starts), to(cell.problem.init_actions(cell.batch))
        self._functions = cell.problem.functions(self._parameters)
        self._bounds = (self._init.new_tensor(cell.problem.low), self._init.new_tensor(cell.problem.high))

    def _outcome(self, controller: Controller, states: States) -> Outcome:
        controller(states)
        assert controller.plan is not None
        solution = controller.plan.solution
        return Outcome(controller.plan.actions, solution.steps.tolist(), solution.converged.tolist(), controller)

    def cold(self) -> Outcome:
        """Solve from the initial guess."""
        functions, (low, high) = self._functions, self._bounds
        controller = Controller(
            functions.dynamics,
            functions.reward,
            functions.terminal_value,
            horizon=self._init.shape[1],
            action_dim=self._init.shape[2],
            low=low,
            high=high,
            constraint=functions.constraint,
            terminal_constraint=functions.terminal_constraint,
            init_actions=self._init[0],
            solver=self._solver,
            first_steps=self._cell.max_steps,
            tolerance=TOLERANCE,
            compile=self._compile,
        )
        return self._outcome(controller, self._starts)

    def warm(self, states: States, last: Outcome) -> Outcome:
        """Solve from the last plan shifted by one step. The controller is copied, so that a loop can restart."""
        return self._outcome(copy(last.own), self._to(states))

    def gradient(self) -> Gradient:
        """Differentiate with the adjoint, in one backward pass."""
        parameters, (low, high) = self._parameters.clone().requires_grad_(), self._bounds
        functions = self._cell.problem.functions(parameters)
        found = plan(
            functions.dynamics,
            functions.reward,
            functions.terminal_value,
            self._starts,
            self._init,
            low,
            high,
            solver=self._solver,
            max_steps=self._cell.max_steps,
            tolerance=TOLERANCE,
            constraint=functions.constraint,
            terminal_constraint=functions.terminal_constraint,
            compile=self._compile,
        )
        (grad,) = torch.autograd.grad(self._cell.problem.loss(found.actions).sum(), parameters)
        return grad.cpu().double().numpy()


TOLERANCE = 1e-5
"""Tolerance of this library's solves: the estimated distance to the optimum as a share of the actions' range."""


class CasadiSession(Session):
    """CasADi, one row after the other. Of a batch it solves the first `casadi_rows` rows."""

    def __init__(self, cell: Cell, method: Method, compile: bool):
        self._problem, self.rows = cell.problem, min(cell.batch, cell.casadi_rows)
        self._shooting = MultipleShooting(cell.problem, method, compile=compile)
        self._starts = cell.starts[: self.rows].numpy()
        self._init = cell.problem.init_actions(1)[0].numpy()
        self._parameters = cell.problem.parameters.numpy()

    def _outcome(self, found: list[ShootingSolution]) -> Outcome:
        actions = torch.from_numpy(np.stack([each.actions for each in found]))
        return Outcome(actions, [each.iterations for each in found], [each.solved for each in found], found)

    def cold(self) -> Outcome:
        """Solve from the rollout of the initial guess."""
        return self._outcome([self._shooting.solve(start, self._init, self._parameters) for start in self._starts])

    def warm(self, states: States, last: Outcome) -> Outcome:
        """Solve from the last solution, shifted, with its multipliers."""
        rows = zip(last.own, states.numpy(), strict=True)
        return self._outcome([self._shooting.again(own, s, self._parameters, shifted=True) for own, s in rows])

    def gradient(self) -> Gradient:
        """Differentiate by central differences, with two warm solves for each parameter."""
        total = np.zeros_like(self._parameters)
        for start in self._starts:
            base = self._shooting.solve(start, self._init, self._parameters)
            for i, value in enumerate(self._parameters):
                step = 1e-4 * (abs(value) or 1.0)
                moved = np.zeros_like(self._parameters)
                moved[i] = step
                up, down = (
                    self._loss(self._shooting.again(base, start, self._parameters + sign * moved)) for sign in (1, -1)
                )
                total[i] += (up - down) / (2 * step)
        return total

    def _loss(self, found: ShootingSolution) -> float:
        return float(self._problem.loss(torch.from_numpy(found.actions)))


class MpcSession(Session):
    """mpc.pytorch's iLQR on the cart-pole, with the whole batch at once, float64. `baselines.mpc_cartpole` documents its settings."""

    def __init__(self, cell: Cell):
        self._cell, self.rows = cell, cell.batch
        self._starts, self._init = cell.starts, cell.problem.init_actions(cell.batch)
        self._parameters = cell.problem.parameters

    def _outcome(self, states: States, init: Plans, iterations: int) -> Outcome:
        actions = mpc_cartpole(self._cell.problem, states, init, self._parameters, iterations=iterations).detach()
        shifted = torch.cat([actions[:, 1:], actions[:, -1:]], 1)
        return Outcome(actions, [], [], shifted)  # it reports neither iterations nor convergence

    def cold(self) -> Outcome:
        """Solve from the initial guess."""
        return self._outcome(self._starts, self._init, self._cell.max_steps)

    def warm(self, states: States, last: Outcome) -> Outcome:
        """Solve from the last plan, shifted, with 10 iterations."""
        return self._outcome(states, last.own, min(10, self._cell.max_steps))

    def gradient(self) -> Gradient:
        """Differentiate with its implicit derivative."""
        parameters, problem = self._parameters.clone().requires_grad_(), self._cell.problem
        actions = mpc_cartpole(problem, self._starts, self._init, parameters, iterations=self._cell.max_steps)
        (grad,) = torch.autograd.grad(problem.loss(actions).sum(), parameters)
        return grad.numpy()


def _every(problem: ControlProblem) -> bool:
    return True


@dataclass(frozen=True)
class Entry:
    """A method to measure. `baseline`: from another library; `compiled`: compiled before the timing; `repeats`: upper limit of the repeats."""

    name: str
    open: Callable[[Cell], Session]
    solves: Callable[[ControlProblem], bool] = field(default=_every)
    baseline: bool = False
    compiled: bool = False
    repeats: int = 1_000_000


def _ours(solver: Solver, compile: bool, cell: Cell) -> Session:
    return OursSession(cell, solver, compile)


def _casadi(method: Method, compile: bool, cell: Cell) -> Session:
    return CasadiSession(cell, method, compile)


def _is_cartpole(problem: ControlProblem) -> bool:
    return problem.name == "cartpole"


ENTRIES: tuple[Entry, ...] = (
    # Ratios and gradient errors are relative to the first entry of a cell.
    Entry("CasADi IPOPT", partial(_casadi, "ipopt", False), baseline=True),
    Entry("CasADi IPOPT compiled", partial(_casadi, "ipopt", True), baseline=True, compiled=True),
    Entry("CasADi fatrop", partial(_casadi, "fatrop", False), baseline=True),
    Entry("CasADi fatrop compiled", partial(_casadi, "fatrop", True), baseline=True, compiled=True),
    Entry("mpc.pytorch", MpcSession, _is_cartpole, baseline=True, repeats=1),
    Entry("ILQR", partial(_ours, ILQR(), False)),
    Entry("ILQR compiled", partial(_ours, ILQR(), True), compiled=True),
)


def entries(problem: ControlProblem, *, baselines: bool, compile: bool, only: tuple[str, ...] = ()) -> list[Entry]:
    """The entries that solve this problem, without the baselines or the compiled ones if these are not requested."""
    return [
        entry
        for entry in ENTRIES
        if entry.solves(problem)
        and (baselines or not entry.baseline)
        and (compile or not entry.compiled)
        and (not only or entry.name in only)
    ]

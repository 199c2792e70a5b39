"""The interface of a solver: an initial state and a step. `solve` implements everything that solvers share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from difftori.solver.box import Box
from difftori.solver.compiled import compiled_call, maybe_compiled
from difftori.solver.derivatives import check_cost, costs_of_candidates, value_and_grad, value_grad_hessian
from difftori.solver.objective import Objective
from difftori.types import Hessians, Points, PointSets, RowFlags, Rows


@dataclass(frozen=True)
class Problem:
    """The objective and box of one call, and how to evaluate them.

    `create_graph`: steps must be differentiable (unrolling). `generator`: the random generator of sampling solvers.
    `candidates` (K B n): points that sampling solvers evaluate in addition to their own samples (TD-MPC's policy trajectories).
    `compile`: evaluations go through `torch.compile`.
    """

    objective: Objective
    box: Box
    create_graph: bool = False
    generator: torch.Generator | None = None
    candidates: Tensor | None = None
    compile: bool = False

    def evaluate(self, x: Points) -> tuple[Rows, Points]:
        """Cost and gradient at x."""
        if self.compile and not torch.compiler.is_compiling():
            cost, grad = compiled_call(value_and_grad, self.objective, x, self.create_graph)
            return check_cost(cost, x), grad
        return value_and_grad(self.objective, x, self.create_graph)

    def curvature(self, x: Points) -> tuple[Rows, Points, Hessians]:
        """Cost, gradient and dense Hessian at x."""
        if self.compile and not self.create_graph:
            return compiled_call(value_grad_hessian, self.objective, x)
        return value_grad_hessian(self.objective, x, self.create_graph)

    def score(self, candidates: Tensor) -> Tensor:
        """Costs (K B) of candidates (K B n), without a gradient unless `create_graph` is set."""
        with torch.set_grad_enabled(self.create_graph):
            if self.compile and not torch.compiler.is_compiling():
                return compiled_call(costs_of_candidates, self.objective, candidates)
            return costs_of_candidates(self.objective, candidates)

    def call(self, function: Callable, *arguments: Any):
        """Call function(*arguments), compiled if evaluations are. For functions of many small kernels on tensors like arguments[1]."""
        lean = arguments[1].device.type == "cpu"
        return maybe_compiled(self.compile and not self.create_graph, function, *arguments, lean=lean)

    def project(self, x: PointSets) -> PointSets:
        """The nearest point of the box."""
        return self.box.project(x)

    def with_graph(self) -> "Problem":
        """The same problem with differentiable steps."""
        return replace(self, create_graph=True)


class State(NamedTuple):
    """The state of a solver at x: cost (B), gradient (B n) if it computes one, and its own memory, rows first.

    Solvers of trajectories also set `states` (B H+1 S), which belong to x, and `distance` (B n), an estimate of the change of
    each variable from x to the optimum.
    """

    cost: Rows
    grad: Points | None
    memory: tuple[Tensor, ...] = ()
    states: Tensor | None = None
    distance: Points | None = None

    def finite(self) -> RowFlags:
        """Which rows have a finite cost and gradient, (B)."""
        return all_finite(self.cost.detach(), None if self.grad is None else self.grad.detach())

    def detached(self) -> "State":
        """The same state without a graph."""
        grad = None if self.grad is None else self.grad.detach()
        states = None if self.states is None else self.states.detach()
        return State(self.cost.detach(), grad, tuple(part.detach() for part in self.memory), states, self.distance)


class Solver(ABC):
    """An iteration on B independent problems. A concrete solver is a frozen dataclass: its fields are its configuration.

    Steps do not mix rows, do not leave the box and do not synchronise with the device. A solver does not depend on how its
    solution is differentiated: if `problem.create_graph` is set, `step` must use differentiable operations only.
    """

    traced_whole: ClassVar[bool] = True
    """With compile=True, whether several steps are traced together. False: a step compiles its own parts. Default: True."""

    @property
    def monotone(self) -> bool:
        """Whether a row moves only to points with a finite cost and gradient, and no higher cost, rounding aside. Default: False.

        Then no step is checked, and with a tolerance of 0 the last iterate counts as the best.
        """
        return False

    @abstractmethod
    def init(self, problem: Problem, x: Points) -> State:
        """The state at an initial point inside the box."""

    @abstractmethod
    def step(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """One iteration."""

    def compilable(self, objective: Objective) -> bool:
        """Whether compile=True is supported: `step` does not branch on values, or compiles its own parts. Default: False."""
        return False

    def finish(self, problem: Problem, x: Points, state: State) -> tuple[Points, State]:
        """A final refinement after the iterations, not counted in the step limit. Default: none."""
        return x, state


def rowwise(mask: Tensor, like: Tensor) -> Tensor:
    """A mask (B) reshaped to broadcast against a tensor with rows first."""
    return mask.view(-1, *(1,) * (like.dim() - 1))


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Row by row: `yes` where the mask (B) is true, else `no`."""
    return torch.where(rowwise(mask, yes), yes, no)


def choose_state(mask: Tensor, yes: State, no: State) -> State:
    """The same as `choose` for solver states."""
    grad = None if yes.grad is None or no.grad is None else choose(mask, yes.grad, no.grad)
    memory = tuple(choose(mask, a, b) for a, b in zip(yes.memory, no.memory, strict=True))
    states = None if yes.states is None or no.states is None else choose(mask, yes.states, no.states)
    distance = None if yes.distance is None or no.distance is None else choose(mask, yes.distance, no.distance)
    return State(torch.where(mask, yes.cost, no.cost), grad, memory, states, distance)


def all_finite(cost: Rows, grad: Points | None) -> Tensor:
    """Which rows have a finite cost and gradient, (B)."""
    size = cost.abs() if grad is None else torch.maximum(cost.abs(), largest(grad))
    return size < torch.inf  # false for NaN, which both functions pass on; torch.isfinite has four operations


def largest(x: Points) -> Rows:
    """The largest |x| of each row; NaN if the row contains NaN."""
    return torch.linalg.vector_norm(x, torch.inf, -1)

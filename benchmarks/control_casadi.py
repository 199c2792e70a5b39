"""The problems of `difftori bench control` in CasADi, solved by multiple shooting with IPOPT or fatrop.

The equations are those of `control_problems`, written a second time with CasADi symbols. CasADi is imported inside functions
only: `pip install 'difftori[baselines]'`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from benchmarks.control_problems import (
    ARM,
    DRAG,
    GRAVITY,
    HOVER,
    INERTIA_Y,
    INERTIA_Z,
    OBSTACLES,
    ControlProblem,
)
from difftori.errors import ConfigError, MissingExtraError

Method = Literal["ipopt", "fatrop"]
Symbol = Any
"""A CasADi expression; CasADi has no type stubs."""


def casadi() -> ModuleType:
    """The module of CasADi. Raises MissingExtraError with the install command if it is missing."""
    try:
        import casadi  # pyright: ignore[reportMissingImports]
    except ImportError as missing:
        raise MissingExtraError(
            f"CasADi is not installed ({missing}). Fix: pip install 'difftori[baselines]', or make baselines."
        ) from missing
    return casadi


def casadi_version() -> str:
    """The installed version of CasADi."""
    casadi()
    return version("casadi")


@dataclass(frozen=True)
class Symbols:
    """The symbolic functions of one problem: next state, stage cost, terminal cost, and constraints ≤ 0 (None: no constraints)."""

    dynamics: Callable[[Symbol, Symbol], Symbol]
    stage_cost: Callable[[Symbol, Symbol], Symbol]
    terminal_cost: Callable[[Symbol], Symbol]
    constraint: Callable[[Symbol], Symbol] | None = None


def symbols(problem: ControlProblem, parameters: Symbol) -> Symbols:
    """The functions of a problem with symbolic parameters."""
    known = {"cartpole": _cartpole, "unicycle": _unicycle, "quadrotor": _quadrotor}
    if problem.name not in known:
        raise ConfigError([f"problem: {problem.name!r} has no CasADi version. Fix: use one of {', '.join(known)}"])
    return known[problem.name](casadi(), parameters, problem.time_step)


def _runge_kutta(derivative: Callable[[Symbol, Symbol], Symbol], h: float) -> Callable[[Symbol, Symbol], Symbol]:
    def step(s: Symbol, a: Symbol) -> Symbol:
        k1 = derivative(s, a)
        k2 = derivative(s + h / 2 * k1, a)
        k3 = derivative(s + h / 2 * k2, a)
        k4 = derivative(s + h * k3, a)
        return s + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return step


def _cartpole(ca: ModuleType, parameters: Symbol, h: float) -> Symbols:
    mass, length = parameters[0], parameters[1]

    def derivative(s: Symbol, a: Symbol) -> Symbol:
        sin, cos, total = ca.sin(s[1]), ca.cos(s[1]), 1 + mass
        q = (a[0] + mass * length * s[3] * s[3] * sin) / total
        turning = (GRAVITY * sin - cos * q) / (length * (4 / 3 - mass * cos * cos / total))
        return ca.vertcat(s[2], s[3], q - mass * length * turning * cos / total, turning)

    def stage(s: Symbol, a: Symbol) -> Symbol:
        return 0.1 * s[0] ** 2 + 1 - ca.cos(s[1]) + 0.01 * s[2] ** 2 + 0.01 * s[3] ** 2 + 0.001 * a[0] ** 2

    def terminal(s: Symbol) -> Symbol:
        return 10 * s[0] ** 2 + 100 * (1 - ca.cos(s[1])) + 10 * s[2] ** 2 + 10 * s[3] ** 2

    return Symbols(_runge_kutta(derivative, h), stage, terminal)


def _unicycle(ca: ModuleType, parameters: Symbol, h: float) -> Symbols:
    radius, goal = parameters[0], parameters[1:3]

    def derivative(s: Symbol, a: Symbol) -> Symbol:
        return ca.vertcat(s[3] * ca.cos(s[2]), s[3] * ca.sin(s[2]), a[1], a[0])

    def stage(s: Symbol, a: Symbol) -> Symbol:
        return 0.1 * ca.sumsqr(s[:2] - goal) + 0.01 * s[3] ** 2 + 0.05 * ca.sumsqr(a)

    def terminal(s: Symbol) -> Symbol:
        return 10 * ca.sumsqr(s[:2] - goal) + s[3] ** 2 + 0.1 * s[2] ** 2

    def constraint(s: Symbol) -> Symbol:
        radii = (OBSTACLES[0][2], radius, OBSTACLES[2][2])
        return ca.vertcat(
            *[r**2 - (s[0] - x) ** 2 - (s[1] - y) ** 2 for r, (x, y, _) in zip(radii, OBSTACLES, strict=True)]
        )

    return Symbols(_runge_kutta(derivative, h), stage, terminal, constraint)


def _quadrotor(ca: ModuleType, parameters: Symbol, h: float) -> Symbols:
    mass, inertia_x = parameters[0], parameters[1]

    def derivative(s: Symbol, a: Symbol) -> Symbol:
        roll, pitch, yaw, rates = s[6], s[7], s[8], s[9:12]
        rotation_x = ca.blockcat([[1, 0, 0], [0, ca.cos(roll), -ca.sin(roll)], [0, ca.sin(roll), ca.cos(roll)]])
        rotation_y = ca.blockcat([[ca.cos(pitch), 0, ca.sin(pitch)], [0, 1, 0], [-ca.sin(pitch), 0, ca.cos(pitch)]])
        rotation_z = ca.blockcat([[ca.cos(yaw), -ca.sin(yaw), 0], [ca.sin(yaw), ca.cos(yaw), 0], [0, 0, 1]])
        thrust = rotation_z @ rotation_y @ rotation_x @ ca.vertcat(0, 0, ca.sum1(a) / mass)
        mixed = ca.sin(roll) * rates[1] + ca.cos(roll) * rates[2]
        angles = ca.vertcat(
            rates[0] + mixed * ca.tan(pitch),
            ca.cos(roll) * rates[1] - ca.sin(roll) * rates[2],
            mixed / ca.cos(pitch),
        )
        torque = ca.vertcat(ARM * (a[1] - a[3]), ARM * (a[2] - a[0]), DRAG * (a[0] - a[1] + a[2] - a[3]))
        inertia = ca.vertcat(inertia_x, INERTIA_Y, INERTIA_Z)
        turning = (torque - ca.cross(rates, inertia * rates)) / inertia
        return ca.vertcat(s[3:6], thrust - ca.vertcat(0, 0, GRAVITY), angles, turning)

    def weighted(s: Symbol, place: float, speed: float, angle: float, rate: float) -> Symbol:
        parts = ((place, s[0:3]), (speed, s[3:6]), (angle, s[6:9]), (rate, s[9:12]))
        return sum(weight * ca.sumsqr(part) for weight, part in parts)

    def stage(s: Symbol, a: Symbol) -> Symbol:
        return weighted(s, 1.0, 0.05, 0.2, 0.01) + 0.05 * ca.sumsqr(a - HOVER)

    return Symbols(_runge_kutta(derivative, h), stage, lambda s: weighted(s, 50.0, 5.0, 10.0, 0.5))


def _options(method: Method, equality: list[bool], compile: bool, *, warm: bool) -> dict[str, Any]:
    """The options of `nlpsol`."""
    own: dict[str, Any] = {"print_level": 0}
    if method == "ipopt":
        own["sb"] = "yes"  # no banner
    if warm:
        own["mu_init"] = 1e-4
    if warm and method == "ipopt":
        own["warm_start_init_point"] = "yes"
        own |= {f"warm_start_{name}_push": 1e-6 for name in ("bound", "mult_bound", "slack_bound")}
    given: dict[str, Any] = {f"{method}.{name}": value for name, value in own.items()} | {"print_time": 0}
    if method == "fatrop":
        given |= {"structure_detection": "auto", "equality": equality}
    if compile:
        own_files = {"jit_cleanup": False, "jit_options": {"flags": ["-O2"], "cleanup": False}}  # see _scratch
        given |= {"jit": True, "compiler": "shell"} | own_files
    return given


@contextmanager
def _scratch() -> Iterator[None]:
    """Use a temporary folder: CasADi writes C code to the current one, and does not always remove it."""
    before = Path.cwd()
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@dataclass(frozen=True)
class ShootingSolution:
    """One solve: states (H+1 S), actions (H A), the cost, whether the solver reports success, and its iterations.

    `raw` is CasADi's result, from which `MultipleShooting.solve` can start.
    """

    states: Float[np.ndarray, "T1 S"]
    actions: Float[np.ndarray, "H A"]
    cost: float
    solved: bool
    iterations: int
    raw: dict[str, Any]


class MultipleShooting:
    """One problem as a non-linear programme in states and actions, stage by stage, with CasADi's exact derivatives.

    `method` "ipopt" is the interior point method with MUMPS and its default settings (tolerance 1e-8); `warm` solves reuse
    the multipliers and a small barrier parameter. "fatrop" is an interior point method for this structure, also part of
    CasADi's wheels. Programmes are built once, for any start and any parameters. With `compile`, the system's C compiler
    compiles cost, constraints and derivatives, which takes up to two minutes.

    Raises:
        MissingExtraError: CasADi is not installed.
    """

    def __init__(self, problem: ControlProblem, method: Method = "ipopt", *, compile: bool = False):
        self.problem, self._ca = problem, casadi()
        s, a = self._ca.SX.sym("s", problem.state_dim), self._ca.SX.sym("a", problem.action_dim)
        parameters = self._ca.SX.sym("p", len(problem.parameter_values))
        f = symbols(problem, parameters)
        self.step = self._ca.Function("step", [s, a, parameters], [f.dynamics(s, a)])
        self._stage = self._ca.Function("stage", [s, a, parameters], [f.stage_cost(s, a)])
        self._terminal = self._ca.Function("terminal", [s, parameters], [f.terminal_cost(s)])
        inside = self._ca.SX.zeros(0, 1) if f.constraint is None else f.constraint(s)
        self._constraint = self._ca.Function("constraint", [s, parameters], [inside])
        # A compiled programme calls the functions of the stage. An interpreted one is faster with the functions expanded.
        programme, equality = self._programme(self._ca.MX if compile else self._ca.SX)
        with _scratch():
            self._cold, self._warm = (
                self._ca.nlpsol(name, method, programme, _options(method, equality, compile, warm=name == "warm"))
                for name in ("cold", "warm")
            )

    def _programme(self, kind: Any) -> tuple[dict[str, Symbol], list[bool]]:
        """Variables s_0, a_0, s_1, …, s_H; constraints [gap, start] at stage 0, then [gap, constraint] for each stage."""
        problem, vertcat = self.problem, self._ca.vertcat
        horizon, size = problem.horizon, problem.state_dim
        parameters, first = kind.sym("p", len(problem.parameter_values)), kind.sym("start", size)
        states = [kind.sym(f"s{k}", size) for k in range(horizon + 1)]
        actions = [kind.sym(f"a{k}", problem.action_dim) for k in range(horizon)]
        cost, rows, equality = self._terminal(states[-1], parameters), [], []
        for k, state in enumerate(states):
            if k < horizon:
                cost += self._stage(state, actions[k], parameters)
                rows.append(states[k + 1] - self.step(state, actions[k], parameters))
                equality += [True] * size
            rows.append(state - first if k == 0 else self._constraint(state, parameters))
            equality += [k == 0] * rows[-1].shape[0]
        stages = [part for pair in zip(states, actions, strict=False) for part in pair] + [states[-1]]
        bound = [np.full(size, np.inf) for _ in states]
        self._low = self._stacked([-b for b in bound], [np.array(problem.low)] * horizon)
        self._high = self._stacked(bound, [np.array(problem.high)] * horizon)
        self._g_low = np.where(equality, 0.0, -np.inf)
        return {"x": vertcat(*stages), "f": cost, "g": vertcat(*rows), "p": vertcat(first, parameters)}, equality

    @staticmethod
    def _stacked(states: Any, actions: Any) -> np.ndarray:
        pairs = [np.concatenate([s, a]) for s, a in zip(states, actions, strict=False)]
        return np.concatenate([*pairs, states[-1]])

    def guess(self, start: np.ndarray, actions: np.ndarray, parameters: np.ndarray) -> np.ndarray:
        """The variables of the rollout of these actions (H A), as the start of a solve."""
        states = [start]
        for action in actions:
            states.append(np.array(self.step(states[-1], action, parameters)).ravel())
        return self._stacked(states, actions)

    def solve(self, start: np.ndarray, actions: np.ndarray, parameters: np.ndarray) -> ShootingSolution:
        """Solve from the rollout of `actions` (H A)."""
        return self._run(self._cold, start, parameters, {"x0": self.guess(start, actions, parameters)})

    def again(
        self,
        last: ShootingSolution,
        start: np.ndarray,
        parameters: np.ndarray,
        *,
        shifted: bool = False,
        duals: bool = True,
    ) -> ShootingSolution:
        """Solve from another solution. `shifted`: from that solution one step later, as in MPC.

        `duals`: also start from its multipliers, with a small barrier parameter.
        """
        if not shifted:
            guess = {"x0": last.raw["x"]}
            multipliers = {"lam_x0": last.raw["lam_x"], "lam_g0": last.raw["lam_g"]}
            return self._run(
                self._warm if duals else self._cold, start, parameters, guess | (multipliers if duals else {})
            )
        states = np.concatenate([last.states[1:], last.states[-1:]])
        actions = np.concatenate([last.actions[1:], last.actions[-1:]])
        guess = {"x0": self._stacked(states, actions)}
        if duals:
            guess |= {
                "lam_x0": self._later(last.raw["lam_x"], self._stride),
                "lam_g0": self._later_g(last.raw["lam_g"]),
            }
        return self._run(self._warm if duals else self._cold, start, parameters, guess)

    @property
    def _stride(self) -> int:
        return self.problem.state_dim + self.problem.action_dim

    def _later(self, values: Any, stride: int) -> np.ndarray:
        flat = np.array(values).ravel()
        tail = flat[-self.problem.state_dim :]
        stages = flat[: -self.problem.state_dim]
        return np.concatenate([stages[stride:], stages[-stride:], tail])

    def _later_g(self, values: Any) -> np.ndarray:
        """The constraint multipliers shifted by one stage. Stage 0 holds [gap, start], later stages [gap, constraints]."""
        flat, size, horizon = np.array(values).ravel(), self.problem.state_dim, self.problem.horizon
        count = (len(flat) - size * (horizon + 1)) // horizon
        first, rest = flat[: 2 * size], flat[2 * size :]
        inner, last = rest[: (horizon - 1) * (size + count)], rest[(horizon - 1) * (size + count) :]
        inner = inner.reshape(horizon - 1, size + count)
        if horizon == 1:
            return flat
        shifted = np.concatenate([inner[1:], inner[-1:]])
        return np.concatenate([inner[0, :size], first[size:], shifted.ravel(), last])

    def _run(self, solver: Any, start: np.ndarray, parameters: np.ndarray, guess: dict[str, Any]) -> ShootingSolution:
        raw = solver(
            p=np.concatenate([start, parameters]), lbx=self._low, ubx=self._high, lbg=self._g_low, ubg=0.0, **guess
        )
        size, horizon = self.problem.state_dim, self.problem.horizon
        x = np.array(raw["x"]).ravel()
        stages = x[:-size].reshape(horizon, self._stride)
        stats = solver.stats()
        return ShootingSolution(
            states=np.concatenate([stages[:, :size], x[None, -size:]]),
            actions=np.ascontiguousarray(stages[:, size:]),
            cost=float(raw["f"]),
            solved=bool(stats["success"]),
            iterations=int(stats["iter_count"]),
            raw=raw,
        )

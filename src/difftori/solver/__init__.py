"""Differentiable optimisation of batches of independent problems. It needs PyTorch and no other part of this library.

sol = solve(objective, x0, solver=ProjectedGradient(), adjoint=Implicit(), box=Box(-1.0, 1.0), max_steps=20)
loss(sol.x).backward()
"""

from difftori.solver.adam import Adam
from difftori.solver.adjoint import Adjoint, Detached, Implicit, Truncated, Unrolled
from difftori.solver.augmented_lagrangian import AugmentedLagrangian
from difftori.solver.box import Box
from difftori.solver.constraints import ConstrainedTrajectory, Multipliers
from difftori.solver.cuda_graphs import Captured
from difftori.solver.gradient_check import GradientCheck, check_gradients
from difftori.solver.gradient_descent import GradientDescent
from difftori.solver.ilqr import ILQR
from difftori.solver.interface import Problem, Solver, State
from difftori.solver.levenberg_marquardt import GaussNewton, LevenbergMarquardt
from difftori.solver.newton import Newton
from difftori.solver.objective import FunctionObjective, LeastSquaresObjective, Objective, TrajectoryObjective
from difftori.solver.projected_gradient import ProjectedGradient
from difftori.solver.sampling import CEM, MPPI
from difftori.solver.solution import History, Solution, Status
from difftori.solver.solve import solve

__all__ = [
    "CEM",
    "ILQR",
    "MPPI",
    "Adam",
    "Adjoint",
    "AugmentedLagrangian",
    "Box",
    "Captured",
    "ConstrainedTrajectory",
    "Detached",
    "FunctionObjective",
    "GaussNewton",
    "GradientCheck",
    "GradientDescent",
    "History",
    "Implicit",
    "LeastSquaresObjective",
    "LevenbergMarquardt",
    "Multipliers",
    "Newton",
    "Objective",
    "Problem",
    "ProjectedGradient",
    "Solution",
    "Solver",
    "State",
    "Status",
    "TrajectoryObjective",
    "Truncated",
    "Unrolled",
    "check_gradients",
    "solve",
]

"""Every solver with settings that suit the test problems, and which problems it applies to."""

from difftori.solver import (
    CEM,
    ILQR,
    MPPI,
    Adam,
    GaussNewton,
    GradientDescent,
    LeastSquaresObjective,
    LevenbergMarquardt,
    Newton,
    ProjectedGradient,
    TrajectoryObjective,
)

SOLVERS = {
    "projected-gradient": ProjectedGradient(),
    "projected-gradient-window": ProjectedGradient(window=5),
    "projected-gradient-polished": ProjectedGradient(polish=2),
    "newton": Newton(),
    "newton-cg": Newton(linear="cg"),
    "adam": Adam(lr=0.05),
    "gradient-descent": GradientDescent(0.05),
    "lm-adaptive": LevenbergMarquardt(offset=10.0, damping=0.1, step_size=0.5, adaptive=True),
    "lm-fixed": LevenbergMarquardt(offset=30.0, damping=5.0, step_size=0.02),
    "lm-stacked": LevenbergMarquardt(damping=0.01),
    "gauss-newton": GaussNewton(),
    "ilqr": ILQR(),
    "ddp": ILQR(second_order=True),
    "cem": CEM(samples=128, elites=16),
    "mppi": MPPI(samples=128, elites=16, std=0.5, temperature=5.0, min_std=0.02),
}
STACKED = {"gauss-newton", "lm-stacked"}
SECOND_ORDER = {"projected-gradient-polished", "newton", "newton-cg", "ddp"}


def applies(name: str, objective) -> bool:
    solver = SOLVERS[name]
    if name == "lm-fixed":
        return not isinstance(objective, LeastSquaresObjective)
    if name in STACKED:
        return isinstance(objective, LeastSquaresObjective)
    if isinstance(solver, ILQR):
        return isinstance(objective, TrajectoryObjective)
    return True

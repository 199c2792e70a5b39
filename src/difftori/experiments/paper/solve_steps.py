"""Numbers of steps of DiffTORI's solve, in training and inference: success, MetaWorld from states, a small base.

The tasks, demonstrations, budget and base are those of `base-noise`. The control is the residual with its best noise.
"""

from pydantic import Field

from difftori.experiments.il_report import run_refinement
from difftori.experiments.il_study import ILStudy, shortfalls
from difftori.experiments.paper.base_noise import (
    FULL_EPISODES,
    FULL_SEEDS,
    FULL_UPDATES,
    RESIDUAL_NOISE,
    TASKS,
    metaworld_case,
    small_base,
)
from difftori.experiments.study import Method
from difftori.policies.difftori import DEFAULT_NOISE, DiffTORIConfig

STEPS = (1, 2, 3, 5)
_DEFAULT = DiffTORIConfig.model_validate({}).max_steps


class Config(ILStudy):
    """Numbers of steps of DiffTORI's solve, on MetaWorld from states."""

    tasks: tuple[str, ...] = Field(default=TASKS, min_length=1)
    """Tasks of MetaWorld."""
    seeds: int = Field(default=FULL_SEEDS, ge=1)
    """Number of seeds: 0 … seeds−1, each with its own demonstrations, held-out episodes and initial weights."""
    steps: tuple[int, ...] = Field(default=STEPS, min_length=1)
    """Numbers of steps to compare. The default of `difftori-il` is always included."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/solve_steps`."""
    counts = sorted({*config.steps, _DEFAULT})
    base, _ = small_base()
    residual = Method(f"residual σ {RESIDUAL_NOISE:g}", "residual", {"base_noise": RESIDUAL_NOISE}, base=base.label)
    refined = {steps: _refined(steps, base.label) for steps in counts}
    compared = [(refined[steps].label, refined[_DEFAULT].label) for steps in counts if steps != _DEFAULT]
    compared += [(method.label, other.label) for method in refined.values() for other in (residual, base)]
    checks = {
        **shortfalls(config, updates=FULL_UPDATES, episodes=FULL_EPISODES, seeds=FULL_SEEDS),
        "other tasks": set(config.tasks) != set(TASKS),
        "other steps": set(config.steps) != set(STEPS),
    }
    run_refinement(
        config,
        [metaworld_case(task) for task in config.tasks],
        [base, residual, *refined.values()],
        compared,
        study="solve_steps",
        title="Steps of DiffTORI's solve",
        reasons=[reason for reason, holds in checks.items() if holds],
        budget=f"state-{config.updates}",
    )


def _refined(steps: int, base: str) -> Method:
    settings = {"base_noise": DEFAULT_NOISE, "max_steps": steps}
    return Method(f"DiffTORI, {steps} step{'s' * (steps > 1)}", "difftori-il", settings, base=base)

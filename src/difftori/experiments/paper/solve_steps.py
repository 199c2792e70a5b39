"""Numbers of steps of DiffTORI's solve, in training and inference: success, MetaWorld from states, a small base.

The tasks, runs and controls are those of `base-noise`, whose DiffTORI takes 5 steps. A step costs about a quarter of an update.
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
    """Numbers of steps of DiffTORI's solve, on MetaWorld from states. The runs are shared with `base-noise`."""

    tasks: tuple[str, ...] = Field(TASKS, min_length=1)
    """Tasks of MetaWorld."""
    seeds: int = Field(FULL_SEEDS, ge=1)
    """Number of seeds: 0 … seeds−1, each with its own demonstrations, held-out episodes and initial weights."""
    steps: tuple[int, ...] = Field(STEPS, min_length=1)
    """Numbers of steps to compare. The default of `difftori-il` is always included."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/solve_steps`."""
    residual = f"residual σ {RESIDUAL_NOISE:g}"
    refiners = [
        Method(residual, "residual", {"base_noise": RESIDUAL_NOISE}, base="base"),
        *(_refined(steps) for steps in sorted({*config.steps, _DEFAULT})),
    ]
    default = _label(_DEFAULT)
    compared = [(_label(steps), default) for steps in sorted({*config.steps} - {_DEFAULT})]
    compared += [(method.label, residual) for method in refiners if method.label != residual]
    checks = {
        **shortfalls(config, updates=FULL_UPDATES, episodes=FULL_EPISODES, seeds=FULL_SEEDS),
        "other tasks": set(config.tasks) != set(TASKS),
        "other steps": set(config.steps) != set(STEPS),
    }
    run_refinement(
        config,
        [metaworld_case(task) for task in config.tasks],
        [*small_base(), *refiners],
        compared,
        study="solve_steps",
        title="Steps of DiffTORI's solve",
        reasons=[reason for reason, holds in checks.items() if holds],
        budget=f"state-{config.updates}",
        runs=f"base_noise/state-{config.updates}",
    )


def _label(steps: int) -> str:
    """The label of DiffTORI with this number of steps. The default number has that of `base-noise`, whose runs it shares."""
    return f"DiffTORI σ {DEFAULT_NOISE:g}" + ("" if steps == _DEFAULT else f", {steps} step{'s' * (steps > 1)}")


def _refined(steps: int) -> Method:
    settings = {"base_noise": DEFAULT_NOISE} | ({} if steps == _DEFAULT else {"max_steps": steps})
    return Method(_label(steps), "difftori-il", settings, base="base")

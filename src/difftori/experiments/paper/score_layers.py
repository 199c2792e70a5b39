"""Layers of DiffTORI's score: success and training time with one hidden layer and few steps, MetaWorld from states, a small base.

The tasks, number of demonstrations, budget and base are those of `base-noise`. The control is the residual with its best noise.
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
from difftori.policies.difftori import DEFAULT_NOISE


class Config(ILStudy):
    """Hidden layers of DiffTORI's score: one, and as many as the other networks have, on MetaWorld from states."""

    tasks: tuple[str, ...] = Field(default=TASKS, min_length=1)
    """Tasks of MetaWorld."""
    seeds: int = Field(default=FULL_SEEDS, ge=1)
    """Number of seeds: 0 … seeds−1, each with its own demonstrations, held-out episodes and initial weights."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/score_layers`."""
    base, _ = small_base()
    residual = Method(f"residual σ {RESIDUAL_NOISE:g}", "residual", {"base_noise": RESIDUAL_NOISE}, base=base.label)
    two, five = (_refined(steps, base.label) for steps in (2, 5))
    one_layer = [_refined(steps, base.label, (256,)) for steps in (2, 3)]
    refined = [two, five, *one_layer]
    compared = [(method.label, five.label) for method in refined if method is not five]
    compared += [(one_layer[0].label, two.label)]
    compared += [(method.label, other.label) for method in refined for other in (residual, base)]
    checks = {
        **shortfalls(config, updates=FULL_UPDATES, episodes=FULL_EPISODES, seeds=FULL_SEEDS),
        "other tasks": set(config.tasks) != set(TASKS),
    }
    run_refinement(
        config,
        [metaworld_case(task) for task in config.tasks],
        [base, residual, *refined],
        compared,
        study="score_layers",
        title="Layers of DiffTORI's score",
        reasons=[reason for reason, holds in checks.items() if holds],
        budget=f"state-{config.updates}",
    )


def _refined(steps: int, base: str, hidden: tuple[int, ...] | None = None) -> Method:
    settings = {"base_noise": DEFAULT_NOISE, "max_steps": steps, "score_hidden": hidden}
    return Method(
        f"DiffTORI, {steps} steps{'' if hidden is None else ', one layer'}", "difftori-il", settings, base=base
    )

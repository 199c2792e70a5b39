"""Standard deviations σ of the noise on the base's action in training, for DiffTORI and the residual: MetaWorld from states, a small base.

The tasks are not among those of our Table 1. Controls: the base, and the base trained twice as long, which is the training
cost of base and refiner together.
"""

from collections.abc import Sequence

from pydantic import Field

from difftori.experiments.il_report import run_refinement
from difftori.experiments.il_study import Case, ILStudy, shortfalls
from difftori.experiments.study import Method
from difftori.policies.difftori import DEFAULT_NOISE

TASKS = ("basketball", "peg-insert-side", "stick-pull")
FULL_SEEDS, FULL_UPDATES, FULL_EPISODES, DEMOS = 5, 1500, 50, 10
SIGMAS = (0.0, 0.1, 0.3, 0.5, 1.0)
RESIDUAL_NOISE = 0.5
"""The best σ for the residual in this study. Other studies use it for their control."""


class SmallStudy(ILStudy):
    """Options of the studies on these tasks from states, with the small base."""

    tasks: tuple[str, ...] = Field(default=TASKS, min_length=1)
    """Tasks of MetaWorld."""
    seeds: int = Field(default=FULL_SEEDS, ge=1)
    """Number of seeds: 0 … seeds−1, each with its own demonstrations, held-out episodes and initial weights."""


class Config(SmallStudy):
    """Noise on the base's action during training, for DiffTORI and the residual, on MetaWorld from states."""

    sigmas: tuple[float, ...] = Field(default=SIGMAS, min_length=1)
    """Standard deviations σ of the noise to compare, in half-widths of the action range."""


def metaworld_case(task: str) -> Case:
    """Return a task from states, with ten demonstrations of the packaged expert for each seed."""
    return Case(f"metaworld:{task}", "state", f"{{demos}}/metaworld.{task}-{{seed}}.zarr", collect=DEMOS)


def small_base() -> list[Method]:
    """Return a multilayer perceptron with DiffTORI's training settings, and the same trained twice as long."""
    settings = {"hidden": (256, 256), "optimizer": "adamw", "lr_schedule": "cosine", "batch_size": 64}
    return [Method("base", "bc", settings), Method("base twice as long", "bc", settings, updates=2)]


def noisy_residual() -> Method:
    """Return the residual with its best noise, the control of the other studies."""
    return Method(f"residual σ {RESIDUAL_NOISE:g}", "residual", {"base_noise": RESIDUAL_NOISE}, base="base")


def run_small(
    config: SmallStudy,
    methods: Sequence[Method],
    compared: Sequence[tuple[str, str]],
    *,
    study: str,
    title: str,
    **other: bool,
) -> None:
    """Run the missing runs on the tasks, and write `out/STUDY`. `other`: ways in which the study differs from the full one, and whether it does."""
    checks = {
        **shortfalls(config, updates=FULL_UPDATES, episodes=FULL_EPISODES, seeds=FULL_SEEDS),
        "other tasks": set(config.tasks) != set(TASKS),
        **{f"other {name}": differs for name, differs in other.items()},
    }
    run_refinement(
        config,
        [metaworld_case(task) for task in config.tasks],
        methods,
        compared,
        study=study,
        title=title,
        reasons=[reason for reason, holds in checks.items() if holds],
        budget=f"state-{config.updates}",
    )


def run(config: Config) -> None:
    """Run the missing runs, and write `out/base_noise`."""
    refiners = [
        Method(f"{name} σ {sigma:g}", policy, {"base_noise": sigma}, base="base")
        for name, policy in (("residual", "residual"), ("DiffTORI", "difftori-il"))
        for sigma in config.sigmas
    ]
    compared = [(method.label, reference) for method in refiners for reference in ("base", "base twice as long")]
    compared += [(f"DiffTORI σ {sigma:g}", f"residual σ {sigma:g}") for sigma in config.sigmas]
    if DEFAULT_NOISE in config.sigmas:
        others = [sigma for sigma in config.sigmas if sigma != DEFAULT_NOISE]
        compared += [(f"DiffTORI σ {DEFAULT_NOISE:g}", f"residual σ {sigma:g}") for sigma in others]
    run_small(
        config,
        [*small_base(), *refiners],
        compared,
        study="base_noise",
        title="Noise on the base's action in training",
        σ=set(config.sigmas) != set(SIGMAS),
    )

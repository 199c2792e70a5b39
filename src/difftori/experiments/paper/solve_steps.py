"""Numbers of steps of DiffTORI's solve, in training and inference: success, MetaWorld from states, a small base.

The tasks, demonstrations, budget and base are those of `base-noise`. The control is the residual with its best noise.
"""

from pydantic import Field

from difftori.experiments.paper.base_noise import SmallStudy, noisy_residual, run_small, small_base
from difftori.experiments.study import Method
from difftori.policies.difftori import DEFAULT_NOISE, DiffTORIConfig

STEPS = (1, 2, 3, 5)
_DEFAULT = DiffTORIConfig.model_validate({}).max_steps


class Config(SmallStudy):
    """Numbers of steps of DiffTORI's solve, on MetaWorld from states."""

    steps: tuple[int, ...] = Field(default=STEPS, min_length=1)
    """Numbers of steps to compare. The default of `difftori-il` is always included."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/solve_steps`."""
    counts = sorted({*config.steps, _DEFAULT})
    base, _ = small_base()
    residual = noisy_residual()
    refined = {steps: _refined(steps, base.label) for steps in counts}
    compared = [(refined[steps].label, refined[_DEFAULT].label) for steps in counts if steps != _DEFAULT]
    compared += [(method.label, other.label) for method in refined.values() for other in (residual, base)]
    run_small(
        config,
        [base, residual, *refined.values()],
        compared,
        study="solve_steps",
        title="Steps of DiffTORI's solve",
        steps=set(config.steps) != set(STEPS),
    )


def _refined(steps: int, base: str) -> Method:
    settings = {"base_noise": DEFAULT_NOISE, "max_steps": steps}
    return Method(f"DiffTORI, {steps} step{'s' * (steps > 1)}", "difftori-il", settings, base=base)

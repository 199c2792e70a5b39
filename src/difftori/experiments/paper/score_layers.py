"""Layers of DiffTORI's score: success and training time with one hidden layer and few steps, MetaWorld from states, a small base.

The tasks, number of demonstrations, budget and base are those of `base-noise`. The control is the residual with its best noise.
"""

from difftori.experiments.paper.base_noise import SmallStudy, noisy_residual, run_small, small_base
from difftori.experiments.study import Method
from difftori.policies.difftori import DEFAULT_NOISE


class Config(SmallStudy):
    """Hidden layers of DiffTORI's score: one, and as many as the other networks have, on MetaWorld from states."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/score_layers`."""
    base, _ = small_base()
    residual = noisy_residual()
    two, five = (_refined(steps, base.label) for steps in (2, 5))
    one_layer = [_refined(steps, base.label, (256,)) for steps in (2, 3)]
    refined = [two, five, *one_layer]
    compared = [(method.label, five.label) for method in refined if method is not five]
    compared += [(one_layer[0].label, two.label)]
    compared += [(method.label, other.label) for method in refined for other in (residual, base)]
    run_small(
        config,
        [base, residual, *refined],
        compared,
        study="score_layers",
        title="Layers of DiffTORI's score",
    )


def _refined(steps: int, base: str, hidden: tuple[int, ...] | None = None) -> Method:
    settings = {"base_noise": DEFAULT_NOISE, "max_steps": steps, "score_hidden": hidden}
    return Method(
        f"DiffTORI, {steps} steps{'' if hidden is None else ', one layer'}", "difftori-il", settings, base=base
    )

"""Table 2, Robomimic and Push-T: three base policies, and refiners on two of them.

Robomimic's tasks succeed or fail. On Push-T, the paper's failure rate is most likely 1 − the mean score (the greatest
coverage / 0.95 of an episode), so the score is compared with 1 − the paper's number. Success is coverage above 0.95 at any step.
"""

from difftori.experiments.paper.base_noise import RESIDUAL_NOISE
from difftori.experiments.paper.manipulation import (
    FAILURE_RATES,
    SMALL,
    ManipulationConfig,
    base,
    published,
    refiner,
    run_tables,
)
from difftori.experiments.study import Method
from difftori.paper.numbers import labelled_numbers

PAPER = {
    "ibc": "ibc",
    "bc-rnn-gmm": "bc-rnn",
    "residual on bc-rnn-gmm": "residual+bc-rnn",
    "DiffTORI on bc-rnn-gmm": "difftori+bc-rnn",
    "diffusion": "diffusion",
    "ibc on diffusion": "ibc+diffusion",
    "residual on diffusion": "residual+diffusion",
    "DiffTORI on diffusion": "difftori+diffusion",
}


class Config(ManipulationConfig):
    """Robomimic and Push-T: three base policies, and refiners on two of them (Table 2)."""

    controls: bool = True
    """Also run the bases trained twice as long, and the residual with noise σ = 0.5 on the base's action, the best in `base-noise`."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/table2`."""
    methods = [base(config, "ibc")]
    compared = []
    for name in ("bc-rnn-gmm", "diffusion"):
        plain = base(config, name)
        methods.append(plain)
        if config.controls:
            methods.append(Method(f"{name} twice as long", name, plain.settings, updates=2))
        if name == "diffusion":
            small = SMALL["ibc"] if config.sizes == "small" else {}
            methods.append(refiner(config, f"ibc on {name}", "ibc-base", name, **small))
        methods.append(refiner(config, f"residual on {name}", "residual", name))
        methods.append(refiner(config, f"DiffTORI on {name}", "difftori-il", name))
        if config.controls:
            noise = {"base_noise": RESIDUAL_NOISE}
            methods.append(refiner(config, f"residual on {name}, noise", "residual", name, **noise))
        others = [
            method.label for method in methods if name in method.label and not method.label.startswith("DiffTORI")
        ]
        compared += [(f"DiffTORI on {name}", other) for other in others]
    run_tables(
        config,
        methods,
        compared,
        study="table2",
        title="Table 2: Robomimic and Push-T",
        theirs=[published(*found) for found in labelled_numbers(FAILURE_RATES, PAPER)],
        further={"without controls": not config.controls},
    )

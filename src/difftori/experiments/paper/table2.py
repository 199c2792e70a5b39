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
from difftori.policies.difftori import DEFAULT_NOISE

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
    """Also run the bases trained twice as long, and the refiners with noise on the base's action: σ = 0.5 for the residual, 1 for
    DiffTORI, the best in `base-noise`."""


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
        ours = f"DiffTORI on {name}"
        methods.append(refiner(config, f"residual on {name}", "residual", name))
        methods.append(refiner(config, ours, "difftori-il", name))
        if config.controls:
            for label, policy, noise in (
                (f"residual on {name}, noise", "residual", RESIDUAL_NOISE),
                (f"{ours}, noise", "difftori-il", DEFAULT_NOISE),
            ):
                methods.append(refiner(config, label, policy, name, base_noise=noise))
            compared += [(f"{ours}, noise", other) for other in (ours, f"residual on {name}, noise", name)]
        others = [method.label for method in methods if name in method.label]
        compared += [(ours, other) for other in others if not other.startswith("DiffTORI")]
    run_tables(
        config,
        methods,
        compared,
        study="table2",
        title="Table 2: Robomimic and Push-T",
        theirs=[published(*found) for found in labelled_numbers(FAILURE_RATES, PAPER)],
        further={"without controls": not config.controls},
    )

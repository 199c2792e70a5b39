"""Table 4, Robomimic and Push-T: the start of DiffTORI's solve: the diffusion policy's actions, zero, or random.

Runs are shared with Table 2.
"""

from difftori.experiments.paper.manipulation import (
    FAILURE_RATES,
    ManipulationConfig,
    base,
    published,
    refiner,
    run_tables,
)
from difftori.paper.numbers import labelled_numbers

PAPER = {
    "diffusion": "diffusion",
    "DiffTORI on diffusion": "difftori+diffusion",
    "DiffTORI from zero": "difftori+zero-init",
    "DiffTORI from random": "difftori+random-init",
}


class Config(ManipulationConfig):
    """Robomimic and Push-T: starting points of DiffTORI's solve (Table 4). Runs are shared with Table 2."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/table4`."""
    main = refiner(config, "DiffTORI on diffusion", "difftori-il", "diffusion")
    # As in the paper, no arm has noise on its start. By default, only a start that never varies gets it.
    starts = [
        refiner(config, "DiffTORI from zero", "difftori-il", "diffusion", init="zero", base_noise=0.0),
        refiner(config, "DiffTORI from random", "difftori-il", "diffusion", init="random"),
    ]
    methods = [base(config, "diffusion"), main, *starts]
    compared = [(main.label, method.label) for method in starts]
    run_tables(
        config,
        methods,
        compared,
        study="table4",
        title="Table 4: where the solve starts",
        theirs=[published(*found) for found in labelled_numbers(FAILURE_RATES, PAPER)],
        further={},
    )

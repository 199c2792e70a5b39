"""Table 4, Robomimic and Push-T: the start of DiffTORI's solve: the diffusion policy's actions, zero, or random.

Runs are shared with Table 2.
"""

from difftori.experiments.paper.manipulation import ManipulationConfig, base, published, refiner, run_tables
from difftori.paper.numbers import paper_numbers

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
    starts = [
        refiner(config, f"DiffTORI from {init}", "difftori-il", "diffusion", init=init) for init in ("zero", "random")
    ]
    methods = [base(config, "diffusion"), main, *starts]
    compared = [(main.label, method.label) for method in starts]
    rows = paper_numbers("table2_and_4_robomimic_pusht_failure_rate")
    run_tables(
        config,
        methods,
        compared,
        study="table4",
        title="Table 4: where the solve starts",
        theirs=[published(row, label) for row in rows for label, method in PAPER.items() if row.method == method],
        further={},
    )

"""Table 5, ManiSkill: the start of DiffTORI's solve: the base's actions, zero, or random. Runs are shared with Table 3."""

from difftori.experiments.paper.maniskill import ManiskillConfig, base, refiner, run_tables

PAPER = {
    "base": "bc",
    "DiffTORI": "difftori+bc",
    "DiffTORI from zero": "difftori+zero-init",
    "DiffTORI from random": "difftori+random-init",
}


class Config(ManiskillConfig):
    """ManiSkill: starting points of DiffTORI's solve (Table 5). Runs are shared with Table 3."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/table5`."""
    ours = refiner(config, "DiffTORI")
    # Noise on zero would make it a random start.
    starts = [refiner(config, f"DiffTORI from {init}", init=init, base_noise=0.0) for init in ("zero", "random")]
    run_tables(
        config,
        [base(config), ours, *starts],
        [(ours.label, method.label) for method in starts],
        study="table5",
        title="Table 5: where the solve starts",
        paper=PAPER,
        further={},
    )

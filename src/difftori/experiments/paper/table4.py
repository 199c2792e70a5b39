"""Table 4, Push-T: the start of DiffTORI's solve: the diffusion policy's actions, zero, or random. Runs are shared with Table 2."""

from difftori.experiments.paper.pusht import PushTConfig, base, failure_rates, refiner, run_push_t

PAPER = {
    "diffusion": "diffusion",
    "DiffTORI on diffusion": "difftori+diffusion",
    "DiffTORI from zero": "difftori+zero-init",
    "DiffTORI from random": "difftori+random-init",
}


class Config(PushTConfig):
    """Push-T: starting points of DiffTORI's solve (Table 4). Runs are shared with Table 2."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/table4`."""
    main = refiner(config, "DiffTORI on diffusion", "difftori-il", "diffusion")
    starts = [
        refiner(config, f"DiffTORI from {init}", "difftori-il", "diffusion", init=init) for init in ("zero", "random")
    ]
    methods = [base(config, "diffusion"), main, *starts]
    compared = [(main.label, method.label) for method in starts]
    theirs = failure_rates("table2_and_4_robomimic_pusht_failure_rate")
    published = {label: theirs[method] for label, method in PAPER.items()}
    run_push_t(
        config,
        methods,
        compared,
        study="table4",
        title="Table 4: where the solve starts",
        published=published,
        further={},
    )

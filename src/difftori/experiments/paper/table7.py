"""Table 7, Robomimic and Push-T: the planning horizon H of DiffTORI on the diffusion policy, with one action per step through latent dynamics.

H actions are planned and executed before the next plan, so the control is the diffusion policy with H executed actions.
"""

from dataclasses import replace

from difftori.experiments.paper.manipulation import ManipulationConfig, base, published, refiner, run_tables
from difftori.experiments.study import Method
from difftori.paper.numbers import paper_numbers

HORIZONS = (1, 3, 5)


class Config(ManipulationConfig):
    """Robomimic and Push-T: planning horizons of DiffTORI on the diffusion policy (Table 7)."""

    horizons: tuple[int, ...] = HORIZONS
    """Planning horizons H to compare, in agent steps."""
    controls: bool = True
    """Also run the diffusion policy alone with H executed actions per plan, for each H, trained from scratch with the same data and seed."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/table7`."""
    plain = base(config, "diffusion")
    ours = [
        replace(refiner(config, f"H = {h}", "difftori-il", "diffusion", decision="step"), options={"n_action_steps": h})
        for h in config.horizons
    ]
    alone = [
        Method(f"diffusion, {h} executed", "diffusion", plain.settings, options={"n_action_steps": h})
        for h in config.horizons
    ]
    methods = [plain, *ours, *(alone if config.controls else ())]
    compared = [(ours[0].label, method.label) for method in ours[1:]]
    compared += [
        (method.label, control.label) for method, control in zip(ours, alone, strict=True) if control in methods
    ]
    rows = paper_numbers("table7_horizon_failure_rate")
    run_tables(
        config,
        methods,
        compared,
        study="table7",
        title="Table 7: planning horizon",
        theirs=[published(row, f"H = {row.variant}") for row in rows],
        further={"other horizons": set(config.horizons) != set(HORIZONS), "without controls": not config.controls},
    )

"""Table 7, Push-T: the planning horizon H of DiffTORI on the diffusion policy, with one action per step through latent dynamics.

H actions are planned and executed before the next plan, so the control is the diffusion policy with H executed actions.
"""

from dataclasses import replace

from difftori.experiments.paper.pusht import PushTConfig, base, failure_rates, refiner, run_push_t
from difftori.experiments.study import Method

HORIZONS = (1, 3, 5)


class Config(PushTConfig):
    """Push-T: planning horizons of DiffTORI on the diffusion policy (Table 7)."""

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
    theirs = failure_rates("table7_horizon_failure_rate")
    published = {f"H = {h}": theirs[str(h)] for h in config.horizons if str(h) in theirs}
    run_push_t(
        config,
        methods,
        compared,
        study="table7",
        title="Table 7: planning horizon",
        published=published,
        further={"other horizons": set(config.horizons) != set(HORIZONS), "without controls": not config.controls},
    )

"""Table 7, Push-T: the planning horizon H of DiffTORI on the diffusion policy: one action a step through latent dynamics.

H actions are planned and executed before the next plan, so the control is the diffusion policy, of which as many are executed.
"""

from dataclasses import replace

from difftori.experiments.imitation import Arm
from difftori.experiments.pusht import PushTConfig, base, failure_rates, refiner, run_push_t

HORIZONS = (1, 3, 5)


class Config(PushTConfig):
    """What to run of Table 7."""

    horizons: tuple[int, ...] = HORIZONS
    """H."""
    controls: bool = True
    """Also the diffusion policy alone with H actions executed of each of its plans; each is trained anew, with the same data and seed."""


def run(config: Config) -> None:
    """Run what is missing, and write `out/table7`."""
    plain = base(config, "diffusion")
    ours = [
        replace(refiner(config, f"H = {h}", "difftori-il", "diffusion", decision="step"), options={"execute": h})
        for h in config.horizons
    ]
    alone = [
        Arm(f"diffusion, {h} executed", "diffusion", plain.settings, options={"execute": h}) for h in config.horizons
    ]
    arms = [plain, *ours, *(alone if config.controls else ())]
    compared = [(ours[0].label, arm.label) for arm in ours[1:]]
    compared += [(arm.label, control.label) for arm, control in zip(ours, alone, strict=True) if control in arms]
    theirs = failure_rates("table7_horizon_failure_rate")
    published = {f"H = {h}": theirs[str(h)] for h in config.horizons if str(h) in theirs}
    run_push_t(
        config,
        arms,
        compared,
        study="table7",
        title="Table 7: planning horizon",
        published=published,
        further={"other horizons": set(config.horizons) != set(HORIZONS), "without controls": not config.controls},
    )

"""Table 7, Push-T: the planning horizon H of DiffTORI on the diffusion policy: one action a step through latent dynamics.

H actions are planned and executed before the next plan.
"""

from difftori.studies._imitation import Arm
from difftori.studies._pusht import PushTConfig, base, failure_rates, run_push_t

HORIZONS = (1, 3, 5)


class Config(PushTConfig):
    """What to run of Table 7."""

    horizons: tuple[int, ...] = HORIZONS
    """H."""


def run(config: Config) -> None:
    """Run what is missing, and write `out/table7`."""
    arms = [base(config, "diffusion")]
    arms += [
        Arm(f"H = {h}", "difftori-il", {"decision": "step"}, base="diffusion", options={"execute": h})
        for h in config.horizons
    ]
    compared = [(arms[1].label, arm.label) for arm in arms[2:]]
    theirs = failure_rates("table7_horizon_failure_rate")
    published = {f"H = {h}": theirs[str(h)] for h in config.horizons if str(h) in theirs}
    run_push_t(
        config,
        arms,
        compared,
        study="table7",
        title="Table 7: planning horizon",
        published=published,
        further={"other horizons": set(config.horizons) != set(HORIZONS)},
    )

"""Table 3: ManiSkill, a PointNet trained by behaviour cloning, the base with a residual, and the base refined by DiffTORI."""

from difftori.experiments.paper.base_noise import RESIDUAL_NOISE
from difftori.experiments.paper.maniskill import ManiskillConfig, base, refiner, run_tables
from difftori.experiments.study import Method

PAPER = {"base": "bc", "residual": "bc+residual", "DiffTORI": "difftori+bc"}


class Config(ManiskillConfig):
    """ManiSkill: a base policy, a residual on it, DiffTORI on it (Table 3)."""

    controls: bool = True
    """Also run the base trained twice as long, and the residual with noise σ = 0.5 on the base's action, the best in `base-noise`."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/table3`."""
    plain, ours = base(config), refiner(config, "DiffTORI")
    residual = Method("residual", "residual", base="base")
    controls = [
        Method("base twice as long", plain.trains, plain.settings, updates=2),
        Method("residual, noise", "residual", {"base_noise": RESIDUAL_NOISE}, base="base"),
    ]
    methods = [plain, residual, *(controls if config.controls else ()), ours]
    run_tables(
        config,
        methods,
        [*((ours.label, method.label) for method in methods[:-1]), ("residual", "base")],
        study="table3",
        title="Table 3: ManiSkill",
        paper=PAPER,
        further={"without controls": not config.controls},
    )

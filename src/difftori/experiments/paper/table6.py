"""Table 6, Robomimic: DiffTORI on a diffusion policy with position control, absolute poses of the hands instead of motions.

Table 2 has velocity control. Position control with human demonstrations is what Diffusion Policy (Chi et al., 2023) reports.
"""

from pydantic import Field

from difftori.experiments.paper.manipulation import ManipulationConfig, base, published, refiner, run_tables
from difftori.experiments.study import Method
from difftori.paper.numbers import labelled_numbers

PAPER_TASKS = ("square-ph", "square-mh", "transport-ph", "transport-mh", "tool_hang-ph")
TABLE = "table6_robomimic_position_control_failure_rate"
PAPER = {"diffusion": "diffusion", "DiffTORI on diffusion": "difftori+diffusion"}


class Config(ManipulationConfig):
    """Robomimic with position control: a diffusion policy, and DiffTORI on it (Table 6)."""

    tasks: tuple[str, ...] = Field(default=PAPER_TASKS, min_length=1)
    """Tasks: `square`, `transport`, `tool_hang`, `lift`, `can` with demonstrations of a scripted expert; the same names with `-ph` or
    `-mh` with robomimic's human demonstrations (default: the paper's five)."""
    controls: bool = True
    """Also run the diffusion policy trained twice as long, and the residual on it."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/table6`."""
    plain, ours = base(config, "diffusion"), refiner(config, "DiffTORI on diffusion", "difftori-il", "diffusion")
    controls = [
        Method("diffusion twice as long", "diffusion", plain.settings, updates=2),
        refiner(config, "residual on diffusion", "residual", "diffusion"),
    ]
    methods = [plain, *(controls if config.controls else ()), ours]
    run_tables(
        config,
        methods,
        [(ours.label, method.label) for method in methods[:-1]],
        study="table6",
        title="Table 6: position control",
        theirs=[published(row, label, data=row.variant) for row, label in labelled_numbers(TABLE, PAPER)],
        full_tasks=PAPER_TASKS,
        further={"without controls": not config.controls},
        absolute=True,
    )

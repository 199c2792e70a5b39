"""Where the policy-gradient term of Eq. 6 pays: DiffTORI over latent dimensions, distractors and losses of the model.

Not a figure of the paper. A model that is trained for prediction should differ most from one that is trained for return where it
cannot represent everything that is observed: with a small latent state, with distractors in the observation, and with a latent
state that the reward does not shape. In every such cell, DiffTORI with the term, in two schedules and with its sign flipped, is
compared with DiffTORI without it, paired by seed. A useful term gives better results in a cell, and its flipped form worse ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from difftori.experiments.paper.figure5 import Form
from difftori.experiments.paper.mismatch_latent_report import (
    NOTES,
    Cell,
    Shaping,
    advantages,
    cell_results,
    draw_advantages,
    tables,
)
from difftori.experiments.plots import save_svg
from difftori.experiments.rl_report import run_curves
from difftori.experiments.rl_study import Curves, RLStudy, Task
from difftori.experiments.rl_tables import Aggregate, Summary
from difftori.experiments.tables import markdown_table, write_csv

QUICK: dict[str, tuple[Any, ...]] = {
    "latent_dims": (2,),
    "distractors": (0, 4),
    "reward_shaping": ("on",),
    "forms": ("off", "replay"),
}
"""Axes of the quick study, where the command does not choose them."""


class Config(RLStudy):
    """DiffTORI with and without the policy-gradient term, over latent dimensions, distractors and reward shaping."""

    tasks: tuple[Task, ...] = Field(default=("cup-catch", "cheetah-run"), min_length=1)
    """Tasks of DeepMind Control."""
    seeds: int = Field(default=8, ge=1)
    """Number of seeds: 0 … seeds−1."""
    steps: int = Field(default=20_000, ge=1)
    """Number of environment steps of every run."""
    obs: Literal["state", "pixels"] = "state"
    """Observation type. Only states take distractors."""
    action_repeat: int | None = Field(default=4, ge=1)
    """Number of environment steps per agent step."""
    preset: Literal["paper", "compact", "small", "narrow"] = "small"
    """Sizes of networks and planner, apart from the latent dimension."""
    eval_every: int = Field(default=5_000, ge=1)
    """Number of environment steps between evaluations, each of 10 episodes."""
    latent_dims: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(2, 4, 8, 50), min_length=1)
    """Latent dimensions of the model."""
    distractors: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 16, 64), min_length=1)
    """Numbers of distractors in the observation."""
    reward_shaping: tuple[Shaping, ...] = Field(default=("on", "off"), min_length=1)
    """`on`: the losses of reward and value train encoder and dynamics too; `off`: only the consistency loss and the term do."""
    forms: tuple[Form, ...] = Field(
        default=("off", "per-episode", "replay", "per-episode-flipped", "replay-flipped"), min_length=1
    )
    """Forms of the policy-gradient term to compare, as in `figure5`. The reference, `off`, is always included."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/mismatch_latent`. Raises RunsFailedError at the end if runs failed."""
    cells, forms = cells_of(config), forms_of(config)

    def draw(curves: Curves, out: Path, summaries: Sequence[Summary], rows: Sequence[Aggregate]) -> list[str]:
        gains = advantages(curves, cells, forms)
        write_csv(out / "cells.csv", cell_results(curves, cells, forms))
        write_csv(out / "differences.csv", gains)
        save_svg(draw_advantages(curves, gains), out / "advantage.svg")
        return [*map(markdown_table, tables(curves, cells, forms).values()), NOTES]

    run_curves(
        config,
        [cell.method(form) for cell in cells for form in forms],
        draw,
        study="mismatch_latent",
        title="The policy-gradient term over latent dimensions and distractors",
        further=_lacking(config),
        tables=lambda curves: tables(curves, cells, forms),
        warning="Not comparable with the full study.",
    )


def cells_of(config: Config) -> list[Cell]:
    """Return the cells of the study, those that differ in the latent dimension next to each other."""
    return [
        Cell(latent_dim, distractors, shaping)
        for shaping in _axis(config, "reward_shaping")
        for distractors in _axis(config, "distractors")
        for latent_dim in _axis(config, "latent_dims")
    ]


def forms_of(config: Config) -> list[Form]:
    """Return the forms of the term, `off` first."""
    return list(dict.fromkeys(("off", *_axis(config, "forms"))))


def _axis(config: Config, name: str) -> tuple[Any, ...]:
    """Return the values of an option with several, each once; of the quick study, a few of the default ones."""
    short = config.quick and name not in config.model_fields_set
    return tuple(dict.fromkeys(QUICK[name] if short else getattr(config, name)))


def _lacking(config: Config) -> list[str]:
    """Return the values of the full study that this one leaves out, one line per option."""
    chosen = {name: _axis(config, name) for name in QUICK} | {"forms": forms_of(config)}
    lacking = {
        name: [value for value in Config.model_fields[name].default if value not in values]
        for name, values in chosen.items()
    }
    return [
        f"without {name.replace('_', ' ')} {', '.join(map(str, values))}" for name, values in lacking.items() if values
    ]

"""Base of the studies on Push-T: the human demonstrations, observation types, the methods of Tables 2, 4 and 7, their runs."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from difftori.experiments.il_report import Published, run_refinement
from difftori.experiments.il_study import FULL_SEEDS, Case, ILStudy
from difftori.experiments.study import Method
from difftori.paper.numbers import paper_numbers

FULL_UPDATES, FULL_EPISODES = 100_000, 50
DATA, PUBLIC_NAME = "pusht_cchi_v7_replay.zarr", "pusht-human"
LARGE: dict[str, dict[str, object]] = {"diffusion": {}, "bc-rnn-gmm": {}, "ibc": {}}
SMALL: dict[str, dict[str, object]] = {name: {"preset": "small"} for name in LARGE}

SMALL_BASE_SAMPLES = 4
"""Number of base samples of a diffusion policy at each training window. On a CPU, more samples take longer than the training."""


class PushTConfig(ILStudy):
    """Options of the studies on Push-T."""

    demos: Path = Path("demos")
    """Directory of `pusht_cchi_v7_replay.zarr`, the human demonstrations of Diffusion Policy's authors. If it is missing, it is
    downloaded when a base policy has to be trained (as by `difftori train --demos pusht-human`)."""
    obs: Literal["image", "pose"] = "image"
    """Observation type: images, as in the paper, or the pose of agent and block."""
    sizes: Literal["paper", "small"] = "paper"
    """Sizes of the networks of the base policies; `small` is for CPUs."""
    updates: int = Field(FULL_UPDATES, ge=1)
    """Number of updates of every training, for base policies and refiners."""


def run_push_t(
    config: PushTConfig,
    methods: list[Method],
    compared: list[tuple[str, str]],
    *,
    study: str,
    title: str,
    published: dict[str, tuple[float, float | None]],
    further: dict[str, bool],
) -> None:
    """Run the missing runs, and write `out/<study>`.

    `published` are the paper's failure rates by method. `further` are the study's own reasons that make it partial.
    """
    demos = str(config.demos / DATA) if (config.demos / DATA).exists() else PUBLIC_NAME
    checks = {
        "poses instead of images": config.obs != "image",
        "small networks": config.sizes != "paper",
        f"{config.updates} of {FULL_UPDATES} updates": config.updates < FULL_UPDATES,
        f"{config.seeds} of {FULL_SEEDS} seeds": config.seeds < FULL_SEEDS,
        f"{config.episodes} of {FULL_EPISODES} episodes": config.episodes < FULL_EPISODES,
        **further,
    }
    run_refinement(
        config,
        [Case("pusht", config.obs, demos)],
        methods,
        compared,
        study=study,
        title=title,
        reasons=[reason for reason, holds in checks.items() if holds],
        budget=f"{config.obs}-{config.sizes}-{config.updates}",
        published=[Published("pusht", label, 1 - mean, std) for label, (mean, std) in published.items()],
        measure="score",
        runs="push-t",
    )


def base(config: PushTConfig, name: str) -> Method:
    """Return a base policy at the study's sizes, labelled by its name."""
    return Method(name, name, (LARGE if config.sizes == "paper" else SMALL)[name])


def refiner(config: PushTConfig, label: str, policy: str, on: str, **settings: object) -> Method:
    """Return a refiner with its default settings except `settings`. At small sizes, it gets fewer samples of a diffusion policy."""
    if config.sizes == "small" and on == "diffusion":
        settings = {"base_samples": SMALL_BASE_SAMPLES, **settings}
    return Method(label, policy, settings, base=on)


def failure_rates(table: str) -> dict[str, tuple[float, float | None]]:
    """Return the paper's failure rates on Push-T by method, or by horizon for Table 7."""
    rows = [row for row in paper_numbers(table) if row.task == "push-t"]
    return {row.variant or row.method: (row.mean, row.std) for row in rows}

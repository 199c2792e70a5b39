"""Loggers of a run beside its own log: TensorBoard, and Weights & Biases."""

import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from difftori.errors import MissingExtraError
from difftori.runs.checkpoint import replace_file

_WANDB_ID = "wandb.txt"


class Logger(Protocol):
    """Receives the metrics of a run. NaN and Inf are left out."""

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Log metrics by their names."""
        ...

    def finish(self, summary: Mapping[str, float]) -> None:
        """Log the summary of the finished run."""
        ...

    def close(self) -> None:
        """Write what is pending. The run can be resumed."""
        ...


class TensorBoard:
    """Writes event files to a folder. Steps from `purge_from` on, of an earlier start, are hidden."""

    def __init__(self, folder: Path, purge_from: int | None):
        from torch.utils.tensorboard.writer import SummaryWriter  # imported late, because it takes half a second

        self._writer = SummaryWriter(str(folder), purge_step=purge_from)

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Write each metric as a scalar."""
        for name, value in finite(metrics).items():
            self._writer.add_scalar(name, value, step)

    def finish(self, summary: Mapping[str, float]) -> None:
        """Write nothing: `summary.json` has the summary."""

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """Logs to a run of Weights & Biases, with the configuration and the name of the run directory `path`.

    The id of that run is stored in `path`, so a resumed run continues it. Project, entity, mode and so on are read from
    wandb's environment variables (WANDB_PROJECT, default: difftori; WANDB_MODE=offline needs no network). Raises
    MissingExtraError if wandb is not installed.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            if error.name != "wandb":  # an incomplete installation
                raise
            raise MissingExtraError(
                "--wandb: wandb is not installed. Fix: pip install 'difftori[wandb]', or remove --wandb"
            ) from error
        file = path / _WANDB_ID
        number = file.read_text().strip() if file.exists() else uuid.uuid4().hex[:8]
        project = os.environ.get("WANDB_PROJECT", "difftori")
        self._run = wandb.init(
            project=project, name=path.name, id=number, resume="allow", dir=str(path), config=dict(config)
        )
        replace_file(file, f"{number}\n".encode())

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Log the metrics at a step. wandb ignores steps before its last one, which a resumed run repeats."""
        self._run.log(finite(metrics), step=step)

    def finish(self, summary: Mapping[str, float]) -> None:
        """Write the summary."""
        self._run.summary.update(finite(summary))

    def close(self) -> None:
        """Upload or store what is pending."""
        self._run.finish()


def uses_wandb(path: Path) -> bool:
    """Return whether an earlier start of the run in this directory logged to Weights & Biases."""
    return (path / _WANDB_ID).exists()


def finite(metrics: Mapping[str, float | int]) -> dict[str, float | int]:
    """Return the metrics without NaN and Inf."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}

"""The base policy of a refiner in training. Its actions at every window are computed once, and stored in a file if that is slow."""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from difftori.errors import CheckpointError, ConfigError
from difftori.il.config import TrainConfig
from difftori.il.task_names import default_held_out
from difftori.interfaces import Dataset
from difftori.policies.normalized import NormalizedPolicy
from difftori.policies.refiner import Refiner
from difftori.runs.checkpoint import read_weights, replace_file, write_weights
from difftori.types import Window, to_device

_log = logging.getLogger(__name__)

_WORTH_KEEPING = 5.0
"""The base's actions are stored in a file if computing them takes longer than this, in seconds."""


@dataclass(frozen=True)
class WithBase:
    """A data set of windows with K samples of the base's actions (N K H A), as `Window.base`."""

    windows: Dataset
    actions: Float[Tensor, "N K H A"]

    def __len__(self) -> int:
        return len(self.windows)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Window]:
        """Iterate once in random order. `generator` must be on the CPU."""
        return map(self._with_base, self.windows.batches(batch_size, generator))

    def in_order(self, batch_size: int = 256) -> Iterator[Window]:
        """Iterate once in order."""
        return map(self._with_base, self.windows.in_order(batch_size))

    def _with_base(self, batch: Window) -> Window:
        return replace(batch, base=self.actions[batch.index.cpu()].to(batch.actions))


def samples_of_base(policy: NormalizedPolicy) -> int:
    """Return the number K of base samples: `base_samples` for a stochastic base, 1 for a deterministic one, 0 without a base."""
    if policy.base is None or not isinstance(policy.policy, Refiner):
        return 0
    return policy.policy.base_samples if policy.base_stochastic else 1


def base_actions(policy: NormalizedPolicy, windows: Dataset, generator: torch.Generator) -> Float[Tensor, "N K H A"]:
    """Compute the base's actions at every window on the device of the generator, and return them on the CPU.

    K is `samples_of_base`, or 1 if a base that is not known to be stochastic returns the same actions each time, up to rounding.
    """
    parts = []
    for batch in windows.in_order():
        obs = to_device(batch.obs, generator.device)
        samples = [policy.base_actions(obs, generator=generator).cpu() for _ in range(samples_of_base(policy))]
        parts.append(torch.stack(samples, 1))
    actions = torch.cat(parts)
    known = isinstance(policy.base, NormalizedPolicy)
    return actions if known or not torch.allclose(actions, actions[:, :1], rtol=1e-4, atol=1e-6) else actions[:, :1]


def kept_base_actions(
    policy: NormalizedPolicy, windows: Dataset, generator: torch.Generator, *, base: str, folder: Path
) -> Float[Tensor, "N K H A"]:
    """Return `base_actions` from a file in `folder` if it exists; write the file if computing them takes more than five seconds.

    `base` identifies the base's weights, the generator and the machine settings. The file's name is a digest of it, of the number
    of samples and of the observations of all windows.
    """
    seen = hashlib.sha256(f"{base} {samples_of_base(policy)}".encode())
    for batch in windows.in_order():
        for name, values in sorted(batch.obs.items()):
            seen.update(name.encode() + values.contiguous().cpu().numpy().tobytes())
    file = folder / f"base-actions-{seen.hexdigest()[:16]}.pt"
    if file.exists():
        try:
            return read_weights(file)["actions"]
        except (CheckpointError, KeyError) as error:
            _log.warning("cannot read the stored actions of the base policy; computing them again: %s", error)
    started = time.perf_counter()
    actions = base_actions(policy, windows, generator)
    if time.perf_counter() - started > _WORTH_KEEPING:
        try:
            write_weights(file, {"actions": actions})
        except CheckpointError as error:  # another refiner may write the same file, or the folder may be read-only
            _log.warning("cannot store the actions of the base policy: %s", error)
    return actions


def copy_base(base: Path, out: Path, name: str = "policy.pt") -> None:
    """Copy a base's weights to `out/base.pt`, so that the run does not depend on the base's run directory."""
    if not (base / name).exists():
        raise ConfigError([f"base: {base} is not finished. Fix: run `difftori train --resume {base}`"])
    read_weights(base / name)  # raises CheckpointError if the file is damaged
    replace_file(out / "base.pt.sha256", (base / f"{name}.sha256").read_bytes())
    replace_file(out / "base.pt", (base / name).read_bytes())


def warn_of_split(below: Mapping[str, Any], config: TrainConfig) -> None:
    """Warn if the base was trained on episodes that this run holds out: those of a larger share, or of another seed."""
    base, own = _split(below), _split(config.model_dump(mode="json"))
    if own[0] > 0 and (own[0] > base[0] or own[1] != base[1]):
        _log.warning(
            "held_out: the base (--held-out %g, data seed %d) was trained on episodes that are held out here (%g, %d), so errors on "
            "them are too small. Fix: --held-out %g --data-seed %d",
            *base,
            *own,
            *base,
        )


def _split(plain: Mapping[str, Any]) -> tuple[float, int]:
    """Return the share of the held-out episodes of a configuration, and the seed that they are drawn by."""
    share, seed = plain.get("held_out"), plain.get("data_seed")
    return default_held_out(str(plain["env"])) if share is None else share, plain["seed"] if seed is None else seed

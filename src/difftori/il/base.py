"""The base policy of a refiner in training: its actions at every window, computed once, and kept in the run."""

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from difftori.errors import CheckpointError, ConfigError
from difftori.interfaces import Dataset
from difftori.policies.normalized import NormalizedPolicy
from difftori.policies.refiner import Refiner
from difftori.runs.checkpoint import read_weights, replace_file, write_weights
from difftori.types import Window, to_device

_log = logging.getLogger(__name__)

_WORTH_KEEPING = 5.0
"""Seconds that computing a base's actions must take for them to be kept in a file."""


@dataclass(frozen=True)
class WithBase:
    """Windows with the base's actions (N K H A) at each of them, as `Window.base`."""

    windows: Dataset
    actions: Float[Tensor, "N K H A"]

    def __len__(self) -> int:
        return len(self.windows)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Window]:
        """One pass in random order; `generator` lives on the CPU."""
        return map(self._with_base, self.windows.batches(batch_size, generator))

    def in_order(self, batch_size: int = 256) -> Iterator[Window]:
        """One pass in order."""
        return map(self._with_base, self.windows.in_order(batch_size))

    def _with_base(self, batch: Window) -> Window:
        return replace(batch, base=self.actions[batch.index.cpu()].to(batch.actions))


def samples_of_base(policy: NormalizedPolicy) -> int:
    """K: `base_samples` of a base that may return other actions at each call, 1 of another, 0 without one."""
    if policy.base is None or not isinstance(policy.policy, Refiner):
        return 0
    return policy.policy.base_samples if policy.base_stochastic else 1


def base_actions(policy: NormalizedPolicy, windows: Dataset, generator: torch.Generator) -> Float[Tensor, "N K H A"]:
    """The base's actions at every window, on the CPU, computed on the device of the generator.

    K is `samples_of_base`, or 1 if a base whose randomness is unknown returns the same actions each time, up to rounding.
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
    """`base_actions`, from a file in `folder` if they are there; written there if they took more than five seconds.

    `base` identifies the base's weights, the generator and how it computes. All windows' observations belong to the file's name too.
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
            _log.warning("the base's actions are computed again: %s", error)
    started = time.perf_counter()
    actions = base_actions(policy, windows, generator)
    if time.perf_counter() - started > _WORTH_KEEPING:
        try:
            write_weights(file, {"actions": actions})
        except CheckpointError as error:  # another refiner may be writing the same, or the folder be somebody else's
            _log.warning("the base's actions are not kept: %s", error)
    return actions


def copy_base(base: Path, out: Path, name: str = "policy.pt") -> None:
    """Copy a base's weights to `out/base.pt`: the run resumes, and acts, if the base's own run is gone."""
    if not (base / name).exists():
        raise ConfigError([f"base: {base} is not finished; go on with `difftori train --resume {base}`"])
    read_weights(base / name)  # raises if it is damaged
    replace_file(out / "base.pt.sha256", (base / f"{name}.sha256").read_bytes())
    replace_file(out / "base.pt", (base / name).read_bytes())

"""Which runs of a sweep share which GPU of this machine."""

import itertools
import os
from collections import Counter
from collections.abc import Sequence

from difftori.errors import ConfigError


class GPUs:
    """The GPUs of this machine, each with room for 1/`per_run` runs, or fewer. A run of `per_run` > 1 gets several for itself.

    `names`: as in CUDA_VISIBLE_DEVICES; default: those that this process sees. Raises ConfigError if there are too few.
    """

    def __init__(self, per_run: float, names: Sequence[str] | None = None):
        self.names = tuple(_visible() if names is None else names)
        self._each = max(1, round(per_run))
        self._sharing = 1 if per_run > 1 else int(1 / per_run + 1e-9)
        self.slots = len(self.names) // self._each * self._sharing
        self._used = Counter[str]()
        if not self.slots or (per_run > 1 and per_run != self._each):
            raise ConfigError(
                [
                    f"gpus: {per_run:g} for each run, and {len(self.names)} in this machine. Fix: give a fraction, such as 0.25, or "
                    "a whole number of GPUs that are there, or --gpus-per-run 0 for runs without any"
                ]
            )

    def take(self) -> str:
        """The GPUs for one more run, the least used first, for its CUDA_VISIBLE_DEVICES."""
        chosen = sorted(self.names, key=lambda name: self._used[name])[: self._each]
        self._used.update(chosen)
        return ",".join(chosen)

    def reserve(self, taken: str) -> None:
        """A run has these GPUs that was started before."""
        self._used.update(name for name in taken.split(",") if name in self.names)

    def give_back(self, taken: str) -> None:
        """A run has ended that had these GPUs."""
        self._used.subtract(name for name in taken.split(",") if name in self.names)


def _visible() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        # CUDA ignores everything from the first invalid name on; schedulers write -1 and NoDevFiles for no GPU.
        names = [name.strip() for name in named.split(",") if name.strip()]
        return list(dict.fromkeys(itertools.takewhile(lambda name: name not in ("-1", "NoDevFiles"), names)))
    import torch  # imported here because it takes seconds

    return [str(index) for index in range(torch.cuda.device_count())]

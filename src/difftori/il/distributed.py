"""Data-parallel training of one run by several processes, started by torchrun. Each process gets a part of every batch.

    torchrun --nproc-per-node 4 -m difftori.cli train dp3 --device cuda --env … --demos …

The gradient of a batch is the mean of the processes' gradients, weighted by their rows. It equals that of one process up to
rounding, for losses that are a mean over rows and use no random numbers. The main process (rank 0) writes the run; the others
load its checkpoints.
"""

import os
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from difftori.errors import ConfigError
from difftori.types import Scalar, Scalars, Window

_PATIENCE = timedelta(hours=12)
"""How long a process waits for another. Only the main process evaluates, which may take hours."""


class Distributed:
    """The processes of a run; this one has `rank` of `count`. A context manager for the process group, which one process does not need."""

    def __init__(self, rank: int, count: int, device: str):
        self.rank, self.count, self.device = rank, count, device

    @classmethod
    def alone(cls) -> "Distributed":
        """Return a group of one process."""
        return cls(0, 1, "cpu")

    @classmethod
    def of_torchrun(cls, device: str) -> "Distributed":
        """Return the processes started by torchrun, and select this process's GPU for `cuda`. Without torchrun, one process."""
        rank, count = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        if count > 1 and torch.device(device).type == "cuda":
            local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if local >= here:
                raise ConfigError(
                    [
                        f"device: no GPU for process {local} of this machine, which has {here}. Fix: start {here} processes"
                    ]
                )
            torch.cuda.set_device(local)
        return cls(rank, count, device)

    def __enter__(self) -> "Distributed":
        if self.count > 1:
            backend = "nccl" if torch.device(self.device).type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_PATIENCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run."""
        return self.rank == 0

    def wait(self) -> None:
        """Block until all processes have reached this call."""
        if self.count > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process."""
        if self.count == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def share(self, batch: Window) -> tuple[Window, float]:
        """Return this process's rows of a batch (B …), and their share of it. A process without rows gets the first one, with share 0."""
        if self.count == 1:
            return batch, 1.0
        rows = torch.arange(len(batch.actions))[self.rank :: self.count]
        part = len(rows) / len(batch.actions)
        return batch.rows(rows if len(rows) else torch.zeros(1, dtype=torch.long)), part

    def average(
        self, parameters: Iterable[Tensor], loss: Scalar, metrics: Scalars, part: float
    ) -> tuple[Scalar, Scalars]:
        """Return loss and metrics of the whole batch, and average the gradients in place. `part` is the share from `share`."""
        if self.count == 1:
            return loss, metrics
        names = sorted(metrics)
        gradients = [p.grad for p in parameters if p.grad is not None]
        numbers = torch.stack(
            [torch.as_tensor(number).detach().to(loss) for number in (loss, *(metrics[n] for n in names))]
        )
        flat = torch.cat([numbers, *(g.reshape(-1).to(loss.dtype) for g in gradients)]) * part
        dist.all_reduce(flat)
        found = flat.split([1, len(names), *(g.numel() for g in gradients)])
        for gradient, whole in zip(gradients, found[2:], strict=True):
            gradient.copy_(whole.reshape(gradient.shape))
        return found[0].squeeze(0), dict(zip(names, found[1].unbind(), strict=True))

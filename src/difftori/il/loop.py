"""The training loop of imitation, for runs and for `refine`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from difftori.il.learner import Learner
from difftori.interfaces import Dataset
from difftori.runs.run import seeded
from difftori.types import Metrics


@dataclass(frozen=True)
class TrainLoop:
    """Trains a learner on the windows, in random order, until the last epoch.

    The order depends on `seed` and the epoch only. `generator` provides the random numbers of the loss, on the device of the
    policy; with several processes, each uses its own generator instead.
    """

    learner: Learner
    windows: Dataset
    seed: int
    generator: torch.Generator

    def epochs(self, before_update: Callable[[], None] = lambda: None) -> Iterator[Metrics]:
        """Train from the learner's current epoch on. Yields the mean metrics of each epoch."""
        while self.learner.train_state.epoch < self.learner.epochs:
            yield self._epoch(before_update)

    def _epoch(self, before_update: Callable[[], None]) -> Metrics:
        train_state, settings = self.learner.train_state, self.learner.settings
        order = seeded(self.seed, f"order of epoch {train_state.epoch}")
        left = None if settings.updates is None else train_state.batch + settings.updates - train_state.step
        for batch in islice(self.windows.batches(settings.batch_size, order), train_state.batch, left):
            before_update()
            self.learner.update(batch.to(self.generator.device), self._noise())
        return self.learner.close_epoch()

    def _noise(self) -> torch.Generator:
        distributed = self.learner.distributed
        if distributed.count == 1:
            return self.generator
        # a random stream per process and step is not part of the checkpoint
        name = f"loss of step {self.learner.train_state.step} in process {distributed.rank}"
        return seeded(self.seed, name, str(self.generator.device))

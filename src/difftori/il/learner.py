"""The training loop of imitation: epochs, guarded updates, and the complete training state, for an exact resume."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from difftori.errors import CheckpointError, ConfigError, NonFiniteError, ObjectiveError
from difftori.il.distributed import Distributed
from difftori.interfaces import Dataset, PolicyConfig
from difftori.optim import MAX_SKIPS, Guard, soft_update
from difftori.policies.normalized import NormalizedPolicy
from difftori.runs.averages import Averages
from difftori.runs.checkpoint import State
from difftori.runs.run import seeded
from difftori.solver import Captured
from difftori.solver.cuda_graphs import Recorder
from difftori.types import Metrics, Scalar, Scalars, Window, to_device


def make_optimizer(parameters: Iterable[Tensor], settings: PolicyConfig) -> torch.optim.Optimizer:
    """Create the optimizer named in a policy's settings. Raises ConfigError for an unknown name."""
    lr, decay, betas = settings.lr, settings.weight_decay, (settings.beta1, settings.beta2)
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, betas=betas, fused=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, betas=betas, fused=True)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, weight_decay=decay, alpha=settings.rmsprop_alpha)
    raise ConfigError([f"settings.optimizer: {settings.optimizer!r} is unknown. Fix: give adam, adamw or rmsprop"])


def run_length(settings: PolicyConfig, examples: int) -> tuple[int, int]:
    """Return the number of epochs and of updates of a run over `examples` examples. With `updates`, the last epoch may be incomplete."""
    passes = math.ceil(examples / settings.batch_size)
    if settings.updates is None:
        return settings.epochs, settings.epochs * passes
    return math.ceil(settings.updates / passes), settings.updates


@dataclass
class TrainState:
    """The progress of a run. `batch` counts batches of the current epoch, `step` those of all epochs, including skipped ones.

    `skipped_before`: skipped updates of earlier epochs.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    skipped_before: int = 0
    seconds: float = 0.0
    error: float = math.nan
    best_error: float = math.inf
    best_epoch: int = 0


class Learner:
    """A policy in training, with its optimizer, its progress, and the weights with the least validation error.

    `policy` is the trained network. `acting` is the policy that is validated and evaluated: the given one, or with `ema` a copy
    with the EMA weights. `epochs` is the length of the run, for the learning rate schedule. `distributed`: the processes that
    train the same policy. `recorder`: see `Captured`.
    """

    def __init__(
        self,
        policy: NormalizedPolicy,
        settings: PolicyConfig,
        epochs: int | None = None,
        distributed: Distributed | None = None,
        *,
        recorder: Recorder | None = None,
    ):
        self._learning, self.policy, self.distributed = policy, policy.policy, distributed or Distributed.alone()
        self.settings = settings
        self.epochs = settings.epochs if epochs is None else epochs
        self.acting = policy
        if settings.ema:
            self.acting = NormalizedPolicy(copy.deepcopy(self.policy).requires_grad_(False), policy.base)
        self.optimizer = make_optimizer(self.policy.parameters(), settings)
        self.train_state, self.averages = TrainState(), Averages()
        self._guard = Guard(self.optimizer, settings.clip_norm or math.inf)
        self._recorder, self._recorded, self._unchecked = recorder, (None, None), 0
        self._metrics: Scalars = {}
        self._of_epoch: tuple[int, list[int]] = (-1, [])
        self.best: State | None = None

    @property
    def skipped(self) -> int:
        """The number of updates that were skipped because of NaN or Inf. Reads from the device."""
        return self._guard.skipped

    def update(self, batch: Window, generator: torch.Generator) -> None:
        """Run one update: loss → backward → guard → clip → step → EMA. It is skipped if the loss or the gradient is not finite.

        With several processes, each computes the loss of its own rows of `batch`, and all take the same step. On a CUDA device
        it is replayed as one CUDA graph (`Captured`), if the optimizer is fused. Raises NonFiniteError, naming the parameters,
        after `MAX_SKIPS` consecutive skipped updates: on a GPU at the next check, at most `MAX_SKIPS` updates later.
        """
        started = time.perf_counter()
        train_state = self.train_state
        if not self.policy.training:
            self.policy.train()
        lr, share, chosen = self.settings.lr * self._lr_share(), self._ema_share(), self._trained_parameters()
        own, part = self.distributed.share(batch)
        if self._records(generator.device):
            numbers, skip = self._replay(generator, own, lr, share, chosen)
        else:
            numbers, skip = self._run(own, generator, lr, share, chosen, part)
        train_state.step += 1
        train_state.batch += 1
        self._metrics = numbers
        self.averages.add(numbers, skip)
        self._unchecked += 1
        if self._unchecked >= MAX_SKIPS or (skip is not None and skip.device.type == "cpu"):
            self._check()
        train_state.seconds += time.perf_counter() - started

    def close_epoch(self) -> Metrics:
        """Finish the epoch and return the means over its updates, to log. Raises NonFiniteError; see `update`."""
        started = time.perf_counter()
        train_state = self.train_state
        self._check()
        means = {"loss": math.nan, **self.averages.read()}
        if means.get("non_finite") == 0.0:
            del means["non_finite"]
        skipped = self.skipped - train_state.skipped_before
        train_state.epoch, train_state.batch, train_state.skipped_before = train_state.epoch + 1, 0, self.skipped
        train_state.seconds += time.perf_counter() - started
        named = {f"train/{name}": mean for name, mean in means.items()}
        return {"epoch": float(train_state.epoch), **named, "train/skipped": float(skipped)}

    def validate(self, demos: Dataset, generator: torch.Generator) -> Metrics:
        """Compute the mean squared error of the executed actions against the expert's. Stores the weights if it is the least so far."""
        train_state = self.train_state
        train_state.error = validation_error(self.acting, demos, generator)
        if train_state.error < train_state.best_error:
            train_state.best_error, train_state.best_epoch = train_state.error, train_state.epoch
            self.best = _copy(self.acting.policy)
        return {"validation/error": train_state.error}

    def state(self) -> State:
        """Return the complete training state, for a checkpoint."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self._guard.state_dict(),
            "averages": self.averages.state(),
            "average": self.acting.policy.state_dict() if self.settings.ema else None,
            "best": self.best,
            "train_state": asdict(self.train_state),
        }

    def load(self, state: State) -> None:
        """Restore a saved state. Raises CheckpointError if it belongs to another policy or has an older layout."""
        try:
            self.policy.load_state_dict(state["policy"])
            self._guard.load_state_dict(state["optimizer"])
            self.averages.load(state["averages"])
            self._recorded, self._of_epoch = (None, None), (-1, [])  # a recording has the tensors of before
            if self.settings.ema:
                self.acting.policy.load_state_dict(state["average"])
            self.best, self.train_state = state["best"], TrainState(**state["train_state"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint does not match this policy: {error}. Fix: choose another run directory"
            ) from error

    def _run(
        self,
        batch: Window,
        generator: torch.Generator,
        lr: Scalar | float,
        share: Scalar | float,
        chosen: Sequence[int],
        part: float = 1.0,
    ) -> tuple[Scalars, Scalar | None]:
        """Run one update of the `chosen` parameters, by number. Returns what is logged, and whether the update was skipped; see `Guard.skip`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        loss, metrics = self._learning.loss(batch, generator=generator)
        if not loss.requires_grad:
            raise ObjectiveError(
                f"step {self.train_state.step}: the loss of {self.policy.name!r} depends on no parameter. "
                "Fix: look for detach() or no_grad() in `loss`"
            )
        trained = [self._guard.parameters[number] for number in chosen]  # the optimizer leaves the others as they are
        if trained:
            torch.autograd.backward(loss, inputs=trained)
        loss, metrics = self.distributed.average(trained, loss, metrics, part)
        norm = self._guard.apply(loss)
        self._average(share)
        return {**metrics, "loss": loss.detach(), "grad_norm": norm}, self._guard.skip

    def _records(self, device: torch.device) -> bool:
        """Whether updates are replayed from a recording."""
        alone = self.distributed.count == 1
        return alone and (self._recorder is not None or (device.type == "cuda" and not self._guard.waits(device)))

    def _replay(
        self, generator: torch.Generator, batch: Window, lr: float, share: float, chosen: Sequence[int]
    ) -> tuple[Scalars, Scalar | None]:
        """`_run`, recorded. What changes from update to update is in tensors."""

        def run(obs, actions, index, base, lr, share, chosen):
            return self._run(Window(obs, actions, index, base), generator, lr, share, chosen)

        known, captured = self._recorded
        if captured is None or known is not generator:
            captured = Captured(run, generators=[generator], changing=self._changing, recorder=self._recorder)
            self._recorded = generator, captured
        numbers = [torch.full((), value, device=generator.device) for value in (lr, share)]
        found = captured(batch.obs, batch.actions, batch.index, batch.base, *numbers, tuple(chosen))
        for group in self.optimizer.param_groups:
            group["lr"] = lr  # as a number again, for checkpoints
        return found

    def _changing(self) -> list[Tensor]:
        """Every tensor that an update changes in place."""
        averaged = self.acting.policy.state_dict().values() if self.settings.ema else ()
        return [*self._guard.changing_state(), *self.policy.buffers(), *averaged]

    def _check(self) -> None:
        """Raise NonFiniteError if too many consecutive updates were skipped."""
        self._unchecked = 0
        if self._guard.failed:
            raise NonFiniteError(self._blame())

    def _average(self, share: Scalar | float) -> None:
        """Move the EMA weights by this share of the way to the current ones, and copy the buffers, unless the update was skipped."""
        if not self.settings.ema:
            return
        averaged, skip = self.acting.policy, self._guard.skip
        soft_update(averaged.parameters(), self.policy.parameters(), share if skip is None else share * (1.0 - skip))
        for old, buffer in zip(averaged.buffers(), self.policy.buffers(), strict=True):
            old.copy_(buffer if skip is None else buffer.where(skip == 0, old))

    def _ema_share(self) -> float:
        """Return the share of the current weights in the next average of the EMA weights."""
        return 1.0 - min(self.settings.ema or 0.0, 1.0 - (2.0 + self.train_state.step) ** -0.75)

    def _lr_share(self) -> float:
        """Return the factor of the schedule on the learning rate: warm-up by updates, cosine by epochs or by updates."""
        rising = min(1.0, (self.train_state.step + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        if self.settings.lr_schedule == "constant":
            return rising
        updates = self.settings.updates
        passed = self.train_state.epoch / self.epochs if updates is None else self.train_state.step / updates
        return rising * 0.5 * (1.0 + math.cos(math.pi * passed))

    def _trained_parameters(self) -> list[int]:
        """Return the numbers of the parameters that are trained in this epoch."""
        epoch, chosen = self._of_epoch
        if epoch != self.train_state.epoch:
            trained = {id(p) for p in self.policy.trainable(self.train_state.epoch)}
            chosen = [number for number, p in enumerate(self._guard.parameters) if id(p) in trained and p.requires_grad]
            self._of_epoch = self.train_state.epoch, chosen
        return chosen

    def _blame(self) -> str:
        names = [name for name, _ in self.policy.named_parameters()]
        metrics = [n for n, v in self._metrics.items() if n not in ("loss", "grad_norm") and not math.isfinite(v)]
        weights = [n for n, p in self.policy.named_parameters() if not p.isfinite().all()]
        gradients = [names[number] for number in self._guard.broken()]
        found = [
            f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for what, names in (("weights of", weights), ("gradients of", gradients), ("metrics", metrics))
            if names
        ]
        return (
            f"epoch {self.train_state.epoch + 1}, step {self.train_state.step}: NaN or Inf in {MAX_SKIPS} updates in a row (loss "
            f"{float(self._metrics['loss']):g}); not finite: {'; '.join(found) or 'the norm of the gradient'}. The weights are those of "
            "the last finite update. Fix: lower --lr, set --clip-norm, or check the inputs of that network"
        )


def validation_error(policy: NormalizedPolicy, demos: Dataset, generator: torch.Generator) -> float:
    """Return the mean of (policy's action − expert's)² over rows, executed steps and dimensions, on the device of the generator."""
    policy.policy.eval()
    total, count = 0.0, 0
    for batch in demos.in_order():
        plans = policy.act(to_device(batch.obs, generator.device), generator=generator).detach().cpu()
        away = (plans.double() - batch.actions.cpu().double())[:, policy.spec.present]
        total, count = total + away.square().sum().item(), count + away.numel()
    return total / count


def _copy(module: nn.Module) -> State:
    """Copy a module's state to the CPU, without shared memory."""
    return {name: v.detach().cpu().clone() if isinstance(v, Tensor) else v for name, v in module.state_dict().items()}


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

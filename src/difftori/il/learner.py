"""The training loop of imitation: epochs, guarded updates, and the complete training state, for an exact resume."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn

from difftori.errors import CheckpointError, ConfigError, NonFiniteError, ObjectiveError
from difftori.il.distributed import Distributed
from difftori.interfaces import Dataset, PolicyConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.runs.checkpoint import State
from difftori.runs.run import seeded
from difftori.types import Metrics, Scalars, Window, to_device

MAX_SKIPS = 10
"""Training stops after this number of consecutive updates that were skipped because of NaN or Inf."""


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
    """The progress of a run. `batch` counts batches of the current epoch, `step` those of all epochs, including skipped ones."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    skipped: int = 0
    consecutive_skips: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    error: float = math.nan
    best_error: float = math.inf
    best_epoch: int = 0


class Learner:
    """A policy in training, with its optimizer, its progress, and the weights with the least validation error.

    `policy` is the trained network. `acting` is the policy that is validated and evaluated: the given one, or with `ema` a copy
    with the EMA weights. `epochs` is the length of the run, for the learning rate schedule. `distributed`: the processes that
    train the same policy.
    """

    def __init__(
        self,
        policy: NormalizedPolicy,
        settings: PolicyConfig,
        epochs: int | None = None,
        distributed: Distributed | None = None,
    ):
        self._learning, self.policy, self.distributed = policy, policy.policy, distributed or Distributed.alone()
        self.settings, self.clip_norm = settings, settings.clip_norm
        self.epochs = settings.epochs if epochs is None else epochs
        self.acting = policy
        if settings.ema:
            self.acting = NormalizedPolicy(copy.deepcopy(self.policy).requires_grad_(False), policy.base)
        self.optimizer = make_optimizer(self.policy.parameters(), settings)
        self.train_state = TrainState()
        self._of_epoch: tuple[int, list[Tensor], Sequence[Tensor]] = (-1, [], [])
        self.best: State | None = None

    def update(self, batch: Window, generator: torch.Generator) -> None:
        """Run one update: loss → backward → guard → clip → step. It is skipped if the loss or the gradient is not finite.

        With several processes, each computes the loss of its own rows of `batch`, and all take the same step. Raises
        NonFiniteError, naming the parameters, after `MAX_SKIPS` consecutive skipped updates.
        """
        started = time.perf_counter()
        train_state = self.train_state
        if not self.policy.training:
            self.policy.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._lr_share()
        self.optimizer.zero_grad(set_to_none=True)
        own, part = self.distributed.share(batch)
        loss, metrics = self._learning.loss(own, generator=generator)
        if not loss.requires_grad:
            raise ObjectiveError(
                f"step {train_state.step}: the loss of {self.policy.name!r} depends on no parameter. "
                "Fix: look for detach() or no_grad() in `loss`"
            )
        loss.backward()
        trained = self._trained_parameters()
        loss, metrics = self.distributed.average(trained, loss, metrics, part)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        train_state.step += 1
        train_state.batch += 1
        numbers = _read({**metrics, "loss": loss, "grad_norm": norm})
        if math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"]):
            if self.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(trained, self.clip_norm, norm)
            self.optimizer.step()
            self._average()
            train_state.consecutive_skips = 0
            for name, value in {**numbers, "updates": 1.0}.items():
                train_state.sums[name] = train_state.sums.get(name, 0.0) + value
        else:
            train_state.skipped += 1
            train_state.consecutive_skips += 1
            if train_state.consecutive_skips >= MAX_SKIPS:
                raise NonFiniteError(self._blame(numbers))
        train_state.seconds += time.perf_counter() - started

    def close_epoch(self) -> Metrics:
        """Finish the epoch and return the means over its updates, to log."""
        train_state = self.train_state
        done = train_state.sums.pop("updates", 0.0)
        means = (
            {f"train/{name}": total / done for name, total in train_state.sums.items()}
            if done
            else {"train/loss": math.nan}
        )
        skipped = train_state.batch - done
        train_state.epoch, train_state.batch, train_state.sums = train_state.epoch + 1, 0, {}
        return {"epoch": float(train_state.epoch), **means, "train/skipped": skipped}

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
        optimizer = self.optimizer.state_dict()
        return {
            "policy": self.policy.state_dict(),
            "optimizer": optimizer,
            "average": self.acting.policy.state_dict() if self.settings.ema else None,
            "best": self.best,
            "train_state": asdict(self.train_state),
        }

    def load(self, state: State) -> None:
        """Restore a saved state. Raises CheckpointError if it belongs to another policy or has an older layout."""
        try:
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.settings.ema:
                self.acting.policy.load_state_dict(state["average"])
            self.best, self.train_state = state["best"], TrainState(**state["train_state"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint does not match this policy: {error}. Fix: choose another run directory"
            ) from error

    def _average(self) -> None:
        """Update the EMA weights; buffers are copied."""
        if not self.settings.ema:
            return
        updates = self.train_state.step - self.train_state.skipped
        share = 1.0 - min(self.settings.ema, 1.0 - (1.0 + updates) ** -0.75)
        current = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, parameter in self.acting.policy.named_parameters():
                parameter.lerp_(current[name], share)
            for averaged, buffer in zip(self.acting.policy.buffers(), self.policy.buffers(), strict=True):
                averaged.copy_(buffer)

    def _lr_share(self) -> float:
        """Return the factor of the schedule on the learning rate: warm-up by updates, cosine by epochs or by updates."""
        rising = min(1.0, (self.train_state.step + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        if self.settings.lr_schedule == "constant":
            return rising
        updates = self.settings.updates
        passed = self.train_state.epoch / self.epochs if updates is None else self.train_state.step / updates
        return rising * 0.5 * (1.0 + math.cos(math.pi * passed))

    def _trained_parameters(self) -> list[Tensor]:
        """Return the parameters trained in this epoch. The gradients of the others are removed, so that the optimizer skips them."""
        epoch, trained, others = self._of_epoch
        if epoch != self.train_state.epoch:
            trained = list(self.policy.trainable(self.train_state.epoch))
            ids = {id(p) for p in trained}
            others = [p for p in self.policy.parameters() if id(p) not in ids]
            self._of_epoch = self.train_state.epoch, trained, others
        for parameter in others:
            parameter.grad = None
        return trained

    def _blame(self, numbers: Metrics) -> str:
        weights = [n for n, p in self.policy.named_parameters() if not p.isfinite().all()]
        gradients = [n for n, p in self.policy.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        metrics = [n for n, v in numbers.items() if n not in ("loss", "grad_norm") and not math.isfinite(v)]
        found = [
            f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for what, names in (("weights of", weights), ("gradients of", gradients), ("metrics", metrics))
            if names
        ]
        return (
            f"epoch {self.train_state.epoch + 1}, step {self.train_state.step}: NaN or Inf in {MAX_SKIPS} updates in a row (loss "
            f"{numbers['loss']:g}); not finite: {'; '.join(found) or 'the norm of the gradient'}. The weights are those of "
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


def _read(numbers: Scalars) -> Metrics:
    """Read all numbers from the device in one transfer, for which a GPU waits."""
    values = torch.stack([torch.as_tensor(value).detach().double().reshape(()) for value in numbers.values()])
    return dict(zip(numbers, values.tolist(), strict=True))


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

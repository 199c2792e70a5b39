"""One guarded update of an imitation policy, and all that must be kept to repeat or resume it exactly."""

import copy
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from difftori.errors import CheckpointError, ConfigError, NonFiniteError, ObjectiveError
from difftori.il.distributed import Distributed
from difftori.interfaces import Dataset, PolicyConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.runs.checkpoint import State
from difftori.types import Metrics, Scalar, Window, to_device

MAX_SKIPS = 10
"""So many updates in a row may be passed over for NaN or Inf before training stops."""


def make_optimizer(parameters: Iterable[Tensor], settings: PolicyConfig) -> torch.optim.Optimizer:
    """The optimiser that a policy's settings name. Raises ConfigError for another name."""
    lr, decay, betas = settings.lr, settings.weight_decay, (settings.beta1, settings.beta2)
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, betas=betas)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, betas=betas)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, weight_decay=decay, alpha=settings.rmsprop_alpha)
    raise ConfigError([f"settings.optimizer: {settings.optimizer!r} is none of adam, adamw, rmsprop"])


def run_length(settings: PolicyConfig, examples: int) -> tuple[int, int]:
    """The epochs and the updates of a run over so many examples; with `updates`, the last epoch is cut short."""
    passes = math.ceil(examples / settings.batch_size)
    if settings.updates is None:
        return settings.epochs, settings.epochs * passes
    return math.ceil(settings.updates / passes), settings.updates


@dataclass
class TrainState:
    """Where a run stands. `batch` counts within the running epoch, `step` all batches ever, skipped ones too."""

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
    """A policy in training with its optimiser, its state in the run, and the weights with the least validation error.

    `policy` is the network that is trained. `acting` is what is validated and evaluated: the policy given, or with `ema`
    one with averaged weights. `epochs` is the length of the run, for the schedule. `distributed`: other processes that train the same policy.
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
        self.best: State | None = None

    def update(self, batch: Window, generator: torch.Generator) -> None:
        """One step: loss → backward → guard → clip → step. If loss or gradient is not finite, the weights stay as they are.

        Of several processes each computes the loss of its own rows of `batch`, and all take the same step. Raises NonFiniteError, naming the parameters, when that has happened `MAX_SKIPS` times in a row.
        """
        started = time.perf_counter()
        train_state = self.train_state
        self.policy.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._lr_share()
        self.optimizer.zero_grad(set_to_none=True)
        own, part = self.distributed.share(batch)
        loss, metrics = self._learning.loss(own, generator=generator)
        if not loss.requires_grad:
            raise ObjectiveError(
                f"step {train_state.step}: the loss of {self.policy.name!r} depends on no parameter; look for a detach"
            )
        loss.backward()
        trained = self._trained_parameters()
        loss, metrics = self.distributed.average(trained, loss, metrics, part)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        train_state.step += 1
        train_state.batch += 1
        if loss.isfinite() and norm.isfinite():
            if self.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(trained, self.clip_norm, norm)
            self.optimizer.step()
            self._average()
            train_state.consecutive_skips = 0
            for name, value in {**metrics, "loss": loss.item(), "grad_norm": norm.item(), "updates": 1.0}.items():
                train_state.sums[name] = train_state.sums.get(name, 0.0) + value
        else:
            train_state.skipped += 1
            train_state.consecutive_skips += 1
            if train_state.consecutive_skips >= MAX_SKIPS:
                raise NonFiniteError(self._blame(loss, metrics))
        train_state.seconds += time.perf_counter() - started

    def close_epoch(self) -> Metrics:
        """Count the epoch as done; the means over its updates, ready to log."""
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
        """Mean squared error of what the policy would execute against the expert; keeps the weights if it is the least yet."""
        train_state = self.train_state
        train_state.error = validation_error(self.acting, demos, generator)
        if train_state.error < train_state.best_error:
            train_state.best_error, train_state.best_epoch = train_state.error, train_state.epoch
            self.best = _copy(self.acting.policy)
        return {"validation/error": train_state.error}

    def state(self) -> State:
        """All of it, for a checkpoint."""
        optimizer = self.optimizer.state_dict()
        return {
            "policy": self.policy.state_dict(),
            "optimizer": optimizer,
            "average": self.acting.policy.state_dict() if self.settings.ema else None,
            "best": self.best,
            "train_state": asdict(self.train_state),
        }

    def load(self, state: State) -> None:
        """Put a saved state back. Raises CheckpointError if it is of another policy or an older layout."""
        try:
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.settings.ema:
                self.acting.policy.load_state_dict(state["average"])
            self.best, self.train_state = state["best"], TrainState(**state["train_state"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this policy: {error}; start in another directory"
            ) from error

    def _average(self) -> None:
        """Move the averaged weights towards those of this update; whatever else a policy keeps is copied."""
        if not self.settings.ema:
            return
        updates = self.train_state.step - self.train_state.skipped
        share = 1.0 - min(self.settings.ema, 1.0 - (1.0 + updates) ** -0.75)
        current = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, parameter in self.acting.policy.named_parameters():
                parameter.lerp_(current[name], share)
            for kept, buffer in zip(self.acting.policy.buffers(), self.policy.buffers(), strict=True):
                kept.copy_(buffer)

    def _lr_share(self) -> float:
        """The share of the learning rate that this epoch's, and at first this update's, place in the schedule leaves."""
        rising = min(1.0, (self.train_state.step + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        if self.settings.lr_schedule == "constant":
            return rising
        updates = self.settings.updates
        passed = self.train_state.epoch / self.epochs if updates is None else self.train_state.step / updates
        return rising * 0.5 * (1.0 + math.cos(math.pi * passed))

    def _trained_parameters(self) -> list[Tensor]:
        """The parameters trained in this epoch; the others lose their gradients, so that the optimiser passes by."""
        trained = list(self.policy.trainable(self.train_state.epoch))
        kept = {id(p) for p in trained}
        for parameter in self.policy.parameters():
            if id(parameter) not in kept:
                parameter.grad = None
        return trained

    def _blame(self, loss: Scalar, metrics: Metrics) -> str:
        weights = [n for n, p in self.policy.named_parameters() if not p.isfinite().all()]
        gradients = [n for n, p in self.policy.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        numbers = [n for n, value in metrics.items() if not math.isfinite(value)]
        found = [
            f"{what} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for what, names in (("weights of", weights), ("gradients of", gradients), ("metrics", numbers))
            if names
        ]
        return (
            f"epoch {self.train_state.epoch + 1}, step {self.train_state.step}: NaN or Inf in {MAX_SKIPS} updates in a row (loss "
            f"{loss.item():g}); not finite: {'; '.join(found) or 'the norm of the gradient'}. The weights are those of "
            "the last good update: lower lr, set clip_norm, or look at the data of that network"
        )


def validation_error(policy: NormalizedPolicy, demos: Dataset, generator: torch.Generator) -> float:
    """Mean over rows, executed steps and dimensions of (policy's action − expert's)²; device from the generator's."""
    policy.policy.eval()
    total, count = 0.0, 0
    for batch in demos.in_order():
        plans = policy.act(to_device(batch.obs, generator.device), generator=generator).detach().cpu()
        away = (plans.double() - batch.actions.cpu().double())[:, policy.spec.present]
        total, count = total + away.square().sum().item(), count + away.numel()
    return total / count


def _copy(module: nn.Module) -> State:
    """A module's state on the CPU, sharing nothing with it."""
    return {name: v.detach().cpu().clone() if isinstance(v, Tensor) else v for name, v in module.state_dict().items()}

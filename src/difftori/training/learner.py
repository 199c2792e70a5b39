"""One guarded update of an imitation policy, and all that must be kept to repeat or resume it exactly."""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from difftori.data.demos import Demos
from difftori.errors import CheckpointError, ConfigError, NonFiniteError, ObjectiveError
from difftori.interfaces import Policy, PolicyConfig
from difftori.training.checkpoint import State
from difftori.types import Chunk, Metrics, Scalar

MAX_SKIPS = 10
"""So many updates in a row may be passed over for NaN or Inf before training stops."""
_VALIDATION_ROWS = 1024


def make_optimizer(parameters: Iterable[Tensor], settings: PolicyConfig) -> torch.optim.Optimizer:
    """The optimiser that a policy's settings name. Raises ConfigError for another name."""
    lr, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr, weight_decay=decay)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    if settings.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=lr, weight_decay=decay, alpha=settings.rmsprop_alpha)
    raise ConfigError([f"settings.optimizer: {settings.optimizer!r} is none of adam, adamw, rmsprop"])


@dataclass
class Place:
    """Where a run stands. `batch` counts within the running epoch, `step` all batches ever, skipped ones too."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    skipped: int = 0
    in_a_row: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    error: float = math.nan
    best_error: float = math.inf
    best_epoch: int = 0


class Learner:
    """A policy in training with its optimiser, its place in the run, and the weights with the least validation error."""

    def __init__(self, policy: Policy, settings: PolicyConfig):
        self.policy = policy
        self.settings, self.clip_norm = settings, settings.clip_norm
        self.optimizer = make_optimizer(policy.parameters(), settings)
        self.place = Place()
        self.best: State | None = None

    def update(self, batch: Chunk, generator: torch.Generator) -> None:
        """One step: loss → backward → guard → clip → step. If loss or gradient is not finite, the weights stay as they are.

        Raises NonFiniteError, naming the parameters, when that has happened `MAX_SKIPS` times in a row.
        """
        started = time.perf_counter()
        place = self.place
        self.policy.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._lr_share()
        self.optimizer.zero_grad(set_to_none=True)
        loss, metrics = self.policy.loss(batch, generator=generator)
        if not loss.requires_grad:
            raise ObjectiveError(
                f"step {place.step}: the loss of {self.policy.name!r} depends on no parameter; look for a detach"
            )
        loss.backward()
        trained = self._trained_parameters()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        place.step += 1
        place.batch += 1
        if loss.isfinite() and norm.isfinite():
            if self.clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(trained, self.clip_norm, norm)
            self.optimizer.step()
            place.in_a_row = 0
            for name, value in {**metrics, "loss": loss.item(), "grad_norm": norm.item(), "updates": 1.0}.items():
                place.sums[name] = place.sums.get(name, 0.0) + value
        else:
            place.skipped += 1
            place.in_a_row += 1
            if place.in_a_row >= MAX_SKIPS:
                raise NonFiniteError(self._blame(loss, metrics))
        place.seconds += time.perf_counter() - started

    def close_epoch(self) -> Metrics:
        """Count the epoch as done; the means over its updates, ready to log."""
        place = self.place
        done = place.sums.pop("updates", 0.0)
        means = (
            {f"train/{name}": total / done for name, total in place.sums.items()} if done else {"train/loss": math.nan}
        )
        skipped = place.batch - done
        place.epoch, place.batch, place.sums = place.epoch + 1, 0, {}
        return {"epoch": float(place.epoch), **means, "train/skipped": skipped}

    def validate(self, demos: Demos, generator: torch.Generator) -> Metrics:
        """Mean squared error of the policy's H actions against the expert's; keeps the weights if it is the least yet."""
        place = self.place
        place.error = validation_error(self.policy, demos, generator)
        if place.error < place.best_error:
            place.best_error, place.best_epoch = place.error, place.epoch
            self.best = _copy(self.policy)
        return {"validation/error": place.error}

    def state(self) -> State:
        """All of it, for a checkpoint."""
        optimizer = self.optimizer.state_dict()
        return {
            "policy": self.policy.state_dict(),
            "optimizer": optimizer,
            "best": self.best,
            "place": asdict(self.place),
        }

    def load(self, state: State) -> None:
        """Put a saved state back. Raises CheckpointError if it is of another policy or an older layout."""
        try:
            self.policy.load_state_dict(state["policy"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.best, self.place = state["best"], Place(**state["place"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this policy: {error}; start in another directory"
            ) from error

    def _lr_share(self) -> float:
        """The share of the learning rate that this epoch's place in the schedule leaves."""
        if self.settings.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * self.place.epoch / self.settings.epochs))

    def _trained_parameters(self) -> list[Tensor]:
        """The parameters trained in this epoch; the others lose their gradients, so that the optimiser passes by."""
        trained = list(self.policy.trainable(self.place.epoch))
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
            f"epoch {self.place.epoch + 1}, step {self.place.step}: NaN or Inf in {MAX_SKIPS} updates in a row (loss "
            f"{loss.item():g}); not finite: {'; '.join(found) or 'the norm of the gradient'}. The weights are those of "
            "the last good update: lower lr, set clip_norm, or look at the data of that network"
        )


def validation_error(policy: Policy, demos: Demos, generator: torch.Generator) -> float:
    """Mean over rows, steps and dimensions of (policy's action − expert's)²; device from the generator's."""
    policy.eval()
    total = 0.0
    for obs, actions in zip(demos.obs.split(_VALIDATION_ROWS), demos.actions.split(_VALIDATION_ROWS), strict=True):
        plans = policy.act(obs.to(generator.device), generator=generator).detach().cpu()
        total += (plans.double() - actions.double()).square().sum().item()
    return total / demos.actions.numel()


def _copy(module: nn.Module) -> State:
    """A module's state on the CPU, sharing nothing with it."""
    return {name: v.detach().cpu().clone() if isinstance(v, Tensor) else v for name, v in module.state_dict().items()}

"""What policies share that start from another policy's actions: the frozen base, and what it would have done."""

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from difftori.data.normalize import Normalizer
from difftori.errors import ConfigError, NonFiniteError, ShapeError
from difftori.interfaces import Examples, Policy, PolicyConfig
from difftori.types import Plans, TaskSpec, Window, WindowObs, to_device


@runtime_checkable
class Base(Protocol):
    """What a refiner starts from: a trained policy, or anything of one's own that acts like one; see `FunctionBase`."""

    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """The H actions (B H A), in the task's own units, without a graph."""
        ...


class _Held:
    """Keeps a base, and stays the same in copies: averaged weights share the base with those that learn."""

    def __init__(self, base: Base | None):
        self.base = base

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        return self


@final
@dataclass(frozen=True)
class FunctionBase:
    """A function of one's own, observations (B O …) by name to actions (B H A), as a base."""

    function: Callable[[WindowObs], Plans]

    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """What the function returns. Draws nothing from `generator`."""
        with torch.no_grad():
            return self.function(obs).detach()


class RefinerConfig(PolicyConfig):
    """Settings that every refiner has."""

    base_samples: int = Field(8, ge=1)
    """How many times a base that draws is asked for its actions at each training window."""
    base_choice: Literal["drawn", "nearest"] = "nearest"
    """Which of these a training step starts from: any, or the one nearest to the expert's action. A draw tells nothing of which
    of several good ways the expert took, so that from any the best answer is their mean; from the nearest it keeps to the way."""


class Refiner(Policy, ABC):
    """A policy that starts from another's actions, built as `SomeRefiner(config, spec, base)`.

    The base is frozen: neither its parameters nor its state are this module's. `base` is None where a refiner can do
    without. In training the base's actions are looked up, once `prepare` has asked it for several of them per window.
    """

    NEEDS_BASE = True

    def __init__(self, config: RefinerConfig, spec: TaskSpec, base: Base | None = None):
        super().__init__(config, spec)
        if base is None and self.NEEDS_BASE:
            raise ConfigError([f"base: {self.name} refines another policy's actions; give --base RUN"])
        if isinstance(base, Policy) and _seen(base.spec) != _seen(spec):
            raise ConfigError(
                [f"base: it sees and returns {_seen(base.spec)}, the task gives {_seen(spec)}; leave out what differs"]
            )
        self.draws = self.STOCHASTIC or (base is not None and _draws(base))
        self._base = _Held(base)  # where torch does not look for modules
        self.base_samples, self.nearest = config.base_samples, config.base_choice == "nearest"
        self._prepared: Tensor | None = None
        self._seen_to_vary = True

    @property
    def base(self) -> Base:
        """What is refined."""
        assert self._base.base is not None
        return self._base.base

    @property
    def has_base(self) -> bool:
        """Whether there is one."""
        return self._base.base is not None

    def prepare(self, examples: Examples, *, at_most: int, generator: torch.Generator) -> None:
        """Ask the base what it would do at every window of the training set, `base_samples` times if it draws: `prepared` (N K H A).

        Where asking in every batch costs less, because training will see but `at_most` windows, nothing is prepared. Raises ShapeError if what it returns is not (B H A).
        """
        if not self.looks_up(examples, at_most=at_most):
            return
        count = self.base_samples if _draws(self.base) else 1
        parts = []
        for batch in examples.in_order():
            obs = to_device(batch.obs, generator.device)
            drawn = [self.base_act(obs, generator=generator).cpu() for _ in range(count)]
            parts.append(torch.stack(drawn, 1))
        self.prepared = torch.cat(parts)

    @property
    def prepared(self) -> Tensor | None:
        """What the base answered at each training window (N K H A), if it was asked beforehand."""
        return self._prepared

    @prepared.setter
    def prepared(self, answers: Tensor | None) -> None:
        self._prepared = answers
        if answers is not None:  # up to rounding, which differs from call to call on a GPU
            self._seen_to_vary = not torch.allclose(answers, answers[:, :1], rtol=1e-4, atol=1e-6)

    @property
    def base_varies(self) -> bool:
        """Whether the base answers the same question differently: known of policies, seen in what was prepared, else assumed."""
        if not self.has_base or isinstance(self.base, Policy) or self.prepared is None:
            return self.has_base and _draws(self.base)
        return self._seen_to_vary

    def looks_up(self, examples: Examples, *, at_most: int) -> bool:
        """Whether asking the base for all of a training set's windows costs less than in batches, `at_most` windows in all."""
        count = self.base_samples if _draws(self.base) else 1
        return count * len(examples) <= at_most * (count if self.nearest else 1)

    @torch.no_grad()
    def base_act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """What the base would do (B H A), in the type and on the device of the observations.

        Raises ShapeError if it is not (B H A), NonFiniteError for NaN or Inf.
        """
        like = next(values for values in obs.values())
        dtype = like.dtype if like.is_floating_point() else torch.float32
        plans = self.base.act(obs, generator=generator).to(like.device, dtype)
        wanted = (len(like), self.spec.horizon, self.spec.action_dim)
        if plans.shape != wanted:
            raise ShapeError(
                f"base: it returned {tuple(plans.shape)} for {len(like)} windows; it must be (B H A) = {wanted}, from the "
                "oldest observation on"
            )
        if not plans.isfinite().all():
            rows = (~plans.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"base: NaN or Inf in what it would do in rows {rows[:8]} of {len(like)}; mend the base"
            )
        return plans

    def base_plans(self, batch: Window, *, generator: torch.Generator) -> Plans:
        """The base's actions (B H A) that a training batch starts from, of the prepared samples or afresh."""
        if self.prepared is not None:
            draws = self.prepared[batch.index.cpu()]
        elif self.nearest and _draws(self.base):
            draws = torch.stack([self.base_act(batch.obs, generator=generator) for _ in range(self.base_samples)], 1)
        else:
            return self.base_act(batch.obs, generator=generator)
        draws = draws.to(batch.actions)
        if self.nearest:
            chosen = self._away(draws, batch.actions).argmin(1)
        else:
            chosen = torch.randint(draws.shape[1], (len(draws),), generator=generator, device=generator.device)
        return draws[torch.arange(len(draws), device=draws.device), chosen]

    def _away(self, draws: Tensor, actions: Plans) -> Tensor:
        """Squared distances (B K) of draws (B K H A) from the expert's actions that are executed, in units of the data's range."""
        units = Normalizer.of(self.spec).to(actions.device)
        gaps = units.normalize_actions(draws) - units.normalize_actions(actions.unsqueeze(1))
        return gaps[:, :, self.spec.present].square().sum((-2, -1))


def _draws(base: Base) -> bool:
    """Whether to expect something else at each call; of a base that is no policy nobody knows."""
    return base.draws if isinstance(base, Policy) else True


def _seen(spec: TaskSpec) -> str:
    """What a base and its refiner must have in common."""
    entries = ", ".join(f"{name} {entry.shape}" for name, entry in spec.obs.items())
    return f"{spec.observe} × ({entries}), {spec.horizon} × {spec.action_dim} actions"

"""A policy in the units of its task. Normalisation, the present step and the base policy are handled here only."""

import logging
import math
from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Protocol, TypeAlias, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from difftori.data.normalize import Affine, Normalizer, identity, min_max
from difftori.errors import BoxError, ConfigError, NonFiniteError, ShapeError
from difftori.interfaces import Policy
from difftori.policies.refiner import Refiner
from difftori.steering import Steering
from difftori.types import (
    AnyActions,
    AnyPartPlans,
    AnyPlans,
    Moments,
    PartPlans,
    Plans,
    Scalar,
    Scalars,
    TaskSpec,
    Window,
    WindowObs,
)

_RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001
_log = logging.getLogger(__name__)


@runtime_checkable
class BasePolicy(Protocol):
    """A base policy: a `NormalizedPolicy`, or your own object with this method."""

    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """Return the H actions (B H A) from the oldest observation on, in the task's units."""
        ...


Base: TypeAlias = BasePolicy | Callable[[WindowObs], Plans]
"""The base of a refiner: a policy, or a function from observations (B O …) by name to actions (B H A)."""


@final
class NormalizedPolicy:
    """A policy whose inputs and outputs are in the task's units, together with the frozen base policy of a refiner.

    `policy` gets observations and actions normalised by the training data (`Policy.NORMALIZES`) and, with
    `Policy.FROM_PRESENT`, the actions from the present step on. An action dimension that is constant in the training data stays
    constant, whatever a policy returns that gets normalised actions; where a refiner returns its base's actions, they are the base's. The base is stored only if the policy uses it, and is not part
    of the policy's parameters or state. It must be on the device of the policy.

    Raises BoxError if actions are normalised by a box that is not finite, and ConfigError for a base that is missing, not used,
    or of another task.
    """

    def __init__(self, policy: Policy, base: Base | None = None):
        self.policy, self.spec = policy, policy.spec
        self.base = checked_base(policy, base)
        device = next(policy.parameters()).device
        self.low, self.high = (torch.tensor(bound, device=device) for bound in (self.spec.low, self.spec.high))
        actions = min_max if policy.NORMALIZES == "all" else identity
        obs = identity if policy.NORMALIZES == "nothing" else min_max
        boxed = actions is min_max and self.spec.moments is None
        if boxed and not all(map(math.isfinite, (*self.spec.low, *self.spec.high))):
            raise BoxError(
                f"{policy.name} normalises actions by the box [{self.spec.low}, {self.spec.high}], which is not finite. "
                "Fix: give finite bounds, or the moments of the training data"
            )
        self.normalizer = Normalizer.of(self.spec, obs=obs, actions=actions).to(device)

    @property
    def base_stochastic(self) -> bool:
        """Whether the base is stochastic. Unknown for bases that are not a `NormalizedPolicy`, so assumed true."""
        return self.base.stochastic if isinstance(self.base, NormalizedPolicy) else self.base is not None

    @property
    def stochastic(self) -> bool:
        """Whether `act` is stochastic, because of the policy or of its base. A refiner trains on several samples of a stochastic base."""
        return self.policy.stochastic or self.base_stochastic

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the training loss of a batch in the task's units, and metrics to log, without a graph and on the device."""
        loss, metrics = self.policy.loss(self.normalized(batch), generator=generator)
        return loss, {name: torch.as_tensor(value, device=loss.device).detach() for name, value in metrics.items()}

    @torch.no_grad()
    def act(
        self,
        obs: WindowObs,
        *,
        generator: torch.Generator,
        checked: bool = True,
        steering: Steering | None = None,
    ) -> Plans:
        """Return the H actions (B H A) from the oldest observation on, in the task's units, inside the action box.

        The actions of a refiner replace those of its base. Actions that it returns unchanged equal the base's bit for bit.
        `checked`: whether the base's actions are checked for NaN, which reads their values; default: True.
        `steering`: a cost and constraints on the planned actions: added to the policy's objective, or its plan is projected.

        Raises ConfigError if the policy does not take the constraint of `steering`, BoxError if it is projected and the actions have no
        finite range, and NonFiniteError if the plan that is projected, or its cost, is NaN or Inf.
        """
        obs = self._own(obs)
        if steering is None:
            return self._plan(obs, generator, checked)[0]
        steering.check(self.policy)
        present = {name: values[:, -1] for name, values in obs.items()}
        if not steering.projects(self.policy):
            within = steering.within(partial(self._in_units_with_gradient, self.normalizer), present)
            return self._plan(obs, generator, checked, within)[0]
        scaling = self._range_of_actions()
        within = steering.within(partial(self._in_units_with_gradient, scaling), present)
        whole, planned = self._plan(obs, generator, checked)
        found = within.projected(scaling.normalize_actions(whole[:, planned]))
        whole[:, planned] = scaling.denormalize_actions(found).clamp(self.low, self.high)
        return whole

    def _plan(
        self, obs: WindowObs, generator: torch.Generator, checked: bool, steering: Steering | None = None
    ) -> tuple[Plans, slice]:
        """Return the H actions (B H A) in the task's units, and the part of them that the policy planned, from the present step on."""
        added = {} if steering is None else {"steering": steering}
        whole = None if self.base is None else self.base_actions(obs, generator=generator, checked=checked)
        inputs, base = self.inputs(obs, whole)
        if isinstance(self.policy, Refiner):
            actions = self.policy.act(inputs, base, generator=generator, **added)
        else:
            actions = self.policy.act(inputs, generator=generator, **added)
        first = self.spec.n_obs_steps - 1
        planned = slice(first, first + actions.shape[1] if self.policy.FROM_PRESENT else None)
        if whole is None or base is None:
            return self._whole(actions), planned
        whole = whole.clamp(self.low, self.high)
        unchanged = actions == base[:, : actions.shape[1]]
        whole[:, planned] = torch.where(unchanged, whole[:, planned], self._in_task_units(actions))
        return whole, planned

    def _own(self, obs: WindowObs) -> WindowObs:
        """Return the policy's observations in its own order, in which it concatenates their features. Raises ShapeError if one is missing or has another shape."""
        if missing := [name for name in self.spec.obs if name not in obs]:
            raise ShapeError(
                f"{self.policy.name}: the observations have {', '.join(obs) or 'nothing'}, but not {', '.join(missing)}. Fix: add them"
            )
        return {name: self._checked(name, torch.as_tensor(obs[name])) for name in self.spec.obs}

    def _checked(self, name: str, values: Tensor) -> Tensor:
        """Return the steps (B O …) of one observation in the policy's precision. Raises ShapeError for another shape."""
        wanted = (self.spec.n_obs_steps, *self.spec.obs[name].shape)
        found = list(values.shape[1:])
        if len(wanted) == len(found) == 3:  # a cloud, of any number of points
            found[1] = wanted[1]
        if tuple(found) != wanted:
            raise ShapeError(
                f"{self.policy.name}: {name} has shape {tuple(values.shape)}, not (B, {', '.join(map(str, wanted))}). Fix: give the last "
                f"{wanted[0]} observations of each row, or act step by step with difftori.load(policy)"
            )
        return values if values.dtype == torch.uint8 else values.to(self.low.dtype)

    def _range_of_actions(self) -> Normalizer:
        """Return the scaling of actions from their range in the training data, or from their box, to [−1, 1].

        A dimension that is constant in the data can be moved too, in its box. Raises BoxError if there are no training data, and the
        box is not finite.
        """

        def movable(moments: Moments) -> Affine:
            range_ = min_max(moments)
            low, high = self.low.cpu(), self.high.cpu()
            boxed = range_.constant & (high - low).isfinite() & (high > low)
            shift = torch.where(boxed, (low + high) / 2, range_.shift)
            return Affine(shift, torch.where(boxed, (high - low) / 2, range_.scale))

        scaling = Normalizer.of(self.spec, actions=movable).to(self.low.device)
        if self.spec.moments is None and not bool((self.high - self.low).isfinite().all()):
            raise BoxError(
                f"steering: the actions of {self.policy.name} have the box [{self.spec.low}, {self.spec.high}], which is not finite. "
                "Fix: give finite bounds"
            )
        return scaling

    def inputs(self, obs: WindowObs, base: Plans | None) -> tuple[WindowObs, PartPlans | None]:
        """Convert observations and the base's actions (B H A, or None) to the inputs of the policy at inference."""
        inputs = self.normalizer.normalize_obs(obs)
        return inputs, None if base is None else self._base_from_present(base)

    def base_actions(self, obs: WindowObs, *, generator: torch.Generator, checked: bool = True) -> Plans:
        """Return the base's actions (B H A) in the task's units, with the dtype and device of the observations, without a graph.

        Raises ShapeError if the base returns another shape, and, if `checked`, NonFiniteError for NaN or Inf.
        """
        assert self.base is not None
        like = next(iter(obs.values()))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        with torch.no_grad():
            if isinstance(self.base, NormalizedPolicy):
                own = self.base.act(obs, generator=generator, checked=checked)
            else:
                own = self.base.act(obs, generator=generator) if isinstance(self.base, BasePolicy) else self.base(obs)
        wanted = (like.shape[0], self.spec.horizon, self.spec.action_dim)
        plans = torch.from_numpy(np.ascontiguousarray(own)) if isinstance(own, np.ndarray) else own
        if not isinstance(plans, Tensor) or plans.shape != wanted:
            found = f"actions of shape {tuple(plans.shape)}" if isinstance(plans, Tensor) else f"a {type(own).__name__}"
            raise ShapeError(
                f"base: it returned {found} for {len(like)} windows. "
                f"Fix: return (B H A) = {wanted}, from the oldest observation on"
            )
        plans = plans.detach().to(like.device, dtype)
        if checked and not plans.isfinite().all():
            rows = (~plans.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"base: NaN or Inf in its actions in rows {rows[:8]} of {len(like)}. Fix: check the base policy"
            )
        return plans

    def normalized(self, batch: Window) -> Window:
        """Convert a batch to the inputs of the policy: normalised, the base's actions clamped to the box, from the present step on."""
        base = None if batch.base is None else self._base_from_present(batch.base)
        actions = self._from_present(self.normalizer.normalize_actions(batch.actions))
        return Window(self.normalizer.normalize_obs(batch.obs), actions, batch.index, base)

    def _base_from_present(self, base: AnyPlans) -> AnyPartPlans:
        return self._from_present(self.normalizer.normalize_actions(base.clamp(self.low, self.high)))

    def _from_present(self, actions: AnyPlans) -> AnyPartPlans:
        """Return the part of the actions (… H A) that the policy gets."""
        return actions[..., self.spec.n_obs_steps - 1 :, :] if self.policy.FROM_PRESENT else actions

    def _in_task_units(self, actions: AnyActions) -> AnyActions:
        return self.normalizer.denormalize_actions(actions).clamp(self.low, self.high)

    def _in_units_with_gradient(self, scaling: Normalizer, actions: AnyActions) -> AnyActions:
        """Convert normalised actions to the task's units, inside the box, with a gradient also where rounding leaves the box."""
        converted = scaling.denormalize_actions(actions)
        return converted + (converted.clamp(self.low, self.high) - converted).detach()

    def _whole(self, actions: PartPlans) -> Plans:
        """Return actions (B H A) in the task's units. Actions (B P A) from the present step on are padded by repeating the first and last."""
        actions = self._in_task_units(actions)
        if not self.policy.FROM_PRESENT:
            return actions
        before = self.spec.n_obs_steps - 1
        after = self.spec.horizon - before - actions.shape[1]
        return torch.cat((*[actions[:, :1]] * before, actions, *[actions[:, -1:]] * after), 1)


def checked_base(policy: Policy, base: Base | None) -> Base | None:
    """Return the base, or None if the policy does not use one. Raises ConfigError if base and policy do not match."""
    if not isinstance(policy, Refiner):
        if base is not None:
            raise ConfigError([f"base: {policy.name!r} does not use a base policy. Fix: remove --base"])
        return None
    if not policy.uses_base:
        return None
    if base is None:
        raise ConfigError(
            [f"base: missing; {policy.name} refines another policy's actions. Fix: give --base RUN{policy.OR_ELSE}"]
        )
    if isinstance(base, type) or (not callable(base) and not isinstance(base, NormalizedPolicy | BasePolicy)):
        raise ConfigError(
            [
                f"base: {base!r} is no policy. Fix: give a function of the observations, or an object with act(obs, *, generator); "
                "for a run, difftori.loading.open_model(RUN).component"
            ]
        )
    if isinstance(base, nn.Module) and not isinstance(base, BasePolicy) and _computes_nothing(base):
        raise ConfigError(
            [
                f"base: {type(base).__name__} has no forward. Fix: give a function of the observations, such as lambda obs: "
                "policy.select(obs), which returns the actions (B H A)"
            ]
        )
    if isinstance(base, nn.Module) and any(part.training for part in base.modules() if isinstance(part, _RANDOM)):
        _log.warning("base: its dropout or batch normalisation is in training mode. Fix: base.eval()")
    if not isinstance(base, NormalizedPolicy) and isinstance(base, BasePolicy) and not _takes_generator(base.act):
        raise ConfigError(
            [
                "base: its act has no argument `generator`. Fix: give an object with act(obs, *, generator), or a function of the "
                "observations; for a run, difftori.loading.open_model(RUN).component"
            ]
        )
    if isinstance(base, NormalizedPolicy) and described(base.spec) != described(policy.spec):
        raise ConfigError(
            [
                f"base: it has {described(base.spec)}, but the task has {described(policy.spec)}. Fix: remove the options that differ"
            ]
        )
    return base


def _computes_nothing(module: nn.Module) -> bool:
    """Whether calling the module only raises NotImplementedError. Compiled and traced ones have a forward of their own."""
    forward = getattr(module.forward, "__func__", None)
    return type(module).__call__ is nn.Module.__call__ and forward is nn.Module.forward


def _takes_generator(act: Callable[..., Plans]) -> bool:
    parameters = signature(act).parameters
    return "generator" in parameters or any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())


def described(spec: TaskSpec) -> str:
    """Describe the observations and actions that a base and its refiner, or a run and its data, must share."""
    entries = ", ".join(f"{name} {entry.shape} {entry.dtype}" for name, entry in spec.obs.items())
    return f"{spec.n_obs_steps} × ({entries}), {spec.horizon} × {spec.action_dim} actions"

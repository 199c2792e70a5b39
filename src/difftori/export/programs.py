"""What is exported: the function from observations to actions of a policy or an agent."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from difftori.errors import ExportError
from difftori.interfaces import Agent
from difftori.policies.normalized import NormalizedPolicy
from difftori.published import Published, innermost
from difftori.rl.evaluate import in_units
from difftori.types import EntrySpec, Plans, WindowObs

Tensors: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Program:
    """A function of named tensors, rows first, that is exported: its inputs, an example, and what a user must know."""

    name: str
    function: Callable[[Tensors, torch.Generator], Tensors]
    inputs: Mapping[str, EntrySpec]
    example: Callable[[int, torch.Generator], Tensors]
    about: dict[str, Any] = field(default_factory=dict)


def program_of(model: Published) -> Program:
    """The function of a model: of a policy, the actions that it executes next; of an agent, its next action and its plan."""
    if isinstance(model.component, NormalizedPolicy):
        return _policy_program(model.name, model.component)
    return _agent_program(model.name, model.component, model.agent_steps)


BASE_ACTIONS = "base_actions"
"""The input for the actions of a base that is the user's own code."""


class _BaseAsInput:
    """A base policy whose actions are given from outside."""

    actions: Tensor

    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:  # noqa: ARG002
        return self.actions


def _exportable(policy: NormalizedPolicy, given: _BaseAsInput) -> NormalizedPolicy:
    """Copy a policy and its bases for inference. A base that is the user's own code is replaced by `given`."""
    network = deepcopy(policy.policy).eval().requires_grad_(False)
    if policy.base is None:
        return NormalizedPolicy(network)
    return NormalizedPolicy(
        network, _exportable(policy.base, given) if isinstance(policy.base, NormalizedPolicy) else given
    )


def _policy_program(name: str, policy: NormalizedPolicy) -> Program:
    spec, given = policy.spec, _BaseAsInput()
    policy = _exportable(policy, given)
    inputs = {
        name: EntrySpec((spec.n_obs_steps, *entry.shape), entry.dtype, entry.moments)
        for name, entry in spec.obs.items()
    }
    external = innermost(policy).base is not None
    if external:
        if BASE_ACTIONS in inputs:
            raise ExportError(f"{name}: an observation has the name {BASE_ACTIONS!r}, that of an input. Fix: rename it")
        inputs[BASE_ACTIONS] = EntrySpec((spec.horizon, spec.action_dim), moments=spec.moments)

    def function(inputs: Tensors, generator: torch.Generator) -> Tensors:
        if external:
            given.actions = inputs[BASE_ACTIONS]
        plan = policy.act({name: inputs[name] for name in spec.obs}, generator=generator, checked=False)
        return {"actions": _or_nan(plan[:, spec.present], inputs)}

    about = {
        "policy": name,
        "use": "Give the last observations of each row, oldest first, in the units of the environment; repeat the first "
        "observation of an episode in place of earlier ones. Execute all actions, then ask again.",
        "low": list(spec.low),
        "high": list(spec.high),
    }
    if external:
        about["use"] += (
            f" `{BASE_ACTIONS}` are the actions of the base policy, from the oldest observation on, in the units of the environment."
        )
    return Program(name, function, inputs, lambda rows, g: _example(inputs, rows, g), about)


def _agent_program(name: str, agent: Agent, steps: int) -> Program:
    agent.requires_grad_(False).compiles = False
    spec = agent.spec
    lower, upper = torch.tensor(spec.low), torch.tensor(spec.high)
    with torch.no_grad():
        seen = _example(spec.obs, 2, torch.Generator())["state"]
        first = torch.ones(2, dtype=torch.bool)
        options: dict[str, Any] = {"step": steps, "explore": False}
        _, memory = agent.act(seen, None, first=first, generator=torch.Generator(), **options)
    kept = {f"last_{name}": EntrySpec(tuple(value.shape[1:])) for name, value in memory.items()}

    def function(inputs: Tensors, generator: torch.Generator) -> Tensors:
        before = {name.removeprefix("last_"): inputs[name] for name in kept}
        action, after = agent.act(
            inputs["state"], before or None, first=inputs["first"] > 0, generator=generator, **options
        )
        scaled = torch.maximum(torch.minimum(in_units(action, lower, upper), upper), lower)
        began = inputs["first"] > 0
        used = {name: value.where(~began.view(-1, *(1,) * (value.ndim - 1)), 0.0) for name, value in before.items()}
        scaled = _or_nan(scaled, {"state": inputs["state"], **used})
        return {"actions": scaled, **after}

    inputs = {**spec.obs, "first": EntrySpec(()), **kept}

    def example(rows: int, generator: torch.Generator) -> Tensors:
        made = _example({**spec.obs, **kept}, rows, generator)
        return {**made, "first": (torch.arange(rows) % 2).float()}

    about = {
        "agent": name,
        "use": "`state` is the observation of each row, images as three stacked frames. If there are `first` and `last_plan`: "
        "`first` is 1 for rows whose episode begins, otherwise 0; `last_plan` is the output `plan` of the step before, or zeros.",
        "action_repeat": spec.action_repeat,
        "low": list(spec.low),
        "high": list(spec.high),
    }
    return Program(name, function, inputs, example, about)


def _or_nan(actions: Tensor, inputs: Tensors) -> Tensor:
    """Return the actions (B …), NaN in rows with NaN or Inf in any input, which a solve that starts there would replace."""
    for values in inputs.values():
        if values.is_floating_point():
            actions = actions + (0.0 * values).flatten(1).sum(1).view(-1, *(1,) * (actions.ndim - 1))
    return actions


def _example(entries: Mapping[str, EntrySpec], rows: int, generator: torch.Generator) -> Tensors:
    """Random observations, within the range of the training data where that is known."""
    made: Tensors = {}
    for name, entry in entries.items():
        share = torch.rand((rows, *entry.shape), generator=generator)
        if entry.dtype == "uint8":
            made[name] = (256 * share).to(torch.uint8)
        elif entry.moments is None:
            made[name] = 2 * share - 1
        else:
            low, high = torch.tensor(entry.moments.low), torch.tensor(entry.moments.high)
            made[name] = low + share * (high - low)
    return made

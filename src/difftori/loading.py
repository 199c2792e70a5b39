"""`difftori.load(RUN)`: a trained policy or agent that acts in your own loop."""

from collections.abc import Callable, Collection, Mapping
from copy import copy
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from difftori.envs.base import rescaled
from difftori.errors import ConfigError, NonFiniteError, ShapeError
from difftori.hub import download, hub_name
from difftori.il.evaluate import seeded_actor
from difftori.il.weights import Which, default_weights, load_policy
from difftori.interfaces import Agent, Policy
from difftori.observations import Array, as_array, as_recorded
from difftori.policies.normalized import Base, NormalizedPolicy, checked_base
from difftori.published import (
    CARD,
    NEEDED,
    NotStored,
    Published,
    innermost,
    is_published,
    load_published,
    write_published,
)
from difftori.rl.evaluate import AgentInRows
from difftori.rl.weights import load_agent
from difftori.rollout import PolicyInRows
from difftori.runs.checkpoint import check_finite
from difftori.runs.records import read_config
from difftori.runs.run import seeded
from difftori.steering import PlanFunction, Steering
from difftori.trainers import trainer_of
from difftori.types import EntrySpec

_STATE = "state"


def load(
    run: str | Path | NormalizedPolicy,
    *,
    base: Base | None = None,
    which: Which | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_code: Collection[str] = (),
) -> "LoadedPolicy":
    """Load the policy or the agent of a run directory, of a published folder, or of the Hub (`hub:USER/NAME`), to act with it.

    `run` may also be a policy in memory, such as the result of `difftori.il.refine`, on its own device, without further arguments; its
    random numbers have seed 0. `base`: the policy that it refines, for a folder that `save` wrote without it.
    `which`: the weights of a policy, as in `difftori eval` (default: `last` for runs with demonstrations, otherwise `best`).
    `device`: where it computes (default: cpu); observations may be anywhere. For an unfinished run, the weights are those of its newest valid
    checkpoint. `revision`: branch, tag or commit on the Hub (default: its main branch).

    Loading a published folder executes nothing that it contains or names; a policy or agent that is defined outside this package
    is imported only if its module is in `trust_code`, such as `["my_pkg.my_policy"]`.

    Raises ConfigError if `run` is neither of these or names a module that is not trusted, or if `base` is missing or of no use,
    CheckpointError if its weights are missing or damaged or cannot be downloaded, NonFiniteError if they have NaN or Inf, and
    MissingExtraError without the extra `hub`.
    """
    if isinstance(run, NormalizedPolicy):
        model = in_memory(run, base=base, which=which, device=device, revision=revision, trust_code=trust_code)
        check_finite(model.tensors, "run: a policy in memory")
        return _in_closed_loop(model, str(next(run.policy.parameters()).device))
    device = "cpu" if device is None else device
    model = open_model(run, base=base, which=which, device=device, revision=revision, trust_code=trust_code)
    refiner = innermost(model.component) if isinstance(model.component, NormalizedPolicy) else None
    if refiner is not None and isinstance(refiner.base, NotStored):
        raise ConfigError(
            [
                f"base: {run} does not contain the policy that it refines. Fix: in Python, difftori.load({str(run)!r}, base=…)"
            ]
        )
    return _in_closed_loop(model, str(device))


def save(policy: NormalizedPolicy, folder: str | Path) -> None:
    """Write a policy in memory, such as the result of `difftori.il.refine`, to a folder that `load` and `difftori export` read.

    A base that is a function or an object of yours is not written: `load(folder, base=…)` takes it again. An earlier
    folder of `save` is replaced. Raises ConfigError for a folder with other files, also a published one with its card, and for what is
    no such policy, and CheckpointError if it cannot be written.
    """
    if not isinstance(policy, NormalizedPolicy):
        raise ConfigError(
            [
                f"policy: {type(policy).__name__} cannot be saved. Fix: give the result of refine; runs are kept by difftori publish"
            ]
        )
    if (Path(folder) / CARD).exists():
        raise ConfigError([f"{folder}: it contains {CARD}. Fix: give a new folder, or one that difftori.save wrote"])
    write_published(in_memory(policy), Path(folder), {})


def in_memory(policy: NormalizedPolicy, **choices: object) -> Published:
    """Describe a policy in memory as if it were loaded. Raises ConfigError for choices that only a run or a folder has."""
    if unused := [f"{name}: {value!r}" for name, value in choices.items() if value]:
        raise ConfigError([f"{unused[0]} was given, but a policy in memory has no such choice. Fix: remove it"])
    return Published(policy, seed=0, which="last")


def _insert_base(model: NormalizedPolicy | Agent, base: Base, run: str | Path) -> None:
    """Give a refiner the base that its folder does not contain. Raises ConfigError if the base does not fit or is of no use."""
    refiner = innermost(model) if isinstance(model, NormalizedPolicy) else None
    if refiner is None or not isinstance(refiner.base, NotStored):
        raise ConfigError([f"base: {run} contains all that it needs. Fix: remove it"])
    refiner.base = checked_base(refiner.policy, base)


def open_model(
    run: str | Path,
    *,
    base: Base | None = None,
    which: Which | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_code: Collection[str] = (),
) -> Published:
    """Load the networks of a run directory, of a published folder, or of the Hub. Arguments and errors: `load`, but `base` may be missing."""
    if not isinstance(run, str | Path):
        raise ConfigError(
            [f"run: a {type(run).__name__} is no path. Fix: give a folder, hub:USER/NAME, or the result of refine"]
        )
    if which not in (None, "best", "last"):
        raise ConfigError([f"which: {which!r} is unknown. Fix: choose 'best' or 'last'"])
    name, device = hub_name(run), str(device)
    if name is None and revision is not None:
        raise ConfigError([f"revision: {run} is a folder. Fix: remove it, or load from hub:USER/NAME"])
    folder = Path(run) if name is None else download(name, NEEDED, revision=revision)
    if name is not None or is_published(folder):
        model = load_published(folder, device=device, trust_code=trust_code)
        if which not in (None, model.which):
            raise ConfigError([f"which: {run} has the {model.which} weights only. Fix: remove it"])
        if base is not None:
            _insert_base(model.component, base, run)
        return model
    if base is not None:
        raise ConfigError([f"base: {run} contains all that it needs. Fix: remove it"])
    if trainer_of(read_config(folder)).key == "policy":
        policy, policy_config = load_policy(folder, which, device=device)
        return Published(policy, policy_config.seed, which or default_weights(policy_config))
    if which == "best":
        raise ConfigError(
            ["which: 'best' is not available, because an agent's run stores its last weights only. Fix: use 'last'"]
        )
    agent, agent_config, steps = load_agent(folder, device=device)
    return Published(agent, agent_config.seed, "last", steps)


def _in_closed_loop(model: Published, device: str) -> "LoadedPolicy":
    component = model.component
    if isinstance(component, NormalizedPolicy):
        spec = component.spec
        return LoadedPolicy(
            lambda: PolicyInRows(seeded_actor(component, seed=model.seed, device=device), spec),
            model.name,
            spec.obs,
            spec.low,
            spec.high,
            model=component.policy,
            scaled=False,
            n_obs_steps=spec.n_obs_steps,
            n_action_steps=spec.n_action_steps,
        )
    spec = component.spec
    return LoadedPolicy(
        lambda: AgentInRows(component, step=model.agent_steps, generator=seeded(model.seed, "evaluation", device)),
        model.name,
        spec.obs,
        spec.low,
        spec.high,
        model=component,
        scaled=True,
        flattened=spec.flattened or (),
        action_repeat=spec.action_repeat,
    )


@final
class LoadedPolicy:
    """A trained policy or agent in closed loop, in one environment or in several at once.

    `obs`: the observations of one step that it needs, by name; images are (height width channels) for policies, stacked frames
    with channels first for agents. An agent that was trained with N distractors needs N further numbers at the end of the state, or
    apart as `distractors`: those of `difftori.envs.distractors.Distractors`, or N zeros, their mean. `parts`: names and shapes of
    arrays that may be given in place of `state`, which concatenates them. `low` and `high`: bounds of the actions (A), in the
    environment's units. `action_repeat`: environment steps for which an agent's action is executed. `n_obs_steps`, `n_action_steps`:
    the observations that it reads, and the actions of a plan that it executes.
    Call `reset` when an episode begins. The history of observations, the rest of a predicted plan, and the warm start of a solve are
    kept inside. `make_act` returns a new actor without any of these.
    """

    def __init__(
        self,
        make_act: Callable[[], PolicyInRows | AgentInRows],
        name: str,
        obs: Mapping[str, EntrySpec],
        low: tuple[float, ...],
        high: tuple[float, ...],
        *,
        scaled: bool,
        model: Policy | Agent | None = None,
        flattened: tuple[tuple[str, tuple[int, ...]], ...] = (),
        n_obs_steps: int = 1,
        n_action_steps: int = 1,
        action_repeat: int = 1,
    ):
        self.name, self.obs, self.low, self.high = name, dict(obs), np.array(low), np.array(high)
        self.n_obs_steps, self.n_action_steps, self.parts = n_obs_steps, n_action_steps, dict(flattened)
        self.action_repeat = action_repeat
        self._make_act, self._act, self._model, self._scaled = make_act, make_act(), model, scaled
        self._first: np.ndarray | None = None
        self._frames: np.ndarray | None = None

    def fork(self) -> "LoadedPolicy":
        """Return a policy with the same weights, in shared memory, and with its own episodes and random numbers, as after `load`."""
        fork = copy(self)
        fork._act, fork._first, fork._frames = self._make_act(), None, None  # noqa: SLF001
        return fork

    def reset(self, rows: Array | None = None) -> None:
        """Begin new episodes: in all environments, or, of several, in those where the mask `rows` (B, booleans) is true.

        Raises ShapeError if it is no mask, or does not fit the rows of the last `act`.
        """
        if rows is None:
            self._first = None
            return
        mask = rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
        if mask.dtype != np.bool_:
            raise ShapeError(
                f"reset: rows has type {mask.dtype}. Fix: give a mask of booleans, one per row, not indices"
            )
        if self._first is None or mask.shape != self._first.shape:
            known = "no rows yet" if self._first is None else f"{len(self._first)} rows"
            raise ShapeError(
                f"reset: rows has shape {mask.shape}, but there are {known}. Fix: reset() begins all of them"
            )
        self._first = self._first | mask

    def act(
        self,
        obs: Array | Mapping[str, Array],
        *,
        cost: PlanFunction | None = None,
        weight: float = 1.0,
        constraint: PlanFunction | None = None,
        project: bool = False,
    ) -> Array:
        """Return the next action in the environment's units: (A) for one observation, (B A) for a batch of B environments.

        `obs`: a dictionary of arrays by name, of which unknown names are ignored, or one array if there is only one observation.
        Numbers of any type, images uint8 or floating-point in [0, 1] with channels first or last; an agent that learned from
        stacked frames also takes single frames. The action is a tensor on the device of the observation if that is a tensor,
        otherwise a numpy array.

        `cost`, `constraint`: steer the policy without training it again (docs/steering.md). `cost` is a differentiable
        function of the planned actions (B P A), from this step on and in the environment's units, to (B). `weight` times it is
        added to what a policy that plans minimises; a diffusion policy is guided in every denoising step; the finished plan of any
        other, and with `project` of every policy, is projected: changed as little as needed. `constraint`: (B P A) → (B m), kept ≤ 0; where no plan is found that does, a warning
        is logged. A second required argument of either is the present observations by name, (B …). A policy that executes
        several actions of a plan is steered where it plans: the B rows are then those that are due. Agents are projected in the next
        action only (P = 1).

        Raises ShapeError for other shapes, types and numbers of rows, NonFiniteError for NaN or Inf, and with `cost` or
        `constraint` ConfigError if the policy does not take it, ObjectiveError for another shape of their results, and BoxError
        for a projection of actions without a finite range.
        """
        steering = None
        if project and cost is None and constraint is None:
            raise ConfigError(["project: there is no cost and no constraint. Fix: give one, or remove project"])
        if constraint is not None or (cost is not None and weight != 0):
            steering = Steering(cost, weight, constraint, project)
            if self._model is None:
                given = "constraint" if cost is None else "cost"
                raise ConfigError([f"{given}: {self.name} does not take it. Fix: load a policy or agent of difftori"])
            steering.check(self._model)
        given = self._by_name(obs)
        arrays = {name: as_array(name, given[name]) for name in self.obs}
        batched = self._batched(arrays)
        if not batched:
            arrays = {name: values[None] for name, values in arrays.items()}
        counts = {len(values) for values in arrays.values()}
        rows = counts.pop()
        if counts or (self._first is not None and len(self._first) != rows):
            raise ShapeError(
                f"obs: {rows} rows, but others or earlier ones had more or fewer. Fix: reset() before that"
            )
        first = np.ones(rows, dtype=bool) if self._first is None else self._first
        parts = " and ".join(f"{name} {shape}" for name, shape in self.parts.items())
        inputs = {
            name: as_recorded(name, values, self.obs[name], stacked=self._scaled, parts=parts)
            for name, values in arrays.items()
        }
        frames = self._frames
        if self._scaled:
            inputs = frames = self._stacked(inputs[_STATE], first)
        active = np.ones(rows, dtype=bool)
        actions = self._act(inputs, first, active) if steering is None else self._act(inputs, first, active, steering)
        if self._scaled:
            actions = rescaled(actions, self.low, self.high).astype(np.float32)
        if not np.isfinite(actions).all():
            raise NonFiniteError(f"the action of {self.name} has NaN or Inf. Fix: check the range of obs")
        self._first, self._frames = np.zeros(rows, dtype=bool), frames  # an error changes nothing of what is kept
        chosen = actions if batched else actions[0]
        example = given[next(iter(self.obs))]
        return torch.from_numpy(chosen).to(example.device) if isinstance(example, Tensor) else chosen

    def _by_name(self, obs: Array | Mapping[str, Array]) -> Mapping[str, Array]:
        if not isinstance(obs, Mapping):
            if len(self.obs) > 1:
                raise ShapeError(
                    f"obs: {self.name} needs {', '.join(self.obs)}. Fix: give a dictionary with these names"
                )
            return {next(iter(self.obs)): obs}
        if self.parts and all(name in obs for name in self.parts):
            return {_STATE: self._flat(obs)}
        if missing := [name for name in self.obs if name not in obs]:
            raise ShapeError(
                f"obs: {', '.join(missing)} missing; given are {', '.join(obs) or 'none'}. Fix: add the missing ones"
            )
        return obs

    def _flat(self, obs: Mapping[str, Array]) -> Array:
        """Concatenate the arrays of a Dict observation, as the environment did in training, to (S) or (B S)."""
        parts = []
        for name, shape in self.parts.items():
            part = as_array(name, obs[name])
            rows = part.shape[: max(part.ndim - len(shape), 0)]
            if part.shape[len(rows) :] != shape:
                raise ShapeError(f"obs: {name} has shape {part.shape}, not {shape}. Fix: give that shape")
            parts.append(part.reshape(*rows, -1))
        if len({part.shape[:-1] for part in parts}) > 1:
            raise ShapeError(
                "obs: some arrays have a leading dimension of rows, others not, or another one. Fix: give all alike"
            )
        flat, example = np.concatenate(parts, -1), obs[next(iter(self.parts))]
        return torch.from_numpy(flat).to(example.device) if isinstance(example, Tensor) else flat

    def _batched(self, arrays: Mapping[str, np.ndarray]) -> bool:
        """Whether the observations have a leading dimension of rows."""
        extra = {name: values.ndim - len(self.obs[name].shape) for name, values in arrays.items()}
        if set(extra.values()) not in ({0}, {1}):
            shapes = ", ".join(
                f"{name} {arrays[name].shape}, not {self.obs[name].shape}"
                for name in arrays
                if extra[name] not in (0, 1)
            ) or ", ".join(f"{name} {arrays[name].shape}" for name in arrays)
            raise ShapeError(
                f"obs: {shapes}. Fix: give these shapes, or all of them with one leading dimension of rows"
            )
        return set(extra.values()) == {1}

    def _stacked(self, values: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Return the last frames (B C·count height width) with these single ones, if the agent needs stacked frames, otherwise the values."""
        wanted, given = self.obs[_STATE].shape, values.shape[1:]
        if given == wanted:
            return values
        count = wanted[0] // given[0]
        fresh = np.concatenate([values] * count, 1)
        last = fresh if self._frames is None or len(self._frames) != len(values) else self._frames
        frames = np.concatenate((last[:, given[0] :], values), 1)
        frames[first] = fresh[first]
        return frames

"""A published model: a folder with all that acting needs. Reading it executes nothing that the folder contains or names.

- `config.yaml`: the policy or agent, its settings and its task; a refiner's has its base's under `base`, or `external` where the
  base is the user's own code
- `model.safetensors`: all weights, those of a base with the prefix `base.`
- `SHA256SUMS`: the sha256 of each file except the card, for `sha256sum --check`
- `README.md` (the model card), `evaluation.json`, `data.json`, `versions.json`: the evidence, which `load_published` does not read
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

import difftori
from difftori.config import device_faults, read_yaml
from difftori.errors import CheckpointError, ConfigError, DifftoriError
from difftori.interfaces import Agent, Policy
from difftori.policies.normalized import Base, NormalizedPolicy
from difftori.registry import find_agent, find_agents, find_policies, find_policy
from difftori.runs.checkpoint import check_finite, digest, replace_file
from difftori.runs.records import MODEL, current_config
from difftori.types import EnvSpec, Plans, TaskSpec, WindowObs

CONFIG, WEIGHTS, SUMS, CARD = "config.yaml", MODEL, "SHA256SUMS", "README.md"
NEEDED = (CONFIG, WEIGHTS, SUMS)
"""The files that `load_published` reads."""
FILES = (*NEEDED, CARD, "evaluation.json", "data.json", "versions.json")
"""All files that a published folder may have."""
_FORMAT = 1
_EXTERNAL = "external"
_SHOWN = 3


@dataclass(frozen=True)
class Published:
    """A policy or an agent to publish, or read from a published folder.

    `seed`: that of its run, for the random numbers of acting. `which`: the weights of the run. `agent_steps`: of an agent's training.
    """

    component: NormalizedPolicy | Agent
    seed: int
    which: Literal["best", "last"]
    agent_steps: int = 0

    @property
    def network(self) -> Policy | Agent:
        """The policy without normalisation and base, or the agent."""
        return self.component if isinstance(self.component, Agent) else self.component.policy

    @property
    def name(self) -> str:
        """Name of the policy or agent, or `my_pkg.my_policy:MyPolicy`."""
        return reference(self.network)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, those of a base with the prefix `base.`."""
        return _weights(self.component)


class NotStored:
    """In place of a base policy that is the user's own code, which a published folder does not contain."""

    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:  # noqa: ARG002
        """Raise ConfigError."""
        raise ConfigError(
            [
                "base: the folder of this policy does not contain it. Fix: difftori.load(FOLDER, base=…) to act with it, "
                "difftori.loading.open_model(FOLDER, base=…).component to refine it"
            ]
        )


def innermost(policy: NormalizedPolicy) -> NormalizedPolicy:
    """Return the policy, or, of refiners on top of one another, the lowest: its base, if any, is not of this package."""
    return innermost(policy.base) if isinstance(policy.base, NormalizedPolicy) else policy


def is_published(folder: Path) -> bool:
    """Whether this folder is a published one, complete or not."""
    return any((folder / name).exists() for name in (WEIGHTS, SUMS))


def reference(network: Policy | Agent) -> str:
    """Return the name by which a policy or agent is found: its own, or `my_pkg.my_policy:MyPolicy`."""
    kind = type(network)
    known = find_agents() if isinstance(network, Agent) else find_policies()
    return kind.name if known.get(kind.name) is kind else f"{kind.__module__}:{kind.__qualname__}"


def weights_bytes(model: Published) -> bytes:
    """Return the content of `model.safetensors`."""
    from safetensors.torch import save

    return save({n: v.detach().cpu().contiguous().clone() for n, v in model.tensors.items()}, {"format": "pt"})


def write_published(model: Published, folder: Path, others: Mapping[str, bytes]) -> None:
    """Write a folder with this model and the `others` of `FILES`, then read it back and compare every bit.

    A published folder is replaced. Raises ConfigError for a folder with other files, and CheckpointError if it cannot be written.
    """
    tensors = model.tensors
    check_finite(tensors, str(folder))
    files = {WEIGHTS: weights_bytes(model), CONFIG: _text(_described(model)), **others}
    sums = "".join(f"{digest(content)}  {name}\n" for name, content in sorted(files.items()) if name != CARD)
    try:
        known = FILES if is_published(folder) else ()
        if strangers := sorted(p.name for p in folder.glob("*") if p.name not in known and not p.name.startswith(".")):
            raise ConfigError(
                [f"{folder}: it contains {', '.join(strangers[:5])}. Fix: give a new folder, or a published one"]
            )
        folder.mkdir(parents=True, exist_ok=True)
        # Interrupted, the folder is refused by `load_published`, without its sums, and is still a published one, with weights.
        for name in (SUMS, *(name for name in FILES if name not in (SUMS, WEIGHTS))):
            (folder / name).unlink(missing_ok=True)
        for name, content in {**files, SUMS: sums.encode()}.items():
            replace_file(folder / name, content)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error}). Fix: free space, or choose another folder"
        ) from error
    again = load_published(folder, trust_code=modules_of(model.component)).tensors
    if again.keys() != tensors.keys() or not all(torch.equal(_bits(again[n]), _bits(tensors[n])) for n in tensors):
        raise CheckpointError(f"{folder}: the weights read back differ from the run's. Fix: check the disk")


def load_published(folder: Path, *, device: str = "cpu", trust_code: Collection[str] = ()) -> Published:
    """Read a published policy or agent. `trust_code`: modules outside this package that its config may name; others are not imported.

    Raises CheckpointError for missing or damaged files and for weights that do not fit, and ConfigError for an invalid configuration,
    a module that is not in `trust_code`, or an unknown device.
    """
    if faults := device_faults(device):
        raise ConfigError(faults)
    files = _checked(folder)
    config = read_yaml(folder / CONFIG)
    if config.get("format") != _FORMAT:
        raise ConfigError(
            [
                f"{folder / CONFIG}: format {config.get('format')!r}, not {_FORMAT}. Fix: install the version of difftori that wrote it"
            ]
        )
    tensors = _tensors(files[WEIGHTS], folder / WEIGHTS)
    place = str(folder)
    try:
        seed, which, steps = int(config["seed"]), config["weights"], int(config.get("agent_steps", 0))
        if which not in ("best", "last"):
            raise ValueError(f"weights: {which!r}")
        if "agent" in config:
            spec = TypeAdapter(EnvSpec).validate_python(config["spec"])
            component: NormalizedPolicy | Agent = _agent(config, spec, _under("model.", tensors), place, trust_code)
            component = component.to(device).eval()
        else:
            component = _policy(config, tensors, place, device, trust_code)
    except (KeyError, TypeError, ValidationError, ValueError) as error:
        if isinstance(error, DifftoriError):
            raise
        raise ConfigError(
            [f"{folder / CONFIG}: does not describe a policy or agent ({_brief(error)}). Fix: restore a copy"]
        ) from error
    if unread := sorted(tensors.keys() - _weights(component).keys()):
        raise CheckpointError(f"{folder / WEIGHTS}: unknown weights {', '.join(unread[:_SHOWN])}. Fix: restore a copy")
    return Published(component, seed, which, steps)


def _described(model: Published) -> dict[str, Any]:
    """Return the content of `config.yaml`."""
    steps = {"agent_steps": model.agent_steps} if isinstance(model.component, Agent) else {}
    head = {"format": _FORMAT, "difftori": difftori.__version__, "seed": model.seed, "weights": model.which, **steps}
    return {**head, **_description(model.component)}


def _description(component: NormalizedPolicy | Agent) -> dict[str, Any]:
    """Return all that is needed to build a policy, with its base, or an agent, in plain values."""
    key = "agent" if isinstance(component, Agent) else "policy"
    network = component if isinstance(component, Agent) else component.policy
    settings = network.config.model_dump(mode="json")
    plain = {key: reference(network), "settings": settings, "spec": asdict(network.spec)}
    below = None if isinstance(component, Agent) else component.base
    if below is None:
        return plain
    return {**plain, "base": _description(below) if isinstance(below, NormalizedPolicy) else _EXTERNAL}


def _weights(component: NormalizedPolicy | Agent) -> dict[str, Tensor]:
    network = component if isinstance(component, Agent) else component.policy
    own = {f"model.{name}": value for name, value in network.state_dict().items()}
    if others := [name for name, value in own.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(
            f"{others[0]}: not a tensor, so it cannot be published. Fix: return a tensor from get_extra_state"
        )
    below = None if isinstance(component, Agent) else component.base
    stored = _weights(below) if isinstance(below, NormalizedPolicy) else {}
    return own | {f"base.{name}": value for name, value in stored.items()}


def modules_of(component: NormalizedPolicy | Agent) -> set[str]:
    """Return the modules outside this package that define a component and its bases."""
    network = component if isinstance(component, Agent) else component.policy
    below = None if isinstance(component, Agent) else component.base
    own = {type(network).__module__} if ":" in reference(network) else set()
    return own | modules_of(below) if isinstance(below, NormalizedPolicy) else own


def _checked(folder: Path) -> dict[str, bytes]:
    """Read the files that are needed, after a check of their sha256."""
    try:
        files = {name: (folder / name).read_bytes() for name in NEEDED}
        lines = [line.split(maxsplit=1) for line in files[SUMS].decode().splitlines()]
        sums = {name: hexadecimal for hexadecimal, name in lines}
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not a complete published folder ({error}). Fix: restore {', '.join(NEEDED)}"
        ) from error
    for name in (CONFIG, WEIGHTS):
        if sums.get(name) != digest(files[name]):
            raise CheckpointError(
                f"{folder / name}: damaged or changed, its sha256 is not the one in {SUMS}. Fix: restore a copy"
            )
    return files


def _tensors(content: bytes, place: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{place}: refused, because it is not a safetensors file ({_brief(error)}). Fix: restore a copy"
        ) from error


def _policy(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], place: str, device: str, trust_code: Collection[str]
) -> NormalizedPolicy:
    """Build a policy, with its base, from the content of `config.yaml` and its weights."""
    below = config.get("base")
    base: Base | None = NotStored() if below == _EXTERNAL else None
    if isinstance(below, Mapping):
        base = _policy(below, _under("base.", tensors), f"{place}, base", device, trust_code)
    kind = find_policy(_trusted(config["policy"], trust_code))
    settings = current_config(dict(config))["settings"]
    spec = TypeAdapter(TaskSpec).validate_python(config["spec"])
    policy = _built(kind, kind.Config.model_validate(settings), spec, _under("model.", tensors), place)
    return NormalizedPolicy(policy.to(device).eval(), base)


def _agent(
    config: Mapping[str, Any], spec: EnvSpec, weights: Mapping[str, Tensor], place: str, trust_code: Collection[str]
) -> Agent:
    kind = find_agent(_trusted(config["agent"], trust_code))
    settings = kind.Config.model_validate(current_config(dict(config))["settings"])
    return _built(kind, settings, spec, weights, place)


def _built(kind: type, settings: Any, spec: Any, weights: Mapping[str, Tensor], place: str) -> Any:
    """Build a network and load its weights. One whose weights do not fit is never allocated, however large the configuration says it is."""

    def build(device: str) -> Any:
        try:
            with torch.device(device):
                network = kind(settings, spec)
        except RuntimeError as error:  # torch's error for impossible sizes
            raise CheckpointError(
                f"{place}: {kind.name!r} cannot be built ({_brief(error)}). Fix: restore a copy"
            ) from error
        _check_fit(network, weights, place)
        return network

    if _is_ours(kind):
        build("meta")
    network = build("cpu")
    network.load_state_dict(dict(weights))
    check_finite(weights, place)
    return network


def _is_ours(kind: type) -> bool:
    """Whether a component is of this package. Others need not be able to be built without memory, and are trusted."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def _trusted(name: object, trust_code: Collection[str]) -> str:
    """Return a component's name. Raises ConfigError if it is in a module that the caller does not trust."""
    if not isinstance(name, str):
        raise ConfigError([f"{CONFIG}: {name!r} is not the name of a policy or agent. Fix: restore a copy"])
    module, colon, _ = name.partition(":")
    trusted = {trust_code} if isinstance(trust_code, str) else set(trust_code)
    if colon and module not in trusted:
        raise ConfigError(
            [
                f"{name!r} is code outside difftori, which a published model does not import. "
                f"Fix: install that module and, if you trust it, load with trust_code=[{module!r}], --trust-code {module} on the command line"
            ]
        )
    return name


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check_fit(network: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Raise CheckpointError, naming the weights that do not fit exactly."""
    built = network.state_dict()
    faults = [f"{name} is missing" for name in sorted(built.keys() - weights.keys())]
    faults += [f"{name} is unknown" for name in sorted(weights.keys() - built.keys())]
    faults += [
        f"{name} is {_shape(weights[name])}, not {_shape(built[name])}"
        for name in sorted(built.keys() & weights.keys())
        if not name.endswith("_extra_state") and _shape(weights[name]) != _shape(built[name])
    ]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(
            f"{place}: the weights do not fit the configuration: {'; '.join(faults[:_SHOWN])}{more}. "
            "Fix: load with the version of difftori in versions.json, or publish the run again"
        )


def _shape(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _bits(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _text(values: dict[str, Any]) -> bytes:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode()


def _brief(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:200]

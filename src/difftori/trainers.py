"""Imitation or reinforcement: what a command means, told from the component's name and the environment's."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from difftori.config import overlay
from difftori.errors import ConfigError
from difftori.registry import load, suggest
from difftori.types import Metrics


@dataclass(frozen=True)
class Kind:
    """A way to train: `component` is the key that names what is trained, "policy" or "agent".

    `config_type` of such a component by name, `parse` as `parse_config`, `train` and `evaluate` a run.
    """

    component: str
    config_type: Callable[[str], type[BaseModel]]
    parse: Callable[..., Any]
    train: Callable[..., Metrics]
    evaluate: Callable[..., Metrics]


def kind_of(values: Mapping[str, Any], name: str | None = None) -> Kind:
    """The kind of run that a configuration, or a component's name, means. ConfigError for a name that nobody knows."""
    if "agent" in values:
        return reinforcement()
    if "policy" in values:
        return imitation()
    if name is None:
        raise ConfigError([f"policy or agent: none given; write difftori train NAME{suggest('', known_names())}"])
    from difftori.agents import find_agents
    from difftori.policies import find_policies

    if ":" in name:
        from difftori.interfaces import Agent

        member = load(name)
        return reinforcement() if inspect.isclass(member) and issubclass(member, Agent) else imitation()
    is_policy, is_agent = name in find_policies(), name in find_agents()
    if not is_policy and not is_agent:
        raise ConfigError([f"{name!r} is neither a policy nor an agent{suggest(name, known_names())}"])
    return imitation() if is_policy else reinforcement()


def known_names() -> list[str]:
    """Every policy and agent by name."""
    from difftori.agents import find_agents
    from difftori.policies import find_policies

    return sorted({*find_policies(), *find_agents()})


def imitation() -> Kind:
    """Policies that learn from demonstrations."""
    from difftori.il.config import TrainConfig, parse_config
    from difftori.il.train import evaluate_run, train
    from difftori.registry import find_policy

    return Kind("policy", lambda name: TrainConfig[find_policy(name).Config], parse_config, train, evaluate_run)


def reinforcement() -> Kind:
    """Agents that learn from rewards."""
    from difftori.registry import find_agent
    from difftori.rl.config import RLConfig, parse_rl_config
    from difftori.rl.evaluate import evaluate_run
    from difftori.rl.train import train

    return Kind("agent", lambda name: RLConfig[find_agent(name).Config], parse_rl_config, train, evaluate_run)


def read_options(
    name: str | None, values: Mapping[str, Any], options: Mapping[str, list[str]], also: Iterable[str] = ()
) -> tuple[Kind, Any]:
    """The configuration of a component: plain values, such as a file's, and the words of options, which win.

    `also` names further options to suggest for a misspelt one. ConfigError with every fault there is.
    """
    env = {"env": options["env"][0]} if options.get("env") else {}
    kind = kind_of({**values, **env}, name)
    values = with_component(kind, name, values)
    return kind, kind.parse(overlay(values, options, base_config(kind, values[kind.component])), also=also)


def with_component(kind: Kind, name: str | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the component's name in its place."""
    return dict(values) if name is None else {**values, kind.component: name}


def base_config(kind: Kind, name: object) -> type[BaseModel]:
    """The configuration's type; that of an unknown component has only what all of them share."""
    from difftori.il.config import TrainConfig
    from difftori.interfaces import AgentConfig, PolicyConfig
    from difftori.rl.config import RLConfig

    try:
        return kind.config_type(str(name))
    except ConfigError:  # `parse` reports it, together with the other faults
        return TrainConfig[PolicyConfig] if kind.component == "policy" else RLConfig[AgentConfig]

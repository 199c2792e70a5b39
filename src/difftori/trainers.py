"""The two trainers, imitation and reinforcement learning. Creates the configuration of a run from a name and options."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from difftori.config import overlay
from difftori.errors import ConfigError, suggest
from difftori.registry import find_agent, find_agents, find_policies, find_policy, load
from difftori.runs.checkpoint import Checkpoints
from difftori.runs.records import flat, is_finished, read_config
from difftori.runs.run import extend
from difftori.types import Metrics

LENGTHS = ("steps", "updates", "epochs")
"""Options that extend a run: its length in environment steps, in updates, or in epochs."""


@dataclass(frozen=True)
class Trainer:
    """Trains and evaluates policies, or agents.

    `key` is the configuration key that names the component: "policy" or "agent". `find` returns the component's class by its
    name. `config_type` returns the configuration type of its runs (for None, the fields that all components share). `parse`
    returns a configuration from plain values and the component's class. `train` trains a run; `evaluate` evaluates an
    existing one.
    """

    key: Literal["policy", "agent"]
    find: Callable[[str], type]
    config_type: Callable[[Any], type[BaseModel]]
    parse: Callable[..., Any]
    train: Callable[..., Metrics]
    evaluate: Callable[..., Metrics]


def imitation() -> Trainer:
    """Return the trainer of policies, which learn from demonstrations."""
    from difftori.il.config import TrainConfig, parse_config
    from difftori.il.evaluate import evaluate_run
    from difftori.il.train import train
    from difftori.interfaces import Policy, PolicyConfig

    def config_type(policy: type[Policy] | None) -> type[BaseModel]:
        return TrainConfig[PolicyConfig if policy is None else policy.Config]

    return Trainer("policy", find_policy, config_type, parse_config, train, evaluate_run)


def reinforcement() -> Trainer:
    """Return the trainer of agents, which learn from rewards."""
    from difftori.interfaces import Agent, AgentConfig
    from difftori.rl.config import RLConfig, parse_rl_config
    from difftori.rl.evaluate import evaluate_run
    from difftori.rl.train import train

    def config_type(agent: type[Agent] | None) -> type[BaseModel]:
        return RLConfig[AgentConfig if agent is None else agent.Config]

    return Trainer("agent", find_agent, config_type, parse_rl_config, train, evaluate_run)


def trainer_of(config: Mapping[str, Any]) -> Trainer:
    """Return the trainer of a run's configuration. Raises ConfigError if it names neither a policy nor an agent."""
    if "agent" in config:
        return reinforcement()
    if "policy" in config:
        return imitation()
    raise ConfigError([f"policy or agent: none given. Fix: write difftori train NAME{suggest('', known_names())}"])


def trainer_for(name: str) -> Trainer:
    """Return the trainer of a policy or an agent by its name. Raises ConfigError if the name is unknown."""
    from difftori.interfaces import Agent

    if ":" in name:
        member = load(name)
        return reinforcement() if inspect.isclass(member) and issubclass(member, Agent) else imitation()
    if name in find_policies():
        return imitation()
    if name in find_agents():
        return reinforcement()
    raise ConfigError([f"{name!r} is neither a policy nor an agent{suggest(name, known_names())}"])


def known_names() -> list[str]:
    """Return the names of all policies and agents, sorted."""
    return sorted({*find_policies(), *find_agents()})


def read_options(
    name: str | None, values: Mapping[str, Any], options: Mapping[str, list[str]], also: Iterable[str] = ()
) -> tuple[Trainer, Any]:
    """Return the trainer and the configuration of a run. `options` override `values`, which come from a file, for instance.

    `name` is the policy or the agent; None reads it from `values`. `also` names further options to suggest for a misspelt one.
    Raises ConfigError, which lists every error.
    """
    trainer = trainer_of(values) if name is None else trainer_for(name)
    values = {**values, trainer.key: values.get(trainer.key) if name is None else name}
    component = None
    with contextlib.suppress(ConfigError):  # `parse` reports it, together with the other errors
        component = trainer.find(str(values[trainer.key]))
    return trainer, trainer.parse(overlay(values, options, trainer.config_type(component)), component, also=also)


def read_resumed(run: Path, options: Mapping[str, list[str]]) -> tuple[Trainer, Any]:
    """Return the trainer and the configuration of an existing run, extended if `options` has one of `LENGTHS`.

    `demos` may also be given: the place to which the run's demonstrations have moved. Raises ConfigError for other options, and
    if the run is shorter than before or cannot be extended.
    """
    if others := sorted(options.keys() - {*LENGTHS, "demos"}):
        raise ConfigError(
            [
                f"--{name}: not allowed with --resume, which reads the configuration from the run. "
                f"Fix: remove it; only {', '.join(f'--{length}' for length in LENGTHS)} may be given, to extend the run, and "
                "--demos, if the data have moved"
                for name in others
            ]
        )
    values = read_config(run)
    trainer = trainer_of(values)
    config = trainer.parse(values)
    if not options:
        return trainer, config
    longer = trainer.parse(overlay(values, options, trainer.config_type(trainer.find(str(values[trainer.key])))))
    before, after = (flat(each.model_dump(mode="json")) for each in (config, longer))
    faults, grows = [], False
    for name in (key for key in after if key.rpartition(".")[2] in set(LENGTHS) & options.keys()):
        option, new, old = f"--{name.rpartition('.')[2]}", after[name], before[name]
        if old is None:
            faults.append(
                f"{option}: the length of this run is not given in it. Fix: give another of {', '.join(LENGTHS)}"
            )
        elif new < old:
            faults.append(f"{option}: {new} is less than the run's {old}. Fix: give a larger number")
        else:
            grows |= new > old
    if grows and is_finished(run) and not Checkpoints(run / "checkpoints").steps():
        faults.append(f"{run}: its checkpoints were deleted, so it would begin again. Fix: train a new run")
    if trainer.key == "agent" and is_finished(run) and not (run / "episodes").is_dir():
        faults.append(
            f"{run}: its recorded episodes were deleted when it ended. Fix: train a new run, with --keep-episodes true"
        )
    if faults:
        raise ConfigError(faults)
    extend(run, longer)
    return trainer, longer

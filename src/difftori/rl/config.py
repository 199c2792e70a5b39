"""The configuration of a run of reinforcement learning."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from pydantic import BaseModel, ConfigDict, Field

from difftori.config import device_faults, validated
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import ResolvedEnv
from difftori.errors import ConfigError
from difftori.interfaces import Agent, AgentConfig
from difftori.registry import find_agent, resolve_env

SettingsT = TypeVar("SettingsT", bound=AgentConfig)


class RLConfig(BaseModel, Generic[SettingsT]):
    """Everything that determines the result of a run. `settings` are those of the agent."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    agent: Annotated[str, tyro.conf.Suppress]
    """An agent's name, or `my_pkg.my_agent:MyAgent`."""
    env: str = "dmc:cup-catch"
    """`dmc:domain-task`, `gym:ID`, `metaworld:task`, `pusht`, `probe:task`, or your own: `my_env:MyEnv`."""
    obs: Literal["state", "pixels"] = "state"
    """Observation type: `state`, or `pixels` (three stacked frames of 84 × 84)."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Seed of the initial weights, the episodes and all sampling."""
    steps: int = Field(100_000, ge=1)
    """Environment steps; one agent step takes `action_repeat` of them."""
    num_envs: int = Field(1, ge=1)
    """Environments that run in parallel, with one solve for all of them."""
    action_repeat: int | None = Field(None, ge=1)
    """Environment steps per agent step; default: the paper's for its 15 tasks, else 2."""
    render: Literal["default", "fast", "warp"] = "default"
    """Rendering of images. Only `default` is comparable with published results."""
    workers: Literal["sync", "async"] = "sync"
    """`sync`: environments in this process. `async`: one process for each."""
    eval_every: int = Field(20_000, ge=1)
    """Environment steps between evaluations."""
    eval_episodes: int = Field(10, ge=1)
    """Episodes of an evaluation, on seeds that training does not use."""
    save_every: int = Field(50_000, ge=1)
    """Environment steps between checkpoints; they are taken at the end of an episode."""
    capacity: int = Field(1_000_000, ge=1)
    """Agent steps that the replay buffer holds, at most those of the run."""
    storage: Literal["memory", "device", "mmap"] = "memory"
    """Where the replay buffer is stored: main memory, the device, or a memory-mapped file."""
    keep_episodes: bool = False
    """Keep the recorded episodes of a finished run; only an unfinished one needs them."""
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1`, …"""
    threads: int = Field(1, ge=1, le=1024)
    """Threads of torch on the CPU; results differ between thread counts."""
    compile: bool = False
    """Compile acting and updating with torch.compile. Takes minutes at the first start, seconds later. Results are equal up
    to rounding."""
    settings: Annotated[SettingsT, tyro.conf.arg(name="")]
    """The agent's own settings."""

    @cached_property
    def agent_type(self) -> type[Agent]:
        """The agent's class. Raises ConfigError if there is none of that name."""
        return find_agent(self.agent)

    @cached_property
    def environment(self) -> ResolvedEnv:
        """The environment family and task. Raises ConfigError if there is none of that name."""
        return resolve_env(self.env)

    def open_env(self, num_envs: int) -> CheckedVectorEnv:
        """`num_envs` copies of the environment, with the options that it has and those that differ from the defaults."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        requested: dict[str, Any] = {"obs": self.obs, "action_repeat": self.action_repeat, "render": self.render}
        known = self.environment.options
        options = {name: value for name, value in requested.items() if name in known or value != defaults[name]}
        return self.environment.make(num_envs=num_envs, seed=self.seed, workers=self.workers, **options)


def parse_rl_config(
    values: Mapping[str, Any], agent: type[Agent] | None = None, *, also: Iterable[str] = ()
) -> RLConfig:
    """A configuration from plain values, as YAML gives them, with its agent and environment resolved.

    `agent`: its class, where the caller has found it already. `also` names further options to suggest for a misspelt one. Raises ConfigError that lists every error.
    """
    faults: list[str] = []
    given = {"settings": {}, **values}
    if agent is None and isinstance(given.get("agent"), str):
        try:
            agent = find_agent(given["agent"])
        except ConfigError as error:
            faults += error.faults
    if agent is None:
        given["settings"] = {}  # without the agent its settings cannot be checked; the rest can
    config, found = validated(RLConfig[AgentConfig if agent is None else agent.Config], given, also)
    faults += found
    env: ResolvedEnv | None = None
    if isinstance(name := given.get("env", RLConfig.model_fields["env"].default), str):
        try:
            env = resolve_env(name)
        except ConfigError as error:
            faults += error.faults
    if isinstance(given.get("device"), str):
        faults += device_faults(given["device"])
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    vars(config).update(agent_type=agent, environment=env)
    return config

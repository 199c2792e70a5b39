"""The configuration of a reinforcement learning run."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from difftori.config import device_faults, resolved, validated
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.family import ResolvedEnv
from difftori.errors import ConfigError
from difftori.interfaces import Agent, AgentConfig
from difftori.registry import find_agent, resolve_env

SEPARATE = ("obs", "action_repeat", "render")
"""Options of an environment's builder that are options of the command line."""

SettingsT = TypeVar("SettingsT", bound=AgentConfig)


class RLConfig(BaseModel, Generic[SettingsT]):
    """All settings that determine the result of a run. `settings` are those of the agent."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    agent: str
    """Agent: a name, or `my_pkg.my_agent:MyAgent`."""
    env: str = "dmc:cup-catch"
    """Environment: `dmc:domain-task`, `gym:ID`, `metaworld:task`, `robomimic:task`, `pusht`, `probe:task`, or your own, `my_env:MyEnv`."""
    obs: Literal["state", "pixels"] = "state"
    """Observation type: `state`, or `pixels` (three stacked frames of 84 × 84)."""
    env_options: tuple[str, ...] = ()
    """Further options of the environment, as `NAME=VALUE`, such as `max_steps=500`."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Seed of the initial weights, the episodes and all sampling."""
    steps: int = Field(default=100_000, ge=1)
    """Length of the run in environment steps; one agent step takes `action_repeat` of them."""
    num_envs: int = Field(default=1, ge=1)
    """Number of environments that run in parallel, with one solve for all of them."""
    action_repeat: int | None = Field(default=None, ge=1)
    """Environment steps per agent step. Default: in DeepMind Control the paper's for its 15 tasks and 2 for the others; elsewhere 1."""
    max_episode_steps: int | None = Field(default=None, ge=1)
    """Truncate episodes after this number of environment steps. Default: the environment's own limit."""
    flatten_obs: bool = False
    """Make one vector of an environment's Dict observation."""
    distractors: int = Field(default=0, ge=0)
    """Numbers appended to every vector observation that say nothing about the task: autoregressive noise of variance 1, drawn anew in
    each episode. 0: none."""
    render: Literal["default", "fast", "warp"] = "default"
    """Rendering of images. Only results with `default` are comparable with published ones."""
    workers: Literal["sync", "async"] = "sync"
    """How environments run. `sync`: in this process. `async`: one process for each."""
    interleave: bool = False
    """Make the updates of each agent step during the next step, instead of all of an episode at its end. With `--workers async`,
    environments then step while the agent learns. It is another order of learning, so results differ."""
    eval_every: int = Field(default=20_000, ge=1)
    """Environment steps between evaluations."""
    eval_episodes: int = Field(default=10, ge=1)
    """Episodes per evaluation, on seeds that training does not use."""
    save_every: int = Field(default=50_000, ge=1)
    """Environment steps between checkpoints. Checkpoints are written at the end of an episode."""
    capacity: int = Field(default=1_000_000, ge=1)
    """Agent steps that the replay buffer holds, at most those of the run."""
    storage: Literal["auto", "memory", "device", "mmap"] = "auto"
    """Where the replay buffer is stored: main memory, the device, or a memory-mapped file. `auto`: a GPU with room for twice as
    much, otherwise main memory."""
    keep_episodes: bool | None = None
    """Keep the recorded episodes of a finished run, which are needed to extend it. Default: for `state`, not for `pixels`."""
    device: str = "cpu"
    """Device for the agent: `cpu`, `cuda`, `cuda:1`, …"""
    threads: int = Field(default=1, ge=1, le=1024)
    """Threads of torch on the CPU. Results differ between thread counts."""
    compile: bool = False
    """Compile acting and updates with torch.compile. The first start takes minutes, later ones seconds. Results are equal up
    to rounding."""
    settings: SettingsT
    """Settings of the agent."""

    @cached_property
    def agent_type(self) -> type[Agent]:
        """The class of the agent. Raises ConfigError if the name is unknown."""
        return find_agent(self.agent)

    @cached_property
    def environment(self) -> ResolvedEnv:
        """The environment family and task. Raises ConfigError if the name is unknown."""
        return resolve_env(self.env)

    def open_env(self, num_envs: int) -> CheckedVectorEnv:
        """Open `num_envs` copies of the environment, with those of its options that differ from the defaults."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        requested = {name: getattr(self, name) for name in SEPARATE}
        known = {*self.environment.options, "action_repeat"}
        options = {name: value for name, value in requested.items() if name in known or value != defaults[name]}
        return self.environment.make(
            num_envs=num_envs,
            seed=self.seed,
            workers=self.workers,
            flatten_obs=self.flatten_obs,
            max_episode_steps=self.max_episode_steps,
            distractors=self.distractors,
            **options,
            **self.environment.read_options(self.env_options, other=SEPARATE),
        )


def parse_rl_config(
    values: Mapping[str, Any], agent: type[Agent] | None = None, *, also: Iterable[str] = (), check_env: bool = True
) -> RLConfig:
    """Build a configuration from plain values, such as those of a YAML file, and resolve its agent and environment.

    `agent`: the agent's class, if already resolved. `also`: more options to suggest for a misspelt one. `check_env`: resolve the
    environment now, instead of where it is used; acting does not need it. Raises ConfigError that lists every error.
    """
    faults: list[str] = []
    given = {"settings": {}, **values}
    agent = agent or resolved(find_agent, given.get("agent"), faults)
    if agent is None:
        given["settings"] = {}  # unknown agent: its settings cannot be checked, but the others can
    config, found = validated(RLConfig[AgentConfig if agent is None else agent.Config], given, also)
    faults += found
    name = given.get("env", RLConfig.model_fields["env"].default)
    env = resolved(resolve_env, name, faults) if check_env else None
    if config is not None and env is not None:
        try:
            env.read_options(config.env_options, other=SEPARATE)
        except ConfigError as error:
            faults += error.faults
    if isinstance(given.get("device"), str):
        faults += device_faults(given["device"])
    if config is not None and config.distractors and config.obs == "pixels":
        faults.append("distractors: images take none. Fix: --obs state, or remove --distractors")
    if faults or config is None:
        raise ConfigError(list(dict.fromkeys(faults)))
    vars(config).update(agent_type=agent)
    if env is not None:
        vars(config).update(environment=env)
    return config

"""`--env-options`: they reach the environment's builder and the conversion of its demonstrations, in imitation and reinforcement learning."""

import numpy as np
import pytest

from difftori import cli
from difftori.data.formats import write_zarr
from difftori.data.trajectories import Trajectories
from difftori.errors import ConfigError
from difftori.il.config import inherited, parse_config
from difftori.il.evaluate import evaluate_run
from difftori.registry import resolve_env
from difftori.rl.config import parse_rl_config
from difftori.runs.records import read_config

SOURCE = """
import json
import gymnasium
import numpy as np
from gymnasium.spaces import Box

from difftori.envs.family import EnvFamily


class Line(gymnasium.Env):
    '''A point on a line, whose actions are moves, or places.'''

    observation_space = Box(-9, 9, (1,), np.float32)
    metadata = {"max_episode_steps": 3, "render_modes": []}

    def __init__(self, actions, size):
        self.action_space = Box(-size, size, (2 if actions == "places" else 1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(1, np.float32), 0.0, False, self.time >= 3, {"success": False}


def make(*, obs="state", actions="moves", size=1.0, count=2, fast=False, limit=None):
    return Line(actions, size)


def convert(stored, moves, *, obs, about, action_key, actions, size):
    assert (obs, about["robot"], action_key, size) == ("state", "arm", None, 2.0)
    return stored, np.concatenate([moves, moves], 1) if actions == "places" else moves


FAMILY = EnvFamily(make, recorded=lambda task: {"state": ("state",)}, from_recorded=convert)
"""


@pytest.fixture
def demos(tmp_path, monkeypatch):
    """A data set of the environment `line_env:FAMILY`, which can be imported."""
    (tmp_path / "line_env.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    numbers = np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
    path = tmp_path / "line.zarr"
    write_zarr(Trajectories.of({"state": numbers}, numbers, [10, 20]), path, about={"robot": "arm"})
    return str(path)


def test_options_reach_the_environment_and_the_conversion_and_are_inherited(demos, tmp_path):
    words = ["train", "bc", "--env", "line_env:FAMILY", "--demos", demos, "--env-options", "actions=places", "size=2"]
    short = ["--updates", "2", "--batch-size", "4", "--eval-episodes", "1", "--quiet"]
    assert cli.main([*words, *short, "--out", str(tmp_path / "run")]) == 0
    config = read_config(tmp_path / "run")
    assert config["env_options"] == ["actions=places", "size=2"]
    assert inherited(config)["env_options"] == ["actions=places", "size=2"]
    assert inherited(config)["eval_episodes"] == config["eval_episodes"] == 1
    refiner = parse_config({"policy": "residual", "base": str(tmp_path / "run")})
    assert refiner.env_options == ("actions=places", "size=2")
    assert evaluate_run(tmp_path / "run", episodes=1)["episodes"] == 1


def test_what_the_environment_computes_cannot_be_replaced_by_other_keys(demos):
    given = {"policy": "bc", "env": "line_env:FAMILY", "demos": demos, "env_options": ("size=2", "actions=places")}
    task = parse_config({**given, "obs_keys": ("state",)}).open_task()
    assert task.spec.action_dim == 2, "converted"
    with pytest.raises(
        ConfigError, match=r"obs_keys: 'state=state' is no observation of line_env:FAMILY.*: state\. Fix"
    ):
        parse_config({**given, "obs_keys": ("state=state",)}).open_task()


def test_keys_with_other_names_are_converted_too(tmp_path, demos):
    numbers = np.linspace(-1, 1, 20, dtype=np.float32)[:, None]
    write_zarr(Trajectories.of({"p": numbers}, numbers, [10, 20]), tmp_path / "p.zarr", about={"robot": "arm"})
    options = {"env_options": ("size=2", "actions=places"), "obs_keys": ("state=p",)}
    task = parse_config(
        {"policy": "bc", "env": "line_env:FAMILY", "demos": str(tmp_path / "p.zarr"), **options}
    ).open_task()
    assert task.spec.action_dim == 2, "converted"


def test_faults_are_listed_before_the_data_are_read(demos, capsys):
    words = ["acions=places", "size=big", "fast=yes please", "count=1.5", "obs=image", "limit", "size=1"]
    told = "train", "bc", "--env", "line_env:FAMILY", "--demos", "nowhere", "--env-options", *words
    assert cli.main(list(told)) == 2
    text = " ".join(capsys.readouterr().err.split())
    for part in [
        "perhaps you meant 'actions'",
        "size is 'big'. Fix: give a number",
        "give true or false",
        "--obs image",
    ]:
        assert part in text
    for part in ["count is '1.5'. Fix: give an integer", "'limit' has no value", "'size' is given twice"]:
        assert part in text
    with pytest.raises(ConfigError, match="env_options: unknown"):
        parse_config({"policy": "bc", "env": "pendulum", "env_options": ["size=1"]}).open_task()


def test_values_have_the_types_of_the_defaults(demos):
    env = resolve_env("line_env:FAMILY")
    words = ["actions=1", "size=2", "count=3", "fast=true", "limit=500"]
    read = env.read_options(words)
    assert read == {"actions": "1", "size": 2.0, "count": 3, "fast": True, "limit": 500}
    assert [type(value) for value in read.values()] == [str, float, int, bool, int]


def test_agents_take_them_too(demos):
    config = parse_rl_config({"agent": "tdmpc", "env": "line_env:FAMILY", "env_options": ["size=3"]})
    env = config.open_env(1)
    assert env.metadata["action_bounds"] == ((-3.0,), (3.0,))
    env.close()
    with pytest.raises(ConfigError, match="perhaps you meant 'size'"):
        parse_rl_config({"agent": "tdmpc", "env": "line_env:FAMILY", "env_options": ["sise=3"]})
    with pytest.raises(ConfigError, match="--action-repeat 3"):
        parse_rl_config({"agent": "tdmpc", "env": "dmc:cheetah-run", "env_options": ["action_repeat=3"]})

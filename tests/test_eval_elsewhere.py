"""`difftori eval` in another environment, with other options, and on other episodes than those of the run."""

import json
import logging
import shutil

import numpy as np
import pytest

from difftori import cli
from difftori.data.formats import write_zarr
from difftori.data.trajectories import Trajectories
from difftori.experiments.analyse import _matched
from difftori.experiments.gather import gather

SOURCE = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box


class Line(gymnasium.Env):
    '''A point on a line that is to be moved to the origin, within `limit` steps of at most `size`.'''

    metadata = {"max_episode_steps": 9, "render_modes": []}

    def __init__(self, size, numbers):
        self.observation_space = Box(-9, 9, (numbers,) if numbers else (), np.float32)
        self.action_space = Box(-size, size, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = self.np_random.uniform(-1, 1), 0
        return self.obs(), {}

    def obs(self):
        return np.full(self.observation_space.shape, self.place, np.float32)

    def step(self, action):
        self.place, self.time = float(np.clip(self.place + action[0], -9, 9)), self.time + 1
        done = self.time >= 9
        return self.obs(), -abs(self.place), False, done, {"success": abs(self.place) < 0.2}


def make(*, size=1.0, numbers=1):
    return Line(size, numbers)
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A policy that was trained on recordings alone, in `runs/bc`, and an agent, in `runs/sac`. `simulated_line:make` can be imported."""
    (tmp_path / "simulated_line.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    places = np.random.default_rng(0).uniform(-1, 1, (200, 1)).astype(np.float32)
    write_zarr(Trajectories.of({"state": places}, -places, [100, 200]), tmp_path / "line.zarr")
    bc = ["bc", "--demos", "line.zarr", "--updates", "300", "--batch-size", "32", "--hidden", "16", "--horizon", "1"]
    run(["train", *bc, "--n-obs-steps", "1", "--n-action-steps", "1", "--lr", "3e-3", "--out", "runs/bc", "--quiet"])
    sac = [
        "sac",
        "--env",
        "simulated_line:make",
        "--steps",
        "20",
        "--seed-steps",
        "15",
        "--batch-size",
        "4",
        "--width",
        "8",
    ]
    run(["train", *sac, "--eval-episodes", "2", "--out", "runs/sac", "--quiet"])


def run(words):
    assert cli.main(words) == 0, words


def results(path):
    return json.loads((path / "eval.json").read_text())


def test_a_policy_of_recordings_alone_is_evaluated_in_a_simulation(runs, tmp_path, capsys):
    run(["eval", "runs/bc", "--env", "simulated_line:make", "--episodes", "20", "--quiet"])
    (found,) = results(tmp_path / "runs/bc")
    assert found["metrics"]["success"] == 1.0
    assert found["changes"] == {"env": "simulated_line:make"}
    assert found["episodes"]["seed"] == list(range(100_000, 100_020))
    capsys.readouterr()
    run(["report", "runs/bc", "--evaluation", "latest"])
    assert "simulated_line:make" in capsys.readouterr().out, "listed under the environment of that evaluation"


def test_options_limit_and_episodes_can_be_changed(runs, tmp_path):
    words = [
        "eval",
        "runs/bc",
        "--env",
        "simulated_line:make",
        "--episodes",
        "20",
        "--quiet",
        "--env-options",
        "size=0.05",
    ]
    run([*words, "--max-episode-steps", "3"])
    run([*words, "--max-episode-steps", "3", "--seed", "7"])
    first, other = results(tmp_path / "runs/bc")
    assert first["metrics"]["success"] < 0.6, "three steps of at most 0.05"
    assert max(first["episodes"]["length"]) == 3
    assert other["changes"] == {
        "env": "simulated_line:make",
        "env_options": ["size=0.05"],
        "max_episode_steps": 3,
        "seed": 7,
    }
    assert not set(first["episodes"]["seed"]) & set(other["episodes"]["seed"])
    assert "seed 7" in (tmp_path / "runs/bc/report.html").read_text()


def test_a_card_names_the_environment_of_each_evaluation(runs, tmp_path):
    run(["eval", "runs/bc", "--quiet"])
    words = ["--env", "simulated_line:make", "--env-options", "size=0.5", "--seed", "7", "--episodes", "20"]
    run(["eval", "runs/bc", *words, "--quiet"])
    run(["publish", "runs/bc", "--to", "card", "--license", "mit"])
    card = (tmp_path / "card/README.md").read_text()
    assert "20 episodes of `simulated_line:make` with the last weights" in card
    assert "Its results hold for `none`, `simulated_line:make`" in card
    assert "name: none" in card, "the Hub's index has the run's own evaluation"


def test_another_seed_draws_no_other_split(runs, tmp_path):
    for seed in ("0", "1", "2"):
        run(["eval", "runs/bc", "--seed", seed, "--quiet"])
    errors = {entry["metrics"]["action_error"] for entry in results(tmp_path / "runs/bc")}
    assert len(errors) == 1


def test_agents_on_other_episodes_are_not_compared(runs, tmp_path):
    shutil.copytree(tmp_path / "runs/sac", tmp_path / "runs/copy")
    pairs = []
    for seed in ("3", "4"):
        run(["eval", "runs/sac", "--episodes", "2", "--seed", seed, "--quiet"])
        run(["eval", "runs/copy", "--episodes", "2", "--seed", "4", "--quiet"])
        ours, theirs = (gather([tmp_path / "runs" / name], evaluation="latest").runs for name in ("sac", "copy"))
        pairs.append(len(_matched(ours, theirs)))
    assert pairs == [0, 1]


def test_agents_too(runs, tmp_path):
    for seed in ("0", "1", "1"):
        run(["eval", "runs/sac", "--seed", seed, "--max-episode-steps", "4", "--quiet"])
    own, *others = (entry["metrics"] for entry in results(tmp_path / "runs/sac"))
    assert own["eval/length"] == 4
    assert own != others[0] == others[1]


def test_a_video_of_what_cannot_be_rendered_is_an_error_that_says_so(runs, tmp_path, capsys):
    assert cli.main(["eval", "runs/bc", "--env", "simulated_line:make", "--video", "--quiet"]) != 0
    assert "simulated_line:make cannot render (simulated_line:make, row 0, in render" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_single_number_is_no_observation(runs, tmp_path, capsys):
    assert cli.main(["eval", "runs/bc", "--env", "simulated_line:make", "--env-options", "numbers=0", "--quiet"]) == 2
    assert "one number, of shape (). Fix: give it the shape (1,)" in " ".join(capsys.readouterr().err.split())


def test_an_environment_that_does_not_fit_is_refused_and_other_bounds_are_told(runs, tmp_path, capsys, caplog):
    for name in ("bc", "sac"):
        words = ["eval", f"runs/{name}", "--env", "simulated_line:make", "--quiet"]
        assert cli.main([*words, "--env-options", "numbers=2"]) == 2
        text = " ".join(capsys.readouterr().err.split())
        assert ("observation 'state' (1,)" if name == "bc" else "obs_shape is (2,)") in text
        assert not (tmp_path / "runs" / name / "eval.json").exists()
    with caplog.at_level(logging.WARNING):
        run(["eval", "runs/bc", "--env", "simulated_line:make", "--quiet", "--env-options", "size=0.05"])
    assert "can be outside of the bounds" in caplog.text

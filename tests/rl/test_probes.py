"""All agents solve the probe environments, each of which one fault of an agent makes unsolvable.

`BAR` is asked of the mean return over the 20 episodes of an evaluation. The optimum is 1. What remains below it:

    one-step        0.84  the best that does not see the start (a = 0); random actions 0.50
    two-step        0.92  the best second action after the best first that does not see the start (a₀ = 0); a myopic agent,
                          to whom all first actions are one, 0.58 after random ones; random actions 0.06
    delayed-reward  0.92  the best that does not see the start (a = 0); random actions 0.75, to a myopic agent as good as any

Plans are one step long, so that whatever comes after the next reward must come through Q.
"""

import numpy as np
import pytest

from difftori.envs import probe
from difftori.registry import make_env
from difftori.rl import train as rl
from difftori.rl.config import parse_rl_config
from difftori.rl.evaluate import evaluate

BAR = 0.96
SMALL = {"horizon": 1, "lr": 5e-3, "ema": 0.3, "value_coef": 0.5, "batch_size": 128}
MODEL_FREE = {"width": 64, "batch_size": 128, "seed_steps": 100, "updates_per_step": 0.5}
SAC = {**MODEL_FREE, "lr": 5e-3, "ema": 0.2, "ema_every": 1, "init_temperature": 0.01}
DRQ = {**MODEL_FREE, "lr": 2e-3, "ema": 0.1, "horizon": 1, "schedule_steps": 200}
# With larger steps, the policy ends at a bound of the actions, where its gradient vanishes.
DRQ_DELAYED = {**DRQ, "lr": 1e-3, "horizon": 3, "seed_steps": 400, "schedule_steps": 800}
MPPI = {"samples": 64, "elites": 8, "prior_samples": 4, "iterations": 2}
ONE = {"width": 64, "encoder_width": 64, "latent_dim": 6, "seed_steps": 100, "schedule_steps": 100}
ONE |= {"updates_per_step": 0.5}
TWO = {**ONE, "width": 128, "encoder_width": 128, "seed_steps": 200, "schedule_steps": 200}
DELAYED = {**ONE, "latent_dim": 16, "seed_steps": 400, "schedule_steps": 400, "updates_per_step": 0.25}
OWN = {"plan_steps": 3, "pg_steps": 2}
OFF = {**OWN, "pg": "off"}
# A step of the policy gradient as long as the model's would undo what Eq. 3 learns of two-step.
REPLAY = {**OWN, "pg": "replay", "pg_every": 5, "pg_lr": 5e-4}
PER_EPISODE = {**OWN, "pg": "per-episode", "seed_steps": 60, "updates_per_step": 1.0}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """Drawing the report takes as long as learning here."""
    monkeypatch.setattr("difftori.runs.run.render", lambda path, summary: "")


@pytest.mark.parametrize(
    ("agent", "task", "steps", "num_envs", "settings"),
    [
        pytest.param("tdmpc", "one-step", 160, 10, ONE, id="tdmpc-one-step"),
        pytest.param("difftori", "one-step", 160, 10, ONE | OFF, id="difftori-one-step-off"),
        pytest.param("difftori", "one-step", 90, 5, ONE | PER_EPISODE, id="difftori-one-step-per-episode"),
        # Seeds differ, and so does one seed when sums are rounded otherwise. After 500 steps seeds 3, 4, 5 of `tdmpc` returned .95, .99, .96,
        # and before the rewards of all steps were one evaluation .97, 1.00, .92; after 600 steps seed 3 returned .96.
        pytest.param("tdmpc", "two-step", 800, 10, TWO, id="tdmpc-two-step"),
        # After 400 steps seeds 3 to 6 returned .93, .99, .89, .97; after 700 steps seeds 3 and 4 .99 and 1.00.
        pytest.param("difftori", "two-step", 700, 10, TWO | REPLAY, id="difftori-two-step-replay"),
        pytest.param("tdmpc", "delayed-reward", 800, 20, DELAYED, id="tdmpc-delayed-reward"),
        pytest.param("difftori", "delayed-reward", 800, 20, DELAYED | OFF, id="difftori-delayed-reward-off"),
        pytest.param("sac", "one-step", 160, 10, SAC, id="sac-one-step"),
        pytest.param("sac", "two-step", 400, 10, SAC, id="sac-two-step"),
        pytest.param("sac", "delayed-reward", 800, 20, SAC, id="sac-delayed-reward"),
        pytest.param("drqv2", "one-step", 200, 10, DRQ, id="drqv2-one-step"),
        pytest.param("drqv2", "two-step", 600, 10, DRQ, id="drqv2-two-step"),
        pytest.param("drqv2", "delayed-reward", 1280, 20, DRQ_DELAYED, id="drqv2-delayed-reward"),
    ],
)
def test_solves(agent, task, steps, num_envs, settings, tmp_path):
    values = {"agent": agent, "env": f"probe:{task}", "steps": steps, "num_envs": num_envs, "seed": 3}
    common = {"tdmpc": SMALL | MPPI, "difftori": SMALL}.get(agent, {})
    values |= {"eval_episodes": 20, "eval_every": 10_000, "save_every": 10_000, "settings": common | settings}
    summary = rl.train(parse_rl_config(values), tmp_path, progress=False)
    assert summary["updates"] == pytest.approx(steps * settings["updates_per_step"], abs=1)
    assert summary["return"] > BAR


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["sac", "drqv2"])
def test_learns_from_images(agent, tmp_path):
    """Random actions return 8.7, the best 19.3. After 1,040 steps, two seeds of SAC returned 17.0 and 16.6, of DrQ-v2 15.9 and 16.4."""
    values = {"agent": agent, "env": "tests.support.bars:Bars", "steps": 1040, "num_envs": 4, "seed": 0}
    values |= {"eval_episodes": 20, "eval_every": 10_000, "save_every": 10_000}
    settings = {"width": 64, "channels": 8, "batch_size": 64, "lr": 1e-3, "seed_steps": 400, "updates_per_step": 0.5}
    settings |= {"schedule_steps": 1500} if agent == "drqv2" else {}
    summary = rl.train(parse_rl_config({**values, "settings": settings}), tmp_path, progress=False)
    assert summary["return"] > 14


@pytest.mark.parametrize("task", probe.TASKS)
def test_the_bar_lies_above_what_acts_without_the_start(task):
    env = make_env(f"probe:{task}", num_envs=10, seed=3)

    def blind(obs, first, active):
        unseen = np.zeros_like(obs)
        later = task == "two-step" and bool(obs[0, 1] > 0.5)  # its second observation says nothing of the start
        return probe.optimal_action(task, obs if later else unseen)

    assert evaluate(env, blind, seed=3, episodes=20, discount=1.0).returns.mean() < BAR - 0.02

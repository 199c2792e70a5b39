"""Runs on an environment with demonstrations, refiners on their bases, averaged weights, schedules."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_env.reach import ENV, write_demos
from tiny_imitation import Tiny, make, tiny_config

from difftori import cli
from difftori.errors import ConfigError
from difftori.il.config import parse_config
from difftori.il.env_task import TEST_SEED, EnvTask
from difftori.il.evaluate import evaluate_run
from difftori.il.learner import Learner
from difftori.il.train import train
from difftori.il.weights import load_policy
from difftori.policies.normalized import NormalizedPolicy
from difftori.runs.checkpoint import weights_digest
from difftori.runs.records import read_config
from difftori.types import Moments


@pytest.fixture
def demos(tmp_path) -> str:
    return write_demos(tmp_path / "demos.zarr")


def config(policy: str, demos: str | None = None, settings: dict | None = None, **values):
    plain = {"policy": policy, "eval_episodes": 3, "settings": {"updates": 12, "batch_size": 8, **(settings or {})}}
    if demos is not None:
        plain |= {"env": ENV, "demos": demos, "n_obs_steps": 2, "horizon": 4, "n_action_steps": 2}
    return parse_config({**plain, **values})


SMALL = {"hidden": (16,), "cvae_dim": 4, "latent_dim": 8}


def test_what_a_task_is_made_of(demos):
    task = config("bc", demos, num_train=3).open_task()
    assert isinstance(task, EnvTask)
    spec = task.spec
    assert (spec.n_obs_steps, spec.horizon, spec.n_action_steps, spec.action_dim) == (2, 4, 2, 2)
    assert spec.present == slice(1, 3)
    assert len(task.train.demos) == 3
    assert len(task.validation.demos) == 1
    rows = task.train.demos.rows()
    seen = task.train.demos.obs["state"][rows]
    measured = spec.obs["state"].moments
    assert isinstance(measured, Moments)
    assert measured.low == pytest.approx(tuple(seen.amin(0).tolist()))
    held = set(task.validation.demos.rows().tolist())
    assert not held & set(rows.tolist())


def test_every_step_is_the_present_of_one_window_whatever_is_executed(demos):
    for n_action_steps in (1, 2, 3):
        task = config("bc", demos, n_action_steps=n_action_steps).open_task()
        assert len(task.train) == sum(task.train.demos.lengths)
        present = task.train.batch(torch.arange(len(task.train))).actions[:, 1]
        assert torch.equal(present, task.train.demos.actions[task.train.demos.rows()])


def test_a_refiner_of_another_seed_holds_out_what_its_base_did(demos, tmp_path):
    train(config("bc", demos, seed=4), tmp_path / "base", progress=False)
    wish = config("residual", settings={"hidden": (8,)}, base=str(tmp_path / "base"), seed=5)
    assert (wish.seed, wish.data_seed) == (5, 4)
    assert torch.equal(wish.open_task().train.demos.spans, config("bc", demos, seed=4).open_task().train.demos.spans)


def test_a_run_keeps_its_base(demos, tmp_path, killed_at):
    """Stopped, its base trained anew, and resumed: it goes on with the base that it began with."""
    small = {"hidden": (8,), "updates": 20}
    train(config("bc", demos), tmp_path / "base", progress=False)
    wish = config("residual", settings=small, base=str(tmp_path / "base"), save_every=1)
    train(wish, tmp_path / "straight", progress=False)

    killed_at(9, wish, tmp_path / "killed")
    shutil.rmtree(tmp_path / "base")
    train(config("bc", demos, settings={"lr": 0.5}), tmp_path / "base", progress=False)
    train(wish, tmp_path / "killed", progress=False)
    obs = {"state": torch.rand(5, 2, 2)}
    plans = [
        load_policy(tmp_path / run, "last")[0].act(obs, generator=torch.Generator()) for run in ("straight", "killed")
    ]
    assert torch.equal(*plans)


def test_the_same_seed_holds_out_the_same_episodes(demos):
    first, second, other = (config("bc", demos, seed=seed).open_task() for seed in (1, 1, 5))
    assert torch.equal(first.train.demos.spans, second.train.demos.spans)
    assert not torch.equal(first.train.demos.spans, other.train.demos.spans)


def test_evaluation_counts_from_the_test_seed_and_gives_each_episode(demos, tmp_path):
    train(config("bc", demos), tmp_path / "run", progress=False)
    episodes = json.loads((tmp_path / "run" / "episodes.json").read_text())["last"]
    assert episodes["seed"] == [TEST_SEED, TEST_SEED + 1, TEST_SEED + 2]
    again = evaluate_run(tmp_path / "run")
    assert again["score"] == pytest.approx(sum(episodes["score"]) / 3)
    assert again["episodes"] == 3
    shutil.rmtree(demos)
    assert evaluate_run(tmp_path / "run") == again, "the environment is enough"


@pytest.mark.parametrize("name", ["difftori-il", "residual"])
def test_a_refiner_takes_task_and_data_from_its_base_and_outlives_it(name, demos, tmp_path):
    train(config("bc", demos, seed=4, num_train=3), tmp_path / "base", progress=False)
    settings = SMALL if name == "difftori-il" else {"hidden": (16,)}
    wish = config(name, settings=settings, base=str(tmp_path / "base"))
    assert (wish.env, wish.seed, wish.num_train, wish.demos, wish.n_obs_steps) == (ENV, 4, 3, demos, 2)
    train(wish, tmp_path / "refined", progress=False)
    policy, _ = load_policy(tmp_path / "refined", "last")
    obs = {"state": torch.rand(5, 2, 2)}
    before = policy.act(obs, generator=torch.Generator())
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(demos)
    again, _ = load_policy(tmp_path / "refined", "last")
    assert torch.equal(again.act(obs, generator=torch.Generator()), before)


def test_refiners_on_refiners(demos, tmp_path):
    train(config("bc", demos), tmp_path / "a", progress=False)
    train(config("residual", settings={"hidden": (8,)}, base=str(tmp_path / "a")), tmp_path / "b", progress=False)
    train(config("difftori-il", settings=SMALL, base=str(tmp_path / "b")), tmp_path / "c", progress=False)
    assert evaluate_run(tmp_path / "c")["episodes"] == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "bc", "env": ENV, "demos": "nowhere.zarr"}, "no such file or folder"),
        ({"policy": "bc", "env": "pusht"}, "Fix: give its demonstrations, --demos PATH"),
        ({"policy": "bc", "env": "pendulum", "n_obs_steps": 3}, "n_obs_steps: unknown for 'pendulum'"),
        ({"policy": "residual", "env": "pendulum"}, "refines another policy's actions. Fix: give --base RUN"),
        ({"policy": "difftori-il", "env": "pendulum"}, "give --base RUN, or --init prior"),
        ({"policy": "difftori-il", "base": "nowhere"}, "check that nowhere is the directory of a run"),
    ],
)
def test_what_is_missing_is_named(values, words, tmp_path):
    with pytest.raises(Exception, match=words) as caught:
        train(parse_config(values), tmp_path / "run", progress=False)
    assert caught.type.__module__ == "difftori.errors"


def test_data_that_do_not_fit_the_environment_are_refused(demos):
    with pytest.raises(ConfigError, match="has 5 training episodes after holding out 1"):
        config("bc", demos, num_train=6).open_task()
    with pytest.raises(ConfigError, match="make horizon at least"):
        config("bc", demos, n_action_steps=9).open_task()


def test_a_plain_policy_takes_no_base(demos, tmp_path):
    train(config("bc", demos), tmp_path / "base", progress=False)
    with pytest.raises(ConfigError, match="does not use a base policy"):
        train(config("bc", base=str(tmp_path / "base")), tmp_path / "run", progress=False)


def test_the_command_line_trains_refines_evaluates_and_films(demos, tmp_path, capsys):
    common = ["--quiet", "--updates", "5", "--eval-episodes", "2"]
    window = ["--n-obs-steps", "2", "--horizon", "4", "--n-action-steps", "2"]
    base, refined = str(tmp_path / "base"), str(tmp_path / "refined")
    assert cli.main(["train", "bc", "--env", ENV, "--demos", demos, *window, *common, "--out", base]) == 0
    assert cli.main(["train", "difftori-il", "--base", base, *common, "--out", refined]) == 0
    assert cli.main(["eval", refined, "--episodes", "4", "--video"]) == 0
    assert "success_high" in capsys.readouterr().out
    assert (Path(refined) / "media" / "episode.mp4").exists()


@pytest.mark.parametrize("name", ["difftori-il", "residual"])
def test_a_killed_run_reaches_the_same_weights(name, demos, tmp_path, killed_at):
    train(config("bc", demos), tmp_path / "base", progress=False)
    small = {**(SMALL if name == "difftori-il" else {"hidden": (16,)}), "ema": 0.99, "updates": 30}
    wish = config(name, settings=small, base=str(tmp_path / "base"), save_every=1)
    train(wish, tmp_path / "straight", progress=False)

    killed_at(13, wish, tmp_path / "killed")
    train(wish, tmp_path / "killed", progress=False)
    straight, killed = (load_policy(tmp_path / run, "last")[0].policy for run in ("straight", "killed"))
    assert weights_digest(straight) == weights_digest(killed)


def test_so_many_updates_are_so_many(demos, tmp_path):
    summary = train(config("bc", demos, settings={"updates": 17}), tmp_path / "run", progress=False)
    assert summary["updates"] == 17
    assert read_config(tmp_path / "run")["settings"]["updates"] == 17


def test_averaged_weights_follow_the_published_decay():
    task = make(seed=0, num_train=8)
    settings = tiny_config(ema=0.9, dropout=0.0).settings
    learner = Learner(NormalizedPolicy(Tiny(settings, task.spec)), settings)
    expected = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    for update in range(1, 40):
        learner.update(next(task.train.in_order()), torch.Generator())
        decay = min(0.9, 1 - (1 + update) ** -0.75)
        for name, parameter in learner.policy.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, parameter in learner.acting.policy.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
    assert learner.acting.policy.get_buffer("calls") == learner.policy.get_buffer("calls")


def test_the_learning_rate_rises_over_the_warm_up():
    task = make(seed=0, num_train=8)
    settings = tiny_config(warmup=4, lr=0.1).settings
    learner = Learner(NormalizedPolicy(Tiny(settings, task.spec)), settings)
    rates = []
    for _ in range(6):
        learner.update(next(task.train.in_order()), torch.Generator())
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])

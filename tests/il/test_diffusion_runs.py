"""Diffusion policies in the trainer: averaged weights are what is exported, refined and resumed."""

import pytest
import torch
from tiny_env.reach import ENV, write_demos

from difftori import cli
from difftori.il.base import WithBase, base_actions
from difftori.il.config import TrainConfig, parse_config
from difftori.il.evaluate import evaluate_run
from difftori.il.train import train
from difftori.il.weights import load_policy
from difftori.policies.difftori import DiffTORI
from difftori.runs import run
from difftori.runs.checkpoint import Checkpoints, weights_digest

UNET = {"dims": (16,), "step_width": 8, "blocks": 1, "noise_steps": 4, "inference_steps": 2}


@pytest.fixture(autouse=True)
def _quick_report(monkeypatch):
    """Drawing takes longer than training here; `test_report.py` draws."""
    monkeypatch.setattr(run, "render", lambda path, summary: "")


@pytest.fixture
def demos(tmp_path) -> str:
    return write_demos(tmp_path / "demos.zarr")


def config(policy: str, demos: str | None = None, settings: dict | None = None, **values) -> TrainConfig:
    plain = {"policy": policy, "eval_episodes": 2, "settings": {"updates": 12, "batch_size": 8, **(settings or UNET)}}
    if demos is not None:
        plain |= {"env": ENV, "demos": demos, "n_obs_steps": 2, "horizon": 5, "n_action_steps": 2}
    return parse_config({**plain, **values})


@pytest.mark.parametrize("name", ["diffusion", "dp3"])
def test_the_averaged_weights_are_exported_and_act(name, demos, tmp_path):
    train(config(name, demos), tmp_path / "run", progress=False)
    found = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert found is not None
    learner = found.state["state"]["learner"]
    exported = load_policy(tmp_path / "run", "last")[0].policy.state_dict()
    assert all(torch.equal(value, learner["average"][key]) for key, value in exported.items())
    assert not torch.equal(exported["model.unet.last.1.weight"], learner["policy"]["model.unet.last.1.weight"])
    assert evaluate_run(tmp_path / "run")["episodes"] == 2


def test_dp3_sees_its_own_window_unless_told_otherwise(demos):
    own = config("dp3", demos, n_obs_steps=None, horizon=None, n_action_steps=None)
    assert (own.n_obs_steps, own.horizon, own.n_action_steps) == (2, 4, 3)


def test_a_refiner_sees_several_draws_of_its_base(demos, tmp_path):
    train(config("diffusion", demos), tmp_path / "base", progress=False)
    small = {"hidden": (8,), "cvae_dim": 2, "latent_dim": 4, "base_samples": 3, "base_choice": "drawn"}
    wish = config("difftori-il", settings=small, base=str(tmp_path / "base"))
    train(wish, tmp_path / "refined", progress=False)
    policy, _ = load_policy(tmp_path / "refined", "last")
    assert isinstance(policy.policy, DiffTORI)
    task = wish.open_task()
    windows = WithBase(task.train, base_actions(policy, task.train, torch.Generator().manual_seed(0)))
    batch = policy.normalized(next(windows.in_order(1)))
    draws = (policy.policy.choose_base(batch, torch.Generator().manual_seed(seed)) for seed in range(20))
    drawn = {draw.sum().item() for draw in draws}
    assert len(drawn) == 3


def test_a_killed_run_reaches_the_same_weights(demos, tmp_path, killed_at):
    wish = config("diffusion", demos, settings={**UNET, "updates": 30, "inference_steps": None}, save_every=1)
    train(wish, tmp_path / "straight", progress=False)

    killed_at(13, wish, tmp_path / "killed")
    train(wish, tmp_path / "killed", progress=False)
    straight, killed = (load_policy(tmp_path / run, "last")[0].policy for run in ("straight", "killed"))
    assert weights_digest(straight) == weights_digest(killed)


def test_settings_of_images_and_of_the_network_are_options(demos, tmp_path):
    common = ["--quiet", "--updates", "2", "--eval-episodes", "1", "--env", ENV, "--demos", demos]
    network = ["--preset", "small", "--dims", "16", "24", "--inference-steps", "5", "--images.width", "32"]
    assert cli.main(["train", "diffusion", *common, *network, "--out", str(tmp_path / "run")]) == 0
    policy, read = load_policy(tmp_path / "run", "last")
    settings = read.settings.model_dump()
    assert settings["dims"] == (16, 24)
    assert settings["images"]["width"] == 32
    assert settings["blocks"] == 1, "the preset's"
    assert policy.spec.horizon == 16

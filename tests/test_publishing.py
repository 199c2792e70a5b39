"""`difftori publish`: a policy or agent acts from its published folder alone, bit by bit as from its run."""

import gc
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tiny_env.reach import ENV, write_demos

import difftori
from difftori.cli import main
from difftori.errors import CheckpointError, ConfigError, MissingExtraError, NonFiniteError
from difftori.il.train import evaluate_run as evaluate_policy_run
from difftori.published import FILES, NEEDED
from difftori.publishing.evidence import evaluated, gather, without_paths
from difftori.publishing.licence import checked_license, header_of
from difftori.publishing.publish import PublishRequest, publish
from difftori.rl.evaluate import evaluate_run as evaluate_agent_run
from difftori.rollout import wilson_interval
from difftori.trainers import read_options

safetensors = pytest.importorskip("safetensors.torch")

BC = {"hidden": "8", "epochs": "2", "eval-episodes": "3"}
AGENT = {"env": "probe:two-step", "steps": "16", "seed-steps": "9", "eval-episodes": "3", "horizon": "1", "width": "8"}
AGENT |= {"latent-dim": "4", "batch-size": "4", "updates-per-step": "0.1"}


def trained(name, out, **options):
    trainer, config = read_options(name, {}, {key.replace("-", "_"): [value] for key, value in options.items()})
    trainer.train(config, out, progress=False)
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("alice-home")


@pytest.fixture(scope="module")
def bc(place):
    return trained("bc", place / "bc", env=ENV, demos=write_demos(place / "demos.zarr"), **BC)


@pytest.fixture(scope="module")
def refiner(place, bc):
    return trained("residual", place / "residual", base=str(bc), **BC)


@pytest.fixture(scope="module")
def generated(place):
    return trained("mpc", place / "mpc", **{"num-train": "8", "epochs": "1", "eval-episodes": "3"})


@pytest.fixture(scope="module")
def agent(place):
    return trained("tdmpc", place / "agent", **AGENT)


RUNS = ("bc", "refiner", "generated", "agent")


def published(run, to, **options):
    publish(PublishRequest(run, str(to), **options))
    return to


def actions(source, **options):
    """The actions of five steps of two episodes."""
    torch.manual_seed(1)
    policy, rng, found = difftori.load(source, **options), np.random.default_rng(0), []
    for _ in range(2):
        policy.reset()
        for _ in range(5):
            obs = {n: rng.normal(size=(3, *e.shape)).astype(np.float32) for n, e in policy.obs.items()}
            found.append(policy.act(obs))
    return policy.name, np.array(found).tobytes()


@pytest.mark.parametrize("name", RUNS)
def test_it_acts_as_its_run_bit_by_bit_when_the_run_is_gone(name, request, tmp_path):
    run = request.getfixturevalue(name)
    folder, gone = published(run, tmp_path / "out"), tmp_path / "gone"
    wanted = actions(run)
    run.rename(gone)
    try:
        assert actions(str(folder)) == wanted
    finally:
        gone.rename(run)
    assert {path.name for path in folder.iterdir()} <= set(FILES)

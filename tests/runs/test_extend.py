"""A finished run is extended, an evaluation obeys signals, and later evaluations are kept."""

import json
import multiprocessing
import os
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
from tiny_env.reach import ENV, write_demos

from difftori.errors import ConfigError, DataError
from difftori.il.evaluate import evaluate_run as evaluate_policy_run
from difftori.il.weights import load_policy
from difftori.policies.normalized import NormalizedPolicy
from difftori.rl.evaluate import evaluate_run as evaluate_agent_run
from difftori.rl.weights import load_agent
from difftori.rollout import PolicyInRows
from difftori.runs.checkpoint import weights_digest
from difftori.runs.process import hold
from difftori.runs.records import read_config, read_metrics, read_summary
from difftori.trainers import read_options, read_resumed

AGENT = {"env": "probe:delayed-reward", "steps": "48", "seed_steps": "20", "eval_episodes": "2", "eval_every": "1000"}
AGENT |= {"width": "16", "encoder_width": "16", "latent_dim": "4", "batch_size": "8", "horizon": "2"}
POLICY = {"env": ENV, "hidden": "16", "epochs": "2", "eval_episodes": "2", "lr_schedule": "constant"}


def train(name, out, **options):
    trainer, config = read_options(name, {}, {key: [value] for key, value in options.items()})
    return trainer.train(config, out, progress=False)


def extended(run, **options):
    trainer, config = read_resumed(run, {key: [value] for key, value in options.items()})
    return trainer.train(config, run, progress=False)


def test_an_extended_agent_goes_on_where_it_ended(tmp_path):
    train("difftori", tmp_path / "run", **AGENT)
    summary = extended(tmp_path / "run", steps="80")
    assert summary["env_steps"] == 80
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "train/return" in row] == [*range(8, 81, 8)]
    assert read_config(tmp_path / "run")["steps"] == 80
    assert json.loads((tmp_path / "run" / "summary-1.json").read_text())["env_steps"] == 48
    assert "steps: 48" in (tmp_path / "run" / "config-1.yaml").read_text()
    assert extended(tmp_path / "run", steps="80") == summary, "the same command again does nothing"


def test_a_run_that_a_process_is_training_is_not_extended(tmp_path):
    train("difftori", tmp_path / "run", **AGENT)
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with (tmp_path / "run" / "run.lock").open("a") as handle:
        hold(handle)
        with pytest.raises(ConfigError, match="in use by another process"):
            read_resumed(tmp_path / "run", {"steps": ["80"]})
    assert read_config(tmp_path / "run")["steps"] == 48
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_an_extended_policy_equals_one_trained_for_as_long(tmp_path):
    demos = write_demos(tmp_path / "demos.zarr")
    train("bc", tmp_path / "run", demos=demos, **POLICY)
    extended(tmp_path / "run", epochs="4")
    train("bc", tmp_path / "whole", demos=demos, **POLICY | {"epochs": "4"})
    digests = [weights_digest(load_policy(tmp_path / name)[0].policy) for name in ("run", "whole")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", ["difftori", "bc"])
def test_an_extended_run_that_is_not_finished_acts_with_its_newest_checkpoint(name, tmp_path):
    options = AGENT if name == "difftori" else POLICY | {"demos": write_demos(tmp_path / "demos.zarr")}
    train(name, tmp_path / "run", **options)
    longer = {"steps": ["80"]} if name == "difftori" else {"epochs": ["4"]}
    load = load_agent if name == "difftori" else load_policy
    before = weights_digest(_network(load(tmp_path / "run")[0]))
    trainer, config = read_resumed(tmp_path / "run", longer)
    assert weights_digest(_network(load(tmp_path / "run")[0])) == before, "extended, and not trained yet"
    trainer.train(config, tmp_path / "run", progress=False)
    after = weights_digest(_network(load(tmp_path / "run")[0]))
    read_resumed(tmp_path / "run", {key: [str(2 * int(value[0]))] for key, value in longer.items()})
    assert weights_digest(_network(load(tmp_path / "run")[0])) == after != before
    kept = sorted(path.name for path in (tmp_path / "run").glob("*-[12].pt"))
    assert kept == [f"{'agent' if name == 'difftori' else 'policy'}-{number}.pt" for number in (1, 2)]


def test_processes_that_extend_a_run_at_once_do_it_once(tmp_path):
    train("difftori", tmp_path / "run", **AGENT)
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        longer = list(pool.map(_extended_steps, [tmp_path / "run"] * 4))
    assert longer == [80] * 4
    assert [path.name for path in (tmp_path / "run").glob("config-*.yaml")] == ["config-1.yaml"]


def _extended_steps(run):
    return read_resumed(run, {"steps": ["80"]})[1].steps


def _network(loaded):
    return loaded.policy if isinstance(loaded, NormalizedPolicy) else loaded


def test_a_run_goes_on_when_its_data_have_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_demos(tmp_path / "demos.zarr")
    train("bc", tmp_path / "run", demos="demos.zarr", **POLICY)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "demos.zarr").rename(tmp_path / "elsewhere" / "demos.zarr")
    with pytest.raises(DataError, match=f"no such file or folder in {tmp_path}"):
        extended(tmp_path / "run", epochs="3")
    moved = str(tmp_path / "elsewhere" / "demos.zarr")
    assert extended(tmp_path / "run", epochs="3", demos=moved)["epochs"] == 3
    assert read_config(tmp_path / "run")["demos"] == moved
    write_demos(tmp_path / "others.zarr", episodes=3)
    with pytest.raises(ConfigError, match="changed since the run began"):
        extended(tmp_path / "run", epochs="4", demos=str(tmp_path / "others.zarr"))


def test_what_cannot_be_extended_is_named(tmp_path):
    train("difftori", tmp_path / "run", **AGENT, keep_episodes="false")
    with pytest.raises(ConfigError, match=r"--steps: 40 is less than the run's 48"):
        read_resumed(tmp_path / "run", {"steps": ["40"]})
    with pytest.raises(ConfigError, match="recorded episodes were deleted.*--keep-episodes"):
        read_resumed(tmp_path / "run", {"steps": ["80"]})
    with pytest.raises(ConfigError, match="--lr: not allowed with --resume"):
        read_resumed(tmp_path / "run", {"lr": ["0.1"]})
    assert read_config(tmp_path / "run")["steps"] == 48
    assert read_summary(tmp_path / "run")["env_steps"] == 48


def test_a_run_without_checkpoints_is_not_extended_from_its_beginning(tmp_path):
    train("difftori", tmp_path / "run", **AGENT)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="its checkpoints were deleted, so it would begin again"):
        read_resumed(tmp_path / "run", {"steps": ["80"]})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    read_resumed(tmp_path / "run", {"steps": ["48"]})  # no extension


def test_a_signal_in_an_evaluation_is_obeyed_and_costs_only_that_evaluation(tmp_path, monkeypatch):
    demos = write_demos(tmp_path / "demos.zarr")
    train("bc", tmp_path / "whole", demos=demos, **POLICY)
    act, calls = PolicyInRows.__call__, []

    def raises_a_flag(self, obs, first, active):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return act(self, obs, first, active)

    monkeypatch.setattr(PolicyInRows, "__call__", raises_a_flag)
    with pytest.raises(SystemExit) as ended:
        train("bc", tmp_path / "run", demos=demos, **POLICY, n_action_steps="1")
    assert ended.value.code == 143
    assert len(calls) < 10
    assert not (tmp_path / "run" / "summary.json").exists()
    assert train("bc", tmp_path / "run", demos=demos, **POLICY, n_action_steps="1")["last/episodes"] == 2


def test_a_signal_in_the_evaluation_of_an_agent_is_obeyed(tmp_path, monkeypatch):
    from difftori.rl import evaluate as module

    train("difftori", tmp_path / "whole", **AGENT)
    act, calls = module.AgentInRows.__call__, []

    def raises_a_flag(self, obs, first, active):
        calls.append(None)
        if len(calls) == 11:  # in the evaluation at the end; the first one takes 8 steps
            os.kill(os.getpid(), signal.SIGTERM)
        return act(self, obs, first, active)

    monkeypatch.setattr(module.AgentInRows, "__call__", raises_a_flag)
    with pytest.raises(SystemExit) as ended:
        train("difftori", tmp_path / "run", **AGENT)
    assert (ended.value.code, len(calls)) == (143, 11)
    assert train("difftori", tmp_path / "run", **AGENT)["return"] == read_summary(tmp_path / "whole")["return"]


def test_evaluations_are_kept_and_shown(tmp_path):
    demos = write_demos(tmp_path / "demos.zarr")
    train("bc", tmp_path / "policy", demos=demos, **POLICY)
    evaluate_policy_run(tmp_path / "policy", episodes=3, video=True)
    evaluate_policy_run(tmp_path / "policy", episodes=2)
    kept = json.loads((tmp_path / "policy" / "eval.json").read_text())
    assert [len(entry["episodes"]["success"]) for entry in kept] == [3, 2]
    assert kept[0]["weights"] == "last"
    page = (tmp_path / "policy" / "report.html").read_text()
    assert "Evaluations after training" in page
    assert "data:video/mp4" in page or "data:image/gif" in page
    train("difftori", tmp_path / "agent", **AGENT)
    metrics = evaluate_agent_run(tmp_path / "agent", episodes=3)
    (entry,) = json.loads((tmp_path / "agent" / "eval.json").read_text())
    assert entry["metrics"] == metrics
    assert len(entry["episodes"]["return"]) == 3

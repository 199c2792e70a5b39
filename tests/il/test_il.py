import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_imitation import Alternating, Tiny, make, tiny_config

from difftori import cli
from difftori.errors import CheckpointError, ConfigError, NonFiniteError, ObjectiveError
from difftori.il.evaluate import evaluate_run
from difftori.il.learner import Learner, make_optimizer, validation_error
from difftori.il.train import train
from difftori.il.weights import load_policy
from difftori.policies.normalized import NormalizedPolicy
from difftori.runs import run
from difftori.runs.checkpoint import weights_digest
from difftori.runs.records import read_metrics, to_yaml
from difftori.types import state_obs


def outcome(path: Path) -> tuple:
    """All that must be equal, bit by bit, between two runs that claim to be the same."""
    rows = [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(path)]
    digests = [weights_digest(load_policy(path, which)[0].policy) for which in ("best", "last")]
    return digests, rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple:
    """What 4 epochs without interruption give."""
    path = tmp_path_factory.mktemp("straight") / "run"
    train(tiny_config(), path, progress=False)
    return outcome(path)


@pytest.fixture(autouse=True)
def _quick_report(monkeypatch):
    """Drawing takes longer than training here; `test_report.py` draws."""
    monkeypatch.setattr(run, "render", lambda path, summary: "")


def test_training_learns_and_says_what_it_did(tmp_path):
    summary = train(tiny_config(epochs=60, lr=0.03), tmp_path / "run", progress=False)
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["train/loss"] < 0.3 * rows[0]["train/loss"]
    assert rows[-1]["train/mse"] == pytest.approx(rows[-1]["train/loss"])
    assert [row["step"] for row in rows] == [3 * e for e in range(1, 61)]
    errors = [row["validation/error"] for row in rows]
    assert summary["best/validation_error"] == min(errors)
    assert summary["best_epoch"] == 1 + errors.index(min(errors))
    assert summary["last/validation_error"] == errors[-1]
    assert summary["updates"] == 180
    task, (policy, _) = make(seed=0), load_policy(tmp_path / "run", "last")
    held_out, learned_from = (
        validation_error(policy, part, torch.Generator()) for part in (task.validation, task.train)
    )
    assert errors[-1] == pytest.approx(held_out, rel=1e-5)
    assert held_out != pytest.approx(learned_from, rel=0.1)
    assert {"last/error", "best/error", "seconds", "parameters"} <= summary.keys()
    best = evaluate_run(tmp_path / "run", which="best")["error"]
    last = evaluate_run(tmp_path / "run", which="last")["error"]
    assert (best, last) == (summary["best/error"], summary["last/error"])
    assert evaluate_run(tmp_path / "run", episodes=3)["error"] != best


def test_same_seed_same_weights_other_seed_others(tmp_path, straight):
    train(tiny_config(), tmp_path / "again", progress=False)
    assert outcome(tmp_path / "again") == straight
    train(tiny_config(seed=1), tmp_path / "other", progress=False)
    assert outcome(tmp_path / "other")[0] != straight[0]


@pytest.mark.parametrize(("trap", "status"), [("term", 143), ("int", 130)])
@pytest.mark.parametrize("at", [3, 6, 8])  # 3 updates an epoch: the ends of epochs 1 and 2, the middle of epoch 3
def test_a_polite_end_and_going_on_equals_going_straight(tmp_path, straight, trap, status, at):
    config = tiny_config(trap=trap, trap_at=(at,), trap_file=str(tmp_path / "sprung"), save_every=100)
    with pytest.raises(SystemExit) as caught:
        train(config, tmp_path / "run", progress=False)
    assert caught.value.code == status
    assert os.listdir(tmp_path / "run" / "checkpoints") == [f"step-{at}"]
    train(config, tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run") == straight


@pytest.mark.parametrize("at", [1, 5, 9, 12])
def test_a_kill_and_going_on_equals_going_straight(tmp_path, straight, in_child, at):
    config = tiny_config(trap="kill", trap_at=(at,), trap_file=str(tmp_path / "sprung"))
    assert in_child(lambda: train(config, tmp_path / "run", progress=False)) == -signal.SIGKILL
    train(config, tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run") == straight


@pytest.mark.parametrize(
    ("call", "count"), [("fsync", n) for n in (8, 11, 14, 17, 20, 30)] + [("rename", 2), ("rename", 5)]
)
def test_a_kill_while_writing_and_going_on_equals_going_straight(
    tmp_path, straight, in_child, monkeypatch, call, count
):
    original, seen = getattr(os, call), []

    def deadly(*args, **kwargs):
        seen.append(args)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(os, call, deadly)
    assert in_child(lambda: train(tiny_config(), tmp_path / "run", progress=False)) == -signal.SIGKILL
    monkeypatch.undo()
    train(tiny_config(), tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run") == straight


def test_a_killed_process_goes_on_in_a_new_one(tmp_path, straight):
    """A process of its own dies, as users have it; the command line goes on with what it left."""
    config = tiny_config(trap="kill", trap_at=(8,), trap_file=str(tmp_path / "sprung"))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "difftori.cli", "train", "--config", "config.yaml", "--out", "run", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=environment, cwd=tmp_path).returncode == -signal.SIGKILL
    assert "command.txt" in os.listdir(out)
    assert cli.main(["train", "--resume", str(out), "--quiet"]) == 0
    assert outcome(out) == straight


def test_a_polite_end_in_the_last_validation_is_heard(tmp_path, straight, monkeypatch):
    validate = Learner.validate

    def last(self, *args):
        if self.train_state.epoch == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self, *args)

    monkeypatch.setattr(Learner, "validate", last)
    with pytest.raises(SystemExit) as leaving:
        train(tiny_config(), tmp_path / "run", progress=False)
    assert leaving.value.code == 143
    monkeypatch.undo()
    assert not (tmp_path / "run" / "summary.json").exists()
    train(tiny_config(), tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run") == straight


def test_a_finished_run_is_returned_at_once(tmp_path, monkeypatch):
    summary = train(tiny_config(epochs=1), tmp_path / "run", progress=False)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    monkeypatch.setattr(Learner, "update", None)
    assert train(tiny_config(epochs=1), tmp_path / "run", progress=False) == summary
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_another_configuration_in_the_directory_is_refused(tmp_path):
    train(tiny_config(epochs=1), tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match=r"settings\.lr: 0\.5 here, 0\.001 in"):
        train(tiny_config(epochs=1, lr=0.5), tmp_path / "run", progress=False)


def test_nan_gradients_are_passed_over_and_counted(tmp_path):
    traps = tuple(range(2, 11))  # 9 in a row, one fewer than the most
    summary = train(tiny_config(epochs=5, trap="nan", trap_at=traps), tmp_path / "run", progress=False)
    assert (summary["skipped"], summary["updates"]) == (9, 6)
    rows = read_metrics(tmp_path / "run")
    assert [row["train/skipped"] for row in rows] == [2, 3, 3, 1, 0]
    assert rows[1]["train/loss"] is None
    assert rows[1]["warning"] == "train/loss is nan"
    assert all(p.isfinite().all() for p in load_policy(tmp_path / "run", "last")[0].policy.parameters())


def test_nan_gradients_leave_the_weights_unchanged():
    config = tiny_config(trap="nan", trap_at=tuple(range(1, 100)), dropout=0.0)
    task = make(seed=0, num_train=4)
    learner = Learner(NormalizedPolicy(Tiny(config.settings, task.spec)), config.settings)
    before = [p.clone() for p in learner.policy.parameters()]
    with torch.no_grad():
        learner.policy.get_parameter("head.bias").zero_()
        before[-1].zero_()
    generator = torch.Generator()
    for _ in range(9):
        learner.update(next(task.train.in_order()), generator)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))
    with pytest.raises(NonFiniteError, match=r"10 updates in a row .* gradients of head\.bias"):
        learner.update(next(task.train.in_order()), generator)


def test_too_many_nan_end_the_run_and_the_checkpoint_stays(tmp_path):
    config = tiny_config(epochs=9, trap="nan", trap_at=tuple(range(7, 100)))
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"gradients of body\.0\.weight|gradients of head\.bias"):
            train(config, tmp_path / "run", progress=False)
    assert load_policy(tmp_path / "run", "last")[0].policy.get_buffer("calls") >= 6


def test_only_the_trainable_parameters_move(tmp_path):
    task = make(seed=0, num_train=8)
    config = Alternating.Config(optimizer="adamw", weight_decay=0.5)
    learner = Learner(NormalizedPolicy(Alternating(config, task.spec)), config)
    for _ in range(4):
        before = {n: p.clone() for n, p in learner.policy.named_parameters()}
        learner.update(next(task.train.in_order()), torch.Generator())
        learner.update(next(task.train.in_order()), torch.Generator())
        moved = {n.partition(".")[0] for n, p in learner.policy.named_parameters() if not torch.equal(before[n], p)}
        assert moved == {"odd" if learner.train_state.epoch % 2 else "even"}
        learner.close_epoch()


def test_clipping_shortens_to_the_norm():
    task = make(seed=0, num_train=8)
    settings = tiny_config(clip_norm=1e-3, dropout=0.0).settings
    learner = Learner(NormalizedPolicy(Tiny(settings, task.spec)), settings)
    learner.update(next(task.train.in_order()), torch.Generator())
    gradients = [p.grad for p in learner.policy.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(1e-3, rel=1e-2)
    assert learner.averages.read()["grad_norm"] > 1e-3


def test_a_loss_without_a_graph_is_named():
    task = make(seed=0, num_train=8)
    learner = Learner(NormalizedPolicy(Tiny(tiny_config().settings, task.spec)), tiny_config().settings)
    learner.policy.requires_grad_(False)
    with pytest.raises(ObjectiveError, match="depends on no parameter"):
        learner.update(next(task.train.in_order()), torch.Generator())


@pytest.mark.parametrize(("name", "kind"), [("adam", "Adam"), ("adamw", "AdamW"), ("rmsprop", "RMSprop")])
def test_optimisers(name, kind):
    made = make_optimizer([torch.zeros(1, requires_grad=True)], tiny_config(optimizer=name, lr=0.5).settings)
    assert type(made).__name__ == kind
    assert made.param_groups[0]["lr"] == 0.5


def test_validation_error_is_the_mean_over_everything():
    task = make(seed=0, num_train=2000)
    policy = NormalizedPolicy(Tiny(tiny_config(hidden=(4,)).settings, task.spec).eval())
    plans = policy.act(state_obs(task.train.obs), generator=torch.Generator())
    expected = (plans - task.train.actions).square().mean().item()
    assert validation_error(policy, task.train, torch.Generator()) == pytest.approx(expected, rel=1e-5)


def test_a_full_disk_ends_with_a_typed_error_and_the_run_can_go_on(tmp_path, straight):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # too little for a checkpoint
    try:
        with pytest.raises(CheckpointError, match="free space|Free space"):
            train(tiny_config(), tmp_path / "run", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "run").rglob("*.tmp"))
    train(tiny_config(), tmp_path / "run", progress=False)
    assert outcome(tmp_path / "run") == straight


def test_a_policy_is_loaded_from_an_unfinished_run(tmp_path):
    config = tiny_config(trap="term", trap_at=(5,), trap_file=str(tmp_path / "sprung"))
    with pytest.raises(SystemExit):
        train(config, tmp_path / "run", progress=False)
    policy, read = load_policy(tmp_path / "run", "last")
    assert read.settings == config.settings
    assert policy.policy.get_buffer("calls") == 5
    assert not policy.policy.training


def test_damaged_exports_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="directory of a run"):
        load_policy(tmp_path)
    train(tiny_config(epochs=1), tmp_path / "run", progress=False)
    export = tmp_path / "run" / "policy.pt"
    content = bytearray(export.read_bytes())
    content[len(content) // 2] ^= 1
    export.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        load_policy(tmp_path / "run")
    export.with_name("policy.pt.sha256").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_policy(tmp_path / "run")
    export.unlink()
    load_policy(tmp_path / "run")


def test_a_policy_of_the_package_trains_too(tmp_path):
    summary = train(tiny_config(policy="bc", epochs=2), tmp_path / "run", progress=True)
    assert summary["epochs"] == 2

import json
import os
import resource
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, ConfigDict, field_validator

from difftori.errors import CheckpointError, ConfigError, DataError
from difftori.runs.process import StopSignal
from difftori.runs.records import current_config, read_config, read_metrics, read_summary
from difftori.runs.run import Run, seeded


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    lr: float = 0.1


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int = 0
    name: str = "é"
    inner: Inner = Inner()


class Unstable(Settings):
    """Reads back as another value."""

    @field_validator("name")
    @classmethod
    def _grow(cls, name: str) -> str:
        return name + "!"


def opened(path, config=None, *, seed: int = 0) -> Run:
    return Run(path, config or Settings(), seed=seed, threads=1, device="cpu")


def test_a_directory_explains_itself(tmp_path):
    with opened(tmp_path / "deep" / "run") as run:
        run.log(1, {"loss": 2.0})
        run.log(2, {"loss": 1.0, "count": 3})
        run.save(2, {"x": 1})
        assert not run.finished
        run.finish({"cost": 1.5, "bad": float("nan")})
        assert run.finished
    names = set(os.listdir(run.path))
    expected = (
        "config.yaml versions.json command.txt metrics.jsonl tensorboard checkpoints summary.json report.html run.lock"
    )
    assert names == set(expected.split())
    assert read_config(run.path) == {"seed": 0, "name": "é", "inner": {"lr": 0.1}}
    versions = json.loads((run.path / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert {"python", "numpy", "difftori", "git_commit", "threads", "cpu", "device"} <= versions.keys()
    assert (run.path / "command.txt").read_text().rstrip().endswith(shlex.join(sys.argv))
    assert [r["loss"] for r in read_metrics(run.path)] == [2.0, 1.0]
    summary = read_summary(run.path)
    assert summary["cost"] == 1.5
    assert summary["bad"] != summary["bad"]
    events = list((run.path / "tensorboard").iterdir())
    assert len(events) == 1
    assert b"loss" in events[0].read_bytes()


def test_nan_is_logged_as_null_with_a_warning(tmp_path, caplog):
    with opened(tmp_path / "run") as run:
        run.log(1, {"good": 1.0, "bad": float("nan"), "worse": float("-inf")})
    (row,) = read_metrics(run.path)
    assert row["good"] == 1.0
    assert row["bad"] is None
    assert row["worse"] is None
    assert row["warning"] == "bad is nan; worse is -inf"
    assert "bad is nan" in caplog.text
    assert "NaN" not in (run.path / "metrics.jsonl").read_text()


def test_the_logs_own_names_are_refused(tmp_path):
    with opened(tmp_path / "run") as run, pytest.raises(DataError, match="step"):
        run.log(1, {"step": 1.0})


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path):
    with opened(tmp_path / "run") as run:
        for step in range(1, 6):
            run.log(step, {"x": float(step)})
            if step == 3:
                run.save(step, {"x": step})
    with (run.path / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 6, "x"')  # a kill cut it short
    with opened(tmp_path / "run") as run:
        found = run.restore()
        assert found is not None
        assert (found.step, found.state) == (3, {"x": 3})
        run.log(4, {"x": 44.0})
    assert [r["x"] for r in read_metrics(run.path)] == [1, 2, 3, 44]
    assert len((run.path / "command.txt").read_text().splitlines()) == 2


def test_without_a_checkpoint_a_run_starts_again(tmp_path):
    with opened(tmp_path / "run") as run:
        run.log(1, {"x": 1.0})
    with opened(tmp_path / "run") as run:
        assert run.restore() is None
    assert read_metrics(run.path) == []


def test_with_only_damaged_checkpoints_nothing_is_overwritten(tmp_path):
    with opened(tmp_path / "run") as run:
        run.log(1, {"x": 1.0})
        run.save(1, {})
    (run.path / "checkpoints" / "step-1" / "MANIFEST.json").unlink()
    for _ in range(2):
        with opened(tmp_path / "run") as run, pytest.raises(CheckpointError, match="no valid checkpoint"):
            run.restore()
    assert len(read_metrics(run.path)) == 1


def test_a_faulty_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path)


def test_all_generators_go_on_where_they_were(tmp_path):
    def draw(run):
        return [torch.rand(3), torch.rand(3, generator=run.generator("a")), torch.rand(3, generator=run.generator("b"))]

    with opened(tmp_path / "run") as run:
        first = draw(run)
        run.save(1, {})
        expected = draw(run)
    for name_first in (True, False):  # generators made before and after `restore`
        with opened(tmp_path / "run") as run:
            again = draw(run) if name_first else first
            run.restore()
            assert all(torch.equal(x, y) for x, y in zip(draw(run), expected, strict=True))
            assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
    assert not torch.equal(first[1], first[2])
    assert torch.equal(seeded(0, "a").get_state(), seeded(0, "a").get_state())
    assert seeded(0, "a").initial_seed() != seeded(1, "a").initial_seed()


def test_torch_is_left_as_it_was(tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    with Run(tmp_path / "run", Settings(), seed=3, threads=threads + 1, device="cpu"):
        assert torch.get_num_threads() == threads + 1
        assert not torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_another_configuration_is_refused_naming_the_keys(tmp_path):
    opened(tmp_path / "run").close()
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path / "run", Settings(seed=1, inner=Inner(lr=0.2)))
    assert [f.partition(":")[0] for f in caught.value.faults] == ["inner.lr", "seed", "out"]
    assert "0.2 here, 0.1 in" in caught.value.faults[0]


def test_a_setting_that_an_older_run_lacks_counts_as_its_default(tmp_path):
    run = opened(tmp_path / "run")
    run.close()
    (run.path / "config.yaml").write_text("seed: 0\n")
    opened(tmp_path / "run").close()
    with pytest.raises(ConfigError, match=r"inner\.lr"):
        opened(tmp_path / "run", Settings(inner=Inner(lr=0.2)))


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\x00"])
def test_a_damaged_configuration_is_named(tmp_path, content):
    run = opened(tmp_path / "run")
    run.close()
    (run.path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        opened(tmp_path / "run")


def test_a_directory_in_use_or_of_another_kind_is_refused(tmp_path):
    with opened(tmp_path / "run"), pytest.raises(ConfigError, match="in use"):
        opened(tmp_path / "run")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"contains thesis\.tex"):
        opened(tmp_path / "papers")
    assert os.listdir(tmp_path / "papers") == ["thesis.tex"]
    with pytest.raises(ConfigError, match="cannot be a run directory"):
        opened(tmp_path / "papers" / "thesis.tex")


def test_a_refused_run_leaves_no_directory(tmp_path):
    (tmp_path / "kept").mkdir()
    for place in ("run", "new/deep/run", "kept/run"):
        with pytest.raises(DataError), opened(tmp_path / place):
            raise DataError("the demonstrations are missing")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["kept"]
    with pytest.raises(ConfigError, match="reads back"):
        opened(tmp_path / "run", Unstable())
    assert not (tmp_path / "run").exists()


def test_a_run_that_was_there_before_or_has_begun_stays(tmp_path):
    opened(tmp_path / "run").close()
    before = sorted(os.listdir(tmp_path / "run"))
    with pytest.raises(DataError), opened(tmp_path / "run"):
        raise DataError("x")
    assert sorted(os.listdir(tmp_path / "run")) == before
    for name in ("logged", "saved", "stopped"):
        with pytest.raises((DataError, SystemExit)), opened(tmp_path / name) as run:  # noqa: PT012
            if name == "stopped":
                raise SystemExit(143)
            _ = run.log(1, {"loss": 1.0}) if name == "logged" else run.save(1, {})
            raise DataError("x")
        assert (tmp_path / name / "config.yaml").exists()


def test_a_directory_in_use_is_not_removed_by_a_second_start(tmp_path, monkeypatch):
    with opened(tmp_path / "run"):
        there = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: path != tmp_path / "run" and there(path))  # as just before
        with pytest.raises(ConfigError, match="in use"):
            opened(tmp_path / "run")
        monkeypatch.undo()
        assert (tmp_path / "run" / "config.yaml").exists()


def test_a_creation_cut_short_is_begun_again(tmp_path):
    run = opened(tmp_path / "run")
    run.close()
    (run.path / "config.yaml").unlink()
    opened(tmp_path / "run").close()
    assert read_config(run.path)["seed"] == 0


def test_a_change_of_versions_is_noted_and_warned_of(tmp_path, caplog):
    run = opened(tmp_path / "run")
    run.close()
    record = run.path / "versions.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"torch": "1.0"}))
    opened(tmp_path / "run").close()
    assert "torch 1.0 →" in caplog.text
    versions = json.loads(record.read_text())
    assert versions["torch"] == torch.__version__
    assert [v["torch"] for v in versions["earlier"]] == ["1.0"]


def log_much(run: Run) -> None:
    for step in range(100):
        run.log(step, {"x": 1.0})


def test_a_full_disk_is_a_typed_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path / "run") as run:
        run.log(1, {"x": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(CheckpointError, match="free space"):
                log_much(run)
            with pytest.raises(CheckpointError, match="free space"):
                run.finish({"x": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not run.finished
    assert len(read_metrics(run.path)) > 3


@pytest.fixture
def usual_ctrl_c():
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_ctrl_c")
def test_signals_set_a_flag_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(SystemExit) as caught:
            stop.leave()
        assert caught.value.code == 143
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as caught:
            stop.leave()
        assert caught.value.code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_closed_terminal_saves_and_nohup_goes_on(monkeypatch):
    for handler, requested in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with StopSignal() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.requested is requested
            assert signal.getsignal(signal.SIGHUP) == handler
        finally:
            signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_signals_are_left_alone():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_configuration_of_an_earlier_version_is_read_with_todays_names():
    """Options have other names now, and settings that an agent never used are gone; a setting that had an effect stays."""
    old = {"policy": "bc", "observe": 2, "execute": 8, "settings": {"pictures": {"crop": 76}, "samples": 3}}
    assert current_config(old) == {
        "policy": "bc",
        "n_obs_steps": 2,
        "n_action_steps": 8,
        "settings": {"images": {"crop": 76}, "samples": 3},
    }
    settings = {"samples": 512, "elites": 64, "lr": 1e-3, "obs_q_lambda": 0.0}
    assert current_config({"agent": "difftori", "settings": settings})["settings"] == {"lr": 1e-3}
    assert current_config({"agent": "tdmpc", "settings": settings})["settings"] == settings
    exact = {"settings": {"precision": "float32"}}  # on a CPU the default of every version, on a GPU a choice
    assert current_config(exact) == {"settings": {}}
    assert current_config({**exact, "device": "cuda"}) == {**exact, "device": "cuda"}
    kept = current_config({"agent": "difftori", "settings": {"obs_q_lambda": 1.0}})
    assert kept["settings"] == {"obs_q_lambda": 1.0}


def test_metrics_of_an_earlier_version_are_read_with_todays_names(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "judged/obs_q": 2.0, "eval/return": 3.0}\n')
    (tmp_path / "summary.json").write_text('{"decisions": 4, "return": null}')
    assert read_metrics(tmp_path) == [{"step": 1, "eval/obs_q": 2.0, "eval/return": 3.0}]
    summary = read_summary(tmp_path)
    assert summary["agent_steps"] == 4.0
    assert set(summary) == {"agent_steps", "return"}

"""Table 8's study with a cheap expert and, but for one test, without training."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console

from difftori.envs.pendulum import Pendulum, sample_starts
from difftori.experiments.paper import table8
from difftori.experiments.paper.table8 import Config, output_folder, partial_reasons
from difftori.experiments.paper.table8_report import Evaluation, summarise
from difftori.il import pendulum_task
from difftori.policies.bc import BC, BCConfig
from difftori.policies.normalized import NormalizedPolicy
from difftori.types import Plans, States


def push_upright(problem: Pendulum, starts: States) -> Plans:
    """A stand-in for the expert: a linear controller in closed loop."""
    state, controls = starts, []
    for _ in range(problem.horizon):
        controls.append((-6 * state[:, 1:2] - 2 * state[:, 2:3]).clamp(-2, 2))
        state = problem.step(state, controls[-1])
    return torch.stack(controls, dim=1)


def write_run(folder: Path, *, epochs: int) -> dict[str, float]:
    """Leaves what `train` leaves, as far as the study reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 4 * e, "epoch": float(e), "validation/error": 1 / e, "time": 0.0} for e in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "versions.json").write_text(json.dumps({"threads": 1, "cpu": "a processor", "platform": "a system"}))
    (folder / "command.txt").write_text("2026-01-01T00:00:00  difftori study table8\n")
    summary = {"epochs": float(epochs), "updates": 4.0 * epochs, "seconds": 2.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    return summary


@pytest.fixture
def cheap_expert(monkeypatch):
    monkeypatch.setattr(table8, "expert_plans", push_upright)
    monkeypatch.setattr(pendulum_task, "expert_plans", push_upright)


@pytest.fixture
def trainings(monkeypatch, cheap_expert) -> list[Path]:
    """Replaces training by files, and the trained policies by fresh ones; lists the folders that were asked for."""
    asked = []

    def train(config, out, *, progress):
        if (out / "summary.json").exists():
            return json.loads((out / "summary.json").read_text())
        asked.append(out)
        return write_run(out, epochs=config.settings.epochs)

    def load_policy(run_dir, which):
        assert which == "best"
        torch.manual_seed(int(run_dir.name[-1]))
        return NormalizedPolicy(BC(BCConfig(hidden=(8,)), Pendulum().spec)), None

    monkeypatch.setattr(table8, "train", train)
    monkeypatch.setattr(table8, "load_policy", load_policy)
    return asked


@pytest.fixture
def small(tmp_path) -> Callable[..., Config]:
    def build(**values) -> Config:
        given = {"methods": ("expert", "bc", "lstm"), "seeds": 2, "epochs": 3, "test_starts": 20, **values}
        return Config(out=tmp_path / "out", runs=tmp_path / "runs", **given)

    return build


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_output_is_written_and_labelled(trainings, small, capsys):
    config = small()
    table8.run(config)
    assert {p.name for p in output_folder(config).iterdir()} == {
        "seeds.csv",
        "summary.csv",
        "summary.md",
        "learning_curves.svg",
        "phase_plane.svg",
    }
    seeds = lines(output_folder(config) / "seeds.csv")
    assert [(row["setting"], row["method"], row["seed"]) for row in seeds] == [
        (setting, method, seed)
        for setting in ("no-damping", "damping")
        for method in ("expert", "bc", "lstm")
        for seed in "01"
    ]
    assert all(row["label"].startswith("partial (3 epochs, 2 of 3 seeds, 20 of 1000") for row in seeds)
    assert seeds[2]["command"].endswith("difftori study table8")
    assert (seeds[2]["epochs"], seeds[2]["updates"], seeds[2]["seconds"]) == ("3", "12", "2.5")
    text = (output_folder(config) / "summary.md").read_text()
    assert "PARTIAL RUN" in text
    assert "15.962 ± 0.164" in text
    assert "partial" in capsys.readouterr().out
    for image in ("learning_curves.svg", "phase_plane.svg"):
        assert "partial run" in (output_folder(config) / image).read_text()


def test_numbers_agree_with_each_other(trainings, small):
    config = small()
    table8.run(config)
    for row in lines(output_folder(config) / "seeds.csv"):
        names = ("cost", "expert", "ratio", "difference", "low", "high")
        values = {name: float(row[name]) for name in row if name.startswith(names)}
        assert values["ratio_common"] == pytest.approx(values["cost_common"] / values["expert_common"], rel=1e-4)
        gap = values["cost_common"] - values["expert_common"]
        assert values["difference"] == pytest.approx(gap, abs=2e-3)
        assert values["low"] <= values["difference"] <= values["high"]
        if row["method"] == "expert":
            assert (values["ratio_test"], values["difference"], row["control_mse_common"]) == (1, 0, "0")


def test_common_starts_are_common_and_test_starts_differ_by_seed(trainings, small):
    config = small(methods=("expert",))
    table8.run(config)
    first, second = lines(output_folder(config) / "seeds.csv")[:2]
    assert first["cost_common"] == second["cost_common"]
    assert first["cost_test"] != second["cost_test"]
    assert not (output_folder(config) / "learning_curves.svg").exists()


def test_finished_runs_are_not_repeated(trainings, small):
    table8.run(small(methods=("bc",), settings=("damping",)))
    assert len(trainings) == 2
    table8.run(small(methods=("bc",), settings=("damping",), seeds=3))
    assert len(trainings) == 3
    assert len(set(trainings)) == 3


def test_shortened_trainings_have_folders_of_their_own(trainings, small):
    for values in ({"epochs": 2}, {"epochs": None}, {"epochs": None, "quick": True}, {"num_train": 50}):
        table8.run(small(methods=("bc",), settings=("damping",), seeds=1, **values))
    assert len({folder.parent for folder in trainings}) == 4


def test_images_and_tables_repeat_byte_by_byte(trainings, small):
    config = small(settings=("damping",))
    table8.run(config)
    before = {path.name: path.read_bytes() for path in output_folder(config).iterdir()}
    table8.run(config)
    assert before == {path.name: path.read_bytes() for path in output_folder(config).iterdir()}


def test_the_summary_averages_starts_over_seeds_before_its_interval(trainings, small):
    config = small()
    bench = table8._bench("damping", 50, (1,))
    costs = [bench.costs + shift for shift in (0.5, 1.5)]
    base = table8._evaluate(config, "bc", 0, None, bench, bench).result
    (row,) = summarise([Evaluation(base, cost, bench.costs) for cost in costs])
    assert row.seeds == 2
    assert (row.difference.value, row.difference.low, row.difference.high) == pytest.approx((1.0, 1.0, 1.0))
    assert row.common_ratio.value == pytest.approx((bench.costs.mean() + 1) / bench.costs.mean())
    assert row.paper_mean is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"quick": True}, "quick"),
        ({"epochs": 9}, "9 epochs"),
        ({"seeds": 2}, "2 of 3 seeds"),
        ({"test_starts": 999}, "999 of 1000"),
        ({"num_train": 50}, "50 of 100"),
        ({"methods": ("bc",)}, "not every method"),
        ({"settings": ("damping",)}, "not every setting"),
    ],
)
def test_anything_less_than_the_full_study_is_partial(values, reason):
    assert partial_reasons(Config()) == []
    assert output_folder(Config(**values)) != output_folder(Config())
    assert any(reason in found for found in partial_reasons(Config(**values)))


@pytest.mark.parametrize("values", [{"methods": ("nothing",)}, {"seeds": 0}, {"epoch": 3}, {"test_starts": 1}])
def test_faulty_configurations_are_refused(values):
    with pytest.raises(ValidationError):
        Config(**values)


def test_evaluated_starts_are_apart_from_training_starts():
    streams = [np.random.default_rng(seed) for seed in range(3)]
    streams += [np.random.default_rng(table8.COMMON_STREAM), np.random.default_rng(table8.SHOWN_STREAM)]
    streams += [np.random.default_rng((*table8.TEST_STREAM, seed)) for seed in range(3)]
    drawn = torch.cat([sample_starts(110, stream) for stream in streams])
    assert len(drawn.unique(dim=0)) == len(drawn)


def test_the_real_trainer_leaves_what_the_study_reads(cheap_expert, small):
    config = small(methods=("bc",), settings=("no-damping",), seeds=1, epochs=10, num_train=8)
    trained = table8._trained(config, "no-damping", "bc", 0, Console(quiet=True))
    assert (trained.epochs, trained.updates, trained.threads) == (10, 10, 1)
    assert trained.curve.epochs.tolist() == [5, 10]
    assert np.isfinite(trained.curve.values).all()
    assert trained.seconds > 0


def test_no_seed_trains_on_the_starts_that_are_evaluated():
    common = sample_starts(50, np.random.default_rng(table8.COMMON_STREAM))
    for seed in range(table8.MOST_SEEDS):
        test = sample_starts(50, np.random.default_rng((*table8.TEST_STREAM, seed)))
        for stream in (0, 1):  # as pendulum_task draws training and validation
            drawn = sample_starts(50, np.random.default_rng([seed, stream]))
            assert not bool((drawn[:, None] == torch.cat((common, test))).all(-1).any())
    assert torch.equal(sample_starts(50, np.random.default_rng([table8.MOST_SEEDS, 0])), common)
    with pytest.raises(ValidationError, match="seeds"):
        Config(seeds=table8.MOST_SEEDS + 1)

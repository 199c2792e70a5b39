"""Studies of reinforcement learning on made-up runs: what is read, what is compared, what is written."""

import json
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from difftori.cli import main
from difftori.errors import ConfigError, DataError
from difftori.experiments import pool
from difftori.experiments.diagnostics import diagnostics, diagnostics_table
from difftori.experiments.paper import figure3, figure5, figure6, figure7, mismatch_latent
from difftori.experiments.rl_study import plan_runs
from difftori.experiments.rl_tables import (
    ALL_TASKS,
    OURS,
    aggregates,
    block,
    compared_steps,
    differences,
    seed_results,
    summarise,
)
from difftori.paper.curves import published_curves
from tests.support.fabricated import write_run
from tests.support.rl_studies import ALL, PAIR, curves_of, fill, lines, record_file, result_of, small_study


@pytest.fixture
def small(tmp_path):
    return partial(small_study, tmp_path)


def test_figure_3_names_the_agents_that_it_leaves_out(small):
    config = small(methods=("tdmpc", "sac"))
    fill(config, [figure3.METHODS[name] for name in config.methods], lambda run: 500.0)
    figure3.run(config)
    out = config.out / "figure3" / "partial" / "state-paper-50000"
    assert {row["method"] for row in lines(out / "seeds.csv")} == {"tdmpc", "sac"}
    assert "without difftori, drqv2" in (out / "summary.md").read_text()


def test_a_record_is_read_from_the_log(small):
    run = plan_runs(small(), PAIR)[0]
    write_run(run, end=500.0)
    result = result_of(run)
    assert result.steps.tolist() == [0, 20_000, 40_000, 50_000]
    assert result.returns.tolist() == pytest.approx([0, 200, 400, 500])
    assert result.seconds.tolist() == pytest.approx([0, 300, 600, 750])
    assert result.area == pytest.approx(275)
    assert (result.at(40_000), result.at(30_000)) == (pytest.approx(400), None)
    assert result.record.hardware == "a processor, 1 thread(s), a system"


def test_a_late_evaluation_counts_for_its_place_on_the_grid(small):
    run = plan_runs(small(), PAIR)[0]
    write_run(run, end=500.0)
    log = run.spec.folder / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 20000', '"step": 20800').replace('"step": 50000', '"step": 50008'))
    assert result_of(run).steps.tolist() == [0, 20_000, 40_000, 50_000]


def test_a_return_that_is_no_number_is_refused(small):
    run = plan_runs(small(), PAIR)[0]
    write_run(run, end=500.0)
    log = run.spec.folder / "metrics.jsonl"
    log.write_text(log.read_text().replace('"eval/return": 200.0', '"eval/return": null'))
    with pytest.raises(DataError, match="step 20000"):
        _ = result_of(run).returns


def test_finished_runs_are_recorded_and_drawn_from_records_elsewhere(small, tmp_path):
    config = small()
    fill(config, PAIR, lambda run: None if run.seed and run.task == "cup-catch" else 321.0)
    write_run(plan_runs(config, PAIR)[4], end=5.0, until=20_000)
    here = curves_of(config)
    (tmp_path / "runs").rename(tmp_path / "left behind")
    elsewhere = curves_of(config)
    finished = [row for row in seed_results(here) if row.finished]
    assert len(finished) == 6
    assert seed_results(elsewhere) == finished
    file = record_file(config).path
    assert file.stat().st_size < 6 * 3500

    write_run(plan_runs(config, PAIR)[0], end=322.0)
    with pytest.raises(
        ConfigError, match=r"different runs of cup-catch, difftori, seed 0. Fix: remove the invalid one"
    ):
        curves_of(config)
    shutil.rmtree(tmp_path / "runs")
    text = file.read_text()
    file.write_text(text.replace('"horizon": 5', '"horizon": 4'))
    with pytest.raises(ConfigError, match=r"horizon: 5 requested, 4 in .*jsonl, cup-catch/.*/seed-0"):
        curves_of(config)
    file.write_text(text[:100] + "\n")
    with pytest.raises(DataError, match="line 1: not a valid record"):
        curves_of(config)


def test_diagnostics_are_medians_of_the_second_half(small):
    config = small(tasks=("cup-catch",), seeds=2)
    fill(config, PAIR[:1], lambda run: 10.0)
    for seed, run in enumerate(plan_runs(config, PAIR[:1])):
        log = run.spec.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        for row in rows:
            if "eval/return" in row and row["step"]:
                gain = row["step"] / 1000 + seed
                row |= {"eval/obs_q": gain, "eval/discounted_return": 10.0, "eval/obs_q_correlation": 0.5}
                row |= {"diagnosis/gain": gain, "diagnosis/free": 0.4, "diagnosis/valid": 0.3}
                for name, value in (("encoder", 1.0), ("dynamics", 2.0), ("reward", 4.0), ("q", 8.0)):
                    row |= {f"diagnosis/ratio/{name}": value, f"diagnosis/cosine/{name}": value / 10}
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = diagnostics(curves_of(config, PAIR[:1]))
    assert (found.task, found.method, found.runs) == ("cup-catch", "difftori", 2)
    assert found.gain == pytest.approx(45.5)  # of 40, 50 and 41, 51
    assert found.value_over_return == pytest.approx(4.55)
    assert (found.correlation, found.free, found.strict) == pytest.approx((0.5, 0.4, 0.3))
    assert (found.norm_ratio, found.cosine) == pytest.approx((3.0, 0.3))
    assert "+45.500" in diagnostics_table([found])


def test_ours_and_published_are_compared_at_the_same_steps_only(small):
    config = small(tasks=("cup-catch",))
    fill(config, PAIR, lambda run: {"difftori": 800.0, "tdmpc": 400.0}[run.method.label] + 10 * run.seed)
    curves = curves_of(config)
    published = [curve for curve in published_curves("state") if curve.task == "cup-catch"]
    assert compared_steps(curves, "cup-catch", published) == [40_000, 50_000]
    rows = summarise(curves)
    assert {(row.steps, row.method) for row in rows} == {
        (40_000, "difftori"),
        (40_000, "tdmpc"),
        (40_000, "TD-MPC"),
        (50_000, "difftori"),
        (50_000, "tdmpc"),
    }
    last = next(row for row in rows if row.steps == 50_000 and row.method == "difftori")
    assert (last.mean.value, last.seeds, last.origin) == (805, 2, OURS)
    # Student, one degree of freedom: 12.706 · (10/√2)/√2
    assert last.mean.high - last.mean.value == pytest.approx(12.7062 * 5, rel=1e-4)
    tdmpc = next(row for row in rows if row.method == "TD-MPC")
    curve = next(curve for curve in published if curve.method == "TD-MPC")
    assert tdmpc.mean.value == pytest.approx(curve.at(40_000).mean())
    assert (tdmpc.seeds, tdmpc.label) == (5, "published")


def test_an_unfinished_run_is_drawn_but_not_averaged_over_tasks(small):
    config = small()
    for run in plan_runs(config, PAIR):
        stopped = run.task == "walker-walk" and run.method.label == "tdmpc" and run.seed == 1
        write_run(run, end=600.0, until=20_000 if stopped else None)
    curves = curves_of(config)
    assert curves.reasons[-1] == "7 of 8 runs finished"
    assert block(curves)[1] == {"cup-catch": [0, 1], "walker-walk": [0]}
    last = [row for row in aggregates(curves) if row.steps == 50_000 and row.origin == OURS]
    assert [(row.tasks, row.runs, row.mean.value) for row in last] == [(2, 3, pytest.approx(0.6))] * 2
    assert not any(row.mean.bounded for row in last)  # one seed of a task has no spread
    assert [row.finished for row in seed_results(curves)].count(False) == 1


def test_published_methods_are_averaged_over_exactly_our_tasks(small):
    config = small(tasks=("cup-catch", "walker-stand"), steps=100_000)
    fill(config, PAIR, lambda run: 500.0)
    methods = {row.method for row in aggregates(curves_of(config)) if row.origin != OURS}
    assert "TD-MPC2" in methods
    assert "TD-MPC" not in methods  # it has no curve of walker-stand from states


def test_differences_are_paired_by_task_and_seed(small):
    config = small(figure5.Config, forms=("per-episode",))
    gain = {("cup-catch", 0): 10.0, ("cup-catch", 1): 20.0, ("walker-walk", 0): 40.0, ("walker-walk", 1): 40.0}
    methods = [figure5.FORMS["off"], figure5.FORMS["per-episode"]]
    fill(config, methods, lambda run: 300.0 + 200 * run.seed + (run.method.label != "off") * gain[run.task, run.seed])
    rows = [row for row in differences(curves_of(config, methods), "off") if row.measure == "final"]
    assert [(row.task, row.pairs) for row in rows] == [("cup-catch", 2), ("walker-walk", 2), (ALL_TASKS, 4)]
    assert [row.value.value for row in rows] == pytest.approx([15, 40, 27.5])
    assert (rows[1].value.low, rows[1].value.high) == (pytest.approx(40), pytest.approx(40))
    assert rows[2].value.low == pytest.approx(25)  # the worst resample takes cup-catch's lower seed twice
    assert rows[2].value.high == pytest.approx(30)


@pytest.mark.parametrize(
    ("study", "files"),
    [
        (figure3, {"tasks.svg", "all_tasks.svg"}),
        (figure5, {"tasks.svg", "differences.svg", "differences.csv"}),
        (figure6, {"tasks.svg", "differences.svg", "differences.csv"}),
        (figure7, {"wall_clock.svg", "timing.csv"}),
    ],
)
def test_every_output_is_written_and_labelled(study, files, small, capsys):
    config = small(study.Config)
    forms = [figure5.FORMS[name] for name in figure5.FULL_FORMS]
    methods = {figure3: ALL, figure5: forms, figure6: figure6.METHODS}.get(study, PAIR)
    fill(config, methods, lambda run: 500.0 + 10 * run.seed + len(run.method.label))
    study.run(config)
    out = config.out / study.__name__.rpartition(".")[2] / "partial" / "state-paper-50000"
    common = {"seeds.csv", "curves.csv", "summary.csv", "aggregate.csv", "summary.md"}
    assert {path.name for path in out.iterdir()} == common | files
    assert "PARTIAL STUDY: states instead of pixels" in (out / "summary.md").read_text()
    assert all("partial study" in path.read_text() for path in out.glob("*.svg"))
    seeds = lines(out / "seeds.csv")
    assert len(seeds) == 4 * len(methods)
    assert seeds[0]["command"].startswith(
        "difftori train difftori --env dmc:cup-catch --obs state --steps 50000 --seed 0"
    )
    assert len(lines(out / "curves.csv")) == 4 * len(seeds)
    assert "partial" in capsys.readouterr().out


def test_the_same_runs_give_the_same_bytes(small):
    config = small()
    fill(config, PAIR, lambda run: 500.0 + 10 * run.seed)
    figure3.run(config)
    out = config.out / "figure3" / "partial" / "state-paper-50000"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    figure3.run(config)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_times_are_compared_on_the_same_hardware(small):
    config = small(figure7.Config, tasks=("cup-catch",))
    for run in plan_runs(config, PAIR):
        other = {"cpu": "another"} if run.seed == 1 and run.method.label == "tdmpc" else {}
        write_run(run, end=1.0, pace=0.03 if run.method.label == "difftori" else 0.01, **other)
    curves = curves_of(config)
    rows = figure7.timings(curves)
    assert [row.same_hardware for row in rows] == [True, False]
    assert (rows[0].difftori_action, rows[0].tdmpc_update) == (pytest.approx(30), pytest.approx(20))
    assert [rows[0].action_ratio, rows[0].update_ratio, rows[0].step_ratio] == pytest.approx([3, 3, 3])
    assert rows[0].tdmpc_step == pytest.approx(15)


def test_the_quick_study_trains_and_again_repeats_nothing(small, capsys, monkeypatch):
    """In this process: a new one takes seconds to import torch."""
    config = small(quick=True, seeds=1, budget=None, methods=("sac",))
    monkeypatch.setattr("difftori.experiments.rl_study.QUICK_ENVS", ("probe:delayed-reward",))

    def start(work, variables=None):
        status = main(list(work.words))
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({status})"])

    monkeypatch.setattr(pool, "_start", start)
    figure3.run(config)
    out = config.out / "figure3" / "partial" / "quick"
    first = (out / "curves.csv").read_text()
    assert np.isfinite([float(row["mean_return"]) for row in lines(out / "curves.csv")]).all()
    assert {row["finished"] for row in lines(out / "seeds.csv")} == {"True"}
    capsys.readouterr()
    figure3.run(config)
    assert "1 of 1 runs are finished" in capsys.readouterr().out
    assert (out / "curves.csv").read_text() == first


@pytest.mark.slow
@pytest.mark.parametrize("study", [figure3, figure5, figure6, figure7, mismatch_latent])
def test_quick_studies_run_in_processes(study, small):
    config = small(study.Config, quick=True, seeds=1, jobs=2, budget=None)
    study.run(config)
    out = config.out / study.__name__.rpartition(".")[2] / "partial" / "quick"
    assert {row["finished"] for row in lines(out / "seeds.csv")} == {"True"}

"""The map of the policy-gradient term on made-up runs: its cells, its numbers by hand, its files."""

import json
from functools import partial

import pytest

from difftori.errors import ConfigError
from difftori.experiments.paper.mismatch_latent import Config, cells_of, forms_of, run
from difftori.experiments.paper.mismatch_latent_report import Cell, advantages, cell_results, tables
from difftori.experiments.rl_study import partial_reasons, plan_runs
from difftori.experiments.rl_tables import ALL_TASKS
from tests.support.rl_studies import curves_of, fill, lines, small_study

AXES = {"latent_dims": (2, 8), "distractors": (0, 16), "forms": ("replay", "replay-flipped")}
WIDE, NARROW = Cell(8, 0, "on"), Cell(2, 16, "off")


@pytest.fixture
def small(tmp_path):
    return partial(small_study, tmp_path, Config, **AXES)


def methods(config):
    return [cell.method(form) for cell in cells_of(config) for form in forms_of(config)]


def of(cell, form, run):
    return run.method.label == cell.method(form).label


def test_the_defaults_are_the_full_study_and_all_runs_are_different():
    assert partial_reasons(Config()) == []
    assert partial_reasons(Config(tasks=("cup-catch", "cheetah-run", "walker-run"))) == []
    assert partial_reasons(Config(tasks=("walker-run",), seeds=2, action_repeat=2)) == [
        "action repeat 2",
        "2 of 8 seeds",
        "0 of 2 tasks",
    ]
    config = Config(seeds=1)
    runs = plan_runs(config, methods(config))
    assert len({run.spec.folder for run in runs}) == len(runs) == 2 * 4 * 3 * 2 * 5
    assert len({str(run.config) for run in runs}) == len(runs)


def test_a_run_has_the_settings_of_its_cell(small):
    config = small(seeds=1, tasks=("cup-catch",))
    found = {run.method.label: run for run in plan_runs(config, methods(config))}
    assert len(found) == 2 * 2 * 2 * 3
    narrow, wide = (found[cell.method("replay-flipped").label].config for cell in (NARROW, WIDE))
    assert (narrow.distractors, narrow.settings.latent_dim, narrow.settings.reward_shapes_latent) == (16, 2, False)
    assert (wide.distractors, wide.settings.latent_dim, wide.settings.reward_shapes_latent) == (0, 8, True)
    assert (wide.settings.pg, wide.settings.pg_coef, wide.settings.width) == ("replay", -1.0, 64)
    assert "--distractors 16" in " ".join(found[NARROW.method("off").label].spec.words)


def test_the_quick_study_has_few_cells_except_where_they_are_chosen():
    assert len(cells_of(Config(quick=True))) == 2
    assert len(cells_of(Config(quick=True, latent_dims=(2, 3)))) == 4
    assert len(cells_of(Config(latent_dims=(2, 2, 2)))) == 6
    assert forms_of(Config(quick=True, forms=("per-episode", "off"))) == ["off", "per-episode"]


def test_images_are_refused_before_any_run(small):
    with pytest.raises(ConfigError, match="images take none"):
        plan_runs(config := small(obs="pixels"), methods(config))


def test_differences_are_those_within_a_cell(small):
    config = small()
    fill(config, methods(config), end_return)
    curves = curves_of(config, methods(config))
    rows = advantages(curves, cells_of(config), forms_of(config))
    assert len(rows) == 3 * 8 * 2 * 2  # tasks and all of them, cells, forms, measures
    found = {(row.task, row.cell, row.form): row for row in rows if row.measure == "final"}
    assert found["cup-catch", NARROW, "replay"].value.value == pytest.approx(45)  # of 40 and 50
    # Student, one degree of freedom: 12.706 · (10/√2)/√2
    assert found["cup-catch", NARROW, "replay"].value.high == pytest.approx(45 + 12.7062 * 5, rel=1e-4)
    assert found["cup-catch", NARROW, "replay-flipped"].value.value == pytest.approx(-30)
    assert found["walker-walk", NARROW, "replay"].value.value == pytest.approx(5)
    assert found[ALL_TASKS, NARROW, "replay"].value.value == pytest.approx(25)
    assert all(row.value.value == 0 for (_, cell, _), row in found.items() if cell != NARROW)


def end_return(run):
    """The term pays in the narrow cell only, and on cup-catch more than on walker-walk."""
    gain = 0.0
    if run.task == "cup-catch":
        gain = (40.0 + 10 * run.seed) * of(NARROW, "replay", run) - 30.0 * of(NARROW, "replay-flipped", run)
    elif of(NARROW, "replay", run):
        gain = 10.0 * run.seed
    return 300.0 + 20 * run.seed + gain


def test_a_cell_has_the_medians_of_its_runs(small):
    config = small(tasks=("cup-catch",))
    fill(config, methods(config), end_return)
    for made in plan_runs(config, methods(config)):
        if not of(NARROW, "off", made):
            continue
        log = made.spec.folder / "metrics.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        for row in rows:
            if "eval/return" in row and row["step"]:
                row |= {"diagnosis/gain": row["step"] / 1000 + made.seed, "diagnosis/reward_loss": 0.25}
                row |= {"diagnosis/cosine/encoder": -0.5, "diagnosis/cosine/q": 0.125}
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = curves_of(config, methods(config))
    found = {(row.cell, row.form): row for row in cell_results(curves, cells_of(config), forms_of(config))}
    assert len(found) == 8 * 3
    off = found[NARROW, "off"]
    assert (off.runs, off.final.value) == (2, pytest.approx(310))
    assert (off.cosine_encoder, off.cosine_q, off.reward_loss, off.value_loss) == (-0.5, 0.125, 0.25, None)
    evaluated = range(config.eval_every, config.steps + 1, config.eval_every)
    assert off.gain == pytest.approx(sum(evaluated) / len(evaluated) / 1000 + 0.5)
    assert found[WIDE, "off"].cosine_encoder is None


def test_an_unfinished_run_is_no_result(small):
    config = small(tasks=("cup-catch",), seeds=1)
    fill(config, methods(config), lambda run: None if of(NARROW, "replay", run) else 100.0)
    curves, forms = curves_of(config, methods(config)), forms_of(config)
    assert len(cell_results(curves, cells_of(config), forms)) == 8 * 3 - 1
    returns, _ = tables(curves, cells_of(config), forms).values()
    shown = {column.heading: column.cells for column in returns}
    line = shown["cell"].index("2 / 16 / off")
    assert (shown["off [95 %]"][line], shown["replay − off"][line]) == ("100", "–")
    assert shown["replay-flipped − off"][line] == "+0"


def test_every_output_is_written_and_labelled(small, capsys):
    config = small(latent_dims=(2,))
    fill(config, methods(config), end_return)
    run(config)
    out = config.out / "mismatch_latent" / "partial" / "state-small-50000-repeat4"
    common = {"seeds.csv", "curves.csv", "summary.csv", "aggregate.csv", "summary.md"}
    assert {path.name for path in out.iterdir()} == common | {"cells.csv", "differences.csv", "advantage.svg"}
    page = (out / "summary.md").read_text()
    assert (
        "without latent dims 4, 8, 50, without distractors 64, without forms per-episode, per-episode-flipped" in page
    )
    assert "the paper's figure" not in page
    assert "+45 [-19, +109]" in page
    assert "partial study" in (out / "advantage.svg").read_text()
    assert {row["form"] for row in lines(out / "differences.csv")} == {"replay", "replay-flipped"}
    assert len(lines(out / "cells.csv")) == 2 * 4 * 3
    assert "diagnostics by cell" in " ".join(capsys.readouterr().out.split())

"""Studies of refinement: which runs they need and in which order, what is kept of them, and what is made of the results."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from difftori.config import overlay, read_tokens
from difftori.errors import ConfigError, DataError
from difftori.experiments import il_study, sweep
from difftori.experiments.il_report import ALL, Published, differences, run_refinement, summaries, table
from difftori.experiments.il_study import Case, ILStudy, run_imitation
from difftori.experiments.paper import base_noise
from difftori.experiments.plan import RunSpec
from difftori.experiments.pool import Failure
from difftori.experiments.records import Record, RecordFile
from difftori.experiments.study import Method, Result, Results, StudyRun
from difftori.runs.records import to_yaml
from difftori.trainers import trainer_of

CASES = [Case("metaworld:reach", "state", "{demos}/reach-{seed}.zarr"), Case("pusht", "pose", "{demos}/push.zarr")]
METHODS = [Method("base", "bc", {"lr": 0.001}), Method("refined", "residual", {"base_noise": 0.3}, base="base")]


def finish(run: StudyRun, success: list[float], seeds: list[int] | None = None) -> None:
    """What `difftori train` would leave, for words as the job has them."""
    options = read_tokens(list(run.spec.words[2:]))
    for name in ("out", "quiet"):
        options.pop(name)
    values = {"policy": run.method.trains}
    trainer = trainer_of(values)
    config = trainer.parse(overlay(values, options, trainer.config_type(trainer.find(run.method.trains))))
    folder = run.spec.folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "versions.json").write_text(json.dumps({"cpu": "abacus", "threads": 1, "torch": "2"}))
    (folder / "policy.pt.sha256").write_text(f"{run.spec.name.replace(' ', '-')}  policy.pt\n")
    if run.base is not None:
        (folder / "base.pt.sha256").write_bytes((run.base.spec.folder / "policy.pt.sha256").read_bytes())
    played = seeds or list(range(100_000, 100_000 + len(success)))
    columns = {"seed": played, "success": success, "score": success}
    (folder / "episodes.json").write_text(json.dumps({"last": columns}))
    summary = {"seconds": 5.0, "last/success": float(np.mean(success)), "last/validation_error": 0.1}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def config(tmp_path) -> ILStudy:
    for name in ("reach-0", "reach-1", "push"):
        (tmp_path / "demos" / f"{name}.zarr").mkdir(parents=True)
    return ILStudy(
        seeds=2, updates=7, episodes=4, demos=tmp_path / "demos", runs=tmp_path / "runs", out=tmp_path / "results"
    )


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """The waves of work that were run, by name; each leaves a finished run, but for the names in `failing`."""
    waves: list[list[str]] = []
    failing: set[str] = set()
    monkeypatch.failing = failing  # for tests that want some to fail

    def run_all(specs, *, jobs, seconds, say, done=lambda run: None, retries=0, gpus=None):
        waves.append([spec.name for spec in specs if spec.base is None or spec.base.name not in failing])
        for spec in specs:
            if "collect" in spec.words:
                spec.folder.mkdir(parents=True)
            if spec.name in failing or (spec.base is not None and spec.base.name in failing):
                continue
            if "train" in spec.words:
                by_name = {run.spec.name: run for run in everything}
                good = 1.0 if "refined" in spec.name else 0.0
                finish(by_name[spec.name], [good, 1.0, 0.0, 0.0])
            done(spec)
        return [Failure(spec, 1, "on purpose") for spec in specs if spec.name in failing], []

    everything: list[StudyRun] = []
    make = il_study.plan_runs

    def plan_runs(*given):
        found = make(*given)
        everything.extend(found)
        return found

    monkeypatch.setattr(sweep, "run_all", run_all)
    monkeypatch.setattr(il_study, "plan_runs", plan_runs)
    return waves


def record_file(config) -> RecordFile:
    return RecordFile(config.out / "runs" / "il" / "s" / "b.jsonl")


def change(config, key: str, edit=None) -> dict:
    """Edit the record of a run, or drop it; the record as it was."""
    file = record_file(config)
    plain = {line["run"]: line for line in map(json.loads, file.path.read_text().splitlines())}
    before = json.loads(json.dumps(plain[key]))
    if edit is None:
        del plain[key]
    else:
        edit(plain[key])
    file.path.write_text("".join(json.dumps(line) + "\n" for line in plain.values()))
    return before


def made(config, methods=None) -> Results:
    return run_imitation(config, CASES, methods or METHODS, study="s/b", reasons=(), say=lambda text: None)


def test_bases_come_before_what_refines_them(config, started):
    results = made(config)
    (names,) = [wave for wave in started if "refined" in str(wave)]
    assert ["base" in name for name in names] == [True] * 4 + [False] * 4
    assert len(results.runs) == 8
    assert results.label == "full"


def test_what_is_finished_is_not_run_again_and_is_read_from_records_alone(config, started, tmp_path):
    made(config)
    started.clear()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    results = made(config)
    assert not any(started)
    assert len(results.runs) == 8


def test_a_base_is_trained_again_where_what_refines_it_is_missing(config, started, tmp_path):
    made(config)
    started.clear()
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    change(config, "reach/refined/seed-1")
    made(config)
    assert [name for wave in started for name in wave] == ["reach, base, seed 1", "reach, refined, seed 1"]


def test_a_refiner_of_another_training_of_its_base_is_pointed_out(config, started, tmp_path):
    """Records of a first machine, refiners of a second one, whose processor rounds differently."""
    made(config)
    before = change(config, "reach/refined/seed-1", lambda plain: plain.update(base_weights="others"))
    assert before["base_weights"] == record_file(config).read()["reach/base/seed-1"].weights
    assert made(config).label == "partial (1 refiners of a base that was retrained)"


def test_a_failure_stops_only_what_depends_on_it(config, started, monkeypatch):
    monkeypatch.failing.add("reach, base, seed 1")
    results = made(config)
    names = [name for wave in started for name in wave]
    assert "reach, refined, seed 0" in names
    assert "reach, refined, seed 1" not in names
    assert [failure.run.name for failure in results.failures] == ["reach, base, seed 1"]
    assert results.label == "partial (6 of 8 runs finished)"


def test_runs_of_another_policy_or_default_are_refused(config, started):
    (run, *_) = made(config).runs
    key = run.run.key
    change(config, key, lambda plain: plain["config"]["settings"].update(batch_size=7))
    with pytest.raises(ConfigError, match=r"settings\.batch_size: 32 requested, 7 in"):
        made(config)
    change(config, key, lambda plain: plain["config"]["settings"].update(batch_size=32))
    change(config, key, lambda plain: plain["config"].update(demos="elsewhere/other.zarr"))
    with pytest.raises(ConfigError, match=r"data: 'reach-0\.zarr' requested, 'other\.zarr' in"):
        made(config)


def test_runs_of_other_settings_are_refused(config, started):
    made(config)
    with pytest.raises(ConfigError, match=r"base_noise: 0\.5 requested, 0\.3 in") as caught:
        made(config, [METHODS[0], Method("refined", "residual", {"base_noise": 0.5}, base="base")])
    assert "holds runs of other settings" in caught.value.faults[-1]
    with pytest.raises(ConfigError, match="updates: 9 requested, 7 in"):
        made(config.model_copy(update={"updates": 9}))


def test_data_that_cannot_be_collected_must_be_there(config, started, tmp_path):
    (tmp_path / "demos" / "push.zarr").rmdir()
    with pytest.raises(ConfigError, match=r"push\.zarr does not exist. Fix: provide the demonstrations of pusht"):
        made(config)


def test_public_data_are_fetched_where_a_base_is_to_be_trained_and_count_as_the_same(config, started, monkeypatch):
    fetched = []
    monkeypatch.setattr(il_study, "find_demos", lambda name, say: fetched.append(name))
    there = CASES[1]
    named = replace(there, demos="pusht-human")
    request = {"study": "s/b", "reasons": (), "say": lambda text: None}
    run_imitation(config, [named], METHODS, **request)
    assert set(fetched) == {"pusht-human"}
    fetched.clear()
    assert run_imitation(config, [named], METHODS, **request).label == "full"
    assert not fetched, "everything is finished"
    (config.demos / "pusht_cchi_v7_replay.zarr").mkdir()
    path = replace(there, demos="{demos}/pusht_cchi_v7_replay.zarr")
    assert run_imitation(config, [path], METHODS, **request).label == "full", "the same data by another name"


def test_demonstrations_are_collected_once_for_each_seed(started, tmp_path):
    request = base_noise.Config(
        tasks=("basketball",), seeds=2, episodes=4, demos=tmp_path, runs=tmp_path / "r", out=tmp_path / "o"
    )
    base_noise.run(request)
    assert started[0] == ["basketball, demonstrations, seed 0", "basketball, demonstrations, seed 1"]
    text = next((tmp_path / "o").rglob("summary.md")).read_text()
    assert text.startswith(
        "# Noise on the base's action in training\n\npartial (2 of 5 seeds, 4 of 50 episodes, other tasks)."
    )


def test_a_damaged_record_is_named(config, started):
    made(config)
    good = record_file(config).path.read_text()
    uneven = '"episodes": {"last": {"seed": [1], "success": [], "score": []}}, "summary": {}'
    for damage in ("{", f'{{"run": "x", {uneven}}}'):
        record_file(config).path.write_text(f"{good}{damage}\n")
        with pytest.raises(DataError, match="line 9: .* Fix: restore the line, or remove it to run again"):
            made(config)


def fabricated(rates: dict[str, list[list[float]]]) -> Results:
    """Runs of one task: method → outcomes of each seed."""
    runs = []
    for label, by_seed in rates.items():
        for seed, success in enumerate(by_seed):
            run = StudyRun("reach", Method(label, "bc"), seed, "x", RunSpec("x", (), Path("x")), None)
            columns = {"seed": list(range(len(success))), "success": success, "score": [s / 2 for s in success]}
            summary = {"seconds": 2.0, "last/validation_error": 0.5}
            record = Record({}, "", {}, "", summary, episodes={"last": columns})
            runs.append(Result(run, record))
    return Results(ILStudy(), ("reach",), tuple(Method(label, "bc") for label in rates), tuple(runs))


def test_success_is_over_all_seeds_beside_the_papers():
    results = fabricated({"base": [[0, 0, 1, 0], [1, 1, 1, 0]], "refined": [[1, 1, 1, 1]]})
    published = [Published("reach", "base", 0.41, 0.02)]
    base, refined = summaries(results, published)
    assert (base.seeds, base.episodes, base.success.value, base.score) == (2, 8, 0.5, 0.25)
    assert base.success.low == pytest.approx(0.215, abs=1e-3)
    assert (base.paper, refined.paper) == (0.41, None)
    headings = [column.heading for column in table([base, refined])]
    assert headings[-1] == "paper"


def test_differences_are_of_runs_from_the_same_seed():
    results = fabricated({"base": [[0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], "refined": [[0, 1, 1, 0], [1, 1, 1, 1]]})
    (row,) = differences(results, "refined", "base", "success")
    assert (row.task, row.pairs) == (ALL, 2)
    assert row.value.value == pytest.approx(np.mean([0.25, 0.5]))
    assert row.value.low < row.value.value < row.value.high


def test_a_single_pair_is_compared_over_its_episodes():
    (row,) = differences(fabricated({"base": [[0, 0, 1, 0]], "refined": [[0, 1, 1, 1]]}), "refined", "base", "success")
    assert (row.pairs, row.value.value) == (1, 0.5)
    assert row.value.high - row.value.low == pytest.approx(2 * 1.95996 * np.std([0, 1, 0, 1], ddof=1) / 2, rel=1e-4)


def test_all_tasks_together_are_those_that_every_method_has():
    one = fabricated({"base": [[1, 1], [0, 0]], "refined": [[1, 1]]})
    more = tuple(replace(r, run=replace(r.run, task="pusht")) for r in one.runs if r.run.method.label == "base")
    both = replace(one, tasks=("reach", "pusht"), runs=(*one.runs, *more))
    together = {row.method: row.success.value for row in summaries(both, []) if row.task == ALL}
    assert together == {"base": 1.0, "refined": 1.0}


def test_other_episodes_are_not_compared():
    results = fabricated({"base": [[0, 1], [0, 1]], "refined": [[1, 1, 1], [1, 1, 1]]})
    assert differences(results, "refined", "base", "success") == []


def test_a_study_writes_tables_and_figures(config, started):
    run_refinement(
        config, CASES, METHODS, [("refined", "base")], study="s", title="A study", reasons=["tiny"], budget="b"
    )
    out = config.out / "s" / "partial" / "b"
    assert {path.name for path in out.iterdir()} == {
        "summary.csv", "summary.md", "differences.csv", "differences.svg", "tasks.svg",
    }  # fmt: skip
    text = (out / "summary.md").read_text()
    assert "partial (tiny)" in text
    assert "+0.25" in text


def test_a_record_holds_what_is_needed_to_judge_a_run(config, started):
    (run, *_) = made(config).runs
    record = record_file(config).read()[run.run.key]
    assert record.hardware == "abacus, 1 thread(s)"
    assert record.command.startswith("difftori train bc --env metaworld:reach --obs state")
    assert record.config["settings"]["updates"] == 7
    before = record_file(config).path.read_bytes()
    made(config)
    assert record_file(config).path.read_bytes() == before

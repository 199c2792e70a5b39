"""Studies of reinforcement learning on made-up runs: which runs, what makes a study full, what may differ between runs."""

from functools import partial
from pathlib import Path

import pytest
from pydantic import ValidationError

from difftori.config import fields_of, overlay, read_tokens
from difftori.errors import ConfigError
from difftori.experiments.paper import figure3, figure5, figure6
from difftori.experiments.records import RecordFile
from difftori.experiments.rl_study import TASKS, RLStudy, budget_name, partial_reasons, plan_runs
from difftori.experiments.study import comparable, config_mismatch
from difftori.paper.numbers import paper_tasks
from difftori.trainers import reinforcement
from tests.support.fabricated import write_run
from tests.support.rl_studies import ALL, PAIR, curves_of, fill, record_file, result_of, small_study


@pytest.fixture
def small(tmp_path):
    return partial(small_study, tmp_path)


def test_the_tasks_are_the_papers():
    assert list(TASKS) == [row.task for row in paper_tasks()]


def test_the_defaults_are_the_full_study_and_anything_less_says_why(small):
    assert partial_reasons(figure3.Config()) == []
    reasons = partial_reasons(small(preset="compact"))
    assert reasons == [
        "states instead of pixels",
        "preset compact",
        "50000 of 1000000 steps",
        "2 of 5 seeds",
        "2 of 15 tasks",
    ]
    assert partial_reasons(figure3.Config(quick=True))[0] == "quick"


def test_runs_come_seed_by_seed_and_arms_in_pairs(small):
    runs = plan_runs(small(), PAIR)
    assert [(run.seed, run.task, run.method.label) for run in runs[:5]] == [
        (0, "cup-catch", "difftori"),
        (0, "cup-catch", "tdmpc"),
        (0, "walker-walk", "difftori"),
        (0, "walker-walk", "tdmpc"),
        (1, "cup-catch", "difftori"),
    ]
    assert len({run.spec.folder for run in runs}) == len(runs) == 8


@pytest.mark.parametrize("quick", [False, True])
def test_the_command_of_a_run_means_its_configuration(small, quick):
    methods = [*ALL, *figure5.FORMS.values(), *figure6.METHODS]
    for run in plan_runs(small(quick=quick, seeds=1), methods):
        kind = reinforcement()
        _, agent, *options = run.spec.words
        given = read_tokens(options)
        assert given.pop("out") == [str(run.spec.folder)]
        assert given.pop("quiet") == []
        config_type = kind.config_type(kind.find(agent))
        assert set(given) <= set(fields_of(config_type)) | set(fields_of(fields_of(config_type)["settings"]))
        assert kind.parse(overlay({"agent": agent}, given, config_type)) == run.config


def test_drqv2_has_its_authors_return_of_one_step_on_walker(small):
    runs = [run for run in plan_runs(small(seeds=1), ALL) if run.method.label == "drqv2"]
    assert [(run.task, run.config.settings.horizon) for run in runs] == [("cup-catch", 3), ("walker-walk", 1)]


def test_figures_share_their_runs(small):
    default = {run.spec.folder for run in plan_runs(small(), PAIR)}
    assert {run.spec.folder for run in plan_runs(small(), [figure6.WHOLE])} < default
    forms = [plan_runs(small(), [method])[0] for method in figure5.FORMS.values()]
    assert len({run.spec.folder for run in forms}) == len(forms)
    assert sum(run.spec.folder in default for run in forms) == 1


@pytest.mark.parametrize(
    ("study", "options", "count"),
    [
        (figure5, {"tasks": ("cheetah-run", "walker-run", "reacher-easy"), "seeds": 5}, 60),
        (
            figure3,
            {"tasks": ("cheetah-run", "reacher-easy", "cup-catch"), "seeds": 3, "methods": ("difftori", "tdmpc")},
            18,
        ),
    ],
)
def test_the_repositorys_runs_are_those_of_todays_defaults(small, study, options, count):
    """A default that changes must not make the kept runs ones of other settings (docs/reinforcement-studies.md)."""
    given = {"preset": "small", "steps": 50_000, "action_repeat": 4, "eval_every": 10_000, "compile": True}
    config = small(study.Config, **given, **options)
    file = RecordFile(Path(__file__).parents[2] / "results" / "runs" / f"{budget_name(config)}.jsonl")
    kept = file.read()
    methods = study.FORMS if study is figure5 else {name: study.METHODS[name] for name in options["methods"]}
    runs = [run for run in plan_runs(config, list(methods.values())) if run.key in kept]
    assert len(runs) == count
    for run in runs:
        assert config_mismatch(comparable(run.config.model_dump(mode="json")), kept[run.key].config) == []


def test_what_decides_and_what_does_not(small):
    config = small()
    run = plan_runs(config, PAIR)[0]
    write_run(run, end=1.0)
    source = run.spec.folder / "config.yaml"
    text = source.read_text()
    source.write_text(text.replace("device: cpu", "device: cuda").replace("threads: 1", "threads: 4"))
    wanted = comparable(run.config.model_dump(mode="json"))
    assert config_mismatch(wanted, result_of(run).record.config) == []
    source.write_text(text.replace("discount: 0.99", "discount: 0.9"))
    assert config_mismatch(wanted, result_of(run).record.config) == ["settings.discount: 0.99 requested, 0.9"]
    with pytest.raises(ConfigError, match="choose another"):
        curves_of(config)


def test_without_any_run_nothing_is_drawn(small):
    with pytest.raises(ConfigError, match="no results in"):
        curves_of(small())


def test_only_the_full_study_takes_the_full_place(small):
    config = small(tasks=TASKS, seeds=5, steps=1_000_000, obs="pixels", eval_every=500_000)
    fill(config, PAIR, lambda run: 500.0)
    curves = curves_of(config)
    assert curves.reasons == ()
    assert curves.folder("figure3", "b") == config.out / "figure3"
    (plan_runs(config, PAIR)[-1].spec.folder / "summary.json").unlink()
    record_file(config).path.unlink()
    assert curves_of(config).folder("figure3", "b") == config.out / "figure3" / "partial" / "b"


def test_unknown_tasks_and_empty_choices_are_refused():
    for values in ({"tasks": ("cup",)}, {"tasks": ()}, {"seeds": 0}, {"budget": -1}):
        with pytest.raises(ValidationError):
            RLStudy(**values)

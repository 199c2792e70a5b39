"""The studies on Push-T: their methods and pairs, and where the human demonstrations come from."""

import pytest
import torch

from difftori.config import overlay, read_tokens
from difftori.data.download import PUBLIC
from difftori.experiments.il_study import Case, plan_runs
from difftori.experiments.paper import base_noise, pusht, table1, table2, table4, table7
from difftori.experiments.paper.pusht import DATA
from difftori.experiments.records import read_run
from difftori.experiments.study import comparable, config_mismatch
from difftori.il.config import TrainConfig, parse_config
from difftori.policies.difftori import DEFAULT_NOISE, DiffTORI, DiffTORIConfig
from difftori.registry import find_policy
from difftori.runs.records import to_yaml
from difftori.types import TaskSpec, Window


@pytest.fixture
def asked(monkeypatch) -> dict:
    """What a study would have run."""
    found: dict = {}

    def run(config, cases, methods, compared, **named):
        found.update(named, cases=cases, methods={method.label: method for method in methods}, compared=compared)

    for module in (pusht, table1, base_noise):
        monkeypatch.setattr(module, "run_refinement", run)
    return found


@pytest.mark.parametrize("study", [table1, table2, table4, table7, base_noise])
def test_what_is_compared_is_run_and_bases_stand_before_what_refines_them(study, asked, tmp_path):
    study.run(study.Config(**({"demos": tmp_path} if study in (table2, table4, table7) else {})))
    labels = list(asked["methods"])
    assert asked["compared"]
    for method, reference in asked["compared"]:
        assert {method, reference} <= set(labels)
        assert method != reference
    for label, method in asked["methods"].items():
        assert method.base is None or labels.index(method.base) < labels.index(label)


def test_table_7_compares_each_horizon_with_as_many_actions_of_the_base(asked, tmp_path):
    table7.run(table7.Config(demos=tmp_path, horizons=(1, 3)))
    for h in (1, 3):
        assert (f"H = {h}", f"diffusion, {h} executed") in asked["compared"]
        ours, control = asked["methods"][f"H = {h}"], asked["methods"][f"diffusion, {h} executed"]
        assert ours.options == control.options == {"n_action_steps": h}
    table7.run(table7.Config(demos=tmp_path, controls=False))
    assert not any("executed" in label for label in asked["methods"])
    assert "without controls" in asked["reasons"]


def test_the_noise_study_has_the_noise_that_its_base_gets_by_default(asked):
    base_noise.run(base_noise.Config())
    method = asked["methods"][f"DiffTORI σ {DEFAULT_NOISE:g}"]
    assert method.settings == {"base_noise": DEFAULT_NOISE}
    spec = TaskSpec.rows(2, 1, 4, (-1.0,), (1.0,))
    one_sample = Window({"state": torch.zeros(3, 1, 2)}, torch.zeros(3, 4, 1), torch.arange(3), torch.zeros(3, 1, 4, 1))
    assert DiffTORI(DiffTORIConfig(), spec).noise(one_sample) == DEFAULT_NOISE


def test_human_demonstrations_are_the_public_ones_unless_they_are_there(asked, tmp_path):
    table2.run(table2.Config(demos=tmp_path, obs="pose"))
    assert asked["cases"] == [Case("pusht", "pose", "pusht-human")]
    assert PUBLIC["pusht-human"].folder.endswith(DATA), "runs on either are of the same data"
    (tmp_path / DATA).mkdir()
    table2.run(table2.Config(demos=tmp_path, obs="pose"))
    assert asked["cases"] == [Case("pusht", "pose", str(tmp_path / DATA))]


def test_a_study_knows_its_own_runs_again(asked, tmp_path):
    """A refiner's window comes from its base, whose own may come from its policy: what is trained is what is wanted."""
    config = table2.Config(demos=tmp_path, obs="pose", sizes="small", runs=tmp_path / "runs", out=tmp_path)
    table2.run(config)
    for run in plan_runs(config, asked["cases"][0], list(asked["methods"].values()), 0, "push-t"):
        given = overlay(
            {"policy": run.method.trains},
            read_tokens([word for word in run.spec.words[2:] if word != "--quiet"]),
            TrainConfig[find_policy(run.method.trains).Config],
        )
        del given["out"]
        run.spec.folder.mkdir(parents=True)
        (run.spec.folder / "config.yaml").write_text(to_yaml(parse_config(given)))
        (run.spec.folder / "versions.json").write_text('{"cpu": "abacus", "threads": 1}')
        record = read_run(run.spec.folder)
        assert record is not None
        assert config_mismatch(comparable(run.config.model_dump(mode="json")), record.config) == []

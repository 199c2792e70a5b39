"""Tables 2 to 7: their methods and pairs, their tasks, and where the demonstrations come from."""

import pytest
import torch
from pydantic import ValidationError

from difftori.config import overlay, read_tokens
from difftori.data.download import PUBLIC
from difftori.errors import ConfigError
from difftori.experiments.il_study import Case, plan_runs
from difftori.experiments.paper import (
    base_noise,
    manipulation,
    maniskill,
    score_layers,
    solve_steps,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    table7,
)
from difftori.experiments.paper.manipulation import DATA
from difftori.experiments.records import read_run
from difftori.experiments.study import comparable, config_mismatch
from difftori.il.config import TrainConfig, parse_config
from difftori.il.env_task import EnvEvaluator
from difftori.policies.difftori import DEFAULT_NOISE, DiffTORI, DiffTORIConfig
from difftori.registry import find_policy, resolve_env
from difftori.runs.records import to_yaml
from difftori.types import TaskSpec, Window


@pytest.fixture
def asked(monkeypatch) -> dict:
    """What a study would have run."""
    found: dict = {}

    def run(config, cases, methods, compared, **named):
        found.update(named, cases=cases, methods={method.label: method for method in methods}, compared=compared)

    for module in (manipulation, maniskill, table1, base_noise):
        monkeypatch.setattr(module, "run_refinement", run)
    return found


@pytest.mark.parametrize(
    "study", [table1, table2, table3, table4, table5, table6, table7, base_noise, score_layers, solve_steps]
)
def test_what_is_compared_is_run_and_bases_stand_before_what_refines_them(study, asked, tmp_path):
    study.run(study.Config(demos=tmp_path))
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


def test_the_arms_of_table_4_differ_in_their_start_only(asked, tmp_path):
    table4.run(table4.Config(demos=tmp_path))
    several = Window({"state": torch.zeros(3, 1, 2)}, torch.zeros(3, 4, 1), torch.arange(3), torch.zeros(3, 2, 4, 1))
    spec = TaskSpec.rows(2, 1, 4, (-1.0,), (1.0,))
    for method in asked["methods"].values():
        if method.trains == "difftori-il":
            settings = DiffTORIConfig.model_validate(method.settings)
            assert DiffTORI(settings, spec).noise(several) == 0.0


def test_human_demonstrations_are_the_public_ones_unless_they_are_there(asked, tmp_path):
    table2.run(table2.Config(tasks=("pusht",), demos=tmp_path, obs="state"))
    assert asked["cases"] == [Case("pusht", "pose", "pusht-human")]
    assert PUBLIC["pusht-human"].folder.endswith(DATA), "runs on either are of the same data"
    (tmp_path / DATA).mkdir()
    table2.run(table2.Config(tasks=("pusht",), demos=tmp_path, obs="state"))
    assert asked["cases"] == [Case("pusht", "pose", str(tmp_path / DATA))]


def test_the_name_of_a_robomimic_task_says_whose_demonstrations_it_has(asked, tmp_path):
    (tmp_path / "square" / "mh").mkdir(parents=True)
    for name in ("low_dim_v15.hdf5", "low_dim_abs.hdf5"):
        (tmp_path / "square" / "mh" / name).touch()
    config = table2.Config(tasks=("square", "square-ph", "square-mh"), demos=tmp_path, obs="state", demonstrations=50)
    table2.run(config)
    scripted, proficient, several = asked["cases"]
    assert [case.name for case in asked["cases"]] == ["square", "square-ph", "square-mh"]
    assert {case.env for case in asked["cases"]} == {"robomimic:square"}
    assert (scripted.collect, proficient.collect, several.collect) == (50, None, None)
    assert proficient.demos == str(tmp_path / "square" / "ph" / "low_dim.hdf5"), (
        "none is there: the error names this place"
    )
    assert several.demos == str(tmp_path / "square" / "mh" / "low_dim_v15.hdf5")
    assert several.options == {"env_options": ("max_steps=500",)}
    assert "50 scripted demonstrations" in asked["reasons"]
    assert "50" in asked["runs"], "runs on other demonstrations are other runs"


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ValidationError, match=r"'sqare' is unknown. Fix: choose from pusht, square, square-ph"):
        table2.Config(tasks=("sqare",))


def test_a_task_of_several_operators_has_the_longer_limit(asked, tmp_path):
    pytest.importorskip("robosuite")
    table6.run(table6.Config(tasks=("transport-mh",), demos=tmp_path, obs="state"))
    (case,) = asked["cases"]
    env = EnvEvaluator(resolve_env(case.env), case.obs, env_options=case.options["env_options"]).open(1)
    assert env.metadata["max_episode_steps"] == 1100
    assert env.single_action_space.shape == (20,)
    env.close()


def test_push_t_is_compared_by_its_score(asked, tmp_path):
    for study in (table2, table4, table7):
        study.run(study.Config(demos=tmp_path))
        assert asked["measure"] == "score"
        study.run(study.Config(tasks=("square",), demos=tmp_path))
        assert asked["measure"] == "success"
    with pytest.raises(ConfigError, match="pusht has no position control"):
        table6.run(table6.Config(tasks=("pusht",), demos=tmp_path))


def test_other_demonstrations_than_scripted_ones_do_not_name_their_number(asked, tmp_path):
    table2.run(table2.Config(tasks=("pusht",), demos=tmp_path, demonstrations=50))
    with_another_number = asked["runs"]
    table2.run(table2.Config(tasks=("pusht",), demos=tmp_path))
    assert asked["runs"] == with_another_number


def test_tasks_of_maniskill_are_known_by_their_other_names(asked, tmp_path):
    table3.run(table3.Config(tasks=("pick-cube",), demos=tmp_path))
    assert [case.name for case in asked["cases"]] == ["PickCube"]
    with pytest.raises(ValidationError, match="PickCub"):
        table3.Config(tasks=("PickCubes",))


def test_the_published_rates_are_of_the_tasks_demonstrations(asked, tmp_path):
    table2.run(table2.Config(demos=tmp_path))
    theirs = {(found.task, found.method): found.mean for found in asked["published"]}
    assert theirs["square-ph", "DiffTORI on diffusion"] == pytest.approx(0.92)
    assert theirs["pusht", "ibc"] == pytest.approx(0.11)
    assert {task for task, _ in theirs} == set(manipulation.PAPER_TASKS)
    table6.run(table6.Config(demos=tmp_path))
    theirs = {(found.task, found.method): found.mean for found in asked["published"]}
    assert theirs["square-mh", "diffusion"] == pytest.approx(0.97)
    assert {task for task, _ in theirs} == set(table6.PAPER_TASKS)
    table7.run(table7.Config(demos=tmp_path))
    assert {(found.task, found.method) for found in asked["published"]} == {
        (task, f"H = {h}") for task in manipulation.PAPER_TASKS for h in (1, 3, 5)
    }
    table5.run(table5.Config())
    theirs = {(found.task, found.method): found.mean for found in asked["published"]}
    assert theirs["PickCube", "DiffTORI from zero"] == pytest.approx(0.20)


def test_position_control_is_an_option_of_the_environment(asked, tmp_path):
    table6.run(table6.Config(tasks=("square",), demos=tmp_path, obs="state"))
    assert asked["cases"][0].options == {"env_options": ("actions=absolute",)}
    runs = asked["runs"]
    table2.run(table2.Config(tasks=("square",), demos=tmp_path, obs="state"))
    assert asked["cases"][0].options == {}
    assert asked["runs"] != runs, "runs with other actions are other runs"


def test_demonstrations_of_maniskill_are_planned_or_provided(asked, tmp_path):
    table3.run(table3.Config(tasks=("PickCube", "Pour"), demos=tmp_path, demonstrations=100))
    planned, provided = asked["cases"]
    assert planned.collect == 100
    assert provided.collect is None
    assert provided.demos == str(tmp_path / "Pour" / "trajectory.h5")
    assert "100 of 1000 demonstrations" in asked["reasons"]


@pytest.mark.parametrize("obs", ["points", "state"])
def test_small_sizes_of_maniskill_are_other_runs_on_point_clouds_only(asked, tmp_path, obs):
    found = {}
    for sizes in ("paper", "small"):
        table3.run(table3.Config(tasks=("PickCube",), demos=tmp_path, obs=obs, sizes=sizes))
        found[sizes] = (asked["runs"], "small networks" in asked["reasons"], asked["methods"]["base"].settings)
        demos = asked["cases"][0].demos
    assert ("small" in demos) is False, "demonstrations are shared by all sizes"
    assert (found["small"] == found["paper"]) is (obs == "state")
    assert found["small"][1] is (obs == "points")


def test_the_starts_of_table_5_have_no_noise_but_the_bases(asked):
    table5.run(table5.Config())
    noise = {label: method.settings.get("base_noise") for label, method in asked["methods"].items()}
    assert noise == {"base": None, "DiffTORI": None, "DiffTORI from zero": 0.0, "DiffTORI from random": 0.0}


def test_at_the_sources_sizes_bases_have_the_presets_of_their_observations(asked, tmp_path):
    for obs, presets in (("image", {None}), ("state", {None, "lowdim", "state"})):
        table2.run(table2.Config(tasks=("square",), demos=tmp_path, obs=obs))
        methods = [method for method in asked["methods"].values() if method.base is None]
        assert {method.settings.get("preset") for method in methods} == presets


@pytest.mark.parametrize(("obs", "kind"), [("points", "pointcloud"), ("state", "state")])
def test_of_several_files_of_maniskill_the_one_with_these_observations_is_used(asked, tmp_path, obs, kind):
    (tmp_path / "Pour").mkdir()
    for name in ("trajectory", "trajectory.pointcloud.pd_ee_delta_pose", "trajectory.state.pd_ee_delta_pose"):
        (tmp_path / "Pour" / f"{name}.h5").touch()
    table3.run(table3.Config(tasks=("Pour",), demos=tmp_path, obs=obs))
    assert asked["cases"][0].demos == str(tmp_path / "Pour" / f"trajectory.{kind}.pd_ee_delta_pose.h5")


@pytest.mark.parametrize(("task", "limit"), [("lift-mh", 500), ("can-mh", 500), ("transport-mh", 1100)])
def test_demonstrations_of_several_operators_have_robomimics_limits(asked, tmp_path, task, limit):
    table2.run(table2.Config(tasks=(task,), demos=tmp_path, obs="state"))
    assert asked["cases"][0].options == {"env_options": (f"max_steps={limit}",)}
    with pytest.raises(ValidationError, match="'tool_hang-mh' is unknown"):
        table2.Config(tasks=("tool_hang-mh",))


def test_a_study_knows_its_own_runs_again(asked, tmp_path):
    """A refiner's window comes from its base, whose own may come from its policy: what is trained is what is wanted."""
    config = table2.Config(
        tasks=("pusht",), demos=tmp_path, obs="state", sizes="small", runs=tmp_path / "runs", out=tmp_path
    )
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

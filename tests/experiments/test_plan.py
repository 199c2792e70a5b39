"""What a sweep's file comes to: which runs, in which folders, and every fault at once."""

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from difftori.errors import ConfigError
from difftori.experiments.plan import Sweep, plan, read_sweep

IMITATION = {"train": "bc", "env": "pendulum", "epochs": 2}


def sweep_of(tmp_path, **given) -> Sweep:
    return Sweep.model_validate({"out": tmp_path / "out", **given})


def names(runs) -> list[str]:
    return [run.name for run in runs]


def test_the_grid_times_the_variants(tmp_path):
    runs = plan(
        sweep_of(
            tmp_path,
            common={"env": "probe:one-step", "steps": 300},
            grid={"seed": [0, 1]},
            variants=[{"train": "tdmpc"}, {"train": "difftori", "pg": "off", "planner": "fast"}],
        )
    )
    assert names(runs) == [
        "probe.one-step/tdmpc/seed-0",
        "probe.one-step/tdmpc/seed-1",
        "probe.one-step/difftori_pg-off_planner-fast/seed-0",
        "probe.one-step/difftori_pg-off_planner-fast/seed-1",
    ]
    folder = tmp_path / "out" / "probe.one-step" / "tdmpc" / "seed-1"
    options = "--env probe:one-step --steps 300 --seed 1".split()
    assert runs[1].words == ("train", "tdmpc", *options, "--out", str(folder), "--quiet")
    assert runs[1].length == 300
    assert {run.depth for run in runs} == {0}


def test_lists_switches_and_nested_settings_are_options(tmp_path):
    given = {**IMITATION, "hidden": [8, 8], "images": {"width": 8}}
    with pytest.raises(ConfigError, match="settings.images"):  # it sees no images: the name has come through
        plan(sweep_of(tmp_path, common=given))
    del given["images"]
    (run,) = plan(sweep_of(tmp_path, common=given, grid={"hidden": [[8, 8]]}))
    assert run.words[2:] == (*"--env pendulum --epochs 2 --hidden 8 8 --out".split(), str(run.folder), "--quiet")


def test_what_refines_another_run_of_the_sweep_waits_for_it(tmp_path):
    out = tmp_path / "out"
    refiner = {"train": "residual", "base": f"{out}/{{env}}/bc/seed-{{seed}}"}
    given = {"common": {"env": "pendulum", "epochs": 2}, "grid": {"seed": [3]}}
    first, second = plan(sweep_of(tmp_path, **given, variants=[refiner, {"train": "bc"}]))
    assert first.base is second
    assert (first.depth, second.depth) == (1, 0)
    assert str(second.folder) in first.words
    assert first.folder.name == second.folder.name == "seed-3"


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        (
            {"common": {"env": "pendulm", "epochs": 0}, "variants": [{"train": "bcc"}, {"train": "bc"}]},
            ["'bcc' is neither", "pendulm", "epochs"],
        ),
        ({"common": {"env": "pendulum"}}, ["train: None"]),
        ({"common": {**IMITATION, "demos": "{sed}.zarr"}}, ["{sed} in '{sed}.zarr': the run has no option 'sed'"]),
        ({"common": IMITATION, "variants": [{"lr": 1e-3}, {"lr": 0.001}]}, ["two runs have the folder"]),
        ({"common": {"env": "pendulum", "train": "residual", "base": "nowhere"}}, ["base: nowhere is neither"]),
    ],
)
def test_the_faults_of_all_runs_are_listed_at_once(tmp_path, given, faults):
    with pytest.raises(ConfigError) as error:
        plan(sweep_of(tmp_path, **given))
    for fault in faults:
        assert fault in str(error.value)


def test_a_run_that_refines_itself_is_a_fault(tmp_path):
    base = str(tmp_path / "out" / "pendulum" / "residual" / "seed-0")
    with pytest.raises(ConfigError, match="refine each other"):
        plan(sweep_of(tmp_path, common={"env": "pendulum", "train": "residual", "base": base}))


def test_bases_are_named_by_their_policy(tmp_path):
    out = tmp_path / "out"
    bases = [{"base": f"{out}/pendulum/residual_base-{name}/seed-0"} for name in ("a", "b")]
    with pytest.raises(ConfigError) as error:  # they are not there, but have names of their own
        plan(sweep_of(tmp_path, common={"env": "pendulum", "train": "residual"}, variants=bases))
    assert "two runs" not in str(error.value)


def test_another_setting_than_that_of_the_folders_run_is_a_fault(tmp_path):
    (run,) = plan(sweep_of(tmp_path, common=IMITATION))
    run.folder.mkdir(parents=True)
    config = {"policy": "bc", "env": "pendulum", "settings": {"epochs": 2}, "threads": 7}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert plan(sweep_of(tmp_path, common=IMITATION)) == [run]  # threads are the machine's
    with pytest.raises(ConfigError, match=r"epochs: 3 here, 2 in .*\n.*choose another `out`"):
        plan(sweep_of(tmp_path, common={**IMITATION, "epochs": 3}))


def test_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("common: {train: difftori, pg: off}\ngrid: {seed: [0]}")
    assert read_sweep(path).out == Path("runs/mine")
    assert read_sweep(path).common["pg"] == "off"  # and not false, as YAML 1.1 has it
    path.write_text("comon: {}\nretries: -1")
    with pytest.raises(ConfigError) as error:
        read_sweep(path)
    assert "perhaps you meant 'common'" in str(error.value)
    assert "retries: -1" in str(error.value)


def test_nested_settings_of_all_and_of_a_variant_are_joined(tmp_path):
    common = {"train": "bc", "env": "pendulum", "settings": {"hidden": [64], "lr": 0.001}}
    (run,) = plan(sweep_of(tmp_path, common=common, variants=[{"settings": {"batch-size": 7}}]))
    words = " ".join(run.words)
    assert "--settings.hidden 64 --settings.lr 0.001 --settings.batch-size 7" in words


def test_a_sweep_that_grows_keeps_its_folders(tmp_path):
    common = {"env": "probe:one-step", "steps": 300}
    first = plan(sweep_of(tmp_path, common=common, variants=[{"train": "difftori", "pg": "off"}]))
    both = [{"train": "difftori", "pg": "off"}, {"train": "difftori", "pg": "replay"}, {"train": "tdmpc"}]
    assert first[0].folder in [run.folder for run in plan(sweep_of(tmp_path, common=common, variants=both))]


def test_an_option_of_all_that_one_variant_overrides_renames_nothing(tmp_path):
    common = {**IMITATION, "lr": 0.001}
    first = plan(sweep_of(tmp_path, common=common))
    both = plan(sweep_of(tmp_path, common=common, variants=[{}, {"lr": 0.01}]))
    assert names(first) == ["pendulum/bc/seed-0"]
    assert names(both) == ["pendulum/bc/seed-0", "pendulum/bc_lr-0.01/seed-0"]


def test_the_order_of_a_variants_keys_is_no_difference(tmp_path):
    variants = [{"lr": 0.01, "batch_size": 32}, {"batch_size": 64, "lr": 0.01}]
    runs = plan(sweep_of(tmp_path, common=IMITATION, variants=variants))
    assert [run.folder.parent.name for run in runs] == ["bc_lr-0.01_batch_size-32", "bc_lr-0.01_batch_size-64"]


def test_runs_of_the_same_settings_are_a_fault(tmp_path):
    with pytest.raises(ConfigError, match="would have the same settings"):
        plan(sweep_of(tmp_path, common=IMITATION, grid={"lr": ["1e-3", 0.001]}))


def test_a_grid_of_bases_of_data_and_of_settings_has_names(tmp_path):
    bases = ["runs/bc-pendulum-0", "runs/bc-pendulum-1"]
    with pytest.raises(ConfigError) as error:  # they do not exist
        plan(sweep_of(tmp_path, common={"train": "residual", "env": "pendulum"}, grid={"base": bases}))
    assert "two runs" not in str(error.value)
    runs = plan(sweep_of(tmp_path, common=IMITATION, grid={"settings": [{"lr": 0.01}, {"lr": 0.02}]}))
    assert [run.folder.parent.name for run in runs] == ["bc_settings.lr-0.01", "bc_settings.lr-0.02"]
    runs = plan(
        sweep_of(tmp_path, common={"train": "bc", "env": "pendulum"}, grid={"demos": ["数据一.zarr", "数据二.zarr"]})
    )
    assert len({run.folder for run in runs}) == 2


def test_a_base_of_the_sweep_is_known_by_its_absolute_path_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refiner = {"train": "residual", "base": f"{tmp_path}/out/pendulum/bc/seed-0"}
    given = {"out": Path("out"), "common": {"env": "pendulum", "epochs": 2}, "variants": [{"train": "bc"}, refiner]}
    base, second = plan(Sweep.model_validate(given))
    assert second.base is base


def test_long_names_are_shortened_to_what_file_systems_accept(tmp_path):
    hidden = [[8] * 200, [8] * 200 + [9]]
    runs = plan(sweep_of(tmp_path, common=IMITATION, grid={"hidden": hidden}))
    words = [run.folder.parent.name for run in runs]
    assert len(set(words)) == 2
    assert all(len(word.encode()) <= 200 for word in words)


def test_devices_of_other_machines_need_not_be_here(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    given = {**IMITATION, "device": "cuda"}
    with pytest.raises(ConfigError, match="'cuda' is not available"):
        plan(sweep_of(tmp_path, common=given))
    (run,) = plan(sweep_of(tmp_path, common=given), elsewhere=True)
    assert run.words[run.words.index("--device") + 1] == "cuda"
    assert run.config["device"] == "cuda"
    with pytest.raises(ConfigError, match="a run sees its own GPU only"):
        plan(sweep_of(tmp_path, common={**IMITATION, "device": "cuda:1"}, gpus=0.5))
    with pytest.raises(ConfigError, match="add `device: cuda`"):
        plan(sweep_of(tmp_path, common=IMITATION, gpus=1))


def test_a_file_that_would_lose_runs_or_write_to_a_wrong_place_is_refused(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("variants: [{lr: 0.01}]\ncommon: {train: bc}\nvariants: [{lr: 0.02}]\n")
    with pytest.raises(ConfigError, match="the key 'variants' is given twice"):
        read_sweep(file)
    file.write_text("base: &base {lr: 1}\ncommon: {<<: *base, lr: 2}\n")
    with pytest.raises(ConfigError, match="base: unknown"):  # the merge with an own value is no fault
        read_sweep(file)
    file.write_text("out: ~/runs/x\ncommon: {train: bc}\n")
    assert read_sweep(file).out == Path.home() / "runs" / "x"
    file.write_text(f"out: {file}\n")
    with pytest.raises(ConfigError, match="is a file"):
        read_sweep(file)


def test_a_sweep_can_log_to_wandb(tmp_path):
    (run,) = plan(sweep_of(tmp_path, common=IMITATION, wandb=True))
    assert "--wandb" in run.words


words = st.sampled_from(
    ["", "bc", "{env}", "{seed}", "{", "difftori", "pendulum", "probe:one-step", "../x", "/", "é", "--out"]
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.text(max_size=4) | words
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(plain, v, max_size=2), max_leaves=4)
options = st.dictionaries(
    st.sampled_from(
        ["train", "env", "seed", "lr", "hidden", "base", "out", "quiet", "config", "resume", "settings", "x"]
    )
    | plain,
    values,
    max_size=4,
)
files = st.fixed_dictionaries(
    {},
    optional={
        "common": st.just({"train": "bc", "env": "pendulum"})
        | options.map(lambda given: {"train": "bc", "env": "pendulum", **given})
        | values,
        "grid": st.just({"seed": [0, 1], "epochs": [2, 3]})
        | st.dictionaries(st.sampled_from(["seed", "lr", "env", "hidden"]), st.lists(values, max_size=3), max_size=2)
        | values,
        "variants": st.just([{"train": "bc"}, {"train": "lstm"}]) | st.lists(options, max_size=3) | values,
        "retries": st.integers(0, 3) | values,
        "slurm": values,
        "out": st.just("here") | values,
        "comon": values,
    },
)


@given(files | values)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_the_answer_is_a_plan_or_a_list_of_faults(tmp_path, content):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    faults, runs = [], []
    try:
        runs = plan(read_sweep(tmp_path / "sweep.yaml"))
    except ConfigError as error:
        faults = error.faults
    assert bool(faults) != bool(runs)
    assert all(type(fault) is str and fault for fault in faults)
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        assert not run.folder.exists()
        assert run.words[-2:] == (str(run.folder), "--quiet")


def test_names_are_replaced_in_lists_too():
    from difftori.experiments.plan import _filled

    options = {"seed": 3, "env_options": ["level={seed}", "fixed"], "demos": "{seed}.zarr"}
    faults: list[str] = []
    assert _filled(options, faults) == {"seed": 3, "env_options": ["level=3", "fixed"], "demos": "3.zarr"}
    assert not faults

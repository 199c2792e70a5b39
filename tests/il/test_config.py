import contextlib

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_imitation import POLICY, TASK, Outer, Tiny, TinyConfig, tiny_config

from difftori.config import overlay, read_tokens, read_yaml
from difftori.errors import ConfigError
from difftori.il.config import TrainConfig, parse_config
from difftori.runs.records import read_config, to_yaml

LAUGHS = "a0: &a0 1\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 8)}]\n" for i in range(12))
"""Twelve short lines that stand for 8¹² values."""
GOOD = {"policy": POLICY, "env": TASK}


def faults_of(values: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    return caught.value.faults


def test_settings_are_of_the_policys_own_type():
    config = parse_config({**GOOD, "settings": {"hidden": [3, 4], "lr": "1e-4"}})
    assert isinstance(config.settings, TinyConfig)
    assert config.settings.hidden == (3, 4)
    assert config.settings.lr == 1e-4


def test_all_faults_are_listed_at_once():
    faults = faults_of(
        {
            "policy": POLICY,
            "env": "pendulun",
            "sed": 3,
            "num_train": 0,
            "device": "gpu",
            "lr": 0.1,
            "settings": {"hiden": [3], "epochs": "many", "lr": -1, "optimizer": "sgd", "hidden": [1, "x"]},
        }
    )
    expected = {
        "sed": "perhaps you meant 'seed'",
        "lr": "perhaps you meant 'settings.lr'",
        "num_train": "0: Input should be greater than or equal to 1",
        "env": "perhaps you meant 'pendulum'",
        "device": "'gpu' is not a device",
        "settings.hiden": "perhaps you meant 'hidden'",
        "settings.epochs": "'many'",
        "settings.lr": "-1: Input should be greater than 0",
        "settings.optimizer": "'sgd'",
        "settings.hidden.1": "'x'",
    }
    assert {fault.partition(": ")[0] for fault in faults} == expected.keys()
    for fault in faults:
        assert expected[fault.partition(": ")[0]] in fault


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("bcc", "perhaps you meant 'bc'"),
        ("absent_module:Policy", "no module 'absent_module'"),
        ("tiny_imitation:Tinny", "perhaps you meant 'Tiny'"),
        ("tiny_imitation:make", "not a concrete"),
        ("difftori.interfaces:Policy", "not a concrete"),
        ("a-b c:d", "not the name of a module"),
        (":", "not the name of a module"),
        (3, "valid string"),
        (None, "valid string"),
    ],
)
def test_an_unknown_policy_is_one_fault_among_the_others(policy, words):
    faults = faults_of({"policy": policy, "env": TASK, "seed": -1})
    assert len(faults) == 2
    assert any(words in fault for fault in faults)


def test_a_missing_policy_is_named():
    assert faults_of({"env": TASK}) == ["policy: missing. Fix: give a value"]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("pendulum:dampd", "perhaps you meant 'pendulum:damped'"),
        ("tiny_imitation:TASK", "not a function"),
        ("tiny_imitation:mak", "perhaps you meant 'make'"),
    ],
)
def test_an_unknown_task_is_a_fault(env, words):
    assert words in faults_of({"policy": POLICY, "env": env})[0]


@pytest.mark.parametrize("device", ["cuda:99", "meta", "cpu:x", ""])
def test_an_absent_device_is_a_fault(device):
    assert faults_of({**GOOD, "device": device})[0].startswith("device: ")


def test_written_and_read_again_is_the_same(tmp_path):
    config = tiny_config(hidden=(5, 6), lr=1e-5, trap="term")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    again = parse_config(read_yaml(tmp_path / "c.yaml"))
    assert again == config
    assert read_yaml(tmp_path / "c.yaml")["settings"]["lr"] == 1e-5


def test_a_configuration_made_in_python_is_checked_too():
    config = TrainConfig(policy=POLICY, env=TASK, settings=TinyConfig(hidden=(3,)))
    assert config.policy_type is Tiny
    with pytest.raises(ValidationError, match="lr"):
        TinyConfig(lr=float("nan"))


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        "a: [",
        "\x00",
        "3",
        "a: !!python/object/apply:os.system [true]",
        "a: &b [*b]",
        "a: {3: 4}",
        "lr: 2024-99-99",
        "a: !!int x",
        "a: 0b_",
        LAUGHS,
        "[" * 3000,
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="absent"):
        read_yaml(tmp_path / "absent")


@given(st.text() | st.text("{}[]:-&*!,#'\"|>? \n0aé", max_size=30))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_text_a_file_holds_it_is_a_mapping_or_a_fault(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    for read, place in ((read_yaml, tmp_path / "c.yaml"), (read_config, tmp_path)):
        with contextlib.suppress(ConfigError):
            assert isinstance(read(place), dict)


def test_a_value_that_is_meant_twice_may_be_written_once(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &b {lr: 1}\nc: *b\nd: {<<: *b, x: 2}")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"lr": 1}, "c": {"lr": 1}, "d": {"lr": 1, "x": 2}}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*TrainConfig.model_fields, "settngs", 3, None])
inner_names = st.sampled_from([*TinyConfig.model_fields, "x", 3, None])


@given(
    st.dictionaries(names, values, max_size=4),
    st.dictionaries(inner_names, values, max_size=3) | values,
    st.sampled_from([POLICY, "bc"]),
)
@settings(max_examples=100, deadline=None)
def test_whatever_is_given_the_answer_is_a_configuration_or_a_list_of_faults(top, inner, policy):
    faults, config = [], None
    try:
        config = parse_config({"policy": policy, "settings": inner, **top})
    except ConfigError as error:
        faults = error.faults
    assert bool(faults) == (config is None)
    assert all(type(fault) is str and fault for fault in faults)
    if config is not None:
        assert parse_config(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("value", "read"), [("1e2", 100), ("2.5e1", 25), ("1E+1", 10), ("1_000", 1000), ("1.5e0", None), ("1e-2", None)]
)
def test_whole_numbers_with_an_exponent_are_integers(tmp_path, value, read):
    (tmp_path / "c.yaml").write_text(f"num_train: {value}\nsettings: {{hidden: [{value}], trap: {value}}}")
    given = {**GOOD, **read_yaml(tmp_path / "c.yaml")}
    if read is None:
        assert [fault.partition(":")[0] for fault in faults_of(given)] == ["num_train", "settings.hidden.0"]
        return
    config = parse_config({**given, "settings": {**given["settings"], "trap": "1e2"}})
    assert isinstance(config.settings, TinyConfig)
    assert (config.num_train, config.settings.hidden, config.settings.trap) == (read, (read,), "1e2")


def test_components_in_the_settings():
    config = parse_config({**GOOD, "settings": {"part": {"depth": 3}}})
    assert isinstance(config.settings, TinyConfig)
    assert config.settings.part == Outer(depth=3)
    assert parse_config(yaml.safe_load(to_yaml(config))) == config
    faults = faults_of({**GOOD, "settings": {"part": {"gian": 3}}})
    assert faults
    assert all("part" in fault and "perhaps you meant 'gain'" in fault for fault in faults)


def overlaid(words: str, base: dict | None = None) -> dict:
    return overlay(base or {}, read_tokens(words.split()), TrainConfig[Tiny.Config])


def test_options_lie_over_the_file():
    base = {"seed": 1, "settings": {"lr": 0.1, "epochs": 3}}
    merged = overlaid("--seed 2 --lr 1e-4 --num-train=5 --hidden 3 4", base)
    assert merged == {"seed": "2", "num_train": "5", "settings": {"lr": "1e-4", "epochs": 3, "hidden": ["3", "4"]}}
    assert base["settings"] == {"lr": 0.1, "epochs": 3}
    config = parse_config({**GOOD, **merged})
    assert config.settings == TinyConfig(lr=1e-4, epochs=3, hidden=(3, 4))


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--flag", {"flag": True}),
        ("--no-flag", {"flag": False}),
        ("--flag false", {"flag": "false"}),
        ("--hidden 3", {"hidden": ["3"]}),
        ("--hidden", {"hidden": []}),
        ("--settings.lr 3", {"lr": "3"}),
        ("--settings.no-flag", {"flag": False}),
        ("--clip-norm -3", {"clip_norm": "-3"}),
        ("--part.gain 3 --part.rounds none", {"part": {"gain": "3", "rounds": None}}),
    ],
)
def test_forms_of_options(words, settings):
    assert overlaid(words) == {"settings": settings}


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("stray", "belongs to no option"),
        ("--seed 1 --seed 2", "given twice"),
        ("--seed", "needs a value"),
        ("--lr", "needs a value"),
    ],
)
def test_faulty_options(words, fault):
    with pytest.raises(ConfigError, match=fault):
        overlaid(words)


def test_unknown_options_are_left_for_the_list_of_faults():
    with pytest.raises(ConfigError) as caught:
        parse_config({**GOOD, **overlaid("--sed 1 --lrr 2 --seed x --no-flg")})
    assert sorted(f.partition(":")[0] for f in caught.value.faults) == ["lrr", "no_flg", "sed", "seed"]


def test_a_refiner_sets_an_option_of_its_base_to_none(tmp_path):
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"policy": "bc", "env": "pendulum", "num_train": 2, "seed": 3})
    )
    given = {"policy": "residual", "base": str(tmp_path)}
    assert parse_config(given).num_train == 2
    assert parse_config(given | {"num_train": None}).num_train is None
    assert parse_config(given | {"data_seed": None}).data_seed is None


def test_episodes_in_yaml_are_numbers_and_ranges(tmp_path):
    (tmp_path / "c.yaml").write_text("episodes: [10:50, 60, 0:5]\n")
    values = read_yaml(tmp_path / "c.yaml")
    assert parse_config({**GOOD, **values}).episodes == ("10:50", "60", "0:5")


def test_a_refiner_takes_the_episode_limit_of_an_endless_environment_from_its_base(tmp_path):
    below = {"policy": "bc", "env": "pendulum", "seed": 3, "max_episode_steps": 30, "num_envs": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(below))
    config = parse_config({"policy": "residual", "base": str(tmp_path)})
    assert (config.max_episode_steps, config.num_envs, config.seed, config.data_seed) == (30, 2, 3, 3)
    assert parse_config({**config.model_dump(), "max_episode_steps": 20}).max_episode_steps == 20

"""The loop of reinforcement learning: it stops, resumes exactly, survives failures, and says what is wrong."""

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from difftori.data.replay import Replay
from difftori.envs.base import EnvironmentRestarted
from difftori.envs.checked import CheckedVectorEnv
from difftori.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from difftori.registry import find_agent, find_agents, make_env
from difftori.rl import train as rl
from difftori.rl.collector import Collector
from difftori.rl.config import RLConfig, parse_rl_config
from difftori.rl.evaluate import evaluate, evaluate_run
from difftori.rl.weights import load_agent, write_agent
from difftori.rollout import episode_seed
from difftori.runs.checkpoint import Checkpoints, _read, read_weights, weights_digest, write_weights
from difftori.runs.records import read_config, read_metrics, to_yaml
from difftori.runs.run import Run, differences

TINY = {"width": 32, "encoder_width": 32, "latent_dim": 8, "batch_size": 32, "horizon": 2}
TINY |= {"seed_steps": 40, "schedule_steps": 200}
MPPI = {"samples": 16, "elites": 4, "prior_samples": 2, "iterations": 2}


def config(agent="difftori", env="probe:one-step", steps=200, settings=None, **values):
    values = {"eval_every": 100, "eval_episodes": 3, "save_every": 50, "seed": 1, **values}
    known = find_agent(agent).Config.model_fields if agent in find_agents() else TINY
    settings = {n: v for n, v in (TINY | MPPI).items() if n in known} | (settings or {})
    return parse_rl_config({"agent": agent, "env": env, "steps": steps, **values, "settings": settings})


def digest(run_dir: Path) -> str:
    agent, _, _ = load_agent(run_dir)
    return weights_digest(agent)


QUICK = {"updates_per_step": 0.04, "plan_steps": 1, "horizon": 1, "pg_steps": 1}


class Interrupted(Exception):
    pass


def restart_in_step(number: int, monkeypatch) -> None:
    """Let environments fail and be restarted in a step, counted from 1 from now on."""
    step, calls = CheckedVectorEnv.step, []

    def fails_once(self, *arguments):
        calls.append(None)
        if len(calls) == number:
            self._begun[:] = self._running[:] = False
            raise EnvironmentRestarted("all copies were restarted", restarts=1)
        return step(self, *arguments)

    monkeypatch.setattr(CheckedVectorEnv, "step", fails_once)


@pytest.mark.parametrize(
    ("env", "num_envs", "given"),
    [
        ("probe:delayed-reward", 1, {}),
        ("gym:Pendulum-v1", 2, {"distractors": 3, "max_episode_steps": 60}),
        ("probe:delayed-reward", 1, {"interleave": True}),
    ],
)
def test_a_killed_run_resumes_to_the_same_weights(env, num_envs, given, tmp_path, monkeypatch):
    steps = 90 if num_envs == 1 else 240
    given = {"num_envs": num_envs, "steps": steps, "eval_episodes": 1, **given}
    wanted = config(env=env, save_every=30, eval_every=10_000, settings=QUICK, **given)
    rl.train(wanted, tmp_path / "whole", progress=False)
    update, calls = Collector.step, []

    def dies(self, act, *meanwhile):
        calls.append(None)
        if len(calls) in (steps // 2 // num_envs, int(steps * 0.8) // num_envs):
            raise Interrupted
        return update(self, act, *meanwhile)

    monkeypatch.setattr(Collector, "step", dies)
    for _ in range(2):
        with pytest.raises(Interrupted):
            rl.train(wanted, tmp_path / "killed", progress=False)
    summary = rl.train(wanted, tmp_path / "killed", progress=False)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert summary["updates"] == rl.train(wanted, tmp_path / "whole", progress=False)["updates"] >= 2
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(("time", "seconds"))} for row in read_metrics(tmp_path / n)]
        for n in ("whole", "killed")
    ]
    assert rows[0] == rows[1]


def test_the_file_of_weights_is_the_same_when_the_configuration_was_read_from_the_run(tmp_path):
    rl.train(config(env="probe:two-step", steps=20, settings=QUICK), tmp_path, progress=False)
    before = (tmp_path / "agent.pt").read_bytes()
    agent, _, agent_steps = load_agent(tmp_path)
    write_agent(tmp_path, agent, parse_rl_config(read_config(tmp_path)), agent_steps)
    assert (tmp_path / "agent.pt").read_bytes() == before


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_updates_are_made_while_the_environments_step(workers, tmp_path, monkeypatch):
    step, update, stepping, made = CheckedVectorEnv.step, rl._Session._update, [], {True: 0, False: 0}

    def watched_step(self, actions, meanwhile=None):
        stepping.append(meanwhile)
        try:
            return step(self, actions, meanwhile)
        finally:
            stepping.pop()

    def watched_update(self):
        made[bool(stepping)] += 1
        update(self)

    monkeypatch.setattr(CheckedVectorEnv, "step", watched_step)
    monkeypatch.setattr(rl._Session, "_update", watched_update)
    given = {"interleave": True, "workers": workers, "eval_every": 10_000, "eval_episodes": 1, "max_episode_steps": 50}
    settings = QUICK | {"updates_per_step": 0.16, "seed_steps": 10}
    wanted = config(env="gym:Pendulum-v1", steps=150, settings=settings, **given)
    summary = rl.train(wanted, tmp_path / workers, progress=False)
    # Three episodes of 50 steps, and an update for every 6.25 steps: at their ends all of the first, and the last one of the others.
    assert made == {False: 10, True: 14}
    assert sum(made.values()) == summary["updates"]


def test_workers_step_while_the_caller_does_something_else():
    env = make_env("gym:Pendulum-v1", num_envs=2, seed=0, workers="async")
    order = []
    inner = env._env
    begin, wait = inner.step_async, inner.step_wait
    inner.step_async = lambda actions: (order.append("begin"), begin(actions))[1]
    inner.step_wait = lambda: (order.append("wait"), wait())[1]
    try:
        env.reset(seed=[0, 1])
        env.step(np.zeros((2, 1), np.float32), lambda: order.append("meanwhile"))
    finally:
        env.close()
    assert order == ["begin", "meanwhile", "wait"]


def test_a_signal_in_the_middle_of_an_episode_loses_nothing(tmp_path, monkeypatch):
    """Neither does a failure of the environment while the running episodes are played again."""
    given = {"num_envs": 3, "steps": 360, "max_episode_steps": 60, "save_every": 10_000, "eval_episodes": 1}
    wanted = config(env="gym:Pendulum-v1", settings=QUICK, **given)
    rl.train(wanted, tmp_path / "whole", progress=False)
    step, calls = Collector.step, []

    def raises_a_flag(self, *arguments):
        calls.append(None)
        if len(calls) == 70:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(Collector, "step", raises_a_flag)
    with pytest.raises(SystemExit) as ended:
        rl.train(wanted, tmp_path / "stopped", progress=False)
    assert ended.value.code == 143
    restart_in_step(2, monkeypatch)
    rl.train(wanted, tmp_path / "stopped", progress=False)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")


@pytest.mark.parametrize("agent", sorted(find_agents()))
def test_a_signal_just_after_the_random_agent_steps_changes_nothing(agent, tmp_path, monkeypatch):
    wanted = config(agent, env="probe:delayed-reward", steps=48, save_every=10_000, settings={"seed_steps": 20})
    rl.train(wanted, tmp_path / "whole", progress=False)
    step, calls = Collector.step, []

    def raises_a_flag(self, act):
        calls.append(None)
        if len(calls) == 22:  # agent step 22 of episodes of 8: in the middle, and past the 20 random ones
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, act)

    monkeypatch.setattr(Collector, "step", raises_a_flag)
    with pytest.raises(SystemExit):
        rl.train(wanted, tmp_path / "stopped", progress=False)
    rl.train(wanted, tmp_path / "stopped", progress=False)
    assert digest(tmp_path / "stopped") == digest(tmp_path / "whole")
    rows = [[row["step"] for row in read_metrics(tmp_path / name)] for name in ("whole", "stopped")]
    assert rows[0] == rows[1]


def test_divergence_skips_some_updates_and_then_names_the_networks(tmp_path):
    with pytest.raises(NonFiniteError, match=r"10 consecutive updates, in the gradients of \w+"):
        rl.train(config("tdmpc", settings={"lr": 1e25}), tmp_path, progress=False)


def test_an_evaluation_begins_again_when_an_environment_fails(tmp_path, monkeypatch):
    rl.train(config(steps=60), tmp_path, progress=False)
    expected = evaluate_run(tmp_path)
    step, calls = CheckedVectorEnv.step, []

    def fails_once(self, actions):
        calls.append(None)
        if len(calls) == 2:
            self._begun[:] = self._running[:] = False
            raise EnvironmentRestarted("all copies were restarted", restarts=1)
        return step(self, actions)

    monkeypatch.setattr(CheckedVectorEnv, "step", fails_once)
    assert evaluate_run(tmp_path) == expected


def test_episodes_of_unequal_age_are_played_again():
    env = make_env("gym:Pendulum-v1", num_envs=3, seed=0)
    replay = Replay(2000, obs_shape=(3,), obs_dtype="float32", action_dim=1, length=2, num_rows=3)
    collector = Collector(env, replay, 0)
    collector.begin()
    g = torch.Generator().manual_seed(0)

    def act(obs, memory, first):
        return 2 * torch.rand(3, 1, generator=g) - 1, {}

    for _ in range(30):
        collector.step(act)
    replay.drop(1)
    collector._begin_rows(np.array([False, True, False]))
    for _ in range(11):
        collector.step(act)
    replay.drop(2)
    collector._begin_rows(np.array([False, False, True]))
    state = collector.state()
    other = Collector(make_env("gym:Pendulum-v1", num_envs=3, seed=9), replay, 0)
    other.load(state)
    assert [len(row["actions"]) for row in state["rows"]] == [41, 11, 0]
    assert np.array_equal(other._obs, collector._obs)
    assert [row.total for row in other._rows] == [row.total for row in collector._rows]
    state["obs"] += 1e-3
    with pytest.raises(CheckpointError, match="give different observations"):
        Collector(make_env("gym:Pendulum-v1", num_envs=3, seed=9), replay, 0).load(state)


LINE = "tests.support.line:Line"


def interrupted_at(number, function):
    """The function, which is interrupted in its call of this number."""
    calls = []

    def call(*arguments):
        calls.append(None)
        if len(calls) == number:
            raise KeyboardInterrupt
        return function(*arguments)

    return call


@pytest.mark.parametrize("hidden", ["reset", "step"])
def test_random_numbers_beside_the_seed_are_warned_of_and_cost_only_the_running_episodes(
    hidden, tmp_path, caplog, monkeypatch
):
    values = {"env": LINE, "env_options": (f"hidden={hidden}",), "steps": 130, "save_every": 10, "agent": "sac"}
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "step", interrupted_at(75, Collector.step))
        with pytest.raises(KeyboardInterrupt):
            rl.train(config(**values), tmp_path, progress=False)
    assert "two episodes of tests.support.line:Line with the same seed begin differently" in caplog.text
    caplog.clear()
    summary = rl.train(config(**values), tmp_path, progress=False)
    assert ("These episodes are discarded" in caplog.text) == (hidden == "reset")  # this run is saved between episodes
    assert summary["env_steps"] == 130


def test_finished_episodes_are_counted_and_success_is_reported(tmp_path):
    for goal, success in ((-9.0, 1.0), (9.0, 0.0)):
        out = tmp_path / str(success)
        summary = rl.train(
            config(env=LINE, env_options=(f"goal={goal}",), num_envs=2, agent="sac"), out, progress=False
        )
        rows = [row for row in read_metrics(out) if "episode" in row]
        assert [row["episode"] for row in rows] == list(range(1, 2 * (100 // 6) + 1))
        assert summary["episodes"] == len(rows)
        assert {row["eval/success"] for row in read_metrics(out) if "eval/return" in row} == {success}


@pytest.mark.parametrize(("agent", "short"), [("drqv2", True), ("tdmpc", False)])
def test_agents_of_n_step_returns_learn_from_short_segments_before_a_time_limit(agent, short, tmp_path, monkeypatch):
    found = []

    class Watched(Replay):
        def _commit(self, episode):
            super()._commit(episode)
            stored = self._stored[-1]
            found.append(int((self._tree.leaves[self._slots(stored.start, stored.start + stored.length)] > 0).sum()))

    monkeypatch.setattr(rl, "Replay", Watched)
    rl.train(config(agent, env=LINE, steps=30, eval_every=1000, settings={"horizon": 3}), tmp_path, progress=False)
    assert set(found) == {6 if short else 4}


def test_a_capacity_below_one_episode_is_warned_of_before_the_start(tmp_path, caplog):
    with pytest.raises(DataError, match="longer than the capacity"):
        rl.train(config(env=LINE, capacity=5), tmp_path, progress=False)
    assert "capacity: 5 agent steps hold no episode of up to 6" in caplog.text


def test_settings_that_do_not_fit_each_other_are_named():
    with pytest.raises(ConfigError, match="settings: elites: 9 cannot be chosen from 8 samples"):
        config("tdmpc", settings={"elites": 9, "samples": 8})
    with pytest.raises(ConfigError, match="settings: horizon_start: 3 is above horizon, 2"):
        config(settings={"horizon_start": 3, "horizon": 2})


def test_saving_twice_at_a_step_keeps_the_episodes_of_the_checkpoint_before(tmp_path):
    """A ring buffer of 40 steps overwrites old episodes, which the newer checkpoint no longer names."""
    wish = config(steps=400, env="probe:delayed-reward", capacity=40, save_every=10_000, eval_every=10_000)
    with Run(tmp_path, wish, seed=1, threads=1, device="cpu") as run, ExitStack() as environments:
        session = rl._Session(wish, run, environments)
        for saves in (1, 1, 2):
            for _ in range(48):
                session.collector.step(session._act)
            for _ in range(saves):
                session.save()
        kept = run.checkpoints.steps()
        assert len(kept) == run.checkpoints.keep == 2
        for step in kept:
            state = _read(tmp_path / "checkpoints" / f"step-{step}", step)["state"]["replay"]
            assert all((tmp_path / "episodes" / name).exists() for _, _, name in state["episodes"]), step
        oldest = min(int(path.stem.split("-")[1]) for path in (tmp_path / "episodes").glob("*.npz"))
        assert oldest > 0, "others are deleted"


def test_environments_are_closed_if_the_agent_cannot_be_built(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(CheckedVectorEnv, "close_extras", lambda self, **_: closed.append(self))
    monkeypatch.setattr(find_agent("difftori"), "__init__", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rl.train(config(), tmp_path, progress=False)
    assert closed


def test_a_restarted_environment_costs_only_the_running_episodes(tmp_path, monkeypatch):
    restart_in_step(60, monkeypatch)
    summary = rl.train(config(env="probe:delayed-reward", steps=120, eval_every=1000), tmp_path, progress=False)
    assert summary["env_steps"] >= 120
    assert all(
        row.get("train/length", 5) == rows_length(tmp_path) for row in read_metrics(tmp_path) if "train/length" in row
    )


def rows_length(path: Path) -> float:
    return next(row["train/length"] for row in read_metrics(path) if "train/length" in row)


def test_a_configuration_of_an_earlier_version_has_the_defaults(tmp_path):
    wanted = config()
    before = wanted.model_dump(mode="json")
    del before["distractors"], before["settings"]["reward_shapes_latent"]
    assert differences(before, wanted) == []
    assert parse_rl_config(before) == wanted
    assert differences(before, config(distractors=2)) == ["distractors: 2 here, 0 in the directory's config.yaml"]
    with pytest.raises(ConfigError, match="images take none"):
        config(distractors=2, obs="pixels")


def test_evaluation_repeats_itself(tmp_path):
    rl.train(config(steps=100), tmp_path, progress=False)
    assert evaluate_run(tmp_path, episodes=4) == evaluate_run(tmp_path, episodes=4)
    rows = [row for row in read_metrics(tmp_path) if "eval/return" in row]
    assert [row["step"] for row in rows] == [0, 100]
    again = evaluate_run(tmp_path)
    assert again["eval/return"] == rows[-1]["eval/return"]
    assert (tmp_path / "report.html").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["env_steps"] == 100


def test_evaluation_seeds_are_not_those_of_training():
    training = {episode_seed(1, "training", i) for i in range(2000)}
    evaluation = {episode_seed(1, "evaluation", i) for i in range(100)}
    assert not training & evaluation


def test_returns_to_go_are_the_discounted_sum():
    env = make_env("probe:delayed-reward", num_envs=2, seed=0)
    rewards = []
    step = env.step

    def watched(actions):
        result = step(actions)
        rewards.append(result[1][0])
        return result

    env.step = watched
    result = evaluate(env, lambda o, f, a: np.zeros((2, 1)), seed=0, episodes=2, discount=0.5, keep_every=1)
    expected = [sum(0.5 ** (k - t) * r for k, r in enumerate(rewards) if k >= t) for t in range(len(rewards))]
    np.testing.assert_allclose(sorted(result.returns_to_go[: len(rewards)]), sorted(expected), rtol=1e-6)


def test_with_a_damaged_episode_the_checkpoint_before_is_used(tmp_path, monkeypatch, caplog):
    wanted = config(steps=90, save_every=30, eval_every=10_000, settings=QUICK)
    rl.train(wanted, tmp_path / "whole", progress=False)
    step, calls = Collector.step, []

    def dies(self, act):
        calls.append(None)
        if len(calls) == 80:
            raise Interrupted
        return step(self, act)

    monkeypatch.setattr(Collector, "step", dies)
    with pytest.raises(Interrupted):
        rl.train(wanted, tmp_path / "hit", progress=False)
    newest = max((tmp_path / "hit" / "episodes").glob("*.npz"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-1])
    rl.train(wanted, tmp_path / "hit", progress=False)
    assert digest(tmp_path / "hit") == digest(tmp_path / "whole")
    assert "damaged checkpoint skipped" in caplog.text
    assert len(list((tmp_path / "hit" / "checkpoints").glob("corrupt-step-*"))) == 1


def test_a_damaged_or_foreign_run_is_refused(tmp_path):
    rl.train(config(steps=60), tmp_path / "run", progress=False)
    weights = tmp_path / "run" / "agent.pt"
    weights.write_bytes(weights.read_bytes()[:-10] + b"0123456789")
    with pytest.raises(CheckpointError, match="damaged"):
        load_agent(tmp_path / "run")
    with pytest.raises(ConfigError, match="another configuration"):
        rl.train(config(steps=60, seed=2), tmp_path / "run", progress=False)


def test_a_finished_run_of_an_earlier_version_loads_and_an_unfinished_one_says_what_to_do(tmp_path, monkeypatch):
    """Earlier versions stored other names: the agent needs only the count of agent steps, a resumed run everything."""
    rl.train(config(steps=60), tmp_path / "done", progress=False)
    agent, loaded, agent_steps = load_agent(tmp_path / "done")
    state = read_weights(tmp_path / "done" / "agent.pt")
    write_weights(tmp_path / "done" / "agent.pt", {**state, "collector": {"decisions": agent_steps}})
    again = load_agent(tmp_path / "done")
    assert again[1:] == (loaded, agent_steps)
    assert agent_steps == 60
    assert weights_digest(again[0]) == weights_digest(agent)

    step = Collector.step

    def dies(self, act):
        if self.agent_steps == 20:
            raise Interrupted
        return step(self, act)

    monkeypatch.setattr(Collector, "step", dies)
    with pytest.raises(Interrupted):
        rl.train(config(steps=60, save_every=10), tmp_path / "old", progress=False)
    checkpoints = Checkpoints(tmp_path / "old" / "checkpoints")
    found = checkpoints.latest()
    inner = {("deciding" if name == "collecting" else name): value for name, value in found.state["state"].items()}
    checkpoints.save(found.step, {**found.state, "state": inner})
    with pytest.raises(CheckpointError, match=r"lacks 'collecting'; another version.* Fix: resume with the version"):
        rl.train(config(steps=60, save_every=10), tmp_path / "old", progress=False)


def test_every_fault_of_a_configuration_is_listed():
    with pytest.raises(ConfigError) as caught:
        parse_rl_config({"agent": "tdmpcc", "env": "dmv:cheetah-run", "steps": 0, "obss": "pixels"})
    text = "\n".join(caught.value.faults)
    for part in ("perhaps you meant 'tdmpc'", "dmv:cheetah-run", "steps", "perhaps you meant 'obs'"):
        assert part in text
    with pytest.raises(ConfigError) as caught:
        parse_rl_config({"agent": "tdmpc", "env": "dmc:cheeta-run", "steps": 0})
    text = "\n".join(caught.value.faults)
    assert "perhaps you meant 'cheetah-run'" in text
    assert "steps" in text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*RLConfig.model_fields, "obss", 3, None])
inner_names = st.sampled_from([*find_agent("difftori").Config.model_fields, "x", 3, None])


right = st.fixed_dictionaries(
    {},
    optional={"steps": st.integers(1, 10**6), "seed": st.integers(0, 9), "obs": st.sampled_from(["state", "pixels"])},
)
inner_right = st.fixed_dictionaries(
    {}, optional={"lr": st.floats(1e-6, 1.0), "pg": st.sampled_from(["off", "replay"]), "horizon": st.integers(1, 5)}
)


@given(
    right | st.dictionaries(names, values, max_size=4),
    inner_right | st.dictionaries(inner_names, values, max_size=3) | values,
)
@settings(max_examples=100)
def test_whatever_is_given_the_answer_is_a_configuration_or_a_list_of_faults(top, inner):
    faults, config = [], None
    try:
        config = parse_rl_config({"agent": "difftori", "env": "probe:one-step", "settings": inner, **top})
    except ConfigError as error:
        faults = error.faults
    assert bool(faults) == (config is None)
    assert all(type(fault) is str and fault for fault in faults)
    if config is not None:
        assert parse_rl_config(yaml.safe_load(to_yaml(config))) == config


def test_too_few_steps_for_an_update_are_told(tmp_path, caplog):
    summary = rl.train(config("tdmpc", steps=20), tmp_path / "run", progress=False)
    assert summary["updates"] == 0
    assert "20 agent steps are fewer than the 40 random ones, so the agent is never updated" in caplog.text
    assert "the agent was never updated" in caplog.text

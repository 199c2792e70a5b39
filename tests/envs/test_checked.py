"""What the wrapper refuses, counts and survives: in this process, and with one process per copy."""

import os
import time
from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from difftori.envs.base import EnvironmentFailed, EnvironmentRestarted, ResetNeededError, WorkerError, env_spec
from difftori.envs.checked import CheckedVectorEnv
from difftori.envs.video import write_gif
from difftori.envs.workers import launch
from difftori.errors import ConfigError, MissingExtraError, NonFiniteError, ShapeError
from difftori.registry import make_env
from difftori.rollout import record


class TwoPartsError(Exception):
    """Cannot be unpickled: it wants two arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Troubled(gymnasium.Env):
    """Does `what` in the step whose action exceeds 0.9; draws frames; ends after 5 steps."""

    observation_space = Box(-9.0, 9.0, (1,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)
    render_mode = "rgb_array"

    def __init__(self, what: str = "nothing"):
        self.what = what
        self.time = 0
        if what == "refuse":
            raise MissingExtraError("needs the extra `nothing`")
        if what == "stillborn":
            raise TwoPartsError("never", "born")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options:
            raise ConfigError(["there are no options"])
        self.time = 0
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action):
        self.time += 1
        observation, reward = np.zeros(1, dtype=np.float32), 0.0
        if action[0] > 0.9:
            if self.what == "raise":
                raise TwoPartsError("raised", "spoken")
            if self.what == "die":
                os._exit(9)
            if self.what == "hang":
                time.sleep(60)
            if self.what == "nan":
                observation[0] = np.nan
            if self.what == "inf":
                reward = np.inf
        return observation, reward, self.time == 5, False, {}

    def render(self):
        return np.full((4, 6, 3), self.time, dtype=np.uint8)


class Named(gymnasium.Env):
    """Shows an image and a number by name; the number is NaN after an action above 0.9."""

    observation_space = Dict({"image": Box(0, 255, (3, 2, 2), np.uint8), "height": Box(-9.0, 9.0, (1,), np.float32)})
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self):
        self.seen = {"image": np.zeros((3, 2, 2), np.uint8), "height": np.zeros(1, np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seen["height"][:] = self.np_random.uniform(-1, 1)
        return self.seen, {}

    def step(self, action):
        self.seen["image"] += 1
        self.seen["height"] += np.nan if action[0] > 0.9 else action
        return self.seen, 0.0, False, False, {}


def named(workers: str = "sync") -> CheckedVectorEnv:
    return launch(Named, name="named", num_envs=2, seed=0, workers=workers)


def troubled(what: str = "nothing", *, num_envs: int = 2, **options) -> CheckedVectorEnv:
    return launch(partial(Troubled, what), name="troubled", num_envs=num_envs, seed=0, **options)


CALM, TROUBLE = np.zeros((2, 1)), np.array([[0.0], [1.0]])


def test_nan_observations_and_infinite_rewards_are_refused_by_row_step_and_seed():
    for what, named in (("nan", "observations"), ("inf", "rewards")):
        env = troubled(what)
        env.reset(seed=[3, 4])
        env.step(CALM)
        with pytest.raises(NonFiniteError, match=rf"troubled, step 1: NaN or Inf in the {named} of rows \[1\].*\[4\]"):
            env.step(TROUBLE)


def test_clipped_actions_are_counted_by_row_and_forgotten_at_the_reset():
    env = troubled()
    env.reset()
    assert env.step(np.array([[0.0], [-1.5]]))[4]["clipped"].tolist() == [0, 1]
    assert env.step(np.array([[2.0], [-1.5]]))[4]["clipped"].tolist() == [1, 2]
    assert env.reset(options={"reset_mask": np.array([False, True])})[1]["clipped"].tolist() == [1, 0]


def test_seeds_come_from_makes_or_the_resets_and_are_told():
    first = troubled().reset()[1]["episode_seed"]
    assert np.array_equal(first, troubled().reset()[1]["episode_seed"])
    assert first[0] != first[1]
    env = troubled()
    assert env.reset(seed=[5, None])[1]["episode_seed"][0] == 5
    assert np.array_equal(env.reset(seed=3)[1]["episode_seed"], troubled().reset(seed=3)[1]["episode_seed"])


@pytest.mark.parametrize("mask", [np.array([1, 0]), np.array([True]), np.array([False, False])])
def test_bad_masks_are_refused(mask):
    env = troubled()
    env.reset()
    with pytest.raises(ShapeError, match="reset_mask"):
        env.reset(options={"reset_mask": mask})


def test_bad_seeds_are_refused():
    with pytest.raises(ConfigError, match="seed is -1"):
        troubled().reset(seed=[-1, 0])
    with pytest.raises(ShapeError, match="3 seeds for 2 rows"):
        troubled().reset(seed=[1, 2, 3])


def test_a_step_before_the_first_reset_and_a_partial_first_reset_are_refused():
    env = troubled()
    with pytest.raises(ResetNeededError, match="have no running episode"):
        env.step(CALM)
    with pytest.raises(ResetNeededError, match="all rows"):
        env.reset(options={"reset_mask": np.array([True, False])})


def test_a_raising_environment_is_restarted_within_its_budget_and_then_named():
    env = troubled("raise", restarts=2)
    for count in (1, 2):
        env.reset()
        env.step(CALM)
        with pytest.raises(
            EnvironmentRestarted, match=r"step 1: restarted .*row 1.*TwoPartsError: raised and"
        ) as caught:
            env.step(TROUBLE)
        assert (env.restarts, caught.value.restarts) == (count, count)
        assert isinstance(caught.value.__cause__, WorkerError)
        assert caught.value.__cause__.row == 1
        with pytest.raises(ResetNeededError):
            env.step(CALM)
        with pytest.raises(ResetNeededError, match="all rows"):
            env.reset(options={"reset_mask": np.array([True, False])})
    env.reset()
    with pytest.raises(EnvironmentFailed, match=r"failed once more after 2 restarts: troubled, row 1.*TwoPartsError"):
        env.step(TROUBLE)
    env.close()


def test_faults_of_the_arguments_are_all_listed():
    with pytest.raises(ConfigError) as caught:
        troubled(num_envs=0, workers="threads", timeout=0.0, restarts=-1)
    assert len(caught.value.faults) == 4


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_what_cannot_be_built_says_why_at_once(workers):
    with pytest.raises(MissingExtraError, match="the extra `nothing`"):
        troubled("refuse", num_envs=1, workers=workers)
    with pytest.raises((TwoPartsError, WorkerError), match="never and born"):
        troubled("stillborn", num_envs=1, workers=workers)


@pytest.mark.parametrize(
    ("what", "words"), [("raise", "TwoPartsError: raised and"), ("die", "exit code 9"), ("hang", "timed out")]
)
def test_a_process_that_fails_is_replaced_and_nothing_hangs(what, words):
    env = troubled(what, workers="async", restarts=1)
    env._env.timeout = 2.0
    env.reset()
    began = time.monotonic()
    with pytest.raises(EnvironmentRestarted, match=f"row 1.*{words}"):
        env.step(TROUBLE)
    assert time.monotonic() - began < 40
    env.reset()
    env.step(CALM)
    env.close()


def test_processes_do_what_this_process_does_and_end_with_close():
    here, there = (troubled(workers=workers) for workers in ("sync", "async"))
    assert np.array_equal(here.reset(seed=[1, 2])[0], there.reset(seed=[1, 2])[0])
    for _ in range(5):
        ours, theirs = here.step(CALM), there.step(CALM)
        assert all(np.array_equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))
    mask = {"reset_mask": np.array([True, False])}
    assert np.array_equal(here.reset(seed=[7, 0], options=mask)[0], there.reset(seed=[7, 0], options=mask)[0])
    assert np.array_equal(here.render(), there.render())
    processes = [worker._process for worker in there._env._workers]
    pids = [process.pid for process in processes]
    there.close()
    there.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_a_callers_mistake_is_told_and_costs_no_restart(workers):
    env, twin = troubled(workers=workers), troubled()
    env.reset(seed=[1, 2])
    twin.reset(seed=[1, 2])
    with pytest.raises(ConfigError, match="no options"):
        env.reset(options={"colour": "red"})
    assert np.array_equal(env.step(CALM)[0], twin.step(CALM)[0])
    assert env.restarts == 0
    env.close()


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_observations_by_name_are_stacked_checked_and_the_callers_own(workers):
    env = named(workers)
    first, _ = env.reset(seed=[1, 2])
    assert first in env.observation_space
    assert (first["image"].shape, first["height"].shape) == ((2, 3, 2, 2), (2, 1))
    kept = {name: part.copy() for name, part in first.items()}
    second = env.step(np.array([[0.5], [0.0]]))[0]
    assert all(np.array_equal(first[name], kept[name]) for name in kept)
    assert (second["image"] == 1).all()
    assert np.allclose(second["height"], kept["height"] + [[0.5], [0.0]])
    third, _ = env.reset(seed=[0, 2], options={"reset_mask": np.array([False, True])})
    assert third["height"][0] == second["height"][0]
    assert third["height"][1] == kept["height"][1]
    with pytest.raises(NonFiniteError, match=r"NaN or Inf in the observations 'height' of rows \[1\].*\[2\]"):
        env.step(TROUBLE)
    env.close()


def test_agents_are_told_that_observations_by_name_are_not_for_them():
    with pytest.raises(ConfigError, match=r"image, height|height, image.*choose another obs"):
        env_spec(named())


def test_a_film_has_a_frame_more_than_rewards(tmp_path):
    film = record(troubled(num_envs=1), lambda o, f, a: np.zeros((1, 1)), seed=3)
    assert film.frames[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert film.rewards.shape == (5,)
    write_gif(film, tmp_path / "film.gif")
    assert (tmp_path / "film.gif").stat().st_size > 0
    with pytest.raises(ConfigError, match="num_envs=1"):
        record(troubled(), lambda o, f, a: CALM, seed=3)


def own(task: str, *, num_envs: int, seed: int, what: str = "nothing", mode=AutoresetMode.DISABLED):
    """An environment of a user's own, vectorised by Gymnasium."""
    return SyncVectorEnv([partial(Troubled, what)] * num_envs, autoreset_mode=mode)


autoreset = partial(own, mode=AutoresetMode.NEXT_STEP)


def not_an_env(task: str, *, num_envs: int, seed: int):
    return 3


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    """A package `robots.arm` on sys.path with this file's `own`, `autoreset` and `not_an_env` in it."""
    (tmp_path / "robots").mkdir()
    (tmp_path / "robots" / "__init__.py").touch()
    (tmp_path / "robots" / "arm.py").write_text(f"from {__name__} import autoreset, not_an_env, own\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "robots.arm"


@pytest.mark.parametrize("name", ["probe:two-step", "probe", "gym:Pendulum-v1"])
def test_the_door_opens_for_the_packages_own(name):
    env = make_env(name, num_envs=2, seed=0, action_repeat=1)
    assert isinstance(env, CheckedVectorEnv)
    env.reset()
    env.step(env.action_space.sample())
    env.close()


def test_the_door_wraps_a_users_environment_and_restarts_it(own_package):
    env = make_env(f"{own_package}:own", num_envs=2, seed=0, what="raise")
    env.reset(seed=[1, 2])
    env.reset(seed=[0, 9], options={"reset_mask": np.array([False, True])})
    with pytest.raises(EnvironmentRestarted, match="TwoPartsError"):
        env.step(TROUBLE)
    env.reset()
    assert env.step(CALM)[0].shape == (2, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dcm:cheetah-run", {}, "'dcm:cheetah-run' is unknown; perhaps you meant 'dmc:…'"),
        ("probe:three-step", {}, "'three-step' is unknown.*perhaps you meant"),
        ("gym:Pendulum-v1", {"obss": "state"}, "takes no option 'obss'; perhaps you meant 'obs'"),
        ("robots.arm:autoreset", {}, "NEXT_STEP.*create it with AutoresetMode.DISABLED"),
        ("robots.arm:owl", {}, "perhaps you meant 'own'"),
        ("robots.arm:number", {}, "is a int. Fix: pass a gymnasium.Env class"),
        ("robots.arm:not_an_env", {}, "returned a int, not a gymnasium.vector.VectorEnv"),
        ("no.such.module:make", {}, "no module"),
    ],
)
def test_names_and_options_that_mean_nothing_are_refused_with_a_suggestion(own_package, name, options, message):
    with pytest.raises(ConfigError, match=message):
        make_env(name, num_envs=1, seed=0, **options)

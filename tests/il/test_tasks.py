import pytest
import torch
from tiny_imitation import TASK, make

from difftori.errors import ConfigError
from difftori.il import pendulum_task
from difftori.il.pendulum_task import PendulumTask
from difftori.il.pendulum_task import pendulum_task as make_pendulum
from difftori.il.task_names import TASKS, find_task
from difftori.il.task_names import make_task as make_from


def make_task(name, **options):
    return make_from(name, find_task(name), **options)


@pytest.fixture
def _idle_expert(monkeypatch):
    """An expert that does nothing: the tests here are of the task, not of the expert."""
    monkeypatch.setattr(
        pendulum_task, "expert_plans", lambda problem, starts: torch.zeros(len(starts), problem.horizon, 1)
    )


def test_the_dictionary_is_looked_up_first(monkeypatch):
    monkeypatch.setitem(TASKS, "linear", make)
    assert find_task("linear") is make
    assert find_task(TASK) is make
    task = make_task("linear", seed=3, num_train=4)
    assert len(task.train) == 4
    assert torch.equal(task.train.actions, make_task(TASK, seed=3, num_train=4).train.actions)


@pytest.mark.parametrize("name", ["pendulums", "pendulum:dampt", "absent_module:make", ""])
def test_an_unknown_task_is_a_typed_error(name):
    with pytest.raises(ConfigError):
        make_task(name, seed=0, num_train=1)


def test_a_factory_must_make_a_task():
    with pytest.raises(ConfigError, match="name a function that returns an ImitationTask"):
        make_task("builtins:dict", seed=0, num_train=1)


@pytest.mark.usefixtures("_idle_expert")
@pytest.mark.parametrize(("name", "damping"), [("pendulum", 0.0), ("pendulum:damped", 1.0)])
def test_the_pendulum(name, damping):
    task = make_task(name, seed=1, num_train=5)
    assert isinstance(task, PendulumTask)
    assert task.problem.parameters.damping == damping
    assert (len(task.train), len(task.validation)) == (5, 10)
    assert task.train.actions.shape == (5, task.spec.horizon, 1)
    again = make_task(name, seed=1, num_train=5)
    assert torch.equal(again.train.obs, task.train.obs)
    assert not torch.equal(make_task(name, seed=2, num_train=5).train.obs, task.train.obs)


@pytest.mark.usefixtures("_idle_expert")
def test_validation_is_the_same_whatever_the_number_of_training_trajectories():
    few, many = (make_pendulum(False, seed=1, num_train=n) for n in (5, 50))
    assert torch.equal(few.validation.obs, many.validation.obs)
    assert not torch.equal(few.train.obs, few.validation.obs[:5])


@pytest.mark.usefixtures("_idle_expert")
def test_the_expert_against_itself_costs_nothing_more_and_starts_are_common():
    task = make_pendulum(False, seed=1, num_train=2)

    def evaluate(act, seed=0):
        return task.evaluate(act, episodes=6, generator=torch.Generator().manual_seed(seed)).metrics

    idle = evaluate(lambda obs: torch.zeros(len(obs["state"]), 20, 1))
    assert idle["cost"] == idle["expert_cost"]
    assert (idle["excess_cost"], idle["excess_cost_stderr"]) == (0.0, 0.0)
    full = evaluate(lambda obs: torch.full((len(obs["state"]), 20, 1), 2.0))
    assert full["expert_cost"] == idle["expert_cost"]
    assert full["excess_cost"] != 0
    assert evaluate(lambda obs: torch.zeros(len(obs["state"]), 20, 1), seed=1)["cost"] != idle["cost"]

"""Learning and acting through recordings: the same numbers as without, and averages of what is logged."""

import math

import pytest
import torch

from difftori.errors import NonFiniteError
from difftori.registry import find_agents
from difftori.rl.acting import Acting
from difftori.rl.learning import Averages, Learning
from difftori.runs.checkpoint import weights_digest
from tests.support.agents import accepted, build, randomised, segment
from tests.support.devices import rerun

RUNS = [
    *((name, {}) for name in sorted(find_agents())),
    ("difftori", {"pg": "replay", "pg_every": 2, "schedule_steps": 8}),
]


def graphs(owner, attribute):
    """Recordings whose replays see the owner's number as it was when they were made: a CUDA graph does not read it anew."""

    def record(run, generators):
        recorded = getattr(owner(), attribute)
        repeat, outputs = rerun(run, generators)

        def replay():
            now = getattr(owner(), attribute)
            setattr(owner(), attribute, recorded)
            repeat()
            setattr(owner(), attribute, now)

        return replay, outputs

    return record


@pytest.mark.parametrize(("name", "settings"), RUNS, ids=lambda value: value if isinstance(value, str) else len(value))
def test_recorded_updates_are_the_updates(name, settings):
    def run(recorded):
        agent = build(name, **settings)
        recorder = graphs(lambda: agent, "updates") if recorded else None
        learning = Learning(agent, torch.Generator().manual_seed(0), recorder=recorder)
        priorities = [learning.update(segment(seed=seed)) for seed in range(9)]
        ended = [learning.end_episode(segment(seed=seed).obs[:, 0]) for seed in range(3)]
        return agent, torch.stack(priorities), ended, learning.read()

    recorded, plain = run(True), run(False)
    assert weights_digest(recorded[0]) == weights_digest(plain[0])
    assert recorded[0].updates == plain[0].updates == 9
    assert torch.equal(recorded[1], plain[1])
    assert recorded[2:] == plain[2:]


@pytest.mark.parametrize("name", sorted(find_agents()))
def test_recorded_actions_are_the_actions(name):
    def run(recorded):
        agent = randomised(name, **accepted(name, {"schedule_steps": 3}))
        recorder = graphs(lambda: acting._call, "step") if recorded else None
        acting = Acting(agent, torch.Generator().manual_seed(0), explore=True, recorder=recorder)
        memory, actions = None, []
        for step in range(8):
            first = torch.full((8,), step == 0)
            action, memory = acting(segment(seed=step).obs[0], memory, first, step=step)
            actions.append(action)
        return torch.stack(actions)

    assert torch.equal(run(True), run(False))


def test_averages_are_of_finite_numbers_and_go_on_from_a_checkpoint():
    def added(averages, numbers):
        for row in numbers:
            averages.add({name: torch.tensor(value) for name, value in row.items()})

    rows = [{"a": 1.0, "b": 2.0}, {"a": 3.0}, {"a": math.nan, "b": 4.0}, {"a": 5.0}]
    whole, part, resumed = Averages(), Averages(), Averages()
    added(whole, rows)
    added(part, rows[:2])
    resumed.load(part.state())
    added(resumed, rows[2:])
    assert whole.read() == resumed.read() == {"a": 3.0, "b": 3.0, "non_finite": 0.25}
    assert whole.read() == {}


def test_repeated_nan_ends_the_training_by_name():
    agent = build("tdmpc")
    learning = Learning(agent, torch.Generator().manual_seed(0))
    batch = segment()
    batch.rewards[0, 0] = math.nan
    for _ in range(9):
        learning.update(batch)
    with pytest.raises(NonFiniteError, match="reward"):
        learning.update(batch)


def test_averages_do_not_depend_on_when_they_are_read_from_the_device():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20)
    whole, stopped = Averages(), Averages()
    for number, value in enumerate(values):
        skip = torch.tensor(float(number % 7 == 3))
        for averages in (whole, stopped):
            averages.add({"a": value}, skip)
        if number % 5 == 0:
            state, stopped = stopped.state(), Averages()
            stopped.load(state)
    kept = [value for number, value in enumerate(values.tolist()) if number % 7 != 3]
    assert whole.read() == stopped.read() == {"a": sum(kept) / len(kept), "non_finite": 0.0}

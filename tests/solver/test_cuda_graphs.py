"""A recorded function: the same results as the function itself. A CUDA graph needs a GPU; its bookkeeping does not."""

import logging

import torch

from difftori.solver import Captured
from tests.support.devices import rerun


def test_a_replay_takes_the_arguments_of_its_call_and_returns_results_of_its_own():
    calls = []

    def function(x, *, scale, further):
        calls.append(x)
        return {"sum": x + further["y"], "scaled": scale * x}

    captured = Captured(function, recorder=rerun)
    found = [captured(torch.full((2,), float(i)), scale=3.0, further={"y": torch.ones(2)}) for i in range(4)]
    for i, each in enumerate(found):
        assert each["sum"].tolist() == [i + 1.0] * 2
        assert each["scaled"].tolist() == [3.0 * i] * 2
    assert calls[1] is calls[2], "from the second call on, the recording's own tensors are used"


def test_other_shapes_and_other_numbers_are_recorded_apart():
    recorded = []

    def recorder(run, generators):
        recorded.append(run)
        return rerun(run, generators)

    captured = Captured(lambda x, n: n * x.sum(), recorder=recorder)
    for _ in range(3):
        assert captured(torch.ones(2), 3).item() == 6
        assert captured(torch.ones(4), 3).item() == 12
        assert captured(torch.ones(4), 5).item() == 20
    assert len(recorded) == 3


def test_random_numbers_go_on_as_without_recording():
    def run(recorder):
        generator = torch.Generator().manual_seed(0)
        captured = Captured(
            lambda x: x + torch.randn(3, generator=generator), generators=[generator], recorder=recorder
        )
        return [captured(torch.zeros(3)) for _ in range(4)]

    def eager(run, generators):
        raise RuntimeError("not here")

    # The recording itself is a run; its numbers are drawn again.
    for ours, theirs in zip(run(rerun), run(eager), strict=True):
        assert torch.equal(ours, theirs)


def test_a_function_that_cannot_be_recorded_runs_as_it_is_and_says_so_once(caplog):
    def refuses(run, generators):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    captured = Captured(lambda x: 2 * x, recorder=refuses)
    with caplog.at_level(logging.WARNING):
        assert [captured(torch.ones(1)).item() for _ in range(5)] == [2.0] * 5
        assert captured(torch.ones(3)).tolist() == [2.0] * 3
    assert [record.getMessage().count("not permitted when stream is capturing") for record in caplog.records] == [1]


def test_what_the_function_changes_is_as_if_it_had_not_been_recorded():
    total = torch.zeros(2)
    captured = Captured(lambda x: total.add_(x).clone(), changing=lambda: [total], recorder=rerun)
    for i in range(1, 5):
        assert captured(torch.ones(2)).tolist() == [i] * 2
    assert total.tolist() == [4.0] * 2


def test_old_recordings_are_dropped():
    recorded = []

    def recorder(run, generators):
        recorded.append(run)
        return rerun(run, generators)

    captured = Captured(lambda x, n: n * x, recorder=recorder)
    for n in [*range(12), *range(12)]:
        assert captured(torch.ones(1), n).item() == n
    for n in (11, 0, 0):  # the latest is still there, the first is recorded anew at its second call
        captured(torch.ones(1), n)
    assert len(recorded) == 13


def test_on_the_cpu_nothing_is_recorded():
    seen = []
    captured = Captured(lambda x: seen.append(x) or x)
    x = torch.ones(1)
    for _ in range(3):
        assert torch.equal(captured(x), x)
    assert all(each is x for each in seen)

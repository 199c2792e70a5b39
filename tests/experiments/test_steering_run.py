"""`difftori study steering` as a whole, on Push-T with a few synthetic demonstrations."""

from dataclasses import replace

import numpy as np
import pytest
import zarr

from difftori.errors import NonFiniteError
from difftori.experiments.paper import steering
from difftori.experiments.paper.steering import Config, run
from difftori.experiments.pool import RunsFailedError

pytest.importorskip("gym_pusht")


def write_push_t(path):
    """Eight episodes of random walks, in the layout of Diffusion Policy's data."""
    numbers, group = np.random.default_rng(0), zarr.open_group(path, mode="w")
    targets = (numbers.normal(0, 5, (240, 2)).cumsum(0) % 512).astype(np.float32)
    states = np.concatenate((targets, numbers.uniform(100, 400, (240, 2)), numbers.uniform(0, 6, (240, 1))), 1)
    group.create_array("data/state", data=states.astype(np.float32))
    group.create_array("data/action", data=targets)
    group.create_array("meta/episode_ends", data=np.arange(30, 241, 30))


@pytest.mark.slow
def test_the_study_resumes_and_reports_failed_evaluations(tmp_path, monkeypatch, capsys):
    write_push_t(tmp_path / "demos" / steering.DATA)
    config = Config(
        tasks=("pusht",),
        seeds=1,
        updates=1,
        episodes=2,
        weights=(1.0,),
        demos=tmp_path / "demos",
        runs=tmp_path / "runs",
        out=tmp_path / "out",
    )
    folder, records = tmp_path / "out/steering/partial/1", tmp_path / "out/steering/evaluations-1.jsonl"
    evaluate, case, calls = steering.evaluate, steering._case, []
    short = {"max_episode_steps": 24}
    monkeypatch.setattr(steering, "_case", lambda *given: replace(case(*given), options=short))

    def broken(task, job, result, device):
        calls.append(job)
        if job.requirement == "around":
            raise NonFiniteError("the cost is NaN")
        return evaluate(task, job, result, device)

    monkeypatch.setattr(steering, "evaluate", broken)
    with pytest.raises(RunsFailedError, match="5 evaluations failed"):
        run(config)
    assert "the cost is NaN" in capsys.readouterr().out
    assert len(calls) == 3 + 3 * 5
    assert len(records.read_bytes().splitlines()) == len(calls) - 5
    assert (folder / "keep-out-weight-1.gif").exists()
    records.write_bytes(records.read_bytes()[:-20])  # as after a kill
    monkeypatch.setattr(steering, "evaluate", lambda *job: calls.append(job) or evaluate(*job))
    calls.clear()
    run(config)
    assert len(calls) == 5 + 1
    before = (folder / "summary.md").read_text()
    run(config.model_copy(update={"budget": 0.0}))
    assert len(calls) == 5 + 1
    assert (folder / "summary.md").read_text() == before
    assert "| pusht | around | base, guided |" in before

"""A tiny run of the comparison writes its files; its ratios, quartiles and truth are what they say."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.solver import Config, run
from benchmarks.solver_entries import Cell, Entry, Setup, build, entries, find_entry
from benchmarks.solver_problems import imitation_problem, latent_problem
from benchmarks.solver_quality import measure_quality
from benchmarks.solver_report import summarise
from benchmarks.solver_timing import Sample, time_cell
from difftori import presets
from difftori.errors import ConfigError, MissingExtraError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def setup(cache: Path) -> Setup:
    return Setup(cache, fit_steps=20)


def test_a_quick_run_writes_its_files(tmp_path: Path, cache: Path) -> None:
    config = Config(
        problems=("imitation", "pendulum"),
        repeats=1,
        quick=True,
        baselines=False,
        compile=False,
        memory=False,
        out=tmp_path,
        cache=cache,
    )
    threads = torch.get_num_threads()
    rows = run(config)
    assert torch.get_num_threads() == threads
    out = tmp_path / "quick"
    with (out / "solver-raw.csv").open() as file:
        raw = list(csv.DictReader(file))
    with (out / "solver-summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert len(summary) == len(rows) == 8
    assert {row["repeat"] for row in raw} == {"-1", "0"}
    assert all(float(row["forward_ms"]) > 0 for row in raw)
    assert "<svg" in (out / "solver.svg").read_text()
    record = json.loads((out / "solver.json").read_text())
    assert record["versions"]["threads"] == 1
    assert record["config"]["finished"]
    assert record["versions"]["torch"] == torch.__version__
    assert not list(out.glob("*.tmp"))


def test_entries_take_turns_at_being_first(setup: Setup) -> None:
    order = []

    def made_up(name: str) -> Entry:
        def solve(problem, generator):
            order.append(name)
            return problem.x0 + problem.context.sum()

        return Entry(name, solve)

    names = ["one", "two", "three"]
    everyone = [made_up(name) for name in names]
    cell = Cell("pendulum", 3, 2)
    samples = time_cell(cell, everyone, setup, repeats=4, seconds=0.0, show=lambda text: None)
    assert order == [*names, *names, "two", "three", "one", "three", "one", "two"]  # first calls, then three repeats
    assert [sample.repeat for sample in samples] == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3


def test_ratios_are_totals_of_medians_against_the_first_entry() -> None:
    cell = Cell("latent", 1, 1)
    samples = [Sample(cell, "one", -1, 900.0, 900.0), Sample(cell, "two", -1, 900.0, math.nan)]
    samples += [Sample(cell, "one", i, f, 10.0) for i, f in enumerate((10.0, 30.0, 20.0))]
    samples += [Sample(cell, "two", i, 5.0, math.nan) for i in range(3)]
    first, second = summarise(samples, {(cell, "two"): 3.0}, [])
    assert (first.forward_q1, first.forward_ms, first.forward_q3) == (15.0, 20.0, 25.0)
    assert first.speedup == 1.0
    assert second.speedup == 4.0  # forward against forward, for it has no backward
    assert second.peak_mb == 3.0
    assert math.isnan(first.peak_mb)


def test_problems_are_the_same_in_both_precisions_and_on_every_call(cache: Path) -> None:
    single = latent_problem(2, 3, torch.float32, 0, cache=cache, start="prior", fit_steps=20)
    double = latent_problem(2, 3, torch.float64, 0, cache=cache, start="prior", fit_steps=20)
    assert double.x0.dtype == torch.float64
    torch.testing.assert_close(single.cost(single.x0).double(), double.cost(double.x0), rtol=1e-4, atol=1e-4)
    again = latent_problem(2, 3, torch.float32, 0, cache=cache, start="prior", fit_steps=20)
    assert torch.equal(again.x0, single.x0)
    assert single.x0.abs().max() <= 1
    other = latent_problem(2, 3, torch.float32, 1, cache=cache, fit_steps=20)
    assert not torch.equal(other.z0, single.z0)


def test_rows_of_the_problems_are_independent(setup: Setup) -> None:
    for cell in (Cell("latent", 2, 4), Cell("imitation", 1, 4), Cell("pendulum", 5, 4)):
        problem = build(cell, torch.float64, setup)
        x = problem.box.project(torch.randn(problem.x0.shape, dtype=torch.float64))
        some = torch.tensor([2, 0])
        part = problem.select(some)
        assert part is not None
        torch.testing.assert_close(part.cost(x[some]), problem.cost(x)[some])


def test_the_clamp_in_the_cost_kills_the_gradient_outside(cache: Path) -> None:
    problem = latent_problem(1, 2, torch.float64, 0, cache=cache, clamp=True, fit_steps=20)
    x = torch.full_like(problem.x0, 1.5).requires_grad_()
    (grad,) = torch.autograd.grad(problem.cost(x).sum(), x)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_an_exact_gradient_is_recognised(setup: Setup) -> None:
    """Our accurate preset on the chunk score: the truth, made by other means, agrees with it."""
    quality = measure_quality(Cell("imitation", 1, 4), find_entry("imitation", "accurate"), setup)
    assert quality.compared > 0
    assert quality.cosine > 0.999
    assert quality.relative_error < 1e-3
    assert quality.optimum == pytest.approx(quality.reached, abs=1e-5)
    assert quality.inside == 1.0


def test_a_wrong_gradient_is_recognised(setup: Setup) -> None:
    def minus(problem, generator):
        x = presets.accurate(problem.box).solve(problem, problem.x0).x
        return 2 * x.detach() - x

    quality = measure_quality(Cell("imitation", 1, 4), Entry("minus", minus), setup)
    assert quality.cosine < -0.999
    assert quality.aligned == 0.0


def test_entries_are_chosen_by_what_is_wanted() -> None:
    cell = Cell("latent", 1, 256)
    names = [entry.name for entry in entries(cell, baselines=False, compile=False)]
    assert "MPPI 525x6" not in names  # too large
    assert not any("Theseus" in name or "compiled" in name for name in names)
    assert entries(cell, baselines=True, compile=True)[0].baseline  # the reference of the ratios
    with pytest.raises(ConfigError, match="fast"):
        find_entry("latent", "slow")


def test_a_missing_baseline_names_the_target_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "theseus", None)
    with pytest.raises(MissingExtraError, match="make baselines"):
        run(Config(quick=True, out=tmp_path, cache=tmp_path))
    assert not list(tmp_path.iterdir())


def test_imitation_starts_inside_the_box(cache: Path) -> None:
    problem = imitation_problem(8, cache=cache, fit_steps=20)
    assert problem.x0.shape == (8, 16)
    assert problem.x0.abs().max() <= 1

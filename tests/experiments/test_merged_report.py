"""Reports of made-up runs: which methods there are, what is compared, and that the page fetches nothing."""

import csv
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg

from difftori.cli import main
from difftori.errors import ConfigError
from difftori.experiments.analyse import sections
from difftori.experiments.gather import gather
from difftori.experiments.records import RETURN
from difftori.experiments.report import write_report
from difftori.experiments.report_figures import _due, against, learning_curves, over_tasks, profiles
from difftori.experiments.statistics import paired_rates

VERSIONS = {"cpu": "a processor", "threads": 1, "difftori": "0", "torch": "2", "device_name": None}


def agent_run(place: Path, value: float, *, agent: str, seed: int, env="dmc:cup-catch", steps=1000, **settings) -> Path:
    """A run by reward, whose return rises to `value`; None leaves it unfinished."""
    config = {"agent": agent, "env": env, "obs": "state", "steps": steps, "seed": seed, "eval_episodes": 10}
    rows = [{"step": step, "eval/return": value * step / steps} for step in (0, steps // 2, steps)]
    return written(place, {**config, "settings": settings}, rows, {"return": value, "seconds": 5.0})


def policy_run(place: Path, episodes: list[float], *, policy: str, seed: int, first=100, **more) -> Path:
    """A run of imitation with these outcomes of its evaluation episodes."""
    config = {"policy": policy, "env": "metaworld:assembly", "seed": seed, "settings": {"updates": 10}, **more}
    mean = float(np.mean(episodes))
    known = {"seed": list(range(first, first + len(episodes))), "success": episodes, "score": episodes}
    summary = {"last/success": mean, "last/score": mean, "last/validation_error": 0.1, "seconds": 2.0}
    rows = [{"step": step, "validation/error": 1 / (1 + step)} for step in (5, 10)]
    return written(place, config, rows, summary, {"last": known})


def written(place: Path, config: dict, rows: list, summary: dict, episodes: dict | None = None) -> Path:
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "versions.json").write_text(json.dumps(VERSIONS))
    (place / "command.txt").write_text(
        "2026-01-01T00:00:00  difftori train it\n2026-01-02  difftori train --resume it\n"
    )
    (place / "summary.json").write_text(json.dumps(summary))
    if episodes is not None:
        (place / "episodes.json").write_text(json.dumps(episodes))
    return place


@pytest.fixture
def reward(tmp_path):
    """Two agents on two tasks with three seeds; one of two settings."""
    root = tmp_path / "runs"
    for seed in range(3):
        for env, shift in (("dmc:cup-catch", 0), ("dmc:walker-run", -300)):
            slug = env.replace(":", ".")
            agent_run(
                root / slug / f"a{seed}", 700 + shift + seed, agent="difftori", seed=seed, env=env, pg="off", lr=0.1
            )
            agent_run(
                root / slug / f"b{seed}", 900 + shift - seed, agent="difftori", seed=seed, env=env, pg="replay", lr=0.1
            )
            agent_run(root / slug / f"c{seed}", 500 + shift, agent="tdmpc", seed=seed, env=env, lr=0.2)
    return root


def test_methods_are_named_by_what_tells_them_apart(reward):
    found = gather([reward])
    assert {run.method for run in found.runs} == {"difftori, pg off", "difftori, pg replay", "tdmpc"}
    assert found.left_out == ()
    assert found.runs[0].command == "difftori train it"


def test_a_setting_of_a_task_does_not_name_methods_and_is_warned_of(tmp_path):
    for task, words in (("a", []), ("b", ["max_steps=500"])):
        for noise in (0.1, 0.2):
            place = tmp_path / "runs" / f"{task}-{noise}"
            settings = {"updates": 10, "noise": noise}
            policy_run(place, [1.0] * 4, policy="bc", seed=0, env=f"x:{task}", env_options=words, settings=settings)
    assert {run.method for run in gather([tmp_path / "runs"]).runs} == {"bc, noise 0.1", "bc, noise 0.2"}
    page = write_report([tmp_path / "runs"], tmp_path / "page").page.read_text()
    assert page.count("has another env_options on each of several tasks") == 2
    assert "another noise" not in page


def test_a_setting_that_an_earlier_version_did_not_write_is_no_difference(tmp_path):
    agent_run(tmp_path / "before", 1.0, agent="tdmpc", seed=0, lr=0.1)
    agent_run(tmp_path / "now", 2.0, agent="tdmpc", seed=1, lr=0.1, reward_shapes_latent=True)
    assert {run.method for run in gather([tmp_path]).runs} == {"tdmpc"}
    agent_run(tmp_path / "other", 2.0, agent="tdmpc", seed=1, lr=0.1, reward_shapes_latent=False)
    shapes = "tdmpc, reward_shapes_latent "
    assert {run.method for run in gather([tmp_path]).runs} == {"tdmpc", f"{shapes}True", f"{shapes}False"}


def test_the_number_of_environments_distinguishes_agents_and_where_replay_is_stored_does_not(tmp_path):
    changes = [{"num_envs": 1}, {"num_envs": 4}, {"num_envs": 4, "storage": "mmap", "keep_episodes": True}]
    for seed, change in enumerate(changes):
        place = agent_run(tmp_path / f"{seed}", 1.0, agent="sac", seed=seed)
        config = yaml.safe_load((place / "config.yaml").read_text())
        (place / "config.yaml").write_text(yaml.safe_dump(config | change))
    assert [run.method for run in gather([tmp_path]).runs] == ["sac, num_envs 1", *["sac, num_envs 4"] * 2]


def test_evaluations_at_the_ends_of_episodes_are_averaged_where_they_were_due(tmp_path):
    for seed in range(3):
        place = agent_run(tmp_path / f"{seed}", 1.0, agent="sac", seed=seed)
        config = yaml.safe_load((place / "config.yaml").read_text())
        (place / "config.yaml").write_text(yaml.safe_dump(config | {"eval_every": 250}))
        rows = [{"step": step, "eval/return": 1.0} for step in (0, 251 + seed, 507 - seed, 760, 1000)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = gather([tmp_path]).runs
    assert all(_due(run).tolist() == [0, 250, 500, 750, 1000] for run in runs)
    figure = learning_curves(runs, RETURN, ["sac"])
    bold = max(figure.axes[0].lines, key=lambda line: line.get_linewidth())
    assert bold.get_xdata().tolist() == [0, 252, 506, 760, 1000]


def test_a_run_that_was_extended_is_averaged_with_others(tmp_path):
    """Its evaluation at the earlier end, at 90, was not due."""
    for seed, steps in enumerate([(0, 50, 90, 100, 150, 200), (0, 50, 100, 150, 200)]):
        place = agent_run(tmp_path / f"{seed}", 1.0, agent="sac", seed=seed, steps=200)
        config = yaml.safe_load((place / "config.yaml").read_text())
        (place / "config.yaml").write_text(yaml.safe_dump(config | {"eval_every": 50}))
        rows = [{"step": step, "eval/return": 1.0} for step in steps]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = learning_curves(gather([tmp_path]).runs, RETURN, ["sac"])
    bold = max(figure.axes[0].lines, key=lambda line: line.get_linewidth())
    assert bold.get_xdata().tolist() == [0, 50, 100, 150, 200]


def test_distractors_are_part_of_the_task(tmp_path):
    for seed, count in ((0, None), (1, 0), (0, 16)):
        place = agent_run(tmp_path / f"{seed}-{count}", 1.0, agent="tdmpc", seed=seed)
        config = yaml.safe_load((place / "config.yaml").read_text())
        (place / "config.yaml").write_text(yaml.safe_dump(config | ({} if count is None else {"distractors": count})))
    found = {(run.task, run.method, run.seed) for run in gather([tmp_path]).runs}
    plain = "dmc:cup-catch (state)"
    assert found == {(plain, "tdmpc", 0), (plain, "tdmpc", 1), ("dmc:cup-catch (state, 16 distractors)", "tdmpc", 0)}


def test_numbers_by_hand(reward):
    (section,) = sections(gather([reward]).runs)
    assert section.measure.name == "return"
    assert section.common == ("dmc:cup-catch (state)", "dmc:walker-run (state)")
    cells = {(cell.task, cell.method): cell for cell in section.cells}
    assert cells["dmc:cup-catch (state)", "difftori, pg off"].mean.value == 701
    over = {row.method: row.statistics for row in section.over}
    assert over["difftori, pg off"]["mean"].value == pytest.approx((701 + 401) / 2000)
    assert over["tdmpc"]["optimality gap"].value == pytest.approx(1 - 0.35)
    pairs = {(pair.task, pair.method, pair.reference): pair for pair in section.pairs}
    every = pairs[None, "difftori, pg off", "difftori, pg replay"]
    assert every.runs == 6
    assert every.difference.value == pytest.approx(np.mean([-200, -198, -196]))
    assert every.better.value == 0
    only = sections(gather([reward]).runs, reference="tdmpc")[0].pairs
    assert {pair.reference for pair in only} == {"tdmpc"}
    with pytest.raises(ConfigError, match="no method is named 'sac'. Fix: choose one of: difftori, pg off"):
        sections(gather([reward]).runs, reference="sac")


def test_success_is_paired_by_episodes_and_lower_errors_are_better(tmp_path):
    policy_run(tmp_path / "a0", [1.0, 1.0, 0.0, 1.0], policy="bc", seed=0)
    policy_run(tmp_path / "a1", [1.0, 0.0, 0.0, 1.0], policy="bc", seed=1)
    policy_run(tmp_path / "b0", [0.0, 0.0, 0.0, 1.0], policy="ibc", seed=0)
    policy_run(tmp_path / "b1", [0.0, 0.0, 0.0, 1.0], policy="ibc", seed=1, first=200)  # other episodes
    (section,) = sections(gather([tmp_path]).runs)
    assert section.measure.name == "success"  # and no score, which says the same
    (cell, _) = section.cells
    assert (cell.episodes, cell.pooled.value) == (8, 5 / 8)
    (single,) = section.pairs  # seed 1 has no common episodes, so the interval is over the episodes of seed 0
    assert (single.runs, single.episodes, single.better) == (1, 4, None)
    assert single.difference.value == 0.5
    assert single.difference.bounded
    policy_run(tmp_path / "c" / "b1", [0.0, 0.0, 0.0, 1.0], policy="ibc", seed=2)
    policy_run(tmp_path / "c" / "a1", [1.0, 1.0, 1.0, 1.0], policy="bc", seed=2)
    (pair,) = sections(gather([tmp_path]).runs)[0].pairs
    assert (pair.runs, pair.difference.value) == (2, pytest.approx((0.5 + 0.75) / 2))


def test_with_one_seed_the_common_episodes_are_compared(tmp_path):
    policy_run(tmp_path / "a", [1.0, 1.0, 0.0, 1.0], policy="bc", seed=0)
    policy_run(tmp_path / "b", [0.0, 1.0, 1.0, 0.0, 0.0], policy="ibc", seed=0, first=101)  # 101 … 103 are common
    (section,) = sections(gather([tmp_path]).runs)
    (pair,) = section.pairs
    gaps = np.array([1.0 - 0.0, 0.0 - 1.0, 1.0 - 1.0])
    assert (pair.task, pair.episodes, pair.difference.value) == ("metaworld:assembly", 3, gaps.mean())
    assert pair.difference == paired_rates(np.array([1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]))
    report = write_report([tmp_path], tmp_path / "report")
    assert "without the variation between trainings" in report.page.read_text()
    with (tmp_path / "report" / "pairs.csv").open() as file:
        assert [row["statistic"] for row in csv.DictReader(file)] == ["paired difference over 3 episodes"]

    policy_run(tmp_path / "c", [1.0, 0.0], policy="bc", seed=0, env="metaworld:hammer")
    policy_run(tmp_path / "d", [0.0, 0.0], policy="ibc", seed=0, env="metaworld:hammer")
    by_task = {pair.task: pair for pair in sections(gather([tmp_path]).runs)[0].pairs}
    assert by_task[None].difference.value == pytest.approx((gaps.mean() + 0.5) / 2)
    assert (by_task[None].runs, by_task[None].episodes) == (2, 5)


def test_a_refiner_is_named_by_its_base_and_not_by_a_folder(tmp_path):
    for name, updates in (("short", 10), ("long", 20)):
        base = policy_run(tmp_path / name, [1.0, 0.0], policy="bc", seed=0, settings={"updates": updates})
        refiner = policy_run(tmp_path / f"on-{name}", [1.0, 0.0], policy="residual", seed=0, base=f"/gone/{name}")
        for weights in (base / "policy.pt.sha256", refiner / "base.pt.sha256"):
            weights.write_text(f"{name}  file\n")
    lost = policy_run(tmp_path / "lost", [1.0, 0.0], policy="ibc-base", seed=0, base="/gone/elsewhere")
    (lost / "base.pt.sha256").write_text("0123456789  file\n")
    assert {run.method for run in gather([tmp_path]).runs} == {
        "bc, updates 10",
        "bc, updates 20",
        "residual on bc (updates 10)",
        "residual on bc (updates 20)",
        "ibc-base on a base with weights 01234567",
    }


def test_an_agent_without_evaluations_is_drawn_by_its_training_episodes(tmp_path):
    place = agent_run(tmp_path / "a", 5.0, agent="tdmpc", seed=0)
    (place / "summary.json").unlink()
    rows = [{"step": 0, "eval/return": 1.0}, *({"step": s, "train/return": 2.0 + s} for s in (100, 200))]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    agent_run(tmp_path / "b", 5.0, agent="difftori", seed=0)
    runs = gather([tmp_path]).runs
    assert {run.method: run.training[1].tolist() for run in runs} == {"tdmpc": [102.0, 202.0], "difftori": []}
    (axis,) = learning_curves(runs, RETURN, ["difftori", "tdmpc"]).axes
    assert [102.0, 202.0] in [line.get_ydata().tolist() for line in axis.lines]
    assert any(line.get_marker() not in ("", "None") for line in axis.lines), "a single evaluation is marked"


def test_no_text_of_a_figure_is_clipped(tmp_path):
    for seed in range(2):
        for rate in (1e-3, 1e-4):
            settings = {"a_long_name_of_a_setting": rate, "another_long_name_of_a_setting": "and_a_long_value_of_it"}
            agent_run(tmp_path / f"a{seed}{rate}", 500.0 + seed, agent="difftori", seed=seed, **settings)
            agent_run(tmp_path / f"b{seed}{rate}", 5.0, agent="tdmpc", seed=seed, **{**settings, "other": rate})
    runs = gather([tmp_path]).runs
    (section,) = sections(runs)
    methods = sorted({run.method for run in runs})
    for figure in (learning_curves(runs, RETURN, methods), over_tasks(section), profiles(section), against(section)):
        FigureCanvasAgg(figure).draw()
        box = figure.get_tightbbox()
        assert min(box.x0, box.y0) > -0.05
        assert box.x1 < figure.get_figwidth() + 0.05
        assert box.y1 < figure.get_figheight() + 0.05
        titles = [axis.title.get_window_extent() for axis in figure.axes if axis.get_title()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(titles))


def test_the_page_stands_alone_and_says_what_it_rests_on(reward, capsys):
    agent_run(reward / "longer", 800.0, agent="tdmpc", seed=9, steps=2000, lr=0.2)
    broken = agent_run(reward / "broken", 800.0, agent="tdmpc", seed=7, lr=0.2)
    (broken / "summary.json").write_text('{"return": null}')
    twice = agent_run(reward / "twice", 800.0, agent="tdmpc", seed=0, lr=0.2)
    unfinished = agent_run(reward / "unfinished", 10.0, agent="tdmpc", seed=8, lr=0.2)
    (unfinished / "summary.json").unlink()
    (reward / "media").mkdir()
    (twice / "media").mkdir()
    (reward / "dmc.cup-catch" / "a0" / "media").mkdir()
    (reward / "dmc.cup-catch" / "a0" / "media" / "episode.gif").write_bytes(b"GIF89a")
    assert main(["report", str(reward), "--title", "mine <b>"]) == 0
    page = (reward / "report" / "report.html").read_text()
    assert "mine &lt;b&gt;" in page
    assert not re.search(r'(src|href)="https?:', page)
    assert "default-src" in page
    assert "<script" not in page
    for messages in (
        "Runs differ in environment steps: 1000, 2000",
        "the same method, task and seed",
        "its return is NaN or Inf",
    ):
        assert messages in page
    assert "Unfinished runs, not included in the results: 1" in page
    assert "data:image/gif;base64," in page
    assert "report.html" in capsys.readouterr().out

    with (reward / "report" / "runs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["finished"] for line in lines} == {"True", "False"}
    assert {line["budget"] for line in lines} == {"1000 environment steps", "2000 environment steps"}
    latex = (reward / "report" / "tables.tex").read_text()
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 3
    assert "$\\pm$" in latex
    again = (reward / "report" / "report.html").read_bytes()
    assert main(["report", str(reward), "--title", "mine <b>"]) == 0
    assert (reward / "report" / "report.html").read_bytes() == again  # and is not taken for a run itself


def test_records_of_studies_are_read_too(tmp_path):
    root = Path(__file__).parents[2] / "results" / "runs" / "il" / "base_noise"
    found = gather([root])
    assert len(found.runs) == 180
    section = sections(found.runs, reference="bc, updates 1500")[0]
    best = next(row for row in section.over if row.method == "difftori-il on bc, base_noise 1")
    assert best.statistics["mean"].value == pytest.approx(0.673, abs=1e-3)  # as docs/imitation-studies.md says


def test_odd_names_and_damaged_records_end_no_report(tmp_path):
    odd = r"x$\foo$<script>_{"
    for seed in (0, 1):
        agent_run(tmp_path / f"odd{seed}", 700.0 + seed, agent=odd, seed=seed, env=f"dmc:{odd}")
    for name, value in (
        ("versions.json", []),
        ("episodes.json", []),
        ("config.yaml", {"agent": "a", "env": 3, "seed": 0}),
    ):
        place = policy_run(tmp_path / name.partition(".")[0], [1.0, 0.0], policy="bc", seed=0)
        (place / name).write_text(json.dumps(value))
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert "<script>" not in page
    assert len(gather([tmp_path]).left_out) == 3


def test_without_runs_there_is_a_clear_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    messages = capsys.readouterr().err
    assert "no runs in" in messages
    assert "does not exist" in messages
    written(tmp_path / "bad", {"agent": "tdmpc", "env": "dmc:x", "seed": 0}, [], {"return": 1.0})
    (tmp_path / "bad" / "versions.json").write_text("[")
    with pytest.raises(ConfigError, match="bad"):
        write_report([tmp_path], tmp_path / "report")


def test_measures_of_two_scales_stay_apart(tmp_path):
    for seed in range(2):
        agent_run(tmp_path / f"a{seed}", 500.0, agent="tdmpc", seed=seed)
        agent_run(tmp_path / f"b{seed}", 0.5, agent="tdmpc", seed=seed, env="probe:one-step")
        for env, value in (("gym:A-v1", 5.0), ("gym:B-v1", 5000.0)):
            agent_run(tmp_path / f"{env}-{seed}".replace(":", "."), value, agent="tdmpc", seed=seed, env=env)
            agent_run(tmp_path / f"d{env}-{seed}".replace(":", "."), 2 * value, agent="difftori", seed=seed, env=env)
    report = write_report([tmp_path], tmp_path / "report")
    named = sorted(next(iter(tables)).partition(",")[0] for tables in report.tables)
    assert named == ["return", "return", "return of 1000"]
    gym = next(part for part in sections(gather([tmp_path]).runs) if len(part.tasks) == 2)
    assert {pair.task for pair in gym.pairs} == {"gym:A-v1 (state)", "gym:B-v1 (state)"}, (
        "no mean over tasks without a scale"
    )


def test_a_base_without_any_record_is_named_by_its_path(tmp_path):
    policy_run(tmp_path / "a", [1.0, 0.0], policy="residual", seed=0, base="runs/x/bc_updates-1500/seed-0")
    policy_run(tmp_path / "b", [1.0, 0.0], policy="residual", seed=0, base="runs/mine")
    assert {run.method for run in gather([tmp_path]).runs} == {
        "residual on runs/x/bc_updates-1500/seed-0",
        "residual on runs/mine",
    }


def test_the_latest_evaluation_after_training(tmp_path, capsys):
    for seed in range(2):
        agent_run(tmp_path / f"agent{seed}", 500.0, agent="tdmpc", seed=seed)
        policy_run(tmp_path / f"policy{seed}", [1.0, 0.0], policy="bc", seed=seed)
    kept = {"time": "2026-01-01T00:00:00+0000", "command": "difftori eval", "weights": "last"}
    entry = {**kept, "metrics": {"eval/return": 321.0}, "episodes": {"return": [321.0] * 40, "length": [250] * 40}}
    (tmp_path / "agent0" / "eval.json").write_text(json.dumps([{**entry, "metrics": {"eval/return": 1.0}}, entry]))
    episodes = {"seed": [7, 8, 9, 10], "success": [1.0, 1.0, 1.0, 0.0], "score": [1.0, 1.0, 1.0, 0.0]}
    metrics = {"success": 0.75, "score": 0.75, "return": None}
    best = {**kept, "weights": "best", "metrics": metrics, "episodes": episodes}
    (tmp_path / "policy0" / "eval.json").write_text(json.dumps([best]))

    before = {run.place.name: next(iter(run.outcomes.values())) for run in gather([tmp_path]).runs}
    assert before == {"agent0": 500.0, "agent1": 500.0, "policy0": 0.5, "policy1": 0.5}
    found = gather([tmp_path], "latest")
    agent, policy = sorted(found.runs, key=lambda run: run.place.name)
    assert list(agent.outcomes.values()) == [321.0]
    assert agent.config["eval_episodes"] == 40
    assert {m.name: value for m, value in policy.outcomes.items()} == {"success": 0.75, "score": 0.75}
    assert (policy.rule, policy.episode_seeds) == ("weights of least validation error", (7, 8, 9, 10))
    assert {place.name for place, _ in found.left_out} == {"agent1", "policy1"}
    assert all("difftori eval RUN" in reason for _, reason in found.left_out)

    main(["report", str(tmp_path), "--evaluation", "latest", "--out", str(tmp_path / "out")])
    assert "0.75" in capsys.readouterr().out
    rows = csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines())
    assert sorted(row["episodes"] for row in rows) == ["4", "40"]
    with pytest.raises(ConfigError, match="records of studies have no later evaluation"):
        gather([Path("results/runs/il/table1")], "latest")


def test_as_many_epochs_in_larger_batches_is_another_budget(tmp_path):
    for policy, updates in (("bc", 120), ("residual", 60)):
        place = policy_run(tmp_path / policy, [1.0, 0.0], policy=policy, seed=0, settings={"epochs": 60})
        summary = json.loads((place / "summary.json").read_text())
        (place / "summary.json").write_text(json.dumps({**summary, "updates": updates}))
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert "trained with between 60 and 120 updates" in page
    assert "60 epochs, 120 updates" in page


def test_data_of_one_name_in_several_folders_are_several_tasks(tmp_path):
    for task, success in (("lift", 1.0), ("can", 0.0)):
        demos = f"data/{task}/ph/low_dim_v15.hdf5"
        policy_run(tmp_path / task, [success] * 4, policy="bc", seed=0, env="none", demos=demos)
    policy_run(tmp_path / "other", [1.0] * 4, policy="bc", seed=0, env="none", demos="data/lift/ph/image.hdf5")
    found = gather([tmp_path])
    assert sorted(run.task for run in found.runs) == ["can/ph/low_dim_v15", "image", "lift/ph/low_dim_v15"]
    assert not found.left_out


def test_data_distinguish_runs_that_differ_in_nothing_else(tmp_path):
    for name in ("ph", "mh"):
        policy_run(tmp_path / name, [1.0] * 4, policy="bc", seed=0, demos=f"data/{name}.hdf5")
    for seed in (0, 1):
        policy_run(tmp_path / f"other-{seed}", [1.0] * 4, policy="ibc", seed=seed, demos=f"data/demos-{seed}.zarr")
        policy_run(tmp_path / f"task-{seed}", [1.0] * 4, policy="ibc", seed=seed, demos=f"x-{seed}.zarr", env="pusht")
    found = gather([tmp_path])
    assert {run.method for run in found.runs} == {"bc, demos ph", "bc, demos mh", "ibc"}
    assert not found.left_out


def test_a_finished_run_is_preferred_to_an_earlier_attempt(tmp_path):
    for number, success in ((1, 0.0), (2, 1.0), (3, 0.0)):
        policy_run(tmp_path / f"attempt-{number}", [success] * 4, policy="bc", seed=0)
    (tmp_path / "attempt-1" / "summary.json").unlink()
    found = gather([tmp_path])
    assert [run.place.name for run in found.runs] == ["attempt-2"]
    assert [place.name for place, _ in found.left_out] == ["attempt-3", "attempt-1"]


def test_damaged_files_of_a_run_exclude_that_run_only(tmp_path):
    policy_run(tmp_path / "good", [1.0] * 4, policy="bc", seed=0)
    for number, name in enumerate(("metrics.jsonl", "policy.pt.sha256"), start=1):
        place = policy_run(tmp_path / name, [1.0] * 4, policy="bc", seed=number)
        (place / name).write_bytes(b"\xff\xfe" if name == "metrics.jsonl" else b"")
    found = gather([tmp_path])
    assert [run.place.name for run in found.runs] == ["good"]
    assert {place.name for place, _ in found.left_out} == {"metrics.jsonl", "policy.pt.sha256"}


def test_runs_behind_links_are_found_once(tmp_path):
    policy_run(tmp_path / "disk" / "run", [1.0] * 4, policy="bc", seed=0)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "up").symlink_to(tmp_path / "runs")
    assert [run.place.name for run in gather([tmp_path / "runs"]).runs] == ["run"]


def test_few_seeds_are_warned_of(reward, tmp_path):
    page = write_report([reward], tmp_path / "page").page.read_text()
    assert "with 3 seeds, the bootstrap&#39;s 95 % intervals are too narrow" in page
    with pytest.raises(ConfigError, match="is a file"):
        write_report([reward], tmp_path / "page" / "report.html")


def test_shorter_episodes_have_a_smaller_largest_return(tmp_path):
    for seed in (0, 1):
        config = {"agent": "sac", "env": "dmc:cup-catch", "obs": "state", "steps": 10, "seed": seed, "eval_episodes": 2}
        short = {**config, "max_episode_steps": 100}
        written(tmp_path / f"short-{seed}", short, [], {"return": 80.0, "seconds": 1.0})
    (section,) = sections(gather([tmp_path]).runs)
    assert section.measure.full == 100.0
    assert section.over[0].statistics["mean"].value == pytest.approx(0.8)


def test_data_are_told_apart_by_their_whole_path_and_not_by_the_seed_in_it(tmp_path):
    for seed, version in itertools.product((1, 2, 3), ("v1", "v2")):
        place = tmp_path / "versions" / f"{version}-{seed}"
        policy_run(place, [1.0] * 4, policy="bc", seed=seed, demos=f"data/{version}.zarr", env="pusht")
    for seed, kind in itertools.product((0, 1), ("ph", "mh")):
        demos = f"data/lift/{kind}/seed-{seed}/low_dim.hdf5"
        policy_run(tmp_path / f"{kind}-{seed}", [1.0] * 4, policy="bc", seed=seed, demos=demos, env="robomimic:lift")
    found = gather([tmp_path])
    assert not found.left_out
    by_task = {task: {run.method for run in found.runs if run.task == task} for task in ("pusht", "robomimic:lift")}
    assert by_task == {
        "pusht": {"bc, demos v1", "bc, demos v2"},
        "robomimic:lift": {"bc, demos ph/seed-SEED/low_dim", "bc, demos mh/seed-SEED/low_dim"},
    }


def test_a_data_set_by_a_relative_and_an_absolute_path_is_one_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, demos in ((0, "data/lift.zarr"), (1, str(tmp_path / "data" / "lift.zarr"))):
        policy_run(tmp_path / str(seed), [1.0] * 4, policy="bc", seed=seed, env="none", demos=demos)
    assert {run.task for run in gather([tmp_path]).runs} == {"lift"}


def test_a_refiner_is_compared_with_its_base_whatever_their_settings(tmp_path):
    for name, more in (("bc", {}), ("bc-pointnet", {}), ("residual", {"base": "x"})):
        for updates in (10, 20):
            settings = {"updates": updates}
            policy_run(tmp_path / f"{name}-{updates}", [1.0, 0.0], policy=name, seed=0, settings=settings, **more)
    runs = gather([tmp_path]).runs
    renamed = [replace(run, method=run.method.replace("residual on x", "residual on bc (updates 10)")) for run in runs]
    (section, *_) = sections(renamed)
    pairs = {(pair.method, pair.reference) for pair in section.pairs}
    assert ("residual on bc (updates 10), updates 10", "bc, updates 10") in pairs
    assert ("bc-pointnet, updates 10", "residual on bc (updates 10), updates 10") in pairs


def changed(place: Path, **values: object) -> Path:
    config = yaml.safe_load((place / "config.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump(config | values))
    return place


def test_an_evaluation_of_earlier_weights_is_not_the_latest(tmp_path):
    """Of a run that was extended, or evaluated before its end."""
    place = agent_run(tmp_path / "run", 500.0, agent="tdmpc", seed=0)
    (place / "metrics.jsonl").write_text(json.dumps({"step": 1000, "eval/return": 500.0, "time": 1767225600.0}) + "\n")
    entry = {"command": "difftori eval", "weights": "last", "episodes": {"return": [1.0], "length": [250]}}
    entries = [
        {**entry, "time": time, "metrics": {"eval/return": value}}
        for time, value in (("2026-01-01T00:00:01+0000", 700.0), ("2025-12-31T23:59:59+0000", 1.0))
    ]
    (place / "eval.json").write_text(json.dumps(entries))
    assert list(gather([tmp_path], "latest").runs[0].outcomes.values()) == [700.0]
    (place / "eval.json").write_text(json.dumps(entries[1:]))
    with pytest.raises(ConfigError, match="not evaluated after its training"):
        gather([tmp_path], "latest")


def test_runs_in_environments_of_other_options_are_not_compared(tmp_path):
    changed(agent_run(tmp_path / "a", 900.0, agent="tdmpc", seed=0), env_options=["friction=0.5", "a=1"])
    changed(agent_run(tmp_path / "b", 800.0, agent="sac", seed=0), env_options=[])
    changed(agent_run(tmp_path / "c", 700.0, agent="sac", seed=1), max_episode_steps=500)
    found = gather([tmp_path]).runs
    shown = {(run.method, run.task) for run in found}
    assert shown == {
        ("tdmpc", "dmc:cup-catch (state, a=1 friction=0.5, default length)"),
        ("sac", "dmc:cup-catch (state, default options, default length)"),
        ("sac", "dmc:cup-catch (state, default options, at most 500 steps)"),
    }
    assert not any(section.pairs for section in sections(found))


def test_a_limit_beyond_an_episodes_length_does_not_change_the_largest_return(tmp_path):
    changed(agent_run(tmp_path / "a", 905.0, agent="tdmpc", seed=0), max_episode_steps=2000)
    (section,) = sections(gather([tmp_path]).runs)
    assert section.measure.full == 1000.0


def test_other_budgets_are_warned_of(tmp_path):
    for policy, settings, updates in (("bc", {"updates": 1500}, 1500), ("diffusion", {"epochs": 300}, 60_000)):
        place = policy_run(tmp_path / policy, [1.0, 0.0], policy=policy, seed=0, settings=settings)
        summary = json.loads((place / "summary.json").read_text())
        (place / "summary.json").write_text(json.dumps({**summary, "updates": updates}))
    for agent, preset, pace in (("sac", "small", 0.25), ("tdmpc", "paper", 1.0)):
        place = agent_run(tmp_path / agent, 1.0, agent=agent, seed=0, preset=preset, updates_per_step=pace)
        changed(place, action_repeat=2 if agent == "sac" else 4)
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert "trained with between 1500 and 60000 updates" in page
    assert "Agents differ in preset: paper, small" in page
    assert "Agents differ in updates per step: 0.25, 1.0" in page
    assert "Agents differ in action repeat: 2, 4" in page
    assert "1000 environment steps, preset small, updates per step 0.25, action_repeat 2" in page


def test_agents_have_a_success_and_with_one_seed_a_comparison_over_episodes(tmp_path):
    for agent, wins in (("sac", [1.0, 0.0, 0.0, 0.0]), ("tdmpc", [1.0, 1.0, 1.0, 0.0])):
        place = agent_run(tmp_path / agent, 1.0, agent=agent, seed=0, env="metaworld:reach")
        rows = [
            {"step": 0, "eval/return": 0.0, "eval/success": 0.0},
            {"step": 9, "eval/return": 1.0, "eval/success": 0.5},
        ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics = {"eval/return": sum(wins), "eval/success": sum(wins) / 4}
        entry = {
            "time": "2026-01-01T00:00:00+0000",
            "weights": "last",
            "metrics": metrics,
            "episodes": {"return": wins},
        }
        (place / "eval.json").write_text(json.dumps([entry]))
    measures = {section.measure.name: section for section in sections(gather([tmp_path]).runs)}
    assert [cell.mean.value for cell in measures["success"].cells] == [0.5, 0.5]
    latest = {section.measure.name: section for section in sections(gather([tmp_path], "latest").runs)}
    assert [cell.mean.value for cell in latest["success"].cells] == [0.25, 0.75]
    (pair,) = latest["return"].pairs
    assert (pair.episodes, abs(pair.difference.value)) == (4, 0.5)


def test_failed_runs_seeds_of_other_data_and_ties_are_named(tmp_path):
    for policy, shift in (("bc", 0), ("lstm", 1)):
        for seed in (0, 1):
            wins = [1.0] * (seed + 1 + shift) + [0.0] * (5 - seed - shift)
            policy_run(tmp_path / f"{policy}/seed-{seed}", wins, policy=policy, seed=seed, demos=f"{'ab'[seed]}.zarr")
    (tmp_path / "bc" / "seed-2.failed.json").write_text(json.dumps({"status": 1, "reason": "no such file"}))
    (tmp_path / "bc" / "seed-0.failed.json").write_text(json.dumps({"status": 9, "reason": "trained again since"}))
    page = write_report([tmp_path], tmp_path / "report").page.read_text()
    assert "failed with status 1: no such file" in page
    assert "trained again since" not in page
    assert "bc on metaworld:assembly: seeds were trained on different data: a, b" in page
    assert "1 differences are equal on all seeds, so their intervals have no width" in page


def test_the_command_of_an_extended_run_has_its_extension(tmp_path):
    place = agent_run(tmp_path / "run", 1.0, agent="sac", seed=0)
    lines = ("difftori train sac --steps 60", "difftori train --resume run", "difftori train --resume run --steps 400")
    (place / "command.txt").write_text("".join(f"2026-01-01T00:00:00  {line}\n" for line in lines))
    assert gather([tmp_path]).runs[0].command == f"{lines[0]} && {lines[2]}"

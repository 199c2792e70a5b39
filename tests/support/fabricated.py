"""Run folders as training leaves them, as far as the studies read them, made up instead of trained."""

import json

from difftori.experiments.study import StudyRun
from difftori.runs.records import to_yaml


def write_run(run: StudyRun, *, end: float, until: int | None = None, pace: float = 0.01, **versions: str) -> None:
    """A run whose return rises linearly to `end` at its last step; `until` stops it there, unfinished.

    An agent step takes `pace` seconds of acting, an update 2·pace, evaluation 5 s each; one agent step is two environment steps.
    """
    config, folder = run.config, run.spec.folder
    last = config.steps if until is None else until
    grid = sorted({*range(0, last + 1, config.eval_every), last})
    rows, acted = [], 0.0
    for count, step in enumerate(grid, start=1):
        acted = pace * step / 2
        rows.append({"step": max(step - 1, 0), "train/return": 1.0})
        rows.append(
            {
                "step": step,
                "eval/return": end * step / config.steps,
                "updates": step // 2,
                "seconds/evaluation": 5.0 * count,
                "seconds/total": 3 * acted + 5.0 * count,
            }
        )
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(to_yaml(config))
    machine = {"cpu": "a processor", "device_name": None, "threads": 1, "platform": "a system", **versions}
    (folder / "versions.json").write_text(json.dumps(machine))
    if until is None:
        seeds = config.settings.seed_steps
        summary = {
            "env_steps": float(config.steps),
            "agent_steps": config.steps / 2,
            "updates": config.steps / 2,
            "seconds": 3 * acted + 5.0 * len(grid),
            "seconds/evaluation": 5.0 * len(grid),
            "seconds/acting": pace * (config.steps / 2 - seeds),
            "seconds/sampling": 0.0,
            "seconds/update": 2 * pace * config.steps / 2,
        }
        (folder / "summary.json").write_text(json.dumps(summary))

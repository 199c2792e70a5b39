"""Table 8: imitation of an optimal pendulum (Amos et al., 2018, arXiv 1810.13400) with and without a realisable model.

For each setting, method and seed, a policy learns the 20 open-loop torques of the expert from 100 trajectories. The weights
with the least validation error of the controls are selected. Every policy is executed open loop in the TRUE environment, and
its summed cost is reported under two protocols:

* `test`: 10 test trajectories of that seed. This is our interpretation of the paper, which does not specify the trajectories. The
  standard deviation over starts is about 16, so the mean of 10 is imprecise;
* `common`: the same 1000 or more starts for every method and seed, with the paired difference to the expert.

Costs differ from the paper's mostly because of other starts. Compare the ratios to the expert.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from difftori.envs.pendulum import Pendulum, pendulum, sample_starts
from difftori.experiments.paper.table8_figures import Curve, Swing, learning_curves, phase_plane
from difftori.experiments.paper.table8_report import Evaluation, SeedResult, write_report
from difftori.experiments.plots import save_svg
from difftori.experiments.statistics import paired_difference
from difftori.il.config import TrainConfig, parse_config
from difftori.il.pendulum_task import expert_plans
from difftori.il.train import train
from difftori.il.weights import load_policy
from difftori.policies.normalized import NormalizedPolicy
from difftori.runs.records import is_finished, read_metrics
from difftori.types import Plans, States, state_obs

Setting = Literal["no-damping", "damping"]
Method = Literal["expert", "amos", "lstm", "bc", "difftori", "difftori-step"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)
METHODS: tuple[Method, ...] = get_args(Method)
ENVS = {"no-damping": "pendulum", "damping": "pendulum:damped"}
TASKS = {"no-damping": "undamped", "damping": "damped"}
POLICIES = {"amos": "mpc", "lstm": "lstm", "bc": "bc", "difftori": "difftori-il", "difftori-step": "difftori-il"}
_STEP = {"preset": "pendulum", "decision": "step", "init": "zero", "hidden": [64, 64], "clip_norm": 1.0, "epochs": 200}
OVERRIDES: dict[tuple[str, str], dict[str, object]] = {
    ("damping", "amos"): {
        "learn_cost": False,
        "init_parameters": [5.0, 1.0, 1.0],
        "init_spread": [1.5, 0.5, 0.5],
        "epochs": 250,
    },
    ("no-damping", "difftori"): {"preset": "pendulum"},
    ("damping", "difftori"): {"preset": "pendulum"},
    ("no-damping", "difftori-step"): _STEP,
    ("damping", "difftori-step"): _STEP,
}
"""(setting, method) → settings that differ from the policy's defaults."""

COMMON_STREAM, TEST_STREAM, SHOWN_STREAM = (8, 0), (8, 1), (8, 2)
"""Seeds of the evaluation starts. Training data use (seed, 0) and (seed, 1), so seeds must be below 8."""
MOST_SEEDS = COMMON_STREAM[0]
FULL_SEEDS, FULL_STARTS, FULL_TRAIN = 3, 1000, 100
QUICK_EPOCHS = 20
TEST_STARTS = 10
VALIDATE_EVERY = 5
SHOWN_STARTS = 8
ROWS_AT_ONCE = 250
VALIDATION = "validation/error"


class Config(BaseModel):
    """Imitation of an optimal pendulum (Table 8). The defaults are the full study; a smaller one is labelled `partial` in every output."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seeds: int = Field(default=FULL_SEEDS, ge=1, le=MOST_SEEDS)
    """Number of seeds: 0 … seeds−1, each with its own trajectories and training. At most 8, because the ninth would train on the common
    starts."""
    methods: tuple[Method, ...] = Field(default=METHODS, min_length=1)
    """Methods to compare. `amos` is the policy `mpc`. `difftori` scores the chunk of 20 torques at once; `difftori-step` plans 20 steps
    through learned dynamics. `bc` is our addition and not in the paper."""
    settings: tuple[Setting, ...] = Field(default=SETTINGS, min_length=1)
    """Settings of the pendulum. The model of `amos` cannot represent the true dynamics of `damping`."""
    out: Path = Path("results/table8")
    """Directory of tables and figures; those of a partial study are in its folder `partial`, and never replace full ones."""
    runs: Path = Path("runs/table8")
    """Directory of the runs. Finished runs in it are not repeated, interrupted ones are resumed."""
    num_train: int = Field(default=FULL_TRAIN, ge=1)
    """Number of training trajectories."""
    test_starts: int = Field(default=FULL_STARTS, ge=2)
    """Number of common starts, for the protocol `common`."""
    epochs: int | None = Field(default=None, ge=1)
    """Number of epochs of every training (default: each policy's own number)."""
    quick: bool = False
    """Run one seed and 20 epochs, to check that everything works."""


@dataclass(frozen=True)
class Bench:
    """The true problem of a setting, with starts (B 3), the expert's controls from them (B 20 1), and their costs (B)."""

    setting: Setting
    problem: Pendulum
    starts: States
    controls: Plans
    costs: np.ndarray


@dataclass(frozen=True)
class Trained:
    """A finished run: the selected policy, its learning curve, and its training cost."""

    policy: NormalizedPolicy
    curve: Curve
    epochs: int
    updates: int
    seconds: float
    threads: int
    hardware: str
    command: str


def run(config: Config) -> None:
    """Train missing policies, evaluate all, and write tables and figures to `output_folder(config)`."""
    console = Console()
    evaluations: list[Evaluation] = []
    curves: dict[str, dict[str, list[Curve]]] = {}
    swings: dict[str, dict[str, Swing]] = {}
    for setting in config.settings:
        common = _bench(setting, config.test_starts, COMMON_STREAM)
        shown = _bench(setting, SHOWN_STARTS, SHOWN_STREAM)
        curves[setting], swings[setting] = {}, {}
        for method in config.methods:
            for seed in range(_seeds(config)):
                trained = None if method == "expert" else _trained(config, setting, method, seed, console)
                test = _bench(setting, TEST_STARTS, (*TEST_STREAM, seed))
                evaluations.append(_evaluate(config, method, seed, trained, test, common))
                if trained is not None:
                    curves[setting].setdefault(method, []).append(trained.curve)
                if seed == 0:
                    swings[setting][method] = _swing(shown, trained)
    out = output_folder(config)
    write_report(evaluations, out, preface=_preface(config), console=console)
    _draw(config, curves, swings, out)
    console.print(f"Tables and figures are in {out}.", soft_wrap=True)


def partial_reasons(config: Config) -> list[str]:
    """Return the reasons why the configuration is less than the full study; empty if it is the full study."""
    checks = {
        "quick": config.quick,
        f"{config.epochs} epochs": config.epochs is not None,
        f"{_seeds(config)} of {FULL_SEEDS} seeds": _seeds(config) < FULL_SEEDS,
        f"{config.test_starts} of {FULL_STARTS} common starts": config.test_starts < FULL_STARTS,
        f"{config.num_train} of {FULL_TRAIN} trajectories": config.num_train < FULL_TRAIN,
        "not every method": set(config.methods) != set(METHODS),
        "not every setting": set(config.settings) != set(SETTINGS),
    }
    return [reason for reason, holds in checks.items() if holds]


def output_folder(config: Config) -> Path:
    """Return the directory of the tables and figures."""
    return config.out / "partial" if partial_reasons(config) else config.out


def _seeds(config: Config) -> int:
    return 1 if config.quick else config.seeds


def _epochs(config: Config) -> int | None:
    return QUICK_EPOCHS if config.quick and config.epochs is None else config.epochs


def _bench(setting: Setting, count: int, stream: tuple[int, ...]) -> Bench:
    problem = pendulum(TASKS[setting])
    starts = sample_starts(count, np.random.default_rng(stream))
    controls = expert_plans(problem, starts)
    return Bench(setting, problem, starts, controls, problem.cost(starts, controls).numpy().astype(np.float64))


def _train_config(config: Config, setting: Setting, method: Method, seed: int) -> TrainConfig:
    epochs = _epochs(config)
    length = {} if epochs is None else {"epochs": epochs}
    return parse_config(
        {
            "policy": POLICIES[method],
            "env": ENVS[setting],
            "seed": seed,
            "num_train": config.num_train,
            "eval_every": VALIDATE_EVERY,
            "settings": {**OVERRIDES.get((setting, method), {}), **length},
        }
    )


def _run_dir(config: Config, setting: Setting, method: Method, seed: int) -> Path:
    """Return the run directory of a training. Shortened trainings have separate directories, and never replace full ones."""
    size = "" if config.num_train == FULL_TRAIN else f"-{config.num_train}-trajectories"
    length = "" if _epochs(config) is None else f"-{_epochs(config)}-epochs"
    return config.runs / f"{setting}-{method}{size}{length}" / f"seed-{seed}"


def _trained(config: Config, setting: Setting, method: Method, seed: int, console: Console) -> Trained:
    """Train unless the run is finished, and load the result.

    Raises `ConfigError` if the folder holds a run of another configuration.
    """
    folder = _run_dir(config, setting, method, seed)
    state = "already finished" if is_finished(folder) else "training"
    console.print(f"{setting}, {method}, seed {seed}: {state}, {folder}", highlight=False, soft_wrap=True)
    summary = train(_train_config(config, setting, method, seed), folder, progress=console.is_terminal)
    policy, _ = load_policy(folder, "best")
    versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    rows = [row for row in read_metrics(folder) if row.get(VALIDATION) is not None]
    return Trained(
        policy=policy,
        curve=Curve(np.array([row["epoch"] for row in rows]), np.array([row[VALIDATION] for row in rows])),
        epochs=int(summary["epochs"]),
        updates=int(summary["updates"]),
        seconds=summary["seconds"],
        threads=int(versions["threads"]),
        hardware=f"{versions['cpu']}, {versions['platform']}",
        command=(folder / "command.txt").read_text(encoding="utf-8").splitlines()[0],
    )


def _plans(policy: NormalizedPolicy, starts: States, seed: int) -> Plans:
    """Return the policy's controls (B 20 1), computed in batches of a few hundred rows to bound the memory of planners."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([policy.act(state_obs(rows), generator=generator) for rows in starts.split(ROWS_AT_ONCE)])


def _evaluate(
    config: Config, method: Method, seed: int, trained: Trained | None, test: Bench, common: Bench
) -> Evaluation:
    """Evaluate one run under both protocols; the expert if `trained` is None."""
    costs, errors = [], []
    for bench in (test, common):
        plans = bench.controls if trained is None else _plans(trained.policy, bench.starts, seed)
        costs.append(bench.problem.cost(bench.starts, plans).numpy().astype(np.float64))
        errors.append((plans - bench.controls).square().mean().item())
    reasons = partial_reasons(config)
    result = SeedResult(
        setting=common.setting,
        method=method,
        seed=seed,
        label=f"partial ({', '.join(reasons)})" if reasons else "full",
        test_starts=len(costs[0]),
        cost_test=costs[0].mean(),
        expert_test=test.costs.mean(),
        ratio_test=costs[0].mean() / test.costs.mean(),
        control_mse_test=errors[0],
        common_starts=len(costs[1]),
        cost_common=costs[1].mean(),
        expert_common=common.costs.mean(),
        ratio_common=costs[1].mean() / common.costs.mean(),
        difference=paired_difference(costs[1], common.costs),
        control_mse_common=errors[1],
        epochs=trained.epochs if trained else None,
        updates=trained.updates if trained else None,
        seconds=trained.seconds if trained else None,
        threads=trained.threads if trained else None,
        hardware=trained.hardware if trained else None,
        command=trained.command if trained else None,
    )
    return Evaluation(result, costs[1], common.costs)


def _swing(shown: Bench, trained: Trained | None) -> Swing:
    plans = shown.controls if trained is None else _plans(trained.policy, shown.starts, 0)
    states = shown.problem.rollout(shown.starts, plans).numpy()
    cost = shown.problem.cost(shown.starts, plans).mean().item()
    angles = np.unwrap(np.arctan2(states[..., 1], states[..., 0]), axis=1)
    return Swing(angles, states[..., 2], f"mean cost {cost:.2f}")


def _preface(config: Config) -> str:
    reasons = partial_reasons(config)
    label = f"**PARTIAL RUN: {', '.join(reasons)}.** Not comparable with the paper." if reasons else "Full study."
    return (
        f"{label} {config.num_train} training, 10 validation trajectories per seed, {_seeds(config)} seed(s); the "
        "weights with the least validation control error are evaluated open loop in the true environment. Created by "
        f"`{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}`; per-seed numbers, hardware and commands are in "
        "`seeds.csv`."
    )


def _draw(
    config: Config, curves: dict[str, dict[str, list[Curve]]], swings: dict[str, dict[str, Swing]], out: Path
) -> None:
    partial = "partial run · " if partial_reasons(config) else ""
    if any(curves.values()):
        caption = f"{partial}thin: seeds; bold: their median; on the 10 validation trajectories of each seed"
        figure = learning_curves(curves, METHODS, ylabel="least validation control error so far (MSE)", caption=caption)
        save_svg(figure, out / "learning_curves.svg")
    caption = (
        f"{partial}{SHOWN_STARTS} common starts, seed 0, open loop in the true environment; grey: the expert; "
        "ring: start, dot: 0.95 s later, the last state with a cost"
    )
    figure = phase_plane(swings, METHODS, reference="expert", caption=caption)
    save_svg(figure, out / "phase_plane.svg")

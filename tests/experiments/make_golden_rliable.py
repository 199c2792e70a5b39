"""Makes `golden_rliable.json`: what rliable says of the published curves that this package ships.

rliable is no dependency, because it wants pandas below 3. In an environment of its own:

    python -m venv /tmp/rliable && /tmp/rliable/bin/pip install rliable==1.2.0 'pandas<3'
    PYTHONPATH=src /tmp/rliable/bin/python tests/experiments/make_golden_rliable.py
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
from rliable import library, metrics

from difftori.paper.curves import published_curves

STEPS = 500_000
METHODS = ("TD-MPC2", "SAC", "TD-MPC (rerun)")
THRESHOLDS = (0.0, 0.25, 0.5, 0.75, 0.9)
SEEDS = 3
RESAMPLES = 5000


def scores(method: str) -> np.ndarray:
    """The first seeds × tasks, returns of 1000 as 1."""
    curves = sorted((curve for curve in published_curves("state") if curve.method == method), key=lambda c: c.task)
    return np.stack([curve.at(STEPS)[:SEEDS] for curve in curves], axis=1) / 1000


def main() -> None:
    """Write the file."""
    found = {method: scores(method) for method in METHODS}
    functions = {
        "mean": metrics.aggregate_mean,
        "median": metrics.aggregate_median,
        "iqm": metrics.aggregate_iqm,
        "optimality_gap": metrics.aggregate_optimality_gap,
    }
    golden: dict = {
        "source": f"rliable {importlib.metadata.version('rliable')}, numpy {np.__version__}",
        "steps": STEPS,
        "thresholds": THRESHOLDS,
        "methods": {},
        "improvement": {},
    }
    for method, values in found.items():
        state = np.random.RandomState(0)
        own = {}
        for name, function in functions.items():
            bootstrap = library.StratifiedBootstrap(values, random_state=state)
            low, high = bootstrap.conf_int(lambda x, f=function: np.array([f(x)]), reps=RESAMPLES, method="percentile")[
                :, 0
            ]
            own[name] = [float(function(values)), float(low), float(high)]
        own["profile"] = [float(library.run_score_deviation(values, tau)) for tau in THRESHOLDS]
        golden["methods"][method] = own
    for first, second in (("TD-MPC2", "SAC"), ("TD-MPC (rerun)", "SAC")):
        value = metrics.probability_of_improvement(found[first], found[second])
        bootstrap = library.StratifiedIndependentBootstrap(
            found[first], found[second], random_state=np.random.RandomState(0)
        )
        low, high = bootstrap.conf_int(
            lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=2000, method="percentile"
        )[:, 0]
        golden["improvement"][f"{first} over {second}"] = [float(value), float(low), float(high)]
    target = Path(__file__).with_name("golden_rliable.json")
    target.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()

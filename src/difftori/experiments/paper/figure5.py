"""Figure 5: what the policy-gradient term of Eq. 6 adds: DiffTORI with it, in two schedules, and without it.

`off` plans with the optimiser but never learns through it. `per-episode` is the released schedule, `replay` Eq. 6 as
written. Further forms: `replay-25` takes a step at every 25th update only, `replay-slow` at a tenth of the learning rate,
`replay-critics` trains Q alone and slowly, `replay-shared` adds the term to Eq. 3's gradient instead of giving it an
optimizer of its own, `…-flipped` has the sign of c_0 flipped: a term that helps must do worse then. Differences are paired by seed.
"""

from typing import Literal, get_args

from pydantic import Field

from difftori.experiments.rl_report import run_ablation
from difftori.experiments.rl_study import RLStudy
from difftori.experiments.study import Method

Form = Literal[
    "off",
    "per-episode",
    "replay",
    "replay-25",
    "replay-slow",
    "replay-critics",
    "replay-shared",
    "per-episode-flipped",
    "replay-flipped",
]
FULL_FORMS: tuple[Form, ...] = ("off", "per-episode", "replay")
FORMS: dict[str, Method] = {
    "off": Method("off", "difftori", {"pg": "off"}),
    "per-episode": Method("per-episode", "difftori", {"pg": "per-episode"}),
    "replay": Method("replay", "difftori", {"pg": "replay"}),
    "replay-25": Method("replay-25", "difftori", {"pg": "replay", "pg_every": 25}),
    "replay-slow": Method("replay-slow", "difftori", {"pg": "replay", "pg_lr": 1e-4}),
    "replay-critics": Method("replay-critics", "difftori", {"pg": "replay", "pg_networks": ("q",), "pg_lr": 1e-4}),
    "replay-shared": Method("replay-shared", "difftori", {"pg": "replay", "pg_optimizer": "shared"}),
    "per-episode-flipped": Method("per-episode-flipped", "difftori", {"pg": "per-episode", "pg_coef": -1.0}),
    "replay-flipped": Method("replay-flipped", "difftori", {"pg": "replay", "pg_coef": -1.0}),
}
assert tuple(FORMS) == get_args(Form)


class Config(RLStudy):
    """DiffTORI with and without the policy-gradient term of Eq. 6 (Figure 5)."""

    forms: tuple[Form, ...] = Field(FULL_FORMS, min_length=1)
    """Forms of the policy-gradient term to compare (docs/reinforcement-studies.md); `off`, the reference, is always among them."""


def run(config: Config) -> None:
    """Run what is missing, and write `out/figure5`. RunsFailedError, after everything is drawn, if runs failed."""
    methods = [FORMS[name] for name in dict.fromkeys(("off", *config.forms))]
    lacking = set(FULL_FORMS) - {method.label for method in methods}
    run_ablation(
        config,
        methods,
        study="figure5",
        title="Figure 5: with and without the policy-gradient term",
        further=[f"without {', '.join(sorted(lacking))}"] if lacking else [],
    )

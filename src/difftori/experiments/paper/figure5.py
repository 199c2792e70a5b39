"""Figure 5: the effect of the policy-gradient term of Eq. 6. DiffTORI with the term, in two schedules, and without it.

`off` plans by optimisation but does not differentiate through it. `per-episode` is the released schedule, `replay` is Eq. 6
as written. Further forms: `replay-25` takes a policy-gradient step at every 25th update only; `replay-slow` has a tenth of
the learning rate; `replay-critics` trains Q only, with that rate; `replay-shared` adds the term to the gradient of Eq. 3
instead of using a separate optimizer; `per-episode-one-step` trains Q̃ on the first step of each segment instead of
all, with that much less arithmetic; `…-flipped` has the opposite sign of c_0, so that a useful term must give worse results.
Differences are paired by seed.
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
    "per-episode-one-step",
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
    "per-episode-one-step": Method("per-episode-one-step", "difftori", {"pg": "per-episode", "obs_q_steps": 1}),
    "per-episode-flipped": Method("per-episode-flipped", "difftori", {"pg": "per-episode", "pg_coef": -1.0}),
    "replay-flipped": Method("replay-flipped", "difftori", {"pg": "replay", "pg_coef": -1.0}),
}
assert tuple(FORMS) == get_args(Form)


class Config(RLStudy):
    """DiffTORI with and without the policy-gradient term of Eq. 6 (Figure 5)."""

    forms: tuple[Form, ...] = Field(default=FULL_FORMS, min_length=1)
    """Forms of the policy-gradient term to compare (docs/reinforcement-studies.md). The reference, `off`, is always included."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/figure5`. Raises RunsFailedError at the end if runs failed."""
    methods = [FORMS[name] for name in dict.fromkeys(("off", *config.forms))]
    lacking = set(FULL_FORMS) - {method.label for method in methods}
    run_ablation(
        config,
        methods,
        study="figure5",
        title="Figure 5: with and without the policy-gradient term",
        further=[f"without {', '.join(sorted(lacking))}"] if lacking else [],
    )

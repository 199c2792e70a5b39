"""Figure 6: DiffTORI without the reward loss, without the dynamics (consistency) loss, and without the policy prior.

`no-reward` and `no-consistency` set that coefficient of Eq. 3 to 0. In `no-prior`, solves start from zero instead of the
prior's rollout; the prior is still used for Bellman targets and the terminal value. Differences from the complete method are
paired by seed.
"""

from difftori.experiments.rl_report import run_ablation
from difftori.experiments.rl_study import RLStudy
from difftori.experiments.study import Method

WHOLE = Method("difftori", "difftori")
METHODS = (
    WHOLE,
    Method("no-reward", "difftori", {"reward_coef": 0.0}),
    Method("no-consistency", "difftori", {"consistency_coef": 0.0}),
    Method("no-prior", "difftori", {"init": "zero"}),
)


class Config(RLStudy):
    """DiffTORI without the reward loss, without the dynamics loss, and without the policy prior (Figure 6)."""


def run(config: Config) -> None:
    """Run the missing runs, and write `out/figure6`. Raises RunsFailedError at the end if runs failed."""
    title = "Figure 6: dropping the reward loss, the dynamics loss, the prior"
    run_ablation(config, METHODS, study="figure6", title=title)

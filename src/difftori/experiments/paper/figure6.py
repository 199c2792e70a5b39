"""Figure 6: DiffTORI without the reward loss, without the dynamics (consistency) loss, and without the policy prior.

`no-reward` and `no-consistency` set that coefficient of Eq. 3 to 0; in `no-prior` solves start from zero instead of the
prior's rollout, while the prior goes on serving Bellman targets and the terminal value. Differences from the whole
method are paired by seed.
"""

from difftori.experiments.ablation import run_ablation
from difftori.experiments.runs import Arm, StudyConfig

WHOLE = Arm("difftori", "difftori")
ARMS = (
    WHOLE,
    Arm("no-reward", "difftori", {"reward_coef": 0.0}),
    Arm("no-consistency", "difftori", {"consistency_coef": 0.0}),
    Arm("no-prior", "difftori", {"init": "zero"}),
)


class Config(StudyConfig):
    """What to run of Figure 6."""


def run(config: Config) -> None:
    """Run what is missing, and write `out/figure6`. RunsFailedError, after everything is drawn, if runs failed."""
    title = "Figure 6: dropping the reward loss, the dynamics loss, the prior"
    run_ablation(config, ARMS, WHOLE, study="figure6", title=title, further=[])

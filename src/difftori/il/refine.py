"""`refine`: DiffTORI around a policy of one's own, as a function; no run directory, no command line."""

from collections.abc import Callable, Sequence

import torch

from difftori.data.normalize import measured_spec
from difftori.data.trajectories import Trajectories
from difftori.data.windows import Windows
from difftori.il.base import WithBase, base_actions
from difftori.il.learner import Learner, run_length
from difftori.il.loop import TrainLoop
from difftori.policies.difftori import DiffTORI, DiffTORIConfig
from difftori.policies.normalized import Base, NormalizedPolicy
from difftori.runs.run import seeded
from difftori.types import Metrics


def refine(
    base: Base,
    demos: Trajectories,
    *,
    low: Sequence[float],
    high: Sequence[float],
    n_obs_steps: int,
    horizon: int,
    n_action_steps: int,
    settings: DiffTORIConfig | None = None,
    seed: int = 0,
    device: str = "cpu",
    watch: Callable[[Metrics], None] | None = None,
) -> NormalizedPolicy:
    """Train DiffTORI to refine the actions of `base` on these episodes; the policy that then acts.

    `base`: from the last O = `n_obs_steps` observations by name (B O …) to H = `horizon` actions (B H A), from the oldest
    observation on, in the task's own units; a function, or anything with `act(obs, *, generator)`. It is asked for
    its actions at every window, `settings.base_samples` times, before training, and is not trained. `low` and `high` bound the actions, A numbers
    each. Of a plan `n_action_steps` actions are to be executed, `actions[:, O − 1 : O − 1 + n_action_steps]`, and these are refined.
    `watch` gets the mean metrics of each pass over the windows. The same seed gives the same policy, on the CPU bit by bit.

    Raises ConfigError for a faulty number, ShapeError if the base's actions do not fit, and NonFiniteError when too many
    updates in a row are not finite.
    """
    settings = DiffTORIConfig.model_validate({}) if settings is None else settings
    windows = Windows(demos, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps, device=device)
    spec = measured_spec(
        demos, low=tuple(low), high=tuple(high), n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        refined = NormalizedPolicy(DiffTORI(settings, spec).to(device), base)
    if refined.base is not None:
        windows = WithBase(windows, base_actions(refined, windows, seeded(seed, "base actions", device)))
    learner = Learner(refined, settings, run_length(settings, len(windows))[0])
    for row in TrainLoop(learner, windows, seed, seeded(seed, "loss", device)).epochs():
        if watch is not None:
            watch(row)
    learner.acting.policy.eval()
    return learner.acting

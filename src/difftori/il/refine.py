"""`refine`: trains DiffTORI on top of your own policy, as a function, without run directory or command line."""

from collections.abc import Callable, Sequence

import torch

from difftori.data.normalize import measured_spec
from difftori.data.trajectories import Trajectories
from difftori.errors import ConfigError
from difftori.il.base import WithBase, base_actions
from difftori.il.learner import Learner, TrainLoop, run_length
from difftori.il.recorded import make_windows
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
    """Train DiffTORI to refine the actions of `base` on these episodes, and return the refined policy.

    `base` maps the last O = `n_obs_steps` observations by name (B O …) to H = `horizon` actions (B H A), from the oldest
    observation on, in the task's units, as a tensor or array. It is a function, or an object with `act(obs, *, generator)`. It is evaluated at every
    window, `settings.base_samples` times, before training, and is not trained. `low` and `high` are the bounds of the actions,
    A numbers each. `n_action_steps` actions of a plan are executed, `actions[:, O − 1 : O − 1 + n_action_steps]`, and these are
    refined. `watch` is called with the mean metrics of each epoch. The same seed gives the same policy, on the CPU bit by bit.

    Raises ConfigError for invalid arguments, ShapeError if the base's actions have the wrong shape, and NonFiniteError after too
    many consecutive updates with NaN or Inf.
    """
    settings = DiffTORIConfig.model_validate({}) if settings is None else settings
    low, high = _checked_bounds(low, high, demos.actions.shape[1])
    windows = make_windows(demos, device, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps)
    spec = measured_spec(
        demos, low=low, high=high, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps
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


def _checked_bounds(low: Sequence[float], high: Sequence[float], size: int) -> tuple[tuple[float, ...], ...]:
    """Return the bounds as tuples. Raises ConfigError unless each has one number per action dimension, none is NaN, and low ≤ high."""
    faults, bounds = [], []
    for name, values in (("low", low), ("high", high)):
        numbers = torch.as_tensor(values, dtype=torch.float64)
        if numbers.shape != (size,) or numbers.isnan().any():
            faults.append(f"{name}: {values} is no bound of {size} action dimensions. Fix: give {size} numbers")
        bounds.append(numbers)
    if not faults and (bounds[0] > bounds[1]).any():
        faults.append(f"low: {low} is above high, {high}. Fix: exchange them, or correct the numbers")
    if faults:
        raise ConfigError(faults)
    return tuple(tuple(numbers.tolist()) for numbers in bounds)

"""`refine`: DiffTORI around a policy of one's own, as a function; no run directory, no command line."""

from collections.abc import Callable, Sequence

import torch

from difftori.data.normalize import measured_spec
from difftori.data.trajectories import Trajectories
from difftori.data.windows import Windows
from difftori.il.learner import Learner, run_length
from difftori.policies.difftori import DiffTORI, DiffTORIConfig
from difftori.policies.refiner import Base, FunctionBase
from difftori.runs.run import seeded
from difftori.types import Metrics, Plans, WindowObs


def refine(
    base: Base | Callable[[WindowObs], Plans],
    demos: Trajectories,
    *,
    low: Sequence[float],
    high: Sequence[float],
    observe: int,
    horizon: int,
    execute: int,
    settings: DiffTORIConfig | None = None,
    seed: int = 0,
    device: str = "cpu",
    watch: Callable[[Metrics], None] | None = None,
) -> DiffTORI:
    """Train DiffTORI to refine the actions of `base` on these episodes; the policy that then acts.

    `base`: from the last O = `observe` observations by name (B O …) to H = `horizon` actions (B H A), from the oldest
    observation on, in the task's own units; a function, or anything with `act(obs, *, generator)`. It is asked for
    its actions at every window, `settings.base_samples` times, or in every batch where that is less, and is not trained. `low` and `high` bound the actions, A numbers
    each. Of a plan `execute` actions are to be executed, `actions[:, O − 1 : O − 1 + execute]`, and these are refined.
    `watch` gets the mean metrics of each pass over the windows. The same seed gives the same policy, on the CPU bit by bit.

    Raises ConfigError for a faulty number, ShapeError if the base's actions do not fit, and NonFiniteError when too many
    updates in a row are not finite.
    """
    settings = DiffTORIConfig.model_validate({}) if settings is None else settings
    windows = Windows(demos, observe=observe, horizon=horizon, execute=execute, device=device)
    spec = measured_spec(demos, low=tuple(low), high=tuple(high), observe=observe, horizon=horizon, execute=execute)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        refined = DiffTORI(settings, spec, base if isinstance(base, Base) else FunctionBase(base)).to(device)
    noise = seeded(seed, "loss", device)
    epochs, updates = run_length(settings, len(windows))
    refined.prepare(windows, at_most=updates * settings.batch_size, generator=seeded(seed, "base actions", device))
    learner = Learner(refined, settings, epochs)
    for epoch in range(epochs):
        for batch in windows.batches(settings.batch_size, seeded(seed, f"order of epoch {epoch}")):
            if learner.place.step == settings.updates:
                break
            learner.update(batch, noise)
        row = learner.close_epoch()
        if watch is not None:
            watch(row)
    acting = learner.acting
    assert isinstance(acting, DiffTORI)
    return acting.eval()

"""An imitation task from recorded demonstrations alone, without an environment: `--demos PATH` (`--env none`)."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from difftori.data.fingerprint import fingerprint
from difftori.data.normalize import measure, measured_spec
from difftori.data.windows import Windows
from difftori.il.recorded import WINDOW, DemosOptions, hold_out, make_windows
from difftori.il.tasks import Act, Evaluation, ImitationTask
from difftori.types import TaskSpec

_log = logging.getLogger(__name__)

NONE = "none"
"""The `--env` of demonstrations without an environment."""
HELD_OUT = 0.1
"""Default share of the episodes that is held out, at least one. They are also the evaluation."""


@dataclass(frozen=True)
class DemosTask(ImitationTask):
    """Imitation of recorded episodes. Policies are compared by their error on the held-out episodes."""

    train: Windows
    validation: Windows | None

    def evaluate(self, act: Act, *, episodes: int, generator: torch.Generator) -> Evaluation:
        """Compare the executed actions with the recorded ones, at every step of at most `episodes` held-out episodes.

        `action_error` is the root mean square of the difference, over steps, executed actions and their dimensions, in the
        data's units; NaN if no episode is held out. `train_action_error` is the same on as many training episodes.
        `generator` is not used.
        """
        held = [] if self.validation is None else _squares(self.validation, act, self.spec, episodes)
        shown = _squares(self.train, act, self.spec, len(held) or episodes)
        metrics = {"action_error": _root(held), "train_action_error": _root(shown), "episodes": float(len(held))}
        columns = {
            "episode": [float(number) for number in range(len(held))],
            "action_error": [math.sqrt(total / count) for total, count in held],
        }
        return Evaluation(metrics, columns)


def demos_task(
    *,
    seed: int,
    demos: str,
    obs_keys: Sequence[str] | None = None,
    action_key: str | None = None,
    episodes: Sequence[str] | None = None,
    held_out: float = HELD_OUT,
    num_train: int | None = None,
    n_obs_steps: int = WINDOW[0],
    horizon: int = WINDOW[1],
    n_action_steps: int = WINDOW[2],
) -> DemosTask:
    """Create the task. Observations, actions and their range are those of the data: the bounds of an action dimension are the
    least and the greatest value in the training episodes.

    See `DemosOptions` and `hold_out` for the data. Raises ConfigError or DataError.
    """
    whole = DemosOptions(demos, obs_keys, action_key, episodes).read()
    train, held = hold_out(whole, held_out, seed, num_train, demos)
    bounds = measure(train.blocks(train.actions))
    window = {"n_obs_steps": n_obs_steps, "horizon": horizon, "n_action_steps": n_action_steps}
    spec = measured_spec(train, low=bounds.low, high=bounds.high, **window)
    if obs_keys is None:
        entries = ", ".join(f"{name} {entry.shape} {entry.dtype}" for name, entry in spec.obs.items())
        _log.warning("demos: observations are %s. Choose and rename them with --obs-keys", entries)
    validation = None if held is None else make_windows(held, **window)
    return DemosTask(spec, make_windows(train, **window), validation, data=fingerprint(whole))


def _squares(windows: Windows, act: Act, spec: TaskSpec, episodes: int) -> list[tuple[float, int]]:
    """Return the sum and the number of squared differences of each of the first `episodes` episodes."""
    count = min(episodes, len(windows.demos))
    sums, numbers = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    for batch in windows.in_order():
        owner = windows.episodes(batch.index)
        if bool((owner >= count).all()):
            break
        away = (act(batch.obs).double() - batch.actions.cpu().double())[:, spec.present].square().flatten(1)
        kept = owner < count
        sums.index_add_(0, owner[kept], away.sum(1)[kept])
        numbers.index_add_(0, owner[kept], torch.full((int(kept.sum()),), away.shape[1]))
    return list(zip(sums.tolist(), numbers.tolist(), strict=True))


def _root(squares: list[tuple[float, int]]) -> float:
    count = sum(count for _, count in squares)
    return math.sqrt(sum(total for total, _ in squares) / count) if count else math.nan

"""Recorded demonstrations of a run: reads them, holds episodes out, makes windows, and stores their fingerprint in the run."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from difftori.data.download import find_demos
from difftori.data.fingerprint import Fingerprint, changes
from difftori.data.formats import Entries, has_keys, read_demos
from difftori.data.trajectories import Trajectories
from difftori.data.windows import Windows
from difftori.errors import ConfigError, DataError
from difftori.runs.checkpoint import replace_file
from difftori.runs.run import seeded

_log = logging.getLogger(__name__)

WINDOW = (2, 16, 8)
"""Default n_obs_steps, horizon and n_action_steps, if neither the policy nor the environment has its own."""
RECORD = "data.json"
"""File of a run with the fingerprint of its demonstrations."""


@dataclass(frozen=True)
class DemosOptions:
    """What to read: the data set, the keys of observations and actions, and the episodes (default: by convention, and all)."""

    demos: str
    obs_keys: Sequence[str] | None = None
    action_key: str | None = None
    episodes: Sequence[str] | None = None

    def have(self, names: Sequence[str]) -> bool:
        """Return whether the data set contains all these keys. Raises DataError."""
        return has_keys(find_demos(self.demos, _log.warning), names)

    def read(self, entries: Entries | None = None) -> Trajectories:
        """Read the demonstrations. `obs_keys` take precedence over `entries`. Raises DataError."""
        episodes = None if self.episodes is None else list(self.episodes)
        subset = None
        if episodes is not None and len(episodes) == 1 and re.search(r"[^\W\d]", episodes[0]):
            subset, episodes = episodes[0], None  # the name of a list in mask/, or of a task
        chosen = entries if self.obs_keys is None else list(self.obs_keys)
        path = find_demos(self.demos, _log.warning)
        demos = read_demos(path, chosen, action=self.action_key, episodes=episodes, subset=subset)
        if tasks := demos.tasks:
            _log.warning(
                "demos: %s has episodes of %d tasks, but no policy reads the instruction, so it learns a mixture of them: %s. Fix: "
                "choose one task, --episodes TASK",
                path,
                len(tasks),
                ", ".join(f"{task!r} ({count})" for task, count in list(tasks.items())[:5]),
            )
        return demos


def hold_out(
    whole: Trajectories, share: float, seed: int, num_train: int | None, place: str
) -> tuple[Trajectories, Trajectories | None]:
    """Return the training episodes, and those that are held out: a share of all, at least one; none of a single episode.

    `num_train` is the number of training episodes, sampled by `seed` (default: all that are not held out). Raises ConfigError if
    there are fewer.
    """
    train, held = whole, None
    if len(whole) == 1:
        _log.warning(
            "demos: %s has one episode. It is trained on, and nothing is held out to validate the policy", place
        )
    elif share > 0:
        train, held = whole.split(share, seeded(seed, "held out episodes"))
        if len(held) > len(train):
            _log.warning("held_out: %d of %d episodes of %s are held out", len(held), len(whole), place)
    if num_train is None:
        return train, held
    if num_train > len(train):
        count = 0 if held is None else len(held)
        raise ConfigError(
            [
                f"num_train: {num_train} is too large; {place} has {len(train)} training episodes after holding out "
                f"{count}. Fix: give at most {len(train)}"
            ]
        )
    order = torch.randperm(len(train), generator=seeded(seed, "training episodes"))[:num_train]
    return train.select(sorted(order.tolist())), held


def make_windows(
    demos: Trajectories, device: str | None = None, /, *, n_obs_steps: int, horizon: int, n_action_steps: int
) -> Windows:
    """Return the windows of these episodes. Every step is the present step of one window, for any `n_action_steps`."""
    reach = max(n_action_steps, horizon - n_obs_steps + 1) if n_action_steps > 0 else n_action_steps
    return Windows(demos, n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=reach, device=device)


def check_data(run_dir: Path, now: Fingerprint | None, *, accept: bool = False) -> None:
    """Compare the demonstrations with those that the run in this directory began with, or record them for a new run.

    With `accept`, other data are recorded, and those of before are listed under `earlier`. Raises ConfigError, naming each part
    that differs.
    """
    if now is None:
        return
    record = read_record(run_dir)
    before = record.get("fingerprint")
    if before == now:
        return
    earlier = list(record.get("earlier", []))
    if before is not None:
        found = changes(before, now)
        if not accept:
            raise ConfigError(
                [
                    *(f"demos: changed since the run began: {line}" for line in found),
                    f"demos: {run_dir} was begun with other data. Fix: restore the data, choose another run directory, or "
                    "continue with the new data by --accept-changed-data",
                ]
            )
        _log.warning(
            "demos: continuing with changed data: %s. The held-out episodes are drawn anew, and some may have been trained on, so "
            "validation errors are too small",
            "; ".join(found),
        )
        earlier = [before, *earlier]
    content = {"fingerprint": now, **({"earlier": earlier} if earlier else {})}
    replace_file(run_dir / RECORD, (json.dumps(content, indent=1) + "\n").encode())


def warn_of_changes(run_dir: Path, now: Fingerprint | None) -> None:
    """Log a warning if the demonstrations are not those of the run: held-out episodes may have been trained on."""
    before = read_record(run_dir).get("fingerprint")
    if before is not None and now is not None and (found := changes(before, now)):
        _log.warning("demos: changed since the run, so the held-out episodes may be others: %s", "; ".join(found))


def check_base_data(base_dir: Path, now: Fingerprint | None) -> None:
    """Compare the demonstrations with those of the base's run, which has the same path. Raises ConfigError if they differ.

    Only parts that both read are compared. Otherwise the refiner would hold out episodes that its base was trained on.
    """
    before = read_record(base_dir).get("fingerprint")
    if before is None or now is None:
        return
    found = changes({n: v for n, v in before.items() if n in now}, {n: v for n, v in now.items() if n in before})
    if found:
        raise ConfigError(
            [
                *(f"demos: changed since the base was trained: {line}" for line in found),
                f"demos: the data are not those of {base_dir}. Fix: train the base again, or give the data of the base; if episodes "
                "were added, --episodes 0:N reads the first N",
            ]
        )


def read_record(run_dir: Path) -> Mapping:
    """Return the content of `data.json`; empty if there is none. Raises DataError if it is damaged."""
    path = run_dir / RECORD
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or not isinstance(content["fingerprint"], dict):
            raise TypeError("no fingerprint")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a record of data ({error!r}). Fix: remove it, or restore it") from error
    return content

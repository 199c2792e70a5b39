"""The fingerprint of a set of demonstrations: tells whether the data behind a path are those of an earlier run, and what changed."""

import hashlib
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from difftori.data.trajectories import Trajectories

Fingerprint: TypeAlias = dict[str, str]
"""By part, `episodes`, `action` and each observation: its shape, dtype and a hash of its content."""


def fingerprint(demos: Trajectories) -> Fingerprint:
    """Return the fingerprint of these episodes.

    Hashed (SHA-256) are the length of each episode, and for the actions and each observation every value, as read: float32
    numbers, and the decoded pixels of images and videos. Not hashed: file names, compression, and what is not read. The same
    episodes in another format have the same fingerprint.
    """
    lengths = np.asarray(demos.lengths, dtype="<i8")
    parts = {
        "episodes": f"{len(lengths)} of {lengths.sum()} steps, {hashlib.sha256(lengths.tobytes()).hexdigest()[:16]}"
    }
    for name, values in {"action": demos.actions, **demos.obs}.items():
        digest = hashlib.sha256()
        for block in demos.blocks(values):
            digest.update(np.ascontiguousarray(block.cpu().numpy()).data)
        dtype = str(values.dtype).removeprefix("torch.")
        parts[name] = f"{dtype} {tuple(values.shape[1:])}, {digest.hexdigest()[:16]}"
    return parts


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return one line for each part that differs between two fingerprints."""
    return [
        f"{name}: {before.get(name, 'absent')} before, {now.get(name, 'absent')} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]

"""`arm` kills a process in the middle of a save: before the CALL-th change of the disk in its SAVE-th save, or in the next
that has so many. What it was about to do is added to the file NOTE.

CALL 0 kills it after that save, and adds all that it did. What an earlier kill left is cleared away first, and not counted.
"""

import os
import signal
from pathlib import Path

from difftori.rl import train as rl
from difftori.runs.checkpoint import Checkpoints
from difftori.runs.run import Run

CHANGES = ("mkdir", "fsync", "rename", "replace", "rmdir", "unlink")


def arm(save: int, call: int, note: Path) -> None:
    """Count saves, and the changes within; a save of an agent's run holds that of its checkpoint."""
    saves = depth = 0
    done: list[str] = []
    clearing = False

    def die(last: list[str]) -> None:
        with note.open("a") as file:
            file.writelines(f"{name}\n" for name in last)
        os.kill(os.getpid(), signal.SIGKILL)

    def counting(name, original):
        def change(*args, **options):
            if depth and not clearing:
                done.append(name)
                if saves >= save and len(done) == call:
                    die([name])
            return original(*args, **options)

        return change

    def watched(original):
        def saving(*args, **options):
            nonlocal saves, depth
            if depth == 0:
                saves += 1
                done.clear()
            depth += 1
            try:
                return original(*args, **options)
            finally:
                depth -= 1
                if (saves, depth, call) == (save, 0, 0):
                    die(done)

        return saving

    def unwatched(original):
        def clear(*args, **options):
            nonlocal clearing
            clearing = True
            try:
                return original(*args, **options)
            finally:
                clearing = False

        return clear

    for name in CHANGES:
        setattr(os, name, counting(name, getattr(os, name)))
    Run.save = watched(Run.save)
    rl._Session.save = watched(rl._Session.save)
    Checkpoints._sweep = unwatched(Checkpoints._sweep)

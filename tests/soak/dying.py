"""`python dying.py SAVE CALL NOTE WORDS…`: difftori with these words, killed at the CALL-th change of the disk in its SAVE-th save, or in
the next that has so many. CALL 0 kills it after that save, and writes to the file NOTE how many changes there were.
"""

import os
import signal
import sys
from pathlib import Path

from difftori.cli import main
from difftori.training import rl
from difftori.training.run import Run

CHANGES = ("mkdir", "fsync", "rename", "replace", "rmdir", "unlink")


def arm(save: int, call: int, note: Path) -> None:
    """Count saves, and the changes within; a save of an agent's run holds that of its checkpoint."""
    saves = depth = changes = 0

    def counting(original):
        def change(*args, **options):
            nonlocal changes
            changes += depth > 0
            if depth and saves >= save and changes == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        return change

    def watched(original):
        def saving(*args, **options):
            nonlocal saves, depth, changes
            if depth == 0:
                saves, changes = saves + 1, 0
            depth += 1
            try:
                return original(*args, **options)
            finally:
                depth -= 1
                if (saves, depth, call) == (save, 0, 0):
                    number = changes
                    note.write_text(str(number))
                    os.kill(os.getpid(), signal.SIGKILL)

        return saving

    for name in CHANGES:
        setattr(os, name, counting(getattr(os, name)))
    Run.save = watched(Run.save)
    rl._Session.save = watched(rl._Session.save)


if __name__ == "__main__":
    arm(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))

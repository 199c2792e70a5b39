"""Commands as child processes that begin with everything imported: forks of one server, so that hundreds of starts are cheap.

What a start reads and does from `main` on is as on the command line; only the seconds of importing torch are not repeated.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["difftori.cli", "difftori.il.train", "difftori.rl.train", "torch._dynamo", __name__])


class Child:
    """`difftori` with these words, as `subprocess.Popen` would give it; `prepare` is called in the child before.

    What it writes to its standard error is added to the file `messages`.
    """

    def __init__(self, words: list[str], messages: Path, *, path: str, prepare: Callable[[], None] | None = None):
        self.messages = messages
        self.process = CONTEXT.Process(target=_command, args=(words, str(messages), path, prepare))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """Minus the signal, if one killed it; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float) -> bool:
        """Whether it ended within so many seconds."""
        self.process.join(timeout)
        return self.process.exitcode is not None

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)

    def said(self) -> str:
        return self.messages.read_text() if self.messages.exists() else ""


def _command(words: list[str], messages: str, path: str, prepare: Callable[[], None] | None) -> None:
    with open(os.devnull, "w") as nowhere, open(messages, "a") as file:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.path.insert(0, path)
    os.environ["PYTHONPATH"] = path  # of environments in processes of their own
    if prepare is not None:
        prepare()
    from difftori.cli import main

    sys.exit(main(words))

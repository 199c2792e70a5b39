import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_imitation, a component out of tree


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], int]:
    """Run a function in a fork of this process; its exit status, or minus the signal that killed it."""

    def run(function: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                function()
                status = 0
            except SystemExit as leaving:
                status = int(leaving.code or 0)
            except BaseException as error:  # a child must never return into pytest
                print(f"child: {error!r}", file=sys.stderr)
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run

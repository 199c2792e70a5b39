import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support import type_checks  # checks the functions of what is imported below

# isort: split

from difftori.il.config import TrainConfig
from difftori.il.learner import Learner
from difftori.il.train import train

OUT_OF_TREE = str(Path(__file__).parent / "support" / "out_of_tree")
"""Components as a user brings them, importable here and in processes that tests start."""
sys.path.insert(0, OUT_OF_TREE)
os.environ["PYTHONPATH"] = os.pathsep.join([OUT_OF_TREE, *filter(None, [os.environ.get("PYTHONPATH")])])

settings.register_profile("default", deadline=None, max_examples=10)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _quiet_machine():
    """One thread (two contended ones are slower by far), the same random numbers and checks of types for each test."""
    type_checks.start()
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """No checks of annotated types, so that invalid arguments reach this package's own checks."""
    type_checks.stop()


@pytest.fixture(scope="session")
def policy_run(tmp_path_factory) -> Path:
    """A trained policy's run directory, only to be read."""
    from tests.support import tiny_runs  # which needs OUT_OF_TREE

    return tiny_runs.policy_run(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def agent_run(tmp_path_factory) -> Path:
    """A trained agent's run directory, only to be read."""
    from tests.support import tiny_runs  # which needs OUT_OF_TREE

    return tiny_runs.agent_run(tmp_path_factory.mktemp("agent"))


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


@pytest.fixture
def killed_at(in_child) -> Callable[[int, TrainConfig, Path], None]:
    """Train in a process that kills itself after so many updates."""

    def run(step: int, config: TrainConfig, out: Path) -> None:
        def die():
            update = Learner.update

            def mortal(self, batch, generator):
                update(self, batch, generator)
                if self.train_state.step == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            Learner.update = mortal
            train(config, out, progress=False)

        assert in_child(die) == -signal.SIGKILL

    return run

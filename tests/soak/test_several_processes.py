"""One run in two processes, as torchrun starts them, killed."""

import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from difftori.il.weights import load_policy
from difftori.runs.checkpoint import weights_digest
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("several processes"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built into this torch"),
]
OPTIONS = "--env pendulum --num-train 6 --batch-size 7 --hidden 8 --eval-episodes 3 --save-every 2 --epochs 40 --quiet"


def start(out: Path) -> psutil.Popen:
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m difftori.cli train bc".split()
    return psutil.Popen([sys.executable, *torchrun, *OPTIONS.split(), "--out", str(out)])


def finish(out: Path) -> str:
    assert start(out).wait(300) == 0
    return weights_digest(load_policy(out, "last")[0].policy)


def test_a_kill_of_all_and_going_on_equals_going_straight(tmp_path, found):
    wanted = finish(tmp_path / "straight")
    killed = start(tmp_path / "killed")
    wait_until(lambda: list((tmp_path / "killed" / "checkpoints").glob("step-*[0-9]")))
    for process in (killed, *killed.children(recursive=True)):
        process.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert finish(tmp_path / "killed") == wanted
    found("SIGKILL of torchrun and its two processes", trainer="bc", result="weights equal to the last bit")

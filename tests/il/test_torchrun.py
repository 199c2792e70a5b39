"""Two processes that train one run, as torchrun starts them, against one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from difftori.cli import main
from difftori.il.distributed import Distributed
from difftori.il.weights import load_policy
from difftori.runs.records import read_metrics, read_summary
from difftori.types import Window

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="gloo is not built into this torch")
OPTIONS = "--env pendulum --num-train 6 --batch-size 7 --hidden 8 --eval-episodes 3 --save-every 2 --quiet".split()


def command(out: Path, processes: int, epochs: int) -> list[str]:
    words = ["-m", "difftori.cli", "train", "bc", *OPTIONS, "--epochs", str(epochs), "--out", str(out)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), *words]


def run(out: Path, processes: int, epochs: int = 3) -> None:
    done = subprocess.run(command(out, processes, epochs), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(out: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_policy(out, "last")[0].policy.parameters()])


def test_two_processes_learn_what_one_does(tmp_path):
    assert main([*command(tmp_path / "one", 1, 3)[3:]]) == 0
    run(tmp_path / "two", 2)
    assert (weights(tmp_path / "one") - weights(tmp_path / "two")).abs().max() < 1e-5
    ours, theirs = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for name in ("train/loss", "train/grad_norm", "validation/error"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in theirs], rel=1e-3)
    assert read_summary(tmp_path / "two")["updates"] == read_summary(tmp_path / "one")["updates"]


def test_rows_are_shared_out_and_none_is_an_empty_batch():
    batch = Window({"state": torch.arange(5.0).reshape(5, 1, 1)}, torch.zeros(5, 1, 1), torch.arange(5))
    shares = [Distributed(rank, 2, "cpu").share(batch) for rank in range(2)]
    assert [share.index.tolist() for share, _ in shares] == [[0, 2, 4], [1, 3]]
    assert [part for _, part in shares] == [0.6, 0.4]
    spare, part = Distributed(6, 7, "cpu").share(batch)
    assert (spare.index.tolist(), part) == ([0], 0.0)
    assert Distributed.alone().share(batch) == (batch, 1.0)

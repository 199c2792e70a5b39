"""What a lab relies on for days, of every policy and agent there is: `make soak` runs it, minutes for each.

Trainings are processes of their own, killed without warning; what counts is the weights of one that was left alone.
"""

import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from difftori.cli import main
from difftori.il.weights import load_policy
from difftori.runs.checkpoint import Checkpoints, weights_digest
from difftori.runs.records import read_config, read_metrics, read_summary
from difftori.runs.run import Run
from tests.soak.children import Child
from tests.soak.dying import arm
from tests.support.trainers import TRAINERS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
TINY = str(HERE.parent / "support" / "out_of_tree")  # its environment is out of tree
KILLS = 10
# With `--dist loadgroup` one process has all tests of a trainer, and its undisturbed run is made once.
each_trainer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TRAINERS]
)


def options(template: str, straight: Path) -> list[str]:
    return template.format(demos=straight / "demos.zarr", base=straight / "bc").split()


def start(
    out: Path, name: str, straight: Path, *, save_every: int | None = None, prepare: Callable[[], None] | None = None
) -> Child:
    """The command line's training, begun or gone on with; `prepare` is called in its process before."""
    template = (
        TRAINERS[name] if save_every is None else re.sub(r"save-every \d+", f"save-every {save_every}", TRAINERS[name])
    )
    words = ["train", name, *options(template, straight), "--out", str(out), "--quiet"]
    return Child(words, out.with_name(f"{out.name}.log"), path=TINY, prepare=prepare)


def finish(out: Path, name: str, straight: Path, **more) -> str:
    child = start(out, name, straight, **more)
    assert child.wait(900)
    assert child.returncode == 0, child.said()
    return digest(out)


def limit_file_size() -> None:
    """As a disk that fills up: no file of this process grows beyond 6000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def went_on(out: Path, began: float) -> bool:
    """Whether a run that was taken up then kept what it had logged before, rather than start over."""
    return read_metrics(out)[0]["time"] < began


def digest(out: Path) -> str:
    if "policy" in read_config(out):
        return weights_digest(load_policy(out, "last")[0].policy)
    from difftori.rl.weights import load_agent

    return weights_digest(load_agent(out)[0])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with demonstrations and, as they are asked for, runs that nobody disturbs: weights and seconds of each."""
    sys.path.insert(0, TINY)
    from tiny_env.reach import write_demos

    folder = tmp_path_factory.mktemp("straight")
    write_demos(folder / "demos.zarr")
    known: dict[str, tuple[str, float]] = {}

    def ask(name: str) -> tuple[str, float]:
        if name not in known:
            if "{base}" in TRAINERS[name]:
                ask("bc")
            began = time.monotonic()
            known[name] = (finish(folder / name, name, folder), time.monotonic() - began)
        return known[name]

    return folder, ask


@each_trainer
def test_random_kills_change_no_bit(name, straight, tmp_path, found):
    """SIGKILL at random moments of the work, starts included; each time the same command again."""
    folder, ask = straight
    wanted, seconds = ask(name)
    chance = torch.Generator().manual_seed(sum(name.encode()))
    kills = cut_short = 0
    while kills < KILLS:
        child = start(tmp_path / "run", name, folder)
        if child.wait(0.2 + 0.8 * seconds * torch.rand((), generator=chance).item()):
            assert child.returncode == 0, child.said()
            cut_short += 1
            assert digest(tmp_path / "run") == wanted
            (tmp_path / "run").rename(tmp_path / f"done-{cut_short}")  # it was faster: the next kills are another run's
        else:
            child.kill()
            assert child.wait(60)
            kills += 1
    assert finish(tmp_path / "run", name, folder) == wanted
    result = f"weights equal to the last bit, {cut_short + 1} runs completed"
    found("SIGKILL at a random moment", trainer=name, times=kills, result=result)


@each_trainer
def test_a_kill_in_each_phase_of_saving_changes_no_bit(name, straight, tmp_path, found):
    """One run, killed before each change of the disk that a save consists of, one after the other."""
    folder, ask = straight
    wanted, _ = ask(name)

    def killed(save: int, call: int, note: Path) -> None:
        child = start(tmp_path / "run", name, folder, prepare=partial(arm, save, call, note))
        assert child.wait(300)
        assert child.returncode == -signal.SIGKILL, child.said()

    whole, hit = tmp_path / "whole", tmp_path / "hit"
    killed(4, 0, whole)
    phases = whole.read_text().split()
    assert {"mkdir", "fsync", "rename", "rmdir", "unlink"} <= set(phases)
    for call in range(1, len(phases) + 1):
        killed(1, call, hit)
    if "policy" in read_config(folder / name):
        assert hit.read_text().split() == phases
    else:  # how many episodes a save writes depends on where the run was killed before
        assert set(hit.read_text().split()) == set(phases)
    began = time.time()
    assert finish(tmp_path / "run", name, folder) == wanted
    assert went_on(tmp_path / "run", began)
    found("SIGKILL in each phase of saving", trainer=name, times=len(phases), result="weights equal to the last bit")


@each_trainer
def test_a_polite_end_saves_and_exits_143(name, straight, tmp_path, found):
    folder, ask = straight
    wanted, _ = ask(name)
    child = start(tmp_path / "run", name, folder, save_every=100_000)
    wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    child.kill(signal.SIGTERM)
    assert child.wait(120)
    assert child.returncode == 143
    assert list((tmp_path / "run" / "checkpoints").glob("step-*[0-9]"))
    began = time.time()
    assert finish(tmp_path / "run", name, folder, save_every=100_000) == wanted
    assert went_on(tmp_path / "run", began)
    found("SIGTERM", trainer=name, result="checkpoint, exit 143, resumed to the same weights")


@each_trainer
def test_a_full_disk_is_an_error_and_the_run_goes_on_afterwards(name, straight, tmp_path, found):
    """RLIMIT_FSIZE below a checkpoint's size, in the middle of a run, stands for a disk that fills up."""
    folder, ask = straight
    wanted, _ = ask(name)
    child = start(tmp_path / "run", name, folder)
    wait_until(lambda: list((tmp_path / "run" / "checkpoints").glob("step-*[0-9]")))
    child.kill()
    assert child.wait(60)
    before = Checkpoints(tmp_path / "run" / "checkpoints").latest().step
    child = start(tmp_path / "run", name, folder, prepare=limit_file_size)
    assert child.wait(300)
    assert child.returncode == 1, child.said()
    assert "Traceback" not in child.said()
    assert "free space" in child.said().lower()
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest().step == before
    began = time.time()
    assert finish(tmp_path / "run", name, folder) == wanted
    assert went_on(tmp_path / "run", began)
    found("disk full", trainer=name, result="exit 1, says so, went on to the same weights")


@each_trainer
def test_memory_stays_flat(name, straight, tmp_path, found, monkeypatch):
    """What this process holds at each row of the log, from a third of 1500 updates and more to their end."""
    folder, ask = straight
    ask("bc")
    template = TRAINERS[name]
    for option, instead in (
        ("epochs", "updates 1600"),
        ("steps", "steps 1700 --updates-per-step 1"),
        ("save-every", "save-every 100000"),
    ):
        template = re.sub(rf"--{option} \d+", f"--{instead}", template)
    process, sizes, log = psutil.Process(), [], Run.log

    def watched(run, step, metrics):
        log(run, step, metrics)
        sizes.append(process.memory_info().rss)

    monkeypatch.setattr(Run, "log", watched)
    monkeypatch.syspath_prepend(TINY)
    words = options(template, folder)
    assert main(["train", name, *words, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    updates = read_summary(tmp_path / "run")["updates"]
    assert updates >= 1500
    growth = (sizes[-1] - sizes[len(sizes) // 3]) / 2**20
    assert growth < 5, f"{growth:.1f} MiB over the last two thirds of {updates:.0f} updates"
    found(f"memory over two thirds of {updates:.0f} updates", trainer=name, result=f"{growth:+.1f} MiB")

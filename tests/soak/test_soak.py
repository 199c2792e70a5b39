"""What a lab relies on for days: `make soak` runs all of it, and writes what it found to `results/soak.csv`.

Trainings are processes of their own, killed without warning; what counts is the weights of one that was left alone.
"""

import csv
import os
import platform
import resource
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import psutil
import pytest
import torch

from difftori.cli import main
from difftori.training.checkpoint import weights_digest
from difftori.training.il import load_policy
from difftori.training.records import read_config, read_summary
from difftori.training.run import Run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KILLS = 10
PENDULUM = "--env pendulum --hidden 8 --eval-episodes 3 --save-every 1 --num-train 40"
PROBE = "--env probe:delayed-reward --preset small --eval-every 500 --eval-episodes 2 --seed-steps 100 --save-every 50"
TRAINERS = {
    "bc": f"{PENDULUM} --batch-size 8 --epochs 300",
    "residual": f"{PENDULUM} --batch-size 8 --epochs 200",
    "difftori-il": f"{PENDULUM} --batch-size 8 --epochs 60 --init prior --latent-dim 8 --ema 0.9",
    "tdmpc": f"{PROBE} --steps 800",
    "difftori": f"{PROBE} --steps 600 --pg per-episode",
}


@pytest.fixture(scope="session", autouse=True)
def found():
    """Lines of `results/soak.csv`: what was tried, how often, with what result."""
    lines: list[dict] = []
    yield lines
    if lines:
        place = ROOT / "results" / "soak.csv"
        with place.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["what", "trainer", "times", "result", "machine"], lineterminator="\n")
            writer.writeheader()
            machine = f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
            writer.writerows(line | {"machine": machine} for line in lines)


def start(out: Path, name: str, *more: str, **options) -> subprocess.Popen:
    words = [sys.executable, "-m", "difftori.cli", "train", name, *TRAINERS[name].split(), "--out", str(out), "--quiet"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*words, *more], env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet, **options)


def finish(out: Path, name: str, *more: str, **options) -> str:
    process = start(out, name, *more, **options)
    said = process.communicate(timeout=900)[1].decode()
    assert process.returncode == 0, said
    return digest(out)


def digest(out: Path) -> str:
    if "policy" in read_config(out):
        return weights_digest(load_policy(out, "last")[0])
    from difftori.training.rl_evaluation import load_agent

    return weights_digest(load_agent(out)[0])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of each trainer's run that nobody disturbs, and how long it took; the residual's base too."""
    folder = tmp_path_factory.mktemp("straight")
    finish(folder / "base", "bc")
    found = {}
    for name in TRAINERS:
        began = time.monotonic()
        found[name] = (finish(folder / name, name, *of_base(name, folder)), time.monotonic() - began)
    return folder, found


def of_base(name: str, folder: Path) -> list[str]:
    return ["--base", str(folder / "base")] if name == "residual" else []


@pytest.mark.parametrize("name", TRAINERS)
def test_random_kills_change_no_bit(name, straight, tmp_path, found):
    """SIGKILL at random moments of the work, starts included; each time the same command again."""
    folder, known = straight
    wanted, seconds = known[name]
    chance = torch.Generator().manual_seed(sum(name.encode()))
    kills = cut_short = 0
    while kills < KILLS:
        process = start(tmp_path / "run", name, *of_base(name, folder))
        try:
            process.wait(2.0 + 0.7 * seconds * torch.rand((), generator=chance).item())
            assert process.returncode == 0, process.stderr.read().decode()
            cut_short += 1
            wanted = known[name][0]
            assert digest(tmp_path / "run") == wanted
            (tmp_path / "run").rename(tmp_path / f"done-{cut_short}")  # it was faster: the next kills are another run's
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        finally:
            process.stderr.close()
    assert finish(tmp_path / "run", name, *of_base(name, folder)) == wanted
    result = f"weights equal to the last bit, {cut_short + 1} runs completed"
    found.append({"what": "SIGKILL at a random moment", "trainer": name, "times": kills, "result": result})


@pytest.mark.parametrize("name", TRAINERS)
def test_a_polite_end_saves_and_exits_143(name, straight, tmp_path, found):
    folder, known = straight
    process = start(tmp_path / "run", name, *of_base(name, folder))
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert finish(tmp_path / "run", name, *of_base(name, folder)) == known[name][0]
    found.append(
        {"what": "SIGTERM", "trainer": name, "times": 1, "result": "checkpoint, exit 143, resumed to the same weights"}
    )


@pytest.mark.parametrize("name", ["bc", "difftori-il", "tdmpc", "difftori"])
def test_a_full_disk_is_an_error_and_the_run_goes_on_afterwards(name, straight, tmp_path, found):
    """RLIMIT_FSIZE below a checkpoint's size, in the middle of a run, stands for a disk that fills up."""
    folder, known = straight
    process = start(tmp_path / "run", name)
    until = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step-*[0-9]")) and time.monotonic() < until:
        time.sleep(0.02)
    process.kill()
    process.communicate()

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start(tmp_path / "run", name, preexec_fn=limit)
    said = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 1, said
    assert "Traceback" not in said
    assert "free space" in said.lower()
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp"))
    assert finish(tmp_path / "run", name) == known[name][0]
    found.append(
        {"what": "disk full", "trainer": name, "times": 1, "result": "exit 1, says so, went on to the same weights"}
    )


@pytest.mark.parametrize("name", ["bc", "difftori-il", "tdmpc", "difftori"])
def test_memory_stays_flat(name, tmp_path, found, monkeypatch):
    """What this process holds at each row of the log, from a third of 1500 updates and more to their end."""
    options = dict(zip(*[iter(TRAINERS[name].split())] * 2, strict=True))
    options |= {"--steps": "1700"} if name in ("tdmpc", "difftori") else {"--epochs": "300"}
    options["--save-every"] = "100000"
    process, sizes, log = psutil.Process(), [], Run.log

    def watched(run, step, metrics):
        log(run, step, metrics)
        sizes.append(process.memory_info().rss)

    monkeypatch.setattr(Run, "log", watched)
    words = [word for pair in options.items() for word in pair]
    assert main(["train", name, *words, "--out", str(tmp_path / "run"), "--quiet"]) == 0
    updates = read_summary(tmp_path / "run")["updates"]
    assert updates >= 1500
    growth = (sizes[-1] - sizes[len(sizes) // 3]) / 2**20
    assert growth < 5, f"{growth:.1f} MiB over the last two thirds of {updates:.0f} updates"
    what = f"memory over two thirds of {updates:.0f} updates"
    found.append({"what": what, "trainer": name, "times": 1, "result": f"{growth:+.1f} MiB"})


def test_the_wheel_installs_in_a_clean_environment(tmp_path, found):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("difftori-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], check=True)
    out = tmp_path / "run"
    train = f"train bc {PENDULUM} --epochs 2 --quiet --out {out}".split()
    subprocess.run([python, "-m", "difftori.cli", *train], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    subprocess.run(
        [python, "-m", "difftori.cli", "report", str(out)], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    found.append(
        {"what": "wheel in a clean environment", "trainer": "", "times": 1, "result": "installs, trains, reports"}
    )

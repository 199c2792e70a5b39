"""The package as a user gets it: the wheel in an environment of its own, and its pages in a browser."""

import contextlib
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import psutil
import pytest
from PIL import Image

from difftori.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("package")]
ROOT = Path(__file__).parents[2]
TRAIN = "train bc --env pendulum --hidden 8 --eval-episodes 3 --num-train 40 --epochs 2 --quiet"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_wheel_installs_in_a_clean_environment(tmp_path, found):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("difftori-*.whl")
    assert {name.partition("/")[0].split("-")[0] for name in ZipFile(wheel).namelist()} == {"difftori"}
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel], check=True)
    for words in (f"{TRAIN} --out {tmp_path}/run", f"report {tmp_path}/run"):
        told = [python, "-m", "difftori.cli", *words.split()]
        subprocess.run(told, check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    found("wheel in a clean environment", result="installs, trains, reports")


def test_no_training_listens(tmp_path, found):
    """An agent's, with environments in processes of their own, looked at from its beginning to its end."""
    words = "train tdmpc --env probe:delayed-reward --preset small --steps 400 --seed-steps 100 --workers async --quiet"
    training = psutil.Popen([sys.executable, "-m", "difftori.cli", *words.split(), "--out", str(tmp_path / "run")])
    looks, workers = 0, 0
    while training.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = [training, *training.children(recursive=True)]
            workers = max(workers, len(processes) - 1)
            open_ports = [c for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
            assert not open_ports
            looks += 1
        time.sleep(0.2)
    assert training.returncode == 0
    assert workers
    assert looks > 10
    found("looking for listening sockets while an agent trains", trainer="tdmpc", times=looks, result="none")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_pages_open_in_a_browser_without_a_network(tmp_path, found):
    """Those of two runs and of both together. They forbid what is not in them, so that asking elsewhere is an error too."""
    for seed in (0, 1):
        assert main([*TRAIN.split(), "--seed", str(seed), "--out", str(tmp_path / "runs" / str(seed))]) == 0
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "both")]) == 0
    pages = [*sorted((tmp_path / "runs").glob("*/report.html")), tmp_path / "both" / "report.html"]
    assert len(pages) == 3
    for number, page in enumerate(pages):
        image = tmp_path / f"{number}.png"
        options = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,2000".split()
        log = ["--enable-logging=stderr", f"--screenshot={image}", "--host-resolver-rules=MAP * ~NOTFOUND"]
        told = [BROWSER, *options, *log, page.as_uri()]
        done = subprocess.run(told, capture_output=True, text=True, timeout=120, check=True)
        assert "default-src 'none'; img-src data:" in page.read_text()
        assert "CONSOLE" not in done.stderr, done.stderr
        grey = np.asarray(Image.open(image).convert("L"), dtype=float)
        assert grey.std() > 10, "the page is blank"
    found("run pages and a report in headless Chromium", times=len(pages), result="drawn, no error, no network")

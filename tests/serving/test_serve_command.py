"""`difftori serve` as a user meets it: tokens, addresses, signals, and a client in a process without torch."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from difftori import cli
from tests.support import tiny_runs
from tests.support.waiting import wait_until

TOKEN = "a-token-of-these-tests"

CLIENT = """
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np
from difftori.serving import Client
with Client(sys.argv[1], token=sys.argv[2]) as client:
    for _ in range(3):
        print(client.act(np.zeros(2)).shape, client.low.tolist())
"""


@pytest.fixture
def refused(capsys):
    """The message of a command that ends with status 2 before it looks at the run."""

    def run(*words: str) -> str:
        assert cli.main(["serve", "no/such/run", *words]) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "robot.local", ""])
def test_an_address_that_others_reach_needs_a_token(refused, token_file, host):
    assert "Fix: give --token-file" in refused("--host", host)
    assert "no/such/run" in refused("--host", host, "--token-file", str(token_file))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_none(refused, host):
    assert "no/such/run" in refused("--host", host)


@pytest.mark.skipif(os.name != "posix", reason="there are no such modes")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_token_that_others_can_read_is_refused(refused, token_file, mode):
    token_file.chmod(mode)
    message = refused("--token-file", str(token_file))
    assert f"mode {mode:o}" in message
    assert f"Fix: chmod 600 {token_file}" in message
    assert TOKEN not in message


@pytest.mark.parametrize("content", ["", "\n", "short", "two words are not a token", "ä" * 20, "\0" * 20, "a" * 15])
def test_what_is_no_token_is_refused(refused, token_file, content):
    token_file.write_text(content)
    message = refused("--token-file", str(token_file))
    assert "does not hold one word of at least 16" in message
    assert "two words" not in message
    assert "secrets" in refused("--token-file", str(token_file.parent / "none"))


@pytest.mark.parametrize("words", [["--port", "70000"], ["--max-clients", "0"], ["--which", "first"], ["--hst", "a"]])
def test_an_invalid_option_is_named(refused, words):
    assert words[0].strip("-") in refused(*words)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0_and_a_table(tmp_path_factory, token_file, number):
    pytest.importorskip("websockets", reason="needs websockets: pip install 'difftori[serve]'")
    folder = tmp_path_factory.getbasetemp() / "served"
    if not folder.exists():
        folder.mkdir()
        tiny_runs.policy_run(folder)
    words = [str(folder / "run"), "--port", "0", "--token-file", str(token_file)]
    log = Path(token_file.parent / "log")
    with log.open("w") as out:
        command = [sys.executable, "-m", "difftori.cli", "serve", *words]
        server = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | {"COLUMNS": "200"})
    try:
        wait_until(lambda: server.poll() is not None or "to act with it" in log.read_text())
        found = re.search(r"serving bc of \S+ at (ws://127\.0\.0\.1:\d+); Ctrl-C", log.read_text())
        assert found, log.read_text()
        client = [sys.executable, "-c", CLIENT, found[1], TOKEN]
        done = subprocess.run(client, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == "(2,) [-1.0, -1.0]\n" * 3, done.stderr
        server.send_signal(number)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
    text = log.read_text()
    assert re.search(r"client 1: connected from 127\.0\.0\.1 port \d+\nclient 1: left after 3 answers, ", text), text
    assert re.search(r"│ answers\s+│\s+3 │", text), text
    assert TOKEN not in text
    assert "Traceback" not in text

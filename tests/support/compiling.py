"""Comparing compiled with eager computation, in a process of its own.

There the shape checks that are on under pytest are no part of what is compiled. Traced but not lowered in the default suite;
`-m slow` lowers too.
"""

import subprocess
import sys

import pytest

BACKENDS = ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]


def says_equal(script: str, backend: str) -> None:
    """Fail unless the script, given the backend, ends well and prints nothing but `equal`."""
    done = subprocess.run([sys.executable, "-c", script, backend], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"

import os

import pytest


@pytest.fixture
def gpu() -> str:
    """The device of these tests: `cuda`, or that of DIFFTORI_TEST_DEVICE, which `make gpu-check` sets to `cpu` for a trial."""
    return os.environ.get("DIFFTORI_TEST_DEVICE", "cuda")

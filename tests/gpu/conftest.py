import os

import pytest
import torch


@pytest.fixture
def gpu(monkeypatch) -> str:
    """The device of these tests: `cuda`, or that of DIFFTORI_TEST_DEVICE, which `make gpu-check` sets to `cpu` for a trial.

    Convolutions are exact and repeatable, which they are not by default.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return os.environ.get("DIFFTORI_TEST_DEVICE", "cuda")

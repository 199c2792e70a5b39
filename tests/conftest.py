import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=10)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _quiet_machine():
    """One thread (two contended ones are slower by far), and the same random numbers for each test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

"""Settings of every test: the same examples and global draws in any order; one thread, as networks here are small."""

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed what draws from global generators: ART, and networks that a test makes, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)   # noqa: NPY002   # ART's
    torch.manual_seed(0)

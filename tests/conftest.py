"""Settings of every test: the same examples in each run, and one thread for networks too small to share."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")
torch.set_num_threads(1)

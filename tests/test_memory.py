"""Memory of certification does not grow with the number of draws."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import sys
import numpy as np, torch
from torch import nn
from art_rs_plugins import PyTorchSmoothedClassifier

torch.set_num_threads(1)
network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
estimator = PyTorchSmoothedClassifier(
    network, nn.CrossEntropyLoss(), (3, 32, 32), 10, device_type="cpu", scale=0.5, sample_size=100
)
estimator.certify(np.full((1, 3, 32, 32), 0.5, np.float32), n=int(sys.argv[1]))
# of this process alone: getrusage begins with the peak of the one that started it
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak(n: int) -> int:
    done = subprocess.run([sys.executable, "-c", PROBE, str(n)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_at_100000_draws_is_that_at_1000():
    assert peak(100_000) <= 1.10 * peak(1_000)

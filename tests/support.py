"""Networks and data that several test files share."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from art_rs_plugins import PyTorchSmoothedClassifier

DIGITS = load_digits()
X = (DIGITS.images / 16.0).astype(np.float32)[:, None]
Y = DIGITS.target.astype(np.int64)
TRAIN, TEST = slice(0, 1437), slice(1437, 1797)


def digits_network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


def smooth(network: nn.Module, shape: tuple[int, ...] = (1, 8, 8), classes: int = 10, **settings):
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", **settings}
    return PyTorchSmoothedClassifier(network, nn.CrossEntropyLoss(), shape, classes, **settings)


class Recorder(nn.Module):
    """A trainable network that remembers the standard deviation of what it is fed, around a constant input."""

    def __init__(self, features: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(features, classes)
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().flatten(1))
        return self.linear(x.flatten(1))

    def std(self) -> float:
        seen, self.seen = torch.cat(self.seen), []
        return float(seen.std())


def recording(classes: int = 10, **settings) -> tuple[Recorder, PyTorchSmoothedClassifier]:
    recorder = Recorder(classes=classes)
    estimator = smooth(
        recorder, classes=classes, optimizer=torch.optim.SGD(recorder.parameters(), lr=1e-3), scale=0.5, **settings
    )
    recorder.seen = []
    return recorder, estimator

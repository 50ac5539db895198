"""Passes per second of `count_votes` beside its floor and its peers, interleaved in one run.

    python -m pytest tests/benchmarks --benchmark-enable -s

The network is the CIFAR ResNet-20 of the folder named by ART_RS_SHARED_DATA, or one with random weights without it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from tabulate import tabulate
from torch import nn

from art_rs_plugins import Gaussian, count_votes
from art_rs_plugins.benchmark.models import build, load_weights
from art_rs_plugins.smoothing.sampling import default_block

SIGMA, DRAWS, ROUNDS = 0.25, 2_000, 7


@pytest.fixture(scope="module")
def network() -> nn.Module:
    found = build("resnet20", (3, 32, 32), 10, seed=0)
    shared = os.environ.get("ART_RS_SHARED_DATA")
    if shared:
        load_weights(found, Path(shared) / "models" / "noisy" / "resnet20_sigma0.25.pt")
    return found.eval()


def floor(f: nn.Module, x: torch.Tensor, rows: int) -> Callable[[], None]:
    """The bare forward passes: same batch, same layout, no noise, no counting."""
    batch = x.expand(rows, *x.shape[1:]).contiguous(memory_format=torch.channels_last)

    def act() -> None:
        with torch.no_grad():
            for _ in range(DRAWS // rows):
                f(batch)

    return act


def plain_loop(f: nn.Module, x: torch.Tensor, rows: int) -> Callable[[], None]:
    """Sampling as the field's scripts write it."""

    def act() -> None:
        counts = np.zeros(10, dtype=int)
        with torch.no_grad():
            for _ in range(DRAWS // rows):
                batch = x.repeat((rows, 1, 1, 1))
                predictions = f(batch + torch.randn_like(batch) * SIGMA).argmax(1)
                for label in predictions.numpy():
                    counts[label] += 1

    return act


def test_votes_per_second(benchmark, network: nn.Module) -> None:
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    channels_last = build("resnet20", (3, 32, 32), 10, seed=0).eval().to(memory_format=torch.channels_last)
    channels_last.load_state_dict(network.state_dict())
    art = PyTorchRandomizedSmoothing(
        network, nn.CrossEntropyLoss(), (3, 32, 32), 10, device_type="cpu", sample_size=1, scale=SIGMA
    )
    rows = default_block(x.shape[1:])
    acts: dict[str, Callable[[], object]] = {
        f"bare forward, channels_last, batch {rows}": floor(channels_last, last, rows),
        "ART certify, its default batch 32": lambda: art.certify(x.numpy(), n=DRAWS),
        "plain loop, batch 400": plain_loop(network, x, 400),
        "plain loop, batch 1000": plain_loop(network, x, 1000),
    }
    times: dict[str, list[float]] = {name: [] for name in acts}

    def peers() -> None:
        for name, act in acts.items():
            begun = time.perf_counter()
            act()
            times[name].append(time.perf_counter() - begun)

    def ours() -> None:
        count_votes(channels_last, last, Gaussian(SIGMA), DRAWS, num_classes=10, seed=0)

    ours(), peers()
    for measured in times.values():
        measured.clear()
    own: list[float] = []

    def timed() -> None:
        begun = time.perf_counter()
        ours()
        own.append(time.perf_counter() - begun)

    benchmark.pedantic(timed, setup=peers, rounds=ROUNDS, iterations=1)
    mine = statistics.median(own)
    rates = [["count_votes, channels_last", f"{DRAWS / mine:,.0f}", "1.00"]]
    for name, measured in times.items():
        middle = statistics.median(measured)
        rates.append([name, f"{DRAWS / middle:,.0f}", f"{middle / mine:.2f}"])
        benchmark.extra_info[name] = middle / mine
    print("\n" + tabulate(rates, headers=["ResNet-20, 3x32x32, fp32", "passes/s", "time / count_votes"]))

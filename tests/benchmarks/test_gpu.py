"""Speed on a GPU, against the bare forward pass replayed as a CUDA graph; skips without one, and asserts no time.

    python -m pytest tests/benchmarks/test_gpu.py --benchmark-enable -s
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable

import pytest
import torch
from tabulate import tabulate
from torch import nn

from art_rs_plugins import Gaussian, Performance, count_votes
from art_rs_plugins.benchmark.models import build
from art_rs_plugins.smoothing.modules import BaseClassifier
from art_rs_plugins.smoothing.performance import Voter
from art_rs_plugins.smoothing.sampling import default_block

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ROUNDS, SHAPE = 5, (3, 32, 32)


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )   # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(num_classes: int) -> nn.Module:
    """The network of ImageNet's published certificates, which no library here provides."""
    parts: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]   # fmt: skip
    inputs = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(depth):
            parts.append(Bottleneck(inputs, width, stride if i == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))


def seconds(act: Callable[[], object]) -> float:
    """Median time of the device for one call, after one to warm up."""
    act()
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        act()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000.0)
    return statistics.median(times)


def replayed(f: nn.Module, rows: int, shape: tuple[int, ...], draws: int) -> Callable[[], object]:
    """The bare forward passes, captured once and replayed."""
    batch = torch.zeros((rows, *shape), device="cuda").contiguous(memory_format=torch.channels_last)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            f(batch)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        f(batch)
    return lambda: [graph.replay() for _ in range(-(-draws // rows))]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "name, shape, classes, draws",
    [("resnet110", SHAPE, 10, 100_000), (f"{__name__}:resnet50", (3, 224, 224), 1000, 20_000)],
    ids=["cifar", "imagenet"],
)
def test_passes_against_the_replayed_forward(
    benchmark, name: str, shape: tuple[int, ...], classes: int, draws: int
) -> None:
    network = build(name, shape, classes, seed=0).eval().cuda()
    x = torch.rand(1, *shape, device="cuda").contiguous(memory_format=torch.channels_last)
    rows = default_block(shape, "cuda") // 100 * 100
    plain = Voter(BaseClassifier(network), Performance("bfloat16", channels_last=True))
    fast = Voter(BaseClassifier(network), Performance("bfloat16", channels_last=True, compile=True))

    def votes(f: nn.Module | Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: count_votes(f, x, Gaussian(0.25), draws, num_classes=classes, seed=0)

    def constant(noisy: torch.Tensor) -> torch.Tensor:
        return noisy.flatten(1)[:, :classes]   # noise, comparison and counting, with next to no network

    found = {
        "bare forward, replayed": seconds(replayed(plain, rows, shape, draws)),
        "count_votes": seconds(votes(plain)),
        "count_votes, compiled": seconds(votes(fast)),
        "noise and counting": seconds(votes(constant)),
    }
    floor = found["bare forward, replayed"]
    cells = [[what, f"{draws / time:,.0f}", f"{floor / time:.2f}"] for what, time in found.items()]
    print("\n" + tabulate(cells, headers=[f"{name}, bf16", "passes/s", "share of the replayed forward"]))
    print(f"share of noise and counting: {found['noise and counting'] / found['count_votes, compiled']:.2f}")
    benchmark.pedantic(votes(fast), rounds=1)
    benchmark.extra_info.update(found)


def test_no_batch_waits_for_the_device() -> None:
    """Synchronisations do not grow with the number of batches."""
    network = build("resnet20", SHAPE, 10, seed=0).eval().cuda()
    x = torch.rand(1, *SHAPE, device="cuda")
    waits = []
    for draws in (20_000, 200_000):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                count_votes(network, x, Gaussian(0.25), draws, num_classes=10, seed=0)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(len([warning for warning in seen if "synchroniz" in str(warning.message)]))
    assert waits[0] == waits[1]

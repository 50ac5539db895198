"""What patches and compositions cost beside their bare forward passes; nothing is asserted about time.

    python -m pytest tests/benchmarks/test_methods.py --benchmark-enable -s

The networks come from the folder named by ART_RS_SHARED_DATA; without it ResNet-20 is random, and the other tests skip.
ART_RS_BENCHMARK_COMPILE=1 compiles it, of patches as well as of the bare passes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from sklearn.datasets import load_sample_image
from tabulate import tabulate
from test_goals import COMPILE, DEVICE, SHARED, all_threads, interleaved, network  # noqa: F401 - fixtures
from torch import nn

from art_rs_plugins import (
    Gaussian,
    PatchGeometry,
    Performance,
    PyTorchACES,
    PyTorchSmoothedClassifier,
    PyTorchSmoothReduce,
    ScoreSelector,
    count_votes,
)
from art_rs_plugins.benchmark.data import load
from art_rs_plugins.benchmark.models import build, load_weights
from art_rs_plugins.smoothing.modules import BaseClassifier, PatchReduce
from art_rs_plugins.smoothing.performance import Voter
from art_rs_plugins.theory.patches import Pad

FIRES = ("fire2", "fire3", "fire4", "fire5", "fire6", "fire7", "fire8", "fire9")


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 on 227x227 images in [0, 1], with the layers and weights of its authors."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.state = nn.ParameterDict({name.replace("/", "_").replace(".", "_"): w for name, w in state.items()})
        self.register_buffer("mean", torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1))

    def conv(self, x: torch.Tensor, name: str, **settings: int) -> torch.Tensor:
        return nn.functional.conv2d(x, self.state[f"{name}_weight"], self.state[f"{name}_bias"], **settings).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        x = pool(self.conv(x.flip(1) * 255.0 - self.mean, "conv1", stride=2))
        for fire in FIRES:
            thin = self.conv(x, f"{fire}_conv1x1_1")
            wide = self.conv(thin, f"{fire}_conv1x1_2"), self.conv(thin, f"{fire}_conv3x3_2", padding=1)
            x = torch.cat(wide, dim=1)
            x = pool(x) if fire in ("fire4", "fire8") else x
        return self.conv(x, "conv_final", padding=1).mean(dim=(2, 3))


def bare(f: nn.Module, batch: torch.Tensor, times: int) -> Callable[[], object]:
    def act() -> object:
        with torch.no_grad():
            for _ in range(times):
                out = f(batch)
        return out.sum().item()

    return act


def test_cost_of_a_draw_with_patches(benchmark, network: nn.Module) -> None:   # noqa: F811
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows, draws = 100, 2000   # so that the probes before them weigh little
    quick = Performance(channels_last=True, compile=COMPILE, block=rows)
    alone = Voter(BaseClassifier(network), quick)
    batch = x.expand(rows, 3, 32, 32).contiguous()
    acts: dict[str, Callable[[], object]] = {"bare": bare(alone, batch, draws // rows)}
    for m, stride in ((4, 4), (9, 2), (25, 1)):
        reduced = Voter(
            BaseClassifier(PatchReduce(network, PatchGeometry.grid((32, 32), 32, stride, before=Pad(2)), block=rows)),
            quick,
        )
        acts[f"m = {m}"] = lambda f=reduced: count_votes(
            f, x, Gaussian(0.25), draws, num_classes=10, seed=0, block=rows
        ).sum().item()
    seconds = interleaved(acts, benchmark, "m = 4", rounds=3)
    lines = []
    for m in (4, 9, 25):
        ratio = seconds[f"m = {m}"] / (m * seconds["bare"])
        lines.append([m, f"{ratio:.3f}"])
        benchmark.extra_info[f"m = {m}"] = ratio
    print("\n" + tabulate(lines, ["patches", "time of a draw / m bare forward passes (goal <= 1.05)"]))


@pytest.mark.skipif(not SHARED, reason="ART_RS_SHARED_DATA names no folder")
def test_imagenet_sizes(benchmark) -> None:
    state = torch.load(Path(SHARED) / "models" / "squeezenet_dc" / "squeezenet_dc_state_dict.pt", weights_only=True)
    squeezenet = SqueezeNet(state).eval().to(DEVICE)
    photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)[None, :, :, 106:533] / 255.0
    x = nn.functional.interpolate(photo, (256, 256), mode="bilinear", antialias=True).numpy()
    geometry = PatchGeometry.corners((256, 256), 227)
    settings = {"clip_values": (0, 1), "scale": 0.1, "sample_size": 50, "device_type": "gpu"}
    classifier = PyTorchSmoothReduce(
        squeezenet, nn.CrossEntropyLoss(), (3, 256, 256), 1000, geometry=geometry, bank_samples=1, **settings
    )
    m, found, rows = len(geometry.offsets), [], 16
    crop = torch.from_numpy(x[:, :, 14:241, 14:241]).to(DEVICE).expand(rows, 3, 227, 227).contiguous()
    classifier.set_params(performance=Performance(block=rows))
    acts = {
        "bare": bare(squeezenet, crop, 10),
        "certify": lambda: found.append(classifier.certificates(x, n=160, n0=rows, seed=0)),
    }
    seconds = interleaved(acts, benchmark, "certify", rounds=3)
    draws = 160 + rows
    each, floor = seconds["certify"] / (draws * m), seconds["bare"] / (10 * rows)
    certificate = found[-1]
    print(f"\nSqueezeNet, 256x256, {m} patches of 227x227, sigma .1, {draws} draws: {seconds['certify']:.1f} s,")
    print(f"{1 / each:.1f} patches/s against {1 / floor:.1f} bare passes/s: {each / floor:.3f} of the time each")
    print(f"class {certificate.prediction[0]}, {certificate.count[0]} of {certificate.n[0]} votes, "
          f"radius {certificate.radius[0]:.3f}, abstained {certificate.abstained[0]}")   # fmt: skip
    benchmark.extra_info["time of a patch / bare pass"] = each / floor
    assert np.array_equal(found[0].count, certificate.count)   # the same seed gives the same votes


@pytest.mark.skipif(not SHARED, reason="ART_RS_SHARED_DATA names no folder")
def test_overhead_of_a_composition(benchmark, network: nn.Module) -> None:   # noqa: F811
    x, draws = load("cifar10").x_test[::2500], 1000
    accurate = build("resnet56", (3, 32, 32), 10, seed=0).eval()
    load_weights(accurate, Path(SHARED) / "models" / "akamaster" / "resnet56-4bfd9763.th")
    settings = {"input_shape": (3, 32, 32), "nb_classes": 10, "clip_values": (0, 1), "device_type": "gpu"}
    smoothed = PyTorchSmoothedClassifier(
        network,
        nn.CrossEntropyLoss(),
        scale=0.25,
        sample_size=100,
        performance=Performance(channels_last=True, block=100),
        **settings,
    )
    core = PyTorchClassifier(accurate, nn.CrossEntropyLoss(), **settings)
    composed = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(0.3))
    acts: dict[str, Callable[[], object]] = {
        "plain": lambda: smoothed.certificates(x, n=draws, seed=0),
        "composed": lambda: composed.certificates(x, n=draws, seed=0),
    }
    seconds = interleaved(acts, benchmark, "composed")
    ratio = seconds["composed"] / seconds["plain"]
    print(f"\nACES, entropy selector, core ResNet-56, n = {draws}: {ratio:.3f} times plain smoothing (goal <= 1.05)")
    benchmark.extra_info["ACES / plain"] = ratio

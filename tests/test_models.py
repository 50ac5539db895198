"""Reference networks: published weights fit and do what they are known to do; errors name file and remedy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from art_rs_plugins.benchmark.models import (
    ResNet,
    build,
    load_weights,
    network_outputs,
    read_training,
    same_outputs,
    save_weights,
)
from art_rs_plugins.smoothing.digest import network_digest
from art_rs_plugins.smoothing.modules import Normalize

SHARED = os.environ.get("ART_RS_SHARED_DATA", "")
ART_DATA = os.environ.get("ART_DATA_PATH", "")
needs_shared = pytest.mark.skipif(
    not (Path(SHARED) / "models" / "akamaster").is_dir() or not SHARED,
    reason="ART_RS_SHARED_DATA names no folder with published weights",
)
needs_cifar = pytest.mark.skipif(
    not (Path(ART_DATA) / "cifar-10-batches-py" / "test_batch").is_file() or not ART_DATA,
    reason="ART_DATA_PATH names no folder with CIFAR-10",
)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_resnets_have_the_published_sizes() -> None:
    # He et al. (2016), table 6: 0.27 M, 0.85 M, 1.7 M
    assert size(build("resnet20", (3, 32, 32), 10, seed=0)) == 269_722
    assert size(build("resnet56", (3, 32, 32), 10, seed=0)) == 853_018
    assert size(build("resnet110", (3, 32, 32), 10, seed=0)) == 1_727_962


def test_normalisation_is_inside_and_not_among_the_weights() -> None:
    network = ResNet(20, 10).eval()
    assert not any("normalize" in name or "mean" in name.split(".")[0] for name in network.state_dict())
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    # the mean colour is zero after normalisation, and stays zero up to the bias of the last layer
    torch.testing.assert_close(network(grey), network.linear.bias.expand(2, 10), atol=1e-4, rtol=0)


def test_the_shortcut_takes_every_other_pixel_and_pads_channels_on_both_sides() -> None:
    block = ResNet(20, 10).layer2[0].eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.arange(16 * 4 * 4, dtype=torch.float32).reshape(1, 16, 4, 4)
    out = block(x)
    assert out.shape == (1, 32, 2, 2)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0
    assert out[:, 24:].abs().sum() == 0


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_a_depth_that_is_no_6m_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="depth must be 6m"):
        ResNet(depth, 10)


@pytest.mark.parametrize(
    "spec, shape", [("cnn", (1, 8, 8)), ("cnn", (1, 28, 28)), ("cnn", (3, 7, 5)), ("mlp", (13,)), ("mlp", (1, 8, 8))]
)
def test_small_networks_take_their_shapes(spec: str, shape: tuple[int, ...]) -> None:
    network = build(spec, shape, 7, seed=1)
    x = torch.rand(4, *shape)
    assert network(x).shape == (4, 7)
    torch.testing.assert_close(network(x)[2:3], network(x[2:3]))


def test_the_seed_decides_the_weights_and_touches_nothing_else() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    digests = [network_digest(build("cnn", (1, 8, 8), 10, seed=seed)) for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_generators_of_accelerators_stay_as_they_were() -> None:
    before = torch.cuda.get_rng_state()
    build("cnn", (1, 8, 8), 10, seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize(
    "spec, shape, message",
    [
        ("vgg", (3, 32, 32), "spec must be one of cnn, mlp, resnet20"),
        ("resnet20", (1, 28, 28), "resnet20 needs RGB images"),
        ("cnn", (13,), "cnn needs inputs of shape"),
        ("no_such_package.nets:make", (3,), "no module 'no_such_package.nets'"),
        ("math.inner:make", (3,), "no module 'math.inner'"),
        ("math:make", (3,), "module math has no attribute 'make'"),
        (":make", (3,), "no module ''"),
    ],
)
def test_a_spec_that_leads_nowhere_is_named(spec: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec, shape, 10, seed=0)


FACTORIES = """
from torch import nn
def plain(): return nn.Linear(3, 2)
def shaped(input_shape, num_classes): return nn.Linear(input_shape[0], num_classes)
def classes(num_classes, width=8): return nn.Linear(width, num_classes)
def anything(**settings): return nn.Linear(settings["input_shape"][0], settings["num_classes"])
def wrong(): return "network"
number = 3
"""


def test_factories_get_what_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(FACTORIES)
    (tmp_path / "own_broken.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = {
        name: build(f"own_networks:{name}", (5,), 4, seed=0).weight.shape
        for name in ("plain", "shaped", "classes", "anything")
    }
    assert sizes == {"plain": (2, 3), "shaped": (4, 5), "classes": (4, 8), "anything": (4, 5)}
    with pytest.raises(TypeError, match=r"must return a torch\.nn\.Module, got str"):
        build("own_networks:wrong", (5,), 4, seed=0)
    with pytest.raises(TypeError, match="must name a function or class, got int"):
        build("own_networks:number", (5,), 4, seed=0)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        build("own_broken:make", (5,), 4, seed=0)
    for name in ("own_networks", "own_broken"):
        sys.modules.pop(name, None)


def test_saved_weights_come_back_with_their_metadata(tmp_path: Path) -> None:
    first, second = build("cnn", (1, 8, 8), 10, seed=1), build("cnn", (1, 8, 8), 10, seed=2)
    save_weights(first, tmp_path / "deep" / "net.safetensors", {"sigma": "0.25"})
    load_weights(second, tmp_path / "deep" / "net.safetensors")
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(first(x), second(x))
    assert network_digest(first) == network_digest(second)
    with safe_open(tmp_path / "deep" / "net.safetensors", "pt") as file:
        assert file.metadata() == {"sigma": "0.25"}
    with pytest.raises(TypeError, match="metadata must map text to text"):
        save_weights(first, tmp_path / "net.safetensors", {"sigma": 0.25})  # type: ignore[dict-item]


def test_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_weights(tied, tmp_path / "net.safetensors", {})
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    load_weights(other, tmp_path / "net.safetensors")
    assert torch.equal(other[1].weight, tied[0].weight)


@pytest.mark.parametrize("wrap", ["plain", "nested", "parallel", "no counters"])
def test_state_dicts_of_other_tools_fit(tmp_path: Path, wrap: str) -> None:
    source, target = build("resnet20", (3, 8, 8), 10, seed=1), build("resnet20", (3, 8, 8), 10, seed=2)
    state = source.state_dict()
    made: dict[str, object] = {
        "plain": state,
        "nested": {"state_dict": state, "best": 0.9},
        "parallel": {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        "no counters": {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    }
    torch.save(made[wrap], tmp_path / "net.pt")
    load_weights(target, tmp_path / "net.pt")
    assert network_digest(target) == network_digest(source)


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_weights_of_another_network_change_nothing(tmp_path: Path) -> None:
    save_weights(build("cnn", (1, 8, 8), 10, seed=1), tmp_path / "cnn.safetensors", {})
    same_names = build("cnn", (1, 8, 8), 5, seed=1)
    before = network_digest(same_names)
    with pytest.raises(ValueError, match=r"cnn\.safetensors does .*7\.weight has shape \(10, 64\), not \(5, 64\)"):
        load_weights(same_names, tmp_path / "cnn.safetensors")
    assert network_digest(same_names) == before
    with pytest.raises(ValueError, match=r"missing 1\.weight, .*unexpected 0\.bias and 7 more; build the network"):
        load_weights(build("mlp", (64,), 10, seed=1), tmp_path / "cnn.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_truncated_file_is_named_wherever_it_was_cut(tmp_path: Path, kind: str) -> None:
    network = build("mlp", (4,), 3, seed=1)
    path = tmp_path / f"net.{kind}"
    if kind == "safetensors":
        save_weights(network, path, {})
    else:
        torch.save(network.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    data, before = path.read_bytes(), network_digest(network)
    for cut in (*range(0, 200, 7), *range(200, len(data), 211), len(data) - 9):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=rf"net\.{kind} cannot be read as weights .* fetch or save it again"):
            load_weights(network, path)
    assert network_digest(network) == before


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    network = build("mlp", (4,), 3, seed=1)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(network, tmp_path / "absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        load_weights(network, tmp_path / "list.pt")
    torch.save(network, tmp_path / "module.pt")  # a pickle of code, which is not to be run
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_weights(network, tmp_path / "module.pt")


def test_the_digest_sees_names_shapes_and_values() -> None:
    base = nn.Linear(2, 2)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    digest = network_digest(base)
    with torch.no_grad():
        base.weight[0, 0] = torch.nextafter(base.weight[0, 0], torch.tensor(9.0))
    assert network_digest(base) != digest
    base.load_state_dict(state)
    assert network_digest(base) == digest
    assert network_digest(base.to(torch.bfloat16)) != digest
    holder = Holder()
    holder.module.load_state_dict(state)
    assert network_digest(holder) != digest


class Activated(nn.Module):
    """Keeps a function where its printed form shows the function's address, or nothing at all."""

    def __init__(self, function: object, *, shown: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.function, self.shown = function, shown

    def extra_repr(self) -> str:
        return repr(self.function) if self.shown else ""

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def test_the_digest_sees_buffers_that_are_no_weights_and_layers_without_any() -> None:
    def network(mean: float, activation: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Normalize(mean, 1.0), nn.Linear(4, 4), activation, nn.Linear(4, 3))

    plain = network(0.5, nn.ReLU())
    assert network_digest(network(0.5, nn.ReLU())) == network_digest(plain)
    assert network_digest(network(0.25, nn.ReLU())) != network_digest(plain)
    assert network_digest(network(0.5, nn.Tanh())) != network_digest(plain)
    assert network(0.25, nn.ReLU()).state_dict().keys() == plain.state_dict().keys()
    # the address of a function is another one in each process
    first, second = Activated(lambda x: x), Activated(lambda x: x)
    second.load_state_dict(first.state_dict())
    assert network_digest(first) == network_digest(second)


def test_the_answers_see_what_a_network_does_not_print() -> None:
    first, second = Activated(torch.relu, shown=False), Activated(torch.tanh, shown=False)
    second.load_state_dict(first.state_dict())
    assert network_digest(first) == network_digest(second)
    answers = network_outputs(first, (4,))
    assert len(answers) == 8
    assert same_outputs(answers, network_outputs(first, (4,)))
    assert not same_outputs(answers, network_outputs(second, (4,)))
    assert same_outputs(answers, [value * (1 + 1e-5) for value in answers])
    assert not same_outputs(answers, [])
    assert not same_outputs(answers, [value + 0.01 * max(answers) for value in answers])
    assert network_outputs(Activated(lambda x: x / 0.0 * 0.0), (4,)) == [0.0] * 8  # NaN is no JSON
    training = first.training
    network_outputs(first, (4,))
    assert first.training == training


def test_the_header_of_weights_is_read_back(tmp_path: Path) -> None:
    network = build("mlp", (4,), 3, seed=1)
    save_weights(network, tmp_path / "net.safetensors", {"sigma": "0.25"})
    assert read_training(tmp_path / "net.safetensors") == {"sigma": "0.25"}
    torch.save(network.state_dict(), tmp_path / "net.pt")
    assert read_training(tmp_path / "net.pt") is None
    with pytest.raises(FileNotFoundError, match="no weights at"):
        read_training(tmp_path / "absent.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(data[:40])
    with pytest.raises(ValueError, match=r"torn\.safetensors cannot be read as weights"):
        read_training(tmp_path / "torn.safetensors")


@needs_shared
@needs_cifar
@pytest.mark.parametrize(
    "spec, file, sigma, expected",
    [
        ("resnet20", "akamaster/resnet20-12fca82f.th", 0.0, 0.9173),
        ("resnet56", "akamaster/resnet56-4bfd9763.th", 0.0, 0.9339),
        ("resnet20", "noisy/resnet20_sigma0.25.pt", 0.25, 0.754),
    ],
)
def test_published_weights_give_their_accuracy(
    monkeypatch: pytest.MonkeyPatch, spec: str, file: str, sigma: float, expected: float
) -> None:
    from art import config

    from art_rs_plugins.benchmark.data import load

    monkeypatch.setattr(config, "ART_DATA_PATH", ART_DATA)
    data = load("cifar10")
    network = build(spec, (3, 32, 32), 10, seed=0)
    load_weights(network, Path(SHARED) / "models" / file)
    network.eval()
    rows = slice(None, None, 20)
    x = torch.from_numpy(data.x_test[rows])
    x = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answers = torch.cat([network(part).argmax(dim=1) for part in x.split(125)]).numpy()
    accuracy = float(np.mean(answers == data.y_test[rows]))
    # 500 images: four standard errors
    assert abs(accuracy - expected) < 4 * np.sqrt(expected * (1 - expected) / 500)

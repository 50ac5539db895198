"""Performance changes how the network computes, and nothing that is guaranteed; what votes is what is deployed."""

from __future__ import annotations

import copy
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from support import X, Y, digits_network, smooth
from torch import nn

from art_rs_plugins import PatchGeometry, Performance, PyTorchSmoothReduce
from art_rs_plugins.benchmark.models import build
from art_rs_plugins.smoothing.modules import BaseClassifier, Normalize
from art_rs_plugins.smoothing.performance import Voter, measure_block


def resnet() -> torch.nn.Module:
    network = build("resnet20", (3, 32, 32), 10, seed=0)
    for layer in network.modules():   # statistics that folding has to carry over
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2)
            layer.running_var.uniform_(0.5, 2.0)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.uniform_(-0.3, 0.3)
    return network.eval()


@pytest.mark.parametrize("channels_last", [False, True])
def test_folding_and_layout_keep_the_function(channels_last):
    torch.manual_seed(0)
    network = resnet()
    voter = Voter(BaseClassifier(network), Performance(channels_last=channels_last))
    x = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(voter(x), network(x), atol=1e-4, rtol=1e-4)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in voter.modules())
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in network.modules())   # the user's own is left alone
    with torch.no_grad():
        network.linear.bias += 100.0
    assert float(voter(x).max()) < 90.0


def test_transforms_take_part():
    base = BaseClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), Normalize(0.5, 0.25)).eval()
    x = torch.rand(4, 3, 2, 2)
    assert torch.allclose(Voter(base, Performance(channels_last=True))(x), base(x), atol=1e-6)


def test_certificates_and_predictions_use_the_same_network():
    network = digits_network()
    plain = smooth(network)
    for performance in (Performance(channels_last=True), Performance(dtype="bfloat16")):
        fast = smooth(network, performance=performance)
        seen = []
        voter = fast._voter()
        voter.register_forward_hook(lambda *call, seen=seen: seen.append(len(call[2])))
        counts = fast.certificates(X[:5], n=500, seed=3).count
        predicted = len(seen)
        fast.predict(X[:5], seed=3)
        assert len(seen) > predicted > 0
        assert fast._voter() is voter
        difference = np.abs(counts - plain.certificates(X[:5], n=500, seed=3).count)
        assert difference.max() <= (2 if performance.dtype == "float32" else 40)


def test_bfloat16_is_another_network_and_float32_noise():
    """Its votes are its own, and its noise is that of float32: only the network rounds."""
    network = digits_network()
    fast = Voter(BaseClassifier(network).eval(), Performance(dtype="bfloat16"))
    x = torch.rand(64, 1, 8, 8)
    with torch.no_grad():
        logits, exact = fast(x), network(x)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact)
    assert torch.allclose(logits, exact, atol=0.05, rtol=0.05)


def test_training_reaches_the_voter():
    network = digits_network()
    estimator = smooth(
        network, optimizer=torch.optim.SGD(network.parameters(), lr=0.5), performance=Performance(channels_last=True)
    )
    before = estimator.certificates(X[:3], n=500, seed=0).count
    estimator.fit(X[:256], Y[:256], nb_epochs=2)
    after = estimator.certificates(X[:3], n=500, seed=0).count
    assert not np.array_equal(before, after)
    plain = smooth(network).certificates(X[:3], n=500, seed=0).count
    assert np.abs(after - plain).max() <= 2
    estimator.set_params(preprocessing=(0.5, 0.1))
    assert not np.array_equal(estimator.certificates(X[:3], n=500, seed=0).count, after)
    for twin in (copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        assert twin.performance == Performance(channels_last=True)
        assert np.array_equal(
            twin.certificates(X[:3], n=500, seed=0).count, estimator.certificates(X[:3], n=500, seed=0).count
        )


def test_measured_block_is_whole_chunks_or_the_default():
    rows = measure_block(digits_network().eval(), (1, 8, 8), torch.device("cpu"))
    assert rows in (100, 500, 1000)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"dtype": "float64"}, ValueError, "dtype must be one of float32, bfloat16, float16"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of"),
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"block": 1.5}, TypeError, "block must be an integer"),
    ],
)
def test_bad_settings_are_named(settings, error, words):
    with pytest.raises(error, match=words):
        Performance(**settings)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_a_cpu_that_emulates_bfloat16_is_told(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        smooth(digits_network(), performance=Performance("float32", compile=True))
        assert not seen
        smooth(digits_network(), performance=Performance("bfloat16"))
    assert [str(warning.message).partition(",")[0] for warning in seen] == [
        "bfloat16 is slow on this CPU"
    ] * (capability == "AVX2")


def test_half_precision_needs_a_gpu():
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        smooth(digits_network(), performance=Performance(dtype="float16"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_networks_vote_alike():
    network = digits_network()
    compiled = smooth(network, performance=Performance(compile=True))
    counts = compiled.certificates(X[:4], n=1_000, seed=1).count
    assert np.abs(counts - smooth(network).certificates(X[:4], n=1_000, seed=1).count).max() <= 2
    assert np.array_equal(compiled.certificates(X[:4], n=1_000, seed=1, batch_size=2).count, counts)


def test_weights_written_behind_autograds_back_reach_the_voter():
    network = digits_network()
    fast = smooth(network, performance=Performance(channels_last=True))
    before = fast.certificates(X[:3], n=500, seed=0).count
    for parameter in network.parameters():
        parameter.data.mul_(-1.0)   # leaves the version counter as it was
    after = fast.certificates(X[:3], n=500, seed=0).count
    assert not np.array_equal(before, after)
    assert np.abs(after - smooth(network).certificates(X[:3], n=500, seed=0).count).max() <= 2


@pytest.fixture
def compiled_shapes(monkeypatch):
    """Shapes that meet what would have been compiled."""
    shapes = []

    def compile_in_place(module, **_):
        module.register_forward_hook(lambda *call: shapes.append(tuple(call[1][0].shape)))

    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    return shapes


def test_a_compiled_network_meets_one_shape(compiled_shapes):
    """Probes and short passes are padded to the rows of a whole pass: another shape would compile again."""
    network = digits_network()
    compiled = smooth(network, performance=Performance(compile=True, block=250))
    found = compiled.certificates(X[:3], n=330, seed=1)
    assert np.array_equal(found.count, smooth(network).certificates(X[:3], n=330, seed=1).count)
    compiled.predict(X[:3], seed=2)
    assert set(compiled_shapes) == {(200, 1, 8, 8)}


def test_of_patches_the_network_alone_is_compiled_and_meets_one_shape(compiled_shapes):
    geometry, settings = PatchGeometry.corners((8, 8), 6), {"scale": 0.25, "clip_values": (0, 1)}
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 10))
    plain, compiled = (
        PyTorchSmoothReduce(
            network, torch.nn.CrossEntropyLoss(), (1, 8, 8), 10, geometry=geometry, performance=performance, **settings
        )
        for performance in (None, Performance(compile=True, block=200))
    )
    found = compiled.certificates(X[:2], n=330, seed=1)
    assert np.array_equal(found.count, plain.certificates(X[:2], n=330, seed=1).count)
    assert set(compiled_shapes) == {(200, 1, 6, 6)}


def test_a_frozen_copy_is_probed_once_for_each_kind_of_input(compiled_shapes):
    """Three probes cost three whole passes of a compiled network; a changed network is another copy."""
    network = digits_network()
    compiled = smooth(network, performance=Performance(compile=True, block=100))
    passes = []
    for inputs in (X[:1], X[:1], X[1:2]):
        compiled.certificates(inputs, n=200, seed=0)
        passes.append(len(compiled_shapes))
    assert np.diff([0, *passes]).tolist() == [6, 3, 3]   # one of selection, two of estimation
    for parameter in network.parameters():
        parameter.data.mul_(-1.0)
    compiled.certificates(X[:1], n=200, seed=0)
    assert len(compiled_shapes) == passes[-1] + 6
    network.register_forward_hook(lambda module, inputs, output: output + torch.rand_like(output))
    random = smooth(network, performance=Performance(compile=True, block=100))
    for _ in range(2):   # to fail is not to pass
        with pytest.raises(ValueError, match="f is random"):
            random.certificates(X[:1], n=200, seed=0)


def test_an_input_that_is_not_finite_vouches_for_no_network():
    class Leaky(torch.nn.Module):
        def forward(self, x):
            flat = x.flatten(1)[:, :10]
            return flat - flat.mean(dim=0)

    leaky = smooth(Leaky(), performance=Performance(channels_last=True))
    broken = X[:2].copy()
    broken[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="other rows of its batch"):   # its other outputs tell
        leaky.predictions(broken, n=100, seed=0)
    broken[0] = np.nan
    leaky.predictions(broken, n=100, seed=0)
    for _ in range(2):
        with pytest.raises(ValueError, match="other rows of its batch"):
            leaky.certificates(X[:2], n=100, seed=0)


def test_hooks_and_further_buffers_reach_the_voter():
    network = digits_network()
    fast = smooth(network, performance=Performance(channels_last=True))
    before = fast.certificates(X[:3], n=300, seed=0).count
    network.register_forward_hook(lambda module, inputs, output: -output)
    assert not np.array_equal(fast.certificates(X[:3], n=300, seed=0).count, before)
    network.register_buffer("more", torch.zeros(1))
    fast.certificates(X[:3], n=300, seed=0)


class Turned(nn.Module):
    """A network that plain attributes turn into others."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.sign, self.scales, self.turn = digits_network(), 1.0, [1.0], torch.relu
        self.shift, self._sign = torch.zeros(10), 1.0   # no buffer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sign * self._sign * self.scales[0] * (self.turn(self.network(x)) + 1.0) + self.shift


@pytest.mark.parametrize(
    "turn",
    [
        lambda network: setattr(network, "sign", -1.0),
        lambda network: setattr(network, "_sign", -1.0),
        lambda network: network.scales.__setitem__(0, -1.0),
        lambda network: setattr(network, "turn", lambda x: -x),
        lambda network: network.shift.data.__setitem__(3, 1e6),
        lambda network: setattr(network, "forward", lambda x: -network.network(x)),
    ],
    ids=["number", "private", "list", "function", "tensor", "forward"],
)
def test_plain_attributes_reach_the_voter(turn):
    network = Turned()
    fast = smooth(network, performance=Performance(channels_last=True))
    before, voter = fast.certificates(X[:3], n=300, seed=0).count, fast._voter()
    assert fast._voter() is voter
    turn(network)
    assert not np.array_equal(fast.certificates(X[:3], n=300, seed=0).count, before)
    assert fast._voter() is not voter


def test_a_certificate_says_how_its_network_computed():
    network = digits_network()
    fast = smooth(network, performance=Performance("bfloat16", channels_last=True, block=100))
    found, plain = fast.certificates(X[:2], n=100), smooth(network).certificates(X[:2], n=100)
    assert (found.performance, plain.performance) == ("bfloat16, channels_last", "float32")
    assert str(Performance(compile=True)) == "float32, compiled"
    with pytest.raises(ValueError, match="different performance cannot be joined"):
        type(found).concatenate([found, plain])

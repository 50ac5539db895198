"""The estimator's contract: ART's signatures, the same bits however work is split, and clear errors."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.postprocessor import HighConfidence
from art.defences.preprocessor import FeatureSqueezing
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import PyTorchClassifier
from art.estimators.estimator import BaseEstimator, LossGradientsMixin, NeuralNetworkMixin
from scipy.stats import binom
from support import TEST, TRAIN, X, Y, digits_network, recording, smooth
from torch import nn

from art_rs_plugins import Certificates, OneSided, PyTorchSmoothedClassifier, SmoothedModule
from art_rs_plugins.smoothing.performance import Performance


@pytest.fixture(scope="module")
def fitted() -> PyTorchSmoothedClassifier:
    network = digits_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    estimator = smooth(network, optimizer=optimizer, clip_values=(0, 1))
    estimator.fit(X[TRAIN], Y[TRAIN], nb_epochs=15, batch_size=64)
    return estimator


@pytest.fixture
def trained(fitted) -> PyTorchSmoothedClassifier:
    """A copy for each test, which may do to it what it likes."""
    return copy.deepcopy(fitted)


def linear(scale: float = 0.5, **settings) -> PyTorchSmoothedClassifier:
    """Class 0 where the first coordinate is positive: the true radius is that coordinate."""
    network = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    return smooth(network, (2,), 2, scale=scale, **settings)


# ---------------------------------------------------------------------------------------------- what is promised


def test_certified_radius_stays_below_the_true_one_and_comes_close():
    x = np.stack([np.linspace(0.25, 1.5, 60), np.linspace(-3, 3, 60)], axis=1).astype(np.float32)
    found = linear().certificates(x, n=20_000, seed=3)
    truth = x[:, 0].astype(np.float64)
    assert np.all(found.prediction == 0)
    assert np.sum(found.radius > truth) <= binom.isf(1e-6, len(x), 0.001)
    assert np.median(found.radius[truth < 1.0] / truth[truth < 1.0]) > 0.95


def test_training_makes_digits_certifiable(trained):
    found = trained.certificates(X[TEST][:100], n=2_000, seed=0)
    right = found.prediction == Y[TEST][:100]
    assert np.mean(right & found.holds_at(0.25)) > 0.6
    assert np.mean(trained.predict(X[TEST]).argmax(axis=1) == Y[TEST]) > 0.75


def test_certify_and_predict_have_arts_form(trained):
    x = np.concatenate([X[TEST][:20], np.full((1, 1, 8, 8), 0.5, np.float32)])
    labels, radii = trained.certify(x, n=1_000, batch_size=8)
    assert labels.dtype == np.int64
    assert radii.dtype == np.float64
    assert labels.shape == radii.shape == (21,)
    assert np.all((labels == -1) == (radii == 0))
    answers = trained.predict(x)
    assert answers.shape == (21, 10)
    assert set(answers.sum(axis=1)) <= {0.0, 1.0}
    assert np.all(trained.predict(x, is_abstain=False).sum(axis=1) == 1.0)


def test_abstention_is_a_zero_row_and_minus_one():
    x = np.zeros((1, 2), np.float32)   # on the boundary: both classes have probability one half
    assert np.all(linear().predict(x, seed=0) == 0.0)
    labels, radii = linear().certify(x, n=1_000)
    assert labels.tolist() == [-1]
    assert radii.tolist() == [0.0]


def test_a_network_of_nan_or_constant_logits_abstains():
    class Spoilt(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full((len(x), 3), self.value)

    for value in (float("nan"), float("inf"), 0.0):
        found = smooth(Spoilt(value), (2,), 3).certificates(np.ones((2, 2), np.float32), n=1_000)
        assert found.abstained.all(), value
        assert np.all(found.count == 0), value


# ---------------------------------------------------------------------------------------------- same bits


def test_bits_do_not_depend_on_batch_order_or_split(trained):
    x = X[TEST][:12]
    whole = trained.certificates(x, n=3_000, seed=7)
    assert len(np.unique(whole.count)) > 3
    order = np.random.default_rng(0).permutation(12)
    for other, rows in (
        (trained.certificates(x, n=3_000, seed=7, batch_size=5), slice(None)),
        (trained.certificates(x[order], n=3_000, seed=7, indices=order), np.argsort(order)),
        (
            Certificates.concatenate(
                [
                    trained.certificates(x[:4], n=3_000, seed=7, indices=range(4)),
                    trained.certificates(x[4:], n=3_000, seed=7, indices=range(4, 12)),
                ]
            ),
            slice(None),
        ),
    ):
        assert np.array_equal(other[rows].count, whole.count)
        assert np.array_equal(other[rows].radius, whole.radius)
    first, second = (trained.predictions(x, seed=7, batch_size=size).votes for size in (3, 12))
    assert np.array_equal(first, second)


def test_seed_none_is_fresh_and_recorded(trained):
    first, second = (trained.certificates(X[TEST][:4], n=500) for _ in range(2))
    assert first.seed[0] != second.seed[0]
    again = trained.certificates(X[TEST][:4], n=500, seed=int(first.seed[0]))
    assert np.array_equal(again.count, first.count)


def test_training_is_reproducible_and_goes_on_with_fresh_noise():
    weights = []
    for _ in range(2):
        network = digits_network()
        estimator = smooth(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1), seed=5)
        for _ in range(2):
            estimator.fit(X[:64], Y[:64], nb_epochs=1, batch_size=64)
        weights.append(network[0].weight.detach().clone())
    assert torch.equal(*weights)
    keys = {estimator._next_seed() for _ in range(100)}
    assert len(keys) == 100


# ---------------------------------------------------------------------------------------------- what comes in


def test_tensors_lists_float64_and_labels_of_every_form(trained):
    x, y = X[TEST][:4], Y[TEST][:4]
    reference = trained.certificates(x, n=500, seed=1).count
    for same in (torch.from_numpy(x), x.tolist(), x.astype(np.float64)):
        assert np.array_equal(trained.certificates(same, n=500, seed=1).count, reference)
    one_hot = np.eye(10, dtype=np.float32)[y]
    gradient = trained.loss_gradient(x, y)
    assert np.abs(gradient).max() > 0
    for labels in (one_hot, y[:, None], one_hot.astype(np.float64), torch.from_numpy(one_hot)):
        assert np.allclose(trained.loss_gradient(x, labels), gradient, atol=1e-7)
    tensor = trained.loss_gradient(torch.from_numpy(x), torch.from_numpy(one_hot))
    assert isinstance(tensor, torch.Tensor)
    assert np.allclose(tensor.numpy(), gradient, atol=1e-7)
    assert np.allclose(trained.loss_gradient(x.astype(np.float64), y), gradient, atol=1e-6)


@pytest.mark.parametrize("shape", [(7,), (3, 8, 8), (2, 3, 4, 4)], ids=["table", "image", "video"])
def test_tables_images_and_clips(shape):
    network = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 3))
    estimator = smooth(network, shape, 3, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
    rng = np.random.default_rng(0)
    x = rng.random((30, *shape), dtype=np.float32)
    y = (x.reshape(30, -1)[:, 0] * 3).astype(np.int64)
    estimator.fit(x, y, nb_epochs=2, batch_size=10)
    found = estimator.certificates(x[:3], n=200, seed=0)
    assert np.all(found.count <= 200)
    assert estimator.predict(x).shape == (30, 3)
    assert estimator.loss_gradient(x, y).shape == x.shape
    assert estimator.class_gradient(x[:2]).shape == (2, 3, *shape)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.full((2, 1, 8, 8), np.nan, np.float32), ValueError, "x must be finite, got NaN or Inf in 2 inputs"),
        (np.full((2, 1, 8, 8), np.inf, np.float32), ValueError, "x must be finite"),
        (np.full((2, 1, 8, 8), 1.5, np.float32), ValueError, r"within clip_values \[0, 1\], got \[1.5, 1.5\]"),
        (np.full((2, 1, 8, 8), -1e-5, np.float32), ValueError, "clip_values"),
        (np.full((2, 1, 8, 8), 128, np.uint8), ValueError, "rescale x"),
        (np.zeros((1, 8, 8), np.float32), ValueError, r"x must have shape \(b, 1, 8, 8\).*x\[None\]"),
        (np.zeros((2, 1, 8, 9), np.float32), ValueError, r"got \(2, 1, 8, 9\)"),
        (np.zeros((2, 64), np.float32), ValueError, "x must have shape"),
        (np.zeros((0, 1, 8, 8), np.float32), ValueError, "x must hold at least one input"),
        (np.full((2, 1, 8, 8), "a"), TypeError, "x must be an array of real numbers"),
        (np.zeros((2, 1, 8, 8), np.complex64), TypeError, "x must be an array of real numbers"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.bool), TypeError, "x must be an array of real numbers"),
    ],
)
def test_bad_inputs_are_named(trained, x, error, words):
    with pytest.raises(error, match=words):
        trained.certificates(x, n=100)
    with pytest.raises(error, match=words):
        trained.certify(x, n=100)
    if not isinstance(x, torch.Tensor):
        with pytest.raises(error, match=words):
            trained.fit(x, np.zeros(len(x), np.int64))


def test_range_and_finiteness_do_not_bind_attacks(trained):
    x = np.full((1, 1, 8, 8), 1.5, np.float32)
    assert trained.predict(x).shape == (1, 10)
    assert np.isfinite(trained.loss_gradient(x, np.array([1]))).all()
    assert trained.predict(np.full_like(x, np.nan)).sum() == 0.0
    assert trained.certificates(np.full_like(x, 1 + 5e-7), n=100, seed=0).n[0] == 100


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"n": -5}, ValueError, "n must be at least 1"),
        ({"n": 10.0}, TypeError, "n must be an integer"),
        ({"n": True}, TypeError, "n must be an integer"),
        ({"n0": 0}, ValueError, "n0 must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"indices": [0, 0]}, ValueError, "indices must be distinct"),
        ({"indices": [0]}, ValueError, "indices must be >= 0 and of shape"),
        ({"indices": [-1, 2]}, ValueError, "indices must be >= 0"),
        ({"indices": [0.5, 1.0]}, TypeError, "indices must be integers"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"seed": 2**63}, ValueError, "seed must lie in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_numbers_are_named(trained, settings, error, words):
    with pytest.raises(error, match=words):
        trained.certificates(X[TEST][:2], **{"n": 100, **settings})


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"scale": 0.0}, ValueError, "scale must be finite and > 0"),
        ({"scale": -1.0}, ValueError, "scale must be finite and > 0"),
        ({"scale": float("nan")}, ValueError, "scale must be finite and > 0"),
        ({"scale": [0.1, 0.2]}, ValueError, "scale must be one number"),
        ({"alpha": 0.0}, ValueError, "alpha must lie strictly between 0 and 1"),
        ({"alpha": 1.0}, ValueError, "alpha must lie strictly between 0 and 1"),
        ({"alpha": 2}, ValueError, "alpha must lie strictly between 0 and 1"),
        ({"alpha": float("nan")}, ValueError, "alpha must lie strictly between 0 and 1"),
        ({"sample_size": 0}, ValueError, "sample_size must be at least 1"),
        ({"sample_size": 32.0}, TypeError, "sample_size must be an integer"),
        ({"bank_samples": 0}, ValueError, "bank_samples must be at least 1, got 0"),
        ({"bank_samples": 4.0}, TypeError, "bank_samples must be an integer"),
        ({"performance": 3}, TypeError, "performance must be a Performance"),
    ],
)
def test_bad_settings_are_named(settings, error, words):
    with pytest.raises(error, match=words):
        smooth(digits_network(), **settings)
    with pytest.raises(error, match=words):
        smooth(digits_network()).set_params(**settings)


@pytest.mark.parametrize(
    ("y", "error", "words"),
    [
        (np.array([0, 10]), ValueError, r"y must be class indices in \[0, 10\), got values in \[0, 10\]"),
        (np.array([-1, 3]), ValueError, "y must be class indices"),
        (np.zeros((2, 7), np.float32), ValueError, "y must be finite and have shape"),
        (np.full((2, 10), np.nan), ValueError, "y must be finite"),
        (np.array([0.5, 1.0]), TypeError, "y must be class indices"),
        (np.array(["a", "b"]), TypeError, "y must be class indices"),
        (np.array([1, 2, 3]), ValueError, "x and y must have the same length"),
    ],
)
def test_bad_labels_are_named(trained, y, error, words):
    with pytest.raises(error, match=words):
        trained.fit(X[:2], y, nb_epochs=1)


def test_networks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"model must return shape .* \(m, 7\), got \(\d+, 10\)"):
        smooth(digits_network(), classes=7)
    with pytest.raises(ValueError, match=r"model cannot take inputs of input_shape \(3, 8, 8\)"):
        smooth(digits_network(), (3, 8, 8))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        smooth(lambda x: x)
    mixing = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="other rows of its batch"):
        smooth(mixing).certificates(X[:2], n=100)


def test_a_network_with_randomness_of_its_own_is_refused():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = digits_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(nn.functional.dropout(x, 0.2, training=True))

    for ask in ("certificates", "predictions"):
        with pytest.raises(ValueError, match="another output when it is asked again"):
            getattr(smooth(Dropping()), ask)(X[:2], n=100)


def test_devices_and_losses_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"device_type must be .*'cuda:7'"):
        smooth(digits_network(), device_type="cuda:7")
    with pytest.raises(ValueError, match="loss must reduce to a scalar"):
        PyTorchSmoothedClassifier(digits_network(), nn.CrossEntropyLoss(reduction="none"), (1, 8, 8), 10)


def test_every_label_needs_its_input(trained):
    for ask in (trained.loss_gradient, trained.compute_loss):
        for y in (Y[:3], np.eye(10, dtype=np.float32)[Y[:1]]):
            with pytest.raises(ValueError, match="x and y must have the same length, got 2 and"):
                ask(X[:2], y)
    for label in ([1, 2, 3], [1], [[1], [2]]):
        with pytest.raises(ValueError, match=r"label must .* shape \(2,\)"):
            trained.class_gradient(X[:2], label)
    with pytest.raises(ValueError, match="nb_epochs must be at least 1, got 0"):
        trained.fit(X[:2], Y[:2], nb_epochs=0)
    with pytest.raises(TypeError, match="nb_epochs must be an integer"):
        trained.fit(X[:2], Y[:2], nb_epochs=1.5)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3,), (3, 4, 4)], ids=["broadcast", "channel", "feature"])
def test_clip_values_may_belong_to_channels(shape):
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    tops = np.arange(1.0, 4.0)[:, None, None] * np.ones((3, 4, 4))
    low, high = np.zeros(shape), (np.arange(1.0, 4.0).reshape(shape) if np.prod(shape) == 3 else tops)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    estimator = smooth(network, (3, 4, 4), 2, optimizer=optimizer, clip_values=(low, high))
    x = np.stack([tops, tops / 2]).astype(np.float32)
    y = np.array([0, 1])
    beyond, inside = x.copy(), x.copy()
    beyond[1, 0, 0, 0] = inside[1, 1, 0, 0] = 1.5   # more than the first channel may be, less than the second may
    for act in (lambda z: estimator.certificates(z, n=100), lambda z: estimator.fit(z, y, nb_epochs=1)):
        act(x)
        act(inside)
        with pytest.raises(ValueError, match="x must lie within clip_values"):
            act(beyond)


def test_clip_values_of_the_last_axis_and_of_no_axis():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    last = smooth(network, (4, 4, 3), 2, channels_first=False, clip_values=(np.zeros(3), np.array([1.0, 2.0, 3.0])))
    x = np.broadcast_to(np.array([1.0, 2.0, 3.0], np.float32), (1, 4, 4, 3))
    assert last.certificates(x, n=100).n[0] == 100
    with pytest.raises(ValueError, match="x must lie within clip_values"):
        last.certificates(x[..., ::-1], n=100)
    for nonsense in ((5,), (2, 1, 1), (3, 4)):
        with pytest.raises(ValueError, match=r"clip_values must be .*\(3, 4, 4\)"):
            smooth(network, (3, 4, 4), 2, clip_values=(np.zeros(nonsense), np.ones(nonsense)))


def test_hopeless_budgets_are_announced():
    with pytest.warns(UserWarning, match="sample_size=8 votes can never reach alpha"):
        estimator = smooth(digits_network(), sample_size=8)
    with pytest.warns(UserWarning, match="n=9 draws can never certify"):
        assert estimator.certificates(X[:2], n=9).abstained.all()
    with pytest.warns(UserWarning, match="n=5 votes can never reach alpha"):
        assert smooth(digits_network()).predictions(X[:2], n=5).abstained.all()
    with pytest.warns(UserWarning, match="n=20 votes can never reach alpha=1e-06"):
        smooth(digits_network()).predictions(X[:2], n=20, alpha=1e-6)


def test_training_needs_an_optimizer():
    with pytest.raises(ValueError, match="optimizer is needed to train"):
        smooth(digits_network()).fit(X[:4], Y[:4], nb_epochs=1)
    with pytest.raises(ValueError, match="optimizer is needed to clone"):
        smooth(digits_network()).clone_for_refitting()


# ---------------------------------------------------------------------------------------------- modes and settings


def test_modes_return_as_they_were(trained):
    network = trained.model.base
    modes = [False, True, False, True, True, False]
    for part, mode in zip(network, modes, strict=True):
        part.training = mode
    trained.certificates(X[:1], n=100)
    trained.predict(X[:1])
    trained.loss_gradient(X[:1], Y[:1])
    trained.class_gradient(X[:1], 3)
    trained.compute_loss(X[:1], Y[:1])
    trained.get_activations(X[:1], 0)
    trained.fit(X[:4], Y[:4], nb_epochs=1)
    assert [part.training for part in network] == modes


# ---------------------------------------------------------------------------------------------- training


def normed() -> tuple[nn.Sequential, PyTorchSmoothedClassifier]:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    return network, smooth(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))


def test_training_mode_decides_over_batch_statistics():
    for training_mode in (True, False):
        network, estimator = normed()
        mean, weight = network[2].running_mean.clone(), network[1].weight.detach().clone()
        estimator.fit(X[:64], Y[:64], nb_epochs=1, training_mode=training_mode)
        assert not torch.equal(network[1].weight, weight)
        assert torch.equal(network[2].running_mean, mean) is not training_mode


def test_drop_last_leaves_out_the_short_batch():
    for drop_last, sizes in ((False, [32, 32, 6]), (True, [32, 32])):
        recorder, estimator = recording()
        estimator.fit(X[:70], Y[:70], nb_epochs=1, batch_size=32, drop_last=drop_last)
        assert [len(seen) for seen in recorder.seen] == sizes
        assert [epoch.inputs for epoch in estimator.history_] == [sum(sizes)]


def test_schedulers_step_once_an_epoch():
    def generator() -> NumpyDataGenerator:
        return NumpyDataGenerator(X[:64], np.eye(10, dtype=np.float32)[Y[:64]], batch_size=32)

    for train in (
        lambda e, **settings: e.fit(X[:64], Y[:64], batch_size=32, **settings),
        lambda e, **settings: e.fit_generator(generator(), **settings),
    ):
        _, estimator = normed()
        scheduler = torch.optim.lr_scheduler.StepLR(estimator.optimizer, step_size=1, gamma=0.5)
        train(estimator, nb_epochs=3, scheduler=scheduler)
        assert estimator.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
        assert len(estimator.history_) == 3


def test_generators_give_whole_epochs():
    one_hot = np.eye(10, dtype=np.float32)[Y[:70]]
    recorder, estimator = recording()
    estimator.fit_generator(NumpyDataGenerator(X[:70], one_hot, batch_size=16), nb_epochs=3)
    assert [len(seen) for seen in recorder.seen] == [16] * (70 // 16) * 3
    recorder, estimator = recording()
    data = torch.utils.data.TensorDataset(torch.from_numpy(X[:70]), torch.from_numpy(one_hot))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    estimator.fit_generator(PyTorchDataGenerator(loader, size=70, batch_size=16), nb_epochs=2)
    assert [len(seen) for seen in recorder.seen] == [16, 16, 16, 16, 6] * 2


@pytest.mark.parametrize("apply_fit", [False, True])
def test_defences_take_part_in_training_only_if_they_ask_for_it(apply_fit):
    squeeze = FeatureSqueezing(clip_values=(0, 1), bit_depth=1, apply_fit=apply_fit, apply_predict=True)
    recorder, estimator = recording(clip_values=(0, 1), preprocessing_defences=squeeze)

    def squeezed() -> bool:
        values, recorder.seen = torch.cat(recorder.seen), []
        return bool(((values == 0) | (values == 1)).all())

    estimator.fit(X[:64], Y[:64], nb_epochs=1)
    assert squeezed() is apply_fit
    estimator.predict(X[:4])
    assert squeezed()


# ---------------------------------------------------------------------------------------------- settings


def test_batch_norm_is_certified_in_eval_mode_even_after_training():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    estimator = smooth(network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
    estimator.fit(X[:64], Y[:64], nb_epochs=1)
    estimator.model.train()
    before = network[2].running_mean.clone()
    found = estimator.certificates(X[:3], n=200, seed=0)
    assert torch.equal(network[2].running_mean, before)
    assert network[2].training
    estimator.model.eval()
    assert np.array_equal(estimator.certificates(X[:3], n=200, seed=0).count, found.count)


def test_set_params_reach_what_depends_on_them(trained):
    estimator = trained
    estimator.set_params(scale=0.5, alpha=0.01, sample_size=200, performance=Performance(block=64), bank_samples=4)
    assert estimator.model.sigma == 0.5
    assert estimator.model.samples == 4
    found = estimator.certificates(X[:1], n=500, seed=0)
    assert (found.sigma[0], found.alpha[0], found.n0[0]) == (0.5, 0.01, 200)
    estimator.set_params(preprocessing=(0.5, 0.25))
    assert estimator.all_framework_preprocessing
    assert estimator.preprocessing_operations == []
    assert float(estimator.model.f.transform[0].std) == 0.25
    with pytest.raises(ValueError, match="Unexpected parameter"):
        estimator.set_params(sigma=1.0)


def state(estimator: PyTorchSmoothedClassifier) -> dict[str, object]:
    """All that `set_params` could have left behind."""
    found = {name: value for name, value in estimator.get_params().items() if name != "clip_values"}
    layers = () if estimator.model.f.transform is None else tuple(estimator.model.f.transform)
    return {
        **found,
        "clip_values": None if estimator.clip_values is None else tuple(np.asarray(estimator.clip_values).tolist()),
        "transform": [(type(layer), float(getattr(layer, "std", 0.0))) for layer in layers],
        "probabilities": estimator.model.probabilities,
        "device": estimator.device,
        "votes": estimator.predictions(X[:3], n=100, seed=0).votes.tolist(),
        "gradient": estimator.class_gradient(X[:1], 0).tolist(),
    }


def rich() -> PyTorchSmoothedClassifier:
    return smooth(
        digits_network(),
        clip_values=(0, 1),
        preprocessing=(0.4, 0.25),
        preprocessing_defences=FeatureSqueezing(clip_values=(0, 1), bit_depth=4),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": 0.5, "nb_classes": 7}, "model must return shape"),
        ({"scale": 0.5, "alpha": 2.0}, "alpha must lie"),
        ({"scale": 0.5, "postprocessing_defences": HighConfidence(cutoff=0.2)}, "postprocessing_defences"),
        ({"preprocessing": (0.0, 1.0), "preprocessing_defences": None, "nb_classes": 7}, "model must return shape"),
        ({"bank_samples": 4, "seed": -1}, "seed must lie"),
        ({"sample_size": 200, "clip_values": (1.0, 0.0)}, "clip_values"),
        ({"alpha": 0.01, "sigma": 1.0}, "Unexpected parameter"),
    ],
)
def test_set_params_changes_everything_or_nothing(changes, words):
    estimator = rich()
    before = state(estimator)
    with pytest.raises(ValueError, match=words):
        estimator.set_params(**changes)
    assert state(estimator) == before


def test_set_params_with_its_own_params_changes_nothing():
    estimator = rich()
    before, network = state(estimator), estimator.model.base
    estimator.set_params(**estimator.get_params())
    assert state(estimator) == before
    assert estimator.model.base is network
    with pytest.raises((ValueError, TypeError), match="construct a new estimator"):
        estimator.set_params(model=digits_network(seed=1))
    assert state(estimator) == before


def test_preprocessing_is_never_lost_on_the_way_to_another_estimator():
    network = digits_network()
    estimator = smooth(network, preprocessing=(0.4, 0.25))
    votes = estimator.predictions(X[:5], n=300, seed=0).votes
    assert not np.array_equal(smooth(network).predictions(X[:5], n=300, seed=0).votes, votes)
    with pytest.raises(ValueError, match=r"transform.*preprocessing"):
        smooth(estimator.model)
    with pytest.raises((ValueError, TypeError), match="wrap the estimator itself"):
        PyTorchSmoothedClassifier.from_classifier(estimator.attack_view())
    for twin in (
        smooth(estimator.model, preprocessing=(0.4, 0.25)),
        PyTorchSmoothedClassifier.from_classifier(estimator),
        PyTorchSmoothedClassifier(**estimator.get_params()),
    ):
        assert twin.model.base is network
        assert np.array_equal(twin.predictions(X[:5], n=300, seed=0).votes, votes)
    bare = smooth(smooth(network).model)   # nothing to lose
    assert bare.model.base is network


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (np.array(3.0), 0.5),
        (3.0, np.array(0.5)),
        (np.array([1.0, 2.0, 3.0]), 0.5),
        (0.5, np.array([1.0, 2.0, 4.0])),
        (np.array([1.0, 2.0, 3.0]), np.array(0.5)),
    ],
)
def test_mean_and_std_broadcast(mean, std):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    shaped = [torch.as_tensor(np.broadcast_to(part, 3).copy()).float().view(3, 1, 1) for part in (mean, std)]
    found = smooth(network, (3, 2, 2), 2, preprocessing=(mean, std)).model.f(x)
    assert torch.allclose(found, network((x - shaped[0]) / shaped[1]), atol=1e-6)


def test_a_clone_does_not_guess_parameter_groups():
    network = digits_network()
    groups = [{"params": network[0].parameters(), "lr": 0.1}, {"params": network[2:].parameters(), "lr": 0.01}]
    with pytest.raises(ValueError, match="parameter groups"):
        smooth(network, optimizer=torch.optim.SGD(groups, lr=0.1)).clone_for_refitting()


def test_params_and_clones_round_trip(trained):
    params = trained.get_params()
    assert (params["scale"], params["sample_size"], params["alpha"]) == (0.25, 100, 0.001)
    again = PyTorchSmoothedClassifier(**params)
    assert again.model.base is trained.model.base
    clone = trained.clone_for_refitting()
    assert clone.model.base is not trained.model.base
    assert (clone.scale, clone.sample_size, clone.device_type) == (0.25, 100, "cpu")
    assert type(clone.optimizer) is type(trained.optimizer)
    assert not torch.equal(clone.model.base[0].weight, trained.model.base[0].weight)
    clone.fit(X[:64], Y[:64], nb_epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        network = digits_network()
        patch.setattr(trained, "_optimizer", torch.optim.AdamW(network.parameters(), lr=0.5))
        assert trained.clone_for_refitting().optimizer.defaults["lr"] == 0.5


def test_copies_carry_everything_and_write_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("art.config.ART_DATA_PATH", str(tmp_path))
    reference = trained.certificates(X[:3], n=500, seed=2)
    for twin in (pickle.loads(pickle.dumps(trained)), copy.deepcopy(trained)):
        assert np.array_equal(twin.certificates(X[:3], n=500, seed=2).count, reference.count)
        assert np.array_equal(twin.class_gradient(X[:1]), trained.class_gradient(X[:1]))
        before = twin.model.base[0].weight.detach().clone()
        twin.fit(X[:64], Y[:64], nb_epochs=1)   # the optimiser holds the twin's parameters, not the original's
        assert not torch.equal(before, twin.model.base[0].weight)
    assert np.array_equal(trained.certificates(X[:3], n=500, seed=2).count, reference.count)
    assert list(tmp_path.iterdir()) == []


def test_save_writes_the_users_own_network(trained, tmp_path):
    trained.save("digits", str(tmp_path / "deep"))
    twin = digits_network(seed=9)
    twin.load_state_dict(torch.load(tmp_path / "deep" / "digits.model", weights_only=True))
    assert torch.equal(twin[0].weight, trained.model.base[0].weight)
    assert (tmp_path / "deep" / "digits.optimizer").exists()


def test_from_classifier_wraps_what_the_user_has(trained):
    network = trained.model.base
    plain = PyTorchClassifier(
        network,
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        10,
        clip_values=(0, 1),
        preprocessing=(0.1, 0.9),
        device_type="cpu",
    )
    estimator = PyTorchSmoothedClassifier.from_classifier(plain, scale=0.25, sample_size=100)
    assert estimator.model.base is network
    assert estimator.scale == 0.25
    assert float(estimator.model.f.transform[0].std) == pytest.approx(0.9)
    arts = PyTorchRandomizedSmoothing(
        network, nn.CrossEntropyLoss(), (1, 8, 8), 10, device_type="cpu", scale=0.3, alpha=0.01, sample_size=50
    )
    assert PyTorchSmoothedClassifier.from_classifier(arts).scale == 0.3
    assert PyTorchSmoothedClassifier.from_classifier(trained, scale=1.0).model.base is network
    assert trained.scale == 0.25
    with pytest.raises(TypeError, match="classifier must be an ART PyTorchClassifier"):
        PyTorchSmoothedClassifier.from_classifier(network)


# ---------------------------------------------------------------------------------------------- gradients and views


def test_gradients_are_those_of_the_smoothed_score(trained):
    x, y = X[TEST][:3], Y[TEST][:3]
    score = lambda z: trained.model.eval()(torch.from_numpy(z.astype(np.float32))).detach().double().numpy()   # noqa: E731
    step = 2e-3
    probe = np.zeros_like(x)
    probe[:, 0, 3, 4] = step
    slope = (score(x + probe) - score(x - probe)) / (2 * step)
    gradient = trained.class_gradient(x)
    assert gradient.shape == (3, 10, 1, 8, 8)
    assert np.allclose(gradient[:, :, 0, 3, 4], slope, atol=1e-2, rtol=2e-2)   # ReLUs have kinks
    assert np.allclose(trained.class_gradient(x, y)[:, 0], gradient[np.arange(3), y], atol=1e-6)
    assert np.allclose(trained.class_gradient(x, 4)[:, 0], gradient[:, 4], atol=1e-6)
    assert np.allclose(trained.class_gradient(x, y.tolist())[:, 0], gradient[np.arange(3), y], atol=1e-6)
    with pytest.raises(ValueError, match="label must be class indices"):
        trained.class_gradient(x, 10)
    losses = trained.compute_loss(x, y)
    assert np.allclose(losses, -np.log(np.exp(score(x))[np.arange(3), y]), atol=1e-4)
    assert trained.compute_loss(x, y, reduction="mean") == pytest.approx(losses.mean(), rel=1e-5)
    expected = np.stack([-trained.class_gradient(x[i : i + 1], int(y[i]))[0, 0] for i in range(3)]) / 3
    assert np.allclose(trained.loss_gradient(x, y), expected, atol=1e-4)   # the loss is averaged over the batch


def test_training_mode_takes_a_fresh_draw(trained):
    for ask in (
        lambda mode: trained.class_gradient(X[:2], 3, training_mode=mode),
        lambda mode: trained.loss_gradient(X[:2], Y[:2], training_mode=mode),
    ):
        assert np.array_equal(ask(False), ask(False))
        first, second = ask(True), ask(True)
        assert not np.allclose(first, second)
        assert not np.allclose(first, ask(False))


def test_probabilities_are_told_from_logits_by_more_than_one_input():
    ordinary = nn.Linear(4, 2)
    with torch.no_grad():
        ordinary.bias.copy_(torch.tensor([1.0, 0.0]))   # a probability vector, at the zero input
    assert not smooth(ordinary, (4,), 2).model.probabilities

    class OnTheSphere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x / x.norm(dim=1, keepdim=True)).softmax(dim=1)   # NaN at the zero input

    assert smooth(OnTheSphere(), (4,), 2).model.probabilities


def test_half_precision_networks_give_single_precision_scores(trained):
    x = X[TEST][:4]
    expected = trained.attack_view().predict(x)
    half = smooth(copy.deepcopy(trained.model.base).to(torch.bfloat16), clip_values=(0, 1))
    scores = half.attack_view().predict(x)
    assert scores.dtype == np.float32
    assert np.allclose(np.exp(scores), np.exp(expected), atol=0.05)
    assert np.allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-4)
    found = half.certificates(x, n=500, seed=0)
    assert np.array_equal(found.prediction, trained.certificates(x, n=500, seed=0).prediction)
    assert half.loss_gradient(x, Y[TEST][:4]).dtype == np.float32
    assert not half.model.probabilities


def test_a_view_is_of_the_moment_it_was_made(trained):
    x = X[TEST][:4]
    view = trained.attack_view()
    before = view.predict(x)
    trained.set_params(scale=1.0)
    assert view.model.sigma == 0.25
    assert np.array_equal(view.predict(x), before)
    assert trained.attack_view().model.sigma == 1.0
    assert not np.allclose(trained.attack_view().predict(x), before)


def test_sampling_false_is_the_bare_network(trained):
    x, y = X[TEST][:3], Y[TEST][:3]
    leaf = torch.from_numpy(x).requires_grad_()
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(trained.model.base(leaf), torch.from_numpy(y)), leaf)
    assert np.allclose(trained.loss_gradient(x, y, sampling=False), expected.numpy(), atol=1e-7)
    assert not np.allclose(trained.loss_gradient(x, y), expected.numpy(), atol=1e-3)


def test_attack_view_is_deterministic_soft_and_shares_the_network(trained):
    view = trained.attack_view(samples=16, seed=3)
    assert type(view) is PyTorchClassifier
    assert isinstance(view.model, SmoothedModule)
    assert view.model.base is trained.model.base
    x = X[TEST][:8]
    scores = view.predict(x)
    assert np.array_equal(scores, view.predict(x))
    assert np.allclose(scores, np.concatenate([view.predict(x[i : i + 1]) for i in range(8)]), atol=1e-5)
    assert np.all(scores < 0)
    assert np.allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-5)
    assert view.predict(x.astype(np.float64)).dtype == np.float32
    assert np.mean(scores.argmax(axis=1) == trained.predict(x, is_abstain=False).argmax(axis=1)) == 1.0
    assert not np.array_equal(scores, trained.attack_view(samples=16, seed=4).predict(x))


def test_activations_are_those_of_the_base(trained):
    x = X[TEST][:10]
    assert trained.layer_names == ["0", "1", "2", "3", "4", "5"]
    expected = trained.model.base[0](torch.from_numpy(x)).detach().numpy()
    for layer in (0, "0", -6):
        assert np.allclose(trained.get_activations(x, layer, batch_size=3), expected, atol=1e-6)
    assert not trained.model.base[0]._forward_hooks
    assert trained.get_activations(torch.from_numpy(x), 1, framework=True).requires_grad
    with pytest.raises(ValueError, match="layer must be one of"):
        trained.get_activations(x, "conv")


def test_arts_mixins_are_there(trained):
    families = (PyTorchRandomizedSmoothing, PyTorchClassifier, BaseEstimator, LossGradientsMixin, NeuralNetworkMixin)
    for family in families:
        assert isinstance(trained, family)
    assert trained.all_framework_preprocessing
    assert isinstance(trained.model, SmoothedModule)
    assert trained.input_shape == (1, 8, 8)
    assert trained.nb_classes == 10


def test_any_rule_may_decide(trained):
    found = trained.certificates(X[TEST][:5], n=500, seed=0, rule=OneSided(alpha=0.05))
    assert np.all(found.alpha == 0.05)
    assert np.all(found.radius >= trained.certificates(X[TEST][:5], n=500, seed=0).radius)


# ---------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_contract_on_a_gpu():
    network = digits_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    estimator = smooth(network, optimizer=optimizer, clip_values=(0, 1), device_type="gpu")
    estimator.fit(X[TRAIN], Y[TRAIN], nb_epochs=10, batch_size=64)
    assert estimator.device.type == "cuda"
    x = X[TEST][:20]
    whole = estimator.certificates(x, n=5_000, seed=1)
    assert np.array_equal(estimator.certificates(x, n=5_000, seed=1, batch_size=3).count, whole.count)
    assert np.mean(whole.prediction == Y[TEST][:20]) > 0.8
    assert estimator.predict(x).shape == (20, 10)
    assert estimator.class_gradient(x[:2]).shape == (2, 10, 1, 8, 8)
    tensor = torch.from_numpy(x[:2]).cuda()
    assert estimator.loss_gradient(tensor, torch.from_numpy(np.eye(10, dtype=np.float32)[Y[:2]]).cuda()).is_cuda
    twin = pickle.loads(pickle.dumps(estimator))
    assert np.array_equal(twin.certificates(x, n=5_000, seed=1).count, whole.count)
    exact = linear(device_type="gpu")
    points = np.stack([np.linspace(0.25, 1.5, 60), np.zeros(60)], axis=1).astype(np.float32)
    radii = exact.certificates(points, n=10_000, seed=0).radius
    assert np.sum(radii > points[:, 0]) <= binom.isf(1e-6, 60, 0.001)


def test_no_warning_at_construction():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smooth(digits_network())

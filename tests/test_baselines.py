"""ART's own smoothing classifiers in the benchmark: labelled, and in agreement with ours where they should be."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from closed_forms import FALSE_ALARM
from scipy.stats import hypergeom
from support import TEST, TRAIN, X, Y, digits_network, smooth
from torch import nn

from art_rs_plugins import Certificates, GridGaussian, OneSided, TwoSided
from art_rs_plugins.benchmark.baselines import TRAINED_BY_ART, ArtSmoothing
from art_rs_plugins.benchmark.config import RunConfig, TrainConfig
from art_rs_plugins.benchmark.evasion import global_seeds
from art_rs_plugins.benchmark.methods import METHODS, open_estimator
from art_rs_plugins.benchmark.runs import certify
from art_rs_plugins.benchmark.tables import record_labels
from art_rs_plugins.benchmark.training import train
from art_rs_plugins.smoothing.noise import derive_seed
from art_rs_plugins.theory.radii import gaussian_radius

N = 500


@pytest.fixture(scope="module")
def network() -> nn.Module:
    made = digits_network()
    estimator = smooth(made, optimizer=torch.optim.Adam(made.parameters(), lr=2e-3), clip_values=(0, 1))
    estimator.fit(X[TRAIN], Y[TRAIN], nb_epochs=10, batch_size=64)
    return made


def theirs(network: nn.Module, **settings) -> ArtSmoothing:
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", **settings}
    return ArtSmoothing(network, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), **settings)


def disagreement(ours: Certificates, other: Certificates) -> float:
    """Least p-value, over the inputs of one class, of counts from one probability (Fisher's exact test)."""
    same = ours.prediction == other.prediction
    first, second, n = ours.count[same], other.count[same], ours.n[same]
    law = hypergeom(n + other.n[same], first + second, n)
    return float(np.minimum(1.0, 2 * np.minimum(law.cdf(first), law.sf(first - 1))).min() * same.sum())


def test_radii_of_art_and_ours_agree_within_monte_carlo_error(network: nn.Module) -> None:
    x = X[TEST][:200]
    ours = smooth(network).certificates(x, n=N, seed=3)
    art = theirs(network).certificates(x, n=N, seed=4)
    assert np.mean(ours.prediction == art.prediction) > 0.95   # the rest are guesses where no class leads
    assert not np.any((ours.prediction != art.prediction) & ~ours.abstained & ~art.abstained)
    assert disagreement(ours, art) > FALSE_ALARM
    for sigma in (0.18, 0.35):   # what the same test says of another noise level
        assert disagreement(smooth(network, scale=sigma).certificates(x, n=N, seed=3), art) < FALSE_ALARM
    expected = gaussian_radius(1.0 - art.p_lower, 1.0 - art.p_lower, art.sigma)
    assert np.allclose(art.radius[~art.abstained], expected[~art.abstained], atol=1e-9)
    assert np.array_equal(art.abstained, art.p_lower < 0.5)


def test_it_is_arts_own_certify(network: nn.Module) -> None:
    """The same seeds of the global generator give ART's radii to the bit, and leave the generators as they were."""
    x = X[TEST][:5]
    found = theirs(network).certificates(x, n=N, seed=7, indices=[3, 1, 4, 15, 9])
    again = theirs(network).certificates(x[2:4], n=N, seed=7, indices=[4, 15])
    assert np.array_equal(found.radius[2:4], again.radius)
    assert np.all(found.passes == N + 100)
    direct = PyTorchRandomizedSmoothing(
        network, nn.CrossEntropyLoss(), (1, 8, 8), 10, device_type="cpu", sample_size=100, scale=0.25
    )
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()   # noqa: NPY002
    with global_seeds(derive_seed(7, 3)):
        label, radius = direct.certify(x[:1], n=N)
    after = np.random.get_state()[1], random.getstate(), torch.get_rng_state()   # noqa: NPY002
    assert radius[0] == found.radius[0]
    assert label[0] == (-1 if found.abstained[0] else found.prediction[0])
    assert np.array_equal(before[0], after[0])
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])


def test_it_has_a_rule_of_its_own(network: nn.Module) -> None:
    estimator = theirs(network)
    estimator.certificates(X[:1], n=100, rule=OneSided(estimator.alpha))
    for settings in ({"rule": TwoSided(0.001)}, {"radii": [0.25]}, {"tolerance": 0.1}):
        with pytest.raises(ValueError, match="a rule of its own"):
            estimator.certificates(X[:1], n=1000, **settings)


@pytest.mark.parametrize("method", sorted(TRAINED_BY_ART))
def test_training_by_art_is_repeated_by_its_seed(method: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    eps = 0.1 if method == "art-smoothadv" else 0.0
    config = TrainConfig(method=method, epochs=6, draws=2, steps=1, eps=eps)
    train(config, one)
    train(config, two)
    data, estimator = open_estimator(RunConfig(weights=str(one), method="art"))
    other = open_estimator(RunConfig(weights=str(two), method="art"))[1]
    assert isinstance(estimator, METHODS["art"])
    found = estimator.certificates(data.x_test[:20], n=100, seed=0)
    assert np.array_equal(found.count, other.certificates(data.x_test[:20], n=100, seed=0).count)
    assert np.mean(found.prediction == data.y_test[:20]) > 0.3   # of ten classes, after a few epochs
    with pytest.raises(ValueError, match="have no place in art"):
        train(TrainConfig(method=method, eps=eps, defences=("cutout",)), tmp_path / "no.safetensors")


def test_what_is_no_valid_vote_counts_for_no_class() -> None:
    class Ties(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10)   # ART's argmax is class 0, and would be certified

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wrong = torch.full((len(x), 10), float("nan"))
            right = nn.functional.one_hot(torch.full((len(x),), 3), 10).float()
            return torch.where((x.mean(dim=(1, 2, 3)) > 0.5)[:, None], wrong, right)   # NaN for half of the draws

    for network in (Ties(), Broken()):
        found = theirs(network).certificates(np.full((2, 1, 8, 8), 0.5, np.float32), n=N, seed=0)
        assert found.abstained.all()
        assert not found.radius.any()
    with pytest.raises(ValueError, match="noise must be Gaussian"):
        theirs(Ties(), noise=GridGaussian).certificates(np.zeros((1, 1, 8, 8), np.float32), n=N)


def test_rows_of_art_say_so(tmp_path: Path) -> None:
    settings = {"model": "support:digits_network", "examples": ":3", "n": 100, "n0": 20}
    ours = certify(RunConfig(**settings), tmp_path / "ours.tsv")
    art = certify(RunConfig(**settings, method="art"), tmp_path / "theirs.tsv")
    assert record_labels([ours, art]) == ["ours", "theirs (ART)"]

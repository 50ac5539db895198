"""The exact mode through the estimator: certificates, predictions and attacks on inputs of 8 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom
from support import TEST, TRAIN, X, Y, digits_network, smooth
from torch import nn

from art_rs_plugins import Gaussian, GridGaussian, Sequential, audit
from art_rs_plugins.benchmark.attacks import ATTACKS, run_attack

EIGHT_BITS = (np.round(X[TEST] * 255) / 255).astype(np.float32)


@pytest.fixture(scope="module")
def trained():
    network = digits_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    estimator = smooth(network, optimizer=optimizer, clip_values=(0, 1), noise=GridGaussian, bank_samples=8)
    estimator.fit(X[TRAIN], Y[TRAIN], nb_epochs=15, batch_size=64)
    return estimator


def test_certificates_are_exact_and_as_large_as_the_others(trained):
    x = EIGHT_BITS[:60]
    exact = trained.certificates(x, n=2_000, seed=0)
    assert exact.kind == "exact"
    plain = smooth(trained.model.base, clip_values=(0, 1)).certificates(x, n=2_000, seed=0)
    assert plain.kind == "certified"
    spread = np.sqrt(plain.count * (1 - plain.count / 2_000) * 2) + 1
    assert np.all(np.abs(exact.count - plain.count) < 7 * spread)
    assert abs(exact.radius.mean() - plain.radius.mean()) < 0.02
    batched = trained.certificates(x, n=2_000, seed=0, batch_size=7)
    assert np.array_equal(batched.count, exact.count)


def test_the_linear_truth_is_kept():
    network = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    estimator = smooth(network, (2,), 2, scale=0.2, noise=GridGaussian)
    k = np.stack([np.arange(140, 240, 2), np.full(50, 100)], axis=1)
    x = (k / 255).astype(np.float32)
    truth = (k[:, 0] - k[:, 1]) / 255 / np.sqrt(2)
    found = estimator.certificates(x, n=20_000, seed=1)
    assert np.sum(found.radius > truth) <= binom.isf(1e-6, len(x), 0.001)
    near = truth < 0.5
    assert np.median(found.radius[near] / truth[near]) > 0.9


def test_inputs_off_the_grid_are_refused_where_a_promise_is_made_and_rounded_where_attacks_ask(trained):
    off = EIGHT_BITS[:3] * np.float32(0.999)
    for ask in (trained.certificates, trained.predictions):
        with pytest.raises(ValueError, match=r"x must lie on the grid k / 255.*round inputs to 8 bits"):
            ask(off, n=100)
    near = EIGHT_BITS[:3] + np.float32(1e-3)
    inside = np.clip(near, 0, 1)
    assert np.array_equal(
        trained.predict(inside, seed=5), trained.predict(np.round(inside * 255).astype(np.float32) / 255, seed=5)
    )


def test_attacks_stay_on_the_grid_and_in_their_budget(trained):
    x, y = EIGHT_BITS[:30], Y[TEST][:30]
    certificates = trained.certificates(x, n=2_000, seed=0)
    for name in ("pgd", "smoothed-pgd"):
        outcomes = run_attack(
            ATTACKS[name], trained, x, y, budgets=(0.5, 1.5), certificates=certificates, steps=8, n=200, seed=1
        )
        assert np.all(outcomes.distance <= outcomes.budgets[:, None])
        result = audit(certificates, outcomes, y)
        assert result.contradictions == ()
        assert result.wrong[1] > 0.5


def test_sequential_rules_serve_it(trained):
    found = trained.certificates(EIGHT_BITS[:20], rule=Sequential((0.25, 0.5)), n=20_000, seed=0)
    assert found.kind == "exact"
    assert set(found.radius) <= {0.0, 0.25, 0.5}
    assert found.n.mean() < 10_000


def test_noise_is_a_setting_like_the_others(trained):
    assert type(trained)(**trained.get_params()).noise is GridGaussian
    assert trained.clone_for_refitting().noise is GridGaussian
    with pytest.raises(TypeError, match="noise must be the class Gaussian or GridGaussian"):
        smooth(digits_network(), noise=Gaussian(0.5))
    with pytest.raises(TypeError, match="noise must be the class"):
        smooth(digits_network(), noise="grid")


def test_toward_never_moves_away():
    noise = GridGaussian(0.5)
    rng = np.random.default_rng(0)
    origin = torch.from_numpy((rng.integers(0, 256, 2_000) / 255).astype(np.float32))
    moved = (origin + torch.from_numpy(rng.normal(0, 0.1, 2_000).astype(np.float32))).clamp(0, 1)
    found = noise.nearest(moved, toward=origin)
    noise.check(found)
    assert torch.all((found - origin).abs() <= (moved - origin).abs() + 1e-6)
    assert torch.all((found - moved).abs() <= 1 / 255 + 1e-6)

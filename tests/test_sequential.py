"""Sequential and planned certificates with the real code: level, savings, and the same bits however work is grouped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_forms import Linear
from scipy.special import ndtr
from scipy.stats import binom
from support import TEST, TRAIN, X, Y, digits_network, smooth

from art_rs_plugins import Gaussian, OneSided, Planned, Sequential, certify, count_votes
from art_rs_plugins.smoothing.noise import Stage
from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.rules import Decision

SIGMA = 0.5


def points(distances: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([distances, np.zeros_like(distances)], axis=1)).float()


def run(distances: np.ndarray, rule, *, n: int = 20_000, seed: int = 0, **settings):
    settings = {"num_classes": 2, "n": n, "n0": 100, "rule": rule, "seed": seed, **settings}
    return certify(Linear([1.0, 0.0]), points(distances), Gaussian(SIGMA), **settings)


@pytest.fixture(scope="module")
def trained():
    network = digits_network()
    estimator = smooth(network, optimizer=torch.optim.Adam(network.parameters(), lr=2e-3), clip_values=(0, 1))
    estimator.fit(X[TRAIN], Y[TRAIN], nb_epochs=15, batch_size=64)
    return estimator


def test_radii_far_from_the_truth_are_decided_with_few_draws():
    found = run(np.array([0.3, 0.7, 1.0, 1.6]), Sequential((0.5,)))
    assert found.abstained.tolist() == [True, False, False, False]
    assert found.radius.tolist() == [0.0, 0.5, 0.5, 0.5]
    assert np.all(found.n <= 1_500)
    assert np.all(found.n % 100 == 0)
    assert np.array_equal(found.holds_at(0.5), [False, True, True, True])


def test_a_table_reports_the_largest_radius_that_holds():
    radii = (0.0, 0.25, 0.5, 0.75, 1.0)
    distances = np.array([0.1, 0.4, 0.65, 0.9, 1.3])
    found = run(distances, Sequential(radii), n=100_000)
    assert found.radius.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert not found.abstained.any()
    assert np.all(found.radius <= distances)


def test_stopped_counts_are_prefixes_of_the_whole_experiment():
    distances = np.array([0.45, 0.52, 0.6])
    found = run(distances, Sequential((0.5,)), seed=4)
    for row, n in enumerate(found.n.tolist()):
        votes = count_votes(
            Linear([1.0, 0.0]),
            points(distances)[row : row + 1],
            Gaussian(SIGMA),
            n,
            num_classes=2,
            seed=4,
            indices=[row],
            stage=Stage.ESTIMATION,
        )
        assert int(votes[0, found.prediction[row]]) == found.count[row]


@pytest.mark.parametrize("rule", [Sequential((0.25, 0.5, 0.75)), Planned(0.02)], ids=["sequential", "planned"])
def test_bits_do_not_depend_on_grouping_or_block(rule):
    distances = np.linspace(0.1, 1.2, 9)
    whole = run(distances, rule, seed=9)
    order = np.array([4, 0, 8, 2, 6, 1, 3, 7, 5])
    for parts in (
        [run(distances[i : i + 1], rule, seed=9, indices=[i]) for i in range(9)],
        [run(distances[order], rule, seed=9, indices=order)[np.argsort(order).tolist()]],
        [run(distances, rule, seed=9, block=100)],
        [run(distances, rule, seed=9, block=400)],
    ):
        for name in ("prediction", "radius", "count", "n", "runner_up_count"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(whole, name)), name


def test_one_sigma_for_each_input():
    distances = np.array([0.6, 0.6, 0.6])
    x, sigma = points(distances), np.array([0.25, 0.5, 1.0])
    together = certify(
        Linear([1.0, 0.0]), x, Gaussian(sigma), num_classes=2, n=20_000, rule=Sequential((0.4, 0.7)), seed=1
    )
    for row in range(3):
        alone = certify(
            Linear([1.0, 0.0]),
            x[row : row + 1],
            Gaussian(sigma[row]),
            num_classes=2,
            n=20_000,
            rule=Sequential((0.4, 0.7)),
            seed=1,
            indices=[row],
        )
        assert (together.radius[row], together.n[row]) == (alone.radius[0], alone.n[0])
    assert np.all(together.radius == 0.4)


class Peeking:
    """The mistake: a fixed-sample bound, looked at again and again until it pleases."""

    alpha = 0.01

    def __init__(self, radius: float) -> None:
        self.radius = radius

    def run(self, selection, n0, sample, n, sigma) -> Decision:
        rows = np.arange(len(selection))
        guess = selection.argmax(axis=1)
        passed = np.zeros(len(rows), dtype=bool)
        votes = np.zeros_like(selection)
        for look in range(0, n, 100):
            votes += sample(rows, look, look + 100)
            passed |= clopper_pearson_lower(votes[rows, guess], look + 100, self.alpha) > ndtr(self.radius / sigma)
        found = OneSided(self.alpha).decide(selection, votes, n)
        return Decision(
            found.prediction,
            ~passed,
            found.failure,
            found.p_lower,
            found.p_upper,
            found.count,
            found.runner_up_count,
            found.n,
            np.where(passed, self.radius, 0.0),
        )


@pytest.mark.slow
def test_the_promise_holds_where_it_is_hardest_and_peeking_breaks_it():
    """The true radius is just below the one asked for: any certificate is false."""
    trials, radius = 3_000, 0.5
    distances = np.full(trials, radius - 1e-6)
    limit = binom.isf(1e-6, trials, 0.01)
    honest = run(distances, Sequential((radius,), alpha=0.01), n=4_000, seed=11)
    table = run(distances, Sequential((0.25, radius, 0.75), alpha=0.01), n=4_000, seed=12)
    planned = run(distances, Planned(0.05, alpha=0.01), n=4_000, seed=13)
    naive = run(distances, Peeking(radius), n=4_000, seed=14)
    for found in (honest, table, planned):
        assert np.sum(found.radius >= radius) <= limit
    assert np.sum(honest.radius >= radius) >= binom.ppf(1e-6, trials, 0.005)   # it spends what it may
    assert np.sum(naive.radius >= radius) > limit


def test_planned_certificates_take_fewer_draws_for_nearly_the_radius():
    distances = np.array([0.02, 0.2, 0.5, 1.0, 3.0])
    whole = run(distances, OneSided(), n=100_000)
    found = run(distances, Planned(0.02), n=100_000)
    assert found.n.mean() < 0.6 * 100_000
    assert np.all(found.radius >= whole.radius - 0.1)   # the tolerance is an expectation
    assert np.all(found.radius <= distances)


# ---------------------------------------------------------------------------------------------- the estimator


def test_estimator_takes_radii_and_tolerance(trained):
    x = X[TEST][:30]
    fixed = trained.certificates(x, n=20_000, seed=0)
    one = trained.certificates(x, radii=[0.4], n=20_000, seed=0)
    assert set(one.radius) <= {0.0, 0.4}
    assert np.mean(one.holds_at(0.4) != fixed.holds_at(0.4)) <= 0.1
    assert one.n.mean() < 6_000
    planned = trained.certificates(x, tolerance=0.02, n=20_000, seed=0)
    assert np.all(planned.n0 == 500)
    assert planned.n.mean() < 20_000
    labels, radii = trained.certify(x, radii=[0.4], n=20_000)
    assert set(radii) <= {0.0, 0.4}
    assert np.array_equal(labels == -1, radii == 0.0)
    batched = trained.certificates(x, radii=[0.4], n=20_000, seed=0, batch_size=7)
    assert np.array_equal(batched.n, one.n)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tolerance": 0.0}, "tolerance must be finite and > 0"),
        ({"tolerance": -0.1}, "tolerance must be finite and > 0"),
        ({"tolerance": float("nan")}, "tolerance must be finite and > 0"),
        ({"radii": [0.5, 0.25]}, "radii must be strictly increasing"),
        ({"radii": [0.5, 0.5]}, "radii must be strictly increasing"),
        ({"radii": [-0.5, 0.5]}, "radii must be finite and >= 0"),
        ({"radii": [float("nan")]}, "radii must be finite and >= 0"),
        ({"radii": []}, "radii must be finite and >= 0"),
        ({"radii": [0.5], "n": 50}, "n_max must be at least the first look"),
        ({"tolerance": 0.1, "n": 50}, "n_max must be at least the first look"),
        ({"radii": [0.5], "tolerance": 0.1}, "give one of them"),
        ({"radii": [0.5], "rule": OneSided()}, "give one of them"),
    ],
)
def test_bad_plans_are_named(trained, settings, words):
    with pytest.raises(ValueError, match=words):
        trained.certificates(X[:2], **settings)


def test_radii_beyond_float64_abstain():
    found = run(np.array([3.0]), Sequential((0.5, 10.0)), n=1_000)
    assert found.radius.tolist() == [0.5]
    assert run(np.array([3.0]), Sequential((10.0,)), n=1_000).abstained.all()

"""Metrics against brute force and against other implementations."""

import numpy as np
import pytest
from closed_forms import certificates
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from statsmodels.stats.proportion import proportion_confint

from art_rs_plugins.theory.metrics import (
    abstention_rate,
    accuracy_curve,
    average_certified_radius,
    certified_accuracy,
    certified_correct,
    false_certificates_bound,
    natural_accuracy,
    p_lower_distribution,
)

rows = st.lists(
    st.tuples(st.sampled_from([np.nan, 0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(0, 2), st.integers(0, 2)),
    min_size=1, max_size=30,
)   # fmt: skip


@given(rows, st.sampled_from([0.5, 0.95, 0.999]))
def test_curve_by_brute_force(table: list[tuple[float, int, int]], confidence: float) -> None:
    radius, prediction, labels = (np.array(column) for column in zip(*table, strict=True))
    grid = [0.0, 0.1, 0.25, 0.5, 1.0, 1.5]
    curve = certified_accuracy(certificates(radius, prediction), labels, grid, confidence=confidence)
    for i, r in enumerate(grid):
        hits = sum(1 for reach, p, y in table if p == y and reach >= r)   # NaN >= r is false: an abstention is wrong
        assert curve.accuracy[i] == hits / len(table)
        low, high = proportion_confint(hits, len(table), alpha=1 - confidence, method="beta")
        assert curve.lower[i] == pytest.approx(low, abs=1e-8)
        assert curve.upper[i] == pytest.approx(high, abs=1e-8)
    assert (curve.total, curve.confidence) == (len(table), confidence)
    assert curve.radii.tolist() == grid
    assert np.all(np.diff(curve.accuracy) <= 0)


@given(rows)
def test_averages_by_brute_force(table: list[tuple[float, int, int]]) -> None:
    radius, prediction, labels = (np.array(column) for column in zip(*table, strict=True))
    some = certificates(radius, prediction)
    expected = sum(r for r, p, y in table if p == y and r == r) / len(table)
    assert average_certified_radius(certified_correct(some, labels), some.radius) == pytest.approx(expected)
    assert natural_accuracy(prediction, some.abstained, labels) == pytest.approx(
        np.mean([p == y and r == r for r, p, y in table])
    )
    assert abstention_rate(some.abstained) == pytest.approx(np.mean([r != r for r, _, _ in table]))


def test_distribution_by_brute_force() -> None:
    bounds = np.array([0.9, 0.8, 0.3, 0.99])
    some = certificates([0.1] * 4, prediction=[0, 1, 0, 2], p_lower=bounds)
    labels, grid = np.array([0, 1, 1, 2]), np.array([0.0, 0.5, 0.8, 0.95, 1.0])
    result = p_lower_distribution(some, labels, grid, confidence=0.9)
    true_class = np.array([0.9, 0.8, 0.0, 0.99])   # the third is of another class
    assert result.fraction.tolist() == [np.mean(true_class <= v) for v in grid] == [0.25, 0.25, 0.5, 0.75, 1.0]
    half = np.sqrt(np.log(2 / 0.1) / (2 * 4))
    assert result.lower == pytest.approx(np.clip(result.fraction - half, 0, 1))
    assert result.upper == pytest.approx(np.clip(result.fraction + half, 0, 1))


def test_distribution_band_covers_the_truth_simultaneously() -> None:
    rng, grid, misses, total = np.random.default_rng(0), np.linspace(0, 1, 101), 0, 1000
    for _ in range(total):
        sample = rng.random(50)
        some = certificates(np.zeros(50), p_lower=sample)
        band = p_lower_distribution(some, np.zeros(50, int), grid, confidence=0.9)
        misses += bool(np.any((band.lower > grid) | (band.upper < grid)))
    assert misses <= binom.isf(1e-6, total, 0.1)
    assert misses > 10   # a band that never misses would say nothing


@given(st.integers(1, 5000), st.sampled_from([1e-4, 0.001, 0.01, 0.3]), st.sampled_from([1e-6, 0.001, 0.05]))
def test_false_certificates_bound_is_the_exact_quantile(m: int, alpha: float, rho: float) -> None:
    q = false_certificates_bound(m, alpha, rho=rho)
    assert binom.sf(q, m, alpha) <= rho
    assert q == 0 or binom.sf(q - 1, m, alpha) > rho


def test_false_certificates_bound_golden_values() -> None:
    assert false_certificates_bound(500, 0.001, rho=0.001) == 4
    assert false_certificates_bound(10_000, 0.001, rho=0.001) == 21
    with pytest.raises(ValueError, match="m must be at least 1"):
        false_certificates_bound(0, 0.001)
    with pytest.raises(ValueError, match="alpha must lie"):
        false_certificates_bound(5, 1.0)
    with pytest.raises(ValueError, match="rho must lie"):
        false_certificates_bound(5, 0.1, rho=0.0)


def test_only_theorems_count() -> None:
    for kind in ("conditional", "committed"):
        some = certificates([0.5], kind=kind)
        for call in (lambda c=some: certified_correct(c, [0]), lambda c=some: certified_accuracy(c, [0], [0.1])):
            with pytest.raises(ValueError, match=kind):
                call()
    for kind in ("certified", "exact"):
        assert certified_correct(certificates([0.5], kind=kind), [0]).all()


def test_bad_input_is_named() -> None:
    some = certificates([0.5, 0.25])
    for labels in ([0], [[0, 1]], 0, np.eye(2, dtype=int)):
        with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
            certified_accuracy(some, labels, [0.1])
    for labels in ([0.0, 1.0], [True, False], ["0", "1"]):
        with pytest.raises(TypeError, match="labels must be integers"):
            certified_accuracy(some, labels, [0.1])
    for radii in ([-0.1], [np.nan], [np.inf]):
        with pytest.raises(ValueError, match="radii must be finite and >= 0"):
            certified_accuracy(some, [0, 0], radii)
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(ValueError, match="confidence must lie"):
            certified_accuracy(some, [0, 0], [0.1], confidence=confidence)
    with pytest.raises(ValueError, match="at least one input"):
        accuracy_curve(np.zeros(0, bool), np.zeros(0), [0.1])

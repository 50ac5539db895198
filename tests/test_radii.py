"""Radii: the inverse of the probability, never above the exact value, never from nonsense."""

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from art_rs_plugins.theory.radii import check_sigma, gaussian_probability, gaussian_radius

failures = st.one_of(st.floats(1e-30, 0.5), st.floats(-30, -0.31).map(lambda e: 10.0**e))
sigmas = st.sampled_from([0.12, 0.25, 0.5, 1.0, 3.7])


def exact_quantile(p: float) -> mp.mpf:
    """Phi^-1(p), for p taken as the exact value of its float."""
    with mp.workdps(60):
        return mp.sqrt(2) * mp.erfinv(2 * mp.mpf(p) - 1)


def exact_radius(failure: float, p_upper: float, sigma: float) -> mp.mpf:
    with mp.workdps(60):
        return mp.mpf(sigma) / 2 * -(exact_quantile(failure) + exact_quantile(p_upper))


@given(failures, sigmas)
def test_one_sided_radius_is_rounded_toward_zero(failure: float, sigma: float) -> None:
    radius, exact = float(gaussian_radius(failure, failure, sigma)), exact_radius(failure, failure, sigma)
    assert radius <= exact
    assert radius >= exact * (1 - mp.mpf(3e-12))


@given(failures, st.floats(-14, -0.5), sigmas)
def test_two_sided_radius_is_rounded_toward_zero_where_it_cancels(failure: float, gap: float, sigma: float) -> None:
    p_upper = (1.0 - failure) - 10.0**gap * failure
    radius, exact = float(gaussian_radius(failure, p_upper, sigma)), exact_radius(failure, p_upper, sigma)
    assert radius == 0.0 or radius <= exact
    assert radius >= exact - 1e-11 * sigma


@given(st.floats(1e-3, 7.0), sigmas)
def test_radius_and_probability_are_inverse(ratio: float, sigma: float) -> None:
    probability = float(gaussian_probability(ratio * sigma, sigma))
    assert probability == pytest.approx(norm.cdf(ratio), rel=1e-14)
    # near p = 1 the probability itself has no more digits than this
    assert float(gaussian_radius(norm.sf(ratio), norm.sf(ratio), sigma)) == pytest.approx(ratio * sigma, rel=1e-11)
    if ratio < 5:
        assert float(gaussian_radius(1 - probability, 1 - probability, sigma)) == pytest.approx(ratio * sigma, rel=1e-8)


@given(failures, failures, sigmas)
def test_the_two_bounds_play_equal_parts_and_scale_with_sigma(failure: float, p_upper: float, sigma: float) -> None:
    assert gaussian_radius(failure, p_upper, sigma) == gaussian_radius(p_upper, failure, sigma)
    assert float(gaussian_radius(failure, p_upper, 2 * sigma)) == 2 * float(gaussian_radius(failure, p_upper, sigma))
    low, high = sorted((failure, p_upper))
    assert gaussian_radius(low, p_upper, sigma) >= gaussian_radius(high, p_upper, sigma)


def test_a_rival_that_is_known_to_be_weak_buys_radius() -> None:
    assert float(gaussian_radius(0.4, 0.1, 1.0)) == pytest.approx((norm.ppf(0.6) - norm.ppf(0.1)) / 2, rel=1e-11)
    assert float(gaussian_radius(0.6, 0.2, 1.0)) == pytest.approx((norm.ppf(0.4) - norm.ppf(0.2)) / 2, rel=1e-11)


def test_what_proves_nothing_has_radius_zero() -> None:
    failure = np.array([0.5, 0.6, 1.0, np.nan, 0.1, 0.4, -0.1, 1.1, 0.0, np.inf])
    p_upper = np.array([0.5, 0.6, 1.0, 0.1, np.nan, 0.7, 0.1, 0.1, 0.1, 0.1])
    radius = gaussian_radius(failure, p_upper, 1.0)
    assert radius.tolist() == [0.0] * len(failure)


def test_broadcasts_over_inputs_with_a_sigma_each() -> None:
    radius = gaussian_radius(np.array([0.1, 0.2]), np.array([0.1, 0.2]), np.array([0.5, 2.0]))
    assert radius.tolist() == pytest.approx([-0.5 * norm.ppf(0.1), -2.0 * norm.ppf(0.2)], rel=1e-11)


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf, [0.5, 0.0], []])
def test_bad_sigma_is_refused(sigma) -> None:
    for call in (check_sigma, lambda s: gaussian_radius(0.1, 0.1, s), lambda s: gaussian_probability(1.0, s)):
        with pytest.raises(ValueError, match="sigma must be finite and > 0"):
            call(sigma)


@pytest.mark.parametrize("radius", [-0.1, np.nan, np.inf])
def test_bad_radius_is_refused(radius: float) -> None:
    with pytest.raises(ValueError, match="radius must be finite and >= 0"):
        gaussian_probability(radius, 1.0)

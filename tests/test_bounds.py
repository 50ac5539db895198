"""Clopper-Pearson and the top-two test: against other implementations, exact tails, and exact coverage."""

import itertools

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom, binomtest, norm
from statsmodels.stats.proportion import proportion_confint

from art_rs_plugins.theory.bounds import check_alpha, clopper_pearson_lower, clopper_pearson_upper, top_two_p_value

counted = st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
alphas = st.sampled_from([1e-9, 1e-4, 0.001, 0.01, 0.05, 0.3, 0.5, 0.9])


def exact_tail(k: int, n: int, p: float, *, above: bool) -> mp.mpf:
    """P(Bin(n, p) >= k) or P(Bin(n, p) <= k) to 40 digits, by a sum of few terms or by the integral of the beta law."""
    with mp.workdps(40):
        p = mp.mpf(p)

        def mass(terms: range) -> mp.mpf:
            return mp.fsum(mp.binomial(n, i) * p**i * (1 - p) ** (n - i) for i in terms)

        terms, rest = (range(k, n + 1), range(k)) if above else (range(k + 1), range(k + 1, n + 1))
        if min(len(terms), len(rest)) <= 40:
            return mass(terms) if len(terms) <= 40 else 1 - mass(rest)
        a, b = (k, n - k + 1) if above else (k + 1, n - k)
        scale = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
        width = mp.sqrt(mp.mpf(a) * b / mp.mpf(a + b) ** 3)

        def density(t: mp.mpf) -> mp.mpf:
            return mp.exp((a - 1) * mp.log(t) + (b - 1) * mp.log1p(-t) - scale)

        steps = [p + (-1 if above else 1) * width * j for j in (0, 1, 2, 3, 4, 6, 8, 12, 20)]
        steps = [min(max(s, mp.mpf(0)), mp.mpf(1)) for s in steps]
        return abs(mp.quad(density, steps))


@given(counted, alphas)
def test_agrees_with_scipy_and_statsmodels(pair: tuple[int, int], alpha: float) -> None:
    k, n = pair
    lower, upper = float(clopper_pearson_lower(k, n, alpha)), float(clopper_pearson_upper(k, n, alpha))
    assert lower == pytest.approx(beta.ppf(alpha, k, n - k + 1) if k else 0.0, rel=3e-8, abs=1e-300)
    assert upper == pytest.approx(beta.isf(alpha, k + 1, n - k) if k < n else 1.0, rel=3e-8)
    if alpha < 0.5:
        low, high = proportion_confint(k, n, alpha=2 * alpha, method="beta")
        assert (lower, upper) == (pytest.approx(low, rel=3e-8, abs=1e-300), pytest.approx(high, rel=3e-8))


@given(counted, alphas)
def test_tail_mass_never_exceeds_alpha(pair: tuple[int, int], alpha: float) -> None:
    k, n = pair
    lower, upper = float(clopper_pearson_lower(k, n, alpha)), float(clopper_pearson_upper(k, n, alpha))
    assert k == 0 or binom.sf(k - 1, n, lower) <= alpha * (1 + 1e-9)
    assert k == n or binom.cdf(k, n, upper) <= alpha * (1 + 1e-9)
    # and the bound is not wider than it has to be
    assert k == 0 or binom.sf(k - 1, n, lower * (1 + 1e-9) + 1e-15) >= alpha * (1 - 1e-12)
    assert k == n or binom.cdf(k, n, upper * (1 - 1e-9)) >= alpha * (1 - 1e-12)


@pytest.mark.parametrize("n", [10, 1000, 10**5, 10**8, 10**9, 10**10, 10**12])
@pytest.mark.parametrize("alpha", [1e-12, 0.001, 0.05])
def test_exact_tails_up_to_a_trillion_draws(n: int, alpha: float) -> None:
    # scipy's own inverse exceeds alpha here by 4.5e-8 at n = 1e9 and by 7e-4 at n = 1e12
    for k in sorted({0, 1, 2, 5, n // 20, n // 10, n // 2 + 3, n - n // 10, n - 5, n - 1, n}):
        lower, upper = float(clopper_pearson_lower(k, n, alpha)), float(clopper_pearson_upper(k, n, alpha))
        assert (k == 0) == (lower == 0.0)
        assert k == 0 or exact_tail(k, n, lower, above=True) <= alpha, (k, "lower")
        if upper == 1.0:
            assert n - k <= 5   # the outward nudge swallows what is left of 1 - p
        else:
            assert exact_tail(k, n, upper, above=False) <= alpha, (k, "upper")


@pytest.mark.parametrize("n", [1, 2, 10, 1000, 10**5, 10**8])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
def test_ends_have_closed_forms(n: int, alpha: float) -> None:
    full = np.exp(np.log(alpha) / n)
    assert float(clopper_pearson_lower(n, n, alpha)) == pytest.approx(full, rel=1e-9)
    assert float(clopper_pearson_lower(n, n, alpha)) <= full
    none = -np.expm1(np.log(alpha) / n)
    assert none <= float(clopper_pearson_upper(0, n, alpha)) <= none * (1 + 1e-9 + 2e-14 * n)
    assert float(clopper_pearson_lower(0, n, alpha)) == 0.0
    assert float(clopper_pearson_upper(n, n, alpha)) == 1.0


def test_precision_near_one_is_that_of_the_failures() -> None:
    for n in (10**5, 10**8, 10**10):
        failures = float(clopper_pearson_upper(3, n, 0.001))
        assert norm.isf(failures) == pytest.approx(norm.isf(beta.isf(0.001, 4, n - 3)), rel=1e-13 * n + 1e-9)
        assert float(clopper_pearson_lower(n - 3, n, 0.001)) == pytest.approx(1 - failures, abs=2e-16)
        assert float(clopper_pearson_lower(n - 3, n, 0.001)) < 1 - failures


@given(counted, alphas)
def test_monotone_in_count_draws_and_alpha(pair: tuple[int, int], alpha: float) -> None:
    k, n = pair
    here = float(clopper_pearson_lower(k, n, alpha))
    if k < n:
        assert float(clopper_pearson_lower(k + 1, n, alpha)) > here
        assert float(clopper_pearson_upper(k, n, alpha)) <= float(clopper_pearson_upper(k + 1, n, alpha))
    assert float(clopper_pearson_lower(k, n + 1, alpha)) < here or k == 0
    assert float(clopper_pearson_lower(k + 1, n + 1, alpha)) > here
    assert float(clopper_pearson_lower(k, n, alpha * 0.99)) < here or k == 0
    assert float(clopper_pearson_upper(k, n, alpha * 0.99)) >= float(clopper_pearson_upper(k, n, alpha))


def test_broadcasts_and_takes_any_integer_type() -> None:
    k, n = np.arange(5)[:, None], np.array([7, 40])
    for bound in (clopper_pearson_lower, clopper_pearson_upper):
        table = bound(k, n, 0.01)
        assert table.shape == (5, 2)
        assert all(table[i, j] == bound(i, int(n[j]), 0.01) for i, j in itertools.product(range(5), range(2)))
        for dtype in (np.uint8, np.int32, np.uint64):
            assert np.array_equal(bound(k.astype(dtype), n, 0.01), table)


@pytest.mark.parametrize("alpha", [0.001, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("n", [1, 7, 40, 200])
def test_coverage_by_exact_enumeration(n: int, alpha: float) -> None:
    counts = np.arange(n + 1)
    lower, upper = clopper_pearson_lower(counts, n, alpha), clopper_pearson_upper(counts, n, alpha)
    # the error is largest just beside a bound, so those points join the grid
    p = np.concatenate([np.linspace(0.0005, 0.9995, 1999), lower[1:] * (1 - 1e-12), upper[:-1] * (1 + 1e-12)])
    p = p[(p > 0) & (p < 1)]
    mass = binom.pmf(counts[None, :], n, p[:, None])

    def worst(low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
        return float((mass * (low > p[:, None])).sum(1).max()), float((mass * (high < p[:, None])).sum(1).max())

    assert max(worst(lower, upper)) <= alpha * (1 + 1e-9)
    assert min(worst(lower, upper)) >= alpha * (1 - 1e-6)   # exact: the level is attained
    doubled = worst(clopper_pearson_lower(counts, n, 2 * alpha), clopper_pearson_upper(counts, n, 2 * alpha))
    assert min(doubled) > 1.1 * alpha   # the same enumeration catches a level that is twice too large


@given(st.integers(0, 400), st.integers(0, 400))
def test_top_two_is_the_two_sided_binomial_test(top: int, rival: int) -> None:
    p = float(top_two_p_value(top, rival))
    if top <= rival:
        assert p == 1.0
    else:
        expected = binomtest(top, top + rival, 0.5).pvalue
        assert p == pytest.approx(expected, rel=1e-9)
        assert p >= min(1.0, 2 * binom.sf(top - 1, top + rival, 0.5)) * (1 - 1e-12)


@pytest.mark.parametrize("bound", [clopper_pearson_lower, clopper_pearson_upper])
def test_bad_input_is_named(bound) -> None:
    for alpha in (0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha must lie strictly between 0 and 1"):
            bound(1, 2, alpha)
    for count in (1.0, [0.5], True, "1"):
        with pytest.raises(TypeError, match="count must be integers"):
            bound(count, 2, 0.1)
    with pytest.raises(TypeError, match="n must be integers"):
        bound(1, 2.0, 0.1)
    with pytest.raises(ValueError, match="n must be at least 1"):
        bound(0, 0, 0.1)
    for count in (-1, 3):
        with pytest.raises(ValueError, match="count must lie between 0 and n"):
            bound(count, 2, 0.1)


def test_check_alpha_names_what_it_checks() -> None:
    assert check_alpha(0.25) == 0.25
    with pytest.raises(ValueError, match="confidence must lie strictly between 0 and 1"):
        check_alpha(1.0, "confidence")


def test_top_two_refuses_what_is_no_count() -> None:
    with pytest.raises(TypeError, match="integers"):
        top_two_p_value(3.0, 1)
    with pytest.raises(ValueError, match="count must lie between 0 and n"):
        top_two_p_value(3, -1)

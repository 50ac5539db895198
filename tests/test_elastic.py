"""A sigma that depends on the input: golden numbers, second opinions, and the classifiers that the bounds are about."""

import numpy as np
import pytest
from closed_forms import allowed
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import binom, chi2, ncx2

from art_rs_plugins.theory.bounds import clopper_pearson_upper
from art_rs_plugins.theory.elastic import (
    BinnedSigma,
    ElasticSigma,
    ExtendedSigma,
    Feature,
    NeighbourDistance,
    Projection,
    SigmaFunction,
    SubspaceDistance,
    semi_elastic_failure,
    semi_elastic_radius,
    tolerated_failure,
)
from art_rs_plugins.theory.radii import gaussian_radius


def worst_mass(a: float, s0: float, s1: float, d: int, failure: float) -> float:
    """Largest mass of "not A" at the other input, as published: a second implementation, by another quantile."""
    if s1 == s0:
        return float(ndtr(ndtri(failure) + a / s0))
    gap = (s0**2 - s1**2) ** 2
    here, there, stretch = (s0 * a) ** 2 / gap, (s1 * a) ** 2 / gap, (s0 / s1) ** 2
    if s1 < s0:
        return float(ncx2.cdf(stretch * ncx2.ppf(failure, d, here), d, there))
    return float(ncx2.sf(stretch * ncx2.isf(failure, d, here), d, there))


GOLDEN = [
    (0.3, 0.5, 0.45, 2, 0.1, 0.23084), (0.3, 0.5, 0.55, 2, 0.1, 0.27234), (0.2, 0.5, 0.4, 5, 0.05, 0.14431),
    (0.2, 0.5, 0.6, 5, 0.05, 0.20592), (0.4, 1.0, 0.9, 1, 0.2, 0.31187), (0.5, 0.5, 0.495, 3072, 0.1, 0.49589),
    (0.5, 0.5, 0.505, 3072, 0.1, 0.49532), (0.5, 0.5, 0.4985, 3072, 0.1, 0.39936),
    (0.5, 0.5, 0.5015, 3072, 0.1, 0.39992),
]   # fmt: skip


@pytest.mark.parametrize("a, s0, s1, d, failure, mass", GOLDEN)
def test_golden_masses(a: float, s0: float, s1: float, d: int, failure: float, mass: float) -> None:
    assert worst_mass(a, s0, s1, d, failure) == pytest.approx(mass, abs=1e-5)


@pytest.mark.parametrize("a, s0, s1, d, failure, mass", GOLDEN[:5])
def test_golden_masses_by_likelihood_ratio(a: float, s0: float, s1: float, d: int, failure: float, mass: float) -> None:
    """Two million draws, the likeliest ones under the second law taken until their mass under the first is spent."""
    rng = np.random.default_rng(1)
    shift = np.zeros(d)
    shift[0] = a

    def log_ratio(z: np.ndarray) -> np.ndarray:
        return (z**2).sum(axis=1) / (2 * s0**2) - ((z - shift) ** 2).sum(axis=1) / (2 * s1**2)

    here = log_ratio(s0 * rng.normal(size=(10**6, d)))
    there = log_ratio(shift + s1 * rng.normal(size=(10**6, d)))
    assert (there > np.quantile(here, 1.0 - failure)).mean() == pytest.approx(mass, abs=2.5e-3)


@pytest.mark.parametrize("d", [1, 2, 10, 784, 3072])
@pytest.mark.parametrize("log_ratio", [-0.3, -0.02, -1e-3, 1e-3, 0.02, 0.3])
def test_tolerated_failure_is_where_the_worst_mass_is_one_half(d: int, log_ratio: float) -> None:
    for a in (0.05, 0.3, 1.0):
        failure = float(tolerated_failure(a, 0.5, log_ratio, d))
        if failure > 1e-9:
            assert worst_mass(a, 0.5, 0.5 * np.exp(log_ratio), d, failure) == pytest.approx(0.5, abs=1e-6)


def quadrature(cut: float, d: int, noncentrality: float, *, upper: bool) -> float:
    """Noncentral chi-square tail: one coordinate carries the shift, the others are central."""
    z, step = np.linspace(-12.0, 12.0, 48_001, retstep=True)
    rest = cut - (z + np.sqrt(noncentrality)) ** 2
    tail = chi2.sf(rest, d - 1) if upper else chi2.cdf(rest, d - 1)
    return float((np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) * tail).sum() * step)


@pytest.mark.parametrize("d", [20, 784, 150_528])
@pytest.mark.parametrize("log_ratio", [-0.05, -2e-3, 2e-3, 0.05])
@pytest.mark.parametrize("a", [0.05, 0.3, 1.0])
def test_tails_are_accurate_to_far_less_than_the_margin(a: float, log_ratio: float, d: int) -> None:
    tolerated = float(tolerated_failure(a, 0.5, log_ratio, d))
    square = np.exp(2.0 * log_ratio)
    noncentrality = (a / (0.5 * np.expm1(2.0 * log_ratio))) ** 2
    near = d + square * noncentrality
    median = brentq(lambda t: quadrature(t, d, square * noncentrality, upper=False) - 0.5, 0.5 * near, near, rtol=1e-14)
    tail = quadrature(square * median, d, noncentrality, upper=log_ratio > 0)
    assert tail == pytest.approx(tolerated, rel=1e-7, abs=1e-12)


def interval(a: float, s0: float, s1: float, failure: float) -> float:
    """The worst mass in one dimension, by normal distribution functions and bisection alone."""
    centre = a * s0**2 / (s0**2 - s1**2)

    def inside(half: float, mean: float, s: float) -> float:
        return float(ndtr((centre + half - mean) / s) - ndtr((centre - half - mean) / s))

    target = failure if s1 < s0 else 1.0 - failure
    half = brentq(lambda h: inside(h, 0.0, s0) - target, 0.0, abs(centre) + 40.0, xtol=1e-14)
    return inside(half, a, s1) if s1 < s0 else 1.0 - inside(half, a, s1)


@pytest.mark.parametrize("a, s0, s1, failure", [(0.4, 1.0, 0.9, 0.2), (0.4, 1.0, 1.2, 0.2), (0.2, 0.5, 0.3, 0.01)])
def test_one_dimension_by_intervals(a: float, s0: float, s1: float, failure: float) -> None:
    assert worst_mass(a, s0, s1, 1, failure) == pytest.approx(interval(a, s0, s1, failure), abs=1e-9)


@pytest.mark.parametrize("d", [1, 100, 3072])
def test_equal_sigmas_are_the_limit(d: int) -> None:
    same = float(tolerated_failure(0.3, 0.5, 0.0, d))
    assert same == ndtr(-0.6)
    assert tolerated_failure(0.3, 0.5, [-1e-4, 1e-4], d) == pytest.approx([same, same], rel=2e-3)
    assert (tolerated_failure(0.3, 0.5, [-1e-3, -1e-4, 1e-4, 1e-3], d) < same * (1.0 + 1e-8)).all()


RATES = (0.0, 0.001, 0.005, 0.01, 0.015, 0.02, 0.05, 0.1)
TABLE = [
    (784, 0.25, 0.9, [0.3204, 0.3204, 0.3200, 0.3188, 0.3169, 0.3143, 0.2869, 0.2269]),
    (784, 0.5, 0.999931, [1.9059, 1.9055, 1.8965, 1.8692, 1.8257, 1.7693, 1.3396, 0.8402]),
    (3072, 0.25, 0.9, [0.3204, 0.3203, 0.3189, 0.3144, 0.3073, 0.2982, 0.2284, 0.1451]),
    (3072, 0.25, 0.999931, [0.9529, 0.9527, 0.9484, 0.9350, 0.9139, 0.8865, 0.6769, 0.4283]),
    (3072, 0.5, 0.99, [1.1632, 1.1623, 1.1414, 1.0825, 1.0015, 0.9134, 0.5251, 0.2850]),
    (3072, 0.5, 0.999931, [1.9059, 1.9044, 1.8701, 1.7731, 1.6396, 1.4943, 0.8565, 0.4644]),
    (784, 0.5, 0.99, [None, 1.1629, None, 1.1409, None, None, None, 0.5173]),
    (150_528, 0.5, 0.99, [None, 1.1217, None, 0.3979, None, None, None, 0.0423]),
    (150_528, 1.0, 0.999, [None, None, None, 0.5531, None, None, None, None]),
]


@pytest.mark.parametrize("d, sigma, p, golden", TABLE)
def test_golden_radii(d: int, sigma: float, p: float, golden: list[float | None]) -> None:
    for rate, radius in zip(RATES, golden, strict=True):
        if radius is not None:
            assert float(semi_elastic_radius(1.0 - p, sigma, rate, d)) == pytest.approx(radius, abs=1e-4)


def test_radius_falls_with_failure_rate_and_dimension() -> None:
    failure = np.array([1e-6, 0.01, 0.49, 0.5, 1.0, np.nan])
    cohen = gaussian_radius(failure, failure, 0.5)
    before = cohen
    for rate in (0.0, 1e-7, 1e-4, 1e-3, 0.01, 0.1, 1.0, 1e4):
        radius = semi_elastic_radius(failure, 0.5, rate, 784)
        assert (radius <= before).all()
        assert (np.diff(radius) <= 0).all()
        assert (radius[:3] > 0).all()
        assert (radius[3:] == 0).all()
        higher = semi_elastic_radius(failure, 0.5, rate, 3072)
        assert (higher <= radius).all()
        before = radius
    assert np.array_equal(semi_elastic_radius(failure, 0.5, 0.0, 784), cohen)
    # slow rates, whose noncentrality is large, against the Fisher-Rao approximation
    for rate in (2e-4, 1e-3, 0.03):
        for d in (784, 150_528):
            near = -ndtri(failure[:3]) / np.sqrt(1 / 0.5**2 + 2 * d * rate**2)
            radius = semi_elastic_radius(failure[:3], 0.5, rate, d)
            assert (radius <= near * 1.0001).all()
            assert (radius >= near * 0.97).all()


def one_sided(failure: float, sigma: float, rate: float, d: int, side: float) -> float:
    def margin(a: float) -> float:
        return float(tolerated_failure(a, sigma, side * rate * a, d)) - failure

    return float(brentq(margin, 1e-6, -2.0 * sigma * ndtri(failure)))


@pytest.mark.parametrize("d, sigma, rate, failure", [(2, 1.0, 1.0, 0.01), (20, 0.5, 0.5, 0.01), (3072, 0.5, 0.1, 0.01)])
def test_looking_at_the_smaller_sigma_alone_is_caught(d: int, sigma: float, rate: float, failure: float) -> None:
    """Released code looks there by default. The base classifier that is worst for the larger sigma refutes it."""
    radius = float(semi_elastic_radius(failure, sigma, rate, d))
    loose = one_sided(failure, sigma, rate, d, -1.0)
    assert one_sided(failure, sigma, rate, d, 1.0) == pytest.approx(radius, rel=1e-4)
    assert loose > 1.015 * radius
    # A is a ball behind x; sigma grows along the way by exactly the rate
    for a, kept in ((radius * 0.999, True), (radius * 1.001, False), (loose * 0.999, False)):
        end = np.exp(rate * radius)
        behind = radius / (end**2 - 1.0)
        squared = sigma**2 * ncx2.isf(failure, d, (behind / sigma) ** 2)
        there = sigma * np.exp(rate * a)
        assert (ncx2.cdf(squared / there**2, d, ((behind + a) / there) ** 2) > 0.5) == kept


def test_the_smaller_sigma_is_looked_at_as_well() -> None:
    """At ratios exp(-t) and exp(t) the larger sigma has always been the worse one; at 1 - t and 1 + t it is not."""
    d = np.array([1, 2, 3, 10, 100, 784, 3072])[:, None, None]
    a, t = np.geomspace(0.02, 4.0, 12)[:, None], np.geomspace(1e-3, 1.0, 10)
    smaller, larger = (tolerated_failure(a, 1.0, side * t, d) for side in (-1.0, 1.0))
    assert (larger <= smaller * (1.0 + 1e-9)).all()
    for t in (0.003, 0.01):
        smaller, larger = (tolerated_failure(0.5, 0.5, np.log1p(side * t), 3072) for side in (-1.0, 1.0))
        assert smaller < larger


def test_linear_classifiers_keep_the_promise_under_any_sigma() -> None:
    distance = np.linspace(0.05, 2.0, 6)
    for sigma in (0.25, 1.0):
        for rate in (0.001, 0.02, 0.5):
            radius = semi_elastic_radius(ndtr(-distance / sigma), sigma, rate, 100)
            assert (radius < distance).all()


@pytest.mark.slow
def test_elastic_certificates_fail_with_probability_alpha() -> None:
    """Votes, their bound, the radius: at a classifier for which the radius from the true probability is exact."""
    alpha, trials, n, d, sigma, rate, p = 0.05, 20_000, 1000, 50, 0.5, 0.2, 0.95
    truth = float(semi_elastic_radius(1.0 - p, sigma, rate, d)) * (1.0 + 1e-6)
    counts = np.arange(n + 1)
    likely = np.flatnonzero(binom.pmf(counts, n, p) > 1e-12)
    for spent in (alpha, 2 * alpha):
        radius = np.zeros(n + 1)
        radius[likely] = semi_elastic_radius(clopper_pearson_upper(n - likely, n, spent), sigma, rate, d)
        false = int((radius[np.random.default_rng(3).binomial(n, p, trials)] > truth).sum())
        assert (false > allowed(trials, alpha)) == (spent > alpha)


# --- functions of the input -----------------------------------------------------------------------------------------

RNG = np.random.default_rng(11)
POINTS = RNG.normal(size=(40, 2, 3))
FEATURES: list[Feature] = [
    Projection(RNG.normal(size=(2, 3)) * 7.0),
    SubspaceDistance(RNG.normal(size=(2, 2, 3))),
    NeighbourDistance(POINTS, k=5),
]
SIGMA_FUNCTIONS: list[SigmaFunction] = [
    *[ElasticSigma(feature, base=0.5, rate=0.1, centre=1.0) for feature in FEATURES],
    ExtendedSigma(POINTS, RNG.uniform(0.25, 1.0, 40), rate=0.1),
    *[BinnedSigma(feature, edges=(0.3, 1.0, 1.5), sigmas=(0.25, 1.0, 0.5, 0.75)) for feature in FEATURES],
]


def steepest(function: Feature | SigmaFunction, scale: str = "linear") -> float:
    """Largest slope between random pairs, near and far, and toward the points that matter to neighbours."""
    rng = np.random.default_rng(12)
    x = np.concatenate([rng.normal(size=(300, 2, 3)), POINTS + 1e-3 * rng.normal(size=POINTS.shape)])
    z = np.concatenate([x[:300] + np.geomspace(1e-4, 3.0, 300)[:, None, None] * rng.normal(size=(300, 2, 3)), POINTS])
    here, there = (np.log(function(v)) if scale == "log" else function(v) for v in (x, z))
    return float((np.abs(here - there) / np.linalg.norm((x - z).reshape(len(x), -1), axis=1)).max())


@pytest.mark.parametrize("feature", FEATURES)
def test_features_are_one_lipschitz(feature: Feature) -> None:
    assert 0.5 < steepest(feature) <= 1.0 + 1e-9


@pytest.mark.parametrize("sigma", SIGMA_FUNCTIONS[:4])
def test_log_sigma_is_rate_lipschitz(sigma: SigmaFunction) -> None:
    assert 0.05 < steepest(sigma, "log") <= 0.1 + 1e-9


@pytest.mark.parametrize("function", [*FEATURES, *SIGMA_FUNCTIONS])
def test_nothing_that_is_asked_changes_an_answer(function: Feature | SigmaFunction) -> None:
    x = np.random.default_rng(13).normal(size=(30, 2, 3))
    together = function(x)
    assert together.tobytes() == function(x).tobytes()
    order = np.random.default_rng(14).permutation(30)
    assert function(x[order]).tobytes() == together[order].tobytes()
    assert b"".join(function(row[None]).tobytes() for row in x) == together.tobytes()
    if not isinstance(function, FEATURES[0].__class__ | FEATURES[1].__class__ | NeighbourDistance):
        failure = np.linspace(1e-3, 0.4, 30)
        assert function.radius(x[order], failure[order]).tobytes() == function.radius(x, failure)[order].tobytes()


@pytest.mark.parametrize("sigma", SIGMA_FUNCTIONS)
@pytest.mark.parametrize("radius", [0.0, 0.05, 0.25, 1.0])
def test_the_bound_that_a_radius_asks_for_is_the_inverse_of_the_radius(sigma: SigmaFunction, radius: float) -> None:
    """A hair below the bound the radius is reached; a hair above it is not: neither false nor wasteful."""
    x = np.random.default_rng(17).normal(size=(40, 2, 3))
    limit = sigma.failure(x, radius)
    assert np.array_equal(limit[::-1], sigma.failure(x[::-1], radius))
    assert ((limit >= 0.0) & (limit <= 0.5)).all()
    reached = limit > 0.0
    assert reached.any()
    close = 1e-7 * (1.0 + radius)
    assert (sigma.radius(x, limit * (1 - 1e-9))[reached] >= radius - close).all()
    assert (sigma.radius(x, np.minimum(limit * (1 + 1e-4) + 1e-6, 0.5))[reached] <= radius).all()
    assert (sigma.radius(x, 1e-300)[~reached] <= radius).all()   # out of reach: an edge lies within it
    fixed = ndtr(-radius / sigma(x))
    assert (limit <= fixed).all()
    if not isinstance(sigma, BinnedSigma) and radius > 0.1:
        assert (limit < 0.999 * fixed).all()   # sigma moves, and that is paid for


def test_neighbours_are_training_points_alone() -> None:
    """A query that joined its own neighbours, or those of the others in its batch, would be seen at once."""
    x = np.random.default_rng(15).normal(size=(6, 2, 3))
    flat = np.linalg.norm((x[:, None] - POINTS[None]).reshape(6, 40, -1), axis=2)
    assert NeighbourDistance(POINTS, k=5)(x) == pytest.approx(np.sort(flat, axis=1)[:, :5].mean(axis=1), rel=1e-12)
    joined = NeighbourDistance(np.concatenate([POINTS, x]), k=5)(x)
    assert (joined < NeighbourDistance(POINTS, k=5)(x) - 0.05).all()
    kept = NeighbourDistance(POINTS.copy(), k=5)
    with pytest.raises(ValueError, match="read-only"):
        kept.points[0] = 0.0


def test_extension_meets_the_table_where_it_can() -> None:
    points, rate = np.array([[0.0], [1.0], [5.0]]), 0.2
    sigma = ExtendedSigma(points, np.array([0.5, 1.0, 0.6]), rate)
    # 1 is too far above 0.5 at a distance of 1, and 0.6 is not
    assert sigma(points) == pytest.approx([0.5, 0.5 * np.exp(0.2), 0.6])
    assert sigma([[100.0]]) == pytest.approx([1.0])
    assert ExtendedSigma(points, np.array([0.5, 0.55, 0.6]), rate)(points) == pytest.approx([0.5, 0.55, 0.6])


@pytest.mark.parametrize("sigma", SIGMA_FUNCTIONS[4:])
def test_bins_do_not_change_within_the_radius(sigma: BinnedSigma) -> None:
    rng = np.random.default_rng(16)
    x = rng.normal(size=(400, 2, 3)).astype(np.float32)
    here, radius = sigma(x), sigma.radius(x, 1e-6)
    cohen = gaussian_radius(1e-6, 1e-6, here)
    assert (radius <= cohen).all()
    assert (radius < cohen).mean() > 0.1
    # along the direction in which the feature moves fastest, found by differences, to the very end and beyond
    steps = 1e-6 * np.eye(6).reshape(6, 2, 3)
    slope = np.stack([sigma.feature(x + step) - sigma.feature(x - step) for step in steps], axis=1).reshape(x.shape)
    along = slope / np.linalg.norm(slope.reshape(400, -1), axis=1)[:, None, None]
    edges = np.array(sigma.edges)
    limited = radius < cohen
    beyond = np.zeros(400, dtype=bool)
    for side in (-1.0, 1.0):
        reach = side * radius[:, None, None] * along
        assert np.array_equal(sigma(x + (1.0 - 1e-9) * reach), here)
        beyond |= sigma(x + 1.02 * reach + side * 1e-3 * along) != here
    if isinstance(sigma.feature, Projection):
        assert beyond[limited].all()   # no radius is shorter than it has to be
    assert radius[limited] == pytest.approx(np.abs(sigma.feature(x)[limited, None] - edges).min(axis=1), abs=1e-9)


def test_bins_on_the_edge_certify_nothing() -> None:
    sigma = BinnedSigma(Projection([1.0]), edges=[0.5], sigmas=[0.25, 0.5])
    assert sigma([[0.5], [np.nextafter(0.5, 0.0)]]).tolist() == [0.5, 0.25]
    assert sigma.radius([[0.5], [np.nextafter(0.5, 0.0)]], 1e-3).tolist() == [0.0, 0.0]
    alone = BinnedSigma(Projection([1.0]), edges=[], sigmas=[0.25])
    assert alone.radius([[3.0]], [0.01]) == gaussian_radius(0.01, 0.01, 0.25)


@given(st.floats(-3.0, 3.0), st.floats(0.001, 0.45), st.integers(0, 10**6))
def test_binned_smoothing_of_the_line_is_constant_within_its_radius(x: float, share: float, seed: int) -> None:
    """A is an interval about x; the classifier that switches sigma by place is evaluated along the way."""
    rng = np.random.default_rng(seed)
    sigma = BinnedSigma(Projection([1.0]), np.sort(rng.uniform(-3, 3, 3)) + [0, 1e-3, 2e-3], rng.uniform(0.1, 1.0, 4))
    here = float(sigma([[x]])[0])
    low = x - here * float(rng.uniform(0.2, 3.0))
    high = x + here * float(rng.uniform(0.2, 3.0) + share)

    def p(z: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return ndtr((high - z) / scale) - ndtr((low - z) / scale)

    radius = float(sigma.radius([[x]], 1.0 - p(np.array([x]), np.array([here])))[0])
    ways = x + radius * np.linspace(-1.0, 1.0, 201)[1:-1]
    assert radius == 0.0 or (p(ways, sigma(ways[:, None])) > 0.5).all()


def test_settings_are_checked() -> None:
    feature = Projection([1.0])
    for make, message in (
        (lambda: semi_elastic_radius(0.1, 0.5, -0.1, 3), "rate must be finite and >= 0"),
        (lambda: semi_elastic_radius(0.1, 0.5, np.inf, 3), "rate must be finite and >= 0"),
        (lambda: semi_elastic_radius(0.1, 0.5, 0.1, 0), "dimension must be an integer"),
        (lambda: semi_elastic_radius(0.1, 0.0, 0.1, 3), "sigma must be finite"),
        (lambda: semi_elastic_failure(-0.1, 0.5, 0.1, 3), "radius must be finite and >= 0"),
        (lambda: semi_elastic_failure(np.nan, 0.5, 0.1, 3), "radius must be finite and >= 0"),
        (lambda: Projection([0.0, 0.0]), "direction must not be zero"),
        (lambda: SubspaceDistance([[1.0, 1.0], [2.0, 2.0]]), "linearly independent"),
        (lambda: SubspaceDistance([[1.0], [2.0]]), "linearly independent"),
        (lambda: NeighbourDistance([[1.0], [2.0]], k=3), "k must lie between 1 and the number of points, 2"),
        (lambda: NeighbourDistance([[np.nan]], k=1), "points must be finite"),
        (lambda: NeighbourDistance([1.0, 2.0], k=1), "points must be finite and of shape"),
        (lambda: ElasticSigma(feature, base=0.0, rate=0.1, centre=0.0), "base must be finite"),
        (lambda: ElasticSigma(feature, base=0.5, rate=-0.1, centre=0.0), "rate must be >= 0"),
        (lambda: ExtendedSigma([[0.0], [1.0]], [0.5], 0.1), "one for each of 2 points"),
        (lambda: ExtendedSigma([[0.0]], [-0.5], 0.1), "sigmas must be finite"),
        (lambda: ExtendedSigma([[0.0]], [0.5], np.nan), "rate must be finite"),
        (lambda: BinnedSigma(feature, [1.0, 1.0], [0.5] * 3), "strictly increasing"),
        (lambda: BinnedSigma(feature, [1.0], [0.5] * 3), "sigmas must be one more than edges: 2"),
        (lambda: feature([1.0, 2.0]), "x must be finite and of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            make()

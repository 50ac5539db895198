"""A sigma that depends on the input, and certificates for the classifier that uses it.

Two kinds of function sigma(x) leave a theorem about g(x) = argmax_c P(f(x + sigma(x) eps) = c), eps ~ N(0, I). One
changes so slowly that its neighbours' noise is almost the same; in high dimension that is very slowly. The other is
constant but for jumps whose distance is known. Both are fixed before the inputs are seen, from training data alone,
and nothing that is asked later changes them. f itself must not know sigma(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.special import ndtr
from scipy.stats import ncx2

from art_rs_plugins.theory.radii import check_sigma, gaussian_radius

__all__ = [
    "BinnedSigma",
    "ElasticSigma",
    "ExtendedSigma",
    "Feature",
    "NeighbourDistance",
    "Projection",
    "SigmaFunction",
    "SubspaceDistance",
    "semi_elastic_failure",
    "semi_elastic_radius",
    "tolerated_failure",
]

_MARGIN = 1e-6
"""Relative margin in 1 - p_A: the noncentral chi-square distribution is good for about 1e-8 of it."""

_SPREAD = 2.0**-22
"""Rise or fall of log sigma that rounding may add between two inputs: the noise is scaled in float32."""

_SLOWEST = 5e-5
"""Least sigma * rate that is computed with; it keeps the noncentrality below 1e8, and a larger rate is only safer."""

_INWARD = 1e-12
"""Relative shrinkage of a bound of 1 - p_A; the normal distribution function is accurate to about 1e-15."""

_STEPS = 32
"""Halvings of the interval that holds the radius."""


def tolerated_failure(
    distance: ArrayLike, sigma: ArrayLike, log_ratio: ArrayLike, dimension: int
) -> NDArray[np.float64]:
    r"""Largest 1 - p_A at one input with which A still has a majority at another, under another sigma.

    Parameters
    ----------
    distance : array_like of float
        l2 distance of the two inputs, >= 0.
    sigma : array_like of float
        Sigma at the first.
    log_ratio : array_like of float
        log of sigma at the second over sigma at the first. Zero, or so large that
        ``distance / (sigma |exp(2 log_ratio) - 1|)`` stays below 1e5, where the distribution functions lose digits.
    dimension : int
        Number of entries of an input.

    Returns
    -------
    ndarray of float64
        The supremum; whether it is attained is left open.

    Notes
    -----
    By Neyman and Pearson the worst "not A" is a ball if the second sigma is smaller, and the outside of a ball if it is
    larger. With the first input at distance a and s the ratio of sigmas, its centre lies at distances a / |1 - s^2| and
    a s^2 / |1 - s^2| from the two, so that its squared radius over the variance is noncentral chi-square, with
    noncentralities L = (a / (sigma (1 - s^2)))^2 and s^2 L. It holds half of the mass at the second input if that is
    the median Q there; then its mass at the first is F(s^2 Q; L).

    *Source.* Sukenik, Kuvshinov and Guennemann (2022), "Intriguing properties of input-dependent randomized
    smoothing", whose functions are solved here for p_A at the level 1/2.

    Examples
    --------
    >>> tolerated_failure(0.5, 0.5, [0.0, -0.01, 0.01], 3072).round(4)   # Phi(-1), and what is left of it
    array([0.1587, 0.1022, 0.1017])
    """
    a, scale, log_s = (np.asarray(value, dtype=np.float64) for value in (distance, sigma, log_ratio))
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        square = np.exp(2.0 * log_s)
        noncentrality = np.square(a / (scale * np.expm1(2.0 * log_s)))
        cut = square * ncx2.ppf(0.5, dimension, square * noncentrality)
        ball, outside = ncx2.cdf(cut, dimension, noncentrality), ncx2.sf(cut, dimension, noncentrality)
        moved = np.where(log_s < 0.0, ball, outside)
        return np.asarray(np.where(log_s == 0.0, ndtr(-a / scale), moved), dtype=np.float64)


def semi_elastic_radius(failure: ArrayLike, sigma: ArrayLike, rate: float, dimension: int) -> NDArray[np.float64]:
    r"""l2 radius where sigma may differ at every input, by ``|log sigma(x) - log sigma(z)| <= rate ||x - z||_2``.

    Parameters
    ----------
    failure : array_like of float
        Upper bound of 1 - p_A at x, under sigma(x).
    sigma : array_like of float
        sigma(x), in the units of the input.
    rate : float
        Lipschitz constant of log sigma, >= 0; proved, not estimated. More than about 1 / (sigma sqrt(2 dimension))
        leaves little.
    dimension : int
        Number of entries of an input.

    Returns
    -------
    ndarray of float64
        Radius, rounded toward zero; 0 where 1 - p_A < 1/2 is not established. For rate 0 it is `gaussian_radius`.

    Raises
    ------
    ValueError
        For a sigma, rate or dimension out of range.

    Notes
    -----
    *Guarantee.* If P(f(x + sigma(x) eps) = A) >= 1 - failure and log sigma is rate-Lipschitz, then
    P(f(z + sigma(z) eps) = A) > 1/2 whenever ``||z - x||_2 <= radius``, for every f.

    Call (a, s) bad if some set of mass at most `failure` at x has mass >= 1/2 at distance a under s = sigma(z). Bad at
    (a, s) is bad at (a', s) for a' > a: for s < sigma(x) move the ball along, away from x; for s > sigma(x) keep its
    outside, and z moves further out. For s < sigma(x) the ball has mass >= 1/2 about z, so it contains z and gains mass
    as s falls; for s > sigma(x) the ball that is left to A has mass <= 1/2, and keeps at most that as s grows, whether
    it contains z or not. At s = sigma(x) it is a half-space that contains z, whose mass is >= 1/2 under every s. So
    what is not bad is, for each a, an interval about sigma(x), and shrinks as a grows: it is enough to look at both
    ends sigma(x) exp(-rate a) and sigma(x) exp(rate a) of the largest a, and halving an interval finds that. (In
    computations the upper end always binds; that is not proved, and so both are looked at.)

    *Source.* Sukenik, Kuvshinov and Guennemann (2022).

    Examples
    --------
    >>> semi_elastic_radius([0.01, 0.1], 0.5, 0.01, 3072).round(3)   # 1.163 and 0.641 for a fixed sigma
    array([1.082, 0.596])
    """
    scale, missing = np.broadcast_arrays(check_sigma(sigma), np.asarray(failure, dtype=np.float64))
    high = gaussian_radius(missing, missing, scale)
    if rate == 0.0:
        return high
    low = np.zeros_like(high)
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        holds = missing < semi_elastic_failure(middle, scale, rate, dimension)   # False for NaN
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    return low


def semi_elastic_failure(radius: ArrayLike, sigma: ArrayLike, rate: float, dimension: int) -> NDArray[np.float64]:
    r"""Bound of 1 - p_A below which a radius holds where sigma may differ at every input: the inverse of the radius.

    Parameters
    ----------
    radius : array_like of float
        l2 radius, >= 0, in the units of the input.
    sigma, rate, dimension
        As in `semi_elastic_radius`.

    Returns
    -------
    ndarray of float64
        In [0, 1/2], rounded toward zero. For rate 0 it is Phi(-radius / sigma).

    Raises
    ------
    ValueError
        For a radius, sigma, rate or dimension out of range.

    Notes
    -----
    *Guarantee.* If 1 - p_A is smaller, under sigma(x), then P(f(z + sigma(z) eps) = A) > 1/2 whenever
    ``||z - x||_2 <= radius``, for every f: see `semi_elastic_radius`.

    Examples
    --------
    >>> semi_elastic_failure([0.25, 0.5], 0.5, 0.01, 3072).round(3)   # .309 and .159 for a fixed sigma
    array([0.296, 0.141])
    """
    if not (np.isfinite(rate) and rate >= 0.0):
        raise ValueError(f"rate must be finite and >= 0, the Lipschitz constant of log sigma, got {rate}")
    if isinstance(dimension, bool) or not isinstance(dimension, int | np.integer) or dimension < 1:
        raise ValueError(f"dimension must be an integer >= 1, the number of entries of an input, got {dimension!r}")
    scale, distance = np.broadcast_arrays(check_sigma(sigma), _radius(radius))
    if rate == 0.0:
        return np.asarray(ndtr(-distance / scale) * (1.0 - _INWARD), dtype=np.float64)
    apart = np.maximum(rate, _SLOWEST / scale) * distance + _SPREAD
    ends = [tolerated_failure(distance, scale, side * apart, dimension) for side in (-1.0, 1.0)]
    return np.asarray(np.nan_to_num(np.minimum(*ends), nan=0.0) / (1.0 + _MARGIN), dtype=np.float64)


def _radius(radius: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(radius, dtype=np.float64)
    if np.any(~np.isfinite(values) | (values < 0.0)):
        raise ValueError(f"radius must be finite and >= 0, in the units of the input, got {radius!r}")
    return values


def _rows(x: ArrayLike, name: str = "x") -> NDArray[np.float64]:
    """Inputs (b, ...) as float64 rows (b, d)."""
    values = np.asarray(x, dtype=np.float64)
    if values.ndim < 2 or not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite and of shape (b, ...), got shape {values.shape}")
    return values.reshape(len(values), -1)


def _freeze(owner: Any, **arrays: NDArray[np.float64]) -> None:
    for name, array in arrays.items():
        copy = array.copy()
        copy.flags.writeable = False
        object.__setattr__(owner, name, copy)


class Feature(Protocol):
    """A 1-Lipschitz function u of the input, in l2: |u(x) - u(z)| <= ||x - z||_2."""

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """Values (b,) at inputs (b, ...), each from its own input alone."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """Position along a direction; 1-Lipschitz, as the direction is scaled to length 1.

    Parameters
    ----------
    direction : array_like of float, shape (...)
        Of the shape of an input, not zero.

    Examples
    --------
    >>> Projection([3.0, 4.0])([[1.0, 1.0]])
    array([1.4])
    """

    direction: NDArray[np.float64]

    def __post_init__(self) -> None:
        values = _rows(np.asarray(self.direction)[None], "direction")[0]
        length = float(np.linalg.norm(values))
        if not length > 0.0:
            raise ValueError("direction must not be zero")
        _freeze(self, direction=values / length)

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """Positions (b,) of inputs (b, ...)."""
        return np.array([np.dot(row, self.direction) for row in _rows(x)])


@dataclass(frozen=True, slots=True, eq=False)
class SubspaceDistance:
    """Distance to the span of some vectors, such as the mean and the principal components of the training data.

    1-Lipschitz, since x minus its orthogonal projection is. The vectors need not be orthogonal, but independent.

    Parameters
    ----------
    vectors : array_like of float, shape (j, ...)
        Each of the shape of an input.

    Examples
    --------
    >>> SubspaceDistance([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])([[5.0, 6.0, 7.0]])
    array([7.])
    """

    vectors: NDArray[np.float64]

    def __post_init__(self) -> None:
        values = _rows(self.vectors, "vectors")
        basis, triangle = np.linalg.qr(values.T)
        diagonal = np.abs(np.diag(triangle))
        if len(diagonal) < len(values) or not diagonal.min() > 1e-10 * diagonal.max():
            raise ValueError("vectors must be linearly independent; leave out those that the others span")
        _freeze(self, vectors=basis.T)

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """Distances (b,) of inputs (b, ...)."""
        basis = self.vectors
        return np.array([np.linalg.norm(row - (basis @ row) @ basis) for row in _rows(x)])


@dataclass(frozen=True, slots=True, eq=False)
class NeighbourDistance:
    """Mean distance to the k nearest of some fixed points.

    1-Lipschitz: the mean distance to any k points is, and this is the least of them.

    Parameters
    ----------
    points : array_like of float, shape (p, ...)
        Training inputs, held in float64. They are part of the classifier: nothing that is asked joins them.
    k : int
        Neighbours, at most p.

    Examples
    --------
    >>> NeighbourDistance([[0.0], [1.0], [5.0]], k=2)([[0.5], [4.0]])
    array([0.5, 2. ])
    """

    points: NDArray[np.float64]
    k: int = 20

    def __post_init__(self) -> None:
        values = _rows(self.points, "points")
        if not 1 <= self.k <= len(values):
            raise ValueError(f"k must lie between 1 and the number of points, {len(values)}, got {self.k}")
        _freeze(self, points=values)

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """Mean distances (b,) of inputs (b, ...), in O(b p d) time."""
        distances = (cdist(row[None], self.points)[0] for row in _rows(x))
        return np.array([np.sort(np.partition(row, self.k - 1)[: self.k]).mean() for row in distances])


@runtime_checkable
class SigmaFunction(Protocol):
    """A noise level for each input, with the radius that follows for the classifier that uses it."""

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """Sigma (b,) at inputs (b, ...), each from its own input alone."""
        ...

    def radius(self, x: ArrayLike, failure: ArrayLike) -> NDArray[np.float64]:
        """Radius (b,) for upper bounds (b,) of 1 - p_A at inputs (b, ...), under this sigma.

        Notes
        -----
        *Guarantee.* If the bound holds at x, argmax_c P(f(z + sigma(z) eps) = c) = A for every z closer to x than the
        radius. So with a bound that fails with probability alpha, the radius does with at most that.
        """
        ...

    def failure(self, x: ArrayLike, radius: float) -> NDArray[np.float64]:
        """Bounds (b,) of 1 - p_A at inputs (b, ...) below which this radius holds; 0 where it is out of reach.

        Notes
        -----
        *Guarantee.* If 1 - p_A is smaller at x, what `radius` guarantees holds for every z closer to x than `radius`.
        So named radii can be tested in sequence: "1 - p_A >= failure(x, r)" is rejected, or r is not certified.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ElasticSigma:
    """sigma(x) = base exp(rate (u(x) - centre)) for a 1-Lipschitz feature u.

    Parameters
    ----------
    feature : Feature
        Such as ``NeighbourDistance(training_inputs, k=20)``: more noise far away from the training data.
    base : float
        Sigma where the feature equals `centre`.
    rate : float
        Lipschitz constant of log sigma, >= 0; Sukenik et al. use 0.01.
    centre : float
        A typical value of the feature.

    Notes
    -----
    *Guarantee.* See `SigmaFunction`, `semi_elastic_radius`. *Source.* Sukenik, Kuvshinov and Guennemann (2022).

    Examples
    --------
    >>> sigma = ElasticSigma(Projection([1.0, 0.0]), base=0.5, rate=0.1, centre=0.0)
    >>> sigma([[0.0, 0.0], [1.0, 0.0]]).round(4)
    array([0.5   , 0.5526])
    """

    feature: Feature
    base: float
    rate: float
    centre: float

    def __post_init__(self) -> None:
        check_sigma(self.base, "base")
        if not (np.isfinite(self.rate) and self.rate >= 0.0 and np.isfinite(self.centre)):
            raise ValueError(f"rate must be >= 0, and rate and centre finite, got {self.rate} and {self.centre}")

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """Sigma (b,) at inputs (b, ...)."""
        return np.asarray(self.base * np.exp(self.rate * (self.feature(x) - self.centre)), dtype=np.float64)

    def radius(self, x: ArrayLike, failure: ArrayLike) -> NDArray[np.float64]:
        """Radius (b,); see `SigmaFunction`."""
        return semi_elastic_radius(failure, self(x), self.rate, _rows(x).shape[1])

    def failure(self, x: ArrayLike, radius: float) -> NDArray[np.float64]:
        """Bound (b,) of 1 - p_A; see `SigmaFunction`."""
        return semi_elastic_failure(radius, self(x), self.rate, _rows(x).shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class ExtendedSigma:
    """The largest function below a table of sigmas whose logarithm is rate-Lipschitz, and no more than their largest.

    log sigma(x) = min_i (log sigma_i + rate ||x - x_i||). It agrees with the table where the table itself is
    rate-Lipschitz, and lies below it elsewhere.

    Parameters
    ----------
    points : array_like of float, shape (p, ...)
        Training inputs, held in float64. They are part of the classifier: nothing that is asked joins them.
    sigmas : array_like of float, shape (p,)
        A sigma for each, such as training found.
    rate : float
        Lipschitz constant of log sigma, >= 0.

    Notes
    -----
    *Guarantee.* See `SigmaFunction`, `semi_elastic_radius`. *Source.* McShane (1934), "Extension of range of
    functions": a minimum of rate-Lipschitz functions is rate-Lipschitz.

    Examples
    --------
    >>> sigma = ExtendedSigma([[0.0], [10.0]], [0.25, 0.5], rate=0.1)
    >>> sigma([[0.0], [1.0], [10.0]]).round(4)
    array([0.25  , 0.2763, 0.5   ])
    """

    points: NDArray[np.float64]
    sigmas: NDArray[np.float64]
    rate: float

    def __post_init__(self) -> None:
        points, sigmas = _rows(self.points, "points"), check_sigma(self.sigmas, "sigmas")
        if sigmas.shape != (len(points),):
            raise ValueError(f"sigmas must be one for each of {len(points)} points, got shape {sigmas.shape}")
        if not (np.isfinite(self.rate) and self.rate >= 0.0):
            raise ValueError(f"rate must be finite and >= 0, got {self.rate}")
        _freeze(self, points=points, sigmas=sigmas)

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """Sigma (b,) at inputs (b, ...), in O(b p d) time."""
        table = np.log(self.sigmas)
        raised = [np.min(table + self.rate * cdist(row[None], self.points)[0]) for row in _rows(x)]
        return np.asarray(np.exp(np.minimum(raised, table.max())), dtype=np.float64)

    def radius(self, x: ArrayLike, failure: ArrayLike) -> NDArray[np.float64]:
        """Radius (b,); see `SigmaFunction`."""
        return semi_elastic_radius(failure, self(x), self.rate, _rows(x).shape[1])

    def failure(self, x: ArrayLike, radius: float) -> NDArray[np.float64]:
        """Bound (b,) of 1 - p_A; see `SigmaFunction`."""
        return semi_elastic_failure(radius, self(x), self.rate, _rows(x).shape[1])


@dataclass(frozen=True, slots=True, eq=False)
class BinnedSigma:
    """A sigma for each interval of a 1-Lipschitz feature: locally constant.

    Parameters
    ----------
    feature : Feature
        Decides which sigma is used.
    edges : sequence of float, length m - 1
        Strictly increasing; bin i holds ``edges[i - 1] <= u(x) < edges[i]``.
    sigmas : sequence of float, length m
        Noise level of each bin, in any order.

    Notes
    -----
    *Guarantee.* See `SigmaFunction`: closer than the distance of u(x) to the next edge, sigma is constant, and the
    theorem for one sigma holds. That distance is rounded down by the floating-point errors of u at both ends.

    Examples
    --------
    >>> sigma = BinnedSigma(Projection([1.0, 0.0]), edges=[0.0], sigmas=[0.25, 1.0])
    >>> sigma([[-0.5, 0.0], [0.3, 0.0]]), sigma.radius([[-0.5, 0.0], [0.3, 0.0]], 0.01).round(3)
    (array([0.25, 1.  ]), array([0.5, 0.3]))
    """

    feature: Feature
    edges: Sequence[float]
    sigmas: Sequence[float]

    def __post_init__(self) -> None:
        edges, sigmas = np.asarray(self.edges, dtype=np.float64), check_sigma(self.sigmas, "sigmas")
        if edges.ndim != 1 or not np.all(np.isfinite(edges)) or np.any(np.diff(edges) <= 0):
            raise ValueError(f"edges must be finite and strictly increasing, got {self.edges!r}")
        if sigmas.shape != (len(edges) + 1,):
            raise ValueError(f"sigmas must be one more than edges: {len(edges) + 1}, got shape {sigmas.shape}")
        object.__setattr__(self, "edges", tuple(edges.tolist()))
        object.__setattr__(self, "sigmas", tuple(sigmas.tolist()))

    def __call__(self, x: ArrayLike) -> NDArray[np.float64]:
        """Sigma (b,) at inputs (b, ...)."""
        return np.array(self.sigmas)[np.searchsorted(self.edges, self.feature(x), side="right")]

    def radius(self, x: ArrayLike, failure: ArrayLike) -> NDArray[np.float64]:
        """Radius (b,); see `SigmaFunction`."""
        radius = gaussian_radius(failure, failure, self(x))
        return np.asarray(np.maximum(np.minimum(radius, self._room(x, radius)), 0.0), dtype=np.float64)

    def failure(self, x: ArrayLike, radius: float) -> NDArray[np.float64]:
        """Bound (b,) of 1 - p_A; see `SigmaFunction`."""
        fixed = semi_elastic_failure(radius, self(x), 0.0, 1)
        return np.asarray(np.where(self._room(x, radius) >= radius, fixed, 0.0), dtype=np.float64)

    def _room(self, x: ArrayLike, radius: ArrayLike) -> NDArray[np.float64]:
        """Distance (b,) of u(x) to the next edge, less what rounding may hide of it up to this radius."""
        rows, u = _rows(x), self.feature(x)
        room = np.min(np.abs(u[:, None] - np.array([*self.edges, np.inf])), axis=1)
        # a dot product of d terms errs by at most d eps / 2 of the lengths; the features take a few of them
        error = 16.0 * (rows.shape[1] + 64) * np.finfo(np.float64).eps
        slack = error * (np.linalg.norm(rows, axis=1) + np.abs(u) + radius)
        return np.asarray(room - slack, dtype=np.float64)

"""Exact binomial bounds and the top-two test, vectorised and in float64.

Every bound is nudged outward by more than the error of the special functions behind it, so that rounding can make a
certificate smaller but never larger.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betainccinv, betaincinv

__all__ = ["check_alpha", "clopper_pearson_lower", "clopper_pearson_upper", "top_two_p_value"]

_OUTWARD = 1e-10
"""Relative nudge of a bound; up to n = 1e6 the inverse incomplete beta function is accurate to about 1e-12."""

_PER_DRAW = 1e-14
"""Relative error of a tail mass for each draw: the incomplete beta function loses digits as n grows (to n = 1e12)."""


def check_alpha(alpha: float, name: str = "alpha") -> float:
    """Return `alpha` as a float, or raise ``ValueError`` unless 0 < alpha < 1."""
    value = float(alpha)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1 (a failure probability such as 0.001), got {alpha}")
    return value


def _check_counts(count: ArrayLike, n: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    counts, totals = np.asarray(count), np.asarray(n)
    for name, array in (("count", counts), ("n", totals)):
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got dtype {array.dtype}")
    if np.any(totals < 1):
        raise ValueError(f"n must be at least 1, got {totals.min()}")
    if np.any(counts < 0) or np.any(counts > totals):
        raise ValueError("count must lie between 0 and n; more successes than draws would certify anything")
    return counts.astype(np.float64), totals.astype(np.float64)


def clopper_pearson_upper(count: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    r"""Exact one-sided upper confidence bound of a binomial probability.

    Parameters
    ----------
    count, n : array_like of int
        Successes and draws, broadcast against each other; ``0 <= count <= n``, ``n >= 1``.
    alpha : float
        Failure probability, strictly between 0 and 1.

    Returns
    -------
    ndarray of float64
        The largest p with P(Bin(n, p) <= count) >= alpha, nudged up; 1 where ``count == n``.

    Raises
    ------
    TypeError, ValueError
        For counts that are not integers or lie outside [0, n], and for alpha outside (0, 1).

    Notes
    -----
    *Guarantee.* For every p, P(p <= bound(K)) >= 1 - alpha with K ~ Bin(n, p).

    *Source.* Clopper and Pearson (1934), "The use of confidence or fiducial limits", Biometrika 26.

    Examples
    --------
    >>> float(clopper_pearson_upper(0, 100, 0.05).round(6))
    0.029513
    """
    check_alpha(alpha)
    counts, totals = _check_counts(count, n)
    spent = alpha / (1.0 + _PER_DRAW * totals)
    with np.errstate(invalid="ignore"):
        bound = betainccinv(counts + 1.0, totals - counts, spent) * (1.0 + _OUTWARD)
    bound = np.where(counts >= totals, 1.0, np.minimum(bound, 1.0))
    return np.where(np.isfinite(bound), bound, 1.0)


def clopper_pearson_lower(count: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    r"""Exact one-sided lower confidence bound of a binomial probability.

    Near p = 1 it is taken as one minus the upper bound of the failures, which keeps its precision there.

    Parameters
    ----------
    count, n, alpha
        As in `clopper_pearson_upper`.

    Returns
    -------
    ndarray of float64
        The smallest p with P(Bin(n, p) >= count) >= alpha, nudged down; 0 where ``count == 0``.

    Raises
    ------
    TypeError, ValueError
        As `clopper_pearson_upper`.

    Notes
    -----
    *Guarantee.* For every p, P(bound(K) <= p) >= 1 - alpha with K ~ Bin(n, p).

    *Source.* Clopper and Pearson (1934); the function LowerConfBound of Cohen et al. (2019), section 3.2.2.

    Examples
    --------
    >>> float(clopper_pearson_lower(100, 100, 0.001).round(6))  # alpha ** (1 / n)
    0.933254
    """
    check_alpha(alpha)
    counts, totals = _check_counts(count, n)
    spent = alpha / (1.0 + _PER_DRAW * totals)
    with np.errstate(invalid="ignore"):
        direct = betaincinv(counts, totals - counts + 1.0, spent) * (1.0 - _OUTWARD)
    failures = clopper_pearson_upper((totals - counts).astype(np.int64), totals.astype(np.int64), alpha)
    bound = np.fmax(direct, np.nextafter(1.0 - failures, 0.0))   # both hold; each is the sharper one at its end
    return np.where((counts > 0) & np.isfinite(bound), np.clip(bound, 0.0, 1.0), 0.0)


def top_two_p_value(top: ArrayLike, rival: ArrayLike) -> NDArray[np.float64]:
    r"""Two-sided p-value that the class with `top` votes is no more likely than its rival.

    Parameters
    ----------
    top, rival : array_like of int
        Votes of the leading class, and of everything that may stand against it as one rival.

    Returns
    -------
    ndarray of float64
        min(1, 2 P(Bin(top + rival, 1/2) >= top)); 1 where ``top <= rival``.

    Notes
    -----
    *Source.* Hung and Fithian (2019), "Rank verification for exponential families", as used in Cohen et al. (2019),
    PREDICT and proposition 1.

    Examples
    --------
    >>> float(top_two_p_value(10, 0).round(9))
    0.001953125
    """
    counts, totals = _check_counts(top, np.maximum(np.asarray(top) + np.asarray(rival), 1))
    rivals = np.asarray(rival, dtype=np.float64)
    tail = betainc(np.maximum(counts, 1.0), totals - counts + 1.0, 0.5)
    return np.where(counts > rivals, np.minimum(2.0 * tail * (1.0 + _OUTWARD + _PER_DRAW * totals), 1.0), 1.0)

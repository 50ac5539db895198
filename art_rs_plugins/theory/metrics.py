"""What a set of certificates amounts to: curves with bands, averages with budgets, statements on the set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from art_rs_plugins.theory.bounds import check_alpha, clopper_pearson_lower, clopper_pearson_upper
from art_rs_plugins.theory.certificates import Certificates

__all__ = [
    "Curve",
    "Distribution",
    "abstention_rate",
    "accuracy_curve",
    "average_certified_radius",
    "certified_accuracy",
    "certified_correct",
    "false_certificates_bound",
    "natural_accuracy",
    "p_lower_distribution",
    "paired_difference",
]


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy by radius, with an exact binomial band over the test set; arrays of shape (r,), float64.

    Attributes
    ----------
    radii, accuracy : float64
        Radius, in the units of the input, and the fraction of all inputs that are right at it.
    lower, upper : float64
        Clopper-Pearson band of the population's accuracy, at each radius on its own with probability `confidence`.
    total : int
        Number of inputs, abstentions included.
    confidence : float
        Coverage of the band at one radius.
    """

    radii: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    total: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Distribution:
    """Empirical distribution function with its Dvoretzky-Kiefer-Wolfowitz band; arrays of shape (v,)."""

    values: NDArray[np.float64]
    fraction: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def check_labels(labels: ArrayLike, total: int) -> NDArray[np.int64]:
    """Return integer labels of shape (total,), or say what is wrong with them."""
    values = np.asarray(labels)
    if values.shape != (total,):
        raise ValueError(f"labels must have shape ({total},), one class index for each input, got {values.shape}")
    if values.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers (class indices), got dtype {values.dtype}")
    return values.astype(np.int64)


def certified_correct(certificates: Certificates, labels: ArrayLike) -> NDArray[np.bool_]:
    """Mask (b,): not abstained and of the right class. Kinds other than certified and exact are never counted."""
    if certificates.kind not in ("certified", "exact"):
        raise ValueError(f"{certificates.kind} certificates are no theorems about the classifier: they never count")
    known = check_labels(labels, len(certificates))
    return np.asarray(~certificates.abstained & (certificates.prediction == known))


def accuracy_curve(
    correct: NDArray[np.bool_], radius: NDArray[np.float64], radii: ArrayLike, *, confidence: float = 0.95
) -> Curve:
    """Fraction of all inputs that are correct with ``radius >= r``, for each r of `radii`, with its band.

    Parameters
    ----------
    correct, radius : ndarray, shape (b,)
        Correctness (abstained = wrong) and radius of each input.
    radii : array_like of float
        Radii, finite and >= 0.
    confidence : float
        Two-sided coverage of the band at one radius.

    Raises
    ------
    ValueError
        For no inputs, negative radii or a confidence outside (0, 1).
    """
    grid = np.atleast_1d(np.asarray(radii, dtype=np.float64))
    if np.any(~np.isfinite(grid) | (grid < 0)):
        raise ValueError(f"radii must be finite and >= 0, got {radii!r}")
    if len(correct) == 0:
        raise ValueError("correct must hold at least one input")
    tail = (1.0 - check_alpha(confidence, "confidence")) / 2.0
    hits = np.sum(correct[:, None] & (radius[:, None] >= grid[None, :]), axis=0)
    total = len(correct)
    return Curve(
        radii=grid,
        accuracy=hits / total,
        lower=clopper_pearson_lower(hits, total, tail),
        upper=clopper_pearson_upper(hits, total, tail),
        total=total,
        confidence=confidence,
    )


def certified_accuracy(
    certificates: Certificates, labels: ArrayLike, radii: ArrayLike, *, confidence: float = 0.95
) -> Curve:
    """Certified accuracy by radius over all inputs; an abstention is wrong.

    Parameters
    ----------
    certificates : Certificates
        Of b inputs; kind ``conditional`` is refused.
    labels : array_like of int, shape (b,)
        True classes.
    radii : array_like of float
        Radii in the units of the input.
    confidence : float
        Two-sided coverage of the band at one radius.

    Returns
    -------
    Curve
        With the exact binomial band of the population that the inputs were drawn from.

    Raises
    ------
    ValueError, TypeError
        For labels of the wrong shape or type, negative radii, no inputs or conditional certificates.

    Notes
    -----
    *Guarantee.* The band speaks of sampling the inputs; each certificate's own alpha comes on top of it. See
    `false_certificates_bound` for the set.
    """
    correct = certified_correct(certificates, labels)
    return accuracy_curve(correct, certificates.radius, radii, confidence=confidence)


def natural_accuracy(prediction: ArrayLike, abstained: ArrayLike, labels: ArrayLike) -> float:
    """Fraction of all inputs answered with the right class; an abstention is wrong."""
    answers = np.asarray(prediction)
    known = check_labels(labels, len(answers))
    return float(np.mean((answers == known) & ~np.asarray(abstained)))


def abstention_rate(abstained: ArrayLike) -> float:
    """Fraction of all inputs that abstain."""
    return float(np.mean(np.asarray(abstained, dtype=bool)))


def average_certified_radius(correct: ArrayLike, radius: ArrayLike) -> float:
    """ACR: mean over all inputs of the radius where correct, and 0 elsewhere (MACER, Zhai et al. 2020).

    It grows with n and is ruled by the easy inputs: quote n and alpha beside it, and the curve.
    """
    return float(np.mean(np.where(np.asarray(correct, dtype=bool), np.asarray(radius, dtype=np.float64), 0.0)))


def paired_difference(values: ArrayLike, baseline: ArrayLike) -> tuple[float, float]:
    """Mean of the differences over the same inputs, and its standard error.

    Parameters
    ----------
    values, baseline : array_like, shape (b,)
        What two methods achieve at each input, such as 1 where certified and 0 elsewhere; b >= 2.

    Raises
    ------
    ValueError
        For other shapes.

    Notes
    -----
    Inputs on which both agree cancel, so that this is smaller than the error of two independent sets. It is about the
    choice of inputs; the noise of the votes is in it.

    Examples
    --------
    >>> paired_difference([1, 1, 0, 1], [1, 0, 0, 1])
    (0.25, 0.25)
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"values and baseline must have one shape (b,), b >= 2, got {first.shape} and {second.shape}")
    change = first - second
    return float(change.mean()), float(change.std(ddof=1) / np.sqrt(len(change)))


def p_lower_distribution(
    certificates: Certificates, labels: ArrayLike, values: ArrayLike, *, confidence: float = 0.95
) -> Distribution:
    """Distribution over the inputs of the lower bound of the true class's probability.

    Inputs whose predicted class is wrong count as 0. It does not hide hard inputs behind easy ones, as ACR does.

    Parameters
    ----------
    certificates : Certificates
        Of b inputs.
    labels : array_like of int, shape (b,)
        True classes.
    values : array_like of float
        Where to evaluate it, in [0, 1].
    confidence : float
        Simultaneous coverage of the band.

    Notes
    -----
    *Source.* "Average Certified Radius is a Poor Metric for Randomized Smoothing" (arXiv 2410.06895); band of
    Dvoretzky, Kiefer and Wolfowitz with Massart's constant.
    """
    known = check_labels(labels, len(certificates))
    observed = np.sort(np.where(certificates.prediction == known, certificates.p_lower, 0.0))
    grid = np.atleast_1d(np.asarray(values, dtype=np.float64))
    fraction = np.searchsorted(observed, grid, side="right") / len(observed)
    half = np.sqrt(np.log(2.0 / (1.0 - check_alpha(confidence, "confidence"))) / (2.0 * len(observed)))
    return Distribution(grid, fraction, np.maximum(fraction - half, 0.0), np.minimum(fraction + half, 1.0))


def false_certificates_bound(m: int, alpha: float, *, rho: float = 0.001) -> int:
    """Smallest q such that at most q of m certificates are false, with probability at least 1 - rho.

    Parameters
    ----------
    m : int
        Number of certificates, each with failure probability `alpha` and noise of its own.
    alpha : float
        Failure probability of each.
    rho : float
        Failure probability of the statement about the set.

    Raises
    ------
    ValueError
        For m < 1, or alpha or rho outside (0, 1).

    Notes
    -----
    *Guarantee.* The number of false certificates is stochastically at most Bin(m, alpha), if the certificates were
    made from independent draws; q is the exact quantile of that law.

    Examples
    --------
    >>> false_certificates_bound(500, 0.001)
    4
    """
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    check_alpha(alpha), check_alpha(rho, "rho")
    guess = int(binom.isf(rho, m, alpha))
    while binom.sf(guess, m, alpha) > rho:
        guess += 1
    while guess > 0 and binom.sf(guess - 1, m, alpha) <= rho:
        guess -= 1
    return guess

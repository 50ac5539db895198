"""Probabilities to certified radii and back, one pair of functions for each noise family; radii round toward zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

__all__ = ["check_sigma", "gaussian_probability", "gaussian_radius"]

_INWARD = 1e-12
"""Relative shrinkage of both quantiles; the inverse normal distribution function is accurate to about 1e-15."""


def check_sigma(sigma: ArrayLike, name: str = "sigma") -> NDArray[np.float64]:
    """Return `sigma` in float64, or raise ``ValueError`` unless every entry is finite and positive."""
    values = np.asarray(sigma, dtype=np.float64)
    if values.size == 0 or not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"{name} must be finite and > 0, in the units of the input (such as 0.25), got {sigma!r}")
    return values


def gaussian_radius(failure: ArrayLike, p_upper: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
    r"""l2 radius within which Gaussian smoothing keeps its class.

    Parameters
    ----------
    failure : array_like of float
        Upper bound of 1 - p_A. The complement is taken because it keeps its digits when p_A is close to 1.
    p_upper : array_like of float
        Upper bound of the runner-up's probability p_B.
    sigma : array_like of float
        Standard deviation of the noise, in the units of the input.

    Returns
    -------
    ndarray of float64
        sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)), rounded toward zero; 0 where p_A <= p_B or anything is not finite.

    Raises
    ------
    ValueError
        If a sigma is not finite and positive.

    Notes
    -----
    *Guarantee.* If P(f(x + eps) = A) >= 1 - failure and P(f(x + eps) = c) <= p_upper for every other class c, with
    eps ~ N(0, sigma^2 I), then argmax_c P(f(x + delta + eps) = c) = A for every ``||delta||_2 < radius``.

    *Source.* Cohen et al. (2019), theorem 1.

    Examples
    --------
    >>> float(gaussian_radius(0.1, 0.1, 0.5).round(6))
    0.640776
    """
    scale = check_sigma(sigma)
    with np.errstate(invalid="ignore"):
        quantiles = ndtri(np.asarray(failure, dtype=np.float64)), ndtri(np.asarray(p_upper, dtype=np.float64))
        # the two may cancel, so the slack is in proportion to them and not to their sum
        slack = _INWARD * (np.abs(quantiles[0]) + np.abs(quantiles[1]))
        radius = 0.5 * scale * (-(quantiles[0] + quantiles[1]) - slack)
    return np.where(np.isfinite(radius) & (radius > 0.0), radius, 0.0)


def gaussian_probability(radius: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
    """Return Phi(radius / sigma), the p_A that a one-sided certificate of this l2 radius needs.

    Parameters
    ----------
    radius : array_like of float
        l2 radius, >= 0.
    sigma : array_like of float
        Standard deviation of the noise.

    Examples
    --------
    >>> float(gaussian_probability(0.5, 0.5).round(6))
    0.841345
    """
    values = np.asarray(radius, dtype=np.float64)
    if np.any(~np.isfinite(values) | (values < 0)):
        raise ValueError(f"radius must be finite and >= 0, got {radius!r}")
    return np.asarray(ndtr(values / check_sigma(sigma)), dtype=np.float64)

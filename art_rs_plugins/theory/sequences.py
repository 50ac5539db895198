"""Sampling until the answer is clear: exact group-sequential tests, an anytime-valid bound, a plan from a pilot.

What may be peeked at, and when, is fixed before the draws: recomputing a fixed-sample bound every 1,000 of 100,000
draws and stopping at the first success errs about ten times as often as it says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betainccinv, betaln, expit, log_expit, logit, ndtr, ndtri

from art_rs_plugins.theory.bounds import _check_counts, check_alpha

__all__ = [
    "GatekeptTable",
    "GroupSequential",
    "Progress",
    "anytime_lower",
    "crossing_probability",
    "group_sequential",
    "log_e_value",
    "plan_draws",
    "schedule",
]

_SPENDING = 0.5
"""Exponent of the spending function: a share t of the draws may have spent a share t ** 0.5 of alpha."""

_UNSPENT = 1e-9
"""Share of alpha never spent. Sums of non-negative terms lose about 1e-11 of themselves, and what the windows leave
out is below 1e-11 of alpha, so that this covers both for every alpha."""

_LEFT_OUT = 1e-12
"""Mass outside the windows of one design, relative to alpha; `crossing_probability` leaves out 1e-30 at each look."""

_CEILING = 30.0
"""Largest logit of a lower bound: 1 - p = 1e-13."""


def _check_looks(looks: Sequence[int]) -> tuple[int, ...]:
    array = np.asarray(looks)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise TypeError(f"looks must be a sequence of integers, at least one, such as schedule(100_000), got {looks!r}")
    if array[0] < 1 or np.any(np.diff(array.astype(np.int64)) < 1):
        raise ValueError(f"looks must be positive and strictly increasing, got {looks!r}")
    return tuple(int(n) for n in array)


def _check_probability(p: float, name: str, *, closed: bool = False) -> float:
    value = float(p)
    if not (0.0 <= value <= 1.0 if closed else 0.0 < value < 1.0):
        raise ValueError(f"{name} must lie in {'[0, 1]' if closed else '(0, 1)'}, got {p}")
    return value


def schedule(n_max: int, first: int = 100, ratio: float = 1.15, step: int = 100) -> tuple[int, ...]:
    """Sample sizes at which to look: geometric, in whole chunks, the last one exactly `n_max`.

    Parameters
    ----------
    n_max : int
        Largest sample size; the only look that need not be a multiple of `step`.
    first : int
        First look, rounded up to a multiple of `step`.
    ratio : float
        Growth from look to look, > 1; at least one `step` each time.
    step : int
        Draws come in chunks of this size.

    Returns
    -------
    tuple of int
        Strictly increasing.

    Raises
    ------
    TypeError, ValueError
        If a size is not an integer or is below 1, the ratio is not above 1, or `n_max` lies below the first look.

    Examples
    --------
    >>> schedule(1000, ratio=2.0)
    (100, 200, 400, 800, 1000)
    """
    for name, size in (("n_max", n_max), ("first", first), ("step", step)):
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {size!r} of type {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not 1.0 < ratio < math.inf:
        raise ValueError(f"ratio must be finite and > 1, such as 1.15, got {ratio}")
    look = -(-first // step) * step
    if n_max < look:
        raise ValueError(f"n_max must be at least the first look, {look}, got {n_max}; lower first or step")
    looks = []
    while look < n_max:
        looks.append(int(look))
        look = max(look + step, round(look * ratio / step) * step)
    return (*looks, int(n_max))


_Masses = tuple[int, NDArray[np.float64]]
"""Probabilities of the counts low, low + 1, ...: the integer `low` and the masses."""


def _window(n: int, p: float, left_out: float) -> tuple[int, int]:
    """Counts beyond which Bin(n, p) has at most `left_out` on each side, by Bernstein's inequality."""
    weight = -math.log(left_out)
    reach = weight / 3.0 + math.sqrt(weight * weight / 9.0 + 2.0 * weight * n * p * (1.0 - p))
    return max(0, math.floor(n * p - reach)), min(n, math.ceil(n * p + reach))


def _binomial(n: int, p: float, left_out: float) -> _Masses:
    """Bin(n, p) within its window, normalised there, so that no event inside is made less likely.

    Products of ratios outward from the mode keep a relative error of a few roundings for each factor, where a
    difference of log-gamma functions loses digits in proportion to n log n.
    """
    low, high = _window(n, p, left_out)
    mode = min(max(math.floor((n + 1) * p), low), high)
    up, down = np.arange(mode, high, dtype=np.float64), np.arange(mode, low, -1, dtype=np.float64)
    above = np.cumprod((n - up) * p / ((up + 1.0) * (1.0 - p)))
    below = np.cumprod(down * (1.0 - p) / ((n - down + 1.0) * p))
    masses = np.concatenate([below[::-1], [1.0], above])
    return low, masses / masses.sum()


def _draw(state: _Masses, draws: int, n: int, p: float, left_out: float) -> _Masses:
    """Law of the count after `draws` more draws, `n` in all, cut to the window of n draws.

    Convolved term by term: all terms are non-negative, so the error is relative to each mass. A transform would be
    wrong by 1e-16 of the largest one, which is more than a small alpha has to spend.
    """
    low, masses = state
    if not masses.size:
        return state
    shift, step = _binomial(draws, p, left_out)
    start, (lowest, highest) = low + shift, _window(n, p, left_out)
    law = np.convolve(masses, step)
    cut = max(lowest - start, 0)
    return start + cut, law[cut : max(highest + 1 - start, cut)]


def _efficacy(p0: float, alpha: float, looks: tuple[int, ...]) -> NDArray[np.int64]:
    """Least counts whose cumulative crossing probability under p0 stays within the spending function."""
    left_out = _LEFT_OUT * alpha / len(looks)
    state: _Masses = 0, np.ones(1)
    boundary, spent, before = [], 0.0, 0
    for n in looks:
        state = _draw(state, n - before, n, p0, left_out)
        before, (low, masses) = n, state
        tail = np.append(np.cumsum(masses[::-1])[::-1], 0.0)   # P(not crossed before, count >= low + i)
        budget = alpha * (1.0 - _UNSPENT) * (n / looks[-1]) ** _SPENDING
        keep = int(np.argmax(spent + tail <= budget))
        spent += float(tail[keep])
        boundary.append(low + keep)
        state = low, masses[:keep]
    return np.array(boundary, dtype=np.int64)


def crossing_probability(
    p: float, looks: Sequence[int], boundary: ArrayLike, futility: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Exact law of the first look at which a binomial count reaches a boundary.

    Parameters
    ----------
    p : float
        Success probability of each draw, in [0, 1].
    looks : sequence of int, length K
        Sample sizes, strictly increasing.
    boundary : array_like of int, shape (K,)
        The look succeeds when the count is at least this; n + 1 where it cannot.
    futility : array_like of int, shape (K,), optional
        Sampling stops in vain when the count is at most this (and below `boundary`); -1 where it cannot.

    Returns
    -------
    ndarray of float64, shape (2, K)
        Row 0: probability of the first success at each look. Row 1: of stopping in vain there. What is left of 1 is
        the probability of doing neither.

    Raises
    ------
    TypeError, ValueError
        For looks that are not increasing integers, boundaries of another shape, p outside [0, 1].

    Notes
    -----
    *Guarantee.* Relative error below 1e-10, plus at most 4e-30 for each look that the windows leave out.

    Examples
    --------
    >>> crossing_probability(0.5, (1, 2), (1, 2))[0].tolist()
    [0.5, 0.0]
    """
    p, looks = _check_probability(p, "p", closed=True), _check_looks(looks)
    bounds, never = [], np.full(len(looks), -1)
    for name, values in (("boundary", boundary), ("futility", never if futility is None else futility)):
        array = np.asarray(values)
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got dtype {array.dtype}")
        if array.shape != (len(looks),):
            raise ValueError(f"{name} must have one entry for each of {len(looks)} looks, got shape {array.shape}")
        bounds.append(array)
    left_out, before = 1e-30, 0
    state: _Masses = 0, np.ones(1)
    law = np.zeros((2, len(looks)))
    for j, n in enumerate(looks):
        low, masses = state = _draw(state, n - before, n, p, left_out)
        before = n
        top = min(max(int(bounds[0][j]) - low, 0), len(masses))
        bottom = min(max(int(bounds[1][j]) + 1 - low, 0), top)
        law[:, j] = masses[top:].sum(), masses[:bottom].sum()
        state = low + bottom, masses[bottom:top]
    return law


@dataclass(frozen=True, slots=True, eq=False)
class GroupSequential:
    """Exact test of "p <= p0" that may stop at any look; made by `group_sequential`.

    Attributes
    ----------
    p0, alpha, beta : float
        Probability to be exceeded; level; level of the futility boundary.
    looks : tuple of int, length K
        Sample sizes.
    efficacy, futility : ndarray of int64, shape (K,), read-only
        "p > p0" is established when the count is at least ``efficacy[j]`` (n_j + 1 where it cannot be), and given up
        when the count is at most ``futility[j]`` (-1 where it cannot be).
    """

    p0: float
    alpha: float
    beta: float
    looks: tuple[int, ...]
    efficacy: NDArray[np.int64]
    futility: NDArray[np.int64]

    def pass_probability(self, p: float) -> float:
        """Return the exact probability of establishing "p > p0", stopping for futility included."""
        return float(crossing_probability(p, self.looks, self.efficacy, self.futility)[0].sum())

    def expected_draws(self, p: float) -> float:
        """Return the exact mean of the draws taken until the test stops."""
        stopped = crossing_probability(p, self.looks, self.efficacy, self.futility).sum(axis=0)
        return float(stopped @ np.asarray(self.looks)) + max(1.0 - float(stopped.sum()), 0.0) * self.looks[-1]


def group_sequential(p0: float, *, looks: Sequence[int], alpha: float = 0.001, beta: float = 0.01) -> GroupSequential:
    """Design an exact group-sequential test of the hypothesis p <= p0.

    Parameters
    ----------
    p0 : float
        Strictly between 0 and 1; ``gaussian_probability(radius, sigma)`` for a decision at one radius.
    looks : sequence of int, length K
        Sample sizes at which the count is compared, such as ``schedule(100_000)``.
    alpha : float
        Probability of establishing "p > p0" although p <= p0, at most.
    beta : float
        Probability of giving up although p >= p0, at most.

    Returns
    -------
    GroupSequential
        Designs are cached: the boundaries depend on the arguments alone.

    Raises
    ------
    TypeError, ValueError
        For looks that are not increasing positive integers, and for p0, alpha, beta outside (0, 1).

    Notes
    -----
    *Guarantee.* If the draws are independent with success probability p <= p0, the probability that the count reaches
    ``efficacy`` at any look is at most alpha. It is computed exactly at p = p0 and increases with p (couple the draws:
    more successes reach a boundary no later). The efficacy boundary ignores the futility boundary, so that giving up,
    at these or any other times, can only lower the probability of a false claim. The mirrored statement holds for
    ``futility``, level beta, and failures.

    Of alpha, (n_j / n_K) ** 0.5 may be spent by look j, times 1 - 1e-9: the reserve is in proportion to alpha because
    rounding is in proportion to the masses that are summed.

    *Source.* Lan and DeMets (1983), "Discrete sequential boundaries for clinical trials", Biometrika 70; the recursion
    over looks is that of Armitage, McPherson and Rowe (1969), here with binomial increments instead of normal ones.

    Examples
    --------
    >>> test = group_sequential(0.84, looks=(100, 200, 400), alpha=0.001)
    >>> test.efficacy.tolist(), test.futility.tolist()
    ([96, 185, 360], [73, 153, 315])
    """
    return _design(
        _check_probability(p0, "p0"), check_alpha(alpha), check_alpha(beta, "beta"), _check_looks(looks)
    )


@lru_cache(maxsize=256)
def _design(p0: float, alpha: float, beta: float, looks: tuple[int, ...]) -> GroupSequential:
    efficacy = _efficacy(p0, alpha, looks)
    futility = np.asarray(looks) - _efficacy(1.0 - p0, beta, looks)
    for boundary in (efficacy, futility):
        boundary.flags.writeable = False
    return GroupSequential(p0, alpha, beta, looks, efficacy, futility)


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """How far b inputs have come through a `GatekeptTable` of m probabilities.

    Attributes
    ----------
    passed : int64, shape (b,)
        Entries of the table that are certified: the first `passed` ones, none if 0. Final where `decided`.
    decided : bool, shape (b,)
        True where no further draw is needed.
    looks : int64, shape (b,)
        Looks taken; where decided, the input stopped at look ``looks - 1``.
    count : int64, shape (b,)
        Successes at the last look taken.
    crossed, futile : bool, shape (b, m)
        Whether the count has ever reached the efficacy boundary of each entry, and its futility boundary.
    """

    passed: NDArray[np.int64]
    decided: NDArray[np.bool_]
    looks: NDArray[np.int64]
    count: NDArray[np.int64]
    crossed: NDArray[np.bool_]
    futile: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class GatekeptTable:
    """Certify as many of several nested claims "p > p_1", ..., "p > p_m" as the draws allow, at one level alpha.

    Parameters
    ----------
    probabilities : sequence of float, length m
        Strictly increasing, in (0, 1): ``gaussian_probability(radii, sigma)`` for a table of radii; one entry for a
        decision at one radius.
    looks : sequence of int, length K
        Sample sizes; see `schedule`.
    alpha, beta : float
        As in `group_sequential`.

    Attributes
    ----------
    efficacy, futility : ndarray of int64, shape (m, K), read-only
        Boundaries of each entry.

    Raises
    ------
    TypeError, ValueError
        For probabilities that do not increase or lie outside (0, 1); else as `group_sequential`.

    Notes
    -----
    *Guarantee.* For each input, with probability at least 1 - alpha, every certified entry is true. For let p_i be the
    smallest entry with p <= p_i. An entry is certified only together with all smaller ones, so a false certificate
    needs the i-th test to cross, which has probability at most alpha; nothing has to be split over the entries.

    *Source.* Fixed-sequence testing: Maurer, Hothorn and Lehmacher (1995); Marcus, Peritz and Gabriel (1976).

    Examples
    --------
    >>> table = GatekeptTable((0.5, 0.84), looks=(100, 200, 400))
    >>> progress = table.decide([[99, 199, 399], [80, 160, 320], [40, 80, 160]])
    >>> progress.passed.tolist(), progress.looks.tolist()
    ([2, 1, 0], [1, 3, 2])
    """

    probabilities: tuple[float, ...]
    looks: tuple[int, ...]
    alpha: float = 0.001
    beta: float = 0.01
    efficacy: NDArray[np.int64] = field(init=False)
    futility: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        probabilities = tuple(float(p) for p in self.probabilities)
        if not probabilities or any(b <= a for a, b in itertools.pairwise(probabilities)):
            raise ValueError(f"probabilities must be strictly increasing, at least one, got {self.probabilities!r}")
        tests = [group_sequential(p, looks=self.looks, alpha=self.alpha, beta=self.beta) for p in probabilities]
        object.__setattr__(self, "probabilities", probabilities)
        object.__setattr__(self, "looks", tests[0].looks)
        for name in ("efficacy", "futility"):
            boundaries = np.stack([getattr(test, name) for test in tests])
            boundaries.flags.writeable = False
            object.__setattr__(self, name, boundaries)

    def start(self, b: int) -> Progress:
        """Return the state of b inputs before their first draw."""
        marks = np.zeros((b, len(self.probabilities)), dtype=bool)
        zeros = np.zeros(b, dtype=np.int64)
        return Progress(zeros, np.zeros(b, dtype=bool), zeros, zeros, marks, marks)

    def advance(self, progress: Progress, count: ArrayLike) -> Progress:
        """Take the next look at every undecided input.

        Parameters
        ----------
        progress : Progress
            State after the looks taken so far, which are equally many for all undecided inputs.
        count : array_like of int, shape (b,)
            Successes among the first ``looks[j]`` draws of each input, j being the look that is due. Draws beyond
            that prefix must wait for their own look. Entries of decided inputs are ignored.

        Returns
        -------
        Progress
            A new state; decided inputs keep theirs.

        Raises
        ------
        TypeError, ValueError
            If counts are not integers, have another shape, or could not have grown out of the last ones.
        """
        counts, active = np.asarray(count), ~progress.decided
        if counts.dtype.kind not in "iu":
            raise TypeError(f"count must be integers, got dtype {counts.dtype}")
        if counts.shape != active.shape:
            raise ValueError(f"count must have shape {active.shape}, one for each input, got {counts.shape}")
        if not active.any():
            return progress
        look = int(progress.looks[active][0])
        grown = counts.astype(np.int64) - progress.count
        n = self.looks[look]
        draws = n - (self.looks[look - 1] if look else 0)
        if np.any((grown[active] < 0) | (grown[active] > draws)):
            raise ValueError(f"count must grow by 0 to {draws} at look {look}: successes in the first {n} draws")
        crossed = progress.crossed | (active[:, None] & (counts[:, None] >= self.efficacy[:, look]))
        futile = progress.futile | (active[:, None] & (counts[:, None] <= self.futility[:, look]))
        passed = np.cumprod(crossed, axis=1, dtype=np.int64).sum(axis=1)
        # the gate: the first entry that has not crossed decides about all the later ones
        gate = np.append(futile, np.ones((len(futile), 1), dtype=bool), axis=1)[np.arange(len(futile)), passed]
        return Progress(
            passed=passed,
            decided=gate | (look + 1 == len(self.looks)),
            looks=progress.looks + active,
            count=np.where(active, counts, progress.count).astype(np.int64),
            crossed=crossed,
            futile=futile,
        )

    def decide(self, counts: ArrayLike) -> Progress:
        """Run b inputs through their looks at once.

        Parameters
        ----------
        counts : array_like of int, shape (b, j)
            Cumulative successes at the first j <= K looks; what lies beyond an input's decision is ignored.

        Returns
        -------
        Progress
            After j looks.

        Raises
        ------
        TypeError, ValueError
            For another shape; else as `advance`.
        """
        table = np.asarray(counts)
        if table.ndim != 2 or table.shape[1] > len(self.looks):
            raise ValueError(f"counts must have shape (b, j) with j <= {len(self.looks)} looks, got {table.shape}")
        progress = self.start(len(table))
        for column in table.T:
            progress = self.advance(progress, column)
        return progress


def _log_e(t: NDArray[np.float64], k: NDArray[np.float64], n: NDArray[np.float64], a: float, b: float
           ) -> NDArray[np.float64]:
    """Logarithm of the e-value at p0 = expit(t); the complement 1 - p0 keeps its digits at both ends."""
    q = expit(-t)
    with np.errstate(divide="ignore"):
        above = np.log(betainc(n - k + b, k + a, q)) - np.log(betainc(b, a, q))
    return np.asarray(betaln(k + a, n - k + b) - betaln(a, b) + above - k * log_expit(t) - (n - k) * log_expit(-t))


def _check_prior(a: float, b: float) -> None:
    if not (0.0 < a <= 1.0 and 0.0 < b < math.inf):
        raise ValueError(f"the prior needs 0 < a <= 1 and b > 0, such as a = b = 0.5, got a = {a} and b = {b}")


def log_e_value(p0: ArrayLike, count: ArrayLike, n: ArrayLike, a: float = 0.5, b: float = 0.5) -> NDArray[np.float64]:
    r"""Logarithm of the evidence against "p <= p0": a Beta(a, b) mixture of likelihood ratios, truncated to (p0, 1].

    Parameters
    ----------
    p0 : array_like of float
        Hypothesis, in (0, 1).
    count, n : array_like of int
        Successes and draws so far; ``0 <= count <= n``, ``n >= 1``.
    a, b : float
        Prior of the alternative, ``0 < a <= 1``, ``b > 0``.

    Returns
    -------
    ndarray of float64
        log e_n(p0), broadcast; -inf where it underflows, far above count / n.

    Raises
    ------
    TypeError, ValueError
        For counts that are not integers or lie outside [0, n], p0 outside (0, 1), and an invalid prior.

    Notes
    -----
    *Guarantee.* For each q > p0 the likelihood ratio of q against p0 has mean at most 1 under every p <= p0, so the
    mixture is a non-negative supermartingale from 1, and P(e_n(p0) >= 1 / alpha for some n) <= alpha (Ville). For
    ``count >= 1`` it decreases in p0 on (0, 1): put q = p0 (1 + h t), h = 1 / p0 - 1, so that it is the quotient of the
    integrals over t in (0, 1) of (1 + h t)^(count + a - 1) (1 - t)^(n - count + b - 1) and (1 + h t)^(a - 1)
    (1 - t)^(b - 1); the first increases in h, the second does not, as a <= 1.

    *Source.* Robbins (1970), "Statistical methods related to the law of the iterated logarithm"; Howard, Ramdas,
    McAuliffe and Sekhon (2021), "Time-uniform, nonparametric, nonasymptotic confidence sequences", one-sided mixtures.

    Examples
    --------
    >>> float(log_e_value(0.5, 20, 20).round(4))
    12.4796
    """
    _check_prior(a, b)
    counts, totals = _check_counts(count, n)
    values = np.asarray(p0, dtype=np.float64)
    if not np.all((values > 0.0) & (values < 1.0)):
        raise ValueError(f"p0 must lie in (0, 1), got {p0!r}")
    return _log_e(np.asarray(logit(values)), counts, totals, a, b)


def anytime_lower(count: ArrayLike, n: ArrayLike, alpha: float, a: float = 0.5, b: float = 0.5) -> NDArray[np.float64]:
    """Lower confidence bound of a binomial probability that holds at all sample sizes at once.

    Parameters
    ----------
    count, n : array_like of int
        Successes and draws so far, broadcast against each other; ``0 <= count <= n``, ``n >= 1``.
    alpha : float
        Probability that any of the bounds fails, strictly between 0 and 1.
    a, b : float
        As in `log_e_value`. Fixed before the draws.

    Returns
    -------
    ndarray of float64
        The p0 with e_n(p0) = 1 / alpha, rounded down; 0 where ``count == 0``.

    Raises
    ------
    TypeError, ValueError
        As `log_e_value`, and for alpha outside (0, 1).

    Notes
    -----
    *Guarantee.* For every p, P(bound(K_n, n) <= p for all n) >= 1 - alpha, K_n being the successes among n independent
    draws. So sampling may stop for any reason, and the largest bound so far (``np.maximum.accumulate``) is one too.

    The price, at count = n = 100,000 and alpha = 0.001, is 1 % of the radius that Clopper-Pearson gives.

    *Source.* As `log_e_value`.

    Examples
    --------
    >>> float(anytime_lower(100, 100, 0.001).round(4)), float(anytime_lower(0, 100, 0.001))
    (0.9225, 0.0)
    """
    check_alpha(alpha)
    _check_prior(a, b)
    counts, totals = np.broadcast_arrays(*_check_counts(count, n))
    # log-gamma functions of n are of size n log n, so the margin for their rounding grows with n
    needed = -math.log(alpha) + 1e-9 + 1e-12 * totals
    with np.errstate(divide="ignore"):
        high = np.clip(logit(counts / totals), -60.0, _CEILING)
    low = np.full(counts.shape, -60.0)
    found = _log_e(low, counts, totals, a, b) >= needed
    for _ in range(60):
        middle = 0.5 * (low + high)
        enough = _log_e(middle, counts, totals, a, b) >= needed
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    # count >= 1 is needed for e to decrease in p0; two floats down cover the rounding of expit
    bound = np.nextafter(np.nextafter(expit(low), 0.0), 0.0)
    return np.where(found & (counts > 0), bound, 0.0)


_EDGES = np.linspace(0.0, 6.0, 301)
"""Edges of the cells of Phi^-1(p) over which `plan_draws` averages; below 0 there is no radius to win."""


@lru_cache(maxsize=16)
def _radii(sizes: tuple[int, ...], alpha: float) -> NDArray[np.float64]:
    """Radius over sigma, shape (cells, sizes), that a share p of successes gives, p at the middle of each cell."""
    failure = ndtr(-0.5 * (_EDGES[1:] + _EDGES[:-1]))[:, None]
    n = np.asarray(sizes, dtype=np.float64)
    return np.asarray(np.maximum(-ndtri(betainccinv(n * failure + 1.0, n * (1.0 - failure), alpha)), 0.0))


def plan_draws(
    pilot_count: ArrayLike, pilot_n: int, *, n_max: int, tolerance: float, alpha: float = 0.001, step: int = 100
) -> NDArray[np.int64]:
    """Choose how many fresh draws to certify each input with, from a pilot.

    It is the least size of ``schedule(n_max, step=step)`` whose Clopper-Pearson radius, in units of sigma, is expected
    to fall short of that of n_max by no more than `tolerance`; over the Jeffreys posterior of p after the pilot.

    Parameters
    ----------
    pilot_count : array_like of int, shape (b,)
        Pilot draws that voted for the class to be certified. The pilot may name the class as well.
    pilot_n : int
        Pilot draws of each input, such as 500.
    n_max : int
        Largest number of draws.
    tolerance : float
        Expected loss of radius over sigma, > 0.
    alpha : float
        Failure probability of the certificate to come.
    step : int
        Draws come in chunks of this size.

    Returns
    -------
    ndarray of int64, shape (b,)
        Sizes of the schedule, the least one where nothing can be won.

    Raises
    ------
    TypeError, ValueError
        For counts outside [0, pilot_n] or not integers, alpha outside (0, 1), a tolerance that is not > 0.

    Notes
    -----
    *Guarantee.* The plan depends on the pilot alone. So if the certificate counts **fresh** draws only, then, given the
    pilot, its n is a constant and a Clopper-Pearson bound at level alpha holds without a correction. Counting the pilot
    draws again would void it: the number of draws would depend on what they show.

    *Source.* Chen et al. (2022), "Input-specific robustness certification for randomized smoothing"; the posterior and
    the fresh draws are ours.

    Examples
    --------
    >>> plan_draws([500, 450, 200], 500, n_max=100_000, tolerance=0.02).tolist()
    [80000, 22700, 100]
    """
    check_alpha(alpha)
    if not 0.0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be finite and > 0 (expected loss of radius over sigma), got {tolerance}")
    counts, totals = _check_counts(pilot_count, pilot_n)
    sizes = schedule(n_max, first=step, step=step)
    below = betainc(totals[..., None] - counts[..., None] + 0.5, counts[..., None] + 0.5, ndtr(-_EDGES))
    expected = (below[..., :-1] - below[..., 1:]) @ _radii(sizes, float(alpha))
    enough = expected >= expected[..., -1:] - tolerance
    return np.asarray(np.asarray(sizes)[np.argmax(enough, axis=-1)], dtype=np.int64)

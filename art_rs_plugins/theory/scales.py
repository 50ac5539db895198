"""Several noise levels, one sound answer: a Lipschitz envelope, a cascade, a certified selector.

To certify each input at the sigma that suits it best speaks of a classifier frozen at that sigma, which is not the one
that answers there: a neighbour may prefer another sigma, and with it another class. The rules here speak of the
classifier that answers. They keep no memory, each input stands for itself, and their settings have to be fixed before
the inputs are seen.

All of them rest on one fact: for any event, sigma Phi^-1(P(event | x + eps)), eps ~ N(0, sigma^2 I), is a 1-Lipschitz
function of x (Salman et al. 2019, lemma 2). A vote that is invalid for any reason is no class, and breaks none of this;
and f may be another network at each level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from art_rs_plugins.theory.bounds import check_alpha, clopper_pearson_lower, clopper_pearson_upper
from art_rs_plugins.theory.establish import Hypotheses, SampleAt, check_radii, establish
from art_rs_plugins.theory.radii import check_sigma, gaussian_radius
from art_rs_plugins.theory.rules import Decision, OneSided
from art_rs_plugins.theory.votes import Votes, check_votes, strongest_rival

__all__ = ["Cascade", "Envelope", "ScaleRule", "Selector", "SequentialScales", "VotesAt"]

_INWARD = 1e-12
"""Relative shrinkage of a difference of scores; their quantiles are accurate to about 1e-15."""

VotesAt = Callable[[int, NDArray[np.int64], int], Votes]
"""Votes (r, k) of n draws at one level, by its number, of the inputs at some positions (r,)."""


class ScaleRule(Protocol):
    """Anything that turns votes at several noise levels into decisions with failure probability `alpha`."""

    @property
    def alpha(self) -> float:
        """Failure probability of one certificate."""
        ...

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise level of each source of votes, by its number."""
        ...

    def run(
        self, select: VotesAt, n0: int, estimate: VotesAt, n: int, size: int
    ) -> tuple[Decision, NDArray[np.float64]]:
        """Decide for `size` inputs, asking for votes only at levels that may matter to an input.

        Parameters
        ----------
        select, estimate : callable
            Votes of n0 draws that name class and level, and of n other draws. What one of them returns must be
            independent of what the other returns; draws of different levels may share their noise.
        n0, n : int
            Selection and estimation draws of an input at one level, invalid ones included.
        size : int
            Number of inputs b.

        Returns
        -------
        Decision, ndarray of float64 (b,)
            The decision with its ``radius``, and the sigma that ``p_lower``, ``p_upper``, ``count``,
            ``runner_up_count`` and ``n`` belong to. ``p_upper`` is the bound of a rival's probability there that, in
            the theorem for one sigma, gives just this radius; it holds, and is seldom the sharpest.

        Raises
        ------
        ValueError, TypeError
            For votes that are no (r, k) table of counts.

        Notes
        -----
        *Guarantee.* For each input, with probability at least 1 - alpha over the draws: either it abstains, or the
        classifier of this rule answers ``prediction`` at every input closer than ``radius``, and so at x itself. To
        predict, run it on fresh draws and leave the radius: a wrong answer has probability at most alpha.
        """
        ...


def _check_levels(sigmas: Sequence[float], *, least: int = 1, descending: bool = False) -> tuple[float, ...]:
    values = check_sigma(sigmas, "sigmas")
    steps = -np.diff(values) if descending else np.diff(values)
    order = "decreasing" if descending else "increasing"
    if values.ndim != 1 or len(values) < least or np.any(steps <= 0):
        raise ValueError(f"sigmas must be at least {least} noise level(s), strictly {order}, got {sigmas!r}")
    return tuple(values.tolist())


def _one_each(values: ArrayLike, sigmas: Sequence[float], name: str) -> tuple[float, ...]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape not in ((), (len(sigmas),)) or not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be one finite number, or one for each of {len(sigmas)} sigmas, got {values!r}")
    return tuple(np.broadcast_to(array, (len(sigmas),)).tolist())


def _decide(
    guess: NDArray[np.int64],
    counts: tuple[NDArray[np.int64], NDArray[np.int64]],
    n: int,
    alpha: float,
    p_upper: NDArray[np.float64],
    radius: NDArray[np.float64],
    sigma: NDArray[np.float64],
) -> tuple[Decision, NDArray[np.float64]]:
    """Put together what was found at sigma, where `p_upper` bounds a rival; see `ScaleRule.run`."""
    count, rival = counts
    failure = clopper_pearson_upper(n - count, n, alpha)
    return Decision(
        prediction=guess,
        abstained=~(radius > 0.0),
        failure=failure,
        p_lower=clopper_pearson_lower(count, n, alpha),
        p_upper=np.maximum(p_upper, ndtr(-ndtri(failure) - 2.0 * radius / sigma)),
        count=count,
        runner_up_count=rival,
        n=np.full(len(count), n, dtype=np.int64),
        radius=radius,
    ), sigma


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a rule has to establish for named radii, from its selection votes: constants from there on.

    Attributes
    ----------
    guess : ndarray of int64, shape (b,)
        Class of each input.
    level : ndarray of int64, shape (b,)
        Level that speaks for the class.
    own, others : list of Hypotheses
        About the class at the level that speaks for it, each input in one of `own`; and about all else. While one of
        either is true at a radius, the classifier's answer may change within it.
    """

    guess: NDArray[np.int64]
    level: NDArray[np.int64]
    own: list[Hypotheses]
    others: list[Hypotheses]


@dataclass(frozen=True, slots=True)
class Envelope:
    r"""Answer with the class that scores best at its best noise level.

    The classifier is H(x) = argmax_c S_c(x), with p_c(x; sigma) = P(f(x + eps) = c) and

    .. math:: S_c(x) = \max_i T_{ic}(x), \qquad T_{ic}(x) = w_i \sigma_i \Phi^{-1}(p_c(x; \sigma_i)) - b_i .

    Parameters
    ----------
    sigmas : sequence of float, length m
        Noise levels, strictly increasing. A level at which the class is unlikely costs radius at every other one.
    weights, offsets : float or sequence of float, length m
        w in (0, 1] and b. With n draws no probability is bounded by less than about log(1 / alpha) / n, so that a
        small sigma cannot tell how unlikely a rival is, and limits every radius to about 2 sigma + S_A / 2; an offset
        b > 0 there lowers what it says, for the class and against it. Choose them with the levels, beforehand.
    alpha : float
        Failure probability of one certificate.
    split : float
        Share of alpha for the class, in (0, 1); the rest is for its rivals.

    Raises
    ------
    ValueError
        For levels that do not increase, weights, offsets or split out of range, and alpha outside (0, 1).

    Notes
    -----
    *Guarantee.* For H; see `ScaleRule.run`. T_ic is w_i-Lipschitz, and S_A >= T_jA for the level j that the selection
    draws named, so H(z) = A wherever ||z - x|| < R = min over i and c != A of (T_jA - T_ic) / (w_j + w_i); for unit
    weights that is (T_jA - max S_c) / 2. Given the selection, one fixed pair (i, c) attains this minimum. The claim
    can exceed R only if the bound of p_A at level j fails, or that of p_c at level i, which is at least the bound
    from the votes of c alone; so the two shares of alpha suffice, whatever the number of levels and classes. At level
    j itself, 1 - p_A bounds p_c as well, in the same event.

    *Source.* Lemma 2 of Salman et al. (2019), "Provably robust deep learning via adversarially trained smoothed
    classifiers"; a maximum of 1-Lipschitz functions is 1-Lipschitz.

    Examples
    --------
    >>> votes = np.array([[980, 20]])
    >>> decision, sigma = Envelope((0.25, 0.5)).run(lambda *_: votes, 1000, lambda *_: votes, 1000, 1)
    >>> float(decision.radius[0].round(3)), float(sigma[0])   # less than 0.5 * 1.768
    (0.66, 0.5)
    """

    sigmas: Sequence[float]
    weights: float | Sequence[float] = 1.0
    offsets: float | Sequence[float] = 0.0
    alpha: float = 0.001
    split: float = 0.9

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if not 0.0 < self.split < 1.0:
            raise ValueError(f"split must lie strictly between 0 and 1, such as 0.9, got {self.split}")
        object.__setattr__(self, "sigmas", _check_levels(self.sigmas))
        for name in ("weights", "offsets"):
            object.__setattr__(self, name, _one_each(getattr(self, name), self.sigmas, name))
        if not np.all((np.array(self.weights) > 0.0) & (np.array(self.weights) <= 1.0)):
            raise ValueError(f"weights must lie in (0, 1]; leave a level out rather than give it 0, got {self.weights}")

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise level of each source of votes: those of `sigmas`."""
        return tuple(self.sigmas)

    def _terms(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """T of probabilities (m, b, ...)."""
        shape = (-1, *[1] * (probabilities.ndim - 1))
        slope, offset = np.multiply(self.weights, self.sigmas).reshape(shape), np.reshape(self.offsets, shape)
        return np.asarray(slope * ndtri(probabilities) - offset, dtype=np.float64)

    def scores(self, probabilities: ArrayLike) -> NDArray[np.float64]:
        """Scores S_c (b, k) of exact probabilities (m, b, k): H answers with the largest."""
        return np.asarray(self._terms(np.asarray(probabilities, dtype=np.float64)).max(axis=0))

    def run(
        self, select: VotesAt, n0: int, estimate: VotesAt, n: int, size: int
    ) -> tuple[Decision, NDArray[np.float64]]:
        """Decide from votes at every level; see `ScaleRule`. The sigma returned is the best one for the class."""
        rows, numbers = np.arange(size), range(len(self.sigmas))
        guess, best, _ = self._named(select, n0, size)
        votes = np.stack([check_votes(estimate(i, rows, n), n, "estimation") for i in numbers])
        rivals = np.stack([strongest_rival(table, guess, n) for table in votes])
        count, share = votes[best, rows, guess], self.split * self.alpha
        failure = clopper_pearson_upper(n - count, n, share)
        upper = clopper_pearson_upper(rivals, n, (1.0 - self.split) * self.alpha)
        upper[best, rows] = np.minimum(upper[best, rows], failure)
        radius, sigma = self._radius(best, failure, upper), np.array(self.sigmas)[best]
        return _decide(guess, (count, rivals[best, rows]), n, share, upper[best, rows], radius, sigma)

    def _named(
        self, select: VotesAt, n0: int, size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Class and level (b,) that the selection votes name, and the middle (b,) between its score and the next."""
        rows = np.arange(size)
        first = np.stack([check_votes(select(i, rows, n0), n0, "selection") for i in range(len(self.sigmas))])
        terms = self._terms(np.asarray((first + 0.5) / (n0 + 1.0), dtype=np.float64))
        scores = terms.max(axis=0)
        guess = scores.argmax(axis=1)
        best = terms[:, rows, guess].argmax(axis=0)
        top, scores[rows, guess] = scores[rows, guess], -np.inf
        return guess.astype(np.int64), best, 0.5 * (top + scores.max(axis=1))

    def plan(self, select: VotesAt, n0: int, size: int, radii: Sequence[float]) -> Plan:
        """What to establish for named radii; see `SequentialScales`."""
        guess, best, middle = self._named(select, n0, size)
        slope, offset, weight = np.multiply(self.weights, self.sigmas), np.array(self.offsets), np.array(self.weights)
        step = 0.1 * slope.min()   # few middles, so that inputs share their boundaries
        middle, reach = step * np.round(middle / step)[:, None], np.array(radii)
        own, others = [], []
        for i in range(len(self.sigmas)):
            low = ndtr(-(middle + weight[i] * reach + offset[i]) / slope[i])
            high = ndtr((middle - weight[i] * reach + offset[i]) / slope[i])
            own.append(Hypotheses(i, guess, low, best == i))
            others.append(Hypotheses(i, guess, high, best >= 0, rival=True))
        return Plan(guess, best, own, others)

    def _radius(
        self, best: NDArray[np.int64], failure: NDArray[np.float64], upper: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """R (b,) for the class at levels `best` (b,), from bounds `upper` (m, b) of its rivals; 0 if not positive."""
        slope, offset, weight = np.multiply(self.weights, self.sigmas), np.array(self.offsets), np.array(self.weights)
        mine, theirs = -slope[best] * ndtri(failure), slope[:, None] * ndtri(upper)
        magnitude = np.abs(mine) + np.abs(theirs) + np.abs(offset[best]) + np.abs(offset)[:, None]
        with np.errstate(invalid="ignore"):
            gap = (mine - offset[best]) - (theirs - offset[:, None]) - _INWARD * magnitude
            radius = (gap / (weight[best] + weight[:, None])).min(axis=0)
        return np.where(np.isfinite(radius) & (radius > 0.0), radius, 0.0)


@dataclass(frozen=True, slots=True)
class Cascade:
    r"""Answer at the first noise level that is sure enough, from the largest sigma to the smallest.

    The classifier goes through the levels j = 1, 2, ... and answers c at the first one with
    p_c(x; sigma_j) > t_j; if there is none, it abstains.

    Parameters
    ----------
    sigmas : sequence of float, length m
        Noise levels, strictly decreasing.
    threshold : float or sequence of float, length m
        t in [1/2, 1). At 1/2 a level passes on only what has no majority, which suits the last one.
    alpha : float
        Failure probability of one certificate.

    Raises
    ------
    ValueError
        For levels that do not decrease, thresholds out of range (below 1/2 two classes could pass at once), and alpha
        outside (0, 1).

    Notes
    -----
    *Guarantee.* For this classifier; see `ScaleRule.run`. Let the selection draws name a level j and a class c. Closer
    than sigma_j (Phi^-1(p_c(sigma_j)) - Phi^-1(t_j)), c passes at j, and no other class does, as t_j >= 1/2; closer
    than sigma_i (Phi^-1(t_i) - Phi^-1(p_o(sigma_i))) for all o != c and all i < j, none but c passes before. So the
    answer is c within R, the least of these terms. Only the estimate of the one that is least in truth has to hold for
    the claim to be at most R, so each bound takes the whole alpha.

    *Source.* Jeong and Shin (2023), "Multi-scale diffusion denoised smoothing", for the cascade. Their bounds are
    asymptotic and their level is chosen on the estimation draws; here they are exact, and it is not.

    Examples
    --------
    >>> votes = np.array([[990, 10]])
    >>> decision, sigma = Cascade((1.0, 0.5), 0.7).run(lambda *_: votes, 1000, lambda *_: votes, 1000, 1)
    >>> float(decision.radius[0].round(3)), float(sigma[0])
    (1.454, 1.0)
    """

    sigmas: Sequence[float]
    threshold: float | Sequence[float] = 0.5
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        object.__setattr__(self, "sigmas", _check_levels(self.sigmas, descending=True))
        object.__setattr__(self, "threshold", _one_each(self.threshold, self.sigmas, "threshold"))
        if not np.all((np.array(self.threshold) >= 0.5) & (np.array(self.threshold) < 1.0)):
            raise ValueError(f"threshold must lie in [0.5, 1), so that only one class can pass, got {self.threshold}")

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise level of each source of votes: those of `sigmas`."""
        return tuple(self.sigmas)

    def run(
        self, select: VotesAt, n0: int, estimate: VotesAt, n: int, size: int
    ) -> tuple[Decision, NDArray[np.float64]]:
        """Decide from votes down to the level that accepts; see `ScaleRule`. The sigma returned is that level's."""
        level, guess = self._descend(select, n0, size)
        radius, failure = np.full(size, np.inf), np.ones(size)
        count, rival = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        for i, (sigma, threshold) in enumerate(zip(self.sigmas, np.array(self.threshold), strict=True)):
            rows = np.flatnonzero(level >= i)
            if not len(rows):
                break
            votes = check_votes(estimate(i, rows, n), n, "estimation")
            count[rows] = votes[np.arange(len(rows)), guess[rows]]   # the last level asked is the one that accepts
            rival[rows] = strongest_rival(votes, guess[rows], n)
            failure[rows] = clopper_pearson_upper(n - count[rows], n, self.alpha)
            upper = clopper_pearson_upper(rival[rows], n, self.alpha)
            accepts = 2.0 * gaussian_radius(failure[rows], threshold, sigma)
            passes = 2.0 * gaussian_radius(1.0 - threshold, upper, sigma)
            radius[rows] = np.minimum(radius[rows], np.where(level[rows] == i, accepts, passes))
        return _decide(guess, (count, rival), n, self.alpha, failure, radius, np.array(self.sigmas)[level])

    def plan(self, select: VotesAt, n0: int, size: int, radii: Sequence[float]) -> Plan:
        """What to establish for named radii; see `SequentialScales`."""
        level, guess = self._descend(select, n0, size)
        own, others = [], []
        for i, (sigma, threshold) in enumerate(zip(self.sigmas, ndtri(np.array(self.threshold)), strict=True)):
            steps = np.broadcast_to(np.array(radii) / sigma, (size, len(radii)))
            own.append(Hypotheses(i, guess, ndtr(-threshold - steps), level == i))
            others.append(Hypotheses(i, guess, ndtr(threshold - steps), level > i, rival=True))
        return Plan(guess, level, own, others)

    def _descend(self, select: VotesAt, n0: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Level and class (b,) that the selection votes name; the last level takes whatever comes."""
        level, guess = np.full(size, len(self.sigmas) - 1), np.zeros(size, dtype=np.int64)
        waiting = np.arange(size)
        for i, threshold in enumerate(np.array(self.threshold)):
            if not len(waiting):
                break
            votes = check_votes(select(i, waiting, n0), n0, "selection")
            guess[waiting] = votes.argmax(axis=1)
            passed = votes.max(axis=1) > threshold * n0
            level[waiting[passed]] = i
            waiting = waiting[~passed]
        return level, guess


@dataclass(frozen=True, slots=True)
class Selector:
    r"""Let a smoothed network choose the noise level, and answer with the smoothed classifier of that level.

    The classifier is h(x) = argmax_c P(f(x + eps) = c), eps ~ N(0, sigma_s^2 I), for the level s = s(x) =
    argmax_i P(e(x + eps) = i), eps ~ N(0, sigma_e^2 I), of a selector network e with one output for each level.

    Parameters
    ----------
    sigmas : sequence of float, length m >= 2
        Noise levels to choose from, strictly increasing.
    selector_sigma : float
        Noise level of the selector. Below the largest of `sigmas`, it would tend to limit the radius.
    alpha : float
        Failure probability of one certificate.

    Raises
    ------
    ValueError
        For fewer than two levels, levels that do not increase, a sigma that is not positive, alpha outside (0, 1).

    Notes
    -----
    *Guarantee.* For h; see `ScaleRule.run`. Let the selection draws name a level s and a class A. Within the radius of
    the selector h is the smoothed classifier of level s, and within the radius of that one it answers A: so h(z) = A
    closer than R, the smaller of the two. Only the estimate of the one that is smaller in truth has to hold for the
    claim to be at most R, so each takes the whole alpha. A selector that chooses badly costs radius, never truth.

    *Source.* Sun, Mao and Vechev (2026), "Dual randomized smoothing", arXiv 2512.01782, who split alpha.

    Examples
    --------
    >>> votes = np.array([[990, 10], [990, 10], [0, 1000]])   # at both levels, and of the selector
    >>> def votes_at(level, rows, n):
    ...     return votes[[level]]
    >>> decision, sigma = Selector((0.25, 0.5), selector_sigma=0.5).run(votes_at, 1000, votes_at, 1000, 1)
    >>> float(decision.radius[0].round(3)), float(sigma[0])
    (0.989, 0.5)
    """

    sigmas: Sequence[float]
    selector_sigma: float
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        object.__setattr__(self, "sigmas", _check_levels(self.sigmas, least=2))
        object.__setattr__(self, "selector_sigma", float(check_sigma(self.selector_sigma, "selector_sigma")))

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise level of each source of votes: those of `sigmas` for f, and then the selector's for e."""
        return (*self.sigmas, self.selector_sigma)

    def run(
        self, select: VotesAt, n0: int, estimate: VotesAt, n: int, size: int
    ) -> tuple[Decision, NDArray[np.float64]]:
        """Decide from votes at the chosen level; see `ScaleRule`. Source m gives the selector's votes, (r, m)."""
        everyone, m = np.arange(size), len(self.sigmas)
        first = self._chosen(select, n0, size)
        choice = OneSided(self.alpha).decide(first, estimate(m, everyone, n), n)
        sigma, failure = np.array(self.sigmas)[choice.prediction], np.ones(size)
        guess, count, rival = (np.zeros(size, dtype=np.int64) for _ in range(3))
        for level in np.unique(choice.prediction).tolist():
            rows = np.flatnonzero(choice.prediction == level)
            first = check_votes(select(level, rows, n0), n0, "selection")
            part = OneSided(self.alpha).decide(first, estimate(level, rows, n), n)
            guess[rows], count[rows], rival[rows] = part.prediction, part.count, part.runner_up_count
            failure[rows] = part.failure
        reach = gaussian_radius(choice.failure, choice.failure, self.selector_sigma)
        radius = np.minimum(reach, gaussian_radius(failure, failure, sigma))
        return _decide(guess, (count, rival), n, self.alpha, failure, radius, sigma)

    def _chosen(self, select: VotesAt, n0: int, size: int) -> Votes:
        """Selection votes (b, m) of the selector."""
        m = len(self.sigmas)
        first = check_votes(select(m, np.arange(size), n0), n0, "selection")
        if first.shape[1] != m:
            raise ValueError(f"the selector needs {m} outputs, one for each of sigmas; its votes have {first.shape[1]}")
        return first

    def plan(self, select: VotesAt, n0: int, size: int, radii: Sequence[float]) -> Plan:
        """What to establish for named radii; see `SequentialScales`."""
        m, reach = len(self.sigmas), np.array(radii)
        level = self._chosen(select, n0, size).argmax(axis=1)
        limits = np.broadcast_to(ndtr(-reach / self.selector_sigma), (size, len(radii)))
        guess, own, chooser = np.zeros(size, dtype=np.int64), [], Hypotheses(m, level, limits, level >= 0)
        for i in np.unique(level).tolist():
            rows = np.flatnonzero(level == i)
            guess[rows] = check_votes(select(i, rows, n0), n0, "selection").argmax(axis=1)
            limits = np.broadcast_to(ndtr(-reach / self.sigmas[i]), (size, len(radii)))
            own.append(Hypotheses(i, guess, limits, level == i))
        return Plan(guess, level, own, [chooser])


@dataclass(frozen=True, slots=True)
class SequentialScales:
    """Establish as many of several named radii as possible for a classifier over noise levels, stopping when clear.

    Parameters
    ----------
    rule : Envelope, Cascade or Selector
        The classifier.
    radii : sequence of float, length m
        l2 radii in the units of the input, >= 0 and strictly increasing.
    alpha : float, optional
        Failure probability of one certificate, for all its radii together; that of `rule` by default, whose split has
        no say here.
    beta : float
        Probability of giving one of the tests up too early, at most; it costs power, never truth.

    Raises
    ------
    TypeError, ValueError
        For another rule, radii that are negative, not finite or not increasing, and alpha or beta outside (0, 1).

    Notes
    -----
    *Guarantee.* That of `ScaleRule`, with a radius that is one of those named. Let R be the radius of the classifier
    for the class and level that the selection draws name: the least of several terms, each about one class at one
    level. Where R <= r, one of the hypotheses of r is true; see `establish` for the rest. What they are:

    1. Cascade: R is the least of sigma_j (Phi^-1(p_c(sigma_j)) - Phi^-1(t_j)) and, at the levels i before j and for the
       other classes o, sigma_i (Phi^-1(t_i) - Phi^-1(p_o(sigma_i))). R <= r if one of these is: that is, if
       1 - p_c(sigma_j) >= Phi(-Phi^-1(t_j) - r / sigma_j) or p_o(sigma_i) >= Phi(Phi^-1(t_i) - r / sigma_i).
    2. Selector: R is the smaller radius of the selector and of the chosen level: 1 - p >= Phi(-r / sigma) at one of
       both.
    3. Envelope: R is the least of (T_jA - T_ic) / (w_j + w_i). For any constant `middle`, R <= r means that
       T_jA <= middle + w_j r or T_ic >= middle - w_i r for some i and c; else their difference would exceed
       (w_j + w_i) r. The middle is taken halfway between the scores in the selection votes; what it is off costs as
       much radius, and never truth, so that an envelope is worth some 500 selection draws.

    Examples
    --------
    >>> chances = np.array([[0.99, 0.01]])
    >>> def votes_at(level, rows, *draws):
    ...     size = draws[-1] - (draws[0] if len(draws) > 1 else 0)
    ...     return np.random.default_rng(draws[-1]).multinomial(size, chances[rows])
    >>> rule = SequentialScales(Cascade((1.0, 0.5), 0.7), (0.5, 1.0, 2.0))
    >>> decision, sigma = rule.run(votes_at, 100, votes_at, 10_000, 1)
    >>> float(decision.radius[0]), float(sigma[0]), bool(decision.n[0] < 10_000)
    (1.0, 1.0, True)
    """

    rule: Envelope | Cascade | Selector
    radii: Sequence[float]
    alpha: float = None   # type: ignore[assignment]   # a number from here on
    beta: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Envelope | Cascade | Selector):
            raise TypeError(f"rule must be an Envelope, Cascade or Selector, got {self.rule!r}")
        given: float | None = self.alpha
        object.__setattr__(self, "alpha", check_alpha(self.rule.alpha if given is None else given))
        object.__setattr__(self, "rule", replace(self.rule, alpha=self.alpha))
        object.__setattr__(self, "radii", check_radii(self.radii))
        check_alpha(self.beta, "beta")

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise level of each source of votes."""
        return self.rule.levels

    def run(
        self, select: VotesAt, n0: int, sample: SampleAt, n: int, size: int
    ) -> tuple[Decision, NDArray[np.float64]]:
        """Decide with at most n draws at each level; see `ScaleRule`. ``ValueError`` if n is below the first look."""
        plan, each = self.rule.plan(select, n0, size, self.radii), np.arange(size)
        classes = [select(level, each[:0], n0).shape[1] for level in range(len(self.levels))]
        found = establish([*plan.own, *plan.others], sample, n, classes, self.alpha, self.beta)
        passed, sigma = found.passed, np.array(self.levels)[plan.level]
        radius, failure = np.array([0.0, *self.radii])[passed], np.ones(size)
        votes, taken = np.zeros(size, dtype=np.int64), found.taken[plan.level, each]
        rival = np.zeros(size, dtype=np.int64)
        for hypotheses in plan.own:
            rows, table = np.flatnonzero(hypotheses.asked), found.votes[hypotheses.level]
            known = rows[passed[rows] > 0]
            failure[known] = hypotheses.limits[known, passed[known] - 1]
            votes[rows] = table[rows, plan.guess[rows]]
            rival[rows] = strongest_rival(table[rows], plan.guess[rows], taken[rows])
        return Decision(
            prediction=plan.guess,
            abstained=passed == 0,
            failure=failure,
            p_lower=1.0 - failure,
            # of an envelope this is the limit of its rivals at that level; else it is `failure` or more
            p_upper=np.where(passed > 0, ndtr(-ndtri(failure) - 2.0 * radius / sigma), 1.0),
            count=votes,
            runner_up_count=rival,
            n=taken,
            radius=radius,
        ), sigma

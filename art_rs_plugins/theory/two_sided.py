"""Rules that bound the runner-up as well: longer radii where the rest of the votes is spread, even below p_A = 1/2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from art_rs_plugins.theory.bounds import check_alpha, clopper_pearson_lower, clopper_pearson_upper
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import Decision, Sample, Sequential
from art_rs_plugins.theory.votes import Votes, check_votes, strongest_rival

__all__ = ["SequentialTwoSided", "TwoSided"]

_SPLITS = np.arange(99, 0, -1) / 100.0
"""Splits to choose from; of equally good ones the largest is taken, which leaves most to the bound of p_A."""


@dataclass(frozen=True, slots=True)
class TwoSided:
    """Bound p_A from below and every rival from above, each with its share of alpha.

    Parameters
    ----------
    alpha : float
        Failure probability of one certificate, strictly between 0 and 1.
    split : float, optional
        Share of alpha for the bound of p_A, strictly between 0 and 1; the rivals' bound gets the rest. None chooses it
        for each input, among 0.01, ..., 0.99, as the one of the longest radius if the selection votes recurred.

    Raises
    ------
    ValueError
        For alpha or split outside (0, 1).

    Notes
    -----
    *Guarantee.* With probability at least 1 - alpha over the estimation draws, p_A >= p_lower and p_c <= p_upper for
    every other class c. The selection draws alone name the class A and the split, so that given them both are
    constants. Let c* be the most probable class besides A, which is fixed as well. The bound of the rivals is taken at
    the largest of their counts, plus the invalid votes; it increases with the count, and the count of c* is no larger,
    so it fails only where the bound of c* alone would: there is no correction for the number of classes, and no guess
    who the runner-up is. Where p_A >= p_lower, no rival exceeds 1 - p_lower either, and the smaller bound is reported.

    The radius is never shorter than that of ``OneSided(split * alpha)``, and it can be positive with p_A < 1/2.

    *Source.* After Feng et al. (2020), "Regularized training and tight certification for randomized smoothed classifier
    with provable robustness", who bound the two probabilities separately; the fixed split and the proof are ours.

    Examples
    --------
    >>> selection, votes = np.array([[50, 10, 40]]), np.array([[4000, 2900, 3100]])
    >>> decision = TwoSided(alpha=0.001).decide(selection, votes, 10_000)
    >>> bool(decision.abstained[0]), float(decision.p_lower[0].round(4)), float(decision.p_upper[0].round(4))
    (False, 0.3847, 0.3274)
    """

    alpha: float = 0.001
    split: float | None = 0.9

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.split is not None and not 0.0 < self.split < 1.0:
            raise ValueError(f"split must be None or lie strictly between 0 and 1 (a share of alpha), got {self.split}")

    def decide(self, selection: Votes, estimation: Votes, n: int) -> Decision:
        """Decide for each of b inputs.

        Parameters
        ----------
        selection : ndarray of int64, shape (b, k)
            Votes that name the class, and the split where it is None.
        estimation : ndarray of int64, shape (b, k)
            Votes of other draws; never the same ones.
        n : int
            Estimation draws behind each row, invalid ones included.

        Returns
        -------
        Decision
            Abstains where p_A > p_c is not established for every other class c.
        """
        votes = check_votes(estimation, n, "estimation")
        pilot = check_votes(selection, np.iinfo(np.int64).max, "selection")
        guess = pilot.argmax(axis=1).astype(np.int64)
        count, rival = votes[np.arange(len(votes)), guess], strongest_rival(votes, guess, n)
        failure, p_lower, p_upper = np.ones(len(votes)), np.zeros(len(votes)), np.ones(len(votes))
        splits = self._splits(pilot, guess, n)
        for split in np.unique(splits).tolist():
            rows = splits == split
            failure[rows], p_upper[rows] = self._bounds(count[rows], rival[rows], n, split)
            p_lower[rows] = clopper_pearson_lower(count[rows], n, split * self.alpha)
        return Decision(
            prediction=guess,
            abstained=~(p_upper < 1.0 - failure),
            failure=failure,
            p_lower=p_lower,
            p_upper=p_upper,
            count=count,
            runner_up_count=rival,
            n=np.full(len(votes), n, dtype=np.int64),
        )

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide from all n draws; see `Rule`."""
        return self.decide(check_votes(selection, n0, "selection"), sample(np.arange(len(selection)), 0, n), n)

    def _bounds(
        self, count: NDArray[np.int64], rival: NDArray[np.int64], n: int, split: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Upper bounds of 1 - p_A and of any rival's probability."""
        failure = clopper_pearson_upper(n - count, n, split * self.alpha)
        return failure, np.minimum(clopper_pearson_upper(rival, n, (1.0 - split) * self.alpha), failure)

    def _splits(self, pilot: Votes, guess: NDArray[np.int64], n: int) -> NDArray[np.float64]:
        """Split of each input, from the selection votes (b, k) alone."""
        if self.split is not None:
            return np.full(len(pilot), self.split)
        total = np.maximum(pilot.sum(axis=1), 1)
        count, rival = (votes * n // total for votes in (pilot.max(axis=1), strongest_rival(pilot, guess, total)))
        radii = [gaussian_radius(*self._bounds(count, rival, n, split), 1.0) for split in _SPLITS.tolist()]
        return np.asarray(_SPLITS[np.argmax(radii, axis=0)], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class SequentialTwoSided(Sequential):
    """Establish as many of several named radii as possible by p_A and its rivals, stopping when clear.

    Parameters
    ----------
    radii : sequence of float, length m
        l2 radii in the units of the input, >= 0 and strictly increasing; one for a yes or no.
    alpha : float
        Failure probability of one certificate, for all its radii together; it is not split.
    beta : float
        Probability of giving either of the two tests of a radius up too early, at most; it costs power, never truth.

    Raises
    ------
    ValueError
        For radii that are negative, not finite or not increasing, and for alpha or beta outside (0, 1).

    Notes
    -----
    *Guarantee.* With probability at least 1 - alpha, the certified radius of an input is true, and so are p_lower and
    p_upper. Let R = sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)), p_B the largest of the rivals' probabilities.

    1. Each radius r is tested at a pair with Phi^-1(a) - Phi^-1(b) = 2 r / sigma: a = Phi(middle + r / sigma),
       b = Phi(middle - r / sigma). If R <= r, then p_A <= a or p_B >= b; else the difference would exceed 2 r / sigma.
    2. r is established when "p_A <= a" and "p_B >= b" are both rejected, by exact group-sequential tests of level alpha
       that look at the votes at scheduled times. One of the two is true, so this happens with probability at most
       alpha (an intersection-union test). The second counts the draws that went neither to the strongest rival nor
       astray; these are at most the draws that missed the most probable rival c*, a fixed class, and these succeed
       with probability 1 - p_B <= 1 - b: again there is no correction for the number of classes.
    3. Radii count only together with all smaller ones, so that a false certificate needs the first radius with a true
       hypothesis to pass: nothing is split over the radii.

    The middle is a constant given the selection draws, which choose it: the mean of both quantiles in their votes, in
    steps of 0.1. It decides power and draws alone; with the true mean every r < R is within reach. It is never above 0,
    as p_A + p_B <= 1; at 0 the rule is `Sequential`, as it always is with two classes. Some 500 selection draws pay
    where p_A is far from 1.

    *Source.* Berger (1982), "Multiparameter hypothesis testing and acceptance sampling", for the combination; else as
    `Sequential`.

    Examples
    --------
    >>> chances = np.array([0.4, 0.15, 0.15, 0.15, 0.15])
    >>> selection = np.random.default_rng(0).multinomial(500, chances, 1)
    >>> def sample(rows, start, stop):
    ...     return np.random.default_rng(stop).multinomial(stop - start, chances, len(rows))
    >>> for rule in (Sequential((0.1,)), SequentialTwoSided((0.1,))):
    ...     print(rule.run(selection, 500, sample, 10_000, np.array([0.5])).radius)
    [0.]
    [0.1]
    """

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide with at most n draws; see `Rule`. ``ValueError`` if n is below the first look."""
        pilot = check_votes(selection, n0, "selection")
        counts = np.stack([pilot.max(axis=1), strongest_rival(pilot, pilot.argmax(axis=1), n0)])
        quantiles = ndtri((counts + 0.5) / (n0 + 1.0))   # finite; their sum is <= 0, as the two shares sum to <= 1
        middle, steps = np.round(5.0 * quantiles.sum(axis=0))[:, None] / 10.0, self._steps(sigma)
        return self._establish(pilot, [ndtr(-middle - steps), ndtr(middle - steps)], sample, n)

"""From vote tables to a decision: the class, a bound of its probability, a bound of its rivals'; see `theory.votes`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from art_rs_plugins.theory.bounds import check_alpha, clopper_pearson_lower, clopper_pearson_upper, top_two_p_value
from art_rs_plugins.theory.establish import Hypotheses, check_radii, establish
from art_rs_plugins.theory.sequences import plan_draws
from art_rs_plugins.theory.votes import Votes, check_votes, strongest_rival

__all__ = [
    "Decision",
    "Marginal",
    "OneSided",
    "Planned",
    "Rule",
    "Sample",
    "Sequential",
    "SequentialUnder",
    "TopTwo",
    "Verdict",
    "by_part",
    "under",
]

@dataclass(frozen=True, slots=True)
class Decision:
    """What a rule concludes from the votes of b inputs; every field has shape (b,).

    Attributes
    ----------
    prediction : int64
        The class that the selection votes named.
    abstained : bool
        True where no radius can be certified.
    failure : float64
        Upper bound of 1 - p_A.
    p_lower, p_upper : float64
        Lower bound of p_A, upper bound of every rival's probability.
    count, runner_up_count : int64
        Estimation votes of the class, and of its strongest rival with the invalid votes added.
    n : int64
        Estimation draws that were taken.
    radius : float64, optional
        Where radii were named beforehand, the largest that was established; otherwise it follows from the bounds.
    """

    prediction: NDArray[np.int64]
    abstained: NDArray[np.bool_]
    failure: NDArray[np.float64]
    p_lower: NDArray[np.float64]
    p_upper: NDArray[np.float64]
    count: NDArray[np.int64]
    runner_up_count: NDArray[np.int64]
    n: NDArray[np.int64]
    radius: NDArray[np.float64] | None = None


Sample = Callable[[NDArray[np.int64], int, int], Votes]
"""Estimation votes (r, k) among the draws start, ..., stop - 1 of the inputs at some positions (r,)."""


class Rule(Protocol):
    """Anything that turns votes into a `Decision` with failure probability `alpha`: a frozen dataclass.

    A rule asks for the estimation draws that it wants, in order of their numbers, and learns nothing of later ones.
    """

    @property
    def alpha(self) -> float:
        """Failure probability of one certificate."""
        ...

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide for b inputs.

        Parameters
        ----------
        selection : ndarray of int64, shape (b, k)
            Votes of n0 selection draws, which share none with the estimation.
        n0 : int
            Selection draws behind each row, invalid ones included.
        sample : callable
            Estimation votes on demand.
        n : int
            Estimation draws of each input at most.
        sigma : ndarray of float64, shape (b,)
            Noise level of each input.
        """
        ...


@dataclass(frozen=True, slots=True)
class OneSided:
    """Bound p_A from below and give every rival the rest: the rule of Cohen et al.

    Parameters
    ----------
    alpha : float
        Failure probability of one certificate, strictly between 0 and 1.

    Notes
    -----
    *Guarantee.* The selection votes name a class A; given A, the estimation votes for it are Bin(n, p_A), because they
    come from draws of their own. So with probability at least 1 - alpha over the estimation draws, p_A >= p_lower, and
    every other class has probability at most 1 - p_lower. Invalid votes are simply not votes for A.

    *Source.* Cohen et al. (2019), CERTIFY and proposition 2.

    Examples
    --------
    >>> votes = np.array([[990, 10]])
    >>> decision = OneSided(alpha=0.001).decide(votes, votes, 1000)
    >>> int(decision.prediction[0]), float(decision.p_lower[0].round(4))
    (0, 0.976)
    """

    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def decide(self, selection: Votes, estimation: Votes, n: int) -> Decision:
        """Decide for each of b inputs.

        Parameters
        ----------
        selection : ndarray of int64, shape (b, k)
            Votes that name the class.
        estimation : ndarray of int64, shape (b, k)
            Votes of other draws; never the same ones.
        n : int
            Estimation draws behind each row, invalid ones included.

        Returns
        -------
        Decision
            ``p_upper`` equals ``failure``. Abstains where p_A > 1/2 is not established.
        """
        votes = check_votes(estimation, n, "estimation")
        guess = check_votes(selection, np.iinfo(np.int64).max, "selection").argmax(axis=1)
        count = votes[np.arange(len(votes)), guess]
        failure = clopper_pearson_upper(n - count, n, self.alpha)
        return Decision(
            prediction=guess.astype(np.int64),
            abstained=~(failure < 0.5),
            failure=failure,
            p_lower=clopper_pearson_lower(count, n, self.alpha),
            p_upper=failure,
            count=count,
            runner_up_count=strongest_rival(votes, guess, n),
            n=np.full(len(votes), n, dtype=np.int64),
        )

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide from all n draws; see `Rule`."""
        return self.decide(selection, sample(np.arange(len(selection)), 0, n), n)


@dataclass(frozen=True, slots=True)
class Sequential:
    """Establish as many of several named radii as possible, looking at the votes on the way and stopping when clear.

    Parameters
    ----------
    radii : sequence of float, length m
        l2 radii in the units of the input, >= 0 and strictly increasing; one for a yes or no.
    alpha : float
        Failure probability of one certificate, for all its radii together.
    beta : float
        Probability of giving a radius up too early, at most; it costs power, never truth.

    Raises
    ------
    ValueError
        For radii that are negative, not finite or not increasing, and for alpha or beta outside (0, 1).

    Notes
    -----
    *Guarantee.* With probability at least 1 - alpha, the certified radius of an input is true: an exact
    group-sequential test of "p_A <= Phi(r / sigma)" for each r, in ascending order; see
    `theory.sequences.GatekeptTable`. Looks are scheduled beforehand. The radius reported is one of those named.

    *Source.* See `theory.sequences.group_sequential`.
    """

    radii: tuple[float, ...]
    alpha: float = 0.001
    beta: float = 0.01

    def __post_init__(self) -> None:
        check_alpha(self.alpha), check_alpha(self.beta, "beta")
        object.__setattr__(self, "radii", check_radii(self.radii))

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide with at most n draws; see `Rule`. ``ValueError`` if n is below the first look."""
        return self._establish(check_votes(selection, n0, "selection"), [ndtr(-self._steps(sigma))], sample, n)

    def _steps(self, sigma: NDArray[np.float64]) -> NDArray[np.float64]:
        """Radii in units of sigma, (b, m)."""
        return np.array(self.radii) / sigma[:, None]

    def _establish(self, pilot: Votes, limits: Sequence[NDArray[np.float64]], sample: Sample, n: int) -> Decision:
        """Establish 1 - p_A < limits[0], and where there are two every rival's p_c < limits[1]; see `Hypotheses`."""
        guess, each = pilot.argmax(axis=1).astype(np.int64), np.arange(len(pilot))
        all_of_them = np.ones(len(pilot), dtype=bool)
        hypotheses = [Hypotheses(0, guess, bounds, all_of_them, rival=i > 0) for i, bounds in enumerate(limits)]

        def sample_at(_level: int, rows: NDArray[np.int64], start: int, stop: int) -> Votes:
            return sample(rows, start, stop)

        found = establish(hypotheses, sample_at, n, [pilot.shape[1]], self.alpha, self.beta)
        votes, taken, last = found.votes[0], found.taken[0], np.maximum(found.passed - 1, 0)
        failure, upper = (np.where(found.passed > 0, bounds[each, last], 1.0) for bounds in (limits[0], limits[-1]))
        return Decision(
            prediction=guess,
            abstained=found.passed == 0,
            failure=failure,
            p_lower=1.0 - failure,
            p_upper=upper,
            count=votes[each, guess],
            runner_up_count=strongest_rival(votes, guess, taken),
            n=taken,
            radius=np.array([0.0, *self.radii])[found.passed],
        )


@dataclass(frozen=True, slots=True, eq=False)
class SequentialUnder(Sequential):
    """`Sequential` where a radius asks more of p_A than under one sigma, such as under a `SigmaFunction`.

    Parameters
    ----------
    radii, alpha, beta
        As in `Sequential`.
    limits : ndarray of float64, shape (b, m)
        What 1 - p_A has to stay below for each of the radii, at the b inputs that are decided about; descending along
        the radii, 0 or NaN where a radius is out of reach. Constants: no draw may have a say in them.

    Notes
    -----
    *Guarantee.* With probability at least 1 - alpha, 1 - p_A is below the limit of the certified radius.
    """

    limits: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide with at most n draws; see `Rule`. ``ValueError`` for limits of other inputs or radii."""
        if self.limits.shape != (len(selection), len(self.radii)):
            raise ValueError(
                f"limits must be of shape ({len(selection)}, {len(self.radii)}), one for each input and radius, got "
                f"{self.limits.shape}"
            )
        return self._establish(check_votes(selection, n0, "selection"), [self.limits], sample, n)


def under(rule: Rule, limits: Callable[[float], NDArray[np.float64]]) -> Rule | None:
    """Return the rule that tests the named radii of `rule` by these limits (b,) of 1 - p_A; None if it names none."""
    if isinstance(rule, Marginal):
        inner = under(rule.rule, limits)
        return None if inner is None else replace(rule, rule=inner)
    if not isinstance(rule, Sequential):
        return None
    table = np.stack([limits(radius) for radius in rule.radii], axis=1)
    return SequentialUnder(rule.radii, rule.alpha, rule.beta, table)


@dataclass(frozen=True, slots=True)
class Planned:
    """The whole radius, to a tolerance: the selection draws are a pilot that plans how many fresh draws to take.

    Parameters
    ----------
    tolerance : float
        Expected loss of radius against taking all n draws, > 0, in the units of the input.
    alpha : float
        Failure probability of one certificate.

    Raises
    ------
    ValueError
        For a tolerance that is not finite and > 0, or alpha outside (0, 1).

    Notes
    -----
    *Guarantee.* That of `OneSided`: given the pilot, the number of draws is a constant, and the draws are fresh. The
    tolerance is an expectation and no part of the guarantee.

    *Source.* See `theory.sequences.plan_draws`.
    """

    tolerance: float
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if not 0.0 < self.tolerance < np.inf:
            raise ValueError(f"tolerance must be finite and > 0, in the units of the input, got {self.tolerance}")

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide with at most n draws; see `Rule`. ``ValueError`` if n is below the first look."""
        pilot = check_votes(selection, n0, "selection").max(axis=1)
        sizes = np.zeros(len(pilot), dtype=np.int64)
        for level in np.unique(sigma):
            group = sigma == level
            sizes[group] = plan_draws(
                pilot[group], n0, n_max=n, tolerance=self.tolerance / float(level), alpha=self.alpha
            )
        parts, places = [], []
        for size in np.unique(sizes):
            rows = np.flatnonzero(sizes == size)
            parts.append(OneSided(self.alpha).decide(selection[rows], sample(rows, 0, int(size)), int(size)))
            places.append(rows)
        order = np.argsort(np.concatenate(places))
        joined: dict[str, Any] = {
            each.name: np.concatenate([getattr(part, each.name) for part in parts])[order]
            for each in fields(Decision)
            if each.name != "radius"
        }
        return Decision(**joined)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a prediction concludes for b inputs: class and abstention, both of shape (b,)."""

    prediction: NDArray[np.int64]
    abstained: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Marginal:
    """A rule for a part of what one pass votes on, such as the class beside a selector's bit, or one of many answers.

    Parameters
    ----------
    alpha : float
        Failure probability; the rule's own gives way to it.
    rule : Rule
        A frozen dataclass with a field ``alpha``.
    project : callable
        From joint votes (b, cells) to the votes (b, k) that the rule is about, by adding cells up.

    Notes
    -----
    *Guarantee.* That of `rule` for what is read. For the best of several at one input the failure probabilities add.
    """

    alpha: float
    rule: Rule
    project: Callable[[Votes], Votes]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", replace(self.rule, alpha=self.alpha))   # type: ignore[type-var]

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide as the rule does, on the projected votes; see `Rule`."""

        def projected(rows: NDArray[np.int64], start: int, stop: int) -> Votes:
            return self.project(sample(rows, start, stop))

        return self.rule.run(self.project(selection), n0, projected, n, sigma)


def by_part(joint: Votes, sizes: tuple[int, ...], part: int) -> Votes:
    """Votes (b, k) for the answers of one of several classifiers, from joint votes (b, cells) in C order.

    `sizes` are the outcomes of each classifier, the last of which is its invalid vote, which votes for no class.
    """
    table = joint.reshape(len(joint), *sizes)
    others = tuple(axis + 1 for axis in range(len(sizes)) if axis != part)
    return np.asarray(table.sum(axis=others)[:, :-1], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class TopTwo:
    """Predict the leading class, or abstain where it might not be the smoothed classifier's.

    Parameters
    ----------
    alpha : float
        Probability of returning a class other than the smoothed classifier's, at most.

    Notes
    -----
    *Guarantee.* For each input, the probability of answering with a class that is not the most probable outcome of f
    under noise (an invalid vote being an outcome as well) is at most alpha. Adding the invalid votes to the runner-up
    can only raise the p-value, so it can only turn an answer into an abstention.

    *Source.* Cohen et al. (2019), PREDICT and proposition 1.

    Examples
    --------
    >>> verdict = TopTwo(alpha=0.001).decide(np.array([[90, 10], [55, 45]]), 100)
    >>> verdict.abstained.tolist()
    [False, True]
    """

    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def decide(self, votes: Votes, n: int) -> Verdict:
        """Decide for each row of a (b, k) table of votes from `n` draws."""
        table = check_votes(votes, n, "prediction")
        leader = table.argmax(axis=1).astype(np.int64)
        top = table[np.arange(len(table)), leader]
        p_value = top_two_p_value(top, strongest_rival(table, leader, n))
        return Verdict(prediction=leader, abstained=~(p_value <= self.alpha))

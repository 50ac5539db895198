"""From vote tables to a decision: the class, a bound of its probability, a bound of its rivals'.

A vote table has shape (b, k), int64: votes of b inputs for k classes. Draws whose vote was invalid (logits not finite,
or a tie) appear in no column; a rule learns of them through the number of draws and counts them with the rivals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.theory.bounds import check_alpha, clopper_pearson_lower, clopper_pearson_upper, top_two_p_value

__all__ = ["Decision", "OneSided", "Rule", "TopTwo", "Verdict"]

Votes = NDArray[np.int64]


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
    """

    prediction: NDArray[np.int64]
    abstained: NDArray[np.bool_]
    failure: NDArray[np.float64]
    p_lower: NDArray[np.float64]
    p_upper: NDArray[np.float64]
    count: NDArray[np.int64]
    runner_up_count: NDArray[np.int64]


class Rule(Protocol):
    """Anything that turns selection and estimation votes into a `Decision` with failure probability `alpha`."""

    @property
    def alpha(self) -> float:
        """Failure probability of one certificate."""
        ...

    def decide(self, selection: Votes, estimation: Votes, n: int) -> Decision:
        """Decide from independent tables; `n` is the number of estimation draws behind each row."""
        ...


def check_votes(votes: Votes, n: int, name: str) -> Votes:
    """Return a (b, k) table as int64, or say what is wrong with it."""
    table = np.asarray(votes)
    if table.dtype.kind not in "iu":
        raise TypeError(f"{name} votes must be integers, got dtype {table.dtype}")
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"{name} votes must have shape (b, k) with k >= 2 classes, got {table.shape}")
    if np.any(table < 0) or np.any(table.sum(axis=1) > n):
        raise ValueError(f"{name} votes must be >= 0 and sum to at most n = {n} in every row")
    return table.astype(np.int64)


def strongest_rival(votes: Votes, prediction: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Votes of the strongest class other than `prediction`, the invalid draws added to it. Shape (b,)."""
    others = votes.copy()
    others[np.arange(len(votes)), prediction] = -1
    return np.asarray(others.max(axis=1) + (n - votes.sum(axis=1)), dtype=np.int64)


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
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a prediction concludes for b inputs: class and abstention, both of shape (b,)."""

    prediction: NDArray[np.int64]
    abstained: NDArray[np.bool_]


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

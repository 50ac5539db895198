"""Compositions: a certified choice between a smoothed classifier and an accurate one, and what it is worth.

The classifier is F(x) = F_c(x) where p_s(x) >= tau, and core(x) elsewhere: F_c is a smoothed classifier, p_s(x) =
P(s(x + eps) = 1) is what a selector s votes for, and the core is any function of the input at all. A core that is
itself a composition makes a chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from art_rs_plugins.theory.bounds import check_alpha, clopper_pearson_lower, clopper_pearson_upper
from art_rs_plugins.theory.certificates import Certificates, Kind
from art_rs_plugins.theory.rules import Decision, Sample, Verdict
from art_rs_plugins.theory.votes import Votes, check_votes

__all__ = [
    "CERTIFY",
    "CORE",
    "Allocation",
    "Claim",
    "Fallback",
    "Histogram",
    "Leading",
    "Minimum",
    "Split",
    "Threshold",
    "as_certificates",
    "by_answer",
    "by_class",
    "by_score",
    "check_tau",
    "compose",
    "settle",
]

CORE, CERTIFY = 0, 1
"""What a selector answers: leave the input to the core, or to the smoothed classifier."""

_INWARD = 1e-12
"""Relative shrinkage of a difference of quantiles; they are accurate to about 1e-15."""


def check_tau(tau: float) -> float:
    """Return `tau` as a float, or raise ``ValueError`` unless 0 <= tau < 1."""
    value = float(tau)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"tau must lie in [0, 1), the share of votes that selects an input, got {tau}")
    return value


# ---------------------------------------------------------------------------------------------- what is known


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """What is known of one part at b inputs: its answer, and how far around the input it stays; arrays of shape (b,).

    Attributes
    ----------
    prediction : int64
        The answer: a class, or `CORE` or `CERTIFY` of a selector.
    radius : float64
        Every input closer than this has the same answer; inf for a part that always gives it, 0 where the answer is
        known at the input alone.
    abstained : bool
        True where nothing is known; the radius is 0 there.
    """

    prediction: NDArray[np.int64]
    radius: NDArray[np.float64]
    abstained: NDArray[np.bool_]

    @classmethod
    def of(cls, certificates: Certificates) -> Claim:
        """What certificates say; those of kind ``conditional`` say nothing and are refused."""
        if certificates.kind == "conditional":
            raise ValueError(
                "conditional certificates cannot be composed: sigma was chosen for the input, so that a neighbour may "
                "be answered at another sigma, and with another class; take a rule of several levels "
                "(Envelope, Cascade, Selector), whose certificates speak of the classifier that answers"
            )
        return cls(certificates.prediction, certificates.radius, certificates.abstained)

    @classmethod
    def fixed(cls, prediction: ArrayLike, radius: float = 0.0, *, abstained: ArrayLike = False) -> Claim:
        """Answers that no draw can make wrong, all within one radius."""
        answers = np.asarray(prediction, dtype=np.int64)
        silent = np.broadcast_to(np.asarray(abstained, dtype=bool), answers.shape).copy()
        return cls(answers, np.where(silent, 0.0, radius), silent)


# ---------------------------------------------------------------------------------------------- selectors


def _from_threshold(
    guess: NDArray[np.bool_], count: NDArray[np.int64], n: int, tau: float, alpha: float, sigma: NDArray[np.float64]
) -> Decision:
    """Decide which side of tau p_s lies on, from the `count` votes for the side that is guessed."""
    failure = clopper_pearson_upper(n - count, n, alpha)
    with np.errstate(invalid="ignore"):
        here, there = -ndtri(failure), np.where(guess, 1.0, -1.0) * ndtri(tau)
        radius = sigma * (here - there - _INWARD * (np.abs(here) + np.abs(there)))
    radius = np.where(np.isfinite(radius) & (radius > 0.0), radius, 0.0)
    if tau == 0.0:   # p_s >= 0 everywhere
        radius = np.full(len(count), np.finfo(np.float64).max)
    return Decision(
        prediction=np.where(guess, CERTIFY, CORE).astype(np.int64),
        abstained=~(radius > 0.0),
        failure=failure,
        p_lower=clopper_pearson_lower(count, n, alpha),
        p_upper=failure,
        count=count,
        runner_up_count=np.asarray(n - count, dtype=np.int64),
        n=np.full(len(count), n, dtype=np.int64),
        radius=radius,
    )


def _sides(ones: NDArray[np.int64], most: NDArray[np.int64], n: int, tau: float, alpha: float) -> Verdict:
    """Side of tau, each at alpha / 2, from the votes for `CERTIFY` without and with those that were invalid."""
    above = clopper_pearson_lower(ones, n, alpha / 2.0) >= tau
    below = clopper_pearson_upper(most, n, alpha / 2.0) < tau
    return Verdict(np.where(above, CERTIFY, CORE).astype(np.int64), ~(above | below))


@dataclass(frozen=True, slots=True)
class Threshold:
    """Select the inputs for which a share tau of the votes or more says `CERTIFY`.

    Parameters
    ----------
    tau : float
        In [0, 1). Below 1/2 every selected radius is sigma |Phi^-1(tau)| longer, and more inputs are selected; 0
        selects them all.
    alpha : float
        Failure probability of one certificate.

    Raises
    ------
    ValueError
        For tau outside [0, 1) or alpha outside (0, 1).

    Notes
    -----
    *Guarantee.* Let S(x) = `CERTIFY` where p_s(x) >= tau, else `CORE`. With probability at least 1 - alpha over the
    estimation draws, S is constant within the radius: sigma (Phi^-1(p_s) - Phi^-1(tau)) for the one answer, with a
    lower bound of p_s, and sigma (Phi^-1(tau) - Phi^-1(p_s)) with an upper bound for the other. Which bound is taken is
    settled by the selection draws. An invalid vote counts against either answer.

    *Source.* Lemma 2 of Salman et al. (2019), sigma Phi^-1(p_s) being 1-Lipschitz; at tau = 1/2 the selector of Horvath
    et al. (2022), "Robust and accurate - compositional architectures for randomized smoothing".

    Examples
    --------
    >>> votes = np.array([[20, 980]])   # 980 draws say CERTIFY
    >>> [float(Threshold(tau).decide(votes, votes, 1000, np.array([0.5])).radius[0].round(3)) for tau in (0.5, 0.1)]
    [0.889, 1.53]
    """

    tau: float = 0.5
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_tau(self.tau), check_alpha(self.alpha)

    def decide(self, selection: Votes, estimation: Votes, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide for b inputs from votes (b, 2) for `CORE` and `CERTIFY`; see `theory.rules.OneSided`."""
        first = check_votes(selection, np.iinfo(np.int64).max, "selection")
        votes = check_votes(estimation, n, "estimation")
        guess = first[:, CERTIFY] >= self.tau * first.sum(axis=1)
        count = votes[np.arange(len(votes)), guess.astype(np.int64)]
        return _from_threshold(guess, count, n, self.tau, self.alpha, sigma)

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:   # noqa: ARG002
        """Decide from all n draws; see `theory.rules.Rule`."""
        return self.decide(selection, sample(np.arange(len(selection)), 0, n), n, sigma)

    def verdict(self, votes: Votes, n: int) -> Verdict:
        """Answer for b inputs, wrong with probability at most alpha, from votes (b, 2) of n draws."""
        table = check_votes(votes, n, "prediction")
        return _sides(table[:, CERTIFY], n - table[:, CORE], n, self.tau, self.alpha)


@dataclass(frozen=True, slots=True)
class Leading:
    """Select the inputs for which some class has a share tau of the smoothed classifier's own votes or more.

    Parameters
    ----------
    tau, alpha : float
        As in `Threshold`.

    Notes
    -----
    *Guarantee.* That of `Threshold`, for p_s(x) = max_c P(f(x + eps) = c). Where it is to be at least tau, the class
    that the selection draws named carries the bound. Where it is to be less, the bound is taken at the largest count
    with the invalid votes added: it grows with the count, and the count of the class that is most likely in truth is no
    larger, so that there is no correction for the number of classes.

    *Source.* The single level of the cascade of Jeong and Shin (2023), "Multi-scale diffusion denoised smoothing".
    """

    tau: float = 0.5
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_tau(self.tau), check_alpha(self.alpha)

    def run(self, selection: Votes, n0: int, sample: Sample, n: int, sigma: NDArray[np.float64]) -> Decision:
        """Decide from votes (b, k) for the classes; see `theory.rules.Rule`."""
        first = check_votes(selection, n0, "selection")
        votes = check_votes(sample(np.arange(len(first)), 0, n), n, "estimation")
        leader = first.argmax(axis=1)
        guess = first.max(axis=1) >= self.tau * n0
        most = votes.max(axis=1) + (n - votes.sum(axis=1))
        count = np.where(guess, votes[np.arange(len(votes)), leader], n - most)
        return _from_threshold(guess, count, n, self.tau, self.alpha, sigma)

    def verdict(self, votes: Votes, n: int) -> Verdict:
        """Answer for b inputs, wrong with probability at most alpha, from votes (b, k) of n draws."""
        table = check_votes(votes, n, "prediction")
        leading = table.max(axis=1)
        alpha = self.alpha / table.shape[1]   # any of k classes may lead by luck
        return _sides(leading, leading + (n - table.sum(axis=1)), n, self.tau, alpha)


def by_class(joint: NDArray[np.int64], bins: int) -> Votes:
    """Votes (b, k) for the classes, from joint votes (b, k bins) for pairs of a class and a bin of the score."""
    return np.asarray(joint.reshape(len(joint), -1, bins).sum(axis=2))


def by_score(joint: NDArray[np.int64], bins: int) -> Votes:
    """Votes (b, bins) for the bins of the score, from joint votes (b, k bins)."""
    return np.asarray(joint.reshape(len(joint), -1, bins).sum(axis=1))


def by_answer(scores: Votes, position: int) -> Votes:
    """Votes (b, 2) for `CORE` and `CERTIFY` with theta at the edge behind bin `position`, from those (b, bins).

    The last bin, of scores that are not finite or outside [0, 1], votes for neither.
    """
    certify = scores[:, : position + 1].sum(axis=1)
    return np.stack([scores[:, :-1].sum(axis=1) - certify, certify], axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """Votes of b inputs for k classes and for t + 2 bins of the selector's score, to choose theta and tau from.

    Attributes
    ----------
    class_selection, class_estimation : int64, shape (b, k)
        Votes for the classes, of n0 draws and of n others.
    score_selection, score_estimation : int64, shape (b, t + 2)
        Votes for the bins of the score. Bin i holds the scores in (edges[i - 1], edges[i]], bin t those beyond the last
        edge, and the last bin those that were not finite or outside [0, 1].
    n0, n : int
        Draws, invalid ones included.
    edges : float64, shape (t,)
        Ascending, in [0, 1]: the values that theta may take.
    sigma, selector_sigma : float
        Noise levels of the smoothed classifier and of the selector.
    """

    class_selection: Votes
    class_estimation: Votes
    score_selection: Votes
    score_estimation: Votes
    n0: int
    n: int
    edges: NDArray[np.float64]
    sigma: float
    selector_sigma: float

    @classmethod
    def concatenate(cls, parts: Sequence[Histogram]) -> Histogram:
        """Join histograms of one composition and one n, in order."""
        names = ("class_selection", "class_estimation", "score_selection", "score_estimation")
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined)

    def at(self, theta: float) -> tuple[Votes, Votes]:
        """Selector's votes (b, 2) of the n0 and of the n draws; ``ValueError`` for a theta that is no edge."""
        found = np.flatnonzero(self.edges == theta)
        if not len(found):
            raise ValueError(f"theta must be an edge of the histogram, one of {self.edges.tolist()}, got {theta}")
        position = int(found[0])
        return by_answer(self.score_selection, position), by_answer(self.score_estimation, position)


# ---------------------------------------------------------------------------------------------- certificates


class Allocation(Protocol):
    """How alpha is spent on the bounds of a composition, and what follows from them: a frozen dataclass."""

    @property
    def alpha(self) -> float:
        """Failure probability of one certificate of the composition."""
        ...

    def share(self, bounds: int, /) -> float:
        """Failure probability of each of the `bounds` random parts of the composition, a number fixed beforehand."""
        ...

    def compose(self, selector: Claim, smoothed: Claim, core: Claim) -> Claim:
        """What is known of the composition, from what is known of its parts at the same inputs."""
        ...


def _named(selector: Claim, smoothed: Claim, core: Claim) -> NDArray[np.float64]:
    """Radius on the path that the selector's answer names; -1 where it is not established."""
    direct = selector.prediction == CERTIFY
    silent = selector.abstained | np.where(direct, smoothed.abstained, core.abstained)
    radius = np.minimum(selector.radius, np.where(direct, smoothed.radius, core.radius))
    return np.where(silent, -1.0, radius)


def _composed(radius: NDArray[np.float64], selector: Claim, smoothed: Claim, core: Claim) -> Claim:
    prediction = np.where(selector.prediction == CERTIFY, smoothed.prediction, core.prediction)
    return Claim(prediction, np.maximum(radius, 0.0), radius < 0.0)


@dataclass(frozen=True, slots=True)
class Split:
    """Each random part gets an equal share of alpha, and whatever their bounds imply together is used.

    Parameters
    ----------
    alpha : float
        Failure probability of one certificate of the composition.

    Notes
    -----
    *Guarantee.* With probability at least 1 - alpha no bound fails, so that everything that follows from them holds at
    once: where the selector certifiably certifies, F = F_c within min(R_s, R_c); where it certifiably does not, F =
    core within min(R_s, R_core); and where the two agree on a class, F is that class within min(R_c, R_core), whatever
    the selector does. The largest is taken. For an ordinary core R_core = 0: the answer is known at the input only.

    *Source.* The first term, at alpha / 2 each, is theorem and practice of Horvath et al. (2022). Applied along a chain
    the maximum is the test of Mueller, Balunovic and Vechev (2021), "Certify or predict" (ACE), which every radius may
    pass by a way of its own.
    """

    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def share(self, bounds: int, /) -> float:
        """Return alpha / bounds."""
        return self.alpha / max(1, bounds)

    def compose(self, selector: Claim, smoothed: Claim, core: Claim) -> Claim:
        """Return the longest of the three radii; see the class."""
        agreed = (smoothed.prediction == core.prediction) & ~smoothed.abstained & ~core.abstained
        either = np.where(agreed, np.minimum(smoothed.radius, core.radius), -1.0)
        radius = np.maximum(_named(selector, smoothed, core), either)
        return _composed(radius, selector, smoothed, core)


@dataclass(frozen=True, slots=True)
class Minimum:
    r"""Each random part gets all of alpha, and only the path that the selection draws named is used.

    Parameters
    ----------
    alpha : float
        Failure probability of one certificate of the composition.

    Notes
    -----
    *Guarantee.* With probability at least 1 - alpha a certificate holds, however the parts depend on each other. The
    selection draws name a path: certify or core, at each selector until one certifies, and the class at its end. Given
    them, let m_i be the true radius within which part i of the path answers as named (-1 if it does not even at the
    input), a constant, and let M_i be the radius that its estimation draws claim, P(M_i > m_i) <= alpha. F answers the
    class named within m = min m_i. Let i* attain this minimum, which depends on no estimation draw. If the claim
    min M_i exceeds m, then M_{i*} >= min M_i > m_{i*}; and that has probability at most alpha. No union bound is paid,
    since one part alone has to fail: the intersection-union principle.

    It is lost if the better of several paths is taken afterwards, which is why only the named one is.

    *Source.* Berger (1982), "Multiparameter hypothesis testing and acceptance sampling"; for paths through smoothed
    networks the argument is ours.
    """

    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def share(self, _bounds: int, /) -> float:
        """Return alpha."""
        return self.alpha

    def compose(self, selector: Claim, smoothed: Claim, core: Claim) -> Claim:
        """Return the radius on the path; see the class."""
        return _composed(_named(selector, smoothed, core), selector, smoothed, core)


def compose(allocation: Allocation, stages: list[tuple[Claim, Claim]], core: Claim) -> Claim:
    """What is known of a chain: the first stage whose selector certifies answers, and the core if none does.

    Parameters
    ----------
    allocation : Allocation
        ``Split(alpha)`` or ``Minimum(alpha)``; each random part made its claim at ``allocation.share(bounds)``.
    stages : list of (Claim, Claim)
        Selector and smoothed classifier of each stage, in order.
    core : Claim
        What is known of the core: `Claim.fixed` of its answers.

    Notes
    -----
    *Guarantee.* That of the allocation, with probability at least 1 - alpha.
    """
    known = core
    for selector, smoothed in reversed(stages):
        known = allocation.compose(selector, smoothed, known)
    return known


def as_certificates(claim: Claim, stages: list[tuple[Claim, Certificates]], alpha: float) -> Certificates:
    """Write down what is known of a composition as certificates.

    Parameters
    ----------
    claim : Claim
        Of the composition.
    stages : list of (Claim, Certificates)
        Selector and smoothed classifier of each stage, with the passes of both. The first one that is named to certify
        gives the evidence (the bounds, the counts, sigma). Where none is, the core answers, and the bounds are the
        empty ones, 0 and 1.
    alpha : float
        Failure probability of each certificate.

    Returns
    -------
    Certificates
        Of kind ``committed`` if a part is, ``exact`` if every part is, else ``certified``.
    """
    parts = [certificates for _, certificates in stages]
    kinds = {part.kind for part in parts}
    kind: Kind = "committed" if "committed" in kinds else "exact" if kinds == {"exact"} else "certified"
    names = ("p_lower", "p_upper", "count", "runner_up_count", "n", "n0", "sigma")
    evidence = {name: getattr(parts[-1], name).copy() for name in names}
    core = np.ones(len(claim.prediction), dtype=bool)
    for selector, part in reversed(stages):
        named = selector.prediction == CERTIFY
        core &= ~named
        for name in names:
            evidence[name][named] = getattr(part, name)[named]
    for name, empty in (("p_lower", 0.0), ("p_upper", 1.0), ("count", 0)):
        evidence[name][core] = empty
    evidence["runner_up_count"][core] = evidence["n"][core]
    values: dict[str, Any] = {field.name: getattr(parts[0], field.name) for field in fields(Certificates)} | evidence
    values |= {
        "prediction": claim.prediction,
        "radius": np.minimum(claim.radius, np.finfo(np.float64).max),
        "abstained": claim.abstained,
        "alpha": np.full(len(claim.prediction), alpha),
        "kind": kind,
        "passes": np.sum([part.passes for part in parts], axis=0),
    }
    return Certificates(**values)


# ---------------------------------------------------------------------------------------------- predictions


class Fallback(Enum):
    """What a composition answers where its selector's votes are not clear.

    ``AGREE`` answers where the smoothed classifier and what comes after it give one class, and abstains elsewhere.
    ``ABSTAIN`` always abstains. ``CERTIFY`` takes the smoothed classifier, in compositions of a single stage. ``CORE``
    takes the core, and is refused.

    Notes
    -----
    *Guarantee.* Under ``AGREE`` and ``ABSTAIN`` an answer is F(x), but for failures of the tests, alpha in all. Under
    ``CERTIFY`` it is wherever p_s(x) >= tau, which covers every ball that a single stage certifies. Under ``CORE``
    there is none: just within the certified radius p_s is just above tau, so that the votes are seldom clear, and
    whoever moves the input there is answered by the core.
    """

    AGREE = "agree"
    ABSTAIN = "abstain"
    CERTIFY = "certify"
    CORE = "core"

    def check(self, stages: int) -> Fallback:
        """Return itself, or raise ``ValueError`` where it would void the certificates of this many stages."""
        if self is Fallback.CORE:
            raise ValueError(
                "fallback CORE voids the certificate: just within the certified radius the selector seldom answers, "
                "and an attacker who moves the input there is answered by the core; take AGREE, or CERTIFY, which "
                "abstains least"
            )
        if self is Fallback.CERTIFY and stages > 1:
            raise ValueError(
                "fallback CERTIFY voids the certificates of a chain that skip its first stage: near their radius that "
                "stage would answer in place of the next; take AGREE or ABSTAIN"
            )
        return self

    def settle(self, selector: Verdict, smoothed: Verdict, core: Verdict) -> Verdict:
        """Answer of one stage, from those of its parts at the same inputs."""
        self.check(1)
        direct = selector.prediction == CERTIFY
        prediction = np.where(direct, smoothed.prediction, core.prediction)
        abstained = np.where(direct, smoothed.abstained, core.abstained)
        unclear = selector.abstained
        if self is Fallback.AGREE:
            differ = smoothed.abstained | core.abstained | (smoothed.prediction != core.prediction)
            abstained = np.where(unclear, differ, abstained)
        elif self is Fallback.CERTIFY:
            abstained = np.where(unclear, smoothed.abstained, abstained)
        else:
            abstained = unclear | abstained
        prediction = np.where(unclear, smoothed.prediction, prediction)
        return Verdict(prediction, abstained)


def settle(fallback: Fallback, stages: list[tuple[Verdict, Verdict]], core: Verdict) -> Verdict:
    """Answer of a chain at b inputs.

    Parameters
    ----------
    fallback : Fallback
        What to do where a selector's votes are not clear.
    stages : list of (Verdict, Verdict)
        Selector and smoothed classifier of each stage, each wrong with probability at most alpha over their number.
    core : Verdict
        Answers of the core.

    Raises
    ------
    ValueError
        For a fallback that voids the certificates.

    Notes
    -----
    *Guarantee.* The probability of an answer other than F(x) is at most alpha, for each input on its own; under
    ``Fallback.CERTIFY``, where p_s(x) >= tau.
    """
    fallback.check(len(stages))
    answer = core
    for selector, smoothed in reversed(stages):
        answer = fallback.settle(selector, smoothed, answer)
    return answer

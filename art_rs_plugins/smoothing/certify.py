"""Certification and prediction of the smoothed classifier: draws, then a rule, then a radius."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from art_rs_plugins.smoothing.noise import Noise, Stage, check_seed
from art_rs_plugins.smoothing.sampling import (
    Classifier,
    check_count,
    check_indices,
    chunk_size,
    count_votes,
    make_sampler,
)
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.rules import OneSided, Rule, TopTwo

__all__ = ["Predictions", "certify", "certify_all", "predict"]


@dataclass(frozen=True, slots=True)
class Predictions:
    """Answers of the smoothed classifier for b inputs.

    Attributes
    ----------
    prediction : int64, shape (b,)
        Class; where ``abstained``, only the leading one.
    abstained : bool, shape (b,)
        True where the votes cannot tell the leading class from its rivals.
    votes : int64, shape (b, k)
        Valid votes out of `n`.
    n, alpha, seed : int, float, int
        Draws, failure probability, and the seed that reproduces them.
    """

    prediction: NDArray[np.int64]
    abstained: NDArray[np.bool_]
    votes: NDArray[np.int64]
    n: int
    alpha: float
    seed: int

    @classmethod
    def concatenate(cls, parts: Sequence[Predictions]) -> Predictions:
        """Join predictions made with one n, alpha and seed, in order."""
        names = ("prediction", "abstained", "votes")
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined)


def certify(
    f: Classifier,
    x: Tensor,
    noise: Noise,
    *,
    num_classes: int,
    n: int,
    n0: int = 100,
    rule: Rule | None = None,
    seed: int | None = None,
    indices: ArrayLike | None = None,
    block: int | None = None,
) -> Certificates:
    """Certify the smoothed classifier at b inputs.

    Parameters
    ----------
    f : callable
        Base classifier in eval mode; (m, ...) to logits (m, k).
    x : Tensor, shape (b, ...), floating point
        Inputs, in the space where the radius is to hold.
    noise : Noise
        One sigma, or one for each input. A sigma that was chosen for the input makes the certificate conditional.
    num_classes : int
        Number of classes k.
    n, n0 : int
        Estimation draws at most, and selection draws that name the class; they share none.
    rule : Rule
        From votes to a decision: ``OneSided(alpha=0.001)`` by default, which takes all n draws; ``Sequential(radii)``
        for named radii, or ``Planned(tolerance)``, which take far fewer.
    seed : int, optional
        Seed in [0, 2**63); None draws fresh entropy. Recorded either way. Fix it after the inputs, not before.
    indices : array_like of int, shape (b,), optional
        Index of each input in its data set; its position by default.
    block : int, optional
        Rows of one forward pass; see `count_votes`.

    Returns
    -------
    Certificates
        One for each input.

    Raises
    ------
    ValueError, TypeError
        As `count_votes`.

    Notes
    -----
    *Guarantee.* For each input, with probability at least 1 - alpha over the draws: either the certificate abstains, or
    argmax_c P(f(z + eps) = c) is its class for every z closer to x than its radius, in l2.

    *Source.* Cohen et al. (2019), CERTIFY, theorem 1 and proposition 2.
    """
    rules = [OneSided() if rule is None else rule]
    settings: dict[str, Any] = {"num_classes": num_classes, "n": n, "n0": n0, "seed": seed, "block": block}
    return certify_all(f, x, noise, rules=rules, indices=indices, **settings)[0]


def certify_all(
    f: Classifier,
    x: Tensor,
    noise: Noise,
    *,
    num_classes: int,
    n: int,
    n0: int = 100,
    rules: Sequence[Rule],
    seed: int | None = None,
    indices: ArrayLike | None = None,
    block: int | None = None,
) -> list[Certificates]:
    """Certify under several rules that share their draws, as a comparison of rules should.

    Parameters
    ----------
    f, x, noise, num_classes, n, n0, seed, indices, block
        As in `certify`.
    rules : sequence of Rule
        Each decides by itself; a draw that several of them ask for is voted on once.

    Returns
    -------
    list of Certificates
        One for each rule, with the same bits as `certify` gives for it.

    Raises
    ------
    ValueError, TypeError
        As `certify`, and for no rules.

    Notes
    -----
    *Guarantee.* That of `certify` for each rule on its own. For the best of several radii at one input the failure
    probabilities add.
    """
    if not rules:
        raise ValueError("rules must hold at least one rule")
    n, n0, seed = check_count(n, "n"), check_count(n0, "n0"), check_seed(seed)
    keys = check_indices(indices, len(x))
    settings: dict[str, Any] = {"num_classes": num_classes, "seed": seed, "indices": keys, "block": block}
    sampler = make_sampler(f, x, noise, n, stage=Stage.ESTIMATION, **settings)
    selector = replace(sampler, stage=Stage.SELECTION, chunk=min(chunk_size(sampler.block), n0))
    selection = selector.shared(n0)(np.arange(len(keys)), 0, n0)
    sample = sampler.shared(n, between_rules=len(rules) > 1)
    size, sigma = len(keys), noise.for_inputs(len(keys))
    found = []
    for rule in rules:
        level = noise.level(rule.alpha, n, x[0].numel())
        bounded = rule if level == rule.alpha else replace(rule, alpha=level)   # type: ignore[type-var]
        decision = bounded.run(selection, n0, sample, n, sigma)
        radius = noise.radius(decision.failure, decision.p_upper) if decision.radius is None else decision.radius
        found.append(
            Certificates(
                prediction=decision.prediction,
                radius=np.where(decision.abstained, 0.0, radius),
                abstained=decision.abstained,
                p_lower=decision.p_lower,
                p_upper=decision.p_upper,
                count=decision.count,
                runner_up_count=decision.runner_up_count,
                n=decision.n,
                n0=np.full(size, n0),
                sigma=sigma,
                alpha=np.full(size, rule.alpha),
                index=keys,
                seed=np.full(size, seed),
                kind=noise.kind,
                norm=noise.norm,
            )
        )
    return found


def predict(
    f: Classifier,
    x: Tensor,
    noise: Noise,
    *,
    num_classes: int,
    n: int,
    alpha: float = 0.001,
    seed: int | None = None,
    indices: ArrayLike | None = None,
    stage: Stage = Stage.PREDICTION,
    block: int | None = None,
) -> Predictions:
    """Answer with the class of the smoothed classifier, or abstain.

    Parameters
    ----------
    f, x, noise, num_classes, seed, indices, block
        As in `certify`.
    n : int
        Draws for each input.
    alpha : float
        Probability of a wrong answer, at most.
    stage : Stage
        What the draws are for.

    Returns
    -------
    Predictions

    Raises
    ------
    ValueError, TypeError
        As `count_votes`, and for alpha outside (0, 1).

    Notes
    -----
    *Guarantee.* For each input, the probability of an answer other than the most probable outcome of f under noise is
    at most alpha.

    *Source.* Cohen et al. (2019), PREDICT and proposition 1.
    """
    rule, seed = TopTwo(alpha), check_seed(seed)
    n = check_count(n, "n")
    votes = count_votes(
        f, x, noise, n, num_classes=num_classes, seed=seed, indices=indices, stage=stage, block=block
    ).cpu().numpy()
    verdict = TopTwo(noise.level(rule.alpha, n, x[0].numel())).decide(votes, n)
    return Predictions(verdict.prediction, verdict.abstained, votes, n, rule.alpha, seed)

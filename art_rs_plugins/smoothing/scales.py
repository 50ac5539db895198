"""Several noise levels at work: votes for the rules that ask for them, and targets for a selector among levels.

An input meets the same standard normals at every level, scaled: the rules do not mind, since each of their bounds is of
one level, levels differ by less chance, and the votes of a level are those of a certificate at that sigma alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from art_rs_plugins.smoothing.certify import Predictions, certify_all
from art_rs_plugins.smoothing.noise import Gaussian, Stage, check_seed, derive_seed
from art_rs_plugins.smoothing.sampling import Classifier, Sampler, check_count, count_votes, make_sampler
from art_rs_plugins.smoothing.sigma import CertifiableRadius, MultiStartSearch, Objective, SigmaRule
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.elastic import SigmaFunction
from art_rs_plugins.theory.rules import Rule, under
from art_rs_plugins.theory.scales import Cascade, Envelope, ScaleRule, Selector, SequentialScales
from art_rs_plugins.theory.sequences import schedule
from art_rs_plugins.theory.votes import Votes

__all__ = [
    "Conditional",
    "Scales",
    "as_logits",
    "certify_at",
    "certify_frozen",
    "certify_scales",
    "host",
    "level_targets",
    "predict_scales",
    "sigma_of",
]

Floats = NDArray[np.float64]
Networks = Classifier | Sequence[Classifier]
"""One base classifier for all levels, or one for each; that of a `Selector` is the last, with an output per level."""


@dataclass(frozen=True, slots=True)
class Conditional:
    """The sigma that a search finds for the input, as published: a certificate that the deployed classifier has not.

    It speaks of the classifier with this sigma frozen, and a neighbour may find another one: see `theory.scales`. For
    comparison; the draws are fresh, so that of its own classifier it is true.

    Parameters
    ----------
    search : SigmaRule
        Proposes a sigma from the network and the input; it is shown no label.

    Raises
    ------
    TypeError
        For what cannot choose a sigma without a label, such as the update of a sigma table.

    Notes
    -----
    *Source.* Chen et al. (2021), "Insta-RS: instance-wise randomized smoothing".
    """

    search: SigmaRule = field(default_factory=MultiStartSearch)

    def __post_init__(self) -> None:
        if isinstance(self.search, type) or not callable(getattr(self.search, "choose", None)):
            raise TypeError(
                "search must choose a sigma from the network and the input alone, such as MultiStartSearch(); got "
                f"{type(self.search).__name__}, and labels are for training only"
            )


Scales = Envelope | Cascade | Selector | SigmaFunction | Conditional
"""What is certified where sigma is not one number."""


# ---------------------------------------------------------------------------------------------- rules over levels


class _Poll:
    """Votes of b inputs at the levels of a rule, at most n at each, drawn when it asks; counted, and kept."""

    def __init__(self, samplers: Sequence[Sampler], n: int) -> None:
        size = len(samplers[0].x)
        self.samplers = samplers
        self.sources = [sampler.shared(n) for sampler in samplers]
        self.passes = np.zeros(size, dtype=np.int64)
        self.votes = [np.zeros((size, sampler.num_classes), dtype=np.int64) for sampler in samplers]

    def __call__(self, level: int, rows: NDArray[np.int64], n: int) -> Votes:
        return self.between(level, rows, 0, n)

    def between(self, level: int, rows: NDArray[np.int64], start: int, stop: int) -> Votes:
        """Votes among the draws start, ..., stop - 1."""
        found = self.sources[level](rows, start, stop)
        self.passes[rows] += stop - start
        self.votes[level][rows] += found
        return found


def _poll(f: Networks, x: Tensor, rule: ScaleRule, n: int, *, num_classes: int, **settings: Any) -> _Poll:
    """Poll of n draws at each level; every network is checked once."""
    levels = rule.levels
    networks = list(f) if isinstance(f, Sequence) else [f] * len(levels)
    if len(networks) != len(levels):
        raise ValueError(f"f must be one network, or one for each of {len(levels)} levels, got {len(networks)}")
    known: dict[tuple[int, int], Sampler] = {}
    samplers = []
    for i, (network, sigma) in enumerate(zip(networks, levels, strict=True)):
        outputs = len(rule.sigmas) if isinstance(rule, Selector) and i == len(levels) - 1 else num_classes
        if (id(network), outputs) not in known:
            known[id(network), outputs] = make_sampler(network, x, Gaussian(sigma), n, num_classes=outputs, **settings)
        samplers.append(replace(known[id(network), outputs], noise=Gaussian(sigma)))
    return _Poll(samplers, n)


def certify_scales(
    f: Networks,
    x: Tensor,
    rule: ScaleRule | SequentialScales,
    *,
    num_classes: int,
    n: int,
    n0: int = 100,
    seed: int | None = None,
    indices: ArrayLike | None = None,
    block: int | None = None,
) -> Certificates:
    """Certify the classifier of a rule over several noise levels at b inputs.

    Parameters
    ----------
    f : callable or sequence of callable
        Base classifier in eval mode, (m, ...) to logits (m, k): one for all levels, or one for each of ``rule.levels``.
        A `Selector` has its own as the last, with an output for each of its sigmas.
    x : Tensor, shape (b, ...), floating point
        Inputs, in the space where the radius is to hold.
    rule : ScaleRule or SequentialScales
        `Envelope`, `Cascade` or `Selector`, fixed before the inputs are seen, or one of them for named radii.
    num_classes : int
        Number of classes k.
    n, n0 : int
        Estimation draws at most, and selection draws, at each level that the rule asks about; they share none.
    seed, indices, block
        As in `smoothing.certify.certify`.

    Returns
    -------
    Certificates
        ``sigma`` is the level that the bounds and counts belong to; ``passes`` counts the draws of all levels.

    Raises
    ------
    ValueError, TypeError
        As `count_votes`, and for a number of networks that is not one, nor that of the levels.

    Notes
    -----
    *Guarantee.* See `ScaleRule.run`: about the classifier of the rule, the one that `predict_scales` answers with.
    """
    n, n0, seed = check_count(n, "n"), check_count(n0, "n0"), check_seed(seed)
    settings: dict[str, Any] = {"num_classes": num_classes, "seed": seed, "indices": indices, "block": block}
    asked = rule.rule if isinstance(rule, SequentialScales) else rule
    if asked is not rule:
        schedule(n)   # an n below the first look is refused before anything is drawn
    select = _poll(f, x, asked, n0, stage=Stage.SELECTION, **settings)
    estimate = _poll(f, x, asked, n, stage=Stage.ESTIMATION, **settings)
    if isinstance(rule, SequentialScales):
        found, sigma = rule.run(select, n0, estimate.between, n, len(x))
    else:
        found, sigma = rule.run(select, n0, estimate, n, len(x))
    return Certificates(
        prediction=found.prediction,
        radius=np.where(found.abstained, 0.0, np.asarray(found.radius)),
        abstained=found.abstained,
        p_lower=found.p_lower,
        p_upper=found.p_upper,
        count=found.count,
        runner_up_count=found.runner_up_count,
        n=found.n,
        n0=np.full(len(x), n0),
        sigma=sigma,
        alpha=np.full(len(x), rule.alpha),
        index=estimate.samplers[0].indices,
        seed=np.full(len(x), seed),
        passes=select.passes + estimate.passes,
    )


def predict_scales(
    f: Networks,
    x: Tensor,
    rule: ScaleRule | SequentialScales,
    *,
    num_classes: int,
    n: int,
    seed: int | None = None,
    indices: ArrayLike | None = None,
    block: int | None = None,
) -> Predictions:
    """Answer with the class that the classifier of a rule gives, or abstain.

    Parameters
    ----------
    f, x, rule, num_classes, seed, indices, block
        As in `certify_scales`; ``rule.alpha`` is the probability of a wrong answer, at most.
    n : int
        Draws at each level that the rule asks about. A quarter as many, of their own, name the class and the level.

    Returns
    -------
    Predictions
        With the votes at the level that decided.

    Raises
    ------
    ValueError, TypeError
        As `certify_scales`.

    Notes
    -----
    *Guarantee.* For each input, the probability of an answer other than the classifier's is at most alpha.
    """
    rule = rule.rule if isinstance(rule, SequentialScales) else rule   # an answer needs no radii
    n, seed = check_count(n, "n"), check_seed(seed)
    settings: dict[str, Any] = {"num_classes": num_classes, "indices": indices, "block": block}
    first, stage = -(-n // 4), Stage.PREDICTION
    select = _poll(f, x, rule, first, stage=stage, seed=derive_seed(seed, 1), **settings)
    estimate = _poll(f, x, rule, n, stage=stage, seed=seed, **settings)
    found, sigma = rule.run(select, first, estimate, n, len(x))
    level = (np.array(rule.levels) == sigma[:, None]).argmax(axis=1)
    votes = np.stack([estimate.votes[i][row] for row, i in enumerate(level.tolist())])
    return Predictions(found.prediction, found.abstained, votes, n, rule.alpha, seed)


# ---------------------------------------------------------------------------------------------- sigma of the input


def host(x: Tensor) -> Floats:
    """Inputs as a `SigmaFunction` takes them: just these numbers, in float64."""
    return np.asarray(x.detach().cpu().double().numpy(), dtype=np.float64)


def certify_at(
    f: Classifier, x: Tensor, sigma: SigmaFunction, *, rules: Sequence[Rule], **settings: Any
) -> list[Certificates]:
    """Certify the classifier whose noise level is a function of the input, at b inputs.

    Parameters
    ----------
    f : callable
        Base classifier in eval mode, which must not know sigma; (m, ...) to logits (m, k).
    x : Tensor, shape (b, ...), floating point
        Inputs.
    sigma : SigmaFunction
        `ElasticSigma`, `ExtendedSigma` or `BinnedSigma`, fixed before the inputs are seen.
    rules : sequence of Rule
        From votes to a bound of p_A. Radii that a rule names are tested by the p_A that sigma asks for each of them,
        out of reach where it asks for more than 1; rivals are not measured then.
    **settings
        ``num_classes``, ``n``, ``n0``, ``seed``, ``indices`` and ``block``, as in `certify_all`.

    Returns
    -------
    list of Certificates
        One for each rule.

    Raises
    ------
    ValueError, TypeError
        As `certify_all`.

    Notes
    -----
    *Guarantee.* For each input, with probability at least 1 - alpha: either it abstains, or
    argmax_c P(f(z + sigma(z) eps) = c), eps ~ N(0, I), is its class for every z closer to x than its radius.
    """
    inputs = host(x)
    named = [under(rule, partial(sigma.failure, inputs)) for rule in rules]
    asked = [rule if test is None else test for rule, test in zip(rules, named, strict=True)]
    certified = certify_all(f, x, Gaussian(sigma(inputs)), rules=asked, **settings)
    for i, (found, test) in enumerate(zip(certified, named, strict=True)):
        if test is None:
            radius = sigma.radius(inputs, np.nextafter(1.0 - found.p_lower, 1.0))
            radius = np.where(found.abstained, 0.0, radius)
            certified[i] = replace(found, radius=radius, abstained=~(radius > 0.0))
    return certified


def certify_frozen(
    f: Classifier,
    x: Tensor,
    choice: Any,
    *,
    start: float,
    probabilities: bool,
    rules: Sequence[Rule],
    n: int,
    n0: int,
    **votes: Any,
) -> list[Certificates]:
    """Certify at the sigma that a search finds for each of b inputs, as if it were the same everywhere: conditionally.

    Parameters
    ----------
    f, x, rules
        As in `certify_at`.
    choice : Conditional or other holder of a ``search``
        What finds the sigma; its passes are counted.
    start : float
        Where it begins.
    probabilities : bool
        True if f ends in a softmax.
    n, n0, **votes
        As in `certify_all`, with draws of their own.

    Returns
    -------
    list of Certificates
        One for each rule, of kind ``conditional``; see `Conditional`.
    """
    sigma = sigma_of(choice, f, x, start=start, probabilities=probabilities, **votes)
    frozen = certify_all(f, x, Gaussian(sigma), rules=rules, n=n, n0=n0, **votes)
    return [replace(each, kind="conditional", passes=each.passes + choice.search.cost) for each in frozen]


def sigma_of(
    choice: Any, f: Classifier, x: Tensor, *, start: float, probabilities: bool, **votes: Any
) -> Floats:
    """Sigma of each of b inputs: found by the ``search`` of `choice`, or as a `SigmaFunction` of the input."""
    search: SigmaRule | None = getattr(choice, "search", None)
    if search is None:
        return np.asarray(choice(host(x)), dtype=np.float64)
    return search.choose(as_logits(f, probabilities), x, sigma=start, **votes)


def as_logits(f: Classifier, probabilities: bool) -> Classifier:
    """Return f as a search takes it: one that ends in a softmax gives the logs of its outputs."""
    return (lambda noisy: f(noisy).clamp_min(torch.finfo(torch.float32).tiny).log()) if probabilities else f


# ---------------------------------------------------------------------------------------------- training a selector


def level_targets(
    f: Classifier,
    x: Tensor,
    y: NDArray[np.int64],
    sigmas: Sequence[float],
    *,
    num_classes: int,
    draws: int = 100,
    objective: Objective | None = None,
    sharpness: float = 10.0,
    seed: int | None = None,
    indices: ArrayLike | None = None,
    block: int | None = None,
) -> Floats:
    """Which noise level suits each training example: what a selector learns.

    Parameters
    ----------
    f : callable
        Base classifier in eval mode; (m, ...) to logits (m, k).
    x : Tensor, shape (b, ...)
        Training inputs, on the device of f.
    y : ndarray of int64, shape (b,)
        Their classes. Labels serve in training, and nowhere else.
    sigmas : sequence of float, length m
        Noise levels.
    num_classes : int
        Number of classes k.
    draws : int
        Hard votes at each level, with common normals.
    objective : Objective, optional
        Radius of the true class; ``CertifiableRadius()`` by default.
    sharpness : float
        Weights are proportional to exp(sharpness * radius), in the units of the input; 1 in the paper.
    seed, indices, block
        As in `count_votes`.

    Returns
    -------
    ndarray of float64, shape (b, m)
        Weights of the levels, which sum to 1. A class that is not certified at a level counts as radius 0.

    Notes
    -----
    The search of `MultiStartSearch`, restricted to the levels that a selector may choose. *Source.* Sun, Mao and
    Vechev (2026), "Dual randomized smoothing", arXiv 2512.01782.
    """
    goal, seed = CertifiableRadius() if objective is None else objective, check_seed(seed)
    settings: dict[str, Any] = {"num_classes": num_classes, "seed": seed, "indices": indices, "block": block}
    radii = []
    for sigma in sigmas:
        votes = count_votes(f, x, Gaussian(sigma), draws, stage=Stage.SEARCH, **settings).cpu().numpy()
        radii.append(goal.of_votes(votes, draws, y, np.full(len(y), sigma)))
    gain = sharpness * np.maximum(np.stack(radii, axis=1), 0.0)
    weights = np.exp(gain - gain.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)

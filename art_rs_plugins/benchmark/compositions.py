"""What a composition is worth: theta chosen on validation data, baselines to beat, and attacks on each of its parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from art_rs_plugins.benchmark.attacks import Attack
from art_rs_plugins.estimators.aces import PyTorchACES
from art_rs_plugins.estimators.inputs import as_limits
from art_rs_plugins.smoothing.adversary import SmoothAdv
from art_rs_plugins.smoothing.noise import derive_seed
from art_rs_plugins.smoothing.selectors import mixed
from art_rs_plugins.theory.composition import (
    CERTIFY,
    Claim,
    Fallback,
    Histogram,
    Minimum,
    Split,
    Threshold,
    compose,
    settle,
)
from art_rs_plugins.theory.metrics import average_certified_radius, check_labels, natural_accuracy
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import OneSided, Rule, TopTwo, Verdict
from art_rs_plugins.theory.votes import Votes

__all__ = ["COMPOSITION_ATTACKS", "Sweep", "random_router", "selection_rate", "sweep"]


# ---------------------------------------------------------------------------------------------- theta


@dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """What each theta buys on one set of inputs; arrays of shape (t,) unless said otherwise.

    Each row is a statement for a theta that was fixed beforehand. On the inputs that theta is chosen on, the best row
    flatters itself: choose on validation data, and report once on the test.

    Attributes
    ----------
    theta : float64
        Ascending.
    natural : float64
        Fraction of inputs answered with the right class.
    selected : float64
        Fraction that the selector answers itself.
    radii : float64, shape (r,)
        Radii, in the units of the input.
    certified : float64, shape (t, r)
        Certified accuracy.
    average_radius : float64
        Average certified radius.
    """

    theta: NDArray[np.float64]
    natural: NDArray[np.float64]
    selected: NDArray[np.float64]
    radii: NDArray[np.float64]
    certified: NDArray[np.float64]
    average_radius: NDArray[np.float64]

    def choose(self, *, natural: float, radius: float) -> float:
        """Theta of the highest certified accuracy at a radius among those with at least this natural accuracy.

        Raises
        ------
        ValueError
            For a radius that the sweep has not, or if no theta is as accurate.
        """
        column = np.flatnonzero(self.radii == radius)
        if not len(column):
            raise ValueError(f"radius must be one of {self.radii.tolist()}, got {radius}")
        allowed = np.flatnonzero(self.natural >= natural)
        if not len(allowed):
            raise ValueError(f"natural accuracy {natural} is not reached: the best theta has {self.natural.max():.4f}")
        return float(self.theta[allowed[self.certified[allowed, column[0]].argmax()]])


def sweep(
    histogram: Histogram,
    core: Verdict,
    labels: ArrayLike,
    *,
    radii: Sequence[float],
    tau: float = 0.5,
    alpha: float = 0.001,
    rule: Rule | None = None,
    allocation: type[Split] | type[Minimum] = Split,
    fallback: Fallback = Fallback.AGREE,
) -> Sweep:
    """Evaluate every theta of a histogram, without a pass of any network.

    Parameters
    ----------
    histogram, core : Histogram, Verdict
        Of b inputs, from `PyTorchACES.histogram`.
    labels : array_like of int, shape (b,)
        True classes.
    radii : sequence of float
        Radii >= 0.
    tau : float
        Share of votes that selects an input, in [0, 1).
    alpha : float
        Failure probability of one certificate or answer.
    rule : Rule, optional
        How the smoothed classifier's votes are certified; one-sidedly by default. Its alpha gives way to the share.
    allocation, fallback
        As of `PyTorchACES`.

    Returns
    -------
    Sweep
        Answers come from the estimation draws as well; they and the certificates make no joint statement.
    """
    known, whole = check_labels(labels, len(histogram.class_selection)), allocation(alpha)
    grid, share, half = np.asarray(radii, dtype=np.float64), whole.share(2), Split(alpha).share(2)
    smoothed = _claimed(histogram, replace(rule or OneSided(), alpha=share))   # type: ignore[type-var]
    answered = TopTwo(half).decide(histogram.class_estimation, histogram.n)
    fixed = Claim.fixed(core.prediction, abstained=core.abstained)
    sigma = np.full(len(known), histogram.selector_sigma)
    rows = []
    for theta in histogram.edges.tolist():
        first, votes = histogram.at(theta)
        choice = Threshold(tau, share).decide(first, votes, histogram.n, sigma)
        selector = Claim(choice.prediction, np.asarray(choice.radius), choice.abstained)
        claim = compose(whole, [(selector, smoothed)], fixed)
        right = ~claim.abstained & (claim.prediction == known)
        routed = Threshold(tau, half).verdict(votes, histogram.n)
        answer = settle(fallback, [(routed, answered)], core)
        rows.append(
            (
                natural_accuracy(answer.prediction, answer.abstained, known),
                float(np.mean((routed.prediction == CERTIFY) & ~routed.abstained)),
                [float(np.mean(right & (claim.radius >= radius))) for radius in grid],
                average_certified_radius(right, claim.radius),
            )
        )
    natural, selected, certified, average = (np.asarray(column) for column in zip(*rows, strict=True))
    return Sweep(histogram.edges, natural, selected, grid, certified, average)


def _claimed(histogram: Histogram, rule: Rule) -> Claim:
    """What the smoothed classifier's votes establish."""

    def sample(rows: NDArray[np.int64], _start: int, _stop: int) -> Votes:
        return histogram.class_estimation[rows]

    sigma = np.full(len(histogram.class_selection), histogram.sigma)
    found = rule.run(histogram.class_selection, histogram.n0, sample, histogram.n, sigma)
    radius = gaussian_radius(found.failure, found.p_upper, sigma) if found.radius is None else found.radius
    return Claim(found.prediction, np.where(found.abstained, 0.0, radius), found.abstained)


# ---------------------------------------------------------------------------------------------- baselines


def selection_rate(selector: Claim, radii: ArrayLike, *, answer: int = CERTIFY) -> NDArray[np.float64]:
    """Fraction of inputs whose selector certifiably gives this answer within each of the radii. Shape (r,)."""
    grid = np.atleast_1d(np.asarray(radii, dtype=np.float64))
    named = ~selector.abstained & (selector.prediction == answer)
    return np.asarray((named[:, None] & (selector.radius[:, None] >= grid)).mean(axis=0))


def random_router(
    natural: float, *, core: float, smoothed: float, certified: ArrayLike
) -> tuple[float, NDArray[np.float64]]:
    """What a coin would certify at the same natural accuracy: a selector has to beat it.

    Parameters
    ----------
    natural : float
        Natural accuracy of the composition.
    core, smoothed : float
        Natural accuracy of either branch alone.
    certified : array_like of float, shape (r,)
        Certified accuracy of the smoothed classifier alone.

    Returns
    -------
    float, ndarray of float64 (r,)
        Probability of the coin, and its certified accuracy; all inputs are certified if that costs no accuracy.

    Examples
    --------
    >>> share, certified = random_router(0.8, core=0.9, smoothed=0.7, certified=[0.6, 0.4])
    >>> round(share, 6), certified.round(6).tolist()
    (0.5, [0.3, 0.2])
    """
    share = 1.0 if core <= smoothed else float(np.clip((core - natural) / (core - smoothed), 0.0, 1.0))
    return share, share * np.asarray(certified, dtype=np.float64)


# ---------------------------------------------------------------------------------------------- attacks

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the selector's log odds (b,), and the log probabilities (b,) of the true class in the smoothed classifier and in
the rest, to the log of what has to be driven down (b,)."""


def _to_the_core(odds: Tensor, _here: Tensor, rest: Tensor) -> Tensor:
    """Drive the input to the core, and the core to a wrong class."""
    return mixed(odds, torch.zeros_like(odds), rest)


def _through_the_smoothed(odds: Tensor, here: Tensor, _rest: Tensor) -> Tensor:
    """Keep the input selected, and drive the smoothed classifier to a wrong class."""
    return mixed(odds, here, torch.zeros_like(odds))


def _off_the_selector(odds: Tensor, _here: Tensor, _rest: Tensor) -> Tensor:
    """Drive the input off the selector, and leave the rest to the core."""
    return torch.nn.functional.logsigmoid(odds)


def _ascent(objective: Objective) -> Callable[[PyTorchACES, float, int, int], Callable[..., NDArray[np.float32]]]:
    """Smoothed projected gradient ascent on one objective, with fresh draws in each step."""

    def make(estimator: PyTorchACES, budget: float, steps: int, seed: int) -> Callable[..., NDArray[np.float32]]:
        limits = as_limits(estimator.clip_values, estimator.input_shape, estimator.channels_first)
        if limits is not None:
            limits = limits[0].to(estimator.device), limits[1].to(estimator.device)
        attack = SmoothAdv(budget, steps, warmup=0, clip_values=limits)

        def craft(x: NDArray[np.float32], y: NDArray[np.int64]) -> NDArray[np.float32]:
            inputs, labels = (torch.as_tensor(each, device=estimator.device) for each in (x, y))
            step = itertools.count()

            def logits(here: Tensor) -> Tensor:
                module = estimator.attack_view(seed=derive_seed(seed, next(step))).model
                odds, *scores = module.parts(here)
                value = objective(odds, *(score.gather(1, labels[:, None])[:, 0] for score in scores))
                # against 0, its share falls with it, and the gradient never fades
                return torch.stack([value, torch.zeros_like(value)], dim=1)[None]

            return attack.attack(logits, inputs, torch.zeros_like(labels), epoch=0).cpu().numpy()

        return craft

    return make


COMPOSITION_ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("composition", _ascent(mixed)),
        Attack("to-core", _ascent(_to_the_core)),
        Attack("through-smoothed", _ascent(_through_the_smoothed)),
        Attack("off-selector", _ascent(_off_the_selector)),
    )
}
"""Attacks on a composition, for `run_attack`: on all of it, and on each way in which it may fail."""

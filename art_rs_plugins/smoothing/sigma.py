"""A sigma for each input: gradient ascent, a grid with ascent, a search from several starts. No label is ever seen.

A chosen sigma is a proposal. A certificate at it speaks of the classifier with sigma frozen at this input, never of one
that chooses sigma anew for each query; its draws are fresh, so the search cannot bias it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from torch import Tensor, nn

from art_rs_plugins.smoothing.noise import (
    Gaussian,
    Key,
    Stage,
    check_seed,
    derive_seed,
    is_channels_last,
    standard_normals,
)
from art_rs_plugins.smoothing.sampling import (
    Classifier,
    Sampler,
    check_count,
    chunk_size,
    default_block,
    make_sampler,
)
from art_rs_plugins.theory.bounds import check_alpha, clopper_pearson_lower
from art_rs_plugins.theory.radii import check_sigma

__all__ = [
    "CertifiableRadius",
    "GradientAscent",
    "GridAscent",
    "MultiStartSearch",
    "Objective",
    "Search",
    "SigmaRule",
    "TopTwoRadius",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_FIRST_STEP, _LAST_STEP = math.log(1.25), 0.02
"""Steps in log sigma of a climber: the first one, and the one below which halving stops."""


class Objective(Protocol):
    """What a search maximises: an estimate of the radius, from hard votes or from mean soft outputs."""

    def of_votes(self, votes: Integers, draws: int, prediction: Integers, sigma: Floats) -> Floats:
        """Estimate (j,) from the votes (j, k) of so many draws, for classes (j,) at sigmas (j,)."""
        ...

    def of_outputs(self, mean: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Estimate (j,) from mean class probabilities (j, k), differentiable in both."""
        ...


@dataclass(frozen=True, slots=True)
class CertifiableRadius:
    """The one-sided radius that n draws would certify, for the class that the training sigma names.

    The radius itself would lead a search astray: where p_A -> 1 as sigma -> 0, it may be largest at a sigma so small
    that no n draws could show it.

    Parameters
    ----------
    n : int
        Draws of the certificate to come.
    alpha : float
        Its failure probability.
    """

    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_count(self.n, "n"), check_alpha(self.alpha)

    def of_votes(self, votes: Integers, draws: int, prediction: Integers, sigma: Floats) -> Floats:
        """Return ``sigma * Phi^-1(lower bound of p_A)`` for n votes like these; invalid ones are not for A."""
        p = (votes[np.arange(len(votes)), prediction] + 0.5) / (draws + 1.0)
        lower = clopper_pearson_lower(np.rint(self.n * p).astype(np.int64), self.n, self.alpha)
        return np.asarray(sigma * ndtri(lower), dtype=np.float64)

    def of_outputs(self, mean: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return ``sigma * Phi^-1(p_A)``, p_A clamped to [0.001, 0.999] and to what n agreeing votes would show."""
        ceiling = min(0.999, self.alpha ** (1.0 / self.n))
        p = mean.gather(1, prediction[:, None])[:, 0].clamp(0.001, ceiling)
        radius: Tensor = sigma * torch.special.ndtri(p)
        return radius


@dataclass(frozen=True, slots=True)
class TopTwoRadius:
    """The two-sided radius ``sigma / 2 (Phi^-1(p_1) - Phi^-1(p_2))`` of whichever classes lead, as published.

    Parameters
    ----------
    clamp : float
        Soft probabilities are clamped to [clamp, 1 - clamp].
    """

    clamp: float = 0.02

    def __post_init__(self) -> None:
        if not 0.0 < self.clamp < 0.5:
            raise ValueError(f"clamp must lie strictly between 0 and 1/2, got {self.clamp}")

    def of_votes(self, votes: Integers, draws: int, prediction: Integers, sigma: Floats) -> Floats:  # noqa: ARG002
        """From the two leading classes; invalid votes are added to the second."""
        ordered = np.sort(votes, axis=1)
        first, second = ordered[:, -1], ordered[:, -2] + (draws - votes.sum(axis=1))
        gap = ndtri((first + 0.5) / (draws + 1.0)) - ndtri((second + 0.5) / (draws + 1.0))
        return np.asarray(0.5 * sigma * gap, dtype=np.float64)

    def of_outputs(self, mean: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:  # noqa: ARG002
        """From the two largest probabilities; no gradient flows through a clamped one."""
        quantiles = torch.special.ndtri(mean.topk(2, dim=1).values.clamp(self.clamp, 1.0 - self.clamp))
        radius: Tensor = 0.5 * sigma * (quantiles[:, 0] - quantiles[:, 1])
        return radius


class SigmaRule(Protocol):
    """Anything that proposes a sigma for each input from the network and the input alone."""

    @property
    def cost(self) -> int:
        """Forward passes for one input at most; a backward pass counts for two."""
        ...

    def choose(
        self,
        f: Classifier,
        x: Tensor,
        *,
        num_classes: int,
        sigma: float,
        seed: int | None = None,
        indices: ArrayLike | None = None,
        block: int | None = None,
    ) -> Floats:
        """Propose a sigma for each of b inputs.

        Parameters
        ----------
        f : callable
            Base classifier in eval mode; (m, ...) to logits (m, k). Not one that ends in a softmax: hand its log.
        x : Tensor, shape (b, ...), floating point
            Inputs, on the device of f; not changed.
        num_classes : int
            Number of classes k.
        sigma : float
            Noise level that f was trained with.
        seed, indices, block
            As in `smoothing.sampling.count_votes`. Draws are of ``Stage.SEARCH``: none of a certificate's.

        Returns
        -------
        ndarray of float64, shape (b,)
            A function of the network, the input, its index and the seed. Hard votes do not depend on the other inputs;
            soft outputs do within rounding.

        Raises
        ------
        ValueError, TypeError
            As `count_votes`, and for a training sigma outside the bounds of the search.
        """
        ...


def _check_bounds(bounds: tuple[float, float]) -> None:
    low, high = check_sigma(bounds, "bounds")
    if not low < high:
        raise ValueError(f"bounds must be (smallest, largest) sigma, got {bounds}")


def _inside(sigma: float, bounds: tuple[float, float]) -> float:
    """Return the training sigma, which is a candidate of every search, or raise ``ValueError``."""
    value = float(check_sigma(sigma))
    if not bounds[0] <= value <= bounds[1]:
        raise ValueError(f"bounds {bounds} must contain the training sigma, {value}, which names the class; widen them")
    return value


def _votes(sampler: Sampler, sigma: Floats, rows: Integers, draws: int) -> Integers:
    """Votes (j, k) of inputs at j sigmas; an input meets the same normals, scaled, at each of its own."""
    x = sampler.x[rows]
    if is_channels_last(sampler.x):
        x = x.contiguous(memory_format=torch.channels_last)
    pairs = replace(sampler, x=x, noise=Gaussian(sigma), indices=sampler.indices[rows])
    return np.asarray(pairs.count(np.arange(len(rows)), 0, draws).cpu().numpy(), dtype=np.int64)


def _slopes(
    f: Classifier,
    x: Tensor,
    sigma: Floats,
    keys: Sequence[Key],
    prediction: Integers,
    objective: Objective,
    *,
    draws: int,
    antithetic: bool,
    block: int,
) -> Floats:
    """Derivative of the soft objective by sigma, for b inputs; 0 where it is not finite.

    All draws of an input pass the network together, and every pass has the same number of rows. The graph begins at
    sigma and ends there: no parameter of the network gains a gradient or loses a flag.
    """
    size = max(1, block // draws)
    slopes = np.zeros(len(x))
    for first in range(0, len(x), size):
        rows = np.minimum(np.arange(first, first + size), len(x) - 1)   # padded
        normal = standard_normals((draws // (1 + antithetic), *x.shape[1:]), keys[first : first + size], x.device)
        normal = torch.cat([normal, -normal], dim=1)[rows - first] if antithetic else normal[rows - first]
        with torch.enable_grad():
            leaf = torch.as_tensor(sigma[rows], dtype=torch.float32, device=x.device).requires_grad_()
            noisy = x[rows].float()[:, None] + leaf.view(-1, *[1] * x.ndim) * normal
            outputs = f(noisy.flatten(0, 1)).float().softmax(dim=1)
            mean = outputs.unflatten(0, (size, draws)).mean(dim=1)
            value = objective.of_outputs(mean, torch.from_numpy(prediction[rows]).to(x.device), leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        slopes[first : first + size] = slope.cpu().numpy()[: len(x) - first]
    return np.where(np.isfinite(slopes), slopes, 0.0)


@dataclass(frozen=True, slots=True)
class GradientAscent:
    """Plain gradient ascent on sigma, as published; for comparison.

    With the published step it stops early in a drift more than it finds an optimum: while the soft probabilities are
    clamped, sigma grows by 2.05 ``step`` in each iteration, whatever the radius does.

    Parameters
    ----------
    iterations : int
        Steps.
    step : float
        Step size.
    draws : int
        Fresh draws in each step, at least 2: a single one names its own winner, and tells nothing of p_A.
    objective : Objective
        What is maximised.
    bounds : pair of float, optional
        Range of sigma; none as published.

    Raises
    ------
    ValueError, TypeError
        For numbers that do not fit.

    Notes
    -----
    A step to what is no sigma (zero, negative, not finite) is not taken.

    *Source.* Alfarra et al. (2022), "Data dependent randomized smoothing", algorithm 1.
    """

    iterations: int = 900
    step: float = 1e-4
    draws: int = 8
    objective: Objective = TopTwoRadius()
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_count(self.iterations, "iterations"), check_sigma(self.step, "step")
        if self.bounds is not None:
            _check_bounds(self.bounds)
        if check_count(self.draws, "draws") < 2:
            raise ValueError("draws must be at least 2: a single one names its own winner, and tells nothing of p_A")

    @property
    def cost(self) -> int:
        """Forward passes for one input at most; a backward pass counts for two."""
        return 3 * self.iterations * self.draws

    def choose(
        self,
        f: Classifier,
        x: Tensor,
        *,
        num_classes: int,
        sigma: float,
        seed: int | None = None,
        indices: ArrayLike | None = None,
        block: int | None = None,
    ) -> Floats:
        """Ascend from the training sigma; see `SigmaRule.choose`."""
        trained = _inside(sigma, self.bounds or (0.0, math.inf))
        sampler = make_sampler(
            f, x, Gaussian(trained), self.draws, num_classes=num_classes, seed=check_seed(seed), indices=indices,
            stage=Stage.SEARCH, block=block,
        )   # fmt: skip
        start = np.full(len(x), trained)
        return self._ascend(f, x, start, sampler.seed, sampler.indices.tolist(), 0, sampler.block)

    def propose(
        self, f: nn.Module, x: Tensor, y: Tensor, sigma: Floats, *, seed: int, index: list[int], epoch: int  # noqa: ARG002
    ) -> Floats:
        """Ascend from the sigmas of training examples, labels unseen; see `smoothing.sigma_table.SigmaUpdate`."""
        return self._ascend(f, x, sigma, seed, index, epoch * self.iterations, default_block(x.shape[1:], x.device))

    def _ascend(
        self, f: Classifier, x: Tensor, sigma: Floats, seed: int, index: list[int], first: int, block: int
    ) -> Floats:
        nobody = np.zeros(len(x), dtype=np.int64)   # the leading classes are named anew in each step
        for step in range(first, first + self.iterations):
            keys = [Key(seed, i, Stage.SEARCH, step) for i in index]
            slope = _slopes(f, x, sigma, keys, nobody, self.objective, draws=self.draws, antithetic=False, block=block)
            moved = sigma + self.step * slope
            moved = moved if self.bounds is None else moved.clip(*self.bounds)
            sigma = np.where(moved > 0.0, moved, sigma)
        return sigma


@dataclass(frozen=True, slots=True)
class GridAscent:
    """A grid of hard votes, gradient ascent on log sigma from its best point, and a comparison on fresh votes.

    The training sigma is among the candidates of the grid and of the comparison, and its votes name the class. Fields
    are explained by the steps: (i) `votes` hard votes at each of `points` geometric sigmas, with common draws;
    (ii) `iterations` steps of Adam at this `rate` on log sigma, with `draws` antithetic draws each; (iii) `fresh` new
    hard votes for the training sigma, the best point and where the ascent ended. Ties go to the smaller sigma.

    Parameters
    ----------
    points, votes, iterations, draws, fresh : int
        See above; `draws` is even.
    rate : float
        Learning rate.
    objective : Objective
        What is maximised; tell it the n and alpha of the certificate to come.
    bounds : pair of float, optional
        Range of sigma; from a quarter to four times the training sigma by default.

    Raises
    ------
    ValueError, TypeError
        For numbers that do not fit.
    """

    points: int = 8
    votes: int = 200
    iterations: int = 20
    rate: float = 0.05
    draws: int = 128
    fresh: int = 1000
    objective: Objective = CertifiableRadius()
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("points", "votes", "iterations", "draws", "fresh"):
            check_count(getattr(self, name), name)
        check_sigma(self.rate, "rate")
        if self.bounds is not None:
            _check_bounds(self.bounds)
        if self.draws % 2:
            raise ValueError(f"draws must be even, since half of them mirror the other half; got {self.draws}")

    @property
    def cost(self) -> int:
        """Forward passes for one input at most; a backward pass counts for two."""
        return (self.points + 1) * self.votes + 3 * self.iterations * self.draws + 3 * self.fresh

    def choose(
        self,
        f: Classifier,
        x: Tensor,
        *,
        num_classes: int,
        sigma: float,
        seed: int | None = None,
        indices: ArrayLike | None = None,
        block: int | None = None,
    ) -> Floats:
        """Search around the training sigma; see `SigmaRule.choose`."""
        bounds = self.bounds or (sigma / 4.0, sigma * 4.0)
        trained = _inside(sigma, bounds)
        sampler = make_sampler(
            f, x, Gaussian(trained), self.votes, num_classes=num_classes, seed=check_seed(seed), indices=indices,
            stage=Stage.SEARCH, block=block,
        )   # fmt: skip
        grid = np.sort([trained, *np.geomspace(*bounds, self.points)])
        candidates = np.tile(grid, (len(x), 1))
        votes = self._count(sampler, candidates, self.votes)
        prediction = votes[:, np.searchsorted(grid, trained)].argmax(axis=1)
        start = self._best(votes, self.votes, prediction, candidates)
        end = self._ascend(replace(sampler, seed=derive_seed(sampler.seed, 1)), start, prediction, bounds)
        finalists = np.sort(np.stack([np.full(len(x), trained), start, end], axis=1), axis=1)
        fresh = replace(sampler, seed=derive_seed(sampler.seed, 2), chunk=min(chunk_size(sampler.block), self.fresh))
        return self._best(self._count(fresh, finalists, self.fresh), self.fresh, prediction, finalists)

    @staticmethod
    def _count(sampler: Sampler, sigma: Floats, draws: int) -> Integers:
        """Votes (b, t, k) of each input at t sigmas (b, t)."""
        rows = np.repeat(np.arange(len(sigma)), sigma.shape[1])
        return _votes(sampler, sigma.ravel(), rows, draws).reshape(*sigma.shape, -1)

    def _best(self, votes: Integers, draws: int, prediction: Integers, sigma: Floats) -> Floats:
        """For each input the best of its t sigmas (b, t), which ascend; of equals the first."""
        classes = np.repeat(prediction, sigma.shape[1])
        value = self.objective.of_votes(votes.reshape(sigma.size, -1), draws, classes, sigma.ravel())
        return np.asarray(sigma[np.arange(len(sigma)), value.reshape(sigma.shape).argmax(axis=1)])

    def _ascend(self, sampler: Sampler, start: Floats, prediction: Integers, bounds: tuple[float, float]) -> Floats:
        """Adam on log sigma, in float64 and for each input by itself."""
        mean, square = np.zeros(len(start)), np.zeros(len(start))
        sigma = start
        for step in range(self.iterations):
            keys = [Key(sampler.seed, index, Stage.SEARCH, step) for index in sampler.indices.tolist()]
            slope = sigma * _slopes(
                sampler.f, sampler.x, sigma, keys, prediction, self.objective,
                draws=self.draws, antithetic=True, block=sampler.block,
            )   # fmt: skip
            mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
            unbiased = mean / (1.0 - 0.9 ** (step + 1)), square / (1.0 - 0.999 ** (step + 1))
            sigma = (sigma * np.exp(self.rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-12))).clip(*bounds)
        return sigma


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """What a search over sigma found for b inputs.

    Attributes
    ----------
    sigma : ndarray of float64, shape (b,)
        The best sigma that was tried; of equals the smallest.
    tried, value : ndarray of float64, shape (b, t)
        Every sigma that was tried, and its objective; NaN where there were fewer than t.
    """

    sigma: Floats
    tried: Floats
    value: Floats


@dataclass(frozen=True, slots=True)
class MultiStartSearch:
    """Hill climbing on log sigma from several starts, by hard votes with common draws.

    Each climber looks a step to either side, goes where the objective is larger, and halves its step where neither side
    is. Several starts, because the radius may have several maxima in sigma with a valley between them.

    Parameters
    ----------
    starts : sequence of float
        Where to begin; clipped to the bounds.
    draws : int
        Hard votes at each sigma; an input meets the same normals everywhere.
    evaluations : int
        Sigmas that one start may try.
    bounds : pair of float
        Range of sigma.
    objective : Objective
        What is maximised; ``TopTwoRadius()`` is nearer to the paper.

    Raises
    ------
    ValueError, TypeError
        For numbers that do not fit.

    Notes
    -----
    *Source.* A reconstruction of Chen et al. (2021), "Insta-RS: instance-wise randomized smoothing", whose abstract
    names a multiple-start search and whose pseudo-code was not available.
    """

    starts: tuple[float, ...] = (0.12, 0.25, 0.5, 0.75, 1.0)
    draws: int = 200
    evaluations: int = 12
    bounds: tuple[float, float] = (0.05, 1.5)
    objective: Objective = CertifiableRadius()

    def __post_init__(self) -> None:
        check_sigma(self.starts, "starts")
        _check_bounds(self.bounds)
        check_count(self.draws, "draws"), check_count(self.evaluations, "evaluations")

    @property
    def cost(self) -> int:
        """Forward passes for one input at most."""
        return self.draws * (1 + len(self.starts) * self.evaluations)

    def choose(
        self,
        f: Classifier,
        x: Tensor,
        *,
        num_classes: int,
        sigma: float,
        seed: int | None = None,
        indices: ArrayLike | None = None,
        block: int | None = None,
    ) -> Floats:
        """Search from all starts; see `SigmaRule.choose`."""
        found = self.search(f, x, num_classes=num_classes, sigma=sigma, seed=seed, indices=indices, block=block)
        return found.sigma

    def search(
        self,
        f: Classifier,
        x: Tensor,
        *,
        num_classes: int,
        sigma: float,
        seed: int | None = None,
        indices: ArrayLike | None = None,
        block: int | None = None,
    ) -> Search:
        """As `choose`, and everything that was tried, the training sigma first."""
        trained = _inside(sigma, self.bounds)
        sampler = make_sampler(
            f, x, Gaussian(trained), self.draws, num_classes=num_classes, seed=check_seed(seed), indices=indices,
            stage=Stage.SEARCH, block=block,
        )   # fmt: skip
        level, everyone = np.full(len(x), trained), np.arange(len(x))
        votes = _votes(sampler, level, everyone, self.draws)
        prediction = votes.argmax(axis=1)

        def evaluate(rows: Integers, at: Floats) -> Floats:
            return self.objective.of_votes(_votes(sampler, at, rows, self.draws), self.draws, prediction[rows], at)

        base = self.objective.of_votes(votes, self.draws, prediction, level)
        rounds = [(level, base), *self._climb(len(x), evaluate)]
        tried, value = (np.column_stack([part[i].reshape(len(x), -1) for part in rounds]) for i in (0, 1))
        best = value == np.nanmax(value, axis=1, keepdims=True)
        return Search(np.where(best, tried, np.inf).min(axis=1), tried, value)

    def _climb(self, b: int, evaluate: Callable[[Integers, Floats], Floats]) -> list[tuple[Floats, Floats]]:
        """What the climbers (b, starts) tried in each round, and its objective; all of them step together."""
        low, high = np.log(self.bounds)
        rounds: list[tuple[Floats, Floats]] = []

        def look(places: Floats, wanted: NDArray[np.bool_]) -> Floats:
            at = np.where(wanted, np.exp(places).clip(*self.bounds), np.nan)
            value = np.full(at.shape, np.nan)
            if wanted.any():
                value[wanted] = evaluate(np.nonzero(wanted)[0], at[wanted])
            rounds.append((at, value))
            return np.where(wanted, value, -np.inf)

        here = np.tile(np.log(self.starts).clip(low, high), (b, 1))
        best = look(here, np.ones(here.shape, dtype=bool))
        width, used = np.full(here.shape, _FIRST_STEP), np.ones(here.shape)
        behind = np.zeros((*here.shape, 2), dtype=bool)   # where a climber came from is known to be no better
        while True:
            sides = np.stack([here - width, here + width], axis=2).clip(low, high)
            wanted = ~behind & (sides != here[..., None])
            climbing = (width >= _LAST_STEP) & (used + wanted.sum(axis=2) <= self.evaluations)
            if not climbing.any():
                return rounds
            wanted &= climbing[..., None]
            gain = look(sides, wanted)
            side = gain.argmax(axis=2)[..., None]   # of equal sides the smaller sigma
            moved = gain.max(axis=2) > best
            here = np.where(moved, np.take_along_axis(sides, side, axis=2)[..., 0], here)
            best = np.maximum(best, gain.max(axis=2))
            width = np.where(moved, width, 0.5 * width)
            used += wanted.sum(axis=2)
            behind = moved[..., None] & (np.arange(2) != side)

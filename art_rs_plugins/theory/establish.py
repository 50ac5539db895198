"""Named radii: exact sequential tests of all that each of them needs, at one noise level or at several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from art_rs_plugins.theory.sequences import GatekeptTable, Progress, schedule
from art_rs_plugins.theory.votes import Votes, check_votes, strongest_rival

__all__ = ["Established", "Hypotheses", "SampleAt", "check_radii", "establish"]

SampleAt = Callable[[int, NDArray[np.int64], int, int], Votes]
"""Votes (r, k) at a level, by its number, among the draws start, ..., stop - 1 of the inputs at some positions (r,)."""


def check_radii(radii: ArrayLike) -> tuple[float, ...]:
    """Return named radii, or raise ``ValueError`` unless they are finite, >= 0 and strictly increasing."""
    values = np.asarray(radii, dtype=np.float64)
    if values.ndim != 1 or not len(values) or np.any(~np.isfinite(values) | (values < 0)):
        raise ValueError(f"radii must be finite and >= 0, in the units of the input; got {radii!r}")
    if np.any(np.diff(values) <= 0):
        raise ValueError(f"radii must be strictly increasing, got {radii!r}")
    return tuple(values.tolist())


@dataclass(frozen=True, slots=True, eq=False)
class Hypotheses:
    """What is to be rejected about the votes of b inputs at one level, for each of m radii in ascending order.

    Attributes
    ----------
    level : int
        Number of the level.
    target : ndarray of int64, shape (b,)
        A class of each input, constant given the selection draws.
    limits : ndarray of float64, shape (b, m)
        "1 - p_target >= limit", or "p_c >= limit" for some other class c if `rival`. Descending along the radii; 0, or
        NaN, where a radius is out of reach.
    asked : ndarray of bool, shape (b,)
        Inputs that it is about; every input needs at least one of them.
    rival : bool
        Whether it is about the other classes.
    """

    level: int
    target: NDArray[np.int64]
    limits: NDArray[np.float64]
    asked: NDArray[np.bool_]
    rival: bool = False

    def successes(self, votes: Votes, taken: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draws (b,) that speak against the hypotheses, in a table (b, k) of so many draws (b,)."""
        if self.rival:
            return taken - strongest_rival(votes, self.target, taken)
        return votes[np.arange(len(votes)), self.target]


@dataclass(frozen=True, slots=True, eq=False)
class Established:
    """What sequential tests came to: radii passed (b,), and for each level votes (b, k) and draws taken (levels, b)."""

    passed: NDArray[np.int64]
    votes: list[Votes]
    taken: NDArray[np.int64]


def establish(
    hypotheses: Sequence[Hypotheses], sample: SampleAt, n: int, classes: Sequence[int], alpha: float, beta: float
) -> Established:
    """Establish as many radii as possible, in ascending order, looking at the votes on the way and stopping when clear.

    Parameters
    ----------
    hypotheses : sequence of Hypotheses
        A radius is established when those of all of them are rejected.
    sample : SampleAt
        Votes on demand. Draws of different levels may share their noise.
    n : int
        Draws of an input at one level at most; ``ValueError`` if below the first look.
    classes : sequence of int
        Number of classes k at each level.
    alpha, beta : float
        As in `theory.sequences.group_sequential`, for each test.

    Raises
    ------
    ValueError
        If nothing is asked of an input, or n lies below the first look.

    Notes
    -----
    *Guarantee.* For each input let r be the least radius with a true hypothesis. It is established only if a test that
    is true at r rejects, which has probability at most alpha, and larger radii only together with r: so with
    probability at least 1 - alpha every established radius is free of true hypotheses. Nothing is split over the tests
    (intersection and union, Berger 1982) or over the radii (fixed sequence). About rivals: fix a class c other than the
    target with p_c >= limit; the draws that went neither to the strongest rival nor astray are at most those that
    missed c, so the test errs no more often than one about c alone would.

    A level is asked no further about an input once its tests cannot change the answer; that depends on scheduled looks
    at its own and the other levels' earlier votes, and can only leave a radius out.
    """
    size, m = hypotheses[0].limits.shape
    if not np.any([each.asked for each in hypotheses], axis=0).all():
        raise ValueError("hypotheses must ask something of every input; what is not asked is not established")
    looks, levels = schedule(n), len(classes)
    tests = [_Test(each, looks, alpha, beta) for each in hypotheses]
    votes = [np.zeros((size, k), dtype=np.int64) for k in classes]
    taken = np.zeros((levels, size), dtype=np.int64)
    for before, look in zip((0, *looks), looks):   # noqa: B905
        open_ = _open(tests, m)
        if not open_.any():
            break
        for level in range(levels):
            asked = [test for test in zip(tests, open_, strict=True) if test[0].about.level == level]
            rows = np.flatnonzero(np.any([mask for _, mask in asked], axis=0)) if asked else np.empty(0, np.int64)
            if len(rows):
                votes[level][rows] += check_votes(sample(level, rows, before, look), look - before, "estimation")
                taken[level, rows] = look
                for test, mask in asked:
                    test.advance(mask, test.about.successes(votes[level], taken[level]))
    return Established(np.min([test.passed for test in tests], axis=0), votes, taken)


def _open(tests: Sequence[_Test], m: int) -> NDArray[np.bool_]:
    """Mask (tests, b) of the tests that may still change which radius their input passes."""
    passed, decided = np.stack([test.passed for test in tests]), np.stack([test.decided for test in tests])
    most = np.where(decided, passed, m).min(axis=0)   # what one test has given up is out of reach for all
    return np.asarray(~decided & (passed < most) & (passed.min(axis=0) < most))


class _Test:
    """One of the hypotheses for all radii, under way: inputs with the same limits share a table of boundaries."""

    def __init__(self, about: Hypotheses, looks: tuple[int, ...], alpha: float, beta: float) -> None:
        m = about.limits.shape[1]
        self.about = about
        self.passed: NDArray[np.int64] = np.where(about.asked, 0, m)
        self.decided = ~about.asked
        self.groups: list[tuple[NDArray[np.int64], GatekeptTable, Progress]] = []
        rows = np.flatnonzero(about.asked)
        kinds, kind = np.unique(np.nan_to_num(about.limits[rows], nan=0.0), axis=0, return_inverse=True)
        for i, limits in enumerate(kinds):
            group, table = rows[kind.ravel() == i], _table(tuple(limits.tolist()), looks, alpha, beta)
            if table is None:
                self.decided[group] = True
            else:
                self.groups.append((group, table, table.start(len(group))))

    def advance(self, mask: NDArray[np.bool_], successes: NDArray[np.int64]) -> None:
        """Take the next look at the inputs of a mask (b,), from their successes (b,); the others have stopped."""
        for i, (rows, table, progress) in enumerate(self.groups):
            if mask[rows].any():
                stopped = replace(progress, decided=progress.decided | ~mask[rows])
                progress = table.advance(stopped, successes[rows])
                self.groups[i] = rows, table, progress
                self.passed[rows], self.decided[rows] = progress.passed, progress.decided


@lru_cache(maxsize=4096)
def _table(limits: tuple[float, ...], looks: tuple[int, ...], alpha: float, beta: float) -> GatekeptTable | None:
    """Test of "1 - p >= limit" for descending limits, as far as they can be reached; None if no radius can."""
    # tested a hair above, so that rounding cannot turn "p > p0" into less than the radius, nor make two of them equal
    chances = np.maximum.accumulate(1.0 - np.clip(limits, 0.0, 1.0)) * (1.0 + 1e-12)
    chances += 1e-12 * np.arange(1, len(limits) + 1)
    reachable = int(np.cumprod(chances < 1.0).sum())
    return GatekeptTable(tuple(chances[:reachable]), looks, alpha, beta) if reachable else None

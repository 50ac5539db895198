"""A memory of promises: labelled balls, of which no two with different labels overlap.

Where sigma is chosen for each input, a certificate speaks of a classifier frozen at that input, and no radius follows
for the one that is deployed. A memory repairs this by keeping its word: once class c was promised on a ball, every
later query inside it is answered c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from math import pi
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import zeta

from art_rs_plugins.theory.bounds import check_alpha
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.search import SLACK, BallSearch, Points, Rows, as_points

__all__ = ["Budget", "Case", "CertifiedRegions", "EndlessBudget", "Promise", "SharedBudget"]


class Case(IntEnum):
    """How a promise came about."""

    NEW = 0         # the certificate's radius, as it is
    TRIMMED = 1     # shortened, so as not to overlap a ball of another class
    INHERITED = 2   # the input lies in a ball of an earlier record
    REPLAYED = 3    # the input is the centre of an earlier record
    ABSTAINED = 4   # nothing is promised


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised at one input.

    Attributes
    ----------
    prediction : int
        The class; where abstained, the leading one, which carries no promise.
    radius : float
        Every later query closer than this is answered with `prediction`; 0 promises the input itself.
    case : Case
        How it came about.
    record : int
        Number of the record that keeps it; -1 where there is none.
    """

    prediction: int
    radius: float
    case: Case
    record: int

    @property
    def is_record(self) -> bool:
        """Whether it is one to be inserted, rather than one that follows from an earlier record."""
        return self.case in (Case.NEW, Case.TRIMMED) and self.record >= 0


class CertifiedRegions:
    r"""Labelled balls in l2, each with its centre; balls with different labels never overlap.

    All methods take b inputs as floating point numbers that float32 holds exactly, shape (b, *shape). Nothing is ever
    moved, enlarged or removed: that would break a promise.

    Parameters
    ----------
    shape : tuple of int
        Shape of one input.

    Notes
    -----
    *Guarantee.* Let r_i be the radius of record i, d the distance and d' its value by `distances`, e = 1e-9. The record
    is enforced on E_i = {x : d'(x, x_i) <= r_i (1 + e)}, which contains x_i and {x : d(x, x_i) < r_i}. E_i and E_j with
    different labels share no float32 point: one of both would give d(x_i, x_j) <= (r_i + r_j)(1 + e)(1 + 3e-15), but
    balls are trimmed to (r_i + r_j)(1 + e) <= d'(x_i, x_j)(1 - e); and where a radius was trimmed to 0, its centre was
    outside the other's E, by the same bits that every later comparison computes. So a query lies in balls of at most
    one label, its answer never changes once it is covered, and a reply of radius r_i - d'(x, x_i)(1 + e) inside E_i is
    kept, by the triangle inequality. This is geometry: it holds for any class and radius, and has no probability in it.
    It says nothing of queries before the promise, and so nothing against an attacker who asks first.

    *Source.* Alfarra et al. (2022), "Data-Dependent Randomized Smoothing", UAI, with the memory for every query,
    abstentions left out of it, points kept where no ball fits, and rounding accounted for.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._search = BallSearch(shape)
        self._prediction, self._radius = Rows(np.int64), Rows(np.float64)

    def __len__(self) -> int:
        return len(self._search)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self._search.shape

    @property
    def prediction(self) -> NDArray[np.int64]:
        """Labels of the records, shape (M,)."""
        return self._prediction.all

    @property
    def radius(self) -> NDArray[np.float64]:
        """Radii of the records, shape (M,)."""
        return self._radius.all

    def centres(self, records: NDArray[np.int64] | slice = slice(None)) -> Points:
        """Centres of some records, shape (n, d), float32."""
        return self._search.points(records)

    # ------------------------------------------------------------------ questions

    def covering(self, x: ArrayLike) -> list[Promise | None]:
        """What is already promised at b inputs; None where nothing is.

        A centre is answered with its own record, so that the same question has the same answer, and any other input
        by the record that reaches furthest from it.
        """
        points = as_points(x, self.shape)
        return [self._cover(rows, apart) for rows, apart in self._search.near(points, np.zeros(len(points)))]

    def clearance(self, x: ArrayLike, prediction: ArrayLike, limit: ArrayLike) -> NDArray[np.float64]:
        """Radius, up to a limit, at which a ball of some class keeps clear of the balls of all others.

        Parameters
        ----------
        x : array_like of float, shape (b, *shape)
            Inputs.
        prediction : array_like of int, shape (b,)
            Class of each ball.
        limit : array_like of float, shape (b,)
            Radius beyond which nobody asks; the search is faster for a smaller one.

        Returns
        -------
        ndarray of float64, shape (b,)
            min(limit, min_j (d_j (1 - e) - r_j (1 + e)) / (1 + e)) over the records j of other classes, at least 0.
        """
        points, labels = as_points(x, self.shape), np.asarray(prediction)
        limits = np.broadcast_to(np.asarray(limit, dtype=np.float64), labels.shape)
        found = self._search.near(points, limits)
        return np.array([
            self._room(rows, apart, int(label), float(most))
            for (rows, apart), label, most in zip(found, labels, limits, strict=True)
        ])

    def settle(self, x: ArrayLike, certificates: Certificates) -> list[Promise]:
        """What to promise at b inputs, given the certificates that were made for them; nothing is stored yet.

        An input that is covered keeps what it was promised, whatever its certificate says. An abstention promises
        nothing and leaves the geometry alone. Any other ball is trimmed to keep clear of the balls of other classes, to
        radius 0 if need be: the point itself is promised in any case. Records are numbered from ``len(self)``.

        Parameters
        ----------
        x : array_like of float, shape (b, *shape)
            Inputs.
        certificates : Certificates
            Of these inputs, in l2; ``index`` names the request.

        Returns
        -------
        list of Promise

        Raises
        ------
        ValueError, TypeError
            If x and certificates do not fit.

        Notes
        -----
        *Guarantee.* After `insert`, the regions are as the class promises. Several inputs at once are settled as a set:
        the result does not depend on their order. Inputs i and j of different classes with radii R_i and R_j, trimmed
        by the records, share the distance between them in proportion: r_i <= d_ij (1 - e) / (1 + e) R_i / (R_i + R_j).
        Of equal inputs, the one with the lowest index is settled, and the others are answered from it.
        """
        points = self._check(x, certificates)
        covers: list[Promise | None] = []
        room = certificates.radius.copy()
        for row, (rows, apart) in enumerate(self._search.near(points, certificates.radius)):
            covers.append(self._cover(rows, apart))
            room[row] = self._room(rows, apart, int(certificates.prediction[row]), room[row])
        rank = np.lexsort((certificates.radius, certificates.prediction, certificates.index))
        asking = [row for row in rank if covers[row] is None and not certificates.abstained[row]]
        winners, twins = _without_twins(points, asking)
        shared = _share(points[winners], certificates.prediction[winners], room[winners], self.shape)
        for number, (row, radius) in enumerate(zip(winners, shared, strict=True), start=len(self)):
            case = Case.NEW if radius == certificates.radius[row] else Case.TRIMMED
            covers[row] = Promise(int(certificates.prediction[row]), float(radius), case, number)
        for row, twin in twins.items():
            first = covers[twin]
            covers[row] = None if first is None else replace(first, case=Case.REPLAYED)
        return [
            Promise(int(certificates.prediction[row]), 0.0, Case.ABSTAINED, -1) if cover is None else cover
            for row, cover in enumerate(covers)
        ]

    def frozen(self, x: ArrayLike, certificates: Certificates) -> list[Promise]:
        """Certificates of a classifier that never changes: these regions, and a smoothed classifier outside them.

        Parameters
        ----------
        x : array_like of float, shape (b, *shape)
            Inputs.
        certificates : Certificates
            Of the smoothed classifier g, with one sigma for all inputs, at these inputs.

        Returns
        -------
        list of Promise
            Of h, which answers from the regions where an input is covered and as g elsewhere. ``record`` is the record
            that answers, -1 where g does. The regions are not changed.

        Raises
        ------
        ValueError, TypeError
            If x and certificates do not fit, or they are conditional: then g is another classifier at every input.

        Notes
        -----
        *Guarantee.* As long as nothing is inserted, for each row that does not abstain, with probability at least
        1 - alpha over the draws of its certificate, h answers ``prediction`` on the open ball of that radius, whatever
        the order of queries: a point of it is covered, and by that class alone, or g answers, and does so with that
        class. A radius that the regions give by themselves has no probability in it.
        """
        if certificates.kind in ("conditional", "committed"):
            raise ValueError(f"certificates must be of one classifier, got {certificates.kind} ones; fix one sigma")
        points, promises = self._check(x, certificates), []
        for row, (rows, apart) in enumerate(self._search.near(points, certificates.radius)):
            label, raw = int(certificates.prediction[row]), float(certificates.radius[row])
            cover, room = self._cover(rows, apart), self._room(rows, apart, label, raw)
            if cover is not None:
                promises.append(replace(cover, radius=max(cover.radius, room)))   # 0 < room only if both agree
            elif certificates.abstained[row]:
                promises.append(Promise(label, 0.0, Case.ABSTAINED, -1))
            else:
                promises.append(Promise(label, room, Case.NEW if room == raw else Case.TRIMMED, -1))
        return promises

    def audit(self) -> None:
        """Compare all pairs of records; ``ValueError`` that names two of different classes that are not disjoint."""
        for start in range(0, len(self), 256):
            stop = min(start + 256, len(self))
            points = self.centres(slice(start, stop))
            found = self._search.near(points, self._search.reach[start:stop], first=stop)
            for record, (rows, apart) in enumerate(found, start=start):
                rivals = self.prediction[rows] != self.prediction[record]
                other, between = rows[rivals], apart[rivals]
                total = (self.radius[other] + self.radius[record]) * (1.0 + SLACK)
                point = np.minimum(self.radius[other], self.radius[record]) == 0.0
                overlap = np.where(point, between <= total, total > between * (1.0 - SLACK / 2.0))
                if np.any(overlap):
                    pair = sorted((int(other[overlap][0]), record))
                    raise ValueError(
                        f"records {pair[0]} and {pair[1]} promise different classes on balls that "
                        "overlap, so their promises cannot be kept; restore the memory from a copy"
                    )

    # ------------------------------------------------------------------ growth

    def insert(self, x: ArrayLike, promises: Sequence[Promise]) -> None:
        """Store the new records among b promises, as `settle` gave them for b inputs; the others need no storing.

        Raises
        ------
        ValueError
            If something else was inserted since they were settled; settle again.
        """
        points = as_points(x, self.shape)
        if len(points) != len(promises):
            raise ValueError(f"x and promises must have the same length, got {len(points)} and {len(promises)}")
        fresh = [row for row, promise in enumerate(promises) if promise.is_record]
        rows = sorted(fresh, key=lambda row: promises[row].record)
        if [promises[row].record for row in rows] != list(range(len(self), len(self) + len(rows))):
            raise ValueError("promises were settled when there were other records; settle them again, then insert")
        radius = np.array([promises[row].radius for row in rows], dtype=np.float64)
        with np.errstate(over="ignore"):   # a radius may be as large as it likes
            self._search.append(points[rows], radius * (1.0 + SLACK))
        self._prediction.extend(np.array([promises[row].prediction for row in rows], dtype=np.int64))
        self._radius.extend(radius)

    # ------------------------------------------------------------------ one input

    def _check(self, x: ArrayLike, certificates: Certificates) -> Points:
        points = as_points(x, self.shape)
        if len(points) != len(certificates):
            raise ValueError(f"x and certificates must have the same length, got {len(points)} and {len(certificates)}")
        if certificates.norm != 2.0:
            raise ValueError(f"regions are l2 balls, got certificates in norm {certificates.norm}")
        return points

    def _cover(self, rows: NDArray[np.int64], apart: NDArray[np.float64]) -> Promise | None:
        inside = apart <= self._search.reach[rows]
        records, depth = rows[inside], apart[inside]
        if not len(records):
            return None
        left = self.radius[records] - depth * (1.0 + SLACK)
        best = int(np.argmax(left)) if depth.min() > 0.0 else int(np.argmin(depth))
        case = Case.INHERITED if depth[best] > 0.0 else Case.REPLAYED
        radius = left[best] if case is Case.REPLAYED else max(0.0, float(np.nextafter(left[best], 0.0)))
        return Promise(int(self.prediction[records[best]]), float(radius), case, int(records[best]))

    def _room(self, rows: NDArray[np.int64], apart: NDArray[np.float64], label: int, limit: float) -> float:
        rivals = self.prediction[rows] != label
        # what rounding does to this difference is far less than e d
        room = (apart[rivals] * (1.0 - SLACK) - self._search.reach[rows[rivals]]) / (1.0 + SLACK)
        return max(0.0, min(limit, float(room.min(initial=np.inf))))


def _without_twins(points: Points, rows: Sequence[int]) -> tuple[list[int], dict[int, int]]:
    """Split rows, in their order, into the first of each set of equal points and the others, with their first."""
    seen: dict[bytes, int] = {}
    twins = {}
    for row in rows:
        first = seen.setdefault((points[row] + np.float32(0.0)).tobytes(), row)   # -0.0 is 0.0
        if first != row:
            twins[row] = first
    return list(seen.values()), twins


def _share(
    points: Points, prediction: NDArray[np.int64], radius: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Shrink b balls so that none overlaps one of another class, whatever their order."""
    together = BallSearch(shape)
    together.append(points, radius)
    shared = radius.copy()
    for row, (rows, apart) in enumerate(together.near(points, radius)):
        rivals = prediction[rows] != prediction[row]
        with np.errstate(over="ignore", invalid="ignore"):
            part = radius[row] / (radius[row] + radius[rows[rivals]])
        bound = apart[rivals] * ((1.0 - SLACK) / (1.0 + SLACK)) * np.nan_to_num(part, nan=0.0)
        shared[row] = min(shared[row], bound.min(initial=np.inf))
    return shared


# ---------------------------------------------------------------------- alpha


class Budget(Protocol):
    """How a failure probability is divided among attempts, counted from 1: a frozen dataclass.

    An attempt is every certificate for which estimation noise is drawn: also those that abstain, or that are discarded
    because another query was faster. Counted by stored records, the same alpha could be tried until a lie is stored.
    """

    @property
    def alpha(self) -> float:
        """Failure probability of all attempts together."""
        ...

    def level(self, first: int, count: int = 1) -> float:
        """Alpha of each of the attempts first, ..., first + count - 1, which share what is theirs equally.

        Raises
        ------
        ValueError
            If the budget is exhausted.
        """
        ...

    def spent(self, attempts: int) -> float:
        """Sum of the alphas of the first so many attempts, at least."""
        ...


@dataclass(frozen=True, slots=True)
class EndlessBudget:
    """Attempt t gets 6 alpha / (pi^2 t^2), without an end.

    Parameters
    ----------
    alpha : float
        Failure probability of all attempts together, strictly between 0 and 1.

    Notes
    -----
    *Guarantee.* The alphas of all attempts, however many, sum to at most `alpha`. If the noise of each attempt is drawn
    after its input, sigma and class are fixed, then with probability at least 1 - alpha all its certificates hold, even
    if inputs are chosen in view of earlier answers.

    Examples
    --------
    >>> budget = EndlessBudget(0.01)
    >>> round(budget.level(1), 6), round(budget.level(10), 8), round(budget.spent(10), 6)
    (0.006079, 6.079e-05, 0.009421)
    """

    alpha: float

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def level(self, first: int, count: int = 1) -> float:
        """Alpha of each of the attempts first, ..., first + count - 1, which share what is theirs equally."""
        _check_attempts(first, count)
        terms = 1.0 / np.arange(first, first + count, dtype=np.float64) ** 2
        return float(self.alpha * 6.0 / pi**2 * terms.sum() / count * (1.0 - 1e-12))   # rounded down

    def spent(self, attempts: int) -> float:
        """Sum of the alphas of the first so many attempts, at least."""
        return float(self.alpha * (1.0 - 6.0 / pi**2 * zeta(2.0, attempts + 1.0)))


@dataclass(frozen=True, slots=True)
class SharedBudget:
    """Each of a fixed number of attempts gets alpha / attempts; there are no more.

    Parameters
    ----------
    alpha : float
        Failure probability of all attempts together, strictly between 0 and 1.
    attempts : int
        Number of attempts, >= 1.

    Notes
    -----
    *Guarantee.* That of `EndlessBudget`.
    """

    alpha: float
    attempts: int

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        _check_attempts(self.attempts, 1)

    def level(self, first: int, count: int = 1) -> float:
        """Alpha of each attempt; ``ValueError`` where there is no attempt left."""
        _check_attempts(first, count)
        if first + count - 1 > self.attempts:
            raise ValueError(
                f"attempts {first} to {first + count - 1} exceed the budget of {self.attempts}; what was promised "
                "stays, but further promises need a new epoch, or an EndlessBudget from the start"
            )
        return self.alpha / self.attempts * (1.0 - 1e-12)   # rounded down

    def spent(self, attempts: int) -> float:
        """Sum of the alphas of the first so many attempts, at least."""
        return self.alpha * attempts / self.attempts


def _check_attempts(first: int, count: int) -> None:
    if not (isinstance(first, int | np.integer) and isinstance(count, int | np.integer)):
        raise TypeError(f"attempts must be integers, got {first!r} and {count!r}")
    if first < 1 or count < 1:
        raise ValueError(f"attempts are counted from 1, got {first} and {count}")

"""Exact range search among balls: short codes rule most of them out, float64 decides about the rest.

An approximate index would be unsound here: a ball that is overlooked is a promise that is broken.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["SLACK", "BallSearch", "as_points", "distances"]

SLACK = 1e-9
"""Relative slack of every decision about a distance; `distances` are off by less than 2e-15."""

_UNIT = 2.0**-24
"""Unit roundoff of float32."""

_LARGEST = 1e15
"""Largest coordinate; the products of larger points might overflow in float32."""

_BLOCK = 2**21
"""Numbers in one temporary array."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Points = NDArray[np.float32]


def as_points(x: ArrayLike, shape: tuple[int, ...]) -> Points:
    """Return b inputs as (b, d) float32, or say why they are no points of a space with float32 coordinates.

    Parameters
    ----------
    x : array_like of float, shape (b, *shape)
        Finite numbers that float32 holds exactly. Rounding would move a promise to another point.
    shape : tuple of int
        Shape of one input.

    Raises
    ------
    TypeError, ValueError
        If x does not hold floating point numbers, has another shape, or a value that float32 does not hold.
    """
    given = np.asarray(x)
    if given.dtype.kind != "f":
        raise TypeError(f"x must be floating point, got dtype {given.dtype}; pass what the network sees, in float32")
    if given.ndim != 1 + len(shape) or given.shape[1:] != shape:
        raise ValueError(f"x must have shape ({', '.join(('b', *map(str, shape)))}), got {given.shape}")
    with np.errstate(over="ignore"):
        points = given.astype(np.float32).reshape(len(given), int(np.prod(shape)))
    if not np.array_equal(points, given.reshape(points.shape)) or not np.all(np.isfinite(points)):
        raise ValueError("x must hold finite numbers that float32 holds exactly; pass what the network sees")
    if points.size and np.abs(points).max() > _LARGEST:
        raise ValueError(f"x must lie within {_LARGEST:.0e}, got {np.abs(points).max():.3g}; scale it, as to [0, 1]")
    return points


def distances(points: Points, x: Points) -> Floats:
    """l2 distances of n points (n, d) from x (d,), the same bits on every machine and in every batch.

    Notes
    -----
    *Guarantee.* For float32 coordinates and d < 2**23, a relative error below 2e-15, and 0 only where the points are
    equal: the squares cannot underflow, and the sum is a tree of fixed shape, at most 23 additions deep.
    """
    squares = np.subtract(points, x, dtype=np.float64)
    squares *= squares
    width = squares.shape[1]
    while width > 1:
        half = (width + 1) // 2
        squares[:, : width - half] += squares[:, half:width]
        width = half
    return np.asarray(np.sqrt(squares[:, 0]))


def _norms(vectors: Points) -> Floats:
    return distances(vectors, np.zeros(vectors.shape[1], dtype=np.float32))


class Rows:
    """Rows of numbers that grow at the end."""

    def __init__(self, dtype: Any, *width: int) -> None:
        self._data: NDArray[Any] = np.empty((64, *width), dtype=dtype)
        self._used = 0

    def extend(self, rows: ArrayLike) -> None:
        """Append rows."""
        values = np.asarray(rows, dtype=self._data.dtype)
        used = self._used + len(values)
        if used > len(self._data):
            grown = np.empty((max(used, 2 * len(self._data)), *self._data.shape[1:]), dtype=self._data.dtype)
            grown[: self._used] = self._data[: self._used]
            self._data = grown
        self._data[self._used : used] = values
        self._used = used

    @property
    def all(self) -> NDArray[Any]:
        """All rows, not to be written."""
        view = self._data[: self._used]
        view.flags.writeable = False
        return view


class BallSearch:
    r"""Balls in l2 that can be added and searched, not moved or removed.

    Parameters
    ----------
    shape : tuple of int
        Shape of one input, with d < 2**23 coordinates. Its axes are cut into blocks, about 64 in all.

    Notes
    -----
    *Guarantee.* `near` overlooks no ball. Within a block B of m coordinates, (sqrt(m) mean x_B, ||x_B - mean x_B||) is
    an orthonormal projection beside the length of what it leaves, so these pairs, over all blocks, are a code c with
    ||c(x) - c(y)|| <= ||x - y||. From float32 codes a and b with k numbers each, ||a - b||^2 is computed as
    ||a||^2 + ||b||^2 - 2 <a, b>, with the product in float32, off by at most 2 gamma ||a|| ||b|| for
    gamma = k u / (1 - k u) and u = 2^-24, whatever the order of the sum; and rounding moved the codes by at most
    u (||a|| + ||b||). A ball is dropped only if it is too far by more than that. The float32 points of those that are
    left are tried in the same way, and the rest by `distances`.

    *Source.* Higham (2002), "Accuracy and Stability of Numerical Algorithms", section 3.1, for the inner product.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = tuple(int(length) for length in shape)
        size = int(np.prod(self.shape))
        if not self.shape or not 1 <= size < 2**23:
            raise ValueError(f"shape must have at least one axis and 1 to 2**23 - 1 coordinates, got {shape}")
        parts = max(2, round(64 ** (1 / len(self.shape))))
        edges = [np.unique(np.linspace(0, length, min(parts, length) + 1).astype(np.int64)) for length in self.shape]
        self._starts = [edge[:-1] for edge in edges]
        self._lengths = [np.diff(edge) for edge in edges]
        self._block_size = reduce(np.multiply.outer, self._lengths)
        self._points: list[Points] = []
        self._norm, self._reach, self._code_norm = Rows(np.float64), Rows(np.float64), Rows(np.float64)
        self._codes = Rows(np.float32, 2 * self._block_size.size)

    def __len__(self) -> int:
        return len(self._points)

    @property
    def reach(self) -> Floats:
        """Radii, shape (M,)."""
        return self._reach.all

    def points(self, rows: NDArray[Any] | slice) -> Points:
        """Centres of some balls, shape (n, d)."""
        picked = self._points[rows] if isinstance(rows, slice) else [self._points[row] for row in rows]
        return np.stack(picked) if picked else np.empty((0, int(np.prod(self.shape))), dtype=np.float32)

    def append(self, points: Points, reach: Floats) -> None:
        """Add b balls with centres (b, d), as `as_points` gives them, and radii (b,) >= 0."""
        codes = self._encode(points)
        self._codes.extend(codes)
        self._code_norm.extend(_norms(codes))
        self._norm.extend(_norms(points))
        self._reach.extend(reach)
        self._points.extend(points)

    def near(self, points: Points, margin: Floats, first: int | None = None) -> Iterator[tuple[Integers, Floats]]:
        """For each of b points, find the balls that it may lie in, or that a ball around it may meet.

        Parameters
        ----------
        points : ndarray of float32, shape (b, d)
            As `as_points` gives them.
        margin : ndarray of float64, shape (b,)
            Radius of the ball around each point; 0 asks for the balls that it lies in.
        first : int, optional
            Search only the balls before this one.

        Yields
        ------
        rows, distances : ndarray of int64 and of float64, shape (n,)
            Every ball with distance <= (its radius + margin) (1 + 4 `SLACK`), in the order of their numbers.
        """
        stop = len(self) if first is None else first
        reach, sizes = self.reach[:stop], self._code_norm.all[:stop]
        codes, halves = self._codes.all[:stop], (sizes**2 / 2.0).astype(np.float32)
        step = max(1, _BLOCK // max(stop, 1))
        for start in range(0, len(points), step):
            block = self._encode(points[start : start + step])
            products = _inner(block, codes)
            for row, size in enumerate(_norms(block)):
                x, wide = points[start + row], margin[start + row]
                with np.errstate(over="ignore"):   # a radius may be as large as it likes
                    widest = wide + reach.max(initial=0.0)
                    bar = _bar(float(size), float(sizes.max(initial=0.0)), widest, codes.shape[1])
                    rows = np.flatnonzero(products[row] - halves >= -bar)
                    limit = (reach[rows] + wide) * (1.0 + 4.0 * SLACK)
                maybe = _may_be_near(products[row, rows], sizes[rows], float(size), limit, codes.shape[1])
                yield self._recheck(x, rows[maybe], limit[maybe])

    def _recheck(self, x: Points, rows: Integers, limit: Floats) -> tuple[Integers, Floats]:
        kept, apart = [np.empty(0, dtype=np.int64)], [np.empty(0)]
        norm, step = float(_norms(x[None])[0]), max(1, _BLOCK // len(x))
        for start in range(0, len(rows), step):
            some, bound = rows[start : start + step], limit[start : start + step]
            points = self.points(some)
            near = _may_be_near(_inner(x[None], points)[0], self._norm.all[some], norm, bound, len(x))
            exact = distances(points[near], x)
            inside = exact <= bound[near]
            kept.append(some[near][inside])
            apart.append(exact[inside])
        return np.concatenate(kept), np.concatenate(apart)

    def _encode(self, points: Points) -> Points:
        """Codes of b points, shape (b, k)."""
        x = points.reshape(len(points), *self.shape).astype(np.float64)
        mean = self._block_sums(x) / self._block_size
        spread = mean
        for axis, lengths in enumerate(self._lengths, start=1):
            spread = np.repeat(spread, lengths, axis=axis)
        x -= spread
        x *= x
        parts = (mean * np.sqrt(self._block_size), np.sqrt(self._block_sums(x)))
        return np.concatenate([part.reshape(-1, self._block_size.size) for part in parts], axis=1).astype(np.float32)

    def _block_sums(self, x: Floats) -> Floats:
        for axis, starts in enumerate(self._starts, start=1):
            x = np.add.reduceat(x, starts, axis=axis)
        return x


def _inner(a: Points, b: Points) -> NDArray[np.float32]:
    """Inner products of vectors (p, k) and (q, k), shape (p, q), in float32; TF32 would be off by too much."""
    return np.asarray(a @ b.T)


def _may_be_near(product: NDArray[np.float32], norms: Floats, norm: float, limit: Floats, k: int) -> NDArray[np.bool_]:
    """False only where two vectors of k numbers are proved to be further apart than `limit`."""
    both = norms + norm
    apart = norms**2 + norm**2 - 2.0 * product.astype(np.float64) - _error(norms, norm, k)
    with np.errstate(over="ignore"):
        return np.asarray(~(apart > ((limit + 2.0 * _UNIT * both) * (1.0 + SLACK)) ** 2 + k * 2.0**-124))


def _bar(norm: float, norms: float, limit: float, k: int) -> np.float32:
    """Number that norms^2 / 2 - product, in float32, exceeds only where `_may_be_near` is False; for a first sieve.

    `norms` and `limit` are the largest that occur. The last term is for the rounding of that difference.
    """
    both = norms + norm
    far = ((limit * (1.0 + 4.0 * SLACK) + 2.0 * _UNIT * both) * (1.0 + SLACK)) ** 2 + k * 2.0**-124
    bar = (far + _error(norms, norm, k) - norm**2) / 2.0 + 4.0 * _UNIT * both**2
    return np.float32(np.nextafter(np.float32(bar), np.float32(np.inf)))


def _error(norms: Any, norm: float, k: int) -> Any:
    """Bound of the error of the squared distance, with the product in float32 and all else in float64."""
    gamma = k * _UNIT / (1.0 - k * _UNIT)
    return 2.0 * gamma * norm * norms + 1e-12 * (norms + norm) ** 2

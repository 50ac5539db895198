"""Patches of an input: where they lie, how much they stretch a perturbation, and what their votes are worth.

An input x is resized or padded (a linear map U), then cut into m patches (a linear map P). Noise may be added before,
between or behind the two; a radius that holds behind a linear map is divided by its operator norm to hold for x.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from itertools import product
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator, cg, eigsh

from art_rs_plugins.theory.certificates import Certificates

__all__ = [
    "CertifiedVote",
    "Pad",
    "PatchCertificates",
    "PatchGeometry",
    "Placement",
    "Repeat",
    "Resize",
    "frame_radius",
    "sub_videos",
]

Reals = NDArray[np.float64]

_INWARD = 1.0 - 1e-12
"""Shrinkage of a radius that has been through square roots and divisions, and of a norm the other way."""


def _whole(values: int | Sequence[int], axes: int, name: str, least: int = 1) -> tuple[int, ...]:
    """One integer for each axis, or raise ``TypeError`` / ``ValueError`` naming the argument."""
    found = tuple(values) if isinstance(values, Sequence | np.ndarray) else (values,) * axes
    if any(isinstance(value, bool) or not isinstance(value, int | np.integer) for value in found):
        raise TypeError(f"{name} must be integers, got {values!r}")
    if len(found) != axes or min(found, default=least) < least:
        raise ValueError(f"{name} must be >= {least}, one for each of {axes} axes, got {values!r}")
    return tuple(int(value) for value in found)


class Placement(IntEnum):
    """Where the noise is added on the way from an input to its patches.

    ``SHARED_INPUT``: to the input; resizing, padding and cutting are part of the base classifier, and radii hold as
    they are. ``SHARED_RESIZED``: behind resizing or padding; behind `Pad` the ring around the image is noisy as well.
    ``PER_PATCH``: to every patch, independently, which averages the noise away and has to be paid for; for comparison
    with published numbers. ``COMMON_PATCH``: the same draw to every patch. No certificate exists, so it is refused.
    """

    SHARED_INPUT = 0
    SHARED_RESIZED = 1
    PER_PATCH = 2
    COMMON_PATCH = 3


@dataclass(frozen=True, slots=True)
class Resize:
    """Resize every axis, with PyTorch's weights for ``align_corners=False``.

    Parameters
    ----------
    size : tuple of int
        Size of each axis.
    mode : str
        ``"bilinear"``, ``"bicubic"`` or ``"nearest"``, along each axis.
    antialias : bool
        Widen the kernel where an axis shrinks, as PIL does; not for ``"nearest"``.

    Raises
    ------
    ValueError, TypeError
        For sizes below 1, or a mode that is unknown or cannot be antialiased.
    """

    size: tuple[int, ...]
    mode: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    antialias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _whole(self.size, len(self.size), "size"))
        if self.mode not in ("bilinear", "bicubic", "nearest"):
            raise ValueError(f"mode must be 'bilinear', 'bicubic' or 'nearest', got {self.mode!r}")
        if self.antialias and self.mode == "nearest":
            raise ValueError("antialias needs mode 'bilinear' or 'bicubic'")

    def matrices(self, size: tuple[int, ...]) -> tuple[Reals, ...]:
        """Weights (new, old) of each axis; see `PatchGeometry.matrices`."""
        new = _whole(self.size, len(size), "size")
        return tuple(_resize_matrix(old, out, self.mode, self.antialias) for old, out in zip(size, new, strict=True))


@dataclass(frozen=True, slots=True)
class Pad:
    """Add zeros at both ends of every axis: `width` of them."""

    width: int

    def __post_init__(self) -> None:
        _whole(self.width, 1, "width", least=0)

    def matrices(self, size: tuple[int, ...]) -> tuple[Reals, ...]:
        """Weights (new, old) of each axis; see `PatchGeometry.matrices`."""
        return tuple(np.eye(old + 2 * self.width, old, -self.width) for old in size)


@dataclass(frozen=True, slots=True)
class Repeat:
    """Repeat the last entry of the first axis, the last frame of a clip, until there are `length` of them."""

    length: int

    def __post_init__(self) -> None:
        _whole(self.length, 1, "length")

    def matrices(self, size: tuple[int, ...]) -> tuple[Reals, ...]:
        """Weights (new, old) of each axis; see `PatchGeometry.matrices`."""
        frames = np.minimum(np.arange(max(self.length, size[0])), size[0] - 1)
        return np.eye(size[0])[frames], *(np.eye(old) for old in size[1:])


def _resize_matrix(old: int, new: int, mode: str, antialias: bool) -> Reals:
    """Weights (new, old) of one axis, each row summing to 1."""
    if mode == "nearest":
        return np.asarray(np.eye(old)[np.arange(new) * old // new])
    stretch = max(old / new, 1.0) if antialias else 1.0
    # PyTorch's bicubic kernel has a = -0.75; with antialiasing it takes PIL's, a = -0.5
    kernel = _triangle if mode == "bilinear" else (lambda t: _cubic(t, -0.5 if antialias else -0.75))
    center = (np.arange(new) + 0.5) * (old / new) - 0.5
    reach = math.ceil(2 * stretch) + 1
    taps = np.floor(center)[:, None].astype(np.int64) + np.arange(-reach, reach + 1)
    weights = kernel((taps - center[:, None]) / stretch)
    matrix = np.zeros((new, old))
    if antialias:   # taps beyond the border are left out, and the others share their weight
        weights = np.where((taps >= 0) & (taps < old), weights, 0.0)
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), weights)   # or fall on the border
    return np.asarray(matrix / matrix.sum(axis=1, keepdims=True))


def _triangle(t: Reals) -> Reals:
    return np.maximum(1.0 - np.abs(t), 0.0)


def _cubic(t: Reals, a: float) -> Reals:
    t = np.abs(t)
    near, far = ((a + 2) * t - (a + 3)) * t * t + 1, ((t - 5) * t + 8) * a * t - 4 * a
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


@dataclass(frozen=True, slots=True)
class PatchGeometry:
    r"""Which patches are cut out of an input, and how much that can stretch a perturbation.

    Axes are the first ones behind the channels: (h, w) of an image, (frames,) or (frames, h, w) of a clip.

    Parameters
    ----------
    size : tuple of int
        Size of the input along each axis.
    patch : int or tuple of int
        Size of a patch.
    offsets : sequence of tuple of int, length m
        First row and column of each patch, behind `before`; each in [0, canvas - patch], both ends included.
    before : Resize, Pad, Repeat or None
        What happens to the input before patches are cut.

    Warns
    -----
    UserWarning
        If an offset occurs twice: such a patch costs a pass and tells nothing new.

    Raises
    ------
    ValueError, TypeError
        For sizes or offsets that do not fit.

    Examples
    --------
    >>> geometry = PatchGeometry.grid((32, 32), 32, 1, before=Resize((36, 36)))
    >>> len(geometry.offsets), round(geometry.norm(Placement.PER_PATCH), 4)
    (25, 5.6393)
    """

    size: tuple[int, ...]
    patch: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    before: Resize | Pad | Repeat | None = None

    def __post_init__(self) -> None:
        axes = len(self.size)
        object.__setattr__(self, "size", _whole(self.size, axes, "size"))
        object.__setattr__(self, "patch", _whole(self.patch, axes, "patch"))
        offsets = tuple(_whole(offset, axes, "offsets", least=0) for offset in self.offsets)
        object.__setattr__(self, "offsets", offsets)
        if not axes or not offsets:
            raise ValueError("size and offsets must not be empty: one axis and one patch at least")
        last = np.subtract(self.canvas, self.patch)
        if np.any(last < 0):
            raise ValueError(f"patch {self.patch} is larger than what it is cut from, {self.canvas}; pad or resize it")
        if np.any(np.asarray(offsets) > last):
            raise ValueError(f"offsets must lie in [0, canvas - patch] = [0, {last.tolist()}], got {max(offsets)}")
        if len(set(offsets)) < len(offsets):
            warnings.warn(
                f"only {len(set(offsets))} of {len(offsets)} offsets are distinct; leave out the others", stacklevel=3
            )

    @classmethod
    def grid(
        cls,
        size: tuple[int, ...],
        patch: int | tuple[int, ...],
        stride: int | tuple[int, ...],
        *,
        before: Resize | Pad | Repeat | None = None,
    ) -> Self:
        """All patches whose offsets are multiples of the stride, row by row; warns if that leaves out the far border.

        Parameters
        ----------
        size, patch, before
            As in the constructor.
        stride : int or tuple of int
            Step from one patch to the next along each axis.
        """
        steps, last = _whole(stride, len(size), "stride"), _last(size, patch, before)
        left_out = [end % step for end, step in zip(last, steps, strict=True)]
        if any(left_out):
            warnings.warn(f"no patch sees the last {left_out} entries of the axes; take another stride", stacklevel=2)
        ranges = [range(0, end + 1, step) for end, step in zip(last, steps, strict=True)]
        return cls(size, patch, tuple(product(*ranges)), before)   # type: ignore[arg-type]

    @classmethod
    def corners(
        cls, size: tuple[int, ...], patch: int | tuple[int, ...], *, before: Resize | Pad | Repeat | None = None
    ) -> Self:
        """Patches in the corners and one in the centre, five of an image; those that coincide are taken once."""
        last = _last(size, patch, before)
        offsets = [*product(*((0, end) for end in last)), tuple(end // 2 for end in last)]
        return cls(size, patch, tuple(dict.fromkeys(offsets)), before)   # type: ignore[arg-type]

    @classmethod
    def random(
        cls,
        size: tuple[int, ...],
        patch: int | tuple[int, ...],
        m: int,
        *,
        seed: int,
        before: Resize | Pad | Repeat | None = None,
    ) -> Self:
        """Patches at m distinct places, drawn once: part of the classifier, which another seed makes another one.

        Raises
        ------
        ValueError
            If there are fewer than m places.
        """
        shape = [end + 1 for end in _last(size, patch, before)]
        if not 1 <= m <= math.prod(shape):
            raise ValueError(f"m must lie in [1, {math.prod(shape)}], the number of places for a patch, got {m}")
        places = np.random.default_rng([seed]).choice(math.prod(shape), m, replace=False)
        return cls(size, patch, tuple(zip(*np.unravel_index(places, shape), strict=True)), before)   # type: ignore[arg-type]

    @property
    def canvas(self) -> tuple[int, ...]:
        """Size of what the patches are cut from."""
        return _canvas(self.size, self.before)

    def matrices(self) -> tuple[Reals, ...]:
        """Weights (canvas, size) of each axis; U is their Kronecker product."""
        return tuple(np.eye(old) for old in self.size) if self.before is None else self.before.matrices(self.size)

    def coverage(self) -> NDArray[np.int64]:
        """Count the patches that see each place; shape `canvas`, 0 where none does."""
        counts = np.zeros(self.canvas, dtype=np.int64)
        for offset in self.offsets:
            counts[tuple(slice(a, a + p) for a, p in zip(offset, self.patch, strict=True))] += 1
        return counts

    def norm(self, placement: Placement) -> float:
        r"""Operator norm of what comes before the noise; never below the true one.

        Parameters
        ----------
        placement : Placement
            Where the noise is added.

        Returns
        -------
        float
            1, ||U||, or ||PU||. Exact up to a relative 1e-12 without resizing, with mode ``"nearest"``, along one axis,
            and for patches on a grid; otherwise an upper bound, min(sqrt(K_max) ||U||, Collatz-Wielandt).

        Raises
        ------
        ValueError
            For ``COMMON_PATCH``, where no radius is certified: the noise does not reach differences between patches,
            so that a classifier of such a difference has p = 1 at any distance from its boundary.

        Notes
        -----
        *Guarantee.* If a classifier of the noisy vector L x + eps, eps ~ N(0, sigma^2 I), keeps its class for all
        perturbations of L x closer than R, then it does for all perturbations of x closer than R / norm.

        (P U)^T P U = U^T diag(K) U with K the coverage. For B >= 0 entry by entry and any v > 0, the largest
        eigenvalue of B is at most max_i (B v)_i / v_i (Collatz, Wielandt); power iteration would be a lower bound.
        """
        if placement == Placement.COMMON_PATCH:
            raise ValueError(
                "no radius is certified under COMMON_PATCH: one draw for all patches leaves their differences without "
                "noise; use SHARED_INPUT"
            )
        if placement == Placement.SHARED_INPUT:
            return 1.0
        counts = self.coverage() if placement == Placement.PER_PATCH else np.ones(self.canvas, dtype=np.int64)
        return _norm(self.matrices(), counts)


def _canvas(size: tuple[int, ...], before: Resize | Pad | Repeat | None) -> tuple[int, ...]:
    return size if before is None else tuple(len(matrix) for matrix in before.matrices(size))


def _last(
    size: tuple[int, ...], patch: int | tuple[int, ...], before: Resize | Pad | Repeat | None
) -> tuple[int, ...]:
    """Largest offset along each axis."""
    canvas = _canvas(size, before)
    last = tuple(c - p for c, p in zip(canvas, _whole(patch, len(size), "patch"), strict=True))
    if min(last) < 0:
        raise ValueError(f"patch {patch} is larger than what it is cut from, {canvas}; pad or resize it")
    return last


def _along(matrices: Sequence[Reals], v: Reals) -> Reals:
    """Apply one matrix to each axis."""
    for axis, matrix in enumerate(matrices):
        v = np.moveaxis(np.tensordot(matrix, v, (1, axis)), 0, axis)
    return v


def _norm(matrices: tuple[Reals, ...], counts: NDArray[np.int64]) -> float:
    """Norm of diag(sqrt(counts)) U, or an upper bound."""
    if all(np.count_nonzero(matrix, axis=1).max() <= 1 for matrix in matrices):
        return math.sqrt(_along([matrix.T**2 for matrix in matrices], counts.astype(np.float64)).max())
    axes = range(counts.ndim)
    margins = [counts.sum(axis=tuple(other for other in axes if other != axis)) / counts.sum() for axis in axes]
    spread = counts / counts.sum()
    together: Reals = margins[0]
    for margin in margins[1:]:
        together = np.multiply.outer(together, margin)
    largest = [float(np.linalg.norm(matrix, 2)) for matrix in matrices]
    bound = math.sqrt(int(counts.max())) * math.prod(largest)
    if np.allclose(spread, together, rtol=1e-12, atol=0.0):   # a grid: the stack is a Kronecker product as well
        weighted = [np.sqrt(margin)[:, None] * matrix for margin, matrix in zip(margins, matrices, strict=True)]
        exact = math.sqrt(int(counts.sum())) * math.prod(float(np.linalg.norm(matrix, 2)) for matrix in weighted)
        return min(bound, exact) / _INWARD
    return min(bound, _collatz_wielandt([np.abs(matrix) for matrix in matrices], counts)) / _INWARD


def _collatz_wielandt(matrices: list[Reals], counts: NDArray[np.int64]) -> float:
    """Upper bound of the norm of diag(sqrt(counts)) U for U >= 0."""
    shape = tuple(matrix.shape[1] for matrix in matrices)
    start = np.ones(math.prod(shape))

    def gram(v: Reals) -> Reals:
        return _along([matrix.T for matrix in matrices], counts * _along(matrices, v.reshape(shape))).ravel()

    # where t is above the largest eigenvalue, (t - B) v = 1 has a solution v > 0, and B v = t v - 1 < t v
    operator = LinearOperator((len(start), len(start)), matvec=gram, dtype=np.float64)
    t = float(eigsh(operator, k=1, v0=start, tol=1e-6, return_eigenvectors=False)[0]) * (1.0 + 1e-5)
    shifted = LinearOperator(operator.shape, matvec=lambda v: t * v - gram(v), dtype=np.float64)
    v = np.maximum(cg(shifted, start, rtol=1e-3, maxiter=2000)[0], 0.5 / t)   # v >= 1 / t; any v > 0 gives a bound
    return math.sqrt((gram(v) / v).max())


@dataclass(frozen=True, slots=True, eq=False)
class PatchCertificates(Certificates):
    """Certificates of b inputs whose noise was added behind a linear map; ``radius`` holds for the inputs themselves.

    Attributes
    ----------
    lift_norm : float64, shape (b,)
        Operator norm of that map: 1 for noise on the input.

    Notes
    -----
    ``sigma`` is the level of the noise where it was added. ``raw_radius``, which some publications report as if it held
    for the input, is about perturbations of what the noise was added to.
    """

    lift_norm: NDArray[np.float64] | float = 1.0

    def __post_init__(self) -> None:
        Certificates.__post_init__(self)
        array = np.array(np.broadcast_to(self.lift_norm, self.prediction.shape), dtype=np.float64)
        if not np.all(np.isfinite(array) & (array > 0)):
            raise ValueError(f"lift_norm must be finite and > 0, got {self.lift_norm}")
        array.flags.writeable = False
        object.__setattr__(self, "lift_norm", array)

    @property
    def raw_radius(self) -> Reals:
        """Radius behind the map: that of perturbations of the stack of patches, for noise on every patch."""
        return np.asarray(self.radius * self.lift_norm)

    @classmethod
    def of(cls, certificates: Certificates, lift_norm: float, *, patches: int = 1) -> Self:
        """Certificates whose radii and sigmas are those of the input, with the norm that made them so.

        Parameters
        ----------
        certificates : Certificates
            Made under noise whose sigma and radii were divided by the norm.
        lift_norm : float
            The norm.
        patches : int
            Passes of the network that one draw took, at most.
        """
        values: dict[str, Any] = {field.name: getattr(certificates, field.name) for field in fields(Certificates)}
        values |= {"sigma": certificates.sigma * lift_norm, "passes": certificates.passes * patches}
        return cls(**values, lift_norm=lift_norm)


def frame_radius(radius: ArrayLike, frames: int) -> Reals:
    """l2 radius of each frame where an attacker changes this many frames of a clip, any of them.

    Parameters
    ----------
    radius : array_like of float
        Certified l2 radius of whole clips.
    frames : int
        Frames that may be changed; all of them for a bound that holds everywhere.

    Returns
    -------
    ndarray of float64
        radius / sqrt(frames), rounded toward zero.

    Notes
    -----
    *Guarantee.* k perturbed frames, each of norm below r, have norm below r sqrt(k) together.

    Examples
    --------
    >>> float(frame_radius(1.0, 16).round(6))
    0.25
    """
    values = np.asarray(radius, dtype=np.float64)
    if np.any(~np.isfinite(values) | (values < 0)):
        raise ValueError(f"radius must be finite and >= 0, got {radius!r}")
    return values / math.sqrt(_whole(frames, 1, "frames")[0]) * _INWARD


def sub_videos(
    frames: int, length: int, starts: Sequence[int], chunk: int, stride: int | None = None
) -> tuple[PatchGeometry, tuple[tuple[int, ...], ...]]:
    """Chunks of a clip, each once, and which of them make up each of several sub-videos.

    Parameters
    ----------
    frames : int
        Frames of the clip; a clip shorter than `length` is continued with its last frame.
    length : int
        Frames of a sub-video.
    starts : sequence of int, length m
        First frame of each sub-video.
    chunk : int
        Frames that the network sees at a time.
    stride : int, optional
        Step from one chunk of a sub-video to the next; `chunk` by default.

    Returns
    -------
    geometry : PatchGeometry
        Of the distinct chunks, along the axis of frames.
    members : tuple of tuple of int, length m
        Positions of the chunks of each sub-video.

    Raises
    ------
    ValueError, TypeError
        For sub-videos beyond the clip, or chunks longer than a sub-video.

    Examples
    --------
    >>> geometry, members = sub_videos(24, 16, starts=(0, 8), chunk=8)
    >>> geometry.offsets, members
    (((0,), (8,), (16,)), ((0, 1), (1, 2)))
    """
    step, span = _whole(chunk if stride is None else stride, 1, "stride")[0], _whole(length, 1, "length")[0]
    if not 1 <= chunk <= span:
        raise ValueError(f"chunk must lie in [1, length = {span}], got {chunk}")
    first = _whole(starts, len(starts), "starts", least=0)
    if not first or max(first) > max(frames, span) - span:
        raise ValueError(f"starts must lie in [0, {max(frames, span) - span}] for {frames} frames, got {starts}")
    each = [[start + place for place in range(0, span - chunk + 1, step)] for start in first]
    distinct = sorted({place for places in each for place in places})
    members = tuple(tuple(distinct.index(place) for place in places) for places in each)
    before = Repeat(span) if frames < span else None
    return PatchGeometry((frames,), (chunk,), tuple((place,) for place in distinct), before), members


@dataclass(frozen=True, slots=True)
class CertifiedVote:
    r"""Majority vote of m smoothed classifiers, one for each patch, certified through their own certificates.

    Parameters
    ----------
    geometry : PatchGeometry
        Where the patches lie.

    Notes
    -----
    *Guarantee.* Let g_i be the smoothed classifier of patch i, and let the vote answer A where more than m / 2 of them
    do, and nothing otherwise. If every certificate is true, which holds with probability at least 1 - alpha for
    certificates at alpha / m each, the vote answers A for every input closer than the radius.

    Let N patches be certified for A. The vote is lost only if t = N - floor(m / 2) of them change or more. A
    perturbation d that changes the patches of a set J has ``||P_i U d|| >= R_i`` for all of them, while the sum over J
    of ``||P_i U d||^2`` is at most ``min(|J|, K_max) ||U d||^2``. Of any t patches, the s with the largest radii have
    radii at least those of the ranks t - s + 1, ..., t among all N in ascending order. So
    ``||U|| ||d|| >= sqrt(sum of those s squares / min(s, K_max))`` for each s from 1 to t; the best of them is taken.

    *Source.* Pigeonhole arguments as for de-randomized smoothing (Levine and Feizi, 2020), with l2 radii.
    """

    geometry: PatchGeometry

    def level(self, alpha: float) -> float:
        """Return alpha / m, the failure probability of each patch's certificate."""
        return alpha / len(self.geometry.offsets)

    def combine(self, patches: Sequence[Certificates]) -> Certificates:
        """Certify b inputs.

        Parameters
        ----------
        patches : sequence of Certificates, length m
            Of each patch of the b inputs, in the order of the offsets; l2 radii of perturbations of the patch.

        Returns
        -------
        Certificates
            ``alpha``, ``n``, ``n0`` and ``passes`` are sums over patches, ``count`` is that over patches certified for
            the class, and ``p_lower``, ``p_upper`` are the worst of theirs.

        Raises
        ------
        ValueError
            If there is not one for each patch, or lengths, kinds, norms or performance differ.
        """
        m, first = len(self.geometry.offsets), patches[0] if patches else None
        if first is None or len(patches) != m:
            raise ValueError(f"patches must hold certificates of each of {m} patches, got {len(patches)}")
        alike = (len(first), first.kind, 2.0, first.performance)
        if any((len(patch), patch.kind, patch.norm, patch.performance) != alike for patch in patches):
            raise ValueError("patches must hold l2 certificates of one kind and performance for the same inputs")

        def stacked(name: str) -> NDArray[Any]:
            return np.stack([getattr(patch, name) for patch in patches])

        classes = np.where(stacked("abstained"), -1, stacked("prediction"))
        support = np.stack([(classes == row).sum(axis=0) * (row >= 0) for row in classes])
        prediction = np.take_along_axis(stacked("prediction"), support.argmax(axis=0)[None], 0)[0]
        agrees = classes == prediction
        flips = support.max(axis=0) - m // 2
        overlap, stretch = int(self.geometry.coverage().max()), self.geometry.norm(Placement.SHARED_RESIZED)
        radius = np.array(
            [
                _vote_radius(np.sort(radii[certified])[: max(t, 0)], overlap)
                for radii, certified, t in zip(stacked("radius").T, agrees.T, flips, strict=True)
            ]
        )
        total = stacked("n").sum(axis=0)
        count = np.where(agrees, stacked("count"), 0).sum(axis=0)
        return Certificates(
            prediction=prediction,
            radius=radius / stretch * _INWARD,
            abstained=flips <= 0,
            p_lower=np.where(agrees, stacked("p_lower"), 1.0).min(axis=0) * agrees.any(axis=0),
            p_upper=np.where(agrees, stacked("p_upper"), 0.0).max(axis=0),
            count=count,
            runner_up_count=total - count,
            n=total,
            n0=stacked("n0").sum(axis=0),
            sigma=first.sigma,
            alpha=stacked("alpha").sum(axis=0),
            index=first.index,
            seed=first.seed,
            kind=first.kind,
            norm=2.0,
            performance=first.performance,
            passes=stacked("passes").sum(axis=0),
        )


def _vote_radius(radii: Reals, overlap: int) -> float:
    """Least norm of U d that can change t patches with these radii, ascending; 0 for none."""
    shares = np.minimum(np.arange(1, len(radii) + 1), overlap)
    return float(np.sqrt(np.cumsum(radii[::-1] ** 2) / shares).max(initial=0.0))

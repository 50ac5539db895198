"""What `PatchReduce` is made of: how outputs of patches become one, sub-videos of shared chunks, noise behind a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from art_rs_plugins.smoothing.noise import Noise, Source, is_channels_last
from art_rs_plugins.smoothing.sampling import strict_votes
from art_rs_plugins.theory.certificates import Kind
from art_rs_plugins.theory.patches import Pad, PatchGeometry, Repeat, Resize

__all__ = ["Joint", "Lifted", "Max", "Mean", "Reduction", "SubVideos", "Vote", "apply_before"]


class Reduction(Protocol):
    """From the outputs of m patches to scores of the input: a frozen dataclass."""

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores (rows, k), to be read as logits, from outputs (m, rows, k) of the network."""
        ...

    def decided(self, outputs: Tensor, left: int) -> Tensor | None:
        """Mask (rows,) of those whose winner `left` further patches cannot change; None if that is never known."""
        ...


def _lead(totals: Tensor) -> Tensor:
    """Difference of the two largest entries of each row."""
    top = totals.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


@dataclass(frozen=True, slots=True)
class Mean:
    """Mean over patches of the class probabilities.

    Parameters
    ----------
    softmax : bool
        False takes the mean of the outputs as they are: of raw logits, or of a network that ends in a softmax.

    Notes
    -----
    Scores are log mean probabilities, whose softmax is the mean probability.
    """

    softmax: bool = True

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores (rows, k); see `Reduction`."""
        if not self.softmax:
            return outputs.mean(dim=0)
        return outputs.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(outputs))

    def decided(self, outputs: Tensor, left: int) -> Tensor | None:
        """Rows whose lead in summed probability exceeds `left`; None for raw outputs, which have no bound."""
        if not self.softmax:
            return None
        slack = 2.0 * torch.finfo(outputs.dtype).eps * (len(outputs) + left) ** 2   # rounding of the sums
        return _lead(outputs.softmax(dim=-1).sum(dim=0)) > left + slack


@dataclass(frozen=True, slots=True)
class Max:
    """Maximum over patches of each class's log probability: the class of the most confident patch.

    Parameters
    ----------
    softmax : bool
        False takes the maximum of the outputs as they are, a different rule: a constant added to the logits of one
        patch then changes the winner.
    """

    softmax: bool = True

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores (rows, k); see `Reduction`."""
        return (outputs.log_softmax(dim=-1) if self.softmax else outputs).amax(dim=0)

    def decided(self, outputs: Tensor, left: int) -> None:
        """Return None: a later patch may be more confident."""


@dataclass(frozen=True, slots=True)
class Vote:
    """Number of patches whose strictly largest output is the class; the mean probability decides between equals.

    Notes
    -----
    Scores are logarithms of (votes + mean probability / 2) / m. A patch with a tie votes for no class.
    """

    def _votes(self, outputs: Tensor) -> Tensor:
        top = outputs == outputs.amax(dim=-1, keepdim=True)
        return (top & (top.sum(dim=-1, keepdim=True) == 1)).to(outputs.dtype).sum(dim=0)

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores (rows, k); see `Reduction`."""
        totals = self._votes(outputs) + 0.5 * outputs.softmax(dim=-1).mean(dim=0)
        return (totals / len(outputs)).clamp_min(torch.finfo(totals.dtype).tiny).log()

    def decided(self, outputs: Tensor, left: int) -> Tensor:
        """Rows whose lead in votes exceeds `left`."""
        return _lead(self._votes(outputs)) > left


@dataclass(frozen=True, slots=True)
class Joint:
    """The votes of several reductions at once, so that they are compared on the same passes.

    Parameters
    ----------
    parts : tuple of Reduction
        What is compared.

    Raises
    ------
    ValueError
        For no reduction.

    Notes
    -----
    Scores (rows, (k + 1)^r) are one-hot in the cell of all r votes, an invalid vote being outcome k; `by_part`
    gives the very vote table of one part.
    """

    parts: tuple[Reduction, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts must hold at least one reduction")

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores; see `Reduction`."""
        k = outputs.shape[-1]
        cell = torch.zeros(outputs.shape[1], dtype=torch.int64, device=outputs.device)
        for part in self.parts:
            winner, valid = strict_votes(part(outputs))
            cell = cell * (k + 1) + torch.where(valid, winner, k)
        scores = torch.zeros((len(cell), (k + 1) ** len(self.parts)), device=outputs.device)
        return scores.scatter_(1, cell[:, None], 1.0)

    def decided(self, outputs: Tensor, left: int) -> None:
        """Return None: a later patch may change some part."""


@dataclass(frozen=True, slots=True)
class SubVideos:
    """Mean of raw outputs over the chunks of each sub-video, then a reduction over sub-videos.

    Parameters
    ----------
    members : tuple of tuple of int, length m
        Positions of the chunks of each sub-video; see `theory.patches.sub_videos`.
    reduction : Reduction
        Over sub-videos.

    Raises
    ------
    ValueError
        If a sub-video has no chunk.

    Notes
    -----
    Outputs are those of distinct chunks, so that a chunk costs one pass however many sub-videos contain it.
    """

    members: tuple[tuple[int, ...], ...]
    reduction: Reduction = Mean()

    def __post_init__(self) -> None:
        if not self.members or not all(self.members):
            raise ValueError(f"members must name the chunks of each sub-video, at least one, got {self.members}")

    def __call__(self, outputs: Tensor) -> Tensor:
        """Scores (rows, k); see `Reduction`."""
        parts = outputs.unbind(dim=0)
        whole = [torch.stack([parts[chunk] for chunk in chunks]).mean(dim=0) for chunks in self.members]
        return self.reduction(torch.stack(whole))

    def decided(self, outputs: Tensor, left: int) -> None:
        """Return None: the raw outputs of a chunk have no bound."""


def apply_before(geometry: PatchGeometry, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Resize or pad inputs (rows, channels, *size, ...); `weights` (new, old) of each axis are those to resize with."""
    before = geometry.before
    if isinstance(before, Pad):
        whole = x.ndim - 2 - len(geometry.size)   # axes that are not cut; the last axis comes first
        return functional.pad(x, [0] * (2 * whole) + [before.width] * (2 * len(geometry.size)))
    if isinstance(before, Repeat):
        missing = max(0, before.length - x.shape[2])
        return torch.cat([x, x[:, :, -1:].expand(*x.shape[:2], missing, *x.shape[3:])], dim=2)
    if isinstance(before, Resize):
        dtype, last = torch.promote_types(x.dtype, torch.float32), is_channels_last(x)
        with torch.autocast(x.device.type, enabled=False):
            for axis, matrix in enumerate(weights):
                x = torch.tensordot(x.to(dtype), matrix.to(dtype), dims=([2 + axis], [1])).movedim(-1, 2 + axis)
        return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return x


@dataclass(frozen=True, slots=True, eq=False)
class Lifted:
    """Noise that is added behind a linear map, while sigmas and radii are those in front of it.

    Parameters
    ----------
    behind : Noise
        The noise as it is added.
    lift_norm : float
        Operator norm of the map, or more.

    Notes
    -----
    *Guarantee.* A perturbation d in front of the map is one of norm at most ``lift_norm * ||d||`` behind it. So every
    radius is divided by the norm, and to a rule the noise looks as if its sigma were. `check`, `nearest` and `draw`
    take what comes out of the map.
    """

    behind: Noise
    lift_norm: float

    graphs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.lift_norm < math.inf:
            raise ValueError(f"lift_norm must be finite and > 0, got {self.lift_norm}")
        if self.behind.norm != 2.0:
            raise ValueError(f"lift_norm is an l2 norm, but radii of the noise are in the norm of order {self.norm}")

    @property
    def norm(self) -> float:
        """Order of the norm in which radii hold."""
        return self.behind.norm

    @property
    def kind(self) -> Kind:
        """What certificates under this noise are called."""
        return self.behind.kind

    def for_inputs(self, b: int) -> NDArray[np.float64]:
        """Sigma of each of b inputs in front of the map, shape (b,)."""
        return self.behind.for_inputs(b) / self.lift_norm

    def check(self, x: Tensor) -> None:
        """Raise ``ValueError`` for inputs that certificates under the noise could not speak of."""
        self.behind.check(x)

    def nearest(self, x: Tensor, toward: Tensor | None = None) -> Tensor:
        """Inputs near x that `check` accepts."""
        return self.behind.nearest(x, toward)

    def level(self, alpha: float, n: int, size: int) -> float:
        """What is left of alpha for the bounds of n draws of `size` numbers."""
        return self.behind.level(alpha, n, size)

    def draw(self, x: Tensor, sigma: NDArray[np.float64], rows: int, keys: Sequence[Source]) -> Tensor:
        """Noisy copies of j inputs; `sigma` as of `for_inputs`."""
        return self.behind.draw(x, sigma * self.lift_norm, rows, keys)

    def radius(self, failure: ArrayLike, p_upper: ArrayLike) -> NDArray[np.float64]:
        """Radius for an upper bound of 1 - p_A and one of p_B, in front of the map."""
        return self.behind.radius(failure, p_upper) / self.lift_norm

"""Gaussian noise on the grid of 8-bit inputs: integers are added, so the certificate holds in floating point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from art_rs_plugins.smoothing.noise import Gaussian, Key, Source, device_generator, is_channels_last, philox
from art_rs_plugins.theory.certificates import Kind
from art_rs_plugins.theory.radii import gaussian_probability, gaussian_radius

__all__ = ["GridGaussian"]

_LEVELS = 255
_ON_GRID = 1e-4
"""Steps of the grid that a number may lie off it: k / 255 and k * (1 / 255) in float32 lie within 6e-5."""

_BITS = 62
"""Bits of one draw; 2**62 itself still fits into int64, the only wide integer that PyTorch can search."""
_REST = _BITS - 16
_AMBIGUOUS = np.iinfo(np.int16).min

_MAX_CLIP = 32_000
"""Noise of up to 255 + clip has to fit into int16."""

_PI = Decimal("3.14159265358979323846264338327950288419716939937511")


@dataclass(frozen=True, slots=True, eq=False)
class _Cells:
    """Law of the integer noise of one sigma; integers lie in [-top, top], the ends hold the tails."""

    clip: int                        # the network sees (-clip, ..., 255 + clip) / 255
    top: int                         # 255 + clip: more noise than this leads to the clip from any k
    thresholds: NDArray[np.int64]    # (2 * top,): 2**62 P(noise < j) for j = 1 - top, ..., top
    lookup: NDArray[np.int16]        # (65536,): noise by the leading 16 bits, or _AMBIGUOUS
    values: NDArray[np.float32]      # (256 + 2 * clip,): what the network sees for each integer


def _ends(sigma: float) -> tuple[int, int]:
    """Clip and top: six sigma beyond [0, 255] are kept."""
    clip = math.ceil(min(6.0 * _LEVELS * sigma, _MAX_CLIP))
    return clip, _LEVELS + clip


def _lower_tail(z: Decimal) -> Decimal:
    """Phi(-z) for 0 < z <= 9.5, within 1e-40; 1/2 - phi(z) (z + z^3 / 3 + z^5 / (3 5) + ...), all terms positive."""
    square = z * z
    total = term = z
    order = 1
    while term > total * Decimal("1e-45"):   # past its peak the series falls by more than half in each step
        order += 2
        term = term * square / order
        total += term
    return Decimal("0.5") - total * (-square / 2).exp() / (2 * _PI).sqrt()


@lru_cache(maxsize=256)
def _cells(sigma: float) -> _Cells:
    """Tables of one sigma; each threshold is within 2**-63 + 1e-40 of the exact probability."""
    clip, top = _ends(sigma)
    tails = np.zeros(top, dtype=np.int64)   # 2**62 P(noise <= -i) for i = 1, ..., top
    with localcontext(Context(prec=50)):
        for i in range(top):
            z = (2 * i + 1) / (2 * _LEVELS * Decimal(sigma))
            if z > Decimal("9.5"):   # this and all further ones are below Phi(-9.5) < 2**-69, and round to 0
                break
            tails[i] = int((_lower_tail(z) * 2**_BITS).to_integral_value())
    thresholds = np.concatenate([tails[::-1], 2**_BITS - tails])
    heads = np.arange(2**16, dtype=np.int64) << _REST
    least = np.searchsorted(thresholds, heads, side="right")
    most = np.searchsorted(thresholds, heads + (2**_REST - 1), side="right")
    lookup = np.where(least == most, least - top, _AMBIGUOUS).astype(np.int16)
    values = np.arange(-clip, top + 1).astype(np.float32) / np.float32(_LEVELS)   # one correctly rounded division
    return _Cells(clip, top, thresholds, lookup, values)


@lru_cache(maxsize=256)
def _on_device(sigma: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Thresholds and values of one sigma, on a device."""
    cells = _cells(sigma)
    return torch.from_numpy(cells.thresholds).to(device), torch.from_numpy(cells.values).to(device)


def _draw_by_lookup(sigma: float, size: int, key: Key) -> NDArray[np.int16]:
    """Integer noise (size,) from 62-bit draws: 16 bits look it up, the other 46 are drawn where these do not decide."""
    cells = _cells(sigma)
    bits = philox(key)
    heads = bits.random_raw(-(-size // 4)).view(np.uint16)[:size]
    noise = cells.lookup.take(heads)
    open_ = np.flatnonzero(noise == _AMBIGUOUS)
    rest = (bits.random_raw(len(open_)) >> np.uint64(64 - _REST)).view(np.int64)
    draws = heads[open_].astype(np.int64) << _REST | rest
    noise[open_] = np.searchsorted(cells.thresholds, draws, side="right") - cells.top
    return noise


def _draw_by_search(sigma: float, size: int, key: Source, device: torch.device) -> Tensor:
    """Integer noise (size,), int32, from 62-bit draws of PyTorch's generator of a device."""
    generator = device_generator(key, device)
    draws = torch.empty(size, dtype=torch.int64, device=device).random_(0, 2**_BITS, generator=generator)
    return torch.bucketize(draws, _on_device(sigma, device)[0], out_int32=True, right=True).sub_(_cells(sigma).top)


@dataclass(frozen=True, slots=True, eq=False)
class GridGaussian:
    r"""Isotropic Gaussian noise for 8-bit inputs, exact in floating point.

    Inputs lie on the grid k / 255, k = 0, ..., 255. Noise is drawn as integers, added as integers, clipped, and looked
    up once in a table of float32 values, so what the network sees depends on the integer k + noise and on nothing else.

    Parameters
    ----------
    sigma : float or array_like of float, shape (b,)
        Standard deviation in the units of the input, [0, 1]: one for all inputs, or one for each.

    Raises
    ------
    ValueError
        Unless every sigma is finite and positive.

    Notes
    -----
    *Guarantee.* Let s = 255 sigma, and let c = ceil(6 s), 32,000 at most, be the clip. Consider the classifier
    F(z) = f(table(clip(round(255 z)))) of real vectors z, with f as the machine computes it, a function of its float32
    input; clip is to [-c, 255 + c]. The certificate is the theorem of Cohen et al. for F, which may be any measurable
    function: let A be what F answers at k / 255 + eps with probability >= 1 - failure, for real Gaussian eps. Then
    g(z) = argmax_y P(F(z + eps) = y) is A for *every real* z closer to k / 255 than the radius. Rounding inside f, the
    clip, ties and overflow are all part of F; none is an approximation. What remains is that the votes are draws of
    F(k / 255 + eps). Because k is an integer, round(255 (k / 255 + eps)) = k + round(255 eps) but for ties, which have
    probability 0; and round(255 eps) has independent coordinates with

        P(j) = Phi((j + 1/2) / s) - Phi((j - 1/2) / s),

    which is the law of the noise that is drawn. Noise beyond 255 + c leads to the clip from every k, so the end cells
    hold the whole tails, and the correctness does not depend on c.

    *Only on the grid.* At other z, integer noise on a rounded input is not F(z + eps), and the classifier that is
    deployed is not g. So `check` refuses such inputs. Perturbed 8-bit images lie on the grid, and distances are between
    the exact points k / 255; float32(k / 255) is only a name of such a point.

    *Bits.* Draws are taken for ideal bits, of Philox 4x64-10 on CPUs and of PyTorch's generator elsewhere; that is an
    assumption. Given them, each of the 2 (255 + c) thresholds is off by at most 2^-63 + 1e-40, so the total variation
    between the law of one number and P is at most (255 + c) (2^-62 + 2e-40) < (511 + 2 c) 2^-62. For n draws of d
    numbers it is at most n d (511 + 2 c) 2^-62, which `level` takes off alpha: 1.4e-7 for n = 100,000 draws of a CIFAR
    image at sigma = 0.5.

    *Source.* Voracek and Hein (2023), "Sound randomized smoothing in floating-point arithmetic", for smoothing on a
    grid; there the noisy input is added in floating point, here in integers. Cohen et al. (2019), theorem 1.

    Examples
    --------
    >>> noise = GridGaussian(0.5)
    >>> float(noise.radius(0.1, 0.1).round(6))
    0.640776
    >>> noise.check(torch.tensor([[0.0, 0.2, 1.0]]))
    """

    sigma: float | NDArray[np.float64]

    norm: ClassVar[float] = 2.0
    kind: ClassVar[Kind] = "exact"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", Gaussian(self.sigma).sigma)

    def for_inputs(self, b: int) -> NDArray[np.float64]:
        """Sigma of each of b inputs, shape (b,); ``ValueError`` if it was given for another number of them."""
        return Gaussian(self.sigma).for_inputs(b)

    def check(self, x: Tensor) -> None:
        """Refuse inputs off the grid k / 255.

        Parameters
        ----------
        x : Tensor, floating point
            Inputs. A number counts as k / 255 if 255 times it lies within 1e-4 of k, which covers k / 255 and
            k * (1 / 255) in float32.

        Raises
        ------
        TypeError
            If x is not floating point.
        ValueError
            If a number is not finite, lies outside [0, 1], or off the grid.
        """
        if not x.is_floating_point():
            raise TypeError(f"x must be floating point, k / 255 for 8-bit inputs, got {x.dtype}; divide it by 255")
        steps = x.double() * _LEVELS
        off = (steps - steps.round()).abs()
        if not bool(torch.isfinite(off).all()):
            raise ValueError("x must be finite, but it holds NaN or Inf")
        if bool(((steps < -_ON_GRID) | (steps > _LEVELS + _ON_GRID)).any()):
            raise ValueError(
                f"x must lie in [0, 1] for noise on the grid k / 255, got values from {float(x.min()):.6g} to "
                f"{float(x.max()):.6g}; divide 8-bit inputs by 255, and normalise them inside the network"
            )
        wrong = off > _ON_GRID
        if bool(wrong.any()):
            first = float(x[wrong][0])
            raise ValueError(
                f"x must lie on the grid k / 255, but {int(wrong.sum())} of its {x.numel()} numbers do not; the first "
                f"is {first:.9g} = {_LEVELS * first:.6g} / 255. Integer noise is rounded Gaussian noise on the grid "
                "only, so an exact certificate would not hold there; round inputs to 8 bits, or use Gaussian noise"
            )

    def nearest(self, x: Tensor, toward: Tensor | None = None) -> Tensor:
        """Return x with every number rounded to the grid and held to [0, 1]; toward other inputs, if given.

        Parameters
        ----------
        x : Tensor, floating point
            Any inputs.
        toward : Tensor, shape of x, optional
            Inputs on the grid; the result is nowhere farther from them than x is.
        """
        steps = x.double() * _LEVELS
        if toward is None:
            whole = steps.round()
        else:
            origin = (toward.double() * _LEVELS).round()
            whole = origin + (steps - origin).trunc()
        return (whole.clamp(0, _LEVELS) / _LEVELS).to(x.dtype)

    def alpha_slack(self, n: int, numel: int) -> float:
        """Total variation between n draws of `numel` numbers and the law that the certificate speaks of, at most."""
        top = _ends(float(np.max(self.sigma)))[1]
        return n * numel * (2 * top + 1) * 2.0**-_BITS

    def level(self, alpha: float, n: int, size: int) -> float:
        """Return what is left of alpha for the bounds of n draws of `size` numbers; ``ValueError`` if nothing is."""
        left = alpha - self.alpha_slack(n, size)
        if not left > 0.0:
            raise ValueError(
                f"alpha = {alpha} is used up by the finite bits of n = {n} draws of {size} numbers, which cost "
                f"{self.alpha_slack(n, size):.3g}; take fewer draws or a larger alpha"
            )
        return left

    def draw(self, x: Tensor, sigma: NDArray[np.float64], rows: int, keys: Sequence[Source]) -> Tensor:
        """Noisy copies of j inputs.

        Parameters
        ----------
        x : Tensor, shape (j, ...)
            Inputs that `check` accepts; any others are rounded to the grid. A channels_last tensor gives channels_last
            copies.
        sigma : ndarray of float64, shape (j,)
            Standard deviation for each.
        rows : int
            Copies of each.
        keys : sequence of Key, length j
            Names of the draws, or generators; the same key, shape and kind of device give the same bits.

        Returns
        -------
        Tensor of float32, shape (j * rows, ...)
            All copies of the first input, then those of the second, and so on; values i / 255, correctly rounded.
        """
        last = is_channels_last(x)
        images = x.permute(0, 2, 3, 1) if last else x
        levels = (images.double() * _LEVELS).round().clamp(0, _LEVELS).to(torch.int32)[:, None]
        noisy = torch.empty((len(x), rows, *images.shape[1:]), device=x.device)
        for copies, level, scale, key in zip(noisy, levels, sigma.tolist(), keys, strict=True):
            if x.device.type == "cpu":
                noise = torch.from_numpy(_draw_by_lookup(scale, copies.numel(), key))
            else:
                noise = _draw_by_search(scale, copies.numel(), key, x.device)
            values, clip = _on_device(scale, x.device)[1], _cells(scale).clip
            place = (noise.view(copies.shape) + (level + clip)).clamp_(0, len(values) - 1)
            torch.index_select(values, 0, place.flatten(), out=copies.view(-1))
        copies = noisy.flatten(0, 1)
        return copies.permute(0, 3, 1, 2) if last else copies

    def radius(self, failure: ArrayLike, p_upper: ArrayLike) -> NDArray[np.float64]:
        """l2 radius for an upper bound of 1 - p_A and one of p_B; see `theory.radii.gaussian_radius`."""
        return gaussian_radius(failure, p_upper, self.sigma)

    def probability(self, radius: ArrayLike) -> NDArray[np.float64]:
        """Probability p_A that a one-sided certificate of this l2 radius needs."""
        return gaussian_probability(radius, self.sigma)

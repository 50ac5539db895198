"""Noise families: how an input is perturbed, and which radius a probability buys.

Draws are a pure function of a key (seed, index of the input, stage, chunk), so that results do not depend on how work
is split, ordered or resumed, and a repeated chunk is the same experiment rather than a second try at alpha.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from art_rs_plugins.theory.certificates import Kind
from art_rs_plugins.theory.radii import check_sigma, gaussian_probability, gaussian_radius

__all__ = [
    "Gaussian",
    "Key",
    "Noise",
    "Source",
    "Stage",
    "check_seed",
    "derive_seed",
    "device_generator",
    "device_seed",
    "fresh_seed",
    "is_channels_last",
    "philox",
    "recordable",
    "standard_normal",
    "standard_normals",
]

MAX_SEED = 2**63 - 1


class Stage(IntEnum):
    """What draws are for; different stages of one input never share any."""

    SELECTION = 0
    ESTIMATION = 1
    PREDICTION = 2
    CONFIRMATION = 3
    TRAINING = 4
    BANK = 5
    ATTACK = 6
    SEARCH = 7


@dataclass(frozen=True, slots=True)
class Key:
    """Name of one chunk of draws. Distinct keys of one seed name disjoint parts of one counter-based stream."""

    seed: int
    index: int
    stage: Stage
    chunk: int


Source = Any
"""A `Key`; on devices other than CPUs also a seeded ``torch.Generator``."""


def check_seed(seed: int | None) -> int:
    """Return `seed`, or a fresh one where it is None; ``ValueError`` or ``TypeError`` if it is no seed."""
    if seed is None:
        return fresh_seed()
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an integer or None (fresh entropy), got {type(seed).__name__}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must lie in [0, 2**63), got {seed}")
    return int(seed)


def fresh_seed() -> int:
    """Draw a seed in [0, 2**63) from the entropy of the operating system."""
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0] >> np.uint64(1))


def derive_seed(seed: int, *words: int) -> int:
    """Hash a seed and further numbers into another seed, so that repeated calls do not repeat their draws."""
    return _hash(seed, *words) >> 1


def _hash(*words: int) -> int:
    """Hash numbers in [0, 2**64) to 64 bits; their count and width are fixed, so that no two lists agree."""
    entropy = np.array([len(words), *words], np.uint64).view(np.uint32)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def philox(key: Key) -> np.random.Philox:
    """Random bits of one key on the CPU: counter-based, so that different keys never meet."""
    counter = [0, key.chunk, key.index, int(key.stage)]   # the first word is Philox's own, and would take 2**64 draws
    return np.random.Philox(key=np.array([key.seed, 0], np.uint64), counter=np.array(counter, np.uint64))


def device_seed(key: Key) -> int:
    """Seed of one key for PyTorch's generators of devices other than CPUs: a 64-bit hash."""
    return _hash(key.seed, key.index, int(key.stage), key.chunk)


def device_generator(source: Source, device: torch.device) -> torch.Generator:
    """Generator of one key on a device other than a CPU; one that is seeded already is returned as it is."""
    generator: torch.Generator = source
    if isinstance(source, Key):
        generator = torch.Generator(device).manual_seed(device_seed(source))
    return generator


def standard_normal(shape: tuple[int, ...], key: Key, device: torch.device | str = "cpu") -> Tensor:
    """Draw independent N(0, 1) values of one key; see `standard_normals`."""
    return standard_normals(shape, [key], device)[0]


def standard_normals(shape: tuple[int, ...], keys: Sequence[Source], device: torch.device | str = "cpu") -> Tensor:
    """Draw independent N(0, 1) values for each of j keys, born on the device.

    Parameters
    ----------
    shape : tuple of int
        Shape of the values of one key, float32.
    keys : sequence of Key, length j
        Names of the draws; the same key, shape and kind of device give the same bits, whatever stands beside it.
        Generators of the device may stand for them; see `device_generator`.
    device : torch.device or str
        Where the values are born.

    Returns
    -------
    Tensor of float32, shape (j, *shape)

    Notes
    -----
    On CPUs: Philox 4x64-10 keyed by the seed and counted by (index, stage, chunk), then Box-Muller on 31-bit uniforms,
    whose tail ends at 6.66. PyTorch's own CPU generator is not used: it keeps 32 bits of a seed, so that chunks would
    soon share their draws, and its float32 normals end at 5.77. Elsewhere: PyTorch's generator of that device, seeded
    with a 64-bit hash of the key.
    """
    device = torch.device(device)
    if device.type != "cpu":
        normal = torch.empty((len(keys), *shape), device=device)
        for row, key in zip(normal, keys, strict=True):
            row.normal_(generator=device_generator(key, device))
        return normal
    size = math.prod(shape)
    half = (size + 1) // 2
    drawn = [torch.from_numpy(philox(key).random_raw(half).view(np.int32)) for key in keys]
    bits = torch.stack(drawn) if len(drawn) > 1 else drawn[0][None]   # a large chunk is not copied
    uniform = bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)   # in (0, 1]
    radius = uniform[:, :half].log_().mul_(-2.0).sqrt_()
    angle = uniform[:, half:].mul_(2.0 * math.pi)
    cosine = angle.cos()
    angle.sin_().mul_(radius)   # in place: memory that is touched here is lost to the cache of the network
    radius.mul_(cosine)
    return uniform[:, :size].reshape(len(keys), *shape)


class Noise(Protocol):
    """A noise family: how it perturbs inputs, what its certificates are called, and what they are worth."""

    @property
    def norm(self) -> float:
        """Order of the norm in which radii hold."""
        ...

    @property
    def kind(self) -> Kind:
        """What certificates under this noise are called."""
        ...

    def for_inputs(self, b: int) -> NDArray[np.float64]:
        """Sigma of each of b inputs, shape (b,)."""
        ...

    def check(self, x: Tensor) -> None:
        """Raise ``ValueError`` for inputs that certificates under this noise could not speak of."""
        ...

    def nearest(self, x: Tensor, toward: Tensor | None = None) -> Tensor:
        """Inputs near x that `check` accepts, none of their numbers farther from those of `toward` than x is."""
        ...

    def level(self, alpha: float, n: int, size: int) -> float:
        """What is left of alpha for the bounds of n draws of `size` numbers."""
        ...

    def draw(self, x: Tensor, sigma: NDArray[np.float64], rows: int, keys: Sequence[Source]) -> Tensor:
        """Noisy copies (j * rows, ...) of j inputs (j, ...), `rows` of each, in this order."""
        ...

    def radius(self, failure: ArrayLike, p_upper: ArrayLike) -> NDArray[np.float64]:
        """Radius for an upper bound of 1 - p_A and one of p_B."""
        ...


def family_of(noise: Any) -> tuple[Any, ...]:
    """What tells the draws of a noise from those of others, sigma, inputs and keys apart."""
    if not is_dataclass(noise):
        return (noise,)   # by identity, unless it says otherwise
    values = (getattr(noise, each.name) for each in fields(noise) if each.name != "sigma")
    return type(noise), *(family_of(value) if is_dataclass(value) else value for value in values)


def recordable(noise: Noise) -> tuple[Any, ...] | None:
    """What tells the draws of a noise from those of others, if a graph may record them; else None.

    That takes one sigma, given as a number, and draws that need nothing but their generators: `GridGaussian` reads
    tables that may be gone when the graph is replayed.
    """
    if not getattr(type(noise), "graphs", False):
        return None
    values = [getattr(noise, each.name) for each in fields(noise)]   # type: ignore[arg-type]
    parts = [value if isinstance(value, float) else recordable(value) for value in values]
    return None if any(part is None for part in parts) else (type(noise), *parts)


def is_channels_last(x: Tensor) -> bool:
    """Whether images (j, c, h, w) lie in memory with their channels last, and only so."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """Isotropic Gaussian noise, in the units of the raw input.

    Parameters
    ----------
    sigma : float or array_like of float, shape (b,)
        Standard deviation: one for all inputs, or one for each.

    Raises
    ------
    ValueError
        Unless every sigma is finite and positive.

    Examples
    --------
    >>> float(Gaussian(0.5).radius(0.1, 0.1).round(6))
    0.640776
    """

    sigma: float | NDArray[np.float64]

    norm: ClassVar[float] = 2.0
    kind: ClassVar[Kind] = "certified"
    graphs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        values = check_sigma(self.sigma)
        if values.ndim > 1:
            raise ValueError(f"sigma must be a number or have shape (b,), got {values.shape}")
        object.__setattr__(self, "sigma", values if values.ndim else float(values))

    def for_inputs(self, b: int) -> NDArray[np.float64]:
        """Sigma of each of b inputs, shape (b,); ``ValueError`` if it was given for another number of them."""
        values = np.asarray(self.sigma)
        if values.ndim == 1 and len(values) != b:
            raise ValueError(f"sigma has length {len(values)}, but there are {b} inputs; give one, or one for each")
        return np.broadcast_to(values, (b,)).astype(np.float64)

    def check(self, x: Tensor) -> None:
        """Accept any input."""

    def nearest(self, x: Tensor, toward: Tensor | None = None) -> Tensor:
        """Return x itself."""
        return x

    def level(self, alpha: float, n: int, size: int) -> float:
        """Return alpha: the certificate takes its draws for ideal ones."""
        return alpha

    def draw(self, x: Tensor, sigma: NDArray[np.float64], rows: int, keys: Sequence[Source]) -> Tensor:
        """Noisy copies of j inputs.

        Parameters
        ----------
        x : Tensor, shape (j, ...)
            Inputs; a channels_last tensor gives channels_last copies.
        sigma : ndarray of float64, shape (j,)
            Standard deviation for each.
        rows : int
            Copies of each.
        keys : sequence of Key, length j
            Names of the draws, or generators; see `standard_normals`.

        Returns
        -------
        Tensor of float32, shape (j * rows, ...)
            All copies of the first input, then those of the second, and so on.
        """
        last = is_channels_last(x)
        images = x.permute(0, 2, 3, 1) if last else x
        normal = standard_normals((rows, *images.shape[1:]), keys, x.device)
        # as numbers: a tensor of them would make the device wait for the host in each batch
        if (sigma == sigma[0]).all():
            normal.mul_(float(sigma[0]))
        else:
            for row, scale in zip(normal, sigma.tolist(), strict=True):
                row.mul_(scale)
        noisy = normal.add_(images[:, None]).flatten(0, 1)
        return noisy.permute(0, 3, 1, 2) if last else noisy

    def perturb(self, x: Tensor, normal: Tensor) -> Tensor:
        """Add noise to b inputs.

        Parameters
        ----------
        x : Tensor, shape (b, ...)
            Inputs.
        normal : Tensor, shape (b, ...) or (m, b, ...)
            Standard normal draws; overwritten.

        Returns
        -------
        Tensor
            ``x + sigma * normal``, of the shape of `normal`.
        """
        sigma = torch.as_tensor(self.for_inputs(len(x)), dtype=normal.dtype, device=normal.device)
        return normal.mul_(sigma.view(-1, *[1] * (x.ndim - 1))).add_(x)

    def radius(self, failure: ArrayLike, p_upper: ArrayLike) -> NDArray[np.float64]:
        """l2 radius for an upper bound of 1 - p_A and one of p_B; see `theory.radii.gaussian_radius`."""
        return gaussian_radius(failure, p_upper, self.sigma)

    def probability(self, radius: ArrayLike) -> NDArray[np.float64]:
        """Probability p_A that a one-sided certificate of this l2 radius needs."""
        return gaussian_probability(radius, self.sigma)

"""Certificates: what is claimed about b inputs, and all that is needed to judge the claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["Certificates", "Kind"]

Kind = Literal["certified", "exact", "committed", "conditional"]
"""What is promised, in one word.

``certified``: a theorem about the deployed classifier, up to alpha, for ideal Gaussian draws and real arithmetic.
``exact``: the same, and in floating point. ``committed``: a promise kept by a memory from the moment it was given.
``conditional``: about a classifier frozen at this input; reproduced for comparison, never counted as certified.
"""

_INTEGERS = ("prediction", "count", "runner_up_count", "n", "n0", "index", "seed", "passes")
_REALS = ("radius", "p_lower", "p_upper", "sigma", "alpha")


@dataclass(frozen=True, slots=True, eq=False)
class Certificates:
    r"""Certificates of b inputs, as arrays of shape (b,); frozen, and the arrays cannot be written.

    Attributes
    ----------
    prediction : int64
        The class. Where ``abstained``, the class that would have been certified; it carries no promise.
    radius : float64
        Certified radius in the norm ``norm``, in the units of the input, rounded toward zero; 0 where abstained.
    abstained : bool
        True where nothing is certified.
    p_lower, p_upper : float64
        Lower bound of the class's probability under noise, upper bound of any rival's.
    count, runner_up_count : int64
        Estimation votes of the class, and of its strongest rival with the invalid votes added.
    n, n0 : int64
        Estimation and selection draws.
    sigma : float64
        Noise level, in the units of the input.
    alpha : float64
        Failure probability of each certificate.
    index, seed : int64
        Key of the noise: the same seed, index, device and network give the same bits.
    kind : str
        ``certified``, ``exact``, ``committed`` or ``conditional``; see `Kind`.
    norm : float
        Order of the norm, 2 for Gaussian noise.
    performance : str
        How the network computed when it voted, such as ``float32``: the certificate is about it as it then computes.
    passes : int64
        Forward passes that the input took in all; by default n + n0. More where sigma was searched for, or where
        several noise levels voted: n and n0 are then those at ``sigma``.

    Raises
    ------
    ValueError, TypeError
        If lengths differ, a number is not finite, a count exceeds its draws, a radius stands beside an abstention, or
        a class or count is not an integer.

    Notes
    -----
    *Guarantee* (kind ``certified``). For each row that does not abstain, with probability at least 1 - alpha over the
    draws, the smoothed classifier argmax_c P(f(x + eps) = c) returns ``prediction`` for every input closer than
    ``radius``.
    """

    prediction: NDArray[np.int64]
    radius: NDArray[np.float64]
    abstained: NDArray[np.bool_]
    p_lower: NDArray[np.float64]
    p_upper: NDArray[np.float64]
    count: NDArray[np.int64]
    runner_up_count: NDArray[np.int64]
    n: NDArray[np.int64]
    n0: NDArray[np.int64]
    sigma: NDArray[np.float64]
    alpha: NDArray[np.float64]
    index: NDArray[np.int64]
    seed: NDArray[np.int64]
    kind: Kind = "certified"
    norm: float = 2.0
    performance: str = "float32"
    passes: NDArray[np.int64] = None   # type: ignore[assignment]   # an array from here on

    def __post_init__(self) -> None:
        given: Any = self.passes
        if given is None:
            object.__setattr__(self, "passes", np.add(self.n, self.n0))
        prediction = np.asarray(self.prediction)
        if prediction.ndim != 1:
            raise ValueError(f"prediction must have shape (b,), got {prediction.shape}")
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        for name in (*_INTEGERS, *_REALS, "abstained"):
            if name in _INTEGERS and np.asarray(getattr(self, name)).dtype.kind not in "iu":
                raise TypeError(f"{name} must be integers, got dtype {np.asarray(getattr(self, name)).dtype}")
            dtype = np.int64 if name in _INTEGERS else np.float64 if name in _REALS else np.bool_
            array: NDArray[Any] = np.array(np.broadcast_to(getattr(self, name), prediction.shape), dtype=dtype)
            if name in _REALS and not np.all(np.isfinite(array)):
                raise ValueError(f"{name} must be finite; a bound that is not finite has to become an abstention")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if np.any(self.radius < 0) or np.any(self.radius[self.abstained] != 0):
            raise ValueError("radius must be >= 0, and 0 where abstained")
        if np.any(self.count > self.n) or np.any(self.count < 0):
            raise ValueError("count must lie between 0 and n")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the constructor, so that a copy is checked and frozen like its original."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    def __len__(self) -> int:
        return len(self.prediction)

    def __getitem__(self, rows: int | slice | NDArray[Any] | Sequence[int]) -> Certificates:
        """Certificates of some rows; an integer gives one row."""
        picked = [rows] if isinstance(rows, int | np.integer) else rows
        changes: dict[str, Any] = {name: array[picked] for name, array in self._arrays().items()}
        return replace(self, **changes)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}

    def holds_at(self, radius: float) -> NDArray[np.bool_]:
        """Mask (b,) of the rows that are certified at this radius: not abstained, and ``self.radius >= radius``."""
        if not (np.isfinite(radius) and radius >= 0):
            raise ValueError(f"radius must be finite and >= 0, got {radius}")
        return np.asarray(~self.abstained & (self.radius >= radius))

    @classmethod
    def concatenate(cls, parts: Sequence[Certificates]) -> Certificates:
        """Join certificates of one kind, norm and performance; ``ValueError`` where these differ or there are none."""
        if not parts:
            raise ValueError("parts must hold at least one Certificates")
        for name in ("kind", "norm", "performance"):
            values = {getattr(part, name) for part in parts}
            if len(values) > 1:
                raise ValueError(f"certificates of different {name} cannot be joined: {sorted(map(str, values))}")
        names = parts[0]._arrays()
        joined: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return replace(parts[0], **joined)

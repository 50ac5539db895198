"""What crosses ART's border on the way in: inputs, labels and sigma, checked and cast."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from art_rs_plugins.smoothing.grid import GridGaussian
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.smoothing.performance import Performance
from art_rs_plugins.theory.radii import check_sigma

__all__ = [
    "as_inputs",
    "as_limits",
    "as_noise",
    "as_one_hot",
    "as_performance",
    "as_sigma",
    "check_finite",
    "check_lengths",
    "check_range",
    "warn_if_hopeless",
]

RANGE_SLACK = 1e-6


def as_inputs(x: Any, input_shape: tuple[int, ...], *, keep_dtype: bool = False) -> Tensor:
    """Inputs as a tensor (b, *input_shape), cast to float32 unless a floating dtype is to be kept.

    Raises
    ------
    TypeError
        If x does not hold real numbers.
    ValueError
        If x has another shape, or is empty.
    """
    if isinstance(x, Tensor):
        tensor = x
    else:
        array = np.asarray(x)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"x must be an array of real numbers, got dtype {array.dtype}")
        tensor = torch.from_numpy(np.array(array, order="C"))
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"x must be an array of real numbers, got dtype {tensor.dtype}")
    if tensor.ndim != 1 + len(input_shape) or tuple(tensor.shape[1:]) != tuple(input_shape):
        hint = "; add the batch axis with x[None]" if tuple(tensor.shape) == tuple(input_shape) else ""
        wanted = ", ".join(("b", *map(str, input_shape)))
        raise ValueError(f"x must have shape ({wanted}), got {tuple(tensor.shape)}{hint}")
    if len(tensor) == 0:
        raise ValueError("x must hold at least one input, got none")
    return tensor if keep_dtype and tensor.is_floating_point() else tensor.detach().to(torch.float32)


def check_finite(x: Tensor) -> None:
    """Raise ``ValueError`` where x holds NaN or Inf."""
    finite = torch.isfinite(x).flatten(1).all(dim=1)
    if not bool(finite.all()):
        rows = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"x must be finite, got NaN or Inf in {len(rows)} inputs, the first at position {rows[0]}")


def check_lengths(x: int, y: int) -> None:
    """Raise ``ValueError`` unless there is a label for each input."""
    if x != y:
        raise ValueError(f"x and y must have the same length, got {x} and {y}")


def warn_if_hopeless(n: int, alpha: float, name: str = "n") -> None:
    """Warn where no number of equal votes could be an answer."""
    if 2.0 * 0.5**n > alpha:
        warnings.warn(
            f"{name}={n} votes can never reach alpha={alpha}: every prediction will abstain; use a larger {name}",
            stacklevel=4,
        )


def as_limits(clip_values: Any, input_shape: tuple[int, ...], channels_first: bool) -> tuple[Tensor, Tensor] | None:
    """Range of raw inputs as a pair that broadcasts against them.

    Parameters
    ----------
    clip_values : pair of numbers or of arrays, or None
        For all values, for each channel, or for each feature.
    input_shape : tuple of int
        Shape of one input.
    channels_first : bool
        Where the channels of one input are.

    Raises
    ------
    ValueError
        If the arrays fit neither.
    """
    if clip_values is None:
        return None
    limits = []
    for limit in clip_values:
        values = torch.as_tensor(np.asarray(limit, dtype=np.float32))
        if channels_first and values.ndim == 1 and values.numel() == input_shape[0]:
            values = values.view(-1, *[1] * (len(input_shape) - 1))
        elif values.numel() == np.prod(input_shape):
            values = values.reshape(input_shape)
        try:
            torch.broadcast_to(values, input_shape)
        except RuntimeError:
            raise ValueError(
                f"clip_values must be numbers, or arrays for each channel or feature of inputs of shape {input_shape}; "
                f"got shape {tuple(values.shape)}"
            ) from None
        limits.append(values)
    return limits[0], limits[1]


def check_range(x: Tensor, limits: tuple[Tensor, Tensor] | None) -> None:
    """Raise ``ValueError`` where x leaves a range by more than 1e-6."""
    if limits is None:
        return
    low, high = (limit.to(x.device) for limit in limits)
    if bool(((x < low - RANGE_SLACK) | (x > high + RANGE_SLACK)).any()):
        raise ValueError(
            f"x must lie within clip_values [{float(low.min()):g}, {float(high.max()):g}], got "
            f"[{float(x.min()):g}, {float(x.max()):g}]; rescale x, or give the clip_values of its units"
        )


def as_one_hot(y: Any, nb_classes: int) -> NDArray[np.float32]:
    """Labels as rows (b, nb_classes) of probabilities, from class indices (b,) or (b, 1), or from such rows.

    Raises
    ------
    TypeError
        If indices are not integers.
    ValueError
        If indices are out of range, or rows of another length or not finite.
    """
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 1:
        if labels.dtype.kind not in "iuf" or np.any(labels != np.floor(labels)):
            raise TypeError(f"y must be class indices, or rows of shape (b, {nb_classes}); got dtype {labels.dtype}")
        if np.any(labels < 0) or np.any(labels >= nb_classes):
            raise ValueError(
                f"y must be class indices in [0, {nb_classes}), got values in [{labels.min()}, {labels.max()}]"
            )
        return np.eye(nb_classes, dtype=np.float32)[labels.astype(np.int64)]
    if labels.ndim != 2 or labels.shape[1] != nb_classes or not np.all(np.isfinite(labels)):
        raise ValueError(f"y must be finite and have shape (b,) or (b, {nb_classes}), got shape {labels.shape}")
    return labels.astype(np.float32)


def as_sigma(value: Any) -> float:
    """Sigma as a float; ``ValueError`` unless it is one finite number > 0."""
    sigma = check_sigma(value, "scale")
    if sigma.ndim:
        raise ValueError(f"scale must be one number, got shape {sigma.shape}")
    return float(sigma)


def as_performance(value: Any) -> Performance:
    """A `Performance`, the default one for None; ``TypeError`` for anything else."""
    if value is None:
        return Performance()
    if not isinstance(value, Performance):
        raise TypeError(f"performance must be a Performance, got {type(value).__name__}")
    return value


def as_noise(value: Any) -> type[Gaussian] | type[GridGaussian]:
    """A noise family; ``TypeError`` for anything else."""
    if value not in (Gaussian, GridGaussian):
        raise TypeError(f"noise must be the class Gaussian or GridGaussian, got {value!r}; sigma is given by scale")
    family: type[Gaussian] | type[GridGaussian] = value
    return family

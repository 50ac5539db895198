"""ART's preprocessing as a part of the base classifier: behind the noise, where it cannot move the certificate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from art.defences.preprocessor.preprocessor import Preprocessor, PreprocessorPyTorch
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from torch import Tensor, nn

from art_rs_plugins.smoothing.modules import Normalize

__all__ = ["ArtTransform", "is_augmentation", "make_transform"]


def is_augmentation(operation: Preprocessor) -> bool:
    """Whether an operation changes training data only, such as label smoothing or mixup."""
    return bool(operation.apply_fit and not operation.apply_predict)


def make_transform(
    operations: list[Preprocessor], *, channels_first: bool, limits: tuple[Tensor, Tensor] | None
) -> nn.Module | None:
    """What has to happen between the noise and the network, or None if nothing has to.

    Parameters
    ----------
    operations : list of Preprocessor
        ART's defences in their order, then its standardisation. Those for training data alone are left out.
    channels_first : bool
        Whether a mean for each channel belongs to dimension 1 or to the last one.
    limits : pair of Tensor, optional
        Range of the raw input. Noisy inputs are clipped to it before a defence, which may expect pixels.
    """
    layers: list[nn.Module] = []
    for operation in operations:
        if isinstance(operation, StandardisationMeanStd | StandardisationMeanStdPyTorch):
            mean, std = np.broadcast_arrays(np.asarray(operation.mean), np.asarray(operation.std))
            if np.any(mean != 0) or np.any(std != 1):
                last = mean.ndim == 1 and mean.size > 1 and not channels_first
                layers.append(Normalize(mean[None], std[None]) if last else Normalize(mean, std))
        elif not is_augmentation(operation):
            layers.append(ArtTransform(operation, limits))
    return nn.Sequential(*layers) if layers else None


class ArtTransform(nn.Module):
    """One of ART's defences as a module; NumPy defences run on the host, with ART's estimate of their gradient.

    Parameters
    ----------
    operation : Preprocessor
        Any of ART's; applied in training only if it asks for that.
    limits : pair of Tensor, optional
        Range that noisy inputs are clipped to first.
    """

    def __init__(self, operation: Preprocessor, limits: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.operation = operation
        self.limits = limits

    def forward(self, noisy: Tensor) -> Tensor:
        """Transform noisy inputs (m, ...)."""
        if self.training and not self.operation.apply_fit:
            return noisy
        if self.limits is not None:
            low, high = (limit.to(noisy) for limit in self.limits)
            noisy = noisy.clamp(low, high)
        if isinstance(self.operation, PreprocessorPyTorch):
            transformed: Tensor = self.operation.forward(noisy, None)[0]
            return transformed
        on_host: Tensor = _OnHost.apply(noisy, self.operation)  # type: ignore[no-untyped-call]
        return on_host


class _OnHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Preprocessor) -> Tensor:
        ctx.inputs, ctx.operation = x.detach().cpu().numpy(), operation
        return torch.as_tensor(np.asarray(operation(ctx.inputs)[0], dtype=np.float32)).to(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        estimate = ctx.operation.estimate_gradient(ctx.inputs, gradient.cpu().numpy())
        return torch.as_tensor(np.asarray(estimate, dtype=np.float32)).to(gradient), None

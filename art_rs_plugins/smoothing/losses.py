"""Training losses of noisy logits: cross-entropy, and those that shape the smoothed classifier itself.

A loss maps the logits (m, b, k) of m noisy copies of b inputs, and their labels, to a scalar. All of them work on
log-softmax in float32 at least, under autocast too: the probabilities they care about underflow in half precision.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from art_rs_plugins.theory.radii import check_sigma

__all__ = ["ADRE", "MACER", "Consistency", "adre", "consistency", "cross_entropy", "macer"]

_MACER_FLOOR = 1e-10
"""Added to the probability of the label before its logarithm is taken."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over copies and inputs.

    Parameters
    ----------
    logits : Tensor, shape (m, b, k)
        Of m noisy copies of b inputs.
    labels : Tensor, shape (b,) or (b, k)
        Class indices (int64), or probabilities.

    Returns
    -------
    Tensor
        A scalar, float32 (float64 for float64 logits).

    Raises
    ------
    ValueError, TypeError
        For shapes or types that do not fit, and labels outside the classes.

    Notes
    -----
    *Source.* Cohen et al. (2019), section 3.3 (Gaussian augmentation).
    """
    _check(logits, labels)
    repeated = labels.expand(len(logits), *labels.shape).flatten(0, 1)
    return nn.functional.cross_entropy(_precise(logits).flatten(0, 1), repeated)


@dataclass(frozen=True, slots=True)
class ADRE:
    r"""Cross-entropy plus ``weight`` times the log probability that the smoothed classifier gives to the runner-up.

    With G_i the mean softmax of input i over its m copies and c_i the class of largest G_i other than the label
    (lowest index on ties), the loss is

        mean_ij -log s_ij[y_i]  +  weight * mean_i max(log G_i[c_i], log floor)

    It falls without bound as logits grow: negative values are normal, the floor ends the reward of the regulariser,
    and weight decay or a falling learning rate ends the growth.

    Parameters
    ----------
    weight : float
        Of the regulariser, >= 0.
    floor : float
        Probability of the runner-up, in (0, 1), below which the regulariser is constant and its gradient 0.

    Raises
    ------
    ValueError
        For settings out of range.

    Notes
    -----
    *Source.* Feng et al. (2020), "Regularized training and tight certification for randomized smoothed classifier with
    provable robustness", as re-implemented by others; the floor, and the weight of 0.1, are not known to be theirs.
    """

    weight: float = 0.1
    floor: float = 1e-10

    def __post_init__(self) -> None:
        _check_weight(self.weight, "weight")
        if not 0.0 < self.floor < 1.0:
            raise ValueError(f"floor must lie strictly between 0 and 1 (such as 1e-10), got {self.floor}")

    def check_draws(self, draws: int) -> None:
        """Warn where the regulariser would mislead: called once, before training starts."""
        if draws == 1:
            warnings.warn(
                "ADRE with draws=1: the logarithm of a mean over few copies is far too low, and lowest where copies "
                "disagree, so that training is rewarded for votes that vary with the noise; use 8 draws",
                stacklevel=3,
            )

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of logits (m, b, k) for class indices (b,), a scalar; errors as `cross_entropy`."""
        _refuse_probabilities(labels, "ADRE")
        accuracy = cross_entropy(logits, labels)
        log_mean = _log_mean(_precise(logits).log_softmax(dim=2))
        log_rival = log_mean.gather(1, _runner_up(log_mean, labels))
        return accuracy + self.weight * log_rival.clamp_min(math.log(self.floor)).mean()


@dataclass(frozen=True, slots=True)
class Consistency:
    r"""Cross-entropy plus a price for copies that disagree, and for a mean that is undecided.

    With S_i the mean of the softmax s_ij over the m copies of input i, the loss is

        mean_ij -log s_ij[y_i]  +  weight * mean_ij KL(S_i || s_ij)  +  entropy_weight * mean_i H(S_i)

    Gradients flow through S_i too.

    Parameters
    ----------
    weight : float
        Of the divergence, >= 0; the authors take 20, 10 and 10 for sigma 0.25, 0.5 and 1 on CIFAR-10.
    entropy_weight : float
        Of the entropy, >= 0.

    Raises
    ------
    ValueError
        For weights that are negative or not finite.

    Notes
    -----
    *Source.* Jeong and Shin (2020), "Consistency regularization for certified robustness of smoothed classifiers".
    The authors use m = 2.
    """

    weight: float
    entropy_weight: float = 0.5

    def __post_init__(self) -> None:
        _check_weight(self.weight, "weight"), _check_weight(self.entropy_weight, "entropy_weight")

    def check_draws(self, draws: int) -> None:
        """Warn where the divergence is always 0: called once, before training starts."""
        if draws == 1:
            warnings.warn(
                "Consistency with draws=1: a single copy always agrees with itself, so that weight has no effect; "
                "use at least 2 draws",
                stacklevel=3,
            )

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of logits (m, b, k) for class indices (b,) or probabilities (b, k), a scalar; see `cross_entropy`."""
        accuracy = cross_entropy(logits, labels)
        log_p = _precise(logits).log_softmax(dim=2)
        log_mean = _log_mean(log_p)
        mean = log_mean.exp()
        divergence = (mean * (log_mean - log_p.mean(dim=0))).sum(dim=1)
        entropy = -(mean * log_mean).sum(dim=1)
        return accuracy + (self.weight * divergence + self.entropy_weight * entropy).mean()


@dataclass(frozen=True, slots=True)
class MACER:
    r"""Cross-entropy of the smoothed classifier plus a hinge on the radius it would certify where it is right.

    With S_i the mean softmax of input i, T_i the mean softmax of ``beta`` times the logits, and the gap
    ``Phi^-1(T_i[y_i]) - Phi^-1(T_i[c_i])`` to the runner-up c_i, the loss is

        mean_i -log(S_i[y_i] + 1e-10)  +  weight * sigma / 2 * (1 / b) sum_i (gamma - gap_i)

    The last sum is over inputs whose T_i puts the label first and whose gap is finite and at most gamma.

    Parameters
    ----------
    sigma : float
        Noise level of training, in the units of the input.
    weight : float
        Of the hinge, >= 0; the authors take 12 and 4 for sigma 0.25 and 0.5 on CIFAR-10, with m = 16.
    gamma : float
        Gap beyond which an input is left alone, > 0.
    beta : float
        Inverse temperature, > 0.

    Raises
    ------
    ValueError
        For settings out of range.

    Notes
    -----
    *Source.* Zhai et al. (2020), "MACER: attack-free and scalable robust training via maximizing certified radius",
    with the sum and the selection of the authors' code. Phi^-1(T_i[y_i]) is taken from the mass of the other classes,
    in float64: T_i[y_i] itself rounds to 1.
    """

    sigma: float
    weight: float
    gamma: float = 8.0
    beta: float = 16.0

    def __post_init__(self) -> None:
        if check_sigma(self.sigma).ndim:
            raise ValueError(f"sigma must be a single number, got {self.sigma!r}")
        _check_weight(self.weight, "weight")
        for name in ("gamma", "beta"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of logits (m, b, k) for class indices (b,), a scalar; errors as `cross_entropy`."""
        _refuse_probabilities(labels, "MACER")
        _check(logits, labels)
        precise = _precise(logits)
        log_label = _log_mean(precise.log_softmax(dim=2)).gather(1, labels[:, None])
        classification = -torch.logaddexp(log_label, torch.full_like(log_label, math.log(_MACER_FLOOR))).sum()
        log_mean = _log_mean((self.beta * precise).log_softmax(dim=2))
        gap = _gap(log_mean.detach(), labels)
        right = log_mean.argmax(dim=1) == labels
        # rows are left out before their quantiles meet autograd: 0 times an infinite slope would be NaN
        counted = right & torch.isfinite(gap) & (gap <= self.gamma)
        hinge = (self.gamma - _gap(log_mean[counted], labels[counted])).sum().to(precise.dtype)
        return (classification + self.weight * self.sigma / 2.0 * hinge) / len(labels)


def adre(logits: Tensor, labels: Tensor, weight: float = 0.1, *, floor: float = 1e-10) -> Tensor:
    """Loss of `ADRE` with these settings, in one call; shapes and errors as there."""
    return ADRE(weight, floor)(logits, labels)


def consistency(logits: Tensor, labels: Tensor, weight: float, *, entropy_weight: float = 0.5) -> Tensor:
    """Loss of `Consistency` with these settings, in one call; shapes and errors as there."""
    return Consistency(weight, entropy_weight)(logits, labels)


def macer(
    logits: Tensor, labels: Tensor, sigma: float, weight: float, *, gamma: float = 8.0, beta: float = 16.0
) -> Tensor:
    """Loss of `MACER` with these settings, in one call; shapes and errors as there."""
    return MACER(sigma, weight, gamma, beta)(logits, labels)


def _gap(log_mean: Tensor, labels: Tensor) -> Tensor:
    """Phi^-1 of the label's probability minus that of the runner-up's, float64. Shape (b,)."""
    others = log_mean.scatter(1, labels[:, None], -math.inf).logsumexp(dim=1)
    second = log_mean.gather(1, _runner_up(log_mean, labels))[:, 0]
    quantiles: Tensor = torch.special.ndtri(torch.stack([others, second]).double().exp())
    return -quantiles.sum(dim=0)


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_mean(log_p: Tensor) -> Tensor:
    """Log of the mean over copies of probabilities (m, b, k), given by their logs. Shape (b, k)."""
    return log_p.logsumexp(dim=0) - math.log(len(log_p))


def _runner_up(log_mean: Tensor, labels: Tensor) -> Tensor:
    """Most probable class other than the label, the lowest on ties. Shape (b, 1)."""
    return log_mean.detach().scatter(1, labels[:, None], -math.inf).argmax(dim=1, keepdim=True)


def _check_weight(value: float, name: str) -> float:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
    return value


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 3 or not logits.numel() or logits.shape[2] < 2:
        raise ValueError(
            f"logits must have shape (m, b, k) with m, b >= 1 and at least 2 classes, got {tuple(logits.shape)}"
        )
    _, b, k = logits.shape
    if labels.shape == (b, k) and labels.is_floating_point():
        return
    if labels.shape != (b,):
        raise ValueError(
            f"labels must be class indices of shape ({b},) or probabilities of shape ({b}, {k}), "
            f"got shape {tuple(labels.shape)}, {labels.dtype}"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 where they are class indices, got {labels.dtype}")
    if bool(((labels < 0) | (labels >= k)).any()):
        raise ValueError(f"labels must lie in [0, {k}), got values in [{int(labels.min())}, {int(labels.max())}]")


def _refuse_probabilities(labels: Tensor, name: str) -> None:
    if labels.ndim != 1:
        raise ValueError(
            f"labels of {name} must be class indices of shape (b,), since it tells the label from its runner-up, "
            f"got shape {tuple(labels.shape)}"
        )

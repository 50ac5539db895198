"""The soft form of what is certified over several noise levels: a network for attacks to aim at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from art_rs_plugins.smoothing.modules import BaseClassifier, SmoothedModule
from art_rs_plugins.smoothing.scales import Conditional, Scales, as_logits, host
from art_rs_plugins.smoothing.selectors import mixed
from art_rs_plugins.theory.scales import Cascade, Envelope, Selector

__all__ = ["ScaleModule"]

Floats = NDArray[np.float64]

_SHARPNESS = 4.0
"""Slope of a soft decision about a level, in log odds."""


class ScaleModule(SmoothedModule):
    """The classifier of several noise levels as a network, in eval mode: what attacks aim at.

    Scores are log probabilities (b, k). With p_i the mean softmax at level i, over one bank of normals for all levels:

    - `Envelope`: a softmax of max_i (w_i sigma_i Phi^-1(p_i) - b_i), over the smallest sigma;
    - `Cascade`: from the last level up, a soft decision whether a level is sure enough, between it and the rest;
    - `Selector`: the p_i in the proportions of the selector's soft votes, sharpened;
    - a sigma that is a function of the input, or found by a search: the mean softmax there. No gradient flows through
      sigma, and a search runs anew for each batch of inputs.

    In training mode it is a `SmoothedModule` at the noise level of training.

    Parameters
    ----------
    base, sigma, **settings
        As `SmoothedModule`; sigma is that of training.
    certificate : Scales
        What is certified.
    """

    selector: BaseClassifier | None

    def __init__(self, base: nn.Module, sigma: float, *, certificate: Scales, **settings: Any) -> None:
        super().__init__(base, sigma, **settings)
        self.certificate = certificate
        self.register_module("selector", None)

    def chooser(self) -> BaseClassifier:
        """The selector, behind the transform of the base classifier; ``ValueError`` if there is none yet."""
        if self.selector is None:
            raise ValueError("the selector is not trained: call fit_selector first, or set selector to a network")
        self.selector.transform = self.f.transform
        return self.selector

    def forward(self, x: Tensor) -> Tensor:
        """Training: outputs (b, k) at one noisy copy of each input. Evaluation: log probabilities (b, k)."""
        if self.training:
            return super().forward(x)
        x, certificate = x.to(torch.float32), self.certificate
        if isinstance(certificate, Envelope):
            return self._envelope(x, certificate)
        if isinstance(certificate, Cascade):
            return self._cascade(x, certificate)
        if isinstance(certificate, Selector):
            weights = (_SHARPNESS * self._soft(x, certificate.selector_sigma, self.chooser())).log_softmax(dim=1)
            levels = torch.stack([self._soft(x, sigma) for sigma in certificate.sigmas], dim=1)
            return (weights[:, :, None] + levels).logsumexp(dim=1)
        if isinstance(certificate, Conditional):
            f = as_logits(self.f, self.probabilities)
            settings: dict[str, Any] = {"sigma": self.sigma, "seed": self.seed, "block": self.block}
            classes = self.f(x[:1].detach()).shape[1]
            return self._at(x, certificate.search.choose(f, x.detach(), num_classes=classes, **settings))
        return self._at(x, certificate(host(x)))

    def _view(
        self, network: nn.Module, sigma: float, transform: nn.Module | None, probabilities: bool
    ) -> SmoothedModule:
        bank: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "block": self.block}
        view = SmoothedModule(network, sigma, transform=transform, probabilities=probabilities, **bank)
        view.training = False   # and leave the network, which is shared, in the modes that it has
        return view

    def _soft(self, x: Tensor, sigma: float, f: BaseClassifier | None = None) -> Tensor:
        """Log mean probabilities at a level, of the base classifier or of a selector."""
        part = self.f if f is None else f
        view = self._view(part.network, sigma, part.transform, self.probabilities and f is None)
        scores: Tensor = view(x)
        return scores

    def _at(self, x: Tensor, sigma: Floats) -> Tensor:
        """Log mean probabilities with a sigma (b,) for each input."""
        scale = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
        view = self._view(_Scaled(self.f, scale), 1.0, None, self.probabilities)
        scores: Tensor = view(x / scale.view(-1, *[1] * (x.ndim - 1)))
        return scores

    def _envelope(self, x: Tensor, rule: Envelope) -> Tensor:
        weights, offsets = (np.array(each).tolist() for each in (rule.weights, rule.offsets))
        terms = [
            weight * sigma * _quantiles(self._soft(x, sigma)) - offset
            for sigma, weight, offset in zip(rule.sigmas, weights, offsets, strict=True)
        ]
        scores = torch.stack(terms).amax(dim=0) / rule.sigmas[0]
        return scores.log_softmax(dim=1).float()

    def _cascade(self, x: Tensor, rule: Cascade) -> Tensor:
        rest = self._soft(x, rule.sigmas[-1])
        thresholds = np.array(rule.threshold).tolist()
        for sigma, threshold in list(zip(rule.sigmas, thresholds, strict=True))[-2::-1]:
            here = self._soft(x, sigma)
            top = here.amax(dim=1).clamp_max(-1e-7)
            odds = top - torch.log(-torch.expm1(top)) - float(np.log(threshold / (1.0 - threshold)))
            rest = mixed(_SHARPNESS * odds, here, rest)
        return rest


class _Scaled(nn.Module):
    """f of inputs in units of a sigma of their own; rows are copies of all b inputs, one copy after the other."""

    def __init__(self, f: nn.Module, sigma: Tensor) -> None:
        super().__init__()
        self.f, self.sigma = f, sigma

    def forward(self, z: Tensor) -> Tensor:
        scale = self.sigma.repeat(len(z) // len(self.sigma))
        outputs: Tensor = self.f(z * scale.view(-1, *[1] * (z.ndim - 1)))
        return outputs


def _quantiles(log_p: Tensor) -> Tensor:
    """Phi^-1 of probabilities (b, k) given as logs, in float64; accurate at both ends, where gradients would fade."""
    log_p = log_p.double()
    itself = torch.eye(log_p.shape[1], dtype=torch.bool, device=log_p.device)
    rest = log_p[:, None, :].masked_fill(itself, -torch.inf).logsumexp(dim=2)   # log of 1 - p, from the other classes
    tail = torch.special.ndtri(torch.minimum(log_p, rest).exp())
    return torch.where(log_p < rest, tail, -tail)

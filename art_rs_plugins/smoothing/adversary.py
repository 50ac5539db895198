"""Smoothed projected gradient ascent: an attack on the smoothed classifier itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, standard_normal
from art_rs_plugins.smoothing.sampling import check_count, default_block

__all__ = ["SmoothedPGD"]


@dataclass(frozen=True, slots=True)
class SmoothedPGD:
    """l2 projected gradient ascent on -log E p_y(x + delta + eps), the expectation taken over fresh draws each step.

    Parameters
    ----------
    steps : int
        Gradient steps; each moves 2.5 budget / steps.
    samples : int
        Noise draws of one step, for each input.
    block : int, optional
        Noisy inputs in one forward pass at most; `default_block` otherwise.

    Raises
    ------
    ValueError, TypeError
        For numbers that are not positive integers.

    Notes
    -----
    *Source.* Salman et al. (2019), "Provably robust deep learning via adversarially trained smoothed classifiers",
    equation 6 (SmoothAdv_PGD).
    """

    steps: int = 20
    samples: int = 16
    block: int | None = None

    def __post_init__(self) -> None:
        check_count(self.steps, "steps"), check_count(self.samples, "samples")
        if self.block is not None:
            check_count(self.block, "block")

    def perturb(
        self,
        f: nn.Module,
        x: Tensor,
        labels: Tensor,
        noise: Gaussian,
        budget: float,
        *,
        seed: int,
        clip_values: Sequence[Tensor] | None = None,
        probabilities: bool = False,
    ) -> Tensor:
        """Adversarial inputs within `budget` of x.

        Parameters
        ----------
        f : Module
            Base classifier, in the mode it is to be attacked in.
        x : Tensor, shape (b, ...), float32
            Inputs, on the device of f.
        labels : Tensor of int64, shape (b,)
            Classes to be driven away from.
        noise : Gaussian
            With one sigma.
        budget : float
            l2 norm of the perturbation at most, >= 0, in the units of the input.
        seed : int
            Seed of the draws.
        clip_values : pair of Tensor, optional
            Range of the input.
        probabilities : bool
            True if f ends in a softmax.

        Returns
        -------
        Tensor, shape of x
        """
        if not budget >= 0.0:
            raise ValueError(f"budget must be >= 0, in the units of the input, got {budget}")
        size = max(1, (self.block or default_block(x.shape[1:])) // self.samples)
        groups = zip(x.split(size), labels.split(size), strict=True)
        parts = []
        for number, (group, truth) in enumerate(groups):
            key = Key(seed, number, Stage.ATTACK, 0)
            parts.append(self._ascend(f, group, truth, noise, budget, key, clip_values, probabilities))
        return torch.cat(parts)

    def _ascend(
        self,
        f: nn.Module,
        x: Tensor,
        labels: Tensor,
        noise: Gaussian,
        budget: float,
        key: Key,
        clip_values: Sequence[Tensor] | None,
        probabilities: bool,
    ) -> Tensor:
        delta = torch.zeros_like(x)
        for step in range(self.steps):
            here = (x + delta).requires_grad_()
            draws = standard_normal((self.samples, *x.shape), Key(key.seed, key.index, key.stage, step), x.device)
            with torch.enable_grad():
                outputs = f(noise.perturb(here, draws).flatten(0, 1))
                log_p = outputs.clamp_min(1e-30).log() if probabilities else outputs.log_softmax(dim=1)
                truth = log_p.unflatten(0, (self.samples, len(x)))[:, torch.arange(len(x)), labels]
                (gradient,) = torch.autograd.grad(-truth.logsumexp(dim=0).sum(), here)
            direction = gradient / _norms(gradient).clamp_min(1e-30)
            delta = delta + 2.5 * budget / self.steps * direction.nan_to_num()
            delta = delta * (budget * (1.0 - 1e-6) / _norms(delta).clamp_min(1e-30)).clamp_max(1.0)
            if clip_values is not None:
                delta = (x + delta).clamp(clip_values[0], clip_values[1]) - x
        return (x + delta).detach()


def _norms(x: Tensor) -> Tensor:
    """l2 norm of each input, shaped to broadcast against x."""
    norms: Tensor = x.flatten(1).norm(dim=1)
    return norms.view(-1, *[1] * (x.ndim - 1))

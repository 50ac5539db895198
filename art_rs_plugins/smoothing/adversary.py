"""Smoothed projected gradient ascent: an attack on the smoothed classifier itself, to test it or to train it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, standard_normal
from art_rs_plugins.smoothing.sampling import check_count, default_block

__all__ = ["SmoothAdv", "SmoothedPGD"]


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
        parts = []
        for number, (group, truth) in enumerate(zip(x.split(size), labels.split(size), strict=True)):

            def log_p(here: Tensor, step: int, number: int = number) -> Tensor:
                key = Key(seed, number, Stage.ATTACK, step)
                draws = standard_normal((self.samples, *here.shape), key, here.device)
                noisy = noise.perturb(here, draws).flatten(0, 1)
                outputs: Tensor = f(noisy).unflatten(0, (self.samples, len(here))).float()
                return outputs.clamp_min(1e-30).log() if probabilities else outputs.log_softmax(dim=2)

            parts.append(_ascend(log_p, group, truth, budget, self.steps, 2.5, clip_values))
        return torch.cat(parts)

    def perturb_soft(
        self,
        soft: Callable[[int], nn.Module],
        x: Tensor,
        labels: Tensor,
        budget: float,
        *,
        clip_values: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Adversarial inputs against a classifier that is more than one noise and a network.

        Parameters
        ----------
        soft : callable
            From the number of a step to the soft classifier with draws of its own, (b, ...) to log probabilities
            (b, k).
        x, labels, budget, clip_values
            As in `perturb`.

        Returns
        -------
        Tensor, shape of x
        """
        if not budget >= 0.0:
            raise ValueError(f"budget must be >= 0, in the units of the input, got {budget}")
        views = [soft(step) for step in range(self.steps)]

        def log_p(here: Tensor, step: int) -> Tensor:
            scores: Tensor = views[step](here)
            return scores.float().log_softmax(dim=1)[None]

        size = max(1, (self.block or default_block(x.shape[1:])) // self.samples)
        groups = zip(x.split(size), labels.split(size), strict=True)
        return torch.cat([_ascend(log_p, each, truth, budget, self.steps, 2.5, clip_values) for each, truth in groups])


@dataclass(frozen=True, slots=True, eq=False)
class SmoothAdv:
    """Inputs to train on: l2 projected gradient ascent on -log mean_j softmax_y(x' + delta_j), over the loss's draws.

    The draws delta_j are those that the loss will see, fixed over all steps; the ascent starts from the input itself.

    Parameters
    ----------
    eps : float
        l2 norm of the perturbation at most, >= 0, in the units of the input; 0 trains on the inputs as they are.
    steps : int
        Gradient steps; each moves 2 eps / steps.
    warmup : int
        Epochs over which eps is reached, in equal steps, counted from the start of a call of `fit`; 0 for none.
    clip_values : pair of Tensor, optional
        Range of the input, which must lie in it: lowest and highest value, broadcast against it.

    Raises
    ------
    ValueError, TypeError
        For an eps or warmup below 0, fewer steps than 1, or a range that is empty.

    Notes
    -----
    Costs steps + 1 forward and backward passes where training alone takes 1.

    *Source.* Salman et al. (2019), section 2.2, with their released settings: the start, the step, the warm-up.
    """

    eps: float
    steps: int = 10
    warmup: int = 10
    clip_values: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.eps < math.inf:
            raise ValueError(f"eps must be finite and >= 0, in the units of the input, got {self.eps}")
        check_count(self.steps, "steps"), check_count(self.warmup, "warmup", least=0)
        if self.clip_values is not None and (
            len(self.clip_values) != 2 or not bool((self.clip_values[0] < self.clip_values[1]).all())
        ):
            raise ValueError(f"clip_values must be a lowest and a higher highest value, got {self.clip_values}")

    def budget(self, epoch: int) -> float:
        """Norm of the perturbation at most in one epoch, counted from 0: eps / warmup in the first one."""
        return self.eps * min(1.0, (epoch + 1) / max(1, self.warmup))

    def attack(self, logits: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """Inputs to train on instead of x.

        Parameters
        ----------
        logits : callable
            From inputs (b, ...) to the logits (m, b, k) of their noisy copies; the same noise in every call.
        x : Tensor, shape (b, ...), float32
            Inputs.
        labels : Tensor of int64, shape (b,)
            Classes to be driven away from.
        epoch : int
            Decides on how much of eps is spent.

        Returns
        -------
        Tensor, shape of x
            Detached, within `budget(epoch)` of x in l2 and within clip_values.
        """
        budget = self.budget(epoch)
        if budget == 0.0:
            return x

        def log_p(here: Tensor, _: int) -> Tensor:
            return logits(here).float().log_softmax(dim=2)

        return _ascend(log_p, x, labels, budget, self.steps, 2.0, self.clip_values)


def _ascend(
    log_p: Callable[[Tensor, int], Tensor],
    x: Tensor,
    labels: Tensor,
    budget: float,
    steps: int,
    reach: float,
    clip_values: Sequence[Tensor] | None,
) -> Tensor:
    """Ascend on -log mean_j p_y from x, `reach` times the budget in all; log_p (m, b, k) from inputs and a step."""
    rows = torch.arange(len(x), device=x.device)
    delta = torch.zeros_like(x)
    for step in range(steps):
        here = (x + delta).requires_grad_()
        with torch.enable_grad():
            truth = log_p(here, step)[:, rows, labels]
            (gradient,) = torch.autograd.grad(-truth.logsumexp(dim=0).sum(), here)
        direction = gradient / _norms(gradient).clamp_min(1e-30)
        delta = delta + reach * budget / steps * direction.nan_to_num()
        delta = delta * (budget * (1.0 - 1e-6) / _norms(delta).clamp_min(1e-30)).clamp_max(1.0)
        if clip_values is not None:
            delta = (x + delta).clamp(clip_values[0], clip_values[1]) - x
    return (x + delta).detach()


def _norms(x: Tensor) -> Tensor:
    """l2 norm of each input, shaped to broadcast against x."""
    norms: Tensor = x.flatten(1).norm(dim=1)
    return norms.view(-1, *[1] * (x.ndim - 1))

"""One training loop: batches, noise, loss, optimiser."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, check_seed, standard_normal
from art_rs_plugins.smoothing.sampling import check_count, evaluating

__all__ = ["Epoch", "cross_entropy", "fit", "shuffled"]

logger = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Noisy logits (m, b, k) and labels (b,) or (b, k) to a scalar."""


class Scheduler(Protocol):
    """A learning-rate schedule of PyTorch, stepped after each epoch."""

    def step(self) -> None:
        """Advance by one epoch."""
        ...


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to: mean loss, accuracy under noise, and number of inputs."""

    epoch: int
    loss: float
    noisy_accuracy: float
    inputs: int


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of noisy logits (m, b, k) for labels, indices (b,) or probabilities (b, k)."""
    repeated = labels.expand(len(logits), *labels.shape).flatten(0, 1)
    return nn.functional.cross_entropy(logits.flatten(0, 1), repeated)


def shuffled(
    x: NDArray[np.float32], y: NDArray[np.generic], *, batch_size: int, seed: int, drop_last: bool = False
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """Batches of arrays in an order that depends on the seed and the epoch alone.

    Parameters
    ----------
    x, y : ndarray, shape (b, ...)
        Inputs and labels.
    batch_size : int
        Inputs in a batch.
    seed : int
        Seed of the order.
    drop_last : bool
        Leave out the last batch if it is short.

    Returns
    -------
    callable
        From the number of an epoch to its batches.
    """
    size = check_count(batch_size, "batch_size")

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng([seed, epoch]).permutation(len(x))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            if drop_last and len(rows) < size:
                return
            yield torch.from_numpy(x[rows]), torch.from_numpy(y[rows])

    return batches


def fit(
    f: nn.Module,
    batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    *,
    noise: Gaussian,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    loss: Loss = cross_entropy,
    draws: int = 1,
    scheduler: Scheduler | None = None,
    train_mode: bool = True,
    seed: int | None = None,
    callback: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train a base classifier under noise.

    Parameters
    ----------
    f : Module
        Base classifier, (m, ...) to logits (m, k); trained in place and left in the mode it came in.
    batches : callable
        From the number of an epoch to its batches: inputs (b, ...) and labels (b,) or (b, k). `shuffled` makes one.
    noise : Gaussian
        Added to the raw inputs, fresh for every batch: the same noise that certification adds.
    optimizer : torch.optim.Optimizer
        Over the parameters of f.
    epochs : int
        Passes over the data.
    loss : callable
        Noisy logits (draws, b, k) and labels to a scalar.
    draws : int
        Noisy copies of each input.
    scheduler : optional
        Stepped after each epoch.
    train_mode : bool
        False keeps f in eval mode (frozen batch statistics) while its parameters are trained.
    seed : int, optional
        Seed of the noise; None draws fresh entropy.
    callback : callable, optional
        Called with each finished `Epoch`.

    Returns
    -------
    list of Epoch

    Raises
    ------
    ValueError
        For epochs or draws below 1, no batches, or a loss that is not finite (training stops before it spoils f).
    """
    check_count(epochs, "epochs"), check_count(draws, "draws")
    if np.ndim(noise.sigma):
        raise ValueError("noise must have one sigma for all inputs: batches come in an order of their own")
    seed = check_seed(seed)
    device = next((p.device for p in f.parameters()), torch.device("cpu"))
    history: list[Epoch] = []
    step = 0
    with evaluating(f):   # every part gets its own mode back
        f.train(train_mode)
        for epoch in range(epochs):
            loss_sum = correct = torch.zeros((), device=device)
            inputs = 0
            for x, y in batches(epoch):
                clean, labels = x.to(device, torch.float32), y.to(device)
                normal = standard_normal((draws, *clean.shape), Key(seed, epoch, Stage.TRAINING, step), device)
                logits = f(noise.perturb(clean, normal).flatten(0, 1)).unflatten(0, (draws, len(clean)))
                value = loss(logits, labels)
                if not torch.isfinite(value):
                    raise ValueError(
                        f"loss became {value.item()} in epoch {epoch}; lower the learning rate, or check the inputs"
                    )
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                step, inputs = step + 1, inputs + len(clean)
                loss_sum = loss_sum + value.detach() * len(clean)
                truth = labels.argmax(dim=1) if labels.ndim == 2 else labels
                correct = correct + (logits.detach().argmax(dim=2) == truth).float().mean(dim=0).sum()
            if not inputs:
                raise ValueError("batches yielded nothing to train on; give at least one batch for each epoch")
            history.append(Epoch(epoch, float(loss_sum) / inputs, float(correct) / inputs, inputs))
            logger.info("epoch %d: loss %.4f, accuracy under noise %.4f", *_line(history[-1]))
            if scheduler is not None:
                scheduler.step()
            if callback is not None:
                callback(history[-1])
    return history


def _line(epoch: Epoch) -> tuple[int, float, float]:
    return epoch.epoch, epoch.loss, epoch.noisy_accuracy

"""One training loop: batches, noise, adversary, loss, optimiser."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from art_rs_plugins.smoothing.losses import cross_entropy
from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, check_seed, standard_normal
from art_rs_plugins.smoothing.sampling import check_count, evaluating

__all__ = ["Adversary", "Batch", "Epoch", "Loss", "NoiseSchedule", "Scheduler", "fit", "shuffled"]

logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs (b, ...), labels (b,) or (b, k), and the index of each input in its data set, int64 (b,)."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Noisy logits (m, b, k) and labels (b,) or (b, k) to a scalar; see `losses`."""


@runtime_checkable
class NoiseSchedule(Protocol):
    """Noise that is chosen anew for each batch, such as a sigma for each example."""

    def for_batch(self, f: nn.Module, x: Tensor, y: Tensor, *, index: Tensor, epoch: int, key: Key) -> Gaussian:
        """Noise of one batch: one sigma, or one for each of its inputs.

        Parameters
        ----------
        f : Module
            Base classifier, in eval mode during this call.
        x : Tensor, shape (b, ...), float32
            Clean inputs, on the device of f.
        y : Tensor of int64, shape (b,)
            Their classes, on the device of f.
        index : Tensor of int64, shape (b,)
            Place of each input in its data set, on the CPU.
        epoch : int
            Counted from 0.
        key : Key
            Of draws that nothing else in this call of `fit` uses, should the schedule need some.
        """
        ...


class Adversary(Protocol):
    """Moves inputs to where the smoothed classifier is weak, before the loss is taken there; see `SmoothAdv`."""

    def attack(self, logits: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, *, epoch: int) -> Tensor:
        """Inputs (b, ...) to train on instead of x, detached.

        `logits` maps inputs (b, ...) to the logits (m, b, k) of their noisy copies, f in eval mode, with the very noise
        that the loss will meet; `labels` are class indices (b,).
        """
        ...


class Scheduler(Protocol):
    """A learning-rate schedule of PyTorch, stepped after each epoch."""

    def step(self) -> None:
        """Advance by one epoch."""
        ...


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one epoch came to: mean loss, accuracy under noise (and attack, if there was one), and number of inputs."""

    epoch: int
    loss: float
    noisy_accuracy: float
    inputs: int


def shuffled(
    x: NDArray[np.float32], y: NDArray[np.generic], *, batch_size: int, seed: int, drop_last: bool = False
) -> Callable[[int], Iterator[Batch]]:
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
        From the number of an epoch to its batches of inputs, labels and index, the position in x.
    """
    size = check_count(batch_size, "batch_size")

    def batches(epoch: int) -> Iterator[Batch]:
        order = np.random.default_rng([seed, epoch]).permutation(len(x))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            if drop_last and len(rows) < size:
                return
            yield torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), torch.from_numpy(rows).long()

    return batches


def fit(
    f: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    *,
    noise: Gaussian | NoiseSchedule,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    loss: Loss = cross_entropy,
    draws: int = 1,
    copies_per_pass: int | None = None,
    adversary: Adversary | None = None,
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
        From the number of an epoch to its batches: inputs (b, ...), labels (b,) or (b, k), and index (b,). `shuffled`
        makes one.
    noise : Gaussian or NoiseSchedule
        Added to the raw inputs, fresh for every batch: the same noise that certification adds.
    optimizer : torch.optim.Optimizer
        Over the parameters of f.
    epochs : int
        Passes over the data.
    loss : callable
        Noisy logits (draws, b, k) and labels to a scalar; see `losses`.
    draws : int
        Noisy copies of each input.
    copies_per_pass : int, optional
        Copies of each input that f holds activations for at a time; all of them by default. Gradients are those of the
        whole, for any loss, at the price of a second forward pass: the first one leaves nothing behind but logits, and
        each group is computed again, with the same noise, when its turn to be differentiated comes. Batch normalisation
        in training mode takes its statistics from one group, and moves its running statistics in both passes.
    adversary : Adversary, optional
        Moves each batch; the whole loss is then taken at the moved inputs, under the noise that the adversary saw.
        (Whether the authors of ADRE take their regulariser there or at the clean inputs is not established.)
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
    ValueError, TypeError
        For epochs, draws or copies_per_pass below 1, noise or batches of another form, no batches, or a loss or
        gradients that are not finite (training stops before they spoil the parameters of f).
    """
    check_count(epochs, "epochs"), check_count(draws, "draws")
    size = draws if copies_per_pass is None else check_count(copies_per_pass, "copies_per_pass")
    _check_noise(noise)
    if hasattr(loss, "check_draws"):
        loss.check_draws(draws)
    seed = check_seed(seed)
    device = next((p.device for p in f.parameters()), torch.device("cpu"))
    history: list[Epoch] = []
    step = 0
    with evaluating(f):   # every part gets its own mode back
        f.train(train_mode)
        for epoch in range(epochs):
            loss_sum = correct = torch.zeros((), device=device)
            inputs = 0
            for batch in batches(epoch):
                x, labels, index = _checked(batch, device)
                truth = labels.argmax(dim=1) if labels.ndim == 2 else labels
                key = Key(seed, epoch, Stage.TRAINING, step)
                family = _noise_of(noise, f, x, truth, index, key)
                added = family.perturb(torch.zeros_like(x), standard_normal((draws, *x.shape), key, device))
                copies = _Copies(f, added, size)
                if adversary is not None:
                    with evaluating(f):
                        x = adversary.attack(copies, x, truth, epoch=epoch)
                logits = copies(x)
                value = loss(logits, labels)
                _descend(optimizer, value, epoch)
                step, inputs = step + 1, inputs + len(x)
                loss_sum = loss_sum + value.detach() * len(x)
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


@dataclass(frozen=True, slots=True, eq=False)
class _Copies:
    """From inputs (b, ...) to the logits (m, b, k) of their noisy copies, `size` copies of each in one pass of f."""

    f: nn.Module
    added: Tensor
    size: int

    def __call__(self, x: Tensor) -> Tensor:
        if self.size >= len(self.added):
            return self._logits(x, self.added)
        # a checkpoint keeps no activations: they are computed again, group by group, in the backward pass
        parts = [checkpoint(self._logits, x, part, use_reentrant=False) for part in self.added.split(self.size)]
        return torch.cat(parts)

    def _logits(self, x: Tensor, added: Tensor) -> Tensor:
        logits: Tensor = self.f((x + added).flatten(0, 1)).unflatten(0, (len(added), len(x)))
        return logits


def _check_noise(noise: Gaussian | NoiseSchedule) -> None:
    if not isinstance(noise, Gaussian | NoiseSchedule):
        raise TypeError(f"noise must be a Gaussian or have a method for_batch, got {type(noise).__name__}")
    if isinstance(noise, Gaussian) and np.ndim(noise.sigma):
        raise ValueError(
            "noise must have one sigma for all inputs, since batches come in an order of their own; "
            "give a NoiseSchedule that looks sigmas up by index"
        )


def _checked(batch: Any, device: torch.device) -> Batch:
    """Inputs in float32 and labels on the device, index on the CPU; or raise for a batch that is no such triple."""
    if len(batch) != 3:
        raise ValueError(f"batches must yield (inputs, labels, index), as `shuffled` does, got {len(batch)} entries")
    x, labels, index = batch
    if index.dtype != torch.int64 or index.shape != (len(x),) or len(labels) != len(x):
        raise ValueError(
            f"batches must yield b inputs, b labels and an index of int64, shape (b,), got {len(x)} inputs, "
            f"{len(labels)} labels and an index of {index.dtype}, shape {tuple(index.shape)}"
        )
    return x.to(device, torch.float32), labels.to(device), index.cpu()


def _noise_of(
    noise: Gaussian | NoiseSchedule, f: nn.Module, x: Tensor, truth: Tensor, index: Tensor, key: Key
) -> Gaussian:
    if isinstance(noise, Gaussian):
        return noise
    with evaluating(f):
        return noise.for_batch(f, x, truth, index=index, epoch=key.index, key=replace(key, stage=Stage.SEARCH))


def _descend(optimizer: torch.optim.Optimizer, value: Tensor, epoch: int) -> None:
    """One step down the loss; ``ValueError`` instead, with nothing changed, if it or a gradient is not finite."""
    optimizer.zero_grad()
    value.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    finite = [torch.isfinite(part).all() for part in (value, *gradients)]
    if not bool(torch.stack(finite).all()):   # asked once: each question waits for the device
        optimizer.zero_grad()
        what = "gradients became infinite or NaN" if bool(finite[0]) else f"loss became {value.item()}"
        raise ValueError(f"{what} in epoch {epoch}; lower the learning rate, or check the inputs")
    optimizer.step()


def _line(epoch: Epoch) -> tuple[int, float, float]:
    return epoch.epoch, epoch.loss, epoch.noisy_accuracy

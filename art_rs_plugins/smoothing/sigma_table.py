"""A sigma for each training example, refreshed while the network learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, standard_normals
from art_rs_plugins.smoothing.sampling import check_count, default_block, evaluating
from art_rs_plugins.theory.radii import check_sigma

__all__ = ["SigmaTable", "SigmaUpdate", "ThreePoint"]

Floats = NDArray[np.float64]


class SigmaUpdate(Protocol):
    """Proposes a sigma for each example of a batch; `ThreePoint` and `smoothing.sigma.GradientAscent` are two."""

    def propose(
        self, f: nn.Module, x: Tensor, y: Tensor, sigma: Floats, *, seed: int, index: list[int], epoch: int
    ) -> Floats:
        """Propose a sigma for each of b training examples.

        Parameters
        ----------
        f : Module
            Base classifier in eval mode; (m, ...) to logits (m, k).
        x : Tensor, shape (b, ...)
            Examples, on the device of f.
        y : Tensor of int64, shape (b,)
            Their classes.
        sigma : ndarray of float64, shape (b,)
            Where they stand.
        seed, index, epoch : int, list of int, int
            Name the draws, which are of ``Stage.SEARCH``: an example's do not depend on its batch.
        """
        ...


@dataclass(frozen=True, slots=True)
class ThreePoint:
    """The best of a smaller, the present and a larger sigma, by the soft radius of the true class with common draws.

    A misclassified example has a negative radius, which is the less negative the smaller sigma is; so it moves there.

    Parameters
    ----------
    draws : int
        Draws of each example, shared by the three sigmas.
    ratio : float
        Of neighbouring sigmas, > 1.
    clamp : float
        Mean probabilities are clamped to [clamp, 1 - clamp].

    Raises
    ------
    ValueError, TypeError
        For numbers that do not fit.
    """

    draws: int = 8
    ratio: float = 1.25
    clamp: float = 0.02

    def __post_init__(self) -> None:
        check_count(self.draws, "draws")
        if not 1.0 < self.ratio < math.inf:
            raise ValueError(f"ratio must be finite and > 1, got {self.ratio}")
        if not 0.0 < self.clamp < 0.5:
            raise ValueError(f"clamp must lie strictly between 0 and 1/2, got {self.clamp}")

    def propose(
        self, f: nn.Module, x: Tensor, y: Tensor, sigma: Floats, *, seed: int, index: list[int], epoch: int
    ) -> Floats:
        """Return the best of ``sigma / ratio``, ``sigma`` and ``sigma * ratio``; of equals the smallest."""
        keys = [Key(seed, i, Stage.SEARCH, epoch) for i in index]
        normal = standard_normals((self.draws, *x.shape[1:]), keys, x.device)
        candidates = sigma * np.array([[1.0 / self.ratio], [1.0], [self.ratio]])
        with torch.no_grad():
            scores = np.stack([self._score(f, x, y, each, normal) for each in candidates])
        best = np.nan_to_num(scores, nan=-np.inf).argmax(axis=0)
        return np.asarray(candidates[best, np.arange(len(sigma))])

    def _score(self, f: nn.Module, x: Tensor, y: Tensor, sigma: Floats, normal: Tensor) -> Floats:
        """Soft radius (b,) of the true class: sigma / 2 (Phi^-1(p_y) - Phi^-1(largest other p))."""
        scale = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).view(-1, *[1] * x.ndim)
        size = max(1, default_block(x.shape[1:], x.device) // len(x))
        total = torch.zeros((), device=x.device)
        for part in normal.split(size, dim=1):
            outputs = f((x[:, None] + scale * part).flatten(0, 1)).float().softmax(dim=1)
            total = total + outputs.unflatten(0, part.shape[:2]).sum(dim=1)
        mean = total / self.draws
        truth = mean.gather(1, y[:, None])
        rival = mean.scatter(1, y[:, None], -1.0).amax(dim=1, keepdim=True)
        quantiles = torch.special.ndtri(torch.cat([truth, rival], dim=1).clamp(self.clamp, 1.0 - self.clamp))
        gap = (quantiles[:, 0] - quantiles[:, 1]).cpu().double().numpy()
        return np.asarray(0.5 * sigma * gap, dtype=np.float64)


class SigmaTable:
    """Sigmas of N training examples, by their index in the data set: a `smoothing.training.NoiseSchedule`.

    All start at one sigma and stay there until epoch `start`. From then on, every `every`-th epoch moves each example
    toward what `update` proposes, by a moving average in log sigma, within the bounds. Labels serve here, in training,
    and nowhere else. A sigma is a number to the loss: no gradient flows into it.

    Parameters
    ----------
    size : int
        Number of examples N.
    sigma : float
        Where all examples start: the noise level of plain training.
    update : SigmaUpdate
        What proposes.
    start : int
        First epoch that moves sigmas, counted from 0.
    every : int
        Epochs from one refresh to the next.
    rate : float
        Weight of a proposal in the moving average, in (0, 1].
    bounds : pair of float, optional
        Range of sigma; from half to twice `sigma` by default.

    Raises
    ------
    ValueError, TypeError
        For numbers that do not fit.

    Notes
    -----
    *Source.* A reconstruction of Chen et al. (2021), "Insta-RS", training in two stages; with ``GradientAscent`` as
    update, Alfarra et al. (2022), "Data dependent randomized smoothing". Neither published the clipping or the average.
    """

    def __init__(
        self,
        size: int,
        sigma: float,
        *,
        update: SigmaUpdate | None = None,
        start: int = 0,
        every: int = 1,
        rate: float = 0.1,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        level = float(check_sigma(sigma))
        low, high = bounds or (0.5 * level, 2.0 * level)
        if not check_sigma(low, "bounds") <= level <= check_sigma(high, "bounds"):
            raise ValueError(f"bounds ({low}, {high}) must contain sigma = {level}")
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"rate must lie in (0, 1], got {rate}")
        self.log_sigma = np.full(check_count(size, "size"), math.log(level))
        self.low, self.high, self.rate = low, high, rate
        self.update = ThreePoint() if update is None else update
        self.start, self.every = check_count(start, "start", least=0), check_count(every, "every")

    @property
    def sigma(self) -> Floats:
        """Sigma of every example, shape (N,)."""
        return np.asarray(np.exp(self.log_sigma).clip(self.low, self.high), dtype=np.float64)

    def for_batch(self, f: nn.Module, x: Tensor, y: Tensor, *, index: Tensor, epoch: int, key: Key) -> Gaussian:
        """Noise of one batch, its sigmas refreshed first if the epoch is one for that.

        Parameters
        ----------
        f : Module
            Base classifier; asked in eval mode, so that an example's sigma does not depend on its batch, and handed
            back in the modes that it came in.
        x : Tensor, shape (b, ...)
            Examples, augmented or not, on the device of f.
        y : Tensor of int64, shape (b,)
            Their classes.
        index : Tensor of int64, shape (b,)
            Where each stands in the data set.
        epoch : int
            Counted from 0.
        key : Key
            Its seed is that of the draws.

        Returns
        -------
        Gaussian
            With one sigma for each of the b inputs.

        Raises
        ------
        ValueError
            For an index outside the table.
        """
        rows = index.cpu().numpy()
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self.log_sigma):
            raise ValueError(f"index must lie in [0, {len(self.log_sigma)}), the size of the table, got {rows}")
        if epoch >= self.start and (epoch - self.start) % self.every == 0:
            sigma = self.sigma[rows]
            with evaluating(f):
                proposed = self.update.propose(f, x, y, sigma, seed=key.seed, index=rows.tolist(), epoch=epoch)
            moved = np.log(sigma) + self.rate * (np.log(proposed) - np.log(sigma))
            self.log_sigma[rows] = moved.clip(math.log(self.low), math.log(self.high))
        return Gaussian(self.sigma[rows])

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep: ``log_sigma``, float64, shape (N,)."""
        return {"log_sigma": torch.from_numpy(self.log_sigma.copy())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint; ``ValueError`` if it is of another size or holds what is no sigma."""
        values = state["log_sigma"].cpu().double().numpy().copy()
        if values.shape != self.log_sigma.shape:
            raise ValueError(f"log_sigma has shape {values.shape}, but the table holds {len(self.log_sigma)} examples")
        check_sigma(np.exp(values), "exp(log_sigma)")
        self.log_sigma = values

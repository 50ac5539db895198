"""Small modules: normalisation as the first layer, and the smoothed classifier as a network."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, check_seed, standard_normal
from art_rs_plugins.smoothing.sampling import check_count, default_block

__all__ = ["BaseClassifier", "Normalize", "SmoothedModule", "looks_like_probabilities"]


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, as the first layer of a network.

    The input stays in its raw units, where noise is added and radii hold.

    Parameters
    ----------
    mean, std : float or array_like of float
        For the whole input, or one for each entry of dimension 1 (channels, or features of a table), or an array that
        broadcasts against one input.

    Raises
    ------
    ValueError
        If shapes differ or a std is not finite and positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: ArrayLike, std: ArrayLike) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(np.asarray(value, dtype=np.float32)), persistent=False)
        if self.mean.shape != self.std.shape:
            raise ValueError(
                f"mean and std must have the same shape, got {tuple(self.mean.shape)} and {tuple(self.std.shape)}"
            )
        if not bool((torch.isfinite(self.std) & (self.std > 0)).all()):
            raise ValueError(f"std must be finite and > 0, got {std!r}")
        if not bool(torch.isfinite(self.mean).all()):
            raise ValueError(f"mean must be finite, got {mean!r}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise inputs of shape (m, c, ...)."""
        if self.mean.ndim == 1 and self.mean.numel() not in (1, x.shape[1]):
            raise ValueError(f"mean has {self.mean.numel()} entries, but x has {x.shape[1]} channels")
        shape = (1, -1, *[1] * (x.ndim - 2)) if self.mean.ndim < 2 else self.mean.shape
        return (x - self.mean.view(shape)) / self.std.view(shape)


class BaseClassifier(nn.Module):
    """The base classifier f of raw inputs: transforms, then a network; the network's dtype is met by a cast.

    Parameters
    ----------
    network : Module
        Maps (m, ...) to (m, k) logits, or probabilities.
    transform : Module, optional
        Applied to the noisy input before the network.
    """

    def __init__(self, network: nn.Module, transform: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.transform = transform

    def forward(self, noisy: Tensor) -> Tensor:
        """Outputs (m, k) of the network for raw, noisy inputs (m, ...)."""
        if self.transform is not None:
            noisy = self.transform(noisy)
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), noisy.dtype)
        outputs: Tensor = self.network(noisy.to(dtype))
        return outputs


class SmoothedModule(nn.Module):
    """The smoothed classifier as a network: whatever trains or attacks this module meets the noise.

    In ``train()`` it returns the base classifier's outputs at one fresh noise draw for each input. In ``eval()`` it
    returns the log of the mean class probability over a fixed bank of draws that all inputs share: deterministic,
    differentiable, and not to be mistaken for probabilities.

    Parameters
    ----------
    base : Module
        Network of raw inputs, (m, ...) to (m, k).
    sigma : float
        Noise level in the units of the raw input.
    transform : Module, optional
        What comes between the noise and the network, such as `Normalize`.
    samples : int
        Draws in the bank.
    seed : int
        Seed of the bank and of the training noise.
    probabilities : bool
        True if the network ends in a softmax, which is then not applied twice.
    block : int, optional
        Rows of one forward pass at most, so that memory does not grow with `samples`; `default_block` otherwise.

    Notes
    -----
    Certificates never come from the bank: they take fresh draws through `count_votes`.

    *Source.* Salman et al. (2019), equation 5 (the soft smoothed classifier), with common draws.
    """

    def __init__(
        self,
        base: nn.Module,
        sigma: float,
        *,
        transform: nn.Module | None = None,
        samples: int = 32,
        seed: int = 0,
        probabilities: bool = False,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.f = BaseClassifier(base, transform)
        self.sigma = float(Gaussian(sigma).sigma)
        self.samples = check_count(samples, "samples")
        self.seed = check_seed(seed)
        self.probabilities = probabilities
        self.block = None if block is None else check_count(block, "block")
        self.steps = 0

    @property
    def base(self) -> nn.Module:
        """The network inside, as it was given."""
        return self.f.network

    def next_key(self) -> Key:
        """Key of fresh training draws; no two calls return the same."""
        self.steps += 1
        return Key(self.seed, 0, Stage.TRAINING, self.steps)

    def forward(self, x: Tensor) -> Tensor:
        """Training: outputs (b, k) at one noisy copy of each input. Evaluation: log mean probabilities (b, k)."""
        x = x.to(torch.float32)
        noise = Gaussian(self.sigma)
        if self.training:
            noisy: Tensor = self.f(noise.perturb(x, standard_normal(tuple(x.shape), self.next_key(), x.device)))
            return noisy
        limit = self.block or default_block(x.shape[1:])
        draws = max(1, min(self.samples, limit // max(1, len(x))))
        total = torch.zeros((), device=x.device)
        # A graph of all draws at once would not fit in memory; each part is computed again in the backward pass.
        again = torch.is_grad_enabled() and draws < self.samples
        for bank in self._bank(x).split(draws):
            part = checkpoint(self._sum_part, x, bank, use_reentrant=False) if again else self._sum_part(x, bank)
            total = total + part
        return (total / self.samples).clamp_min(torch.finfo(total.dtype).tiny).log()

    def _bank(self, x: Tensor) -> Tensor:
        normal = standard_normal((self.samples, *x.shape[1:]), Key(self.seed, 0, Stage.BANK, 1), x.device)
        return normal.mul_(self.sigma)

    def _sum_part(self, x: Tensor, bank: Tensor) -> Tensor:
        """Sum over some draws (m, ...) of the class probabilities of b inputs. Shape (b, k)."""
        outputs: Tensor = self.f((x[None] + bank[:, None]).flatten(0, 1))
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        scores = outputs if self.probabilities else outputs.softmax(dim=1)
        part: Tensor = scores.unflatten(0, (len(bank), len(x))).sum(dim=0)
        return part

    def extra_repr(self) -> str:
        """Show the noise beside the network."""
        return f"sigma={self.sigma}, samples={self.samples}, seed={self.seed}"


def looks_like_probabilities(outputs: Tensor) -> bool:
    """Whether (m, k) outputs are probability vectors, as of a network that ends in a softmax; NaN rows do not count."""
    finite = outputs[torch.isfinite(outputs).all(dim=1)].float()
    sums = finite.sum(dim=1)
    return bool(len(finite) and (finite >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-2))

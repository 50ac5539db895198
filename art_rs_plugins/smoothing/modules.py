"""Small modules: normalisation as the first layer, patches that vote as one, the smoothed classifier as a network."""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from art_rs_plugins.smoothing.noise import Gaussian, Key, Noise, Stage, check_seed, is_channels_last, standard_normal
from art_rs_plugins.smoothing.sampling import check_count, default_block, strict_votes
from art_rs_plugins.smoothing.video import Lifted, Mean, Reduction, apply_before
from art_rs_plugins.theory.patches import PatchGeometry, Placement, Resize

__all__ = ["BaseClassifier", "Normalize", "PatchReduce", "SmoothedModule", "looks_like_probabilities"]


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

    def lift(self, x: Tensor) -> Tensor:
        """What the noise is added to: x itself, unless the network is a `PatchReduce` that says otherwise."""
        return self.network.lift(x) if isinstance(self.network, PatchReduce) else x


class PatchReduce(nn.Module):
    """Base classifier that cuts its input into patches, asks a network about each, and reduces the answers to one.

    A deterministic function of what the noise was added to: of the noisy input, for the default placement.

    Parameters
    ----------
    network : Module
        Maps patches (rows, channels, *patch) to outputs (rows, k).
    geometry : PatchGeometry
        Which patches, along the first axes behind the channels; further ones are left whole.
    reduction : Reduction
        ``Mean()`` of probabilities by default; ``Max()``, ``Vote()``, and ``SubVideos(...)`` for chunks of a clip.
    placement : Placement
        Where the noise is added.
    transform : Module, optional
        Applied to the patches before the network, such as `Normalize`.
    consensus : int, optional
        If the first `consensus` patches agree on a class, they decide alone. Another classifier than without.
    early_exit : bool
        Without gradients, leave a row out as soon as the patches that are left cannot change its winner; its scores are
        then those of the patches seen. The winner is that of all patches while outputs are finite. The host waits for
        each pass.
    block : int, optional
        Patches in one pass of the network at most, but not fewer than rows, so that memory does not grow with m;
        `default_block` otherwise.

    Raises
    ------
    ValueError, TypeError
        For a placement without a certificate, a consensus beyond the patches, early_exit where nothing is certain
        before the last patch, or a block that is not a positive integer.

    Notes
    -----
    *Guarantee.* Certificates at ``lift(x)`` under ``lifted(noise)`` hold for x: nothing about f is used, so any patches
    and any reduction qualify (Cohen et al., theorem 1), and the norm of what comes before the noise is divided out.

    *Source.* Joshi et al. (2022), "Smooth-Reduce: Leveraging patches for improved certified robustness", whose noise is
    that of ``PER_PATCH`` while its radii are not divided by the norm; consensus of Horvath et al. (2022), "Boosting
    randomized smoothing with variance reduced classifiers".

    Examples
    --------
    >>> geometry = PatchGeometry.corners((8, 8), 6)
    >>> f = PatchReduce(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), geometry)
    >>> f(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        network: nn.Module,
        geometry: PatchGeometry,
        *,
        reduction: Reduction | None = None,
        placement: Placement = Placement.SHARED_INPUT,
        transform: nn.Module | None = None,
        consensus: int | None = None,
        early_exit: bool = False,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.f = BaseClassifier(network, transform)
        self.geometry, self.placement = geometry, placement
        self.reduction: Reduction = Mean() if reduction is None else reduction
        self.lift_norm = geometry.norm(placement)
        m = len(geometry.offsets)
        self.consensus = m if consensus is None else check_count(consensus, "consensus")
        if self.consensus > m:
            raise ValueError(f"consensus must be at most the number of patches, {m}, got {consensus}")
        self.early_exit = early_exit
        if early_exit and self.consensus == m and self.reduction.decided(torch.eye(2)[None], 0) is None:
            raise ValueError(f"early_exit needs Mean(), Vote() or a consensus; {self.reduction} stays open to the end")
        self.block = None if block is None else check_count(block, "block")
        for axis, matrix in enumerate(geometry.matrices() if isinstance(geometry.before, Resize) else ()):
            self.register_buffer(f"weights{axis}", torch.from_numpy(matrix).float(), persistent=False)

    def lift(self, x: Tensor) -> Tensor:
        """What the noise is added to, from inputs (b, channels, *size, ...).

        Returns
        -------
        Tensor
            x; what it is resized or padded to, (b, channels, *canvas, ...); or the stack of its patches,
            (b, m, channels, *patch, ...).
        """
        self._check(x, 2, self.geometry.size)
        if self.placement == Placement.SHARED_INPUT:
            return x
        weights = [torch.from_numpy(matrix).to(x.device) for matrix in self.geometry.matrices()]
        canvas = apply_before(self.geometry, x.double(), weights).to(x.dtype)
        if self.placement == Placement.SHARED_RESIZED:
            return canvas
        return torch.stack([canvas[self._window(patch)] for patch in range(len(self.geometry.offsets))], dim=1)

    def lifted(self, noise: Noise) -> Noise:
        """Noise to certify with at ``lift(x)``: its radii hold for x."""
        return noise if self.placement == Placement.SHARED_INPUT else Lifted(noise, self.lift_norm)

    def forward(self, z: Tensor) -> Tensor:
        """Scores (rows, k), to be read as logits, of what was lifted and made noisy, (rows, ...)."""
        if self.placement == Placement.PER_PATCH:
            self._check(z, 1, (len(self.geometry.offsets),))
            self._check(z, 3, self.geometry.patch)
        elif self.placement == Placement.SHARED_RESIZED:
            self._check(z, 2, self.geometry.canvas)
        else:
            self._check(z, 2, self.geometry.size)
            z = apply_before(self.geometry, z, list(self.buffers(recurse=False)))
        early = self.early_exit and len(z) and not torch.is_grad_enabled()
        return self._until_decided(z) if early else self._all(z)

    def folded(self) -> PatchReduce:
        """Return a copy for evaluation whose network is folded, if it knows how."""
        twin = copy.deepcopy(self).eval()
        folded = getattr(twin.f.network, "folded", None)
        twin.f.network = folded() if callable(folded) else twin.f.network
        return twin

    def _check(self, x: Tensor, axis: int, sizes: tuple[int, ...]) -> None:
        if x.shape[axis : axis + len(sizes)] != sizes:
            raise ValueError(f"x of shape {tuple(x.shape)} does not fit {self.geometry} under {self.placement.name}")

    def _window(self, patch: int) -> tuple[slice | int, ...]:
        """Where a patch lies in what the network's passes are cut from."""
        offset = self.geometry.offsets[patch]
        box = (slice(start, start + size) for start, size in zip(offset, self.geometry.patch, strict=True))
        return slice(None), slice(None), *box

    def _step(self, z: Tensor) -> int:
        """Patches of one pass: as many as fit, a divisor of all of them, so that passes have one shape."""
        channels = 2 if self.placement == Placement.PER_PATCH else 1
        rest = z.shape[channels + 1 + len(self.geometry.patch) :]   # axes that are not cut
        limit = self.block or default_block((z.shape[channels], *self.geometry.patch, *rest), z.device)
        total = math.gcd(len(self.geometry.offsets), self.consensus)
        return max(d for d in range(1, total + 1) if total % d == 0 and (d == 1 or d * len(z) <= limit))

    def _outputs(self, z: Tensor, start: int, stop: int, rows: int) -> Tensor:
        """Outputs (stop - start, len(z), k) of some patches, in a pass that is padded to this many rows."""
        if self.placement == Placement.PER_PATCH:
            patches = z[:, start:stop].transpose(0, 1).flatten(0, 1)
        else:
            patches = torch.cat([z[self._window(patch)] for patch in range(start, stop)])
        if len(patches) < rows:
            patches = torch.cat([patches, patches[:1].expand(rows - len(patches), *patches.shape[1:])])
        if is_channels_last(z):
            patches = patches.contiguous(memory_format=torch.channels_last)
        outputs: Tensor = self.f(patches)
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        taken: Tensor = outputs[: (stop - start) * len(z)].unflatten(0, (stop - start, len(z)))
        return taken

    def _agreed(self, outputs: Tensor) -> Tensor:
        """Mask (rows,) of those whose patches all vote for one class."""
        winner, valid = strict_votes(outputs.flatten(0, 1))
        winner, valid = winner.view(outputs.shape[:2]), valid.view(outputs.shape[:2])
        return ((winner == winner[0]) & valid).all(dim=0)

    def _all(self, z: Tensor) -> Tensor:
        """Scores from all patches; the host never waits."""
        m, step = len(self.geometry.offsets), self._step(z)
        # patches of all passes at once would not fit in memory; each pass is computed again in the backward pass
        again = torch.is_grad_enabled() and not self.training and step < m
        parts = []
        for start in range(0, m, step):
            job = (z, start, start + step, step * len(z))
            parts.append(checkpoint(self._outputs, *job, use_reentrant=False) if again else self._outputs(*job))
        outputs = torch.cat(parts)
        scores = self.reduction(outputs)
        if self.consensus == m:
            return scores
        first = outputs[: self.consensus]   # where they agree, their reduction has the class that they agree on
        return torch.where(self._agreed(first)[:, None], self.reduction(first), scores)

    def _until_decided(self, z: Tensor) -> Tensor:
        """Scores with the winners of `_all`; rows whose winner is certain are left out of later passes."""
        m, rows = len(self.geometry.offsets), self._step(z) * len(z)
        place, start, found = torch.arange(len(z), device=z.device), 0, []
        seen = torch.empty(0)
        while len(z):
            stop = min(self.consensus if start < self.consensus else m, start + rows // len(z))
            part = self._outputs(z, start, stop, rows)
            seen = torch.cat([seen, part]) if start else part
            start, done = stop, self._decided(seen)
            found.append((place[done], self.reduction(seen[:, done])))
            place, z, seen = place[~done], z[~done], seen[:, ~done]
        order = torch.cat([rows for rows, _ in found]).argsort()
        return torch.cat([scores for _, scores in found])[order]

    def _decided(self, seen: Tensor) -> Tensor:
        """Mask (rows,) of those that need no further patch, from the outputs of the first ones."""
        left = len(self.geometry.offsets) - len(seen)
        done = torch.full(seen.shape[1:2], left == 0, device=seen.device)
        safe = self.reduction.decided(seen, left)
        done = done if safe is None else done | safe
        return done | self._agreed(seen) if len(seen) == self.consensus else done

    def extra_repr(self) -> str:
        """Show what is done to the patches."""
        return f"{self.geometry}, {self.reduction}, {self.placement.name}"


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
        x = self.f.lift(x.to(torch.float32))
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

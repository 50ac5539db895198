"""The only hot loop of the package: votes of a base classifier under noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from art_rs_plugins.smoothing.graphs import BatchGraph, batch_graph
from art_rs_plugins.smoothing.noise import (
    Key,
    Noise,
    Source,
    Stage,
    check_seed,
    family_of,
    is_channels_last,
    recordable,
    standard_normal,
)
from art_rs_plugins.theory.sequences import schedule
from art_rs_plugins.theory.votes import Votes

__all__ = [
    "CHUNK",
    "FrozenClassifier",
    "KeptVotes",
    "Sampler",
    "check_count",
    "check_indices",
    "check_network",
    "chunk_size",
    "count_votes",
    "default_block",
    "evaluating",
    "make_sampler",
    "strict_votes",
]

Classifier = Callable[[Tensor], Tensor]
"""Maps noisy inputs (m, ...) to logits (m, k), each row from its own input alone."""


def check_count(value: int, name: str, *, least: int = 1) -> int:
    """Return a positive integer, or raise ``TypeError`` / ``ValueError`` naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_indices(indices: ArrayLike | None, b: int) -> NDArray[np.int64]:
    """Return the index of each input, position by default; distinct, since an index names its noise."""
    if indices is None:
        return np.arange(b, dtype=np.int64)
    values = np.asarray(indices)
    if values.dtype.kind not in "iu":
        raise TypeError(f"indices must be integers, got dtype {values.dtype}")
    if values.shape != (b,) or np.any(values < 0):
        raise ValueError(f"indices must be >= 0 and of shape ({b},), one for each input, got shape {values.shape}")
    if len(np.unique(values)) != b:
        raise ValueError("indices must be distinct: inputs that share an index would share their noise")
    return values.astype(np.int64)


CHUNK = 100
"""Draws that share a key: the step in which sequential rules may look."""


GRAPHS = 8
"""Graphs of batches that a network keeps, at most; each has its memory on the device."""


def chunk_size(block: int) -> int:
    """Draws that share a key where a forward pass takes `block` rows: `CHUNK`, or a divisor of it that fits."""
    return max(size for size in range(1, CHUNK + 1) if CHUNK % size == 0 and size <= block)


def default_block(shape: Iterable[int], device: torch.device | str = "cpu") -> int:
    """Rows of one forward pass for inputs of this shape.

    On CPUs about 300,000 numbers, between 16 and 500 rows: larger batches leave the cache, and 1,000 CIFAR images take
    three times longer, each, than 100. Elsewhere sixteen times as many.
    """
    rows = min(500, max(16, 307_200 // math.prod(shape)))
    return rows if torch.device(device).type == "cpu" else 16 * rows


def _modules(f: Classifier) -> Iterable[nn.Module]:
    return f.modules() if isinstance(f, nn.Module) else ()


class FrozenClassifier(nn.Module):
    """A base classifier that never changes, so that what was found out about it stays true.

    Attributes
    ----------
    passed : set
        Kinds of input that it was probed with. Probes of a compiled network cost three whole passes.
    graphs : dict or None
        Recorded batches; None where its device records none.
    kept : dict or None
        Votes for `KeptVotes`, while whoever asks again is to be given them; None keeps none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed: set[object] = set()
        self.graphs: dict[object, BatchGraph | None] | None = None
        self.kept: dict[Hashable, Votes] | None = None


def check_network(f: Classifier, x: Tensor, num_classes: int) -> None:
    """Refuse a network whose votes would not mean what a certificate says.

    Parameters
    ----------
    f : callable
        Base classifier; a `FrozenClassifier` is probed once for each kind of input.
    x : Tensor, shape (b, ...)
        Inputs that are about to be voted on; the first is used as a probe.
    num_classes : int
        Expected number of logits.

    Raises
    ------
    TypeError
        If x is not floating point.
    ValueError
        If x holds no input, a part of f is in training mode, f lies on another device, has another number of outputs,
        is random, or lets the rows of a batch influence each other (as batch normalisation without running statistics
        does).
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, in the units that sigma is given in, got {x.dtype}")
    if not len(x):
        raise ValueError("x must hold at least one input")
    if any(module.training for module in _modules(f)):
        raise ValueError("f is in training mode, where rows of a batch influence each other; call f.eval() first")
    case = (x.shape[1:], x.dtype, x.device, num_classes)
    if isinstance(f, FrozenClassifier) and case in f.passed:
        return
    device = next((p.device for module in _modules(f) for p in module.parameters(recurse=False)), x.device)
    if device != x.device:
        raise ValueError(f"f is on {device}, but x is on {x.device}; move one of them")
    with torch.no_grad():
        spread = standard_normal((4, *x.shape[1:]), Key(0, 0, Stage.BANK, 0), x.device).to(x.dtype)
        probe = torch.cat([x[:1], x[:1] + spread[1:]])
        # other neighbours, and other places among them, for an input as it is and for a noisy one
        others = torch.cat([3.0 - 2.0 * spread[1:3], probe[1:2], x[:1]])
        first = f(probe).clone()   # a compiled f may write its next output over this one
        again, second = f(probe).clone(), f(others)
        if first.shape != (4, num_classes):
            raise ValueError(
                f"f must return logits of shape (m, {num_classes}) for m inputs, got {tuple(first.shape)} for 4 inputs"
            )
        scale = first.abs().nan_to_num(0.0, 0.0, 0.0).max().clamp(min=1e-6)
        tolerance = 1e-3 if first.dtype in (torch.float32, torch.float64) else 0.1
        if bool((first - again).abs().nan_to_num(0.0, 0.0).max() > tolerance * scale):
            raise ValueError("f is random: it gives another output when it is asked again about the same inputs")
        # NaN is no dependence; it will vote for no class
        change = (first[:2] - second[[3, 2]]).abs().nan_to_num(0.0).max() / scale
        if bool(change > tolerance):
            raise ValueError(
                f"the output of f for one input changed by {float(change):.2g} with the other rows of its batch; "
                "a certificate needs a classifier that sees one input at a time"
            )
    # what is not finite shows no dependence, and speaks for no other input
    if isinstance(f, FrozenClassifier) and all(bool(torch.isfinite(each).all()) for each in (first, second)):
        f.passed.add(case)


def strict_votes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class of each row (m,), and whether its vote is valid (m,).

    A vote is valid if all logits are finite and one of them is strictly the largest: NaN, Inf and ties vote for no
    class. Peers let argmax decide, and certify class 0 at the largest radius on NaN or constant logits.
    """
    top, winner = logits.max(dim=1)
    unique = (logits == top[:, None]).sum(dim=1) == 1
    return winner, unique & torch.isfinite(logits).all(dim=1)


def _count(
    f: Classifier,
    noise: Noise,
    chunk: int,
    num_classes: int,
    sigma: NDArray[np.float64],
    picked: Tensor,
    sources: Sequence[Source],
    limit: Tensor,
) -> Tensor:
    """Votes (slots, k), int64, among the first `limit` of a chunk of noisy copies of each input (slots, ...)."""
    winner, valid = strict_votes(f(noise.draw(picked, sigma, chunk, sources)))
    counted = valid.view(-1, chunk) & (torch.arange(chunk, device=picked.device) < limit[:, None])
    votes = torch.zeros((len(picked), num_classes), dtype=torch.int64, device=picked.device)
    return votes.scatter_add_(1, winner.view(-1, chunk), counted.to(torch.int64))


def _projected(directions: Tensor, noisy: Tensor) -> Tensor:
    """Logits (m, k) along directions (d, k): where there is nothing but noise, no class is sure."""
    return noisy.flatten(1)[:, : len(directions)] @ directions


@dataclass(frozen=True, slots=True, eq=False)
class Sampler:
    """Votes of b inputs, any range of their draws; the only hot loop of the package.

    Draws come in chunks of `chunk`, each named by (seed, index, stage, chunk). A forward pass takes a fixed number of
    chunks of any inputs, the last one padded, so that its shape never changes and no input waits for its neighbours.

    Parameters
    ----------
    f : callable
        Base classifier in eval mode; (m, ...) to logits (m, k).
    x : Tensor, shape (b, ...), floating point
        Inputs, on the device of f.
    noise : Noise
        One sigma, or one for each input.
    num_classes : int
        Number of classes k.
    seed : int
        Seed in [0, 2**63).
    indices : ndarray of int64, shape (b,)
        Index of each input, which names its noise.
    stage : Stage
        What the draws are for.
    chunk, block : int
        Draws that share a key, and rows of one forward pass at most.
    """

    f: Classifier
    x: Tensor
    noise: Noise
    num_classes: int
    seed: int
    indices: NDArray[np.int64]
    stage: Stage
    chunk: int
    block: int

    def count(self, rows: NDArray[np.int64], start: int, stop: int) -> Tensor:
        """Votes among the draws ``start, ..., stop - 1`` of some inputs.

        Parameters
        ----------
        rows : ndarray of int64, shape (r,)
            Positions of the inputs in x.
        start, stop : int
            Range of draws; `start` a multiple of `chunk`.

        Returns
        -------
        Tensor of int64, shape (r, k)
            On the device of x. The draws that are missing from a row's sum were invalid.
        """
        slots, k = max(1, self.block // self.chunk), self.num_classes
        chunks = np.arange(start // self.chunk, -(-stop // self.chunk))
        jobs = np.stack([np.repeat(np.arange(len(rows)), len(chunks)), np.tile(chunks, len(rows))], axis=1)
        padding = -len(jobs) % slots
        work = np.concatenate([jobs, np.repeat(jobs[-1:], padding, axis=0)])
        kept = np.clip(stop - work[:, 1] * self.chunk, 0, self.chunk)
        kept[len(jobs) :] = 0
        inputs, levels = rows[work[:, 0]], self.noise.for_inputs(len(self.x))
        # what is kept for later calls has to be an ordinary tensor
        with torch.inference_mode(False), torch.no_grad():
            votes = torch.zeros((len(rows), k), dtype=torch.int64, device=self.x.device)
            # one transfer for all batches: nothing in the loop waits for the device
            plan = torch.from_numpy(np.stack([inputs, kept, work[:, 0]])).to(self.x.device)
            for first in range(0, len(work), slots):
                batch = slice(first, first + slots)
                keys = [
                    Key(self.seed, index, self.stage, chunk)
                    for index, chunk in zip(self.indices[inputs[batch]].tolist(), work[batch, 1].tolist(), strict=True)
                ]
                picked = self.x[plan[0, batch]]
                if is_channels_last(self.x):
                    picked = picked.contiguous(memory_format=torch.channels_last)
                votes.index_add_(0, plan[2, batch], self._batch(picked, levels[inputs[batch]], keys, plan[1, batch]))
        return votes

    def _batch(self, picked: Tensor, sigma: NDArray[np.float64], keys: Sequence[Key], limit: Tensor) -> Tensor:
        """Votes (slots, k) of one batch: by its graph, where f keeps some and one graph will serve every batch."""
        settings = self.noise, self.chunk, self.num_classes, sigma
        step = partial(_count, self.f, *settings)
        graphs, recorded = self.f.graphs if isinstance(self.f, FrozenClassifier) else None, recordable(self.noise)
        if graphs is None or recorded is None:
            return step(picked, keys, limit)
        layout = picked.shape, picked.stride(), picked.dtype, picked.device
        case = recorded, self.chunk, self.num_classes, layout
        if case not in graphs:
            if len(graphs) >= GRAPHS:
                graphs.clear()
            size = min(64, picked[0].numel()), self.num_classes
            directions = standard_normal(size, Key(0, 0, Stage.BANK, 5)).to(picked)
            probe = partial(_count, partial(_projected, directions), *settings)
            graphs[case] = batch_graph(step, probe, picked, keys, limit)
        graph = graphs[case]
        return step(picked, keys, limit) if graph is None else graph(picked, keys, limit)

    def votes(self, rows: NDArray[np.int64], start: int, stop: int) -> Votes:
        """Votes as `count` gives them, on the host: what a rule asks for."""
        return np.asarray(self.count(rows, start, stop).cpu().numpy(), dtype=np.int64)

    def shared(self, n: int, *, between_rules: bool = False) -> Callable[[NDArray[np.int64], int, int], Votes]:
        """`votes` for rules that take n draws at most: kept if several rules ask, or if f keeps those of all who do."""
        kept = self.f.kept if isinstance(self.f, FrozenClassifier) else None
        if kept is None and not between_rules:
            return self.votes
        return KeptVotes(self, n, {} if kept is None else kept)


class KeptVotes:
    """Votes that are drawn once, however many rules ask for them: in the steps of the schedule of looks.

    Parameters
    ----------
    sampler : Sampler
        What draws them.
    n : int
        Draws at most, which say when rules look.
    known : dict
        Votes of the same base classifier, by all else that they depend on; new ones are put there.
    """

    def __init__(self, sampler: Sampler, n: int, known: dict[Hashable, Votes]) -> None:
        self.sampler, self.known = sampler, known
        self.looks = np.array(schedule(n) if n > CHUNK else (n,))
        x, device = sampler.x, sampler.x.device.type
        cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        family = (
            family_of(sampler.noise), sampler.stage, sampler.seed, sampler.num_classes, sampler.chunk, sampler.block,
            x.dtype, x.shape[1:], str(x.device), is_channels_last(x), cast,
        )   # fmt: skip
        levels, inputs = sampler.noise.for_inputs(len(x)), x.detach().cpu()
        self.names = [
            (*family, int(index), float(sigma), hashlib.sha256(_bytes(row)).digest())
            for index, sigma, row in zip(sampler.indices, levels, inputs, strict=True)
        ]

    def __call__(self, rows: NDArray[np.int64], start: int, stop: int) -> Votes:
        """Votes (r, k) among the draws start, ..., stop - 1 of the inputs at some positions (r,)."""
        cuts = [start, *self.looks[(self.looks > start) & (self.looks < stop)].tolist(), stop]
        total = np.zeros((len(rows), self.sampler.num_classes), dtype=np.int64)
        for begin, end in pairwise(cuts):
            names = [(self.names[row], begin, end) for row in rows.tolist()]
            missing = [place for place, name in enumerate(names) if name not in self.known]
            if missing:
                drawn = self.sampler.votes(rows[missing], begin, end)
                self.known |= {names[place]: votes for place, votes in zip(missing, drawn, strict=True)}
            total += np.array([self.known[name] for name in names], dtype=np.int64).reshape(total.shape)
        return total


def _bytes(x: Tensor) -> bytes:
    """Every bit of a tensor, on the host, whatever its dtype and layout."""
    return x.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def make_sampler(
    f: Classifier,
    x: Tensor,
    noise: Noise,
    n: int,
    *,
    num_classes: int,
    seed: int,
    indices: ArrayLike | None,
    stage: Stage,
    block: int | None,
) -> Sampler:
    """Check what goes into a `Sampler` of n draws for each input, and make it; see `count_votes` for the errors."""
    rows = check_count(block, "block") if block is not None else default_block(x.shape[1:], x.device)
    keys = check_indices(indices, len(x))
    noise.for_inputs(len(x))
    noise.check(x)
    check_network(f, x, num_classes)
    return Sampler(f, x, noise, num_classes, check_seed(seed), keys, stage, min(chunk_size(rows), n), rows)


def count_votes(
    f: Classifier,
    x: Tensor,
    noise: Noise,
    n: int,
    *,
    num_classes: int,
    seed: int | None = None,
    indices: ArrayLike | None = None,
    stage: Stage = Stage.ESTIMATION,
    block: int | None = None,
) -> Tensor:
    """Count the votes of f at n noisy copies of each input.

    Parameters
    ----------
    f : callable
        Base classifier in eval mode; (m, ...) to logits (m, k).
    x : Tensor, shape (b, ...), floating point
        Inputs, on the device of f. A channels_last tensor is fed in that layout.
    noise : Noise
        One sigma, or one for each input.
    n : int
        Draws for each input.
    num_classes : int
        Number of classes k.
    seed : int, optional
        Seed in [0, 2**63); None draws fresh entropy.
    indices : array_like of int, shape (b,), optional
        Index of each input in its data set, which names its noise; its position by default.
    stage : Stage
        What the draws are for.
    block : int, optional
        Rows of one forward pass; `default_block` otherwise. Every pass has the same number of rows, so that an input's
        votes do not depend on its neighbours.

    Returns
    -------
    Tensor of int64, shape (b, k)
        Valid votes, on the device of x. ``n - votes.sum(1)`` votes were invalid.

    Raises
    ------
    ValueError, TypeError
        As `check_network`, and for n, block, indices, seed or sigma that do not fit.

    Notes
    -----
    *Guarantee.* Each row is a multinomial sample of n independent draws, for ideal Gaussian noise and real arithmetic.
    """
    n = check_count(n, "n")
    sampler = make_sampler(
        f, x, noise, n, num_classes=num_classes, seed=check_seed(seed), indices=indices, stage=stage, block=block
    )
    return sampler.count(np.arange(len(x)), 0, n)


def evaluating(module: nn.Module) -> Any:
    """Context in which every part of `module` is in eval mode; each part's own mode returns afterwards."""
    return _Evaluating(module)


class _Evaluating:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modes: dict[nn.Module, bool] = {}

    def __enter__(self) -> nn.Module:
        self.modes = {part: part.training for part in self.module.modules()}
        return self.module.eval()

    def __exit__(self, *_: object) -> None:
        for part, mode in self.modes.items():
            part.training = mode

"""What makes voting faster without touching what is guaranteed, except that f *is* the network as it then computes."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from inspect import isfunction
from typing import Literal

import torch
from torch import Tensor, nn

from art_rs_plugins.smoothing.modules import BaseClassifier, PatchReduce
from art_rs_plugins.smoothing.sampling import CHUNK, FrozenClassifier, check_count, chunk_size, default_block

__all__ = ["Performance", "Voter", "Voters", "emulates_bfloat16", "measure_block"]

_DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

_KEPT_BY_TORCH = {*vars(nn.Module()), "_compiled_call_impl"}
"""What PyTorch keeps in a module: parts, weights, hooks and the mode; all else is a setting."""


@dataclass(frozen=True, slots=True)
class Performance:
    """How the network votes. A certificate holds for the network at this dtype and layout; `predict` uses the same.

    Parameters
    ----------
    dtype : str
        ``"float32"``, or ``"bfloat16"`` or ``"float16"`` under autocast. Noise is float32 always, and cast last. On
        CPUs without instructions for it bfloat16 is many times slower than float32.
    channels_last : bool
        Memory layout of images; most CPUs and GPUs convolve faster with it.
    compile : bool
        Compile the network with ``torch.compile``; on CUDA a batch, from its noise to its counts, is replayed as one
        graph as well. The first votes wait for it.
    block : int, optional
        Rows of one forward pass, rounded down to whole chunks of draws; a number that suits the input shape by default.

    Raises
    ------
    ValueError, TypeError
        For an unknown dtype, or a block that is not a positive integer.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    block: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.block is not None:
            check_count(self.block, "block")

    @property
    def freezes(self) -> bool:
        """Whether a frozen copy of the network votes: not where dtype, layout and code stay as they are."""
        return self != Performance(block=self.block)

    def __str__(self) -> str:
        """What of it the base classifier depends on, such as ``bfloat16, channels_last, compiled``."""
        parts = [self.dtype, "channels_last" * self.channels_last, "compiled" * self.compile]
        return ", ".join(part for part in parts if part)

    def check_device(self, device: torch.device) -> None:
        """Raise ``ValueError`` if the device does not compute with this dtype; warn if it only emulates it."""
        if self.dtype == "float16" and device.type == "cpu":
            raise ValueError("dtype float16 needs a GPU; take bfloat16 or float32 on a CPU")
        if self.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("dtype bfloat16 is not supported by this GPU; take float16 or float32")
        if self.dtype == "bfloat16" and emulates_bfloat16(device):
            warnings.warn(
                "bfloat16 is slow on this CPU, which has no instructions for it; float32 is many times faster",
                stacklevel=2,
            )


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether a CPU has no instructions for bfloat16, which is many times slower there than float32."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


class Voter(FrozenClassifier):
    """A base classifier ready to vote: a frozen copy, folded if its network knows how, in the layout and dtype asked.

    Parameters
    ----------
    f : BaseClassifier
        Base classifier; copied, so that later training does not reach this one.
    performance : Performance
        How to compute.
    """

    def __init__(self, f: BaseClassifier, performance: Performance) -> None:
        super().__init__()
        network = copy.deepcopy(f.network).eval()
        folded = getattr(network, "folded", None)
        network = folded() if callable(folded) else network
        ready = BaseClassifier(network, copy.deepcopy(f.transform)).requires_grad_(False).eval()
        if performance.channels_last:
            ready = ready.to(memory_format=torch.channels_last)   # type: ignore[call-overload]
        self.dtype = _DTYPES[performance.dtype]
        self.performance = performance
        if performance.compile and any(parameter.is_cuda for parameter in ready.parameters()):
            self.graphs = {}
        self.f = _compiled(ready) if performance.compile else ready
        self.eval()

    def forward(self, noisy: Tensor) -> Tensor:
        """Logits (m, k) of noisy inputs (m, ...), float32."""
        count = len(noisy)
        if self.performance.compile:
            noisy = self._padded(noisy)
        if self.performance.channels_last and noisy.ndim == 4:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        if self.dtype is None:
            logits: Tensor = self.f(noisy)
            return logits[:count]
        with torch.autocast(noisy.device.type, dtype=self.dtype):
            logits = self.f(noisy)
        return logits[:count].float()

    def _padded(self, noisy: Tensor) -> Tensor:
        """Rows of a whole forward pass, so that one compiled shape serves probes and short passes as well."""
        block = self.performance.block or default_block(noisy.shape[1:], noisy.device)
        rows = block // chunk_size(block) * chunk_size(block)
        if len(noisy) >= rows:
            return noisy
        return torch.cat([noisy, noisy[-1:].expand(rows - len(noisy), *noisy.shape[1:])])


def _compiled(f: BaseClassifier) -> BaseClassifier:
    """Compile f; of a `PatchReduce` the network alone, since to cut patches in compiled code is slower."""
    inner = f.network.f if isinstance(f.network, PatchReduce) else f
    inner.compile(dynamic=False)
    return f


class Voters:
    """Base classifiers as they vote: each made ready once, and anew when weights, hooks, parts or settings change.

    Settings are the plain attributes of its modules: tensors count by their values, functions by identity, all else by
    what it prints.

    Parameters
    ----------
    limit : int
        Of them that are kept, at most.
    keeping : bool
        Whether each keeps its votes for whoever asks again.
    """

    def __init__(self, limit: int = 4, *, keeping: bool = False) -> None:
        self._ready: dict[Hashable, tuple[tuple[Tensor, ...], Voter]] = {}
        self._limit, self._keeping = limit, keeping

    def of(self, f: BaseClassifier, performance: Performance) -> nn.Module:
        """What votes for f: f itself where there is nothing to make ready."""
        if not performance.freezes:
            return f
        # modules compare by identity, and being kept they cannot lend it to others
        parts = list(f.modules())[1:]
        settings = [item for part in parts for item in sorted(vars(part).items()) if item[0] not in _KEPT_BY_TORCH]
        state = (*f.parameters(), *f.buffers(), *(value for _, value in settings if isinstance(value, Tensor)))
        words = [
            (name, value if isfunction(value) else repr(value))
            for name, value in settings
            if not isinstance(value, Tensor)
        ]
        hooks = [tuple(hooked) for part in parts for hooked in (part._forward_hooks, part._forward_pre_hooks)]
        key = (type(f), performance, len(state), *parts, *hooks, *words)
        ready = self._ready.pop(key, None)
        # values, not version counters: those miss whoever writes to parameter.data
        if ready is None or not all(map(_same, ready[0], state)):
            ready = tuple(t.detach().clone() for t in state), Voter(f, performance)
            if self._keeping:
                ready[1].kept = {}
        self._ready[key] = ready   # the last used come last
        for old in list(self._ready)[: -self._limit]:
            del self._ready[old]
        return ready[1]

    def forget(self) -> None:
        """Let go of all votes that were kept."""
        for _, voter in self._ready.values():
            if voter.kept is not None:
                voter.kept.clear()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def measure_block(f: nn.Module, shape: tuple[int, ...], device: torch.device) -> int:
    """Number of rows that the device passes through f fastest, per row, among a few; it changes no vote.

    Parameters
    ----------
    f : Module
        Base classifier in eval mode, on the device.
    shape : tuple of int
        Shape of one input.
    device : torch.device
        Where to measure.
    """
    limit = default_block(shape, device)
    # whole chunks: with fewer rows a chunk, and the noise that it names, would be another
    candidates = sorted({max(CHUNK, rows // CHUNK * CHUNK) for rows in (limit // 4, limit, 2 * limit)})
    best, fastest = candidates[0], float("inf")
    with torch.no_grad():
        for rows in candidates:
            batch = torch.zeros((rows, *shape), device=device)
            seconds = []
            for _ in range(4):
                begun = time.perf_counter()
                f(batch).sum().item()   # waits for the device
                seconds.append((time.perf_counter() - begun) / rows)
            if min(seconds[1:]) < 0.97 * fastest:   # the first pass warms up
                best, fastest = rows, min(seconds[1:])
    return best

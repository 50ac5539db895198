"""One batch of votes as a graph of its device: noise, forward pass, comparison and counting, launched at once.

Small networks on GPUs wait for their launches more than for their arithmetic. A graph launches a whole batch with one
call; what differs from batch to batch lies in fixed places, the seeds of its generators among them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from art_rs_plugins.smoothing.noise import Key, Source, device_seed

__all__ = ["BatchGraph", "Step", "batch_graph", "capture"]

Step = Callable[[Tensor, Sequence[Source], Tensor], Tensor]
"""Votes (slots, k) of inputs (slots, ...), by their keys or generators, with a limit (slots,) of draws for each."""

Capture = Callable[[Callable[[], Tensor], Sequence[Any]], tuple[Callable[[], object], Tensor]]
"""From what is to be recorded, and the generators it draws from: how to replay it, and where its result appears."""


def capture(record: Callable[[], Tensor], generators: Sequence[torch.Generator]) -> tuple[Callable[[], object], Tensor]:
    """Record on the CUDA device of the generators; warmed up beside it first, as lazy parts may not be recorded."""
    with torch.cuda.device(generators[0].device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                record()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            result = record()
    return graph.replay, result


class BatchGraph:
    """A recorded step; it gives the votes that the step gives, bit for bit.

    Parameters
    ----------
    step : Step
        What is recorded. It reads nothing from the host, and waits for nothing.
    picked, limit : Tensor, shapes (slots, ...) and (slots,)
        Inputs and limits of some batch, on the device.
    keys : sequence of Key, length slots
        Names of its draws.
    capture : Capture
        How the device records.
    """

    def __init__(self, step: Step, picked: Tensor, keys: Sequence[Key], limit: Tensor, capture: Capture) -> None:
        self.picked, self.limit = picked.clone(), limit.clone()
        on_host = picked.device.type == "cpu"   # where keys name their draws themselves
        self.sources: list[Source] = list(keys) if on_host else [torch.Generator(picked.device) for _ in keys]
        self._seed(keys)
        generators = [] if on_host else self.sources
        self.step = step   # what it holds has to live as long as the graph
        self.replay, self.votes = capture(lambda: step(self.picked, self.sources, self.limit), generators)

    def __call__(self, picked: Tensor, keys: Sequence[Key], limit: Tensor) -> Tensor:
        """Votes (slots, k) of a batch of the same shape; the next call writes over them."""
        self.picked.copy_(picked)
        self.limit.copy_(limit)
        self._seed(keys)
        self.replay()
        return self.votes

    def _seed(self, keys: Sequence[Key]) -> None:
        for i, key in enumerate(keys):
            if isinstance(self.sources[i], torch.Generator):
                self.sources[i].manual_seed(device_seed(key))
            else:
                self.sources[i] = key


def batch_graph(
    step: Step, probe: Step, picked: Tensor, keys: Sequence[Key], limit: Tensor, *, capture: Capture = capture
) -> BatchGraph | None:
    """Record a step, and count batches with and without it; None, with a warning, where that fails or votes differ.

    Parameters
    ----------
    step, picked, keys, limit, capture
        As in `BatchGraph`.
    probe : Step
        The same step with another network, which is unsure of its class where inputs are zero. A network that is sure
        would not tell whether a replay draws anew, and one that does not would make every certificate false.
    """
    zeros, spread = torch.zeros_like(picked), torch.empty_like(picked)   # in the layout of the inputs
    spread.copy_(torch.linspace(-3.0, 3.0, picked.numel(), device=picked.device).view(picked.shape))
    whole = torch.full_like(limit, int(limit.max()))
    batches = {
        probe: [(zeros, 0, whole), *[(zeros, turn, whole) for turn in (1, 2, 3, 0)], (spread, 4, whole // 2)],
        step: [(picked, 0, limit), (spread, 1, whole // 2), (zeros, 2, whole), (picked, 0, limit)],
    }
    try:
        for each, cases in batches.items():
            graph = BatchGraph(each, picked, keys, limit, capture)
            for inputs, turn, least in cases:
                names = [replace(key, seed=key.seed ^ turn) for key in keys]
                if not torch.equal(graph(inputs, names, least), each(inputs, names, least)):
                    raise RuntimeError("its votes differ from those of the same batch without it")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"votes are counted without a graph of the device: {reason}", RuntimeWarning, stacklevel=2)
        return None
    return graph

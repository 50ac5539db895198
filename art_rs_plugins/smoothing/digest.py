"""Digests: whether a network is still the one that something was said about."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import nn

__all__ = ["network_digest", "printed"]


def printed(value: object) -> str:
    """``repr`` without addresses, which are others in each process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def network_digest(network: nn.Module) -> str:
    """SHA-256 in hexadecimal of a network: its layers as it prints them, its parameters, and all of its buffers.

    Buffers count whether they are among the weights or not, such as the mean of a normalisation. What a network
    computes beyond what it prints, such as the code of a ``forward``, is not seen.
    """
    total = hashlib.sha256(printed(network).encode())
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)]
    for name, value in sorted(tensors, key=lambda entry: entry[0]):
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()

"""Vote tables: shape (b, k), int64, votes of b inputs for k classes.

Draws whose vote was invalid (logits not finite, or a tie) appear in no column; a rule learns of them through the number
of draws and counts them with the rivals.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Votes", "check_votes", "strongest_rival"]

Votes = NDArray[np.int64]


def check_votes(votes: Votes, n: int, name: str) -> Votes:
    """Return a (b, k) table as int64, or say what is wrong with it."""
    table = np.asarray(votes)
    if table.dtype.kind not in "iu":
        raise TypeError(f"{name} votes must be integers, got dtype {table.dtype}")
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"{name} votes must have shape (b, k) with k >= 2 classes, got {table.shape}")
    if np.any(table < 0) or np.any(table.sum(axis=1) > n):
        raise ValueError(f"{name} votes must be >= 0 and sum to at most n = {n} in every row")
    return table.astype(np.int64)


def strongest_rival(votes: Votes, prediction: NDArray[np.int64], n: int | NDArray[np.int64]) -> NDArray[np.int64]:
    """Votes of the strongest class other than `prediction`, the invalid draws added to it. Shape (b,)."""
    others = votes.copy()
    others[np.arange(len(votes)), prediction] = -1
    return np.asarray(others.max(axis=1) + (n - votes.sum(axis=1)), dtype=np.int64)

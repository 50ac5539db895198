"""The nearest adversarial example of a few inputs: what a certificate must not reach, to be looked at."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.benchmark.files import write_atomic
from art_rs_plugins.benchmark.records import Record, rows_digest

__all__ = ["Nearest", "from_arrays", "load_nearest", "nearest_of", "save_nearest", "to_arrays"]


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """Nearest adversarial examples that fresh votes confirmed, for m inputs.

    Attributes
    ----------
    index : int64, shape (m,)
        Index of the input in its data set, ascending.
    original, adversarial : float32, shape (m, *input_shape)
        The input, and the example.
    distance : float64, shape (m,)
        l2 norm of their difference.
    attack : tuple of str, length m
        Which attack found it.
    """

    index: NDArray[np.int64]
    original: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    distance: NDArray[np.float64]
    attack: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.index)


def nearest_of(found: Sequence[Nearest]) -> Nearest | None:
    """The nearest of what several attacks found, input by input; None where none found any."""
    best: dict[int, tuple[float, Nearest, int]] = {}
    for each in found:
        for row, (index, distance) in enumerate(zip(each.index.tolist(), each.distance.tolist(), strict=True)):
            if index not in best or distance < best[index][0]:
                best[index] = (distance, each, row)
    if not best:
        return None
    chosen = [best[index][1:] for index in sorted(best)]
    return Nearest(
        index=np.array(sorted(best), dtype=np.int64),
        original=np.stack([each.original[row] for each, row in chosen]),
        adversarial=np.stack([each.adversarial[row] for each, row in chosen]),
        distance=np.array([each.distance[row] for each, row in chosen]),
        attack=tuple(each.attack[row] for each, row in chosen),
    )


def to_arrays(nearest: Nearest) -> dict[str, NDArray[Any]]:
    """Arrays of one, by name, for an ``.npz`` without pickles; `from_arrays` goes back."""
    return {
        "index": nearest.index,
        "original": nearest.original,
        "adversarial": nearest.adversarial,
        "distance": nearest.distance,
        "attack": np.array(nearest.attack, dtype=np.str_),
    }


def from_arrays(arrays: Any) -> Nearest:
    """Rebuild from `to_arrays`; ``KeyError`` where one is missing."""
    names = tuple(str(name) for name in arrays["attack"].tolist())
    return Nearest(arrays["index"], arrays["original"], arrays["adversarial"], arrays["distance"], names)


def _path(record: Record) -> Path:
    return record.path.with_name(f"{record.name}.nearest.npz")


def save_nearest(nearest: Nearest, record: Record) -> Path:
    """Write ``run.nearest.npz`` beside a record, with the digest of the rows that it speaks of; return where."""
    stream, arrays = io.BytesIO(), {"record_sha256": np.array(rows_digest(record)), **to_arrays(nearest)}
    np.savez(stream, allow_pickle=False, **arrays)
    write_atomic(_path(record), stream.getvalue())
    return _path(record)


def load_nearest(records: Sequence[Record]) -> list[Nearest | None]:
    """Nearest examples beside records; None where there are none, or where they are of other rows.

    Raises
    ------
    ValueError
        For a damaged file; the message names it.
    """
    return [_load(record) for record in records]


def _load(record: Record) -> Nearest | None:
    path = _path(record)
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return from_arrays(arrays) if str(arrays["record_sha256"]) == rows_digest(record) else None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no nearest examples ({error}); attack the record again") from error

"""Arrays on disk, of which only the rows that are asked for are in memory: one by one, in batches, as a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.benchmark.data import Dataset
from art_rs_plugins.smoothing.sampling import check_count

__all__ = ["ArrayBatches", "ArrayFile", "DatasetOnDisk", "NpzBatches", "open_folder"]

STEP = 256
"""Rows that are read together."""


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """An array in a ``.npy`` file, of which only the rows that are asked for are in memory.

    Parameters
    ----------
    path : path
        The file.
    kind : dtype, optional
        What its rows are cast to; nothing by default.

    Raises
    ------
    FileNotFoundError, ValueError
        If it is missing, or no ``.npy`` of numbers; the message names it.
    """

    path: Path
    kind: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not self.path.is_file():
            raise FileNotFoundError(f"no file at {self.path}; give the path of an array written with np.save")
        self._opened()

    def _opened(self) -> NDArray[Any]:
        # Mapped anew each time: pages of a mapping that stays count as memory of the process.
        try:
            array: NDArray[Any] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.path} is no .npy of numbers ({error}); write it with np.save") from error
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{self.path} is no .npy of numbers, but of {array.dtype}; write it with np.save")
        return array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole array."""
        return self._opened().shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its entries."""
        return self._opened().dtype if self.kind is None else np.dtype(self.kind)

    def __len__(self) -> int:
        return len(self._opened())

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Copy of some rows."""
        return np.array(self._opened()[rows], dtype=self.kind)


@dataclass(frozen=True, slots=True)
class ArrayBatches:
    """Batches of two arrays of equal length, such as an `ArrayFile` of inputs and one of labels.

    Raises
    ------
    ValueError
        For lengths that differ, or a `size` below 1.
    """

    x: Any
    y: Any
    size: int = 64

    def __post_init__(self) -> None:
        check_count(self.size, "size")
        if len(self.x) != len(self.y):
            raise ValueError(f"x and y must have the same length, got {len(self.x)} and {len(self.y)}")

    def __iter__(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for first in range(0, len(self.x), self.size):
            rows = slice(first, first + self.size)
            yield self.x[rows], self.y[rows]


@dataclass(frozen=True, slots=True)
class NpzBatches:
    """Batches out of a folder of ``.npz`` files, by name, each with an array ``x`` of inputs and ``y`` of labels.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder has no such file; on the way, if one of them lacks an array.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not self._files():
            raise FileNotFoundError(f"no .npz file in {self.folder}; write some with np.savez(path, x=..., y=...)")

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.npz"))

    def __iter__(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        for path in self._files():
            with np.load(path, allow_pickle=False) as archive:
                if not {"x", "y"} <= set(archive.files):
                    raise ValueError(f"{path} lacks the array x or y; write it with np.savez(path, x=..., y=...)")
                yield archive["x"], archive["y"]


@dataclass(frozen=True, slots=True, eq=False)
class DatasetOnDisk(Dataset):
    """A data set whose inputs are an `ArrayFile`; the estimator checks each group of them as it certifies it.

    Raises
    ------
    ValueError, TypeError
        If inputs and labels do not fit together.
    """

    def __post_init__(self) -> None:
        if self.y_test.dtype.kind not in "iu":
            raise TypeError(f"y_test must be integers (class indices), got dtype {self.y_test.dtype}")
        if len(self.x_test.shape) < 2 or self.y_test.shape != self.x_test.shape[:1] or not len(self.y_test):
            raise ValueError(
                "x_test must have shape (b, ...) and y_test shape (b,) with b >= 1, got "
                f"{self.x_test.shape} and {self.y_test.shape}"
            )
        if self.y_test.min() < 0 or not 2 <= self.num_classes > self.y_test.max():
            raise ValueError(f"y_test must be class indices in [0, {self.num_classes}), of at least two classes")
        object.__setattr__(self, "y_test", self.y_test.astype(np.int64))


def open_folder(folder: str | Path) -> Dataset:
    """Data set of a folder with ``x_test.npy`` and ``y_test.npy``, to certify; there is none to train on.

    Parameters
    ----------
    folder : path
        Values are kept as they are, so radii come out in their units. They are read once, for their range.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        For files that are missing or no arrays, NaN or infinity, or arrays that do not fit together.
    """
    x, y = ArrayFile(Path(folder) / "x_test.npy", np.float32), ArrayFile(Path(folder) / "y_test.npy")[:]
    ends = np.array([(part.min(), part.max()) for part in _parts(x)])
    if not np.all(np.isfinite(ends)):
        raise ValueError(f"{x.path} must be finite, but holds NaN or infinity; repair or leave out those inputs")
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    return DatasetOnDisk(
        Path(folder).name,
        np.zeros((0, *x.shape[1:]), dtype=np.float32),
        np.zeros(0, dtype=np.int64),
        cast(Any, x),
        y,
        num_classes=1 + int(y.max(initial=0)),
        clip_values=(0.0, 1.0) if low >= 0.0 and high <= 1.0 else (low, high),
    )


def _parts(x: ArrayFile) -> Iterator[NDArray[Any]]:
    return (x[first : first + STEP] for first in range(0, len(x), STEP))

"""Data sets by name or from a file, as arrays; nothing is ever downloaded."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["KNOWN", "Dataset", "load"]

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_FILES = {
    "mnist": ("mnist.npz",),
    "cifar10": (*(f"cifar-10-batches-py/data_batch_{part}" for part in range(1, 6)), "cifar-10-batches-py/test_batch"),
}
_DAMAGE = (zipfile.BadZipFile, EOFError, OSError, ValueError)
KNOWN = ("digits", *_FILES)
"""Names that `load` knows."""


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Inputs and labels for training and testing.

    Attributes
    ----------
    name : str
        What `load` was asked for.
    x_train, x_test : float32, shape (b, ...)
        Inputs; images as (b, channels, height, width).
    y_train, y_test : int64, shape (b,)
        Class indices.
    num_classes : int
        Number of classes k.
    clip_values : tuple of float
        Least and greatest value that an input can take.

    Raises
    ------
    ValueError, TypeError
        If the arrays do not fit together; the message names the array.
    """

    name: str
    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    num_classes: int
    clip_values: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            _check_split(getattr(self, f"x_{split}"), getattr(self, f"y_{split}"), split)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"x_train and x_test must hold inputs of one shape, got {self.x_train.shape[1:]} and "
                f"{self.x_test.shape[1:]}"
            )
        for name, dtype in zip(_ARRAYS, (np.float32, np.int64) * 2, strict=True):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
        largest = max(int(self.y_train.max()), int(self.y_test.max()))
        if not largest < self.num_classes or self.num_classes < 2:
            raise ValueError(f"num_classes must be >= 2 and above every label, got {self.num_classes}, label {largest}")


def _check_split(x: NDArray[Any], y: NDArray[Any], split: str) -> None:
    if x.dtype.kind not in "fiub" or y.dtype.kind not in "iu":
        raise TypeError(
            f"x_{split} must be numbers and y_{split} integers (class indices), got dtypes {x.dtype} and {y.dtype}"
        )
    if x.ndim < 2 or y.shape != x.shape[:1] or not len(x):
        raise ValueError(
            f"x_{split} must have shape (b, ...) and y_{split} shape (b,) with b >= 1, got {x.shape} and {y.shape}"
        )
    if not np.all(np.isfinite(x)):
        raise ValueError(f"x_{split} must be finite, but holds NaN or infinity; repair or leave out those inputs")
    if y.min() < 0:
        raise ValueError(f"y_{split} must be class indices >= 0, got {y.min()}")


def load(name: str) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    name : str
        ``digits`` (8 x 8 images, part of scikit-learn), ``mnist`` or ``cifar10`` (from ART's data folder, or from the
        one that the environment variable ART_DATA_PATH names), or the path of an ``.npz`` with the arrays ``x_train``,
        ``y_train``, ``x_test``, ``y_test``, or of a folder with ``x_test.npy`` and ``y_test.npy``, which stay on disk.
        Values of a file are kept as they are, so radii come out in its units.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        Where the files are not there; the message says where to put them. Nothing is downloaded.
    ValueError, TypeError
        For an unknown name, or a file that is damaged, lacks arrays or holds what does not fit together.
    """
    if name == "digits":
        return _digits()
    if name in _FILES:
        return _from_art(name)
    if name.endswith(".npz"):
        return _from_npz(Path(name))
    if Path(name).is_dir():
        from art_rs_plugins.benchmark.arrays import open_folder  # which builds on this module

        return open_folder(name)
    raise ValueError(f"name must be one of {', '.join(KNOWN)}, or the path of an .npz file or a folder, got {name!r}")


def _digits() -> Dataset:
    """Scikit-learn's digits, with a fixed stratified test set of 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x = (images / 16.0).reshape(-1, 1, 8, 8)
    x_train, x_test, y_train, y_test = train_test_split(x, labels, test_size=360, stratify=labels, random_state=0)
    return Dataset("digits", x_train, y_train, x_test, y_test, num_classes=10)


def _from_art(name: str) -> Dataset:
    """MNIST or CIFAR-10 through ART's loader, which must find the files: its download turns TLS checks off."""
    from art import config, utils

    if os.environ.get("ART_DATA_PATH"):   # ART itself reads its configuration file alone
        config.set_data_path(os.environ["ART_DATA_PATH"])
    # From a folder that it cannot write, ART does not read either: it turns to this one.
    folder = Path(config.ART_DATA_PATH if os.access(config.ART_DATA_PATH, os.W_OK) else "/tmp/.art")
    missing = [file for file in _FILES[name] if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name} needs {', '.join(missing)} in {folder}; put the files there, or name another folder in the "
            "environment variable ART_DATA_PATH or in ART's configuration file ~/.art/config.json"
        )
    loader = {"mnist": utils.load_mnist, "cifar10": utils.load_cifar10}[name]
    # Raw bytes: ART's own scaling takes eight times the memory and gives the same values.
    try:
        (x_train, y_train), (x_test, y_test), _, _ = loader(raw=True)
    except (*_DAMAGE, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"the files of {name} in {folder} are damaged ({error}); put them there again") from error
    # the test labels of CIFAR-10 come as a list
    return Dataset(name, _pixels(x_train), y_train, _pixels(x_test), np.asarray(y_test), num_classes=10)


def _pixels(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Images (b, h, w) or (b, h, w, c) of bytes to (b, c, h, w) in [0, 1]."""
    channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return channels_first.astype(np.float32) / np.float32(255.0)


def _from_npz(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; give the path of an .npz with the arrays {', '.join(_ARRAYS)}")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            missing = [name for name in _ARRAYS if name not in archive.files]
            arrays = {name: archive[name] for name in _ARRAYS if not missing}
    except _DAMAGE as error:
        raise ValueError(f"{path} is no .npz of plain arrays ({error}); write it with np.savez") from error
    if missing:
        raise ValueError(f"{path} lacks the array {', '.join(missing)}; write it with np.savez(path, x_train=..., ...)")
    try:
        for split in ("train", "test"):
            _check_split(arrays[f"x_{split}"], arrays[f"y_{split}"], split)
        inputs = (arrays["x_train"], arrays["x_test"])
        low, high = float(min(x.min() for x in inputs)), float(max(x.max() for x in inputs))
        inside = low >= 0.0 and high <= 1.0
        return Dataset(
            path.name.removesuffix(".npz"),
            **arrays,
            num_classes=1 + int(max(arrays["y_train"].max(), arrays["y_test"].max())),
            clip_values=(0.0, 1.0) if inside else (low, high),
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error

"""Data sets: known contents, and errors that say where files belong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from art_rs_plugins.benchmark.data import load

FOLDER = os.environ.get("ART_DATA_PATH", "")


def use_folder(monkeypatch: pytest.MonkeyPatch, folder: str | Path) -> None:
    from art import config

    monkeypatch.setattr(config, "ART_DATA_PATH", config.ART_DATA_PATH)   # put back afterwards
    monkeypatch.setenv("ART_DATA_PATH", str(folder))


def forbid_download(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib import request

    def refuse(*_: Any) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(request, "urlopen", refuse)


def test_digits_are_scikit_learns_in_a_fixed_split() -> None:
    data = load("digits")
    assert data.x_train.shape == (1437, 1, 8, 8)
    assert data.x_test.shape == (360, 1, 8, 8)
    assert (data.x_test.dtype, data.y_test.dtype) == (np.float32, np.int64)
    images, labels = load_digits(return_X_y=True)
    rows = {(row.tobytes(), label) for row, label in zip((images / 16).astype(np.float32), labels, strict=True)}
    split = [*zip(data.x_train, data.y_train, strict=True), *zip(data.x_test, data.y_test, strict=True)]
    assert {(image.tobytes(), label) for image, label in split} == rows
    # stratified: each class has its share of 360 to within one
    share = np.bincount(labels) * 360 / len(labels)
    assert np.all(np.abs(np.bincount(data.y_test) - share) < 1)
    np.testing.assert_array_equal(load("digits").x_test, data.x_test)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of digits, mnist, cifar10, .* got 'imagenet'"):
        load("imagenet")


@pytest.mark.parametrize("name, file", [("mnist", "mnist.npz"), ("cifar10", "cifar-10-batches-py/data_batch_1")])
def test_absent_files_are_asked_for_and_never_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    use_folder(monkeypatch, tmp_path)
    forbid_download(monkeypatch)
    with pytest.raises(FileNotFoundError, match=f"{name} needs {file}") as caught:
        load(name)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_half_of_cifar_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folder(monkeypatch, tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for part in range(1, 5):
        (tmp_path / "cifar-10-batches-py" / f"data_batch_{part}").touch()
    with pytest.raises(FileNotFoundError, match=r"needs cifar-10-batches-py/data_batch_5, .*/test_batch in"):
        load("cifar10")


def test_mnist_comes_through_arts_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    np.savez(tmp_path / "mnist.npz", x_train=images[:8], y_train=labels[:8], x_test=images[8:], y_test=labels[8:])
    use_folder(monkeypatch, tmp_path)
    forbid_download(monkeypatch)
    data = load("mnist")
    np.testing.assert_array_equal(data.x_train, (images[:8, None] / 255.0).astype(np.float32))
    assert data.y_test.tolist() == [8, 9, 0, 1]
    assert (data.num_classes, data.clip_values) == (10, (0.0, 1.0))


def test_damaged_cifar_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_folder(monkeypatch, tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for part in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (tmp_path / "cifar-10-batches-py" / part).write_bytes(b"\x80\x04cut")
    with pytest.raises(ValueError, match=r"the files of cifar10 in .* are damaged"):
        load("cifar10")


@pytest.mark.skipif(
    not (Path(FOLDER) / "cifar-10-batches-py" / "test_batch").is_file() or not FOLDER,
    reason="ART_DATA_PATH names no folder with CIFAR-10",
)
def test_cifar_is_what_arts_own_scaling_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    from art.utils import preprocess

    use_folder(monkeypatch, FOLDER)
    data = load("cifar10")
    assert data.x_train.shape == (50_000, 3, 32, 32)
    assert data.y_test[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert np.bincount(data.y_test).tolist() == [1000] * 10
    from art.utils import load_cifar10

    (_, _), (images, labels), _, _ = load_cifar10(raw=True)
    scaled, one_hot = preprocess(images[:500], labels[:500], clip_values=(0, 255))
    np.testing.assert_array_equal(data.x_test[:500], scaled.transpose(0, 3, 1, 2).astype(np.float32))
    np.testing.assert_array_equal(data.y_test[:500], one_hot.argmax(axis=1))


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    made = {
        "x_train": rng.random((6, 4)),
        "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": rng.random((3, 4)),
        "y_test": np.array([0, 1, 3]),
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def test_a_file_of_the_user_keeps_its_values(tmp_path: Path) -> None:
    made = arrays(x_test=np.array([[-3.0, 0, 0, 7.5], [0, 0, 0, 0], [1, 1, 1, 1]]))
    np.savez(tmp_path / "mine.npz", **made)
    data = load(str(tmp_path / "mine.npz"))
    np.testing.assert_array_equal(data.x_test, made["x_test"].astype(np.float32))
    assert (data.name, data.num_classes, data.clip_values) == ("mine", 4, (-3.0, 7.5))
    np.savez(tmp_path / "unit.npz", **arrays())
    assert load(str(tmp_path / "unit.npz")).clip_values == (0.0, 1.0)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"y_test": None, "x_train": None}, ValueError, "lacks the array x_train, y_test"),
        ({"x_test": np.full((3, 4), np.nan)}, ValueError, "x_test must be finite"),
        ({"y_train": np.arange(5)}, ValueError, r"got \(6, 4\) and \(5,\)"),
        ({"x_test": np.zeros((3, 5))}, ValueError, r"one shape, got \(4,\) and \(5,\)"),
        ({"x_test": np.zeros((0, 4)), "y_test": np.zeros(0, int)}, ValueError, "b >= 1"),
        ({"y_test": np.array([0.0, 1.0, 2.0])}, TypeError, "y_test integers"),
        ({"y_test": np.array([0, -1, 2])}, ValueError, "y_test must be class indices >= 0, got -1"),
        ({"x_train": np.array([["a"] * 4] * 6)}, TypeError, "x_train must be numbers"),
        ({"y_train": np.zeros(6, int), "y_test": np.zeros(3, int)}, ValueError, "num_classes must be >= 2"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, changes: Any, error: type[Exception], message: str) -> None:
    np.savez(tmp_path / "mine.npz", **arrays(**changes))
    with pytest.raises(error, match=message) as caught:
        load(str(tmp_path / "mine.npz"))
    assert "mine.npz" in str(caught.value)


def test_a_truncated_or_pickled_file_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays())
    data = (tmp_path / "mine.npz").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 5):
        (tmp_path / "cut.npz").write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.npz is no .npz of plain arrays"):
            load(str(tmp_path / "cut.npz"))
    np.savez(tmp_path / "objects.npz", **arrays(x_train=np.array([{}] * 6)))
    with pytest.raises(ValueError, match=r"objects\.npz is no .npz of plain arrays"):
        load(str(tmp_path / "objects.npz"))
    with pytest.raises(FileNotFoundError, match="no file at"):
        load(str(tmp_path / "absent.npz"))

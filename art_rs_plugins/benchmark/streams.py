"""Certificates of any batches, recorded as they come: for inputs that do not fit into memory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from art_rs_plugins.benchmark.files import check_folder, digest
from art_rs_plugins.benchmark.models import network_outputs, same_outputs
from art_rs_plugins.benchmark.records import Record, read_manifest, read_record
from art_rs_plugins.benchmark.workers import GROUP, HERE, Group, Survey, Task, Workers, record_groups, refuse_memory
from art_rs_plugins.benchmark.writer import RecordWriter
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.digest import network_digest, printed
from art_rs_plugins.smoothing.noise import check_seed
from art_rs_plugins.smoothing.sampling import default_block
from art_rs_plugins.theory.regions import CertifiedRegions

__all__ = ["certify_batches"]

Batches = Iterable[tuple[Any, Any]]
"""Pairs of inputs (b, ...) and class indices (b,), arrays or tensors; the same ones, in order, in each iteration."""


def certify_batches(
    estimator: PyTorchSmoothedClassifier,
    batches: Batches,
    output: str | Path,
    *,
    n: int | None = None,
    n0: int | None = None,
    radii: Sequence[float] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    workers: Workers = HERE,
    verbose: bool = False,
) -> Record:
    """Certify batches of inputs and record them; memory holds a batch of them at a time.

    Parameters
    ----------
    estimator : PyTorchSmoothedClassifier
        What certifies.
    batches : iterable of pairs (inputs, labels)
        Such as a list, a ``DataLoader`` that does not shuffle, `ArrayBatches` or `NpzBatches`. Read twice: once for the
        digest that goes into the manifest, and once to certify. An input's index is its place in the whole.
    output : path
        Record (TSV), with a manifest beside it; an unfinished one with the same settings and inputs is gone on with.
    n, n0, radii, tolerance, seed
        As of the estimator's `certificates`.
    workers : Workers
        Who votes: this process, or those of `benchmark.cluster`.
    verbose : bool
        Show a progress bar.

    Returns
    -------
    Record

    Raises
    ------
    TypeError
        For batches that can be read once only, or are no pairs.
    ValueError
        For batches that are others when they are read again, as of a loader that shuffles; for a record of other
        settings, inputs or labels; and as the estimator's `certificates`.
    OSError
        If the record cannot be written.

    Notes
    -----
    *Guarantee.* That of the estimator's `certificates`, for each row; however often the run was stopped, and whatever
    the sizes of the batches.
    """
    target, seed = Path(output), check_seed(seed)
    check_folder(target)
    if workers is not HERE:
        refuse_memory(estimator)
    if isinstance(batches, Iterator):
        raise TypeError("batches must be readable twice, got an iterator; give a list, a DataLoader, or ArrayBatches")
    asked = {"n": n, "n0": n0, "radii": None if radii is None else tuple(radii), "tolerance": tolerance}
    given = {name: value for name, value in asked.items() if value is not None}
    known, outputs = read_manifest(target), network_outputs(estimator.model.f, estimator.input_shape)
    rows = [_row_digest(x, y) for x, y in _rows(batches)]
    if not rows:
        raise ValueError("batches must hold at least one input")
    block = estimator.performance.block or default_block(estimator.input_shape, estimator.device)
    facts = {
        "device": next(iter(workers(Survey(estimator), [block])))[0],
        "performance": str(estimator.performance),
        "block": block,
        "seed": seed,
        "network_sha256": network_digest(estimator.model),
        "data_sha256": digest(b"".join(rows)),
        "inputs": len(rows),
    }
    notes = {"network_outputs": outputs, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])}
    if known is not None and not same_outputs(known.get("network_outputs", []), outputs):
        raise ValueError(f"{target} belongs to a network that answers otherwise; choose another output path")
    with RecordWriter(target, {**_settings(estimator), **given}, facts=facts, notes=notes) as writer:
        groups = _groups(batches, rows, writer.done)
        task = Task(estimator, {**given, "seed": seed})
        record_groups(task, groups, [writer], total=len(rows), workers=workers, verbose=verbose)
    return read_record(target)


_ASIDE = ("model", "loss", "optimizer", "device_type", "performance", "objective", "draws", "adversary", "table")
"""Parameters of an estimator that the facts have already, or that no certificate depends on."""


def _settings(estimator: PyTorchSmoothedClassifier) -> dict[str, Any]:
    """Type and settings of an estimator, as JSON values."""
    own = {name: value for name, value in estimator.get_params().items() if name not in _ASIDE}
    return {"estimator": type(estimator).__name__, **{name: _described(each, name) for name, each in own.items()}}


def _described(value: Any, name: str) -> Any:
    """A setting as JSON values that tell it from every other: arrays, networks and promises by their digest.

    ``ValueError`` for what prints as nothing but a type and an address.
    """
    if isinstance(value, CertifiedRegions):
        return [digest(part) for part in (value.centres(), value.prediction, value.radius)]
    if isinstance(value, nn.Module):
        return network_digest(value)
    if isinstance(value, np.ndarray):
        return digest(value)
    if isinstance(getattr(value, "params", None), list):   # a preprocessor of ART
        return [type(value).__name__, {each: _described(getattr(value, each, None), name) for each in value.params}]
    if isinstance(value, list | tuple):
        return [_described(each, name) for each in value]
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, {f.name: _described(getattr(value, f.name), name) for f in fields(value)}]
    if " at 0x" in repr(value) and not isinstance(value, type):
        module, known = getattr(value, "__module__", None), getattr(value, "__qualname__", "<")
        if module is None or "<" in known:
            raise ValueError(
                f"{name} holds {value!r}, of which nobody can tell later whether it is still the same; give a function "
                "of a module, a frozen dataclass, or a torch.nn.Module"
            )
        return f"{module}.{known}"
    return printed(value)


def _rows(batches: Batches) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Each input with its label, as the estimator takes them."""
    for number, batch in enumerate(batches):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"batch {number} must be a pair of inputs and labels, got {type(batch).__name__}")
        x, y = (np.asarray(part) for part in batch)
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(
                f"batch {number} must have class indices of shape ({len(x)},), got shape {y.shape} of dtype {y.dtype}"
            )
        yield from zip(x.astype(np.float32, copy=False), y.astype(np.int64), strict=True)


def _row_digest(x: NDArray[np.float32], y: NDArray[np.int64]) -> bytes:
    return hashlib.sha256(f"{x.shape} {int(y)} ".encode() + x.tobytes()).digest()


def _groups(batches: Batches, digests: list[bytes], done: set[int]) -> Iterator[Group]:
    """Groups of the inputs that are not recorded yet; ``ValueError`` if an input is another than when first read."""
    begun: list[tuple[int, NDArray[np.float32], NDArray[np.int64]]] = []
    count = 0
    for index, (x, y) in enumerate(_rows(batches)):
        if index >= len(digests) or _row_digest(x, y) != digests[index]:
            raise ValueError(f"batches are others when they are read again, from input {index} on; do not shuffle them")
        count += 1
        if index not in done:
            begun.append((index, x.copy(), y))
        if len(begun) == GROUP:
            yield _group(begun)
            begun = []
    if count < len(digests):
        raise ValueError(f"batches held {len(digests)} inputs when they were first read, and now {count}")
    if begun:
        yield _group(begun)


def _group(rows: list[tuple[int, NDArray[np.float32], NDArray[np.int64]]]) -> Group:
    indices, x, labels = zip(*rows, strict=True)
    return Group(np.array(indices, dtype=np.int64), np.stack(x), np.array(labels, dtype=np.int64))

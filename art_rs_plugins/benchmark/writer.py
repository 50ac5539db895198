"""Writing a record row by row, so that a killed run goes on where it stopped."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from art_rs_plugins.benchmark.files import companion, json_bytes, lock, make_folder, unwritable, write_atomic
from art_rs_plugins.benchmark.records import COHEN, NUMBERS, OURS, SCHEMA, parse, read_manifest
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.metrics import check_labels

__all__ = ["RecordWriter", "compare_versions"]

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "adversarial-robustness-toolbox", "numpy", "scipy", "art-rs-plugins")
_DECISIVE = ("torch", "art-rs-plugins")
"""Packages of which another version may draw other noise or compute other logits."""


def _versions() -> dict[str, str]:
    """Versions of what decides the digits, from the installed packages' metadata: nothing is imported for it."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


def compare_versions(path: Path, known: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Log a warning for each package that may have made the rows of a record otherwise than it would make them now."""
    theirs = known.get("versions", {})
    for name in _DECISIVE:
        if theirs.get(name) != ours.get(name):
            logger.warning(
                "%s was begun with %s %s and goes on with %s; its rows may differ in their last digits",
                path,
                name,
                theirs.get(name, "of an unknown version"),
                ours.get(name, "an unknown version"),
            )


class RecordWriter:
    """Appends rows to a record; enter it with ``with``. A run that was killed goes on where it stopped.

    Parameters
    ----------
    path : path
        The TSV; its folder is made if need be.
    config : mapping of JSON values
        What the user chose and the rows depend on, such as data, model, sigma, n, n0, alpha and seed.
    facts : mapping of JSON values, optional
        What the rows depend on beyond that, such as device, dtype, block and the digests of network, data and index
        list. They stand beside ``config`` in the manifest.
    notes : mapping of JSON values, optional
        What else the manifest shall say, such as the command line; a run that goes on may say something else.

    Attributes
    ----------
    done : set of int
        Indices of the inputs whose rows are in the file.
    device : str or None
        Device that votes, as the facts say.

    Raises
    ------
    ValueError, TypeError
        On entry, if the file belongs to a run with another config or other facts, has no manifest, or is not a record;
        or if these are no JSON values.
    OSError
        If it cannot be written, or is being written by another process (BlockingIOError).

    Notes
    -----
    The manifest is there, in full, before the first row. Rows are whole and on the disk when `append` returns; a torn
    last line is cut off on entry, with a logged warning. The file is locked while it is open; a lock ends with its
    process, however that ends.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        facts: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        # Through JSON and back, so that a tuple equals the list that it is read as.
        self._config = json.loads(json_bytes(dict(config), "config"))
        self._facts = json.loads(json_bytes(dict(facts or {}), "facts"))
        self._notes = json.loads(json_bytes(dict(notes or {}), "notes"))
        self.device: str | None = self._facts.get("device")
        self.done: set[int] = set()
        self._kind: str | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        known = read_manifest(self.path)
        if known is not None:
            self.check(known)
            compare_versions(self.path, known, _versions())
        elif self.path.exists() and self.path.stat().st_size:
            raise ValueError(
                f"{self.path} has no {companion(self.path, 'manifest').name} beside it, so nobody knows what its rows "
                "depend on; choose another output path, or delete it"
            )
        make_folder(self.path)
        try:
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _begin(self) -> None:
        """With the file open: make sure that it is ours alone, and whole."""
        assert self._file is not None
        lock(self._file, self.path)
        known = read_manifest(self.path)
        if known is None:   # before any row
            write_atomic(companion(self.path, "manifest"), json_bytes(self._manifest(), "manifest"))
        else:
            self.check(known)   # another process may have begun it in between
        self._recover()
        if self.path.stat().st_size == 0:
            # An audit of rows that are no longer there would be taken for one of the new rows.
            companion(self.path, "audit").unlink(missing_ok=True)
            self._write("\t".join((*COHEN, *OURS)) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _manifest(self) -> dict[str, Any]:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        versions = {"schema": SCHEMA, "created": created, "versions": _versions()}
        return {**versions, **self._facts, **self._notes, "config": self._config}

    def check(self, known: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` if the manifest of another run has other settings, and say which."""
        differences = _differences("", known, self._facts, self._facts)
        theirs = known.get("config", {})
        differences += _differences("config.", theirs, self._config, {*theirs, *self._config})
        if differences:
            raise ValueError(
                f"{self.path} belongs to a run with other settings: {'; '.join(differences)}. "
                f"Choose another output path, or delete it and {companion(self.path, 'manifest').name}"
            )

    def _recover(self) -> None:
        """Cut off a torn last line, and learn which rows are there."""
        data = self.path.read_bytes()
        size = data.rfind(b"\n") + 1
        if size:
            header, rows = parse(data[:size].decode("utf-8", errors="replace"), self.path)
            if tuple(header) != (*COHEN, *OURS):
                raise ValueError(f"{self.path} has other columns than this version writes; choose another output path")
            self.done = {row["idx"] for row in rows}
            self._kind = rows[0]["kind"] if rows else None
        if size < len(data):
            logger.warning("%s: cut off an incomplete last line; its input is certified again", self.path)
            try:
                os.truncate(self.path, size)
            except OSError as error:
                raise unwritable(self.path, error) from error

    def _write(self, text: str) -> None:
        """Put whole lines on the disk, or leave the file as it was."""
        if self._file is None:
            raise ValueError("the writer is closed; use it as: with RecordWriter(path, config) as writer")
        before, data = os.fstat(self._file.fileno()).st_size, text.encode()
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise

    def append(self, certificates: Certificates, labels: ArrayLike, seconds: ArrayLike) -> None:
        """Write the rows of b inputs; they are on the disk when it returns.

        Parameters
        ----------
        certificates : Certificates
            Of b inputs, in l2, of the same kind as the rows before; ``index`` goes into the column ``idx``.
        labels : array_like of int, shape (b,)
            True classes, >= 0.
        seconds : float or array_like of float, shape (b,)
            Time spent on each input.

        Raises
        ------
        ValueError, TypeError
            If a row is there already, the kind or norm is another, or labels or seconds do not fit.
        OSError
            If the disk refuses; the file is then as it was before.
        """
        known, indices = check_labels(labels, len(certificates)), certificates.index.tolist()
        if certificates.norm != 2.0:
            raise ValueError(f"a record holds l2 radii, got certificates in norm {certificates.norm}")
        if self._kind not in (None, certificates.kind):
            raise ValueError(
                f"{self.path} holds {self._kind} certificates, got {certificates.kind} ones; use a path for each kind"
            )
        again = self.done.intersection(indices)
        if again or len(set(indices)) < len(indices):
            raise ValueError(f"an index may come once, but {again or indices} is not new; leave out those in `done`")
        if np.any(known < 0):
            raise ValueError(f"labels must be >= 0 (class indices), got {known.min()}")
        times = np.broadcast_to(np.asarray(seconds, dtype=np.float64), known.shape)
        if not np.all(np.isfinite(times)):
            raise ValueError(f"seconds must be finite, got {seconds!r}")
        if indices:
            self._write(_lines(certificates, known, times))
            self.done.update(indices)
            self._kind = certificates.kind


def _differences(prefix: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What to say of the `names` that are not the same on both sides."""
    return [
        f"{prefix}{name} is {theirs.get(name, 'absent')!r} there and {ours.get(name, 'absent')!r} here"
        for name in sorted(names)
        if (name in theirs) != (name in ours) or theirs.get(name) != ours.get(name)
    ]


def _lines(certificates: Certificates, labels: NDArray[np.int64], seconds: NDArray[np.float64]) -> str:
    """Rows of the TSV, every float with all its digits."""
    predict = np.where(certificates.abstained, -1, certificates.prediction)
    cells: dict[str, list[Any]] = {
        "idx": certificates.index.tolist(),
        "label": labels.tolist(),
        "predict": predict.tolist(),
        "radius": certificates.radius.tolist(),
        "correct": (predict == labels).astype(np.int64).tolist(),
        "time": seconds.tolist(),
        "kind": [certificates.kind] * len(certificates),
    }
    cells |= {name: getattr(certificates, name).tolist() for name in NUMBERS}
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
    writer.writerows(zip(*(cells[name] for name in (*COHEN, *OURS)), strict=True))
    return stream.getvalue()

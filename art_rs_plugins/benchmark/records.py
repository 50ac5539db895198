"""Result tables: one row for each input, Cohen's six columns first; a manifest beside them; digests.

A record is a TSV that any tool for Cohen's logs reads, written so that a killed run can go on where it stopped.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import os
import platform
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from art_rs_plugins.theory.certificates import Certificates, Kind
from art_rs_plugins.theory.metrics import check_labels

__all__ = [
    "Record",
    "RecordWriter",
    "companion",
    "digest",
    "read_manifest",
    "read_record",
    "to_certificates",
    "write_atomic",
    "write_parquet",
]

logger = logging.getLogger(__name__)

_COHEN = ("idx", "label", "predict", "radius", "correct", "time")
_OURS = ("sigma", "p_lower", "p_upper", "count", "runner_up_count", "n", "n0", "alpha", "kind", "seed")
_NUMBERS = tuple(name for name in _OURS if name != "kind")
_INTEGERS = ("idx", "label", "predict", "correct", "count", "runner_up_count", "n", "n0", "seed")
_CLOCK = re.compile(r"(\d+):([0-5]?\d):([0-5]?\d(?:\.\d*)?)")
_PACKAGES = ("torch", "adversarial-robustness-toolbox", "numpy", "scipy", "art-rs-plugins")


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One result table; arrays of shape (b,), one entry for each input, in the order of the file.

    Attributes
    ----------
    path : Path
        Where it was read.
    idx, label, predict : int64
        Index of the input in its data set, true class, predicted class (-1 where abstained).
    radius : float64
        Radius in the units of the input; 0 where abstained.
    correct : bool
        True where ``predict == label``.
    time : float64
        Seconds spent on the input.
    columns : dict
        The columns beyond Cohen's six that the file has, by name: ``sigma``, ``p_lower``, ``p_upper``, ``alpha``
        (float64), ``count``, ``runner_up_count``, ``n``, ``n0``, ``seed`` (int64).
    kind : str or None
        Kind of all its certificates; None where the file does not say.
    manifest : dict or None
        What was written beside the table, if anything.
    """

    path: Path
    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.bool_]
    time: NDArray[np.float64]
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)
    kind: Kind | None = None
    manifest: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.idx)

    @property
    def name(self) -> str:
        """Name of the file, without ``.tsv``."""
        return self.path.name.removesuffix(".tsv")

    @property
    def abstained(self) -> NDArray[np.bool_]:
        """Mask (b,) of the rows that abstain."""
        return np.asarray(self.predict == -1)


def companion(path: str | Path, what: str) -> Path:
    """Path of the JSON file that belongs to a record: ``run.tsv`` has ``run.manifest.json`` and ``run.audit.json``."""
    record = Path(path)
    return record.with_name(f"{record.name.removesuffix('.tsv')}.{what}.json")


def digest(value: NDArray[Any] | bytes | str | Path) -> str:
    """SHA-256 in hexadecimal of an array (dtype, shape and values), of bytes, or of the contents of a file.

    Examples
    --------
    >>> digest(b"")[:8]
    'e3b0c442'
    """
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if isinstance(value, str | Path):
        with open(value, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if value.dtype.hasobject:
        raise TypeError(f"value has dtype {value.dtype}, whose bytes say nothing; convert it to numbers first")
    header = f"{value.dtype} {value.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(value).tobytes()).hexdigest()


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that it is there in full or not at all; its folder is made if need be.

    Raises
    ------
    OSError
        Where the folder cannot be made or written; the message says what to do.
    """
    target = Path(path)
    _make_folder(target)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> OSError:
    reason = f"cannot write here ({error.strerror or error}); choose an output path in a folder that you may write to"
    return type(error)(error.errno, reason, str(target))


def json_bytes(value: Mapping[str, Any], name: str) -> bytes:
    """Strict JSON in UTF-8, or an error that names the argument `name`."""
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name} must hold JSON values only, and no NaN or infinity: {error}") from error


def load_json(path: Path) -> dict[str, Any]:
    """JSON object in a file; ``ValueError`` that names the file where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it, or delete it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}; restore or delete it")
    return dict(value)


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """Manifest beside the record at `path`, or None; ``ValueError`` if it is not a JSON object."""
    beside = companion(path, "manifest")
    return load_json(beside) if beside.exists() else None


def _seconds(text: str) -> float:
    """Seconds from ``15.4`` or ``0:00:14.206886``."""
    clock = _CLOCK.fullmatch(text)
    if clock is None:
        return float(text)
    hours, minutes, seconds = clock.groups()
    return 3600.0 * int(hours) + 60.0 * int(minutes) + float(seconds)


def _value(column: str, text: str) -> Any:
    """One cell in its type; ``ValueError`` where it is none."""
    if column == "kind":
        if text not in get_args(Kind):
            raise ValueError(f"must be one of {', '.join(get_args(Kind))}")
        return text
    if column in _INTEGERS:
        number = int(text)
        if not -(2**63) <= number < 2**63:
            raise ValueError("must fit in 64 bits")
        return number
    value = _seconds(text) if column == "time" else float(text)
    if not np.isfinite(value):
        raise ValueError("must be finite")
    return value


def _parse_row(cells: Sequence[str], header: Sequence[str], where: str) -> dict[str, Any]:
    """Values of one row by column, checked on their own and against each other."""
    if len(cells) != len(header):
        raise ValueError(f"{where}: {len(cells)} cells under {len(header)} columns; repair or delete this line")
    row: dict[str, Any] = {}
    for column, text in zip(header, cells, strict=True):
        if column not in (*_COHEN, *_OURS):
            continue
        try:
            row[column] = _value(column, text)
        except ValueError as error:
            raise ValueError(f"{where}: {column} is {text!r} ({error}); repair or delete this line") from None
    if row["radius"] < 0 or (row["predict"] == -1 and row["radius"] != 0):
        raise ValueError(
            f"{where}: radius is {row['radius']} with predict {row['predict']}; "
            "a radius is >= 0, and 0 where predict is -1 (abstained): repair or delete this line"
        )
    if row["predict"] < -1 or row["label"] < 0 or row["idx"] < 0:
        raise ValueError(f"{where}: idx, label must be >= 0 and predict >= -1; repair or delete this line")
    if row["correct"] != int(row["label"] == row["predict"]):
        raise ValueError(
            f"{where}: correct is {row['correct']}, but label is {row['label']} and predict is {row['predict']}; "
            "it must be 1 where they agree and 0 elsewhere: repair or delete this line"
        )
    return row


def _parse(text: str, path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Header and rows of a TSV; ``ValueError`` naming file and line where it is none."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(lines, [])
    missing = [column for column in _COHEN if column not in header]
    if missing:
        raise ValueError(
            f"{path}, line 1: no column {', '.join(missing)}; "
            f"a record is tab-separated and starts with the header {' '.join(_COHEN)}"
        )
    rows: list[dict[str, Any]] = []
    seen: dict[int, int] = {}
    for number, cells in enumerate(lines, start=2):
        row = _parse_row(cells, header, f"{path}, line {number}")
        if row["idx"] in seen:
            raise ValueError(
                f"{path}, line {number}: idx {row['idx']} is on line {seen[row['idx']]} already; "
                "an input counts once: delete one of the lines"
            )
        if row.get("kind") != (rows or [row])[0].get("kind"):
            raise ValueError(
                f"{path}, line {number}: kind is {row['kind']!r}, but {rows[0]['kind']!r} before; "
                "one record holds one kind: split the file"
            )
        seen[row["idx"]] = number
        rows.append(row)
    return header, rows


def read_record(path: str | Path) -> Record:
    """Read a result table of ours, or a log in the format of Cohen et al.

    Parameters
    ----------
    path : path
        Tab-separated, with the columns ``idx label predict radius correct time`` at least; time in seconds or as
        ``h:mm:ss.ffffff``. Columns of other names are left out. An incomplete last line of a table of ours, as a killed
        run leaves it, is left out with a logged warning.

    Returns
    -------
    Record

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is empty, has no rows, lacks columns, or a row is wrong; the message names file, line and remedy.

    Notes
    -----
    *Source.* The logs of Cohen et al. (2019), github.com/locuslab/smoothing.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no record at {source}; give the path of a .tsv that a certification run wrote")
    text = source.read_bytes().decode("utf-8", errors="replace")
    if not text.strip():
        raise ValueError(f"{source} is empty; delete it, or certify again")
    whole = text[: text.rfind("\n") + 1]
    if whole != text and "p_lower" in text.partition("\n")[0]:
        logger.warning("%s: left out an incomplete last line; resume the run to complete it", source)
        text = whole
    header, rows = _parse(text, source)
    if not rows:
        raise ValueError(f"{source} has a header but no rows; resume the run that began it, or delete it")
    return _record(source, header, rows)


def _record(path: Path, header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Record:
    def column(name: str) -> NDArray[Any]:
        return np.array([row[name] for row in rows], dtype=np.int64 if name in _INTEGERS else np.float64)

    return Record(
        path=path,
        idx=column("idx"),
        label=column("label"),
        predict=column("predict"),
        radius=column("radius"),
        correct=column("correct").astype(np.bool_),
        time=column("time"),
        columns={name: column(name) for name in _NUMBERS if name in header},
        kind=rows[0].get("kind"),
        manifest=read_manifest(path),
    )


def to_certificates(record: Record) -> Certificates:
    """Rebuild the l2 certificates of a record, bit for bit; the labels stay behind in ``record.label``.

    Where abstained, ``prediction`` is -1: the class that would have been certified is not in the file.

    Raises
    ------
    ValueError
        If the record lacks columns of ours, as Cohen's logs do.
    """
    missing = [name for name in _NUMBERS if name not in record.columns]
    if missing or record.kind is None:
        raise ValueError(
            f"{record.path} lacks the column {', '.join(missing or ['kind'])}, without which no certificate can be "
            "rebuilt; certify again, or read radius and correct of the record itself"
        )
    numbers: dict[str, Any] = record.columns
    return Certificates(
        prediction=record.predict,
        radius=record.radius,
        abstained=record.abstained,
        index=record.idx,
        kind=record.kind,
        **numbers,
    )


def write_parquet(records: Sequence[Record], path: str | Path) -> None:
    """Write records as one Parquet file, for data frames.

    Parameters
    ----------
    records : sequence of Record
        At least one. The column ``record`` holds their names; a column that one of them lacks is null in its rows.
    path : path
        The file; the manifests go into its metadata as JSON, by name, under ``manifests``.

    Raises
    ------
    ImportError
        Without pyarrow.
    ValueError
        For no records.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'art-rs-plugins[tables]'") from error
    if not records:
        raise ValueError("records must hold at least one record")
    tables = []
    for record in records:
        columns: dict[str, Any] = {name: pyarrow.array(getattr(record, name)) for name in _COHEN}
        columns |= {name: pyarrow.array(array) for name, array in record.columns.items()}
        columns |= {"kind": pyarrow.array([record.kind] * len(record), pyarrow.string())}
        tables.append(pyarrow.table({"record": [record.name] * len(record), **columns}))
    manifests = json.dumps({record.name: record.manifest for record in records})
    table = pyarrow.concat_tables(tables, promote_options="default").replace_schema_metadata({"manifests": manifests})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())


def _versions() -> dict[str, str]:
    """Versions of what decides the digits, from the installed packages' metadata: nothing is imported for it."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}


class RecordWriter:
    """Appends rows to a record; enter it with ``with``. A run that was killed goes on where it stopped.

    Parameters
    ----------
    path : path
        The TSV; its folder is made if need be.
    config : mapping of JSON values
        What the user chose and the rows depend on, such as data, model, sigma, n, n0, alpha and seed.
    facts : mapping of JSON values, optional
        What the rows depend on beyond that, such as device, dtype, block and the digests of weights, data and index
        list; and ``command``, which they do not depend on. They stand beside ``config`` in the manifest.

    Attributes
    ----------
    done : set of int
        Indices of the inputs whose rows are in the file.

    Raises
    ------
    ValueError, TypeError
        On entry, if the file belongs to a run with another config or other facts, has no manifest, or is not a record;
        or if these are no JSON values.
    OSError
        If it cannot be written.

    Notes
    -----
    The manifest is there, in full, before the first row. Rows are whole and on the disk when `append` returns; a torn
    last line is cut off on entry. Only one process may write a record at a time.
    """

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        # Through JSON and back, so that a tuple equals the list that it is read as.
        self._config = json.loads(json_bytes(dict(config), "config"))
        self._facts = json.loads(json_bytes(dict(facts or {}), "facts"))
        self.done: set[int] = set()
        self._kind: str | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        known = read_manifest(self.path)
        if known is not None:
            self._check_same(known)
        elif self.path.exists():
            raise ValueError(
                f"{self.path} has no {companion(self.path, 'manifest').name} beside it, so nobody knows what its rows "
                "depend on; choose another output path, or delete it"
            )
        else:
            write_atomic(companion(self.path, "manifest"), json_bytes(self._manifest(), "manifest"))
        self._recover()
        try:
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        if self.path.stat().st_size == 0:
            self._write("\t".join((*_COHEN, *_OURS)) + "\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _manifest(self) -> dict[str, Any]:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return {"created": created, "versions": _versions(), **self._facts, "config": self._config}

    def _check_same(self, known: Mapping[str, Any]) -> None:
        facts = {name: value for name, value in self._facts.items() if name != "command"}
        differences = _differences("", known, facts, facts)
        theirs = known.get("config", {})
        differences += _differences("config.", theirs, self._config, {*theirs, *self._config})
        if differences:
            raise ValueError(
                f"{self.path} belongs to a run with other settings: {'; '.join(differences)}. "
                f"Choose another output path, or delete it and {companion(self.path, 'manifest').name}"
            )

    def _recover(self) -> None:
        """Cut off a torn last line, and learn which rows are there."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        size = data.rfind(b"\n") + 1
        if size:
            header, rows = _parse(data[:size].decode("utf-8", errors="replace"), self.path)
            if tuple(header) != (*_COHEN, *_OURS):
                raise ValueError(f"{self.path} has other columns than this version writes; choose another output path")
            self.done = {row["idx"] for row in rows}
            self._kind = rows[0]["kind"] if rows else None
        if size < len(data):
            try:
                os.truncate(self.path, size)
            except OSError as error:
                raise _unwritable(self.path, error) from error

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
    cells |= {name: getattr(certificates, name).tolist() for name in _NUMBERS}
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
    writer.writerows(zip(*(cells[name] for name in (*_COHEN, *_OURS)), strict=True))
    return stream.getvalue()

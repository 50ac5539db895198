"""Result tables: one row for each input, Cohen's six columns first; a manifest beside them.

A record is a TSV that any tool for Cohen's logs reads; `writer` makes them.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.benchmark.files import companion, digest, load_json, write_atomic
from art_rs_plugins.theory.certificates import Certificates, Kind

__all__ = [
    "COHEN",
    "NUMBERS",
    "OURS",
    "SCHEMA",
    "Record",
    "parse",
    "read_manifest",
    "read_record",
    "rows_digest",
    "to_certificates",
    "write_parquet",
]

logger = logging.getLogger(__name__)

COHEN = ("idx", "label", "predict", "radius", "correct", "time")
OURS = ("sigma", "p_lower", "p_upper", "count", "runner_up_count", "n", "n0", "alpha", "kind", "seed", "passes")
SCHEMA = 1
"""Of the manifests that this version writes, and the newest that it reads; those without a number are older."""
NUMBERS = tuple(name for name in OURS if name != "kind")
_INTEGERS = ("idx", "label", "predict", "correct", "count", "runner_up_count", "n", "n0", "seed", "passes")
_CLOCK = re.compile(r"(\d+):([0-5]?\d):([0-5]?\d(?:\.\d*)?)")


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
        (float64), ``count``, ``runner_up_count``, ``n``, ``n0``, ``seed``, ``passes`` (int64).
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


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """Manifest beside the record at `path`, or None; ``ValueError`` if it is no JSON object, or of a newer schema."""
    beside = companion(path, "manifest")
    if not beside.exists():
        return None
    manifest = load_json(beside)
    schema = manifest.get("schema", SCHEMA)
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ValueError(
            f"{beside} has schema {schema!r}, and this version of art-rs-plugins reads up to {SCHEMA}: update it, or "
            "choose another output path"
        )
    return manifest


def rows_digest(record: Record) -> str:
    """SHA-256 in hexadecimal of what the rows of a record claim: indices, labels, classes, radii and their kind."""
    parts = [digest(rows) for rows in (record.idx, record.label, record.predict, record.radius)]
    return digest(" ".join([*parts, str(record.kind)]).encode())


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
        if column not in (*COHEN, *OURS):
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


def parse(text: str, path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Header and rows of a TSV; ``ValueError`` naming file and line where it is none."""
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(lines, [])
    missing = [column for column in COHEN if column not in header]
    if missing:
        raise ValueError(
            f"{path}, line 1: no column {', '.join(missing)}; "
            f"a record is tab-separated and starts with the header {' '.join(COHEN)}"
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
    header, rows = parse(text, source)
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
        columns={name: column(name) for name in NUMBERS if name in header},
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
    missing = [name for name in NUMBERS if name not in record.columns and name != "passes"]   # old records lack it
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
        performance=str((record.manifest or {}).get("performance", "float32")),
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
        columns: dict[str, Any] = {name: pyarrow.array(getattr(record, name)) for name in COHEN}
        columns |= {name: pyarrow.array(array) for name, array in record.columns.items()}
        columns |= {"kind": pyarrow.array([record.kind] * len(record), pyarrow.string())}
        tables.append(pyarrow.table({"record": [record.name] * len(record), **columns}))
    manifests = json.dumps({record.name: record.manifest for record in records})
    table = pyarrow.concat_tables(tables, promote_options="default").replace_schema_metadata({"manifests": manifests})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())

"""Audits on disk, and the outcomes of each attack behind them, beside the record whose rows they speak of."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.benchmark.files import companion, digest, json_bytes, load_json, write_atomic
from art_rs_plugins.benchmark.nearest import Nearest, from_arrays, to_arrays
from art_rs_plugins.benchmark.records import Record, rows_digest
from art_rs_plugins.benchmark.tables import kind_of
from art_rs_plugins.theory.audit import AttackOutcomes, Audit, Contradiction
from art_rs_plugins.theory.metrics import Curve

__all__ = [
    "AUDITED",
    "AttackRun",
    "audit_from_json",
    "audit_to_json",
    "load_audits",
    "load_run",
    "save_audits",
    "save_run",
]

logger = logging.getLogger(__name__)

AUDITED = ("certified", "exact")
"""Kinds of certificates that an attack can contradict."""


def audit_to_json(audit: Audit) -> dict[str, Any]:
    """Audit as JSON values; floats keep all their digits. `audit_from_json` goes back."""
    return {name: _plain(value) for name, value in asdict(audit).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def audit_from_json(value: Mapping[str, Any]) -> Audit:
    """Rebuild an audit from `audit_to_json`; ``ValueError`` where fields are missing or unknown."""

    def reals(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
        return {name: np.asarray(fields[name], dtype=np.float64) for name in names}

    try:
        curve = value["certified"]
        return Audit(
            **reals(value, "budgets", "correct", "abstained", "wrong"),
            certified=Curve(**{**curve, **reals(curve, "radii", "accuracy", "lower", "upper")}),
            total=int(value["total"]),
            suspected=tuple(Contradiction(**case) for case in value["suspected"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"value is not an audit ({error}); run the attack again to write it anew") from error


def save_audits(audits: Mapping[str, Audit], record: Record) -> Path:
    """Write audits beside their record, with the digest of the rows that they speak of; return where.

    Parameters
    ----------
    audits : mapping of Audit
        By attack, with ``"all"`` for the worst of them.
    record : Record
        As read from disk.
    """
    path = companion(record.path, "audit")
    values = {name: audit_to_json(audit) for name, audit in audits.items()}
    write_atomic(path, json_bytes({"record_sha256": rows_digest(record), "audits": values}, "audits"))
    return path


def load_audits(records: Sequence[Record]) -> tuple[list[dict[str, Audit] | None], list[str]]:
    """Audits beside records, as far as they speak of the rows that are there now.

    Parameters
    ----------
    records : sequence of Record
        As read from disk.

    Returns
    -------
    audits : list of dict of Audit, or None
        By attack, with ``"all"`` for the worst of them; None where there is none, or where it was left out.
    notes : list of str
        Why audits were left out, a sentence for each; they are logged as well, and belong into the report.

    Raises
    ------
    ValueError
        For a damaged audit; the message names the file.
    """
    found: list[dict[str, Audit] | None] = []
    notes: list[str] = []
    for record in records:
        path = companion(record.path, "audit")
        value = load_json(path) if path.exists() else None
        reason = None if value is None else _unfit(value, record)
        if reason is not None:
            notes.append(f"{path.name} was left out: {reason}.")
            logger.warning("%s was left out: %s", path, reason)
        found.append(None if value is None or reason is not None else _read(value, path))
    return found, notes


def _unfit(value: Mapping[str, Any], record: Record) -> str | None:
    """Why an audit says nothing about a record, if so."""
    if value.get("record_sha256") != rows_digest(record):
        return f"it speaks of other rows than {record.path.name} has now; attack the record again"
    if kind_of(record) not in AUDITED:
        return f"{kind_of(record)} certificates are not certified accuracy, and no attack audits them"
    return None


def _read(value: Mapping[str, Any], path: Path) -> dict[str, Audit]:
    try:
        audits = {str(name): audit_from_json(audit) for name, audit in value["audits"].items()}
        return audits | {"all": audits["all"]}
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{path} holds no audits by attack ({error}); attack the record again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ---------------------------------------------------------------------------------------------- one attack


@dataclass(frozen=True, slots=True, eq=False)
class AttackRun:
    """One attack on a record.

    Attributes
    ----------
    rows : int64, shape (b,)
        Rows of the record that it took.
    outcomes : AttackOutcomes
        Of these, in the same order.
    nearest : Nearest
        Nearest examples of the first of them.
    """

    rows: NDArray[np.int64]
    outcomes: AttackOutcomes
    nearest: Nearest


_OUTCOMES = ("budgets", "prediction", "abstained", "distance", "confirmed")


def _run_path(record: Record, name: str) -> Path:
    return record.path.with_name(f"{record.name}.{name}.attack.npz")


def _key(record: Record, settings: Mapping[str, Any]) -> str:
    """What must agree for a run to be taken from disk."""
    return digest(rows_digest(record).encode() + json_bytes(settings, "settings"))


def save_run(record: Record, run: AttackRun, settings: Mapping[str, Any]) -> None:
    """Write the outcomes of one attack beside its record: ``run.pgd.attack.npz``, for `load_run` to find."""
    outcomes, stream = run.outcomes, io.BytesIO()
    arrays: dict[str, Any] = {"key": np.array(_key(record, settings)), "rows": run.rows}
    arrays |= {"n": np.array(outcomes.n), "alpha": np.array(outcomes.alpha)}
    arrays |= {f"outcomes_{name}": getattr(outcomes, name) for name in _OUTCOMES}
    arrays |= {f"nearest_{name}": values for name, values in to_arrays(run.nearest).items()}
    np.savez(stream, allow_pickle=False, **arrays)
    write_atomic(_run_path(record, outcomes.name), stream.getvalue())


def load_run(record: Record, name: str, settings: Mapping[str, Any]) -> AttackRun | None:
    """Outcomes of one attack, if they are there, whole, and of the same rows and settings."""
    path = _run_path(record, name)
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            if str(arrays["key"]) != _key(record, settings):
                return None
            parts = {field: arrays[f"outcomes_{field}"] for field in _OUTCOMES}
            outcomes = AttackOutcomes(name=name, n=int(arrays["n"]), alpha=float(arrays["alpha"]), **parts)
            start = "nearest_"
            found = {key.removeprefix(start): arrays[key] for key in arrays.files if key.startswith(start)}
            return AttackRun(arrays["rows"], outcomes, from_arrays(found))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        logger.warning("%s is damaged, and the attack runs again", path)
        return None

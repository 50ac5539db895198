"""Audits on disk, beside the record whose rows they speak of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from art_rs_plugins.benchmark.files import companion, json_bytes, load_json, write_atomic
from art_rs_plugins.benchmark.records import Record, rows_digest
from art_rs_plugins.benchmark.tables import kind_of
from art_rs_plugins.theory.audit import Audit, Contradiction
from art_rs_plugins.theory.metrics import Curve

__all__ = ["AUDITED", "audit_from_json", "audit_to_json", "load_audits", "save_audit"]

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


def save_audit(audit: Audit, record: Record) -> Path:
    """Write an audit beside its record, with the digest of the rows that it speaks of; return where."""
    path = companion(record.path, "audit")
    write_atomic(path, json_bytes({"record_sha256": rows_digest(record), **audit_to_json(audit)}, "audit"))
    return path


def load_audits(records: Sequence[Record]) -> tuple[list[Audit | None], list[str]]:
    """Audits beside records, as far as they speak of the rows that are there now.

    Parameters
    ----------
    records : sequence of Record
        As read from disk.

    Returns
    -------
    audits : list of Audit or None
        None where there is none, or where it was left out.
    notes : list of str
        Why audits were left out, a sentence for each; they are logged as well, and belong into the report.

    Raises
    ------
    ValueError
        For a damaged audit; the message names the file.
    """
    found: list[Audit | None] = []
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


def _read(value: Mapping[str, Any], path: Path) -> Audit:
    try:
        return audit_from_json(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

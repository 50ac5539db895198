"""Audits on disk, beside the record whose rows they speak of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from art_rs_plugins.benchmark.records import Record, companion, json_bytes, load_json, rows_digest, write_atomic
from art_rs_plugins.theory.audit import Audit, Contradiction
from art_rs_plugins.theory.metrics import Curve

__all__ = ["audit_from_json", "audit_to_json", "load_audits", "save_audit"]

logger = logging.getLogger(__name__)


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


def save_audit(audit: Audit, record: str | Path) -> Path:
    """Write an audit beside the record at `record`, whole or not at all; return where."""
    path = companion(record, "audit")
    write_atomic(path, json_bytes(audit_to_json(audit), "audit"))
    return path


def load_audit(record: str | Path) -> Audit | None:
    """Audit beside the record at `record`, or None; ``ValueError``, naming the file, if it is damaged."""
    path = companion(record, "audit")
    if not path.exists():
        return None
    try:
        return audit_from_json(load_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

"""Records of the same inputs, compared input by input: what differs, and by how much more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tabulate import tabulate

from art_rs_plugins.benchmark.records import Record
from art_rs_plugins.benchmark.tables import record_labels, summarize
from art_rs_plugins.theory.metrics import paired_difference

__all__ = ["paired"]


def paired(records: Sequence[Record], radii: Sequence[float]) -> str | None:
    """Table, in Markdown, of each certified record against the first of them.

    Parameters
    ----------
    records : sequence of Record
        Of the same inputs; what is not certified or exact is left out.
    radii : sequence of float
        Radii at which accuracy is compared.

    Returns
    -------
    str or None
        Differences of certified accuracy at the radii, and of the ACR, with standard errors; None where there are not
        two records to compare.

    Raises
    ------
    ValueError
        If the records are not of the same inputs.
    """
    kept = [_sorted(record) for record in records if summarize(record).section == "certified"]
    if len(kept) < 2:
        return None
    first, rows = kept[0], []
    for label, record in zip(record_labels(kept)[1:], kept[1:], strict=True):
        same = np.array_equal(record.idx, first.idx) and np.array_equal(record.label, first.label)
        if not same or _data(record) != _data(first):
            raise ValueError(f"{record.path} and {first.path} hold other inputs, so that they cannot be compared")
        values = [_gain(_right(record, radius), _right(first, radius)) for radius in radii]
        values.append(_gain(np.where(record.correct, record.radius, 0.0), np.where(first.correct, first.radius, 0.0)))
        rows.append([label, *values])
    head = ["", *(f"r={radius:g}" for radius in radii), "ACR"]
    return tabulate(rows, head, tablefmt="github") + "\n"


def _sorted(record: Record) -> Record:
    """The same record with its rows in the order of their indices."""
    order = np.argsort(record.idx)
    names = ("idx", "label", "predict", "radius", "correct")
    return replace(record, **{name: getattr(record, name)[order] for name in names})


def _data(record: Record) -> str | None:
    return (record.manifest or {}).get("data_sha256")


def _right(record: Record, radius: float) -> np.ndarray:
    return (record.correct & ~record.abstained & (record.radius >= radius)).astype(np.float64)


def _gain(values: np.ndarray, baseline: np.ndarray) -> str:
    difference, error = paired_difference(values, baseline)
    return f"{difference:+.3f} ± {error:.3f}"

"""Reports out of records: tables in six formats, and one self-contained page. No model is needed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from art_rs_plugins.benchmark.audits import AUDITED
from art_rs_plugins.benchmark.files import write_atomic
from art_rs_plugins.benchmark.page import render_page
from art_rs_plugins.benchmark.records import Record, write_parquet
from art_rs_plugins.benchmark.tables import (
    RADII,
    TEXT,
    Summary,
    audit_cells,
    case_cells,
    count_cases,
    leaderboard,
    record_labels,
    sections,
    summarize,
    undecided,
)
from art_rs_plugins.theory.audit import Audit

__all__ = ["FORMATS", "audit_text", "demo_table", "render", "write_leaderboard", "write_report"]

FORMATS = ("html", "md", "csv", "latex", "json", "text")
"""What `render` can write; `write_report` adds ``parquet``."""


def _by_radius(values: NDArray[np.float64], radii: Iterable[float] = RADII) -> dict[str, float]:
    return {f"{radius:g}": float(value) for radius, value in zip(radii, values, strict=True)}


def _as_json(label: str, summary: Summary, audit: Audit | None) -> dict[str, Any]:
    """One record as JSON values; what is not certified stands under other names than what is."""
    values: dict[str, Any] = {"record": label}
    values |= {name: getattr(summary, name) for name in ("rows", "sigma", "n", "n0", "alpha", "kind", "abstain_rate")}
    accuracy = _by_radius(summary.curve.accuracy)
    if summary.section == "certified":
        values |= {
            "acr": summary.acr,
            "certified_accuracy": accuracy,
            "certified_accuracy_lower": _by_radius(summary.curve.lower),
            "certified_accuracy_upper": _by_radius(summary.curve.upper),
        }
    else:
        values |= {"acr": None, "certified_accuracy": None}
        values |= {f"{summary.kind}_acr": summary.acr, f"{summary.kind}_accuracy": accuracy}
    if audit is not None:
        values["audit"] = {
            "inputs": audit.total,
            "contradictions": len(audit.contradictions),
            "contradicted_inputs": len({case.index for case in audit.contradictions}),
            "undecided_budgets": undecided(audit),
            "attacked_accuracy": _by_radius(audit.attacked, audit.budgets),
            "certified_accuracy": _by_radius(audit.certified.accuracy, audit.budgets),
            "cases": [asdict(case) for case in audit.contradictions],
        }
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of names out of nested ones; lists are left to the other formats."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            row |= _flat(value, f"{prefix}{name}_")
        elif not isinstance(value, list):
            row[prefix + name] = value
    return row


def _csv(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [_flat(entry) for entry in entries]
    # A record without certified accuracy has null in place of the columns by radius.
    nested = {name for entry in entries for name, value in entry.items() if isinstance(value, Mapping)}
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in nested]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _table(rows: Sequence[Mapping[str, str]], form: str) -> str:
    # Strings stay as they are: "0.650" is not to become 0.65, nor a name "1e3" a number.
    align = ["left" if name in TEXT else "right" for name in rows[0]]
    bar = "\\|" if form == "github" else "|"
    cells = [{name: value.replace("|", bar) for name, value in row.items()} for row in rows]
    return tabulate(cells, "keys", form, disable_numparse=True, colalign=align)


def audit_text(audit: Audit) -> str:
    """Audit as plain text: the table by budget, then the number of contradictions and each of them."""
    cases = audit.contradictions
    parts = [_table(audit_cells(audit), "simple"), *_undecided(audit), f"Contradictions: {count_cases([audit])}"]
    return "\n".join([*parts, _table(case_cells(cases), "simple")] if cases else parts)


def _undecided(audit: Audit) -> list[str]:
    """The sentence that a calm count of contradictions must not go without, where it is due."""
    budgets = ", ".join(f"{budget:g}" for budget in undecided(audit))
    return [f"At budget {budgets} every input abstained: the votes decided nothing; raise n."] if budgets else []


def demo_table(results: Sequence[tuple[float, Record, Mapping[str, Audit]]]) -> str:
    """Certificates at several sigmas, then what each attack did to them, as plain text.

    Parameters
    ----------
    results : sequence of (sigma, record, audits by the name of the attack)
        At least one.
    """
    rows = [
        {"sigma": f"{sigma:g}", "attack": name, **cells}
        for sigma, _, audits in results
        for name, audit in audits.items()
        for cells in audit_cells(audit)
    ]
    return render([record for _, record, _ in results], "text") + "\n" + _table(rows, "simple")


def _tables(
    form: str,
    labels: Sequence[str],
    summaries: Sequence[Summary],
    audits: Sequence[Audit | None],
    notes: Sequence[str],
) -> str:
    """Markdown, LaTeX or plain text: a table for each section, then one for each audit."""
    style, heading = {
        "md": ("github", "## {}"),
        "latex": ("latex_booktabs", "\\paragraph*{{{}}}"),
        "text": ("simple", "{}"),
    }[form]
    parts: list[str] = []
    for title, rows in sections(labels, summaries).items():
        names = "Certified accuracy by l2 radius" if title == "certified" else f"Accuracy by l2 radius, {title}"
        parts += [heading.format(names), _table(rows, style)]
    for label, audit in zip(labels, audits, strict=True):
        if audit is not None:
            title = f"Attacks on {label} - contradictions: {count_cases([audit])}"
            parts += [heading.format(_escape_latex(title) if form == "latex" else title)]
            parts += [_table(audit_cells(audit), style), *_undecided(audit)]
            parts += [_table(case_cells(audit.contradictions), style)] if audit.contradictions else []
    parts += [_escape_latex(note) if form == "latex" else note for note in notes]
    return "\n\n".join(parts) + "\n"


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def render(
    records: Sequence[Record],
    format: str,
    audits: Sequence[Audit | None] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Render records as text.

    Parameters
    ----------
    records : sequence of Record
        At least one.
    format : str
        ``html`` (one self-contained page), ``md``, ``csv``, ``latex``, ``json`` or ``text``.
    audits : sequence of Audit or None, optional
        The attacks on each record, in the same order; None where there was none. CSV has their counts and accuracies,
        but no list of cases.
    notes : sequence of str
        Sentences to show with them, such as why an audit was left out; JSON and CSV have no place for them.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        For no records, an unknown format, another number of audits than of records, or an audit of certificates that
        are not certified accuracy.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not records:
        raise ValueError("records must hold at least one record")
    attacks = [None] * len(records) if audits is None else list(audits)
    if len(attacks) != len(records):
        raise ValueError(f"audits must hold one entry for each of {len(records)} records, got {len(attacks)}")
    labels, summaries = record_labels(records), [summarize(record) for record in records]
    for label, summary, audit in zip(labels, summaries, attacks, strict=True):
        if audit is not None and summary.kind is not None and summary.kind not in AUDITED:
            raise ValueError(f"audits: {label} holds {summary.kind} certificates, which no attack audits; give None")
    if format in ("json", "csv"):
        entries = [_as_json(*parts) for parts in zip(labels, summaries, attacks, strict=True)]
        return _csv(entries) if format == "csv" else json.dumps(entries, indent=2, allow_nan=False) + "\n"
    if format == "html":
        return render_page(labels, records, summaries, attacks, notes)
    return _tables(format, labels, summaries, attacks, notes)


def write_report(
    records: Sequence[Record],
    format: str,
    output: str | Path,
    audits: Sequence[Audit | None] | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Write what `render` returns, or the rows themselves as ``parquet``, to a file; whole or not at all.

    Raises
    ------
    ValueError, OSError, ImportError
        As `render`; where the file cannot be written; without pyarrow for Parquet.
    """
    if format == "parquet":
        write_parquet(records, output)
    elif format in FORMATS:
        write_atomic(output, render(records, format, audits, notes).encode())
    else:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, parquet, got {format!r}")


def write_leaderboard(records: Sequence[Record], stem: Path) -> str:
    """Write the table that compares records as Markdown, CSV and LaTeX beside one another; returns the Markdown.

    Parameters
    ----------
    records : sequence of Record
        At least one.
    stem : Path
        ``runs/leaderboard`` writes ``runs/leaderboard.md``, ``.csv`` and ``.tex``.
    """
    rows = leaderboard(records)
    note = "Accuracy by l2 radius, [95 % band]; what is not certified or exact is no certified accuracy."
    markdown = f"{_table(rows, 'github')}\n\n{note}\n"
    write_atomic(stem.with_suffix(".md"), markdown.encode())
    write_atomic(stem.with_suffix(".csv"), _csv(rows).encode())
    escaped = [{_escape_latex(name): _escape_latex(value) for name, value in row.items()} for row in rows]
    write_atomic(stem.with_suffix(".tex"), _table(escaped, "latex_raw").encode())
    return markdown

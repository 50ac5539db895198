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
from art_rs_plugins.benchmark.nearest import Nearest
from art_rs_plugins.benchmark.page import Entry, render_page
from art_rs_plugins.benchmark.records import Record, write_parquet
from art_rs_plugins.benchmark.tables import (
    LEGEND,
    RADII,
    TEXT,
    Summary,
    attack_cells,
    attack_rows,
    audit_cells,
    by_section,
    case_cells,
    count_cases,
    filled,
    kind_of,
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


def _as_json(label: str, summary: Summary, audits: Mapping[str, Audit] | None) -> dict[str, Any]:
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
    if audits is not None:
        values["audit"] = _audit_json(audits["all"])
        values["attacks"] = {name: _audit_json(audit) for name, audit in audits.items() if name != "all"}
    return values


def _audit_json(audit: Audit) -> dict[str, Any]:
    return {
        "inputs": audit.total,
        "contradictions": len(audit.contradictions),
        "contradicted_inputs": len({case.index for case in audit.contradictions}),
        "undecided_budgets": undecided(audit),
        "attacked_accuracy": _by_radius(audit.attacked, audit.budgets),
        "certified_accuracy": _by_radius(audit.certified.accuracy, audit.budgets),
        "cases": [asdict(case) for case in audit.contradictions],
    }


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
    rows = [{"sigma": f"{sigma:g}", **cells} for sigma, _, audits in results for cells in attack_cells(audits)]
    return render([record for _, record, _ in results], "text") + "\n" + _table(rows, "simple")


def _tables(
    form: str,
    labels: Sequence[str],
    summaries: Sequence[Summary],
    attacks: Sequence[Mapping[str, Audit] | None],
    notes: Sequence[str],
    extras: Sequence[tuple[str, str]],
) -> str:
    """Markdown, LaTeX or plain text: a table for each section, then one for each record's attacks."""
    style, heading = {
        "md": ("github", "## {}"),
        "latex": ("latex_booktabs", "\\paragraph*{{{}}}"),
        "text": ("simple", "{}"),
    }[form]
    parts: list[str] = []
    for title, rows in sections(labels, summaries).items():
        names = "Certified accuracy by l2 radius" if title == "certified" else f"Accuracy by l2 radius, {title}"
        parts += [heading.format(names), _table(rows, style)]
    for label, audits in zip(labels, attacks, strict=True):
        if audits is not None:
            worst = audits["all"]
            title = f"Attacks on {label} - contradictions: {count_cases([worst])}"
            parts += [heading.format(_escape_latex(title) if form == "latex" else title)]
            parts += [_table(attack_cells(audits), style), *_undecided(worst)]
            parts += [_table(case_cells(worst.contradictions), style)] if worst.contradictions else []
    parts += [part for title, text in extras for part in (heading.format(title), text)] if form != "latex" else []
    parts += [_escape_latex(note) if form == "latex" else note for note in notes]
    return "\n\n".join(parts) + "\n"


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def _by_attack(
    records: Sequence[Record], audits: Sequence[Mapping[str, Audit] | None] | None
) -> list[Mapping[str, Audit] | None]:
    """For each record its audits by attack, checked."""
    attacks: list[Mapping[str, Audit] | None] = [None] * len(records) if audits is None else list(audits)
    if len(attacks) != len(records):
        raise ValueError(f"audits must hold one entry for each of {len(records)} records, got {len(attacks)}")
    for label, record, found in zip(record_labels(records), records, attacks, strict=True):
        kind = kind_of(record)
        if found is not None and kind is not None and kind not in AUDITED:
            raise ValueError(f"audits: {label} holds {kind} certificates, which no attack audits; give None")
        if found is not None and "all" not in found:
            raise ValueError(f"audits: those of {label} must hold 'all', the worst of its attacks; got {list(found)}")
    return attacks


def render(
    records: Sequence[Record],
    format: str,
    audits: Sequence[Mapping[str, Audit] | None] | None = None,
    *,
    nearest: Sequence[Nearest | None] | None = None,
    extras: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Render records as text.

    Parameters
    ----------
    records : sequence of Record
        At least one.
    format : str
        ``html`` (one self-contained page), ``md``, ``csv``, ``latex``, ``json`` or ``text``.
    audits : sequence of mappings or None, optional
        For each record, in the same order, its audits by attack, with ``"all"`` for the worst of them; None where
        there was none. CSV has counts and accuracies, but no list of cases.
    nearest : sequence of Nearest or None, optional
        For each record the nearest adversarial examples that were found; shown in HTML alone.
    extras : sequence of (str, str)
        Title and text of further chapters: paragraphs and tables of Markdown. LaTeX, JSON and CSV have no place for
        them.
    notes : sequence of str
        Sentences to show with them, such as why an audit was left out; JSON and CSV have no place for them.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        For no records, an unknown format, another number of audits or of examples than of records, audits without
        ``"all"``, or an audit of certificates that are not certified accuracy.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not records:
        raise ValueError("records must hold at least one record")
    attacks = _by_attack(records, audits)
    examples = [None] * len(records) if nearest is None else list(nearest)
    if len(examples) != len(records):
        raise ValueError(f"nearest must hold one entry for each of {len(records)} records, got {len(examples)}")
    labels, summaries = record_labels(records), [summarize(record) for record in records]
    if format in ("json", "csv"):
        entries = [_as_json(*parts) for parts in zip(labels, summaries, attacks, strict=True)]
        return _csv(entries) if format == "csv" else json.dumps(entries, indent=2, allow_nan=False) + "\n"
    if format == "html":
        parts = zip(labels, records, summaries, attacks, examples, strict=True)
        return render_page([Entry(*part) for part in parts], notes, extras)
    return _tables(format, labels, summaries, attacks, notes, extras)


def write_report(
    records: Sequence[Record],
    format: str,
    output: str | Path,
    *,
    audits: Sequence[Mapping[str, Audit] | None] | None = None,
    nearest: Sequence[Nearest | None] | None = None,
    extras: Sequence[tuple[str, str]] = (),
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
        write_atomic(output, render(records, format, audits, nearest=nearest, extras=extras, notes=notes).encode())
    else:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, parquet, got {format!r}")


def write_leaderboard(
    records: Sequence[Record], stem: Path, *, audits: Sequence[Mapping[str, Audit] | None] | None = None
) -> str:
    """Write the table that compares records as Markdown, CSV and LaTeX beside one another; returns the Markdown.

    Parameters
    ----------
    records : sequence of Record
        At least one.
    stem : Path
        ``runs/leaderboard`` writes ``runs/leaderboard.md``, ``.csv`` and ``.tex``.
    audits : sequence of mappings or None, optional
        As in `render`.

    Notes
    -----
    CSV is one table with all columns of `leaderboard`; Markdown and LaTeX have one for what is certified, one for each
    kind that is not, and one for the attacks.
    """
    attacks = _by_attack(records, audits)
    rows = leaderboard(records, attacks)
    tables = by_section(rows)
    pairs = zip(record_labels(records), attacks, strict=True)
    attacked = filled([row for label, found in pairs for row in attack_rows(label, found or {})])
    if attacked:
        tables["under attack"] = attacked
    markdown = "\n".join(f"### {title.capitalize()}\n\n{_table(rows, 'github')}\n" for title, rows in tables.items())
    markdown += f"\n{LEGEND}\n"
    latex = "\n".join(f"\\paragraph*{{{title.capitalize()}}}\n{_latex(rows)}" for title, rows in tables.items())
    write_atomic(stem.with_suffix(".md"), markdown.encode())
    write_atomic(stem.with_suffix(".csv"), _csv(rows).encode())
    write_atomic(stem.with_suffix(".tex"), latex.encode())
    return markdown


def _latex(rows: Sequence[Mapping[str, str]]) -> str:
    escaped = [{_escape_latex(name): _escape_latex(value) for name, value in row.items()} for row in rows]
    return _table(escaped, "latex_raw")

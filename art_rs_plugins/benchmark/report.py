"""Reports out of records: tables in six formats, and one self-contained page. No model is needed."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tabulate import tabulate

from art_rs_plugins.benchmark.plots import plot_audit, plot_certified_accuracy
from art_rs_plugins.benchmark.records import Record, companion, json_bytes, load_json, write_atomic, write_parquet
from art_rs_plugins.theory.audit import Audit, Contradiction
from art_rs_plugins.theory.metrics import (
    Curve,
    abstention_rate,
    accuracy_curve,
    average_certified_radius,
    false_certificates_bound,
)

__all__ = [
    "FORMATS",
    "RADII",
    "Summary",
    "audit_from_json",
    "audit_table",
    "audit_text",
    "audit_to_json",
    "demo_table",
    "load_audit",
    "render",
    "save_audit",
    "summarize",
    "write_report",
]

FORMATS = ("html", "md", "csv", "latex", "json", "text")
"""What `render` can write; `write_report` adds ``parquet``."""

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Radii of the tables, in the units of the input."""

_RHO = 0.001
_BAND = "Band: 95 %, exact binomial, at each radius on its own."
_TEXT = ("record", "attack")
_NOT_CERTIFIED = {
    "conditional": "conditional (not certified)",
    "committed": "committed by the memory (not certified accuracy)",
}


@dataclass(frozen=True, slots=True)
class Summary:
    """What one record amounts to.

    Attributes
    ----------
    name : str
        Name of the record.
    rows : int
        Inputs, abstentions included.
    sigma : float or None
        Noise level; None where neither the columns nor the manifest say it, or where inputs differ in it.
    n, n0, alpha : int, int, float, or None
        Draws and failure probability, None in the same cases.
    kind : str or None
        Kind of the certificates; None where the file does not say.
    acr : float
        Mean over all inputs of the radius where correct, 0 elsewhere.
    abstain_rate : float
        Fraction of all inputs that abstain.
    natural_accuracy : float
        Fraction of all inputs answered with the right class.
    curve : Curve
        Fraction of all inputs that are correct with ``radius >= r`` at `RADII`, with its 95 % band.
    """

    name: str
    rows: int
    sigma: float | None
    n: int | None
    n0: int | None
    alpha: float | None
    kind: str | None
    acr: float
    abstain_rate: float
    natural_accuracy: float
    curve: Curve

    @property
    def section(self) -> str:
        """Heading under which it is listed; what is no theorem about the deployed classifier has one of its own."""
        return _NOT_CERTIFIED.get(self.kind or "", "certified")


def _setting(record: Record, name: str) -> Any:
    """The one value of a setting: from its column, else from the manifest, else None."""
    if name in record.columns:
        values = np.unique(record.columns[name])
        return values[0].item() if len(values) == 1 else None
    manifest = record.manifest or {}
    return manifest.get("config", {}).get(name, manifest.get(name))


def _curve(record: Record, radii: Sequence[float] | NDArray[np.float64]) -> Curve:
    return accuracy_curve(record.correct, record.radius, radii)


def summarize(record: Record) -> Summary:
    """Sum up a record, ours or in the format of Cohen et al.

    Parameters
    ----------
    record : Record
        At least one row.

    Returns
    -------
    Summary

    Notes
    -----
    Every fraction is of all rows, and an abstention is wrong. Radii are compared as they are in the file: a log that
    prints three digits has rounded them, some of them up.
    """
    curve = _curve(record, RADII)
    return Summary(
        name=record.name,
        rows=len(record),
        sigma=_setting(record, "sigma"),
        n=_setting(record, "n"),
        n0=_setting(record, "n0"),
        alpha=_setting(record, "alpha"),
        kind=record.kind or _setting(record, "kind"),
        acr=average_certified_radius(record.correct, record.radius),
        abstain_rate=abstention_rate(record.abstained),
        natural_accuracy=float(np.mean(record.correct)),
        curve=curve,
    )


def _labels(records: Sequence[Record]) -> list[str]:
    """Name of each record, with as many folders before it as tell it from the others of that name."""
    names = [record.name for record in records]
    for depth in range(1, max(len(record.path.parts) for record in records)):
        twins = [names.count(name) > 1 for name in names]
        for number, record in enumerate(records):
            if twins[number]:
                names[number] = "/".join([*record.path.parts[-1 - depth : -1], record.name])
    return [name if names.count(name) == 1 else f"{name} #{number + 1}" for number, name in enumerate(names)]


def _by_radius(values: NDArray[np.float64], radii: Iterable[float] = RADII) -> dict[str, float]:
    return {f"{radius:g}": float(value) for radius, value in zip(radii, values, strict=True)}


def _as_json(label: str, summary: Summary, audit: Audit | None) -> dict[str, Any]:
    """One record as JSON values; what is not certified stands under other names than what is."""
    values: dict[str, Any] = {"record": label}
    values |= {name: getattr(summary, name) for name in ("rows", "sigma", "n", "n0", "alpha", "kind", "abstain_rate")}
    values["natural_accuracy"] = summary.natural_accuracy
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


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _rows(labels: Sequence[str], summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """Cells of the table of one section."""
    return [
        {
            "record": label,
            "rows": f"{summary.rows}",
            "sigma": _cell(summary.sigma, "g"),
            "n": _cell(summary.n, "d"),
            "alpha": _cell(summary.alpha, "g"),
            "abstain": f"{summary.abstain_rate:.3f}",
            "ACR": f"{summary.acr:.3f}",
            **{f"r={radius:g}": f"{value:.3f}" for radius, value in zip(RADII, summary.curve.accuracy, strict=True)},
        }
        for label, summary in zip(labels, summaries, strict=True)
    ]


def _sections(labels: Sequence[str], summaries: Sequence[Summary]) -> dict[str, list[dict[str, str]]]:
    """Tables by heading, what is certified first."""
    pairs = list(zip(labels, summaries, strict=True))
    tables: dict[str, list[dict[str, str]]] = {}
    for heading in ("certified", *_NOT_CERTIFIED.values()):
        chosen = [pair for pair in pairs if pair[1].section == heading]
        if chosen:
            tables[heading] = _rows([label for label, _ in chosen], [summary for _, summary in chosen])
    return tables


def audit_table(audit: Audit) -> list[dict[str, float]]:
    """Rows by budget: budget, certified, correct, abstained, wrong, gap (fractions of all inputs), contradictions."""
    found = [case.budget for case in audit.contradictions]
    return [
        {
            "budget": float(budget),
            "certified": float(audit.certified.accuracy[level]),
            "correct": float(audit.correct[level]),
            "abstained": float(audit.abstained[level]),
            "wrong": float(audit.wrong[level]),
            "gap": float(audit.gap[level]),
            "contradictions": found.count(float(budget)),
        }
        for level, budget in enumerate(audit.budgets)
    ]


def _audit_cells(audit: Audit) -> list[dict[str, str]]:
    whole = ("budget", "contradictions")
    return [
        {name: f"{value:g}" if name in whole else f"{value:.3f}" for name, value in row.items()}
        for row in audit_table(audit)
    ]


def _case_cells(cases: Sequence[Contradiction]) -> list[dict[str, str]]:
    """Contradictions by input."""
    return [
        {
            "input": f"{case.index}",
            "attack": case.attack,
            "budget": f"{case.budget:g}",
            "distance": f"{case.distance:.6g}",
            "radius": f"{case.radius:.6g}",
            "certified class": f"{case.certified}",
            "class under attack": f"{case.adversarial}",
        }
        for case in sorted(cases, key=lambda case: (case.index, case.distance))
    ]


def _table(rows: Sequence[Mapping[str, str]], form: str) -> str:
    # Strings stay as they are: "0.650" is not to become 0.65, nor a name "1e3" a number.
    align = ["left" if name in _TEXT else "right" for name in rows[0]]
    bar = "\\|" if form == "github" else "|"
    cells = [{name: value.replace("|", bar) for name, value in row.items()} for row in rows]
    return tabulate(cells, "keys", form, disable_numparse=True, colalign=align)


def audit_text(audit: Audit) -> str:
    """Audit as plain text: the table by budget, then the number of contradictions and each of them."""
    cases = audit.contradictions
    parts = [_table(_audit_cells(audit), "simple"), f"Contradictions: {len(cases)}"]
    return "\n".join([*parts, _table(_case_cells(cases), "simple")] if cases else parts)


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
        for cells in _audit_cells(audit)
    ]
    return render([record for _, record, _ in results], "text") + "\n" + _table(rows, "simple")


def _tables(
    form: str, labels: Sequence[str], summaries: Sequence[Summary], audits: Sequence[Audit | None]
) -> str:
    """Markdown, LaTeX or plain text: a table for each section, then one for each audit."""
    style, heading = {
        "md": ("github", "## {}"),
        "latex": ("latex_booktabs", "\\paragraph*{{{}}}"),
        "text": ("simple", "{}"),
    }[form]
    parts: list[str] = []
    for title, rows in _sections(labels, summaries).items():
        names = "Certified accuracy by l2 radius" if title == "certified" else f"Accuracy by l2 radius, {title}"
        parts += [heading.format(names), _table(rows, style)]
    for label, audit in zip(labels, audits, strict=True):
        if audit is not None:
            title = f"Attacks on {label} - contradictions: {len(audit.contradictions)}"
            parts += [heading.format(_escape_latex(title) if form == "latex" else title)]
            parts += [_table(_audit_cells(audit), style)]
            parts += [_table(_case_cells(audit.contradictions), style)] if audit.contradictions else []
    return "\n\n".join(parts) + "\n"


def _escape_latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def render(records: Sequence[Record], format: str, audits: Sequence[Audit | None] | None = None) -> str:
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

    Returns
    -------
    str

    Raises
    ------
    ValueError
        For no records, an unknown format, or another number of audits than of records.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if not records:
        raise ValueError("records must hold at least one record")
    attacks = [None] * len(records) if audits is None else list(audits)
    if len(attacks) != len(records):
        raise ValueError(f"audits must hold one entry for each of {len(records)} records, got {len(attacks)}")
    labels, summaries = _labels(records), [summarize(record) for record in records]
    if format in ("json", "csv"):
        entries = [_as_json(*parts) for parts in zip(labels, summaries, attacks, strict=True)]
        return _csv(entries) if format == "csv" else json.dumps(entries, indent=2, allow_nan=False) + "\n"
    if format == "html":
        return _page(labels, records, summaries, attacks)
    return _tables(format, labels, summaries, attacks)


def write_report(
    records: Sequence[Record], format: str, output: str | Path, audits: Sequence[Audit | None] | None = None
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
        write_atomic(output, render(records, format, audits).encode())
    else:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, parquet, got {format!r}")


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


_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe3e8; --panel: #f6f7f9; --blue: #1f5fa8; --alarm: #c40000; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead, .note { color: var(--soft); }
.note { font-size: .9rem; }
.calm { margin: 1.4rem 0; padding: .7rem 1rem; border-left: 4px solid #2f8f5b; background: #f1f8f4; }
.open { margin: 1.4rem 0; padding: .7rem 1rem; border-left: 4px solid var(--soft); background: var(--panel); }
.alarm { margin: 1.4rem 0; padding: 1rem 1.2rem; background: var(--alarm); color: #fff; font-size: 1.05rem; }
.alarm strong { display: block; font-size: 1.5rem; line-height: 1.25; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1rem 0; }
.tile { background: var(--panel); border-radius: 6px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.55rem; font-weight: 600; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .34rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
p.calm, p.open { max-width: none; }
figure { margin: 1rem 0; }
svg { display: block; width: 100%; max-width: 52rem; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif !important; }
figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--blue); }
pre { background: var(--panel); padding: .9rem 1rem; font-size: .8rem; overflow-x: auto; border-radius: 6px; }
"""


def _html_table(rows: Sequence[Mapping[str, str]]) -> str:
    def cells(tag: str, values: Mapping[str, str]) -> str:
        parts = []
        for name, value in values.items():
            kind = ' class="text"' if name in _TEXT else ""
            parts.append(f"<{tag}{kind}>{html.escape(value)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    head = cells("th", {name: name for name in rows[0]})
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _svg(draw: Any) -> str:
    """Inline SVG of what `draw` puts on fresh axes; text stays text, and nothing refers to the outside."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "art_rs_plugins", "font.size": 11}):
        figure = Figure(figsize=(8.2, 4.4), layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    for namespace in ('xmlns:xlink="http://www.w3.org/1999/xlink"', 'xmlns="http://www.w3.org/2000/svg"'):
        drawing = drawing.replace(namespace, "", 1)  # HTML needs neither
    return drawing


def _fine(record: Record) -> Curve:
    """Accuracy by radius, as finely as a picture shows it."""
    return _curve(record, np.linspace(0.0, max(float(record.radius.max()) * 1.04, 0.25), 401))


def _banner(audits: Sequence[Audit | None]) -> str:
    done = [audit for audit in audits if audit is not None]
    if not done:
        return '<p class="open">No attack was recorded: nobody looked for contradictions.</p>'
    cases = [case for audit in done for case in audit.contradictions]
    if not cases:
        attempts = sum(audit.total for audit in done)
        return f'<p class="calm"><b>Contradictions: 0</b> among {attempts:,} attacked inputs.</p>'
    return (
        f'<div class="alarm" role="alert"><strong>Contradictions: {len(cases)}</strong> Adversarial inputs lie inside '
        "certified balls, and fresh draws confirmed their class. More of them than alpha allows means that something "
        "is broken: do not rely on these certificates. They are listed below, input by input.</div>"
    )


def _tiles(summary: Summary) -> str:
    half = float(summary.curve.accuracy[RADII.index(0.5)])
    word = "certified accuracy" if summary.section == "certified" else f"{summary.kind} accuracy"
    tiles = (
        (f"{summary.natural_accuracy:.1%}", "natural accuracy"),
        (f"{half:.1%}", f"{word} at radius 0.5"),
        (f"{summary.acr:.3f}", "average radius (ACR)"),
        (f"{summary.abstain_rate:.1%}", "abstained"),
        (f"{summary.rows:,}", "inputs"),
    )
    return f'<div class="tiles">{"".join(f"<div class=tile><b>{n}</b><span>{t}</span></div>" for n, t in tiles)}</div>'


def _guarantee(record: Record, summary: Summary) -> str:
    """What the numbers promise, in words."""
    kind = summary.kind or "not recorded"
    known = {"n": _cell(summary.n, ",d"), "n0": _cell(summary.n0, ",d"), "alpha": _cell(summary.alpha, "g")}
    settings = ", ".join(f"{name} = {value or 'not one value, or not recorded'}" for name, value in known.items())
    text = [f"Kind: {html.escape(kind)}; {settings}."]
    if summary.kind == "conditional":
        text.append(
            "These radii are about a classifier whose noise level is frozen at each input. They promise nothing about "
            "the classifier that is deployed, and are shown for comparison only: conditional (not certified)."
        )
    elif summary.kind == "committed":
        text.append(
            "The memory keeps these promises from the moment they were given. They do not count as certified accuracy."
        )
    else:
        text.append(
            "Each certificate is false with probability at most alpha over its own noise: the smoothed classifier "
            "keeps its class for every input closer than the radius, in l2."
        )
        largest = record.columns["alpha"].max() if "alpha" in record.columns else summary.alpha
        if largest is None:
            text.append("alpha is not recorded, so nothing can be said about the whole set.")
        else:
            bound = false_certificates_bound(summary.rows, float(largest), rho=_RHO)
            text.append(
                f"About the set: with probability at least {1 - _RHO:g}, at most {bound} of the {summary.rows:,} "
                "certificates are false."
            )
    return "".join(f"<p>{sentence}</p>" for sentence in text)


def _section(label: str, record: Record, summary: Summary, audit: Audit | None) -> str:
    """Everything about one record."""
    heading = html.escape(label) + ("" if summary.section == "certified" else f" &ndash; {summary.section}")
    parts = [f"<h2>{heading}</h2>", _tiles(summary)]
    if audit is not None:
        # An attack on some of the inputs brackets the accuracy on those, not on all.
        curve = _fine(record) if audit.total == len(record) else audit.certified

        def draw(ax: Axes) -> None:
            plot_audit(audit, curve, ax)

        parts += [
            f"<figure>{_svg(draw)}<figcaption>The true robust accuracy lies between the certified curve and what the "
            f"attacks left, over {audit.total:,} inputs. {_BAND}</figcaption></figure>",
            "<h3>Under attack</h3>",
            _html_table(_audit_cells(audit)),
            f"<h3>Contradictions: {len(audit.contradictions)}</h3>",
            _html_table(_case_cells(audit.contradictions))
            if audit.contradictions
            else '<p class="note">No attack found another class inside a certified ball.</p>',
        ]
    parts += ["<h3>What is guaranteed</h3>", _guarantee(record, summary)]
    if record.manifest is not None:
        manifest = html.escape(json.dumps(record.manifest, indent=2))
        parts.append(f"<details><summary>Manifest</summary><pre>{manifest}</pre>\n</details>")
    return "\n".join(parts)


def _page(
    labels: Sequence[str],
    records: Sequence[Record],
    summaries: Sequence[Summary],
    audits: Sequence[Audit | None],
) -> str:
    """One self-contained page: alarms first, then curves, tables and each record."""
    parts = ["<h1>Certified robustness</h1>"]
    parts += ['<p class="lead">Randomized smoothing; l2 radii in the units of the input.</p>', _banner(audits)]
    for title, rows in _sections(labels, summaries).items():
        chosen = {row["record"] for row in rows}
        curves = {label: _fine(record) for label, record in zip(labels, records, strict=True) if label in chosen}

        def draw(ax: Axes, curves: dict[str, Curve] = curves) -> None:
            plot_certified_accuracy(curves, ax)

        caption = "Certified accuracy" if title == "certified" else f"Accuracy, {title}"
        parts += [
            f"<h3>{caption}</h3>",
            f"<figure>{_svg(draw)}<figcaption>{caption} by radius: the fraction of all inputs that are right with at "
            f"least that radius; an abstention is wrong. {_BAND}</figcaption></figure>",
            _html_table(rows),
        ]
    parts += [_section(*entry) for entry in zip(labels, records, summaries, audits, strict=True)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Certified robustness: {html.escape(', '.join(labels))}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{chr(10).join(parts)}\n</body>\n</html>\n"
    )

"""One self-contained HTML page out of records and audits."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from art_rs_plugins.benchmark.plots import plot_audit, plot_certified_accuracy
from art_rs_plugins.benchmark.records import Record
from art_rs_plugins.benchmark.tables import (
    RADII,
    TEXT,
    Summary,
    accuracy_of,
    audit_cells,
    case_cells,
    cell,
    count_cases,
    sections,
    undecided,
)
from art_rs_plugins.theory.audit import Audit
from art_rs_plugins.theory.metrics import Curve, false_certificates_bound

__all__ = ["render_page"]

_RHO = 0.001
_BAND = "Band: 95 %, exact binomial, at each radius on its own."

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
            kind = ' class="text"' if name in TEXT else ""
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
    return accuracy_of(record, np.linspace(0.0, max(float(record.radius.max()) * 1.04, 0.25), 401))


def _banner(audits: Sequence[Audit | None], notes: Sequence[str]) -> str:
    """What the attacks found, before anything else is said."""
    done = [audit for audit in audits if audit is not None]
    parts = [f'<p class="open">{html.escape(note)}</p>' for note in notes]
    idle = sorted({budget for audit in done for budget in undecided(audit)})
    if idle:
        parts.append(
            f'<p class="open" role="status"><b>The attack\'s votes could decide nothing</b> at budget '
            f"{', '.join(f'{budget:g}' for budget in idle)}: every input ended in an abstention, and no certificate "
            "was tried. Attack again with more votes (n).</p>"
        )
    if not done:
        parts.append('<p class="open">No attack is shown: nobody looked for contradictions.</p>')
    elif any(audit.contradictions for audit in done):
        parts.insert(
            0,
            f'<div class="alarm" role="alert"><strong>Contradictions: {count_cases(done)}</strong> Adversarial inputs '
            "lie inside certified balls, and fresh draws confirmed their class. More of them than alpha allows means "
            "that something is broken: do not rely on these certificates. They are listed below, input by input.</div>",
        )
    elif not all(len(undecided(audit)) == len(audit.budgets) for audit in done):
        attempts = sum(audit.total for audit in done)
        parts.append(f'<p class="calm"><b>Contradictions: 0</b> among {attempts:,} attacked inputs.</p>')
    return "".join(parts)


def _tiles(summary: Summary) -> str:
    half = float(summary.curve.accuracy[RADII.index(0.5)])
    word = "certified accuracy" if summary.section == "certified" else f"{summary.kind} accuracy"
    tiles = (
        (f"{summary.curve.accuracy[0]:.1%}", f"{word} at radius 0"),
        (f"{half:.1%}", f"{word} at radius 0.5"),
        (f"{summary.acr:.3f}", "average radius (ACR)"),
        (f"{summary.abstain_rate:.1%}", "abstained"),
        (f"{summary.rows:,}", "inputs"),
    )
    return f'<div class="tiles">{"".join(f"<div class=tile><b>{n}</b><span>{t}</span></div>" for n, t in tiles)}</div>'


def _guarantee(record: Record, summary: Summary) -> str:
    """What the numbers promise, in words."""
    kind = summary.kind or "not recorded"
    known = {"n": cell(summary.n, ",d"), "n0": cell(summary.n0, ",d"), "alpha": cell(summary.alpha, "g")}
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


def _nothing_found(audit: Audit) -> str:
    budgets = ", ".join(f"{budget:g}" for budget in undecided(audit))
    doubt = f" At budget {budgets} the votes could decide nothing, so that says nothing there." if budgets else ""
    return f'<p class="note">No attack found another class inside a certified ball.{doubt}</p>'


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
            _html_table(audit_cells(audit)),
            f"<h3>Contradictions: {count_cases([audit])}</h3>",
            _html_table(case_cells(audit.contradictions))
            if audit.contradictions
            else _nothing_found(audit),
        ]
    parts += ["<h3>What is guaranteed</h3>", _guarantee(record, summary)]
    if record.manifest is not None:
        manifest = html.escape(json.dumps(record.manifest, indent=2))
        parts.append(f"<details><summary>Manifest</summary><pre>{manifest}</pre>\n</details>")
    return "\n".join(parts)


def render_page(
    labels: Sequence[str],
    records: Sequence[Record],
    summaries: Sequence[Summary],
    audits: Sequence[Audit | None],
    notes: Sequence[str],
) -> str:
    """One self-contained page: alarms first, then curves, tables and each record."""
    parts = ["<h1>Certified robustness</h1>"]
    parts += ['<p class="lead">Randomized smoothing; l2 radii in the units of the input.</p>', _banner(audits, notes)]
    for title, rows in sections(labels, summaries).items():
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

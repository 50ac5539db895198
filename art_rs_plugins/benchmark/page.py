"""One self-contained HTML page out of records, audits and adversarial examples."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from art_rs_plugins.benchmark.figures import audit_figure, curves_figure, figure_html, plotly_script
from art_rs_plugins.benchmark.gallery import gallery
from art_rs_plugins.benchmark.markup import html_table, markdown, svg
from art_rs_plugins.benchmark.nearest import Nearest
from art_rs_plugins.benchmark.plots import plot_audit, plot_certified_accuracy
from art_rs_plugins.benchmark.records import Record
from art_rs_plugins.benchmark.tables import (
    LEGEND,
    NOT_CERTIFIED,
    RADII,
    RHO,
    Summary,
    accuracy_of,
    attack_cells,
    attack_rows,
    by_section,
    case_cells,
    cell,
    count_cases,
    false_at_most,
    filled,
    leaderboard,
    undecided,
)
from art_rs_plugins.theory.audit import Audit
from art_rs_plugins.theory.metrics import Curve

__all__ = ["Entry", "render_page"]

_HOME = resources.files("art_rs_plugins.benchmark")
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
"""The browser itself refuses whatever the page might want from anywhere else."""

_BAND = "Band: 95 %, exact binomial, at each radius on its own."


@dataclass(frozen=True, slots=True)
class Entry:
    """What a page says about one record."""

    label: str
    record: Record
    summary: Summary
    audits: Mapping[str, Audit] | None
    nearest: Nearest | None


def _grid(end: float) -> NDArray[np.float64]:
    """Round radii from 0 to beyond `end`, as finely as a picture shows them."""
    scale = 10.0 ** np.floor(np.log10(end / 200.0))
    step = scale * min(factor for factor in (1, 2.5, 5, 10) if factor * scale * 400 >= end)
    return np.asarray(np.round(np.arange(np.ceil(end / step) + 1) * step, 9), dtype=np.float64)


def _reach(record: Record) -> float:
    return max(float(record.radius.max()) * 1.04, 0.25)


def _curve_under(audit: Audit, record: Record) -> Curve:
    """Certified accuracy of the inputs that were attacked, as a staircase that is never above it between budgets."""
    if audit.total == len(record):
        return accuracy_of(record, _grid(max(_reach(record), float(audit.budgets[-1]))))
    known = audit.certified
    radii = np.unique(np.concatenate([known.radii, np.nextafter(known.radii[:-1], np.inf)]))
    level = np.searchsorted(known.radii, radii)
    return Curve(
        radii, known.accuracy[level], known.lower[level], known.upper[level], known.total, known.confidence
    )


def _figure(name: str, live: str, static: str, caption: str, rows: Sequence[Mapping[str, str]]) -> str:
    """A plot with its caption, what stands for it on paper and without scripts, and its numbers as a table."""
    return (
        f'<figure id="{name}">\n<div class="live">{live}</div>\n<div class="static">{static}</div>\n'
        f"<figcaption>{caption}</figcaption>\n"
        f'<details class="data"><summary>Numbers of this plot</summary>{html_table(rows, "Numbers of this plot")}'
        "</details>\n</figure>"
    )


def _banner(entries: Sequence[Entry], notes: Sequence[str]) -> str:
    """What the attacks found, before anything else is said."""
    done = [entry.audits["all"] for entry in entries if entry.audits is not None]
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
        cases = [
            {"record": entry.label, **row}
            for entry in entries
            if entry.audits is not None
            for row in case_cells(entry.audits["all"].contradictions)
        ]
        parts.insert(
            0,
            f'<div class="alarm" role="alert"><strong>Contradictions: {count_cases(done)}</strong> Adversarial inputs '
            "lie inside certified balls, and fresh draws confirmed their class. More of them than alpha allows means "
            "that something is broken: do not rely on these certificates.</div>"
            + html_table(cases, "Contradictions by input"),
        )
    elif not all(len(undecided(audit)) == len(audit.budgets) for audit in done):
        attempts = sum(audit.total for audit in done)
        parts.append(f'<p class="calm"><b>Contradictions: 0</b> among {attempts:,} attacked inputs.</p>')
    return "".join(parts)


def _leaderboard(entries: Sequence[Entry]) -> str:
    """The tables that compare: what is certified, what is not, and what attacks left."""
    rows = leaderboard([entry.record for entry in entries], [entry.audits for entry in entries])
    parts = []
    for title, table in by_section(rows).items():
        parts += [f"<h3>{title.capitalize()}</h3>", html_table(table, title)]
    attacked = filled([row for entry in entries for row in attack_rows(entry.label, entry.audits or {})])
    if attacked:
        parts += ["<h3>Under attack</h3>", html_table(attacked, "Under attack")]
    return "\n".join([*parts, f'<p class="note">{LEGEND}</p>'])


def _curves(entries: Sequence[Entry], name: str, caption: str) -> str:
    """Accuracy by radius of records of one section."""
    grid = _grid(max(_reach(entry.record) for entry in entries))
    curves = {entry.label: accuracy_of(entry.record, grid) for entry in entries}
    rows = [
        {"r": f"{grid[at]:.4g}"}
        | {
            label: f"{curve.accuracy[at]:.3f} [{curve.lower[at]:.3f}, {curve.upper[at]:.3f}]"
            for label, curve in curves.items()
        }
        for at in range(0, len(grid), 20)
    ]
    return _figure(
        name,
        figure_html(curves_figure(curves), f"{name}-plot"),
        svg(lambda axes: plot_certified_accuracy(curves, axes)),
        f"{caption} by radius: the fraction of all inputs that are right with at least that radius; an abstention is "
        f"wrong. {_BAND}",
        rows,
    )


def _all_curves(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """One chapter for what is certified and one for each kind that is not."""
    parts = []
    for kind, section in {"certified": "certified", **NOT_CERTIFIED}.items():
        chosen = [entry for entry in entries if entry.summary.section == section]
        if chosen:
            title = "Certified accuracy" if kind == "certified" else f"Accuracy, {section}"
            parts.append((f"{title} by radius", _curves(chosen, f"curves-{kind}", title)))
    return parts


def _tiles(summary: Summary) -> str:
    half = float(summary.curve.accuracy[RADII.index(0.5)])
    word = "certified accuracy" if summary.section == "certified" else f"{summary.kind} accuracy"
    tiles = (
        (f"{summary.curve.accuracy[0]:.1%}", "natural accuracy"),
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
        bound = false_at_most(record, summary)
        if bound is None:
            text.append("alpha is not recorded, so nothing can be said about the whole set.")
        else:
            text.append(
                f"About the set: with probability at least {1 - RHO:g}, at most {bound} of the {summary.rows:,} "
                "certificates are false."
            )
    return "".join(f"<p>{sentence}</p>" for sentence in text)


def _attacks(audits: Mapping[str, Audit], record: Record, name: str) -> str:
    """The bracket of one record's robust accuracy."""
    worst = audits["all"]
    curve = _curve_under(worst, record)

    def draw(axes: Axes) -> None:
        plot_audit(worst, curve, axes)

    picture = _figure(
        name,
        figure_html(audit_figure(audits, curve), f"{name}-plot"),
        svg(draw),
        "The true robust accuracy lies between the certified curve and what the attacks left, over "
        f"{worst.total:,} inputs. {_BAND}",
        attack_cells(audits),
    )
    if worst.contradictions:
        verdict = "Listed on top, input by input."
    else:
        budgets = ", ".join(f"{budget:g}" for budget in undecided(worst))
        verdict = "No attack found another class inside a certified ball." + (
            f" At budget {budgets} the votes could decide nothing, so that says nothing there." if budgets else ""
        )
    return (
        f"<h3>Under attack</h3>\n{picture}\n<h3>Contradictions: {count_cases([worst])}</h3>"
        f'<p class="note">{verdict}</p>'
    )


def _section(entry: Entry, name: str) -> str:
    """Everything about one record."""
    parts = [_tiles(entry.summary)]
    if entry.audits is not None:
        parts.append(_attacks(entry.audits, entry.record, name))
    if entry.nearest is not None:
        parts += ["<h3>Nearest adversarial examples</h3>", gallery(entry.nearest, entry.record)]
    parts += ["<h3>What is guaranteed</h3>", _guarantee(entry.record, entry.summary)]
    return "\n".join(parts)


def _reproduce(entries: Sequence[Entry]) -> str:
    """Command, seed, versions and digests of each record, as far as its manifest says them."""
    parts = ["<p>The same command, seed, versions and device give the same certificates.</p>"]
    for entry in entries:
        manifest = entry.record.manifest
        parts.append(f"<h3>{html.escape(entry.label)}</h3>")
        if manifest is None:
            parts.append(f'<p class="note">{html.escape(entry.record.path.name)} has no manifest beside it.</p>')
            continue
        versions = manifest.get("versions", {})
        facts = {name: manifest.get(name) for name in ("seed", "device", "performance", "block")}
        facts |= {name: f"{versions[name]}" for name in versions}
        facts |= {name: value for name, value in manifest.items() if name.endswith("_sha256")}
        rows = [{"what": name, "value": f"{value}"} for name, value in facts.items() if value is not None]
        parts += [f"<pre>{html.escape(str(manifest['command']))}</pre>"] if "command" in manifest else []
        parts += [f"<details><summary>Seed, versions and digests</summary>{html_table(rows, 'Facts')}</details>"]
        whole = html.escape(json.dumps(manifest, indent=2))
        parts.append(f"<details><summary>Manifest</summary><pre>{whole}</pre>\n</details>")
    return "\n".join(parts)


def render_page(entries: Sequence[Entry], notes: Sequence[str], extras: Sequence[tuple[str, str]]) -> str:
    """One self-contained page: alarms first, then the leaderboard, curves, each record, and how to do it again."""
    chapters = [("Leaderboard", _leaderboard(entries)), *_all_curves(entries)]
    for number, entry in enumerate(entries, start=1):
        suffix = "" if entry.summary.section == "certified" else f", {entry.summary.section}"
        chapters.append((entry.label + suffix, _section(entry, f"record-{number}")))
    chapters += [(title, markdown(text)) for title, text in extras]
    chapters.append(("How to reproduce", _reproduce(entries)))
    links, parts = [], []
    for number, (title, content) in enumerate(chapters, start=1):
        name, heading = f"part-{number}", html.escape(title)
        links.append(f'<li><a href="#{name}">{heading}</a></li>')
        parts.append(f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n{content}\n</section>')
    style, script = ((_HOME / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Certified robustness: {html.escape(', '.join(entry.label for entry in entries))}</title>\n"
        f"<style>{style}</style>\n"
        "<noscript><style>.live { display: none; } .static { display: block; }</style></noscript>\n</head>\n"
        '<body>\n<a class="skip" href="#main">Skip to the results</a>\n<header>\n<h1>Certified robustness</h1>\n'
        '<p class="lead">Randomized smoothing; l2 radii in the units of the input.</p>\n'
        f"<nav aria-label=\"Contents\"><ul>{''.join(links)}</ul></nav>\n</header>\n"
        f'<main id="main" tabindex="-1">\n{_banner(entries, notes)}\n{plotly_script()}\n'
        f"{chr(10).join(parts)}\n</main>\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )

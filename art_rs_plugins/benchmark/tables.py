"""What records and audits amount to, as numbers and as the cells of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.benchmark.records import Record
from art_rs_plugins.theory.audit import Audit, Contradiction
from art_rs_plugins.theory.metrics import (
    Curve,
    abstention_rate,
    accuracy_curve,
    average_certified_radius,
    false_certificates_bound,
)

__all__ = [
    "LEGEND",
    "RADII",
    "RHO",
    "Summary",
    "accuracy_of",
    "attack_cells",
    "attack_rows",
    "audit_cells",
    "audit_table",
    "by_section",
    "case_cells",
    "cell",
    "count_cases",
    "false_at_most",
    "filled",
    "kind_of",
    "leaderboard",
    "record_labels",
    "sections",
    "summarize",
    "undecided",
]

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Radii of the tables, in the units of the input."""

RHO = 0.001
"""Failure probability of the statement on how many certificates of a set are false."""

LEGEND = (
    "natural: answered right, an abstention is wrong. r: right with at least this l2 radius; [95 % band of the "
    "population]. passes, seconds: mean of an input; where cells share votes, the seconds are those of all of them. "
    "ACR: average certified radius, which grows with n. false at most: "
    f"bound on the false certificates of the set, with probability {1 - RHO:g}. attacked: not brought to a wrong class "
    "within the l2 budget, an upper bound of the robust accuracy; gap: attacked minus certified, both as fractions of "
    "the inputs attacked. What is not certified or exact is no certified accuracy."
)
"""What the columns of the leaderboard mean."""

TEXT = ("record", "attack", "kind", "contradictions")
"""Columns of words; all others are numbers, and stand to the right."""

NOT_CERTIFIED = {
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
    curve: Curve

    @property
    def section(self) -> str:
        """Heading under which it is listed; what is no theorem about the deployed classifier has one of its own."""
        return NOT_CERTIFIED.get(self.kind or "", "certified")


def _setting(record: Record, name: str) -> Any:
    """The one value of a setting: from its column, else from the manifest, else None."""
    if name in record.columns:
        values = np.unique(record.columns[name])
        return values[0].item() if len(values) == 1 else None
    manifest = record.manifest or {}
    return manifest.get("config", {}).get(name, manifest.get(name))


def kind_of(record: Record) -> str | None:
    """Kind of the certificates of a record, where its columns or its manifest say it."""
    return record.kind or _setting(record, "kind")


def accuracy_of(record: Record, radii: Sequence[float] | NDArray[np.float64]) -> Curve:
    """Accuracy of a record by radius, with its band."""
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
    curve = accuracy_of(record, RADII)
    return Summary(
        name=record.name,
        rows=len(record),
        sigma=_setting(record, "sigma"),
        n=_setting(record, "n"),
        n0=_setting(record, "n0"),
        alpha=_setting(record, "alpha"),
        kind=kind_of(record),
        acr=average_certified_radius(record.correct, record.radius),
        abstain_rate=abstention_rate(record.abstained),
        curve=curve,
    )


def record_labels(records: Sequence[Record]) -> list[str]:
    """Name of each record, with as many folders before it as tell it from the others of that name.

    What ART's own code has certified says so.
    """
    names = [record.name for record in records]
    for depth in range(1, max(len(record.path.parts) for record in records)):
        twins = [names.count(name) > 1 for name in names]
        for number, record in enumerate(records):
            if twins[number]:
                names[number] = "/".join([*record.path.parts[-1 - depth : -1], record.name])
    marks = [" (ART)" if _setting(record, "method") == "art" else "" for record in records]
    unique = [name if names.count(name) == 1 else f"{name} #{number + 1}" for number, name in enumerate(names)]
    return [name + mark for name, mark in zip(unique, marks, strict=True)]


def cell(value: float | None, form: str) -> str:
    """A number in this form; nothing where there is none."""
    return "" if value is None else format(value, form)


def _rows(labels: Sequence[str], summaries: Sequence[Summary]) -> list[dict[str, str]]:
    """Cells of the table of one section."""
    return [
        {
            "record": label,
            "rows": f"{summary.rows}",
            "sigma": cell(summary.sigma, "g"),
            "n": cell(summary.n, "d"),
            "alpha": cell(summary.alpha, "g"),
            "abstain": f"{summary.abstain_rate:.3f}",
            "ACR": f"{summary.acr:.3f}",
            **{f"r={radius:g}": f"{value:.3f}" for radius, value in zip(RADII, summary.curve.accuracy, strict=True)},
        }
        for label, summary in zip(labels, summaries, strict=True)
    ]


def sections(labels: Sequence[str], summaries: Sequence[Summary]) -> dict[str, list[dict[str, str]]]:
    """Tables by heading, what is certified first."""
    pairs = list(zip(labels, summaries, strict=True))
    tables: dict[str, list[dict[str, str]]] = {}
    for heading in ("certified", *NOT_CERTIFIED.values()):
        chosen = [pair for pair in pairs if pair[1].section == heading]
        if chosen:
            tables[heading] = _rows([label for label, _ in chosen], [summary for _, summary in chosen])
    return tables


def leaderboard(
    records: Sequence[Record], audits: Sequence[Mapping[str, Audit] | None] | None = None
) -> list[dict[str, str]]:
    """Rows of the table that compares records, what is certified first; every fraction is of all inputs.

    Parameters
    ----------
    records : sequence of Record
        At least one.
    audits : sequence of mappings or None, optional
        For each record its audits by attack, with ``"all"`` for the worst of them; None where nobody attacked.

    Returns
    -------
    list of dict
        ``natural``: answered right, an abstention is wrong. ``r=...``: right with at least this radius, with its 95 %
        band. ``passes``: mean number of forward passes of an input, those of selection, of a search and of every noise
        level included; rules that share their draws are charged for their own. ``seconds``: mean time of an input.
        ``ACR``: left out where radii were named beforehand, as the certificates are rounded down to those. ``false at
        most``: see `false_at_most`. Then, for each attack, its accuracy and the gap at its budgets; see `attack_rows`.
    """
    named = {tuple(radii) for record in records if (radii := _setting(record, "radii")) is not None}
    radii = sorted(set().union(*named)) if named else list(RADII[1:])
    labels = record_labels(records)
    rows = []
    for number, (label, record) in enumerate(zip(labels, records, strict=True)):
        summary, curve, spent = summarize(record), accuracy_of(record, [0.0, *radii]), _passes(record)
        natural, *values = [
            f"{value:.3f} [{low:.3f}, {high:.3f}]"
            for value, low, high in zip(curve.accuracy, curve.lower, curve.upper, strict=True)
        ]
        attacks = None if audits is None else audits[number]
        rows.append(
            {
                "record": label,
                "kind": summary.kind or "",
                "contradictions": "not attacked" if attacks is None else _verdict(attacks["all"]),
                "inputs": f"{summary.rows}",
                "abstain": f"{summary.abstain_rate:.3f}",
                "natural": natural,
                **{f"r={radius:g}": value for radius, value in zip(radii, values, strict=True)},
                **({} if named else {"ACR": f"{summary.acr:.3f}"}),
                "false at most": cell(false_at_most(record, summary), "d"),
                "n": cell(_limit(record), "d"),
                "alpha": cell(summary.alpha, "g"),
                "passes": "" if spent is None else f"{spent.mean():,.0f}",
                "seconds": f"{record.time.mean():.3g}",
                **{
                    f"{row['attack']} {name}": value
                    for row in attack_rows(label, attacks or {})
                    for name, value in row.items()
                    if "@" in name
                },
            }
        )
    order = ["certified", "exact", "", "committed", "conditional"]
    return sorted(filled(rows), key=lambda row: order.index(row["kind"]))


def filled(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Rows with the columns of all of them."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in columns} for row in rows]


def by_section(rows: Sequence[Mapping[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Rows of `leaderboard` by heading, without the columns of each attack, for which `attack_rows` has lines."""
    tables: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        short = {name: value for name, value in row.items() if "@" not in name}
        tables.setdefault(NOT_CERTIFIED.get(row["kind"], "certified"), []).append(short)
    return tables


def false_at_most(record: Record, summary: Summary) -> int | None:
    """Bound on the false certificates of a record, at failure probability `RHO`; None where alpha is not recorded.

    None as well for what is no certificate of the deployed classifier.
    """
    if summary.section != "certified":
        return None
    largest = record.columns["alpha"].max() if "alpha" in record.columns else summary.alpha
    return None if largest is None else false_certificates_bound(summary.rows, float(largest), rho=RHO)


def attack_rows(label: str, audits: Mapping[str, Audit]) -> list[dict[str, str]]:
    """Rows by attack: inputs, contradictions, then at each budget the attacked accuracy and its gap to the certified.

    Both are fractions of the inputs that were attacked; ``all`` is the worst of the attacks at each input.
    """
    return [
        {
            "record": label,
            "attack": name,
            "inputs": f"{audit.total}",
            "contradictions": _verdict(audit),
            **{f"attacked@{b:g}": f"{value:.3f}" for b, value in zip(audit.budgets, audit.attacked, strict=True)},
            **{f"gap@{b:g}": f"{value:.3f}" for b, value in zip(audit.budgets, audit.gap, strict=True)},
        }
        for name, audit in audits.items()
    ]


def _verdict(audit: Audit) -> str:
    """Contradictions of an audit; an attack whose every answer was an abstention found none, and looked at nothing."""
    return "undecided" if len(undecided(audit)) == len(audit.budgets) else count_cases([audit])


def _passes(record: Record) -> NDArray[np.int64] | None:
    """Forward passes of each input, where the record says them."""
    columns = record.columns
    if "passes" in columns:
        return columns["passes"]
    return columns["n"] + columns["n0"] if {"n", "n0"} <= set(columns) else None


def _limit(record: Record) -> int | None:
    """Estimation draws that an input may take."""
    limit: int | None = (record.manifest or {}).get("config", {}).get("n", _setting(record, "n"))
    return limit


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


def audit_cells(audit: Audit) -> list[dict[str, str]]:
    """Rows of `audit_table` as text."""
    whole = ("budget", "contradictions")
    return [
        {name: f"{value:g}" if name in whole else f"{value:.3f}" for name, value in row.items()}
        for row in audit_table(audit)
    ]


def attack_cells(audits: Mapping[str, Audit]) -> list[dict[str, str]]:
    """Rows of `audit_cells` for each attack, under its name."""
    return [{"attack": name, **cells} for name, audit in audits.items() for cells in audit_cells(audit)]


def case_cells(cases: Sequence[Contradiction]) -> list[dict[str, str]]:
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


def count_cases(audits: Sequence[Audit]) -> str:
    """Number of contradictions and of inputs with any: one input may fall to several attacks, at several budgets."""
    cases = sum(len(audit.contradictions) for audit in audits)
    inputs = sum(len({case.index for case in audit.contradictions}) for audit in audits)
    if not cases:
        return "0"
    return f"{cases:,} {'case' if cases == 1 else 'cases'} at {inputs:,} {'input' if inputs == 1 else 'inputs'}"


def undecided(audit: Audit) -> list[float]:
    """Budgets at which every input ended in an abstention, where nothing could have been contradicted."""
    return [float(budget) for budget in audit.budgets[audit.abstained == 1.0]]

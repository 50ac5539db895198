"""Records and audits of a few rows, worked out by hand, and a reader of pages; for tests of reports."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from art_rs_plugins.benchmark.records import Record, read_record
from art_rs_plugins.benchmark.writer import RecordWriter
from art_rs_plugins.theory.audit import AttackOutcomes, Audit, audit
from art_rs_plugins.theory.certificates import Certificates, Kind

# Four of eight right; radii .25, .2499 and 1.5 on both sides of the table's grid; one abstention of the true class.
COHEN = (
    "idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
    "0\t3\t3\t0.25\t1\t16.6\n"
    "20\t7\t-1\t0.0\t0\t0:00:14.206886\n"
    "40\t4\t6\t1.35\t0\t16.6\n"
    "60\t4\t4\t0.2499\t1\t16.6\n"
    "80\t1\t1\t1.5\t1\t16.6\n"
    "100\t1\t1\t0.0\t1\t16.6\n"
    "120\t2\t-1\t0.0\t0\t16.6\n"
    "140\t2\t0\t0.75\t0\t16.6\n"
)


def cohen_like(folder: Path, name: str = "sigma_0.50") -> Record:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.tsv").write_text(COHEN)
    return read_record(folder / f"{name}.tsv")


def our_certificates(kind: Kind = "certified") -> Certificates:
    return Certificates(
        prediction=np.array([0, 1, 1, 0]),
        radius=np.array([0.6, 0.3, 0.0, 0.9]),
        abstained=np.array([False, False, True, False]),
        p_lower=np.array([0.9, 0.8, 0.4, 0.99]),
        p_upper=np.array([0.1, 0.2, 0.6, 0.01]),
        count=np.array([95, 85, 45, 100]),
        runner_up_count=np.array([5, 15, 55, 0]),
        n=np.full(4, 100),
        n0=np.full(4, 10),
        sigma=np.full(4, 0.5),
        alpha=np.full(4, 0.001),
        index=np.array([3, 5, 7, 9]),
        seed=np.zeros(4, dtype=np.int64),
        kind=kind,
    )


LABELS = np.array([0, 1, 1, 1])


def ours(folder: Path, kind: Kind = "certified", name: str = "run") -> Record:
    with RecordWriter(folder / f"{name}.tsv", {"note": "<b>&amp;</b>"}) as writer:
        writer.append(our_certificates(kind), LABELS, 0.1)
    return read_record(folder / f"{name}.tsv")


def an_audit(*, broken: bool) -> Audit:
    """Attack at .25 and .5: input 5 falls at .5, outside its ball, or inside it at .25 as well if broken."""
    prediction = np.array([[0, 0 if broken else 1, 1, 0], [0, 0, 1, 0]])
    outcomes = AttackOutcomes(
        name="<pgd>",
        budgets=np.array([0.25, 0.5]),
        prediction=prediction,
        abstained=np.array([[False] * 4, [True, False, False, False]]),
        distance=np.array([[0.25] * 4, [0.5] * 4]),
        confirmed=np.ones((2, 4), dtype=bool),
        n=200,
        alpha=0.001,
    )
    return audit(our_certificates(), outcomes, LABELS)


class Page(HTMLParser):
    """Collects tags and text of a page, and checks that every tag is closed in order."""

    VOID = ("meta", "br", "use", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def words(self) -> str:
        return " ".join(data for tag, data in self.text if tag not in ("style", "script"))

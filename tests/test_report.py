"""Reports: the numbers of Cohen's logs, the wording around what is not certified, and a page that stands alone."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted import LABELS, Page, an_audit, cohen_like, our_certificates, ours

from art_rs_plugins.benchmark.audits import audit_from_json, audit_to_json, load_audits, save_audits
from art_rs_plugins.benchmark.plots import plot_audit, plot_certified_accuracy
from art_rs_plugins.benchmark.records import read_record
from art_rs_plugins.benchmark.report import audit_text, demo_table, render, write_leaderboard, write_report
from art_rs_plugins.benchmark.tables import RADII, audit_table, count_cases, leaderboard, summarize
from art_rs_plugins.theory.audit import AttackOutcomes, Audit, audit
from art_rs_plugins.theory.bounds import clopper_pearson_upper
from art_rs_plugins.theory.certificates import Kind
from art_rs_plugins.theory.metrics import accuracy_curve
from art_rs_plugins.theory.radii import gaussian_radius

SHARED = os.environ.get("ART_RS_SHARED_DATA", "")
LOGS = Path(SHARED) / "cohen_logs" / "cohen"
needs_logs = pytest.mark.skipif(
    not SHARED or not LOGS.is_dir(), reason="ART_RS_SHARED_DATA names no folder with the logs of Cohen et al."
)

def test_a_log_of_cohens_format_adds_up(tmp_path: Path) -> None:
    summary = summarize(cohen_like(tmp_path))
    assert (summary.name, summary.rows, summary.kind) == ("sigma_0.50", 8, None)
    assert (summary.sigma, summary.n, summary.n0, summary.alpha) == (None, None, None, None)
    assert summary.abstain_rate == 2 / 8
    assert summary.acr == pytest.approx((0.25 + 0.2499 + 1.5) / 8, abs=1e-15)
    np.testing.assert_array_equal(summary.curve.radii, [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5])
    np.testing.assert_array_equal(summary.curve.accuracy * 8, [4, 2, 1, 1, 1, 1, 1])
    # Clopper-Pearson of 1 in 8 at 95 %, from tables
    assert (summary.curve.lower[2], summary.curve.upper[2]) == pytest.approx((0.0032, 0.5265), abs=5e-5)


def test_settings_come_from_columns_then_from_the_manifest(tmp_path: Path) -> None:
    summary = summarize(ours(tmp_path))
    assert (summary.sigma, summary.n, summary.n0, summary.alpha, summary.kind) == (0.5, 100, 10, 0.001, "certified")
    cohen_like(tmp_path, "theirs")
    (tmp_path / "theirs.manifest.json").write_text('{"alpha": 0.01, "config": {"sigma": 0.12, "n": 100000}}')
    summary = summarize(read_record(tmp_path / "theirs.tsv"))
    assert (summary.sigma, summary.n, summary.n0, summary.alpha) == (0.12, 100_000, None, 0.01)


def test_a_sigma_for_each_input_is_no_sigma_of_the_record(tmp_path: Path) -> None:
    ours(tmp_path)
    text = (tmp_path / "run.tsv").read_text().replace("\t0.1\t0.5\t", "\t0.1\t0.25\t", 1)
    (tmp_path / "run.tsv").write_text(text)
    summary = summarize(read_record(tmp_path / "run.tsv"))
    assert (summary.sigma, summary.alpha) == (None, 0.001)


def test_json_has_one_object_for_each_record(tmp_path: Path) -> None:
    entries = json.loads(render([cohen_like(tmp_path), ours(tmp_path)], "json"))
    assert [entry["record"] for entry in entries] == ["sigma_0.50", "run"]
    theirs, mine = entries
    assert theirs["certified_accuracy"] == {
        "0": 0.5, "0.25": 0.25, "0.5": 0.125, "0.75": 0.125, "1": 0.125, "1.25": 0.125, "1.5": 0.125
    }  # fmt: skip
    assert {name: theirs[name] for name in ("rows", "sigma", "n", "alpha", "kind", "abstain_rate")} == {
        "rows": 8, "sigma": None, "n": None, "alpha": None, "kind": None, "abstain_rate": 0.25
    }  # fmt: skip
    assert {name: mine[name] for name in ("rows", "sigma", "n", "n0", "alpha", "kind", "abstain_rate", "acr")} == {
        "rows": 4, "sigma": 0.5, "n": 100, "n0": 10, "alpha": 0.001, "kind": "certified", "abstain_rate": 0.25,
        "acr": pytest.approx(0.225),
    }  # fmt: skip
    assert mine["certified_accuracy"]["0.5"] == 0.25
    assert "audit" not in mine


@pytest.mark.parametrize("kind", ["conditional", "committed"])
def test_what_is_not_certified_never_counts_as_certified(tmp_path: Path, kind: Kind) -> None:
    record = ours(tmp_path, kind)
    (entry,) = json.loads(render([record], "json"))
    assert entry["certified_accuracy"] is None
    assert entry["acr"] is None
    assert entry[f"{kind}_accuracy"]["0.5"] == 0.25
    assert entry[f"{kind}_acr"] == pytest.approx(0.225)
    mixed = render([record, cohen_like(tmp_path)], "md")
    certified, _, rest = mixed.partition(f"## Accuracy by l2 radius, {kind}")
    assert "| sigma_0.50 " in certified
    assert "| run " not in certified
    assert "| run " in rest
    page = render([record], "html")
    assert "ertified accuracy at radius" not in page
    assert f"{kind} accuracy at radius 0.5" in page
    assert "certificates are false" not in page


def test_csv_is_rectangular_and_agrees_with_json(tmp_path: Path) -> None:
    records = [cohen_like(tmp_path), ours(tmp_path), ours(tmp_path, "conditional", "frozen, once")]
    audits = [None, {"all": an_audit(broken=True)}, None]
    rows = list(csv.DictReader(io.StringIO(render(records, "csv", audits))))
    assert [row["record"] for row in rows] == ["sigma_0.50", "run", "frozen, once"]
    assert [row["certified_accuracy_0.25"] for row in rows] == ["0.25", "0.5", ""]
    assert [row["conditional_accuracy_0.25"] for row in rows] == ["", "", "0.5"]
    assert [row["sigma"] for row in rows] == ["", "0.5", "0.5"]
    assert [row["audit_contradictions"] for row in rows] == ["", "1", ""]
    assert "certified_accuracy" not in rows[0]


def test_markdown_latex_and_text_hold_the_same_cells(tmp_path: Path) -> None:
    record = cohen_like(tmp_path, "a_b|c&d")
    cells = ["8", "", "", "", "0.250", "0.250", "0.500", "0.250", "0.125", "0.125", "0.125", "0.125", "0.125"]
    markdown = render([record], "md").splitlines()
    assert [cell.strip() for cell in markdown[-1].replace("\\|", "/").strip("|").split("|")] == ["a_b/c&d", *cells]
    latex = next(line for line in render([record], "latex").splitlines() if "a\\_b" in line)
    assert [cell.strip() for cell in latex.replace("\\&", "+").removesuffix("\\\\").split("&")] == ["a\\_b|c+d", *cells]
    text = render([record], "text").splitlines()
    assert text[-1].split() == ["a_b|c&d", *(cell for cell in cells if cell)]


def test_tables_of_attacks_follow_and_name_each_case(tmp_path: Path) -> None:
    record = ours(tmp_path, name="a_b")
    markdown = render([record], "md", [{"all": an_audit(broken=True)}])
    assert "## Attacks on a_b - contradictions: 1 case at 1 input\n" in markdown
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    assert ["all", "0.25", "0.500", "0.500", "0.000", "0.500", "0.000", "1"] in rows
    assert ["5", "<pgd>", "0.25", "0.25", "0.3", "1", "0"] in rows
    latex = render([record], "latex", [{"all": an_audit(broken=False)}])
    assert "\\paragraph*{Attacks on a\\_b - contradictions: 0}" in latex
    assert "pgd" not in latex


def test_records_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    records = [cohen_like(tmp_path / f"noise_{sigma}" / "test") for sigma in ("0.25", "0.50")]
    names = [entry["record"] for entry in json.loads(render(records, "json"))]
    assert names == ["noise_0.25/test/sigma_0.50", "noise_0.50/test/sigma_0.50"]
    names = [entry["record"] for entry in json.loads(render(records[:1] * 2, "json"))]
    assert len(set(names)) == 2


def test_audit_table_by_hand() -> None:
    first, second = audit_table(an_audit(broken=False))
    assert first == {
        "budget": 0.25, "certified": 0.5, "correct": 0.75, "abstained": 0.0, "wrong": 0.25, "gap": 0.25,
        "contradictions": 0,
    }  # fmt: skip
    assert second == {
        "budget": 0.5, "certified": 0.25, "correct": 0.25, "abstained": 0.25, "wrong": 0.5, "gap": 0.25,
        "contradictions": 0,
    }  # fmt: skip
    assert [row["contradictions"] for row in audit_table(an_audit(broken=True))] == [1, 0]
    assert audit_text(an_audit(broken=False)).splitlines()[-1] == "Contradictions: 0"
    assert audit_text(an_audit(broken=True)).splitlines()[-1].split() == ["5", "<pgd>", "0.25", "0.25", "0.3", "1", "0"]


def test_audits_come_back_from_disk(tmp_path: Path) -> None:
    made, record = an_audit(broken=True), ours(tmp_path)
    assert load_audits([record]) == ([None], [])
    path = save_audits({"all": made}, record)
    assert path == tmp_path / "run.audit.json"
    (back,), notes = load_audits([record])
    assert back is not None
    assert notes == []
    assert audit_to_json(back["all"]) == audit_to_json(made)
    assert back["all"].suspected == made.suspected
    np.testing.assert_array_equal(back["all"].certified.lower, made.certified.lower)
    path.write_text(path.read_text().replace('"wrong"', '"wrang"'))
    with pytest.raises(ValueError, match=r"run\.audit\.json: value is not an audit \('wrong'\)"):
        load_audits([record])
    with pytest.raises(ValueError, match="is not an audit"):
        audit_from_json({"certified": [1]})


@pytest.mark.parametrize("column, value", [(1, "1"), (2, "1"), (3, "0.7")])
def test_an_audit_of_other_rows_is_left_out_and_the_report_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, column: int, value: str
) -> None:
    save_audits({"all": an_audit(broken=False)}, ours(tmp_path))
    lines = (tmp_path / "run.tsv").read_text().splitlines()
    cells = lines[1].split("\t")
    cells[column] = value
    cells[4] = str(int(cells[1] == cells[2]))
    (tmp_path / "run.tsv").write_text("\n".join([lines[0], "\t".join(cells), *lines[2:]]) + "\n")
    record = read_record(tmp_path / "run.tsv")
    audits, notes = load_audits([record])
    assert audits == [None]
    assert "run.audit.json was left out: it speaks of other rows than run.tsv has now; attack" in caplog.text + notes[0]
    assert "left out" in caplog.text
    for form in ("html", "md", "text", "latex"):
        shown = render([record], form, audits, notes=notes)
        assert "left out" in shown
        assert "ontradictions: 0" not in shown


def test_an_audit_without_a_digest_is_left_out(tmp_path: Path) -> None:
    record = ours(tmp_path)
    path = save_audits({"all": an_audit(broken=False)}, record)
    value = json.loads(path.read_text())
    del value["record_sha256"]
    path.write_text(json.dumps(value))
    assert load_audits([record])[0] == [None]


@pytest.mark.parametrize("kind", ["conditional", "committed"])
def test_no_audit_of_what_is_not_certified_is_shown(tmp_path: Path, kind: Kind) -> None:
    record = ours(tmp_path, kind)
    save_audits({"all": an_audit(broken=False)}, record)
    audits, (note,) = load_audits([record])
    assert audits == [None]
    assert f"{kind} certificates are not certified accuracy" in note
    for form in ("html", "json", "csv", "md"):
        with pytest.raises(ValueError, match=f"run holds {kind} certificates, which no attack audits"):
            render([record], form, [{"all": an_audit(broken=False)}])


def silent_audit(*levels: int) -> Audit:
    """Attack at .25 and .5 whose every answer at these levels is an abstention."""
    abstained = np.zeros((2, 4), dtype=bool)
    abstained[list(levels)] = True
    outcomes = AttackOutcomes(
        name="pgd",
        budgets=np.array([0.25, 0.5]),
        prediction=np.tile(LABELS, (2, 1)),
        abstained=abstained,
        distance=np.array([[0.25] * 4, [0.5] * 4]),
        confirmed=np.zeros((2, 4), dtype=bool),
        n=5,
        alpha=0.001,
    )
    return audit(our_certificates(), outcomes, LABELS)


def test_an_attack_that_only_abstained_reassures_nobody(tmp_path: Path) -> None:
    record = ours(tmp_path)
    page = render([record], "html", [{"all": silent_audit(0, 1)}])
    assert 'class="calm"' not in page
    assert "At budget 0.25, 0.5 the votes could decide nothing, so that says nothing there" in page
    assert "The attack's votes could decide nothing at budget 0.25, 0.5" in " ".join(Page(page).words().split())
    assert "the votes decided nothing; raise n" in audit_text(silent_audit(0, 1))
    assert "the votes decided nothing; raise n" in render([record], "md", [{"all": silent_audit(0, 1)}])
    partly = Page(render([record], "html", [{"all": silent_audit(1)}])).words()
    assert "at budget 0.5: every input" in " ".join(partly.split())
    assert "Contradictions: 0 among 4 attacked inputs" in " ".join(partly.split())
    (entry,) = json.loads(render([record], "json", [{"all": silent_audit(1)}]))
    assert entry["audit"]["undecided_budgets"] == [0.5]
    assert "decide nothing" not in render([record], "html", [{"all": an_audit(broken=False)}])


def test_contradictions_are_counted_as_cases_and_as_inputs() -> None:
    one = an_audit(broken=True)
    (case,) = one.contradictions
    twice = replace(one, suspected=(case, replace(case, attack="square")))
    other = replace(one, suspected=(case, replace(case, index=9)))
    assert count_cases([an_audit(broken=False)]) == "0"
    assert count_cases([one]) == "1 case at 1 input"
    assert count_cases([twice]) == "2 cases at 1 input"
    assert count_cases([twice, other]) == "4 cases at 3 inputs"


def test_one_number_has_one_name(tmp_path: Path) -> None:
    """Accuracy at radius 0 was shown as natural accuracy beside certified accuracy at radius 0."""
    record = ours(tmp_path)
    page = render([record], "html")
    assert "natural accuracy" in page
    assert "certified accuracy at radius 0<" not in page
    assert ">r=0<" not in page
    assert "natural_accuracy" not in render([record], "json")


def test_the_leaderboard_by_hand(tmp_path: Path) -> None:
    broken, calm = an_audit(broken=True), an_audit(broken=False)
    records = [ours(tmp_path, "conditional", "frozen"), cohen_like(tmp_path), ours(tmp_path, name="attacked")]
    rows = leaderboard(records, [None, None, {"all": broken, "<pgd>": broken, "weak": calm}])
    assert [row["record"] for row in rows] == ["attacked", "sigma_0.50", "frozen"]   # what is certified stands first
    row, theirs, frozen = rows
    assert {name: row[name] for name in ("kind", "inputs", "n", "alpha", "passes", "seconds", "abstain", "ACR")} == {
        "kind": "certified", "inputs": "4", "n": "100", "alpha": "0.001", "passes": "110", "seconds": "0.1",
        "abstain": "0.250", "ACR": "0.225",
    }  # fmt: skip
    # Right are input 3 at .6 and input 5 at .3; Clopper-Pearson of 2 and of 1 in 4 at 95 %, from tables
    assert row["natural"] == "0.500 [0.068, 0.932]"
    assert row["r=0.25"] == "0.500 [0.068, 0.932]"
    assert row["r=0.5"] == "0.250 [0.006, 0.806]"
    assert row["r=0.75"] == "0.000 [0.000, 0.602]"
    assert "r=0" not in row   # it is the natural accuracy
    assert row["false at most"] == "1"
    assert row["contradictions"] == "1 case at 1 input"
    # Of the four, input 9 is always wrong, and input 5 falls at .5, or at .25 already if its certificate is false.
    assert [row[f"all attacked@{budget}"] for budget in ("0.25", "0.5")] == ["0.500", "0.500"]
    assert [row[f"weak attacked@{budget}"] for budget in ("0.25", "0.5")] == ["0.750", "0.500"]
    assert [row[f"weak gap@{budget}"] for budget in ("0.25", "0.5")] == ["0.250", "0.250"]
    assert (theirs["alpha"], theirs["false at most"], theirs["contradictions"]) == ("", "", "not attacked")
    assert theirs["seconds"] == f"{(7 * 16.6 + 14.206886) / 8:.3g}"
    assert (frozen["false at most"], frozen["contradictions"], frozen["all gap@0.5"]) == ("", "not attacked", "")


def test_an_attack_that_decided_nothing_is_no_clean_bill(tmp_path: Path) -> None:
    record = ours(tmp_path)
    (row,) = leaderboard([record], [{"all": silent_audit(0, 1)}])
    assert row["contradictions"] == "undecided"
    (row,) = leaderboard([record], [{"all": silent_audit(1)}])
    assert row["contradictions"] == "0"


def test_the_files_of_the_leaderboard(tmp_path: Path) -> None:
    records = [ours(tmp_path, name="a_b"), ours(tmp_path, "committed", "kept")]
    found = {"all": an_audit(broken=False), "p&d": an_audit(broken=False)}
    markdown = write_leaderboard(records, tmp_path / "board", audits=[found, None])
    assert (tmp_path / "board.md").read_text() == markdown
    certified, _, rest = markdown.partition("### Committed by the memory (not certified accuracy)")
    kept, _, attacks = rest.partition("### Under attack")
    assert "| a_b " in certified
    assert "| kept " not in certified
    assert "| kept " in kept
    assert "attacked@" not in certified
    assert [line.split("|")[2].strip() for line in attacks.splitlines() if line.startswith("| a_b")] == ["all", "p&d"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "board.csv").read_text())))
    assert rows == leaderboard(records, [found, None])
    latex = (tmp_path / "board.tex").read_text()
    assert latex.count("\\paragraph*{") == 3
    assert "a\\_b" in latex
    assert "p\\&d" in latex


def test_the_demo_table_has_a_line_for_each_attack_and_budget(tmp_path: Path) -> None:
    lines = demo_table([(0.5, ours(tmp_path), {"pgd": an_audit(broken=False)})]).splitlines()
    assert lines[-2].split() == ["0.5", "pgd", "0.25", "0.500", "0.750", "0.000", "0.250", "0.250", "0"]
    assert lines[-1].split() == ["0.5", "pgd", "0.5", "0.250", "0.250", "0.250", "0.500", "0.250", "0"]


def test_wrong_requests_are_named(tmp_path: Path) -> None:
    record = cohen_like(tmp_path)
    with pytest.raises(ValueError, match="format must be one of html, md, csv, latex, json, text, got 'pdf'"):
        render([record], "pdf")
    with pytest.raises(ValueError, match=r"format must be one of .*parquet, got 'pdf'"):
        write_report([record], "pdf", tmp_path / "a")
    with pytest.raises(ValueError, match="at least one record"):
        render([], "md")
    with pytest.raises(ValueError, match="audits must hold one entry for each of 1 records, got 0"):
        render([record], "md", [])
    with pytest.raises(ValueError, match="nearest must hold one entry for each of 1 records, got 2"):
        render([record], "html", nearest=[None, None])
    with pytest.raises(ValueError, match=r"those of sigma_0.50 must hold 'all', the worst of its attacks; got \['pgd'"):
        render([record], "md", [{"pgd": an_audit(broken=False)}])
    with pytest.raises(ValueError, match="must hold 'all'"):
        write_leaderboard([record], tmp_path / "a", audits=[{}])
    assert not (tmp_path / "a").exists()


def test_a_report_is_written_as_it_is_rendered(tmp_path: Path) -> None:
    record = cohen_like(tmp_path)
    write_report([record], "html", tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_text() == render([record], "html")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra `tables`) is not installed")
    write_report([record], "parquet", tmp_path / "rows.parquet")
    assert parquet.read_table(tmp_path / "rows.parquet").num_rows == 8


def test_plots_show_the_numbers_they_are_given() -> None:
    radii = np.array([0.0, 0.5, 1.0])
    curve = accuracy_curve(np.array([True, True, False]), np.array([0.6, 0.2, 0.9]), radii)
    ax = plot_certified_accuracy({"_a $b$": curve})
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2 / 3, 1 / 3, 0])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["_a $b$"]
    assert "l2 radius" in ax.get_xlabel()
    assert ax.get_ylim() == (0.0, 1.0)
    assert plot_certified_accuracy({"again": curve}, ax) is ax
    with pytest.raises(ValueError, match="at least one curve"):
        plot_certified_accuracy({})


@pytest.mark.parametrize("broken", [False, True])
def test_the_audit_plot_marks_every_contradiction(broken: bool) -> None:
    found = an_audit(broken=broken)
    ax = plot_audit(found, found.certified)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ("contradictions: 1" in labels) == broken
    attacked = next(line for line in ax.lines if line.get_drawstyle() == "steps-post")
    np.testing.assert_array_equal(attacked.get_ydata(), 1 - found.wrong)
    crosses = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "X"]
    assert crosses == ([[0.25]] if broken else [])


# --- the published logs -----------------------------------------------------------------------------------------------


def recount(path: Path) -> tuple[int, float, float, dict[str, float]]:
    """Rows, abstention, ACR and certified accuracy by plain counting."""
    lines = path.read_text().rstrip("\n").split("\n")[1:]
    abstained, right = 0, []
    for line in lines:
        _, label, predict, radius, _, _ = line.split("\t")
        abstained += predict == "-1"
        if label == predict:
            right.append(float(radius))
    curve = {f"{r:g}": sum(radius >= r for radius in right) / len(lines) for r in RADII}
    return len(lines), abstained / len(lines), math.fsum(right) / len(lines), curve


@needs_logs
def test_every_published_log_adds_up() -> None:
    paths = sorted(LOGS.rglob("*.tsv"))
    assert len(paths) == 13
    entries = json.loads(render([read_record(path) for path in paths], "json"))
    assert len({entry["record"] for entry in entries}) == 13
    for path, entry in zip(paths, entries, strict=True):
        rows, abstained, acr, curve = recount(path)
        assert (entry["rows"], entry["abstain_rate"], entry["certified_accuracy"]) == (rows, abstained, curve), path
        assert entry["acr"] == pytest.approx(acr, abs=1e-12)
        assert entry["sigma"] is None
    assert 427 in [entry["rows"] for entry in entries]


@needs_logs
@pytest.mark.parametrize(
    "sigma, abstained, natural, acr",
    [("0.25", 0.086, 0.748, 0.429), ("0.50", 0.166, 0.652, 0.538), ("1.00", 0.290, 0.472, 0.542)],
)
def test_reference_values_of_cohens_cifar_networks(sigma: str, abstained: float, natural: float, acr: float) -> None:
    summary = summarize(read_record(LOGS / f"cifar10/resnet110/noise_{sigma}/test/sigma_{sigma}.tsv"))
    assert summary.abstain_rate == pytest.approx(abstained, abs=1e-12)
    assert summary.curve.accuracy[0] == pytest.approx(natural, abs=1e-12)
    assert summary.acr == pytest.approx(acr, abs=5e-4)


@needs_logs
def test_both_clocks_of_the_published_logs() -> None:
    seconds = read_record(LOGS / "cifar10/resnet110/noise_0.50/test/sigma_0.50.tsv")
    clock = read_record(LOGS / "cifar10/resnet110/noise_0.12/test/sigma_0.12.tsv")
    assert seconds.time[0] == 16.6
    assert clock.time[0] == 13.736080
    hours = read_record(LOGS / "imagenet/resnet50/noise_0.50/test/sigma_0.50.tsv")
    assert hours.time[0] == pytest.approx(152.717239)


@needs_logs
@pytest.mark.parametrize(
    "log, sigma, alpha",
    [
        ("cifar10/resnet110/noise_0.25/test/sigma_0.25.tsv", 0.25, 0.01),
        ("cifar10/resnet110/noise_0.50/test/sigma_0.50.tsv", 0.5, 0.01),
        ("cifar10/resnet110/noise_1.00/test/sigma_1.00.tsv", 1.0, 0.01),
        ("cifar10/resnet110/noise_0.12/test/sigma_0.12.tsv", 0.12, 0.001),
    ],
)
def test_the_top_radii_of_a_published_log_are_those_of_counts(log: str, sigma: float, alpha: float) -> None:
    record = read_record(LOGS / log)
    levels = np.unique(record.radius)[::-1]
    n, misses = 100_000, np.arange(60)
    failure = clopper_pearson_upper(misses, n, alpha)
    possible = {f"{radius:.3g}" for radius in gaussian_radius(failure, failure, sigma)}
    # near the ceiling the levels of neighbouring counts are further apart than the three digits of the log
    assert {f"{level:.3g}" for level in levels[:6]} <= possible
    other = clopper_pearson_upper(misses, n, {0.01: 0.001, 0.001: 0.01}[alpha])
    assert f"{levels[0]:.3g}" not in {f"{radius:.3g}" for radius in gaussian_radius(other, other, sigma)}

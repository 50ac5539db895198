"""The page: what it says, that it needs nothing from anywhere, and what a browser makes of it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from planted import LABELS, Page, an_audit, cohen_like, our_certificates, ours
from plotly.offline import get_plotlyjs

from art_rs_plugins.benchmark.figures import audit_figure, curves_figure, figure_html
from art_rs_plugins.benchmark.gallery import gallery
from art_rs_plugins.benchmark.markup import html_table, markdown, png
from art_rs_plugins.benchmark.nearest import Nearest
from art_rs_plugins.benchmark.page import _curve_under, _grid
from art_rs_plugins.benchmark.plots import ALARM, bracket
from art_rs_plugins.benchmark.report import render
from art_rs_plugins.theory.audit import AttackOutcomes, audit
from art_rs_plugins.theory.metrics import accuracy_curve, certified_accuracy

CURVE = accuracy_curve(np.array([True, True, False]), np.array([0.6, 0.2, 0.9]), [0.0, 0.5, 1.0])


def found_near(shape: tuple[int, ...] = (1, 4, 4)) -> Nearest:
    """Input 3 (certified within .6) at .7, and input 5 (certified within .3) at .2: a contradiction."""
    original = np.zeros((2, *shape), dtype=np.float32)
    adversarial = original.copy()
    adversarial.reshape(2, -1)[:, 0] = 0.7, 0.2
    distance = np.array([0.7, 0.2])
    return Nearest(np.array([3, 5]), original, adversarial, distance, ("<pgd>", "square"))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>".replace("/", "") + " $x_1$"
    record = ours(tmp_path, name=name)
    audits = {"all": an_audit(broken=True), "<img src=x>": an_audit(broken=True)}
    extras = [("<i>More</i>", "a <b>c\n\n| x | y |\n|---|---|\n| 1 | <u>2 |")]
    source = render(
        [record, cohen_like(tmp_path, "_under")], "html", [audits, None], nearest=[found_near(), None], extras=extras
    )
    page = Page(source)
    assert page.open == []
    assert source.count(get_plotlyjs()) == 1
    scripts = [data for tag, data in page.text if tag == "script" and data.strip()]
    plots = [script for script in scripts if "Plotly.newPlot" in script and script != get_plotlyjs()]
    assert len(plots) == 2   # the certified curves and the attacks
    assert len(scripts) == 4   # the library and the buttons
    assert not any("<" in script for script in plots)   # no name leaves its string
    ours_alone = source.replace(get_plotlyjs(), "")
    assert "http" not in ours_alone.replace("http-equiv", "")
    assert "url(" not in ours_alone.replace("url(#", "")
    outside = [value for _, attribute, value in page.attributes if attribute in ("src", "href", "xlink:href")]
    assert outside
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in outside)
    for words in (name, "_under", "<pgd>", "<img src=x>", "<b>&amp;</b>", "<i>More</i>", "a <b>c", "<u>2"):
        assert words in page.words()
    policy = next(value for tag, attribute, value in page.attributes if (tag, attribute) == ("meta", "content"))
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    record, audits = ours(tmp_path), {"all": an_audit(broken=True)}
    pages = [render([record], "html", [audits], nearest=[found_near()]) for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_page_is_loud_about_contradictions_and_calm_without(tmp_path: Path) -> None:
    record = ours(tmp_path)
    loud = render([record], "html", [{"all": an_audit(broken=True)}])
    assert loud.index('role="alert"') < loud.index("<h2")
    assert "Contradictions: 1 case at 1 input" in Page(loud).words()
    row = ["run", "5", "<pgd>", "0.25", "0.25", "0.3", "1", "0"]
    cells = [data for tag, data in Page(loud[: loud.index("<h2")]).text if tag in ("td", "th")]
    assert any(cells[start : start + len(row)] == row for start in range(len(cells)))
    calm = render([record], "html", [{"all": an_audit(broken=False)}])
    assert 'role="alert"' not in calm
    assert "Contradictions: 0" in Page(calm).words()
    silent = Page(render([record], "html")).words()
    assert "Contradictions: 0" not in silent   # nobody looked
    assert "No attack is shown" in silent


def test_the_page_says_what_is_guaranteed(tmp_path: Path) -> None:
    words = Page(render([ours(tmp_path)], "html")).words()
    # 4 certificates at alpha .001: P(more than 1 false) = 6e-6 <= .001 < P(at least 1) = .004
    assert "with probability at least 0.999, at most 1 of the 4 certificates are false" in words
    assert "n = 100, n0 = 10, alpha = 0.001" in words
    assert "alpha is not recorded" in Page(render([cohen_like(tmp_path)], "html")).words()


def test_what_is_not_certified_has_plots_and_tables_of_its_own(tmp_path: Path) -> None:
    records = [ours(tmp_path, "conditional", "frozen"), ours(tmp_path), ours(tmp_path, "committed", "kept")]
    source = render(records, "html")
    figures = re.findall(r'<figure id="([^"]+)">(.*?)</figure>', source, re.DOTALL)
    assert [name for name, _ in figures] == ["curves-certified", "curves-conditional", "curves-committed"]
    for (_, figure), name in zip(figures, ("run", "frozen", "kept"), strict=True):
        legend = re.findall(r"</span>([^<]*)</button>", figure)
        assert legend == [name]
        assert f'<th scope="col">{name}</th>' in figure   # its data table


def test_how_to_reproduce_each_record(tmp_path: Path) -> None:
    record = ours(tmp_path)
    manifest = {"command": "art-rs certify <x>", "seed": 7, "versions": {"torch": "2.9"}, "data_sha256": "ab12"}
    (tmp_path / "run.manifest.json").write_text(json.dumps(manifest))
    words = Page(render([type(record)(**{**fields_of(record), "manifest": manifest})], "html")).words()
    for fact in ("art-rs certify <x>", "torch", "2.9", "data_sha256", "ab12", "seed"):
        assert fact in words.partition("What is guaranteed")[2]
    assert "sigma_0.50.tsv has no manifest beside it" in Page(render([cohen_like(tmp_path)], "html")).words()


def fields_of(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


# --- its pieces -------------------------------------------------------------------------------------------------------


def test_figures_hold_the_numbers_they_are_given() -> None:
    name = "<b>a</b>"
    band, line = curves_figure({name: CURVE}).data
    np.testing.assert_array_equal(line.y, [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(line.customdata, np.stack([CURVE.lower, CURVE.upper, [2, 1, 0]], axis=1))
    np.testing.assert_array_equal(band.y, [*CURVE.upper, *CURVE.lower[::-1]])
    assert (band.legendgroup, line.legendgroup, line.name) == (name, name, "&lt;b&gt;a&lt;/b&gt;")
    assert 'data-traces="[0, 1]"' in figure_html(curves_figure({name: CURVE}), "x")
    with pytest.raises(ValueError, match="at least one curve"):
        curves_figure({})


@pytest.mark.parametrize("broken", [False, True])
def test_the_figure_of_attacks_brackets_the_truth_and_marks_contradictions(broken: bool) -> None:
    found = an_audit(broken=broken)
    traces = audit_figure({"all": found, "pgd": found, "weak": an_audit(broken=False)}, found.certified).data
    groups = list(dict.fromkeys(trace.legendgroup for trace in traces))
    assert groups == ["certified", "undecided", "all attacks", "pgd", "weak", *["contradictions: 1"] * broken]
    attacked = next(trace for trace in traces if trace.legendgroup == "all attacks")
    np.testing.assert_array_equal(attacked.y, 1 - found.wrong)
    assert attacked.line.shape == "hv"
    crosses = [trace for trace in traces if trace.marker.color == ALARM]
    assert [list(trace.x) for trace in crosses] == ([[0.25]] if broken else [])
    alone = audit_figure({"all": found, "pgd": found}, found.certified).data   # one attack is the worst of its own
    assert "all attacks" not in [trace.legendgroup for trace in alone]


def test_the_bracket_holds_each_budget_up_to_the_next() -> None:
    found = an_audit(broken=False)   # .75 are left at .25, and .5 at .5
    radii, lower, upper = bracket(found, certified_accuracy(our_certificates(), LABELS, np.linspace(0, 1, 101)))
    assert (radii[0], radii[-1]) == (0.25, 0.5)
    np.testing.assert_array_equal(upper, np.where(radii < 0.5, 0.75, 0.5))
    np.testing.assert_allclose(lower[[0, -1]], [0.5, 0.25])


def test_a_curve_between_budgets_is_never_above_the_certified_one(tmp_path: Path) -> None:
    """Of an attack on some inputs the audit knows the certified accuracy at the budgets alone."""
    certificates, record = our_certificates(), ours(tmp_path)
    rows = [0, 1, 3]
    outcomes = AttackOutcomes(
        name="pgd",
        budgets=np.array([0.1, 0.5, 0.7]),
        prediction=np.tile(LABELS[rows], (3, 1)),
        abstained=np.zeros((3, 3), dtype=bool),
        distance=np.zeros((3, 3)),
        confirmed=np.zeros((3, 3), dtype=bool),
        n=5,
        alpha=0.001,
    )
    curve = _curve_under(audit(certificates[rows], outcomes, LABELS[rows]), record)
    fine = np.linspace(0.1, 0.7, 61)
    true = certified_accuracy(certificates[rows], LABELS[rows], fine).accuracy
    shown = np.interp(fine, curve.radii, curve.accuracy)
    assert np.all(shown <= true + 1e-12)
    np.testing.assert_allclose(shown[[0, 40, 60]], true[[0, 40, 60]])   # the budgets
    assert len(_curve_under(an_audit(broken=False), record).radii) > 100   # of all inputs the record knows it


@pytest.mark.parametrize("end", [0.25, 0.3, 0.9999, 1.0, 3.7, 40.0])
def test_the_radii_of_a_picture_are_round_and_reach_its_end(end: float) -> None:
    grid = _grid(end)
    assert grid[0] == 0.0
    assert grid[-2] < end <= grid[-1]
    assert 150 <= len(grid) <= 402
    assert all(float(f"{radius:.6g}") == radius for radius in grid)


def test_a_png_has_the_pixels_that_it_was_given(tmp_path: Path) -> None:
    image = np.array([[[0.0, 1.0], [0.2, -3.0]], [[0.4, 1.0], [0.6, 9.0]], [[0.8, 1.0], [1.0, 0.5]]])
    for pixels in (image, image[:1]):
        head, _, body = png(pixels).partition(",")
        (tmp_path / "a.png").write_bytes(base64.b64decode(body))
        assert head == "data:image/png;base64"
        back, wanted = imread(tmp_path / "a.png")[..., :3], np.clip(np.moveaxis(pixels, 0, -1), 0, 1)
        np.testing.assert_allclose(back, np.broadcast_to(wanted, back.shape), atol=2e-3)


def test_the_gallery_shows_what_was_certified_and_what_was_found(tmp_path: Path) -> None:
    record = ours(tmp_path)
    page = Page(gallery(found_near(), record))
    words = " ".join(page.words().split())
    assert "Input 3 , label 0. Class 0 certified within 0.600 . Nearest adversarial example at 0.700 (<pgd>)" in words
    assert "Input 5 , label 1. Class 1 certified within 0.300 . Nearest adversarial example at 0.200 (square)" in words
    assert words.count("inside the certified ball") == 1
    assert [value for tag, name, value in page.attributes if (tag, name) == ("li", "class")] == ["broken"]
    assert len([tag for tag, name, _ in page.attributes if name == "alt"]) == 6
    nine = Nearest(np.array([9]), *[np.zeros((1, 3, 2, 2), dtype=np.float32)] * 2, np.zeros(1), ("pgd",))
    assert "inside" not in gallery(nine, record)   # its class was wrong from the start
    seven = Nearest(np.array([7]), *[np.zeros((1, 3, 2, 2), dtype=np.float32)] * 2, np.zeros(1), ("pgd",))
    assert "Nothing certified." in gallery(seven, record)


def test_what_is_no_image_is_a_table(tmp_path: Path) -> None:
    shown = gallery(found_near((5,)), ours(tmp_path))
    assert "<img" not in shown
    cells = [data for tag, data in Page(shown).text if tag in ("td", "th")]
    assert cells[6:12] == ["3", "0", "0", "0.6", "0.7", "<pgd>"]


def test_a_gallery_of_other_inputs_is_refused(tmp_path: Path) -> None:
    record, near = ours(tmp_path), found_near()
    other = Nearest(np.array([3, 4]), near.original, near.adversarial, near.distance, near.attack)
    with pytest.raises(ValueError, match=r"nearest must hold inputs of run.tsv, got \[4\]"):
        gallery(other, record)
    none = Nearest(near.index[:0], near.original[:0], near.adversarial[:0], near.distance[:0], ())
    with pytest.raises(ValueError, match="got none"):
        gallery(none, record)


def test_markdown_becomes_tables_and_paragraphs() -> None:
    found = markdown("One\n\n| a | b\\|c |\n|---|--:|\n| 1 | <2> |\n| 3 |  |\n\nTwo & three")
    cells = [data for tag, data in Page(found).text if tag in ("td", "th", "p") and data.strip()]
    assert cells == ["One", "a", "b|c", "1", "<2>", "3", "Two & three"]
    assert Page(html_table([{"a": "1"}], '"x"')).open == []


# --- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAMES = """<!DOCTYPE html><title>frames</title>
<iframe id="phone" src="page.html" width="390" height="844"></iframe>
<iframe id="paper" src="paper.html" width="900" height="900"></iframe>
<script>
const inside = (name) => document.getElementById(name).contentWindow;
const report = (value) => {
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify(value);
  document.body.replaceChildren(found);
};
const shown = (element) => element.getBoundingClientRect().height > 20;
const measure = () => {
  const view = inside("phone"), page = view.document, paper = inside("paper").document;
  const plots = [...page.querySelectorAll(".js-plotly-plot")], [first, attacks] = plots;
  view.Plotly.Fx.hover(first, { xval: 0.25 });
  const hover = [...first.querySelectorAll(".hoverlayer text")].map((text) => text.textContent);
  const button = first.closest("figure").querySelector(".legend button");
  const visible = () => first.data.map((trace) => trace.visible ?? true);
  const before = visible();
  button.click();
  const hidden = [visible(), button.getAttribute("aria-pressed")];
  button.click();
  report({
    width: view.innerWidth,
    overflow: page.documentElement.scrollWidth,
    lines: plots.map((plot) => plot.querySelectorAll(".scatterlayer .trace").length),
    widths: plots.map((plot) => plot.getBoundingClientRect().width),
    markers: attacks.querySelectorAll(".scatterlayer .point").length,
    hover, before, hidden, after: [visible(), button.getAttribute("aria-pressed")],
    tables: [...page.querySelectorAll("figure")].map((figure) => figure.querySelectorAll("details table").length),
    statics: [...page.querySelectorAll(".static")].map(shown),
    focus: [...page.querySelectorAll(".scroll")].every((region) => region.tabIndex === 0 && region.ariaLabel),
    skip: page.querySelector("a").getAttribute("href"),
    paper: {
      live: [...paper.querySelectorAll(".live")].map(shown),
      statics: [...paper.querySelectorAll(".static svg")].map(shown),
    },
  });
};
let tries = 0;
const wait = setInterval(() => {
  const ready = inside("phone").document.querySelectorAll(".js-plotly-plot .scatterlayer").length === 2;
  if (ready && inside("paper").document.readyState === "complete") { clearInterval(wait); setTimeout(measure, 500); }
  else if (++tries > 100) { clearInterval(wait); report({}); }
}, 100);
</script>
"""
SILENT = """<!DOCTYPE html><title>frames</title>
<iframe id="still" src="page.html" sandbox="allow-same-origin" width="900" height="900"></iframe>
<script>
addEventListener("load", () => {
  const page = document.getElementById("still").contentDocument;
  const shown = (element) => element.getBoundingClientRect().height > 20;
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({
    live: [...page.querySelectorAll(".live")].map(shown),
    statics: [...page.querySelectorAll(".static svg")].map(shown),
  });
  document.body.replaceChildren(found);
});
</script>
"""


def browse(folder: Path, page: str) -> tuple[dict[str, Any], list[str]]:
    """What a page of `folder` found out about the others, and what the browser's console said."""
    if CHROMIUM is None:
        if os.environ.get("ART_RS_REQUIRE_CHROMIUM"):
            pytest.fail("ART_RS_REQUIRE_CHROMIUM is set, but there is no Chromium: apt-get install chromium")
        pytest.skip("no Chromium to look at the page with: apt-get install chromium")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000"),
            *("--allow-file-access-from-files", "--virtual-time-budget=30000", "--enable-logging=stderr"),
            *("--dump-dom", (folder / page).as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout)
    assert found is not None, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(found[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a page, its copy that is laid out as on paper, and the frames that look at them."""
    folder = tmp_path_factory.mktemp("site")
    records = [ours(folder), cohen_like(folder, "a_log_of_a_name_that_is_rather_too_long_for_the_width_of_a_phone" * 2)]
    audits = {"all": an_audit(broken=True), "pgd": an_audit(broken=True), "weak": an_audit(broken=False)}
    source = render(records, "html", [audits, None], nearest=[found_near(), None])
    (folder / "page.html").write_text(source)
    assert "@media print" in source
    (folder / "paper.html").write_text(source.replace("@media print", "@media all"))
    (folder / "frames.html").write_text(FRAMES)
    (folder / "silent.html").write_text(SILENT)
    return folder


@pytest.fixture(scope="module")
def seen(site: Path) -> tuple[dict[str, Any], list[str]]:
    return browse(site, "frames.html")


def test_nothing_is_asked_from_anywhere_and_nothing_goes_wrong(
    seen: tuple[dict[str, Any], list[str]], site: Path
) -> None:
    assert seen[0]
    assert seen[1] == []
    page = (site / "page.html").read_text()
    (site / "leaky").mkdir()
    (site / "leaky" / "frames.html").write_text(FRAMES)
    (site / "leaky" / "paper.html").write_text("")
    (site / "leaky" / "page.html").write_text(page.replace("</h1>", '<img src="https://localhost/x.png"></h1>'))
    _, complaints = browse(site / "leaky", "frames.html")
    assert "https://localhost/x.png" in complaints[0]   # the page's own policy refuses it


def test_plots_are_drawn_with_a_legend_and_a_table(seen: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = seen
    assert found["lines"] == [4, 7]   # two curves with bands; certified with its band, gap, three attacks, crosses
    assert found["markers"] == 7   # three attacks at two budgets, and one contradiction
    assert found["tables"] == [1, 1]
    assert found["statics"] == [False, False]


def test_hover_shows_radius_accuracy_band_and_count(seen: tuple[dict[str, Any], list[str]]) -> None:
    hover = " ".join(seen[0]["hover"])
    assert "radius 0.25" in hover
    assert "run : 0.500 [0.068, 0.932], 2 of 4" in hover
    assert "0.250 [0.032, 0.651], 2 of 8" in hover


def test_a_button_of_the_legend_hides_a_curve_and_brings_it_back(seen: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = seen
    assert found["before"] == [True] * 4
    assert found["hidden"] == [[False, False, True, True], "false"]
    assert found["after"] == [[True] * 4, "true"]


def test_a_phone_shows_it_without_scrolling_sideways(seen: tuple[dict[str, Any], list[str]]) -> None:
    found, _ = seen
    assert found["width"] == 390
    assert found["overflow"] <= 390
    assert all(200 < width <= 390 for width in found["widths"])


def test_it_can_be_used_without_a_mouse(seen: tuple[dict[str, Any], list[str]]) -> None:
    assert seen[0]["focus"]
    assert seen[0]["skip"] == "#main"


def test_paper_has_drawings_in_place_of_the_plots(seen: tuple[dict[str, Any], list[str]]) -> None:
    assert seen[0]["paper"] == {"live": [False, False], "statics": [True, True]}


def test_without_scripts_the_drawings_stand_in(site: Path) -> None:
    found, _ = browse(site, "silent.html")
    assert found == {"live": [False, False], "statics": [True, True]}

"""The command line: the main job on embedded data, resume, and errors of one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support import TEST, TRAIN, X, Y

from art_rs_plugins.benchmark import attacked, runs
from art_rs_plugins.benchmark.attacked import attack
from art_rs_plugins.benchmark.config import AttackConfig, RunConfig, TrainConfig
from art_rs_plugins.benchmark.data import load
from art_rs_plugins.benchmark.evasion import find_examples
from art_rs_plugins.benchmark.records import read_record, to_certificates
from art_rs_plugins.benchmark.training import train
from art_rs_plugins.cli import main
from art_rs_plugins.smoothing.performance import Performance

FGM = [AttackConfig(("fgm",), (0.5,))]


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one call."""
    monkeypatch.setattr(sys, "argv", ["art-rs", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    train(TrainConfig(epochs=15), path)
    return path


@pytest.fixture
def certified(weights: Path, tmp_path: Path) -> Path:
    path = tmp_path / "record.tsv"
    runs.certify(RunConfig(weights=str(weights), n=1_000, examples=":24"), path)
    return path


def test_train_certify_attack_report(monkeypatch, capsys, tmp_path):
    weights, record = str(tmp_path / "w" / "net.safetensors"), tmp_path / "r" / "digits.tsv"
    code, out, _ = run(monkeypatch, capsys, "train", "--output", weights, "--epochs", "15", "--quiet")
    assert code == 0
    assert "training accuracy under noise" in out
    certify = ["certify", "--output", str(record), "--weights", weights, "--n", "1000", "--examples", ":20", "--quiet"]
    code, out, _ = run(monkeypatch, capsys, *certify)
    assert code == 0
    assert "digits" in out
    lines = record.read_text().splitlines()
    assert lines[0].split("\t")[:6] == ["idx", "label", "predict", "radius", "correct", "time"]
    assert len(lines) == 21
    manifest = json.loads((tmp_path / "r" / "digits.manifest.json").read_text())
    assert manifest["config"]["n"] == 1000
    facts = {"network_sha256", "data_sha256", "labels_sha256", "indices_sha256", "device", "performance", "block"}
    assert facts | {"versions"} <= set(manifest)
    assert isinstance(manifest["block"], int)
    assert manifest["training"]["sigma"] == "0.25"
    assert manifest["training"]["epochs"] == "15"
    assert len(manifest["network_outputs"]) == 8
    code, out, _ = run(
        monkeypatch, capsys, "attack", str(record), "--budget", "1.0", "--budget", "0.5", "--steps", "5", "--quiet"
    )
    assert code == 0
    for word in ("pgd", "smoothed-pgd", "all", "contradictions"):
        assert word in out
    for form in ("html", "md", "csv", "latex", "json"):
        target = tmp_path / f"report.{form}"
        code, _, _ = run(monkeypatch, capsys, "report", str(record), "--format", form, "--output", str(target))
        assert code == 0
        assert target.stat().st_size > 200
    (entry,) = json.loads((tmp_path / "report.json").read_text())
    found = read_record(record)
    assert entry["rows"] == 20
    assert entry["sigma"] == 0.25
    assert entry["certified_accuracy"]["0.5"] == np.mean(found.correct & (found.radius >= 0.5))


def test_resume_gives_the_rows_of_an_undisturbed_run(weights, certified, tmp_path):
    whole = certified.read_bytes().splitlines(keepends=True)
    torn = tmp_path / "torn.tsv"
    torn.with_name("torn.manifest.json").write_bytes(certified.with_name("record.manifest.json").read_bytes())
    torn.write_bytes(b"".join(whole[:9]) + whole[9][: len(whole[9]) // 2])
    runs.certify(RunConfig(weights=str(weights), n=1_000, examples=":24"), torn)
    again, first = read_record(torn), read_record(certified)
    assert np.array_equal(again.idx, first.idx)
    assert np.array_equal(again.radius, first.radius)
    assert torn.read_bytes().splitlines()[:9] == [line.rstrip(b"\n") for line in whole[:9]]


def test_a_slice_has_the_same_rows_as_the_whole(weights, certified, tmp_path):
    runs.certify(RunConfig(weights=str(weights), n=1_000, examples="3:24:7"), tmp_path / "slice.tsv")
    part, whole = read_record(tmp_path / "slice.tsv"), read_record(certified)
    assert part.idx.tolist() == [3, 10, 17]
    assert np.array_equal(part.radius, whole.radius[part.idx])


def test_a_false_record_is_contradicted_and_fails(monkeypatch, capsys, certified):
    """Radii written three times too large: the attack must find it, and the exit code must say so."""
    lines = certified.read_text().splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    for row in rows:
        row[3] = repr(3 * float(row[3]))
    certified.write_text("\n".join([lines[0], *("\t".join(row) for row in rows)]) + "\n")
    code, _, err = run(monkeypatch, capsys, "attack", str(certified), "--budget", "1.5", "--attack", "pgd", "--quiet")
    assert code == 1
    assert "CONTRADICTION at input" in err
    reached = re.findall(r"CONTRADICTION at input (\d+)", err)
    assert re.search(rf"Contradictions: {len(reached)} cases? at {len(set(reached))} inputs?$", err)
    html = certified.with_name("report.html")
    code, _, _ = run(monkeypatch, capsys, "report", str(certified), "--output", str(html))
    assert code == 1
    assert "contradict" in html.read_text().lower()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["certify", "--output", "OUT", "--data", "svhn"], "digits, mnist, cifar10"),
        (["certify", "--output", "OUT"], "weights are needed for model 'cnn'"),
        (["certify", "--output", "OUT", "--weights", "none.pt"], "none.pt"),
        (["certify", "--output", "OUT", "--weights", "TORN"], "torn.safetensors"),
        (["certify", "--output", "OUT", "--weights", "W", "--n", "0"], "n must be at least 1"),
        (["certify", "--output", "OUT", "--weights", "W", "--n0", "0"], "n0 must be at least 1"),
        (["certify", "--output", "OUT", "--weights", "W", "--block", "0"], "block must be at least 1"),
        (["certify", "--output", "OUT", "--weights", "W", "--radius", "0.5", "--tolerance", "0.1"], "give one of them"),
        (["certify", "--output", "OUT", "--weights", "W", "--radius", "-1"], "radii must"),
        (["certify", "--output", "OUT", "--weights", "W", "--dtype", "int8"], "dtype must be one of float32"),
        (["certify", "--output", ".", "--weights", "W"], "output . is a folder"),
        (["certify", "--output", "OUT", "--weights", "W", "--alpha", "1"], "alpha must lie strictly"),
        (["certify", "--output", "OUT", "--weights", "W", "--sigma", "-1"], "sigma must be finite and > 0"),
        (["certify", "--output", "OUT", "--weights", "W", "--examples", "1"], "examples must be start:stop:step"),
        (["certify", "--output", "OUT", "--weights", "W", "--examples", "900:"], "selects none of the 360"),
        (["certify", "--output", "OUT", "--weights", "W", "--device", "tpu"], "device must be 'gpu'"),
        (["certify", "--output", "OUT", "--weights", "W", "--model", "resnet20"], "resnet20"),
        (["certify", "--output", "OUT", "--weights", "W", "--seed", "-3"], "seed must lie in"),
        (["certify", "--output", "FILE/x.tsv", "--weights", "W"], "choose a folder that can be"),
        (["train", "--output", "OUT", "--epochs", "0"], "epochs must be at least 1"),
        (["train", "--output", "OUT", "--learning-rate", "nan"], "learning_rate must be finite"),
        (["train", "--output", "FILE/x.safetensors"], "cannot be written"),
        (["attack", "RECORD", "--attack", "wish"], "attack must be one of fgm"),
        (["attack", "RECORD", "--budget", "-1"], "budgets must be ascending and > 0"),
        (["attack", "none.tsv"], "none.tsv"),
        (["report", "none.tsv"], "none.tsv"),
        (["report", "RECORD", "--format", "doc"], "format"),
        (["report", "RECORD", "--output", "."], "cannot write a file over a folder"),
        (["report", "RECORD", "--output", "FILE/report.html"], "choose an output path"),
        (["train", "--output", "."], "output . is a folder"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(monkeypatch, capsys, tmp_path, weights, certified, words, message):
    (tmp_path / "FILE").write_text("in the way")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(weights.read_bytes()[:-100])
    places = {"OUT": tmp_path / "new.tsv", "W": weights, "TORN": torn, "RECORD": certified}
    resolved = [str(places.get(word, tmp_path / word if word.startswith("FILE") else word)) for word in words]
    code, _, err = run(monkeypatch, capsys, *resolved)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "new.tsv").exists()


def test_another_configuration_does_not_touch_a_record(monkeypatch, capsys, weights, certified):
    before = certified.read_bytes()
    words = ["certify", "--output", str(certified), "--weights", str(weights), "--examples", ":24", "--n", "2000"]
    code, _, err = run(monkeypatch, capsys, *words, "--quiet")
    assert code == 2
    assert "1000" in err
    assert "2000" in err
    assert certified.read_bytes() == before


def test_other_weights_than_the_records_are_refused(monkeypatch, capsys, tmp_path, certified):
    manifest = certified.with_name("record.manifest.json")
    known = json.loads(manifest.read_text())
    other = tmp_path / "other.safetensors"
    train(TrainConfig(epochs=1, seed=5), other)
    known["config"]["weights"] = str(other)
    manifest.write_text(json.dumps(known))
    code, _, err = run(monkeypatch, capsys, "attack", str(certified), "--quiet")
    assert code == 2
    assert "other.safetensors hold now: network; restore" in err


def digits_file(path: Path, *, x=X, y=Y, rows: int = 40) -> str:
    np.savez(path, x_train=x[TRAIN], y_train=y[TRAIN], x_test=x[TEST][:rows], y_test=y[TEST][:rows])
    return str(path)


@pytest.fixture
def from_file(weights: Path, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A finished record of a data file, and the configuration behind it."""
    data = digits_file(tmp_path / "data.npz")
    config = RunConfig(data=data, weights=str(weights), n=200, examples=":24")
    runs.certify(config, tmp_path / "record.tsv")
    return config, tmp_path / "record.tsv"


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"x": X[::-1].copy()}, ["data"]),
        ({"x": X * np.float32(0.999)}, ["data"]),
        ({"y": (Y + 1) % 10}, ["labels"]),
        ({"rows": 10}, ["data", "labels", "indices"]),
    ],
)
def test_other_data_than_the_records_are_refused_by_name(from_file, change, facts):
    config, record = from_file
    lines = record.read_text().splitlines(keepends=True)
    digits_file(Path(config.data), **change)
    with pytest.raises(ValueError, match=rf"data\.npz and .* hold now: {', '.join(facts)}; restore them, or certify"):
        attack(record, FGM)
    record.write_text("".join(lines[:9]))
    with pytest.raises(ValueError, match=rf"{facts[0]}_sha256 is .* there and .* here.* another output path"):
        runs.certify(config, record)
    assert record.read_text() == "".join(lines[:9])


def test_a_partial_record_is_attacked_as_far_as_it_goes(from_file):
    _, record = from_file
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:9]))
    assert attack(record, FGM).audits["all"].total == 8
    record.write_text("".join([*lines[:9], lines[9].replace("8\t", "300\t", 1)]))
    with pytest.raises(ValueError, match="indices or labels that its data has not"):
        attack(record, FGM)
    cells = lines[1].split("\t")
    cells[1] = next(str(label) for label in range(10) if str(label) not in (cells[1], cells[2]))
    cells[4] = "0"
    record.write_text("".join([lines[0], "\t".join(cells), *lines[2:]]))
    with pytest.raises(ValueError, match="indices or labels that its data has not"):
        attack(record, FGM)


FACTORY = """
import torch
from torch import nn
from art_rs_plugins.smoothing.modules import Normalize

mean, power = 0.25, 1.0

class Power(nn.Module):
    def forward(self, x):
        return x.sign() * x.abs() ** power

def make():
    return nn.Sequential(Normalize(mean, 1.0), nn.Flatten(), nn.Linear(64, 10), Power())
"""


@pytest.mark.parametrize(
    ("name", "value", "attacked", "resumed"),
    [
        ("mean", 0.3, "hold now: network;", "network_sha256 is"),
        ("power", 0.5, "hold now: what the network answers;", "same weights that answers otherwise"),
    ],
)
def test_a_changed_factory_is_noticed_though_its_weights_are_the_same(
    monkeypatch, tmp_path, name, value, attacked, resumed
):
    (tmp_path / "own_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_factory", raising=False)
    config = RunConfig(model="own_factory:make", n=100, examples=":4", seed=3)
    record = tmp_path / "record.tsv"
    runs.certify(config, record)
    assert json.loads(record.with_name("record.manifest.json").read_text())["training"] is None
    runs.certify(config, record)
    attack(record, FGM)
    monkeypatch.setattr(sys.modules["own_factory"], name, value)
    with pytest.raises(ValueError, match=attacked):
        attack(record, FGM)
    with pytest.raises(ValueError, match=resumed):
        runs.certify(config, record)


def test_the_demo_does_not_take_the_weights_of_another_training(monkeypatch, capsys, tmp_path):
    train(TrainConfig(epochs=1), tmp_path / "digits_sigma0.25.safetensors")
    code, _, err = run(monkeypatch, capsys, "demo", "--output", str(tmp_path), "--quiet")
    assert code == 2
    assert "sigma0.25.safetensors was trained otherwise than the demo trains; choose another output folder" in err
    assert not list(tmp_path.glob("*.tsv"))


@pytest.mark.parametrize("kind", ["committed", "conditional"])
def test_what_is_not_certified_is_not_attacked(monkeypatch, capsys, certified, kind):
    certified.write_text(certified.read_text().replace("\tcertified\t", f"\t{kind}\t"))
    code, _, err = run(monkeypatch, capsys, "attack", str(certified), "--quiet")
    assert code == 2
    assert f"holds {kind} certificates, which are not certified accuracy and cannot be audited" in err
    assert not certified.with_name("record.audit.json").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda known: known.pop("config"), "the manifest of RECORD has no config"),
        (lambda known: known["config"].update(wish=1), "has settings unknown to this version: wish"),
        (lambda known: known.pop("network_outputs"), "hold now: what the network answers;"),
    ],
)
def test_a_manifest_that_says_too_little_or_too_much_is_named(monkeypatch, capsys, certified, edit, message):
    manifest = certified.with_name("record.manifest.json")
    known = json.loads(manifest.read_text())
    edit(known)
    manifest.write_text(json.dumps(known))
    code, _, err = run(monkeypatch, capsys, "attack", str(certified), "--quiet")
    assert code == 2
    assert message.replace("RECORD", str(certified)) in err


def test_an_audit_of_other_rows_is_not_reported(monkeypatch, capsys, certified):
    code, _, _ = run(monkeypatch, capsys, "attack", str(certified), "--attack", "fgm", "--budget", "0.5", "--quiet")
    assert code == 0
    page = certified.with_name("report.html")
    run(monkeypatch, capsys, "report", str(certified), "--output", str(page))
    assert "Contradictions: 0" in page.read_text()
    lines = certified.read_text().splitlines(keepends=True)
    certified.write_text("".join(lines[:-1]))
    code, _, _ = run(monkeypatch, capsys, "report", str(certified), "--output", str(page))
    assert code == 0
    assert "Contradictions: 0" not in page.read_text()
    assert "record.audit.json was left out: it speaks of other rows" in page.read_text()


def test_named_radii_from_flags_to_report(monkeypatch, capsys, weights, tmp_path):
    record, target = tmp_path / "named.tsv", tmp_path / "report.json"
    words = ["certify", "--output", str(record), "--weights", str(weights), "--radius", "0.5", "--radius", "0.25"]
    words += ["--n", "20000", "--examples", ":12", "--quiet"]
    code, _, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    found = read_record(record)
    assert set(found.radius) <= {0.0, 0.25, 0.5}
    assert 0.5 in found.radius
    assert len(set(found.columns["n"])) > 1
    assert found.columns["n"].max() <= 20_000
    whole = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(whole[:6]) + whole[6][:9])
    code, _, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    again = read_record(record)
    assert np.array_equal(again.radius, found.radius)
    assert np.array_equal(again.columns["n"], found.columns["n"])
    code, _, err = run(monkeypatch, capsys, *words, "--radius", "0.75")
    assert code == 2
    assert "config.radii is [0.25, 0.5] there and [0.25, 0.5, 0.75] here" in err
    code, _, _ = run(monkeypatch, capsys, "report", str(record), "--format", "json", "--output", str(target))
    assert code == 0
    (entry,) = json.loads(target.read_text())
    assert entry["n"] is None
    assert entry["certified_accuracy"]["0.5"] == np.mean(found.correct & (found.radius == 0.5))
    code, _, _ = run(monkeypatch, capsys, "attack", str(record), "--attack", "fgm", "--budget", "0.4", "--quiet")
    assert code == 0


def test_a_tolerance_from_flags_to_report(monkeypatch, capsys, weights, tmp_path):
    record = tmp_path / "planned.tsv"
    words = ["certify", "--output", str(record), "--weights", str(weights), "--tolerance", "0.05"]
    words += ["--n", "20000", "--examples", ":12", "--quiet"]
    code, _, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    found = read_record(record)
    assert set(found.columns["n0"]) == {500}
    assert len(set(found.columns["n"])) > 1
    assert len(set(found.radius)) > 3
    whole = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join(whole[:6]))
    code, _, _ = run(monkeypatch, capsys, *words)
    assert code == 0
    assert np.array_equal(read_record(record).radius, found.radius)
    code, out, _ = run(monkeypatch, capsys, "report", str(record), "--format", "json")
    assert code == 0
    assert json.loads(out)[0]["rows"] == 12


def test_dtype_and_layout_are_recorded_and_attacked_as_they_were(monkeypatch, capsys, weights, tmp_path):
    record = tmp_path / "fast.tsv"
    words = ["certify", "--output", str(record), "--weights", str(weights), "--dtype", "bfloat16", "--channels-last"]
    code, _, _ = run(monkeypatch, capsys, *words, "--n", "500", "--examples", ":6", "--quiet")
    assert code == 0
    manifest = json.loads(record.with_name("fast.manifest.json").read_text())
    assert manifest["performance"] == "bfloat16, channels_last"
    seen = []

    def remember(attack, estimator, *args, **settings):
        seen.append(estimator.performance)
        return find_examples(attack, estimator, *args, **settings)

    monkeypatch.setattr(attacked, "find_examples", remember)
    code, _, _ = run(monkeypatch, capsys, "attack", str(record), "--attack", "fgm", "--budget", "0.5", "--quiet")
    assert code == 0
    assert seen == [Performance("bfloat16", True, False, manifest["block"])]


def test_a_block_of_no_measurement_is_the_default_of_shape_and_device(weights, tmp_path, certified):
    """A manifest without a block must not be gone on with as if its block were null."""
    manifest = certified.with_name("record.manifest.json")
    known = json.loads(manifest.read_text())
    known["block"] = None
    manifest.write_text(json.dumps(known))
    with pytest.raises(ValueError, match="block is None there and 500 here"):
        runs.certify(RunConfig(weights=str(weights), n=1_000, examples=":24", device="cpu"), certified)


@pytest.mark.slow
def test_demo_does_the_whole_job(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "demo", "--output", str(tmp_path), "--quiet")
    assert code == 0
    for sigma in ("0.25", "0.5"):
        record = read_record(tmp_path / f"digits_sigma{sigma}.tsv")
        assert len(record.idx) == 360
        assert np.mean(record.correct & (record.radius >= 0.25)) > 0.6
    assert "contradictions" in out
    html = (tmp_path / "report.html").read_text()
    assert "<svg" in html
    assert "Contradictions: 0" in html


def test_exact_certificates_from_the_command_line(monkeypatch, capsys, tmp_path, weights):
    data = load("digits")
    eight = tmp_path / "eight.npz"
    arrays = {name: np.round(getattr(data, name) * 255) / 255 for name in ("x_train", "x_test")}
    np.savez(eight, **arrays, y_train=data.y_train, y_test=data.y_test)
    record = tmp_path / "exact.tsv"
    words = ["certify", "--output", str(record), "--weights", str(weights), "--n", "1000", "--examples", ":12"]
    code, _, _ = run(monkeypatch, capsys, *words, "--data", str(eight), "--noise", "grid", "--quiet")
    assert code == 0
    assert to_certificates(read_record(record)).kind == "exact"
    code, out, _ = run(monkeypatch, capsys, "attack", str(record), "--attack", "pgd", "--budget", "0.5", "--quiet")
    assert code == 0
    assert "contradictions" in out
    code, _, err = run(monkeypatch, capsys, *words[:2], str(tmp_path / "off.tsv"), *words[3:], "--noise", "grid")
    assert code == 2
    assert "x must lie on the grid k / 255" in err
    code, _, err = run(monkeypatch, capsys, *words[:2], str(tmp_path / "no.tsv"), *words[3:], "--noise", "laplace")
    assert code == 2
    assert "noise must be one of gaussian, grid" in err

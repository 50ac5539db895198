"""The command line: the main job on embedded data, resume, and errors of one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from art_rs_plugins.benchmark import runs
from art_rs_plugins.benchmark.records import read_record
from art_rs_plugins.cli import main


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
    runs.train(runs.TrainConfig(epochs=15), path)
    return path


@pytest.fixture
def certified(weights: Path, tmp_path: Path) -> Path:
    path = tmp_path / "record.tsv"
    runs.certify(runs.RunConfig(weights=str(weights), n=1_000, examples=":24"), path)
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
    assert {"weights_sha256", "data_sha256", "indices_sha256", "device", "dtype", "block", "versions"} <= set(manifest)
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
    runs.certify(runs.RunConfig(weights=str(weights), n=1_000, examples=":24"), torn)
    again, first = read_record(torn), read_record(certified)
    assert np.array_equal(again.idx, first.idx)
    assert np.array_equal(again.radius, first.radius)
    assert torn.read_bytes().splitlines()[:9] == [line.rstrip(b"\n") for line in whole[:9]]


def test_a_slice_has_the_same_rows_as_the_whole(weights, certified, tmp_path):
    runs.certify(runs.RunConfig(weights=str(weights), n=1_000, examples="3:24:7"), tmp_path / "slice.tsv")
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
        (["attack", "RECORD", "--attack", "wish"], "attack must be among fgm"),
        (["attack", "RECORD", "--budget", "-1"], "budgets must be ascending and > 0"),
        (["attack", "none.tsv"], "none.tsv"),
        (["report", "none.tsv"], "none.tsv"),
        (["report", "RECORD", "--format", "doc"], "format"),
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
    runs.train(runs.TrainConfig(epochs=1, seed=5), other)
    known["config"]["weights"] = str(other)
    manifest.write_text(json.dumps(known))
    code, _, err = run(monkeypatch, capsys, "attack", str(certified), "--quiet")
    assert code == 2
    assert "is not what" in err


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

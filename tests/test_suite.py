"""Suites: cells that share data and draws, resumable, with errors that name the setting and the nearest name."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from art_rs_plugins.benchmark import suite as suites
from art_rs_plugins.benchmark.attacked import attack
from art_rs_plugins.benchmark.config import AttackConfig, RunConfig, TrainConfig, parse_options
from art_rs_plugins.benchmark.methods import METHODS, open_estimator
from art_rs_plugins.benchmark.records import read_record, to_certificates
from art_rs_plugins.benchmark.runs import certify, certify_together
from art_rs_plugins.benchmark.tables import leaderboard
from art_rs_plugins.benchmark.training import train
from art_rs_plugins.cli import main

TINY = """
[run]
data = "digits"
radii = [0.0, 0.25]
n = 500
examples = "::30"
[train]
epochs = 2
[[cell]]
name = "gaussian"
rules = ["one-sided", "two-sided"]
train = {}
[[cell]]
name = "adre"
train = { method = "adre", draws = 2 }
run = { method = "adre", options = { weight = 0.2 } }
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def done(tiny: Path) -> tuple[suites.Done, Path]:
    folder = tiny.parent / "out"
    return suites.run(suites.read(str(tiny)), folder), folder


def test_every_cell_lands_in_the_table(done: tuple[suites.Done, Path]) -> None:
    result, folder = done
    assert not result.failed
    assert [record.name for record in result.records] == ["gaussian.one-sided", "gaussian.two-sided", "adre"]
    rows = leaderboard(result.records)
    for row, record in zip(rows, result.records, strict=True):
        right = record.correct & (record.radius >= 0.25)
        assert row["r=0.25"].startswith(f"{right.mean():.3f} [")
        assert row["passes"] == f"{(record.columns['n'] + 100).mean():,.0f}"
        assert set(np.unique(record.radius)) <= {0.0, 0.25}
        assert row["r=0"] in result.table
    for name in ("leaderboard.md", "leaderboard.csv", "leaderboard.tex", "report.html"):
        assert (folder / name).stat().st_size > 100
    assert (folder / "leaderboard.md").read_text() == result.table
    assert not (folder / "failed.txt").exists()


def test_cells_say_how_they_were_made(done: tuple[suites.Done, Path]) -> None:
    result, folder = done
    manifest = json.loads((folder / "adre.manifest.json").read_text())
    assert manifest["config"]["options"] == {"weight": 0.2}
    assert manifest["training"]["method"] == "adre"
    data, estimator = open_estimator(RunConfig(**manifest["config"]))
    assert estimator.weight == 0.2
    found = estimator.certificates(data.x_test[:120:30], radii=[0.0, 0.25], n=500, indices=[0, 30, 60, 90], seed=0)
    recorded = to_certificates(result.records[2])[:4]
    assert np.array_equal(found.radius, recorded.radius)
    assert np.array_equal(found.count, recorded.count)


def test_shared_draws_give_the_records_of_separate_runs(done: tuple[suites.Done, Path], tmp_path: Path) -> None:
    _, folder = done
    for rule in ("one-sided", "two-sided"):
        config = RunConfig(**json.loads((folder / f"gaussian.{rule}.manifest.json").read_text())["config"])
        alone = certify(config, tmp_path / f"{rule}.tsv")
        shared = read_record(folder / f"gaussian.{rule}.tsv")
        assert np.array_equal(alone.radius, shared.radius)
        assert all(np.array_equal(alone.columns[name], shared.columns[name]) for name in alone.columns)


def test_a_suite_goes_on_where_it_stopped(done: tuple[suites.Done, Path], tiny: Path) -> None:
    result, folder = done
    before = {path.name: path.read_bytes() for path in folder.glob("*.tsv")}
    for name, keep in (("gaussian.one-sided.tsv", 5), ("gaussian.two-sided.tsv", 3)):   # killed between two appends
        lines = before[name].splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(lines[:keep]))
    again = suites.run(suites.read(str(tiny)), folder)
    for old, new in zip(leaderboard(result.records), leaderboard(again.records), strict=True):
        assert {**old, "seconds": ""} == {**new, "seconds": ""}
    for old, new in zip(result.records, again.records, strict=True):
        order = np.argsort(new.idx)
        assert np.array_equal(old.idx, new.idx[order])
        assert np.array_equal(old.radius, new.radius[order])
    other = suites.read(str(tiny))
    changed = suites.Suite(tuple(suites.replace(cell, training=TrainConfig(epochs=3)) for cell in other.cells))
    with pytest.raises(ValueError, match="was trained otherwise than this suite trains"):
        suites.run(changed, folder)


def test_a_cell_that_fails_leaves_the_others_alone(tiny: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(TINY + '\n[[cell]]\nname = "lost"\nrun = { weights = "nowhere.pt" }\n')
    monkeypatch.setattr(sys, "argv", ["art-rs", "benchmark", str(path), "--output", str(tmp_path / "out"), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert "FAILED lost" in captured.err
    assert "nowhere.pt" in captured.err
    assert "gaussian.two-sided" in captured.out
    assert (tmp_path / "out" / "failed.txt").read_text().startswith("lost: ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("[run]", "[runn]"), "setting of a suite must be .* got 'runn'; did you mean 'run'"),
        (("radii =", "radius ="), "setting of a RunConfig must be .* got 'radius'; did you mean 'radii'"),
        (("epochs", "epoch"), "setting of a TrainConfig must be .* got 'epoch'; did you mean 'epochs'"),
        (("rules =", "rule ="), "setting of a cell must be .* got 'rule'; did you mean 'rules'"),
        (('"one-sided"', '"onesided"'), "rule of cell gaussian must be one of one-sided, two-sided"),
        (('name = "adre"', 'name = "gaussian"'), "cells must have different names"),
        (('name = "adre"', 'name = "a/b"'), "name of a cell must be"),
        (("[0.0, 0.25]", "[0.25, 0.0]"), "radii must be strictly increasing"),
        (('run = { method', 'run = { seed = 3, method'), "cells must share seed"),
        (("n = 500", "n = "), "is not TOML"),
    ],
)
def test_bad_suites_are_named(tmp_path: Path, changes: tuple[str, str], words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(TINY.replace(*changes))
    with pytest.raises(ValueError, match=words):
        suites.read(str(path))


def test_unknown_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'training-digits'"):
        suites.read("training-digit")
    with pytest.raises(ValueError, match=r"method must be one of gaussian, adre, consistency, .* did you mean 'macer'"):
        train(TrainConfig(method="mcer"), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="did you mean 'adre'"):
        open_estimator(RunConfig(model="support:digits_network", method="adrre"))
    with pytest.raises(ValueError, match="rule must be one of one-sided, two-sided, got 'both'"):
        RunConfig(rule="both")
    with pytest.raises(ValueError, match="rule and tolerance"):
        RunConfig(rule="one-sided", tolerance=0.1)
    two = [RunConfig(rule="one-sided"), RunConfig(rule="two-sided", sigma=0.3, seed=5)]
    with pytest.raises(ValueError, match="must be of one network and the same inputs to share draws"):
        certify_together([{tmp_path / f"{i}.tsv": each} for i, each in enumerate(two)])
    with pytest.raises(ValueError, match="outputs must be different files"):
        certify_together([{tmp_path / "a.tsv": each} for each in two[:1] * 2])


def test_suites_of_the_package_can_be_read(monkeypatch, capsys) -> None:
    for name in suites.names():
        found = suites.read(name)
        assert len(found.cells) > 1
    monkeypatch.setattr(sys, "argv", ["art-rs", "benchmark", "--list"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.split() == suites.names()
    monkeypatch.setattr(sys, "argv", ["art-rs", "benchmark", "training-digits", "--print-config"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.strip() == suites.text("training-digits").strip()


def test_options_are_toml_values_or_text() -> None:
    words = ["weight=0.5", "draws=4", "compile=true", "mode=mean", "sizes=[1, 2]"]
    assert parse_options(words) == {"weight": 0.5, "draws": 4, "compile": True, "mode": "mean", "sizes": [1, 2]}
    for bad in ("weight", "=3", "a b=1"):
        with pytest.raises(ValueError, match="option must be name=value"):
            parse_options([bad])


def test_the_command_line_trains_with_adre_and_certifies_two_sidedly(monkeypatch, capsys, tmp_path: Path) -> None:
    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["art-rs", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    weights, record = str(tmp_path / "w.safetensors"), tmp_path / "r.tsv"
    settings = ["--method", "adre", "--draws", "2", "--eps", "0.1", "--steps", "1", "--examples", "::4"]
    assert "training accuracy under noise" in call("train", "--output", weights, "--epochs", "2", *settings, "--quiet")
    words = ["certify", "--output", str(record), "--weights", weights, "--n", "500", "--examples", ":6", "--quiet"]
    call(*words, "--rule", "two-sided", "--method", "adre", "--option", "weight=0.2")
    found = to_certificates(read_record(record))
    assert np.any(found.p_upper < 1.0 - found.p_lower - 1e-6)   # the rivals' bound is one of its own
    manifest = json.loads((tmp_path / "r.manifest.json").read_text())
    assert (manifest["config"]["rule"], manifest["config"]["method"]) == ("two-sided", "adre")
    assert manifest["training"]["eps"] == "0.1"


def test_reductions_share_their_passes_and_keep_their_bits(tmp_path: Path) -> None:
    text = """
        [run]
        model = "cnn"
        weights = "WEIGHTS"
        examples = ":6"
        n = 300
        n0 = 30
        radii = [0.0, 0.25]
        method = "smooth-reduce"

        [[cell]]
        name = "nine"
        reductions = ["mean", "vote"]
        rules = ["one-sided", "two-sided"]
        run = { options = { patch = 8, stride = 1, pad = 1 } }
    """
    train(TrainConfig(epochs=1), tmp_path / "net.safetensors")
    config = tmp_path / "suite.toml"
    config.write_text(text.replace("WEIGHTS", str(tmp_path / "net.safetensors")))
    suite = suites.read(str(config))
    done = suites.run(suite, tmp_path / "out")
    names = ["nine.mean.one-sided", "nine.mean.two-sided", "nine.vote.one-sided", "nine.vote.two-sided"]
    assert [record.path.stem for record in done.records] == names
    assert not done.failed
    for record, reduction in zip(done.records[::2], ("mean", "vote"), strict=True):
        options = {**suite.cells[0].run.options, "reduction": reduction}
        alone = certify(replace(suite.cells[0].run, options=options), tmp_path / f"{reduction}.tsv")
        for column in ("predict", "radius"):
            assert np.array_equal(getattr(record, column), getattr(alone, column)), column
        assert np.array_equal(record.columns["p_lower"], alone.columns["p_lower"])
    fgm = AttackConfig(("fgm",), (0.5,))
    table = attack(done.records[2].path, [fgm]).audits   # a record of the second reduction can be rebuilt
    assert table["all"].total == 6
    again = suites.run(suite, tmp_path / "out")
    assert [record.path.read_bytes() for record in again.records] == [r.path.read_bytes() for r in done.records]
    with pytest.raises(ValueError, match="name rules as well"):
        suites.Cell("a", suite.cells[0].run, reductions=("mean",))


@pytest.mark.parametrize("name, total", [("benchmark-digits", 3300), ("benchmark-cifar10", 400)])
def test_every_method_of_a_benchmark_takes_the_same_passes(name: str, total: int) -> None:
    """A sigma more costs a pass more for each draw, and so does a patch; a search has to fit in as well."""
    suite = suites.read(name)
    assert {cell.run.method for cell in suite.cells} >= set(METHODS) - {"art"}
    assert sum(bool(cell.run.defences) for cell in suite.cells) >= 1
    for cell in suite.cells:
        options, draws = cell.run.options, cell.run.n + cell.run.n0
        if options.get("certificate") == "conditional":
            searched = (len(options["starts"]) * options["evaluations"] + 1) * options["draws"]
            assert draws + searched == total
        elif cell.run.method == "insta-rs":
            assert draws * len(options["sigmas"]) == total
        elif cell.run.method == "smooth-reduce":
            assert draws * 4 == total
        else:
            assert draws == total


def test_the_benchmark_of_digits_meets_its_measure() -> None:
    suite = suites.read("benchmark-digits")
    assert len({name for cell in suite.cells for group in cell.attacks for name in group.names}) >= 6
    named = [cell.run.defences + (cell.training.defences if cell.training else ()) for cell in suite.cells]
    assert len({name for names in named for name in names}) >= 5

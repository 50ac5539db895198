"""Theta of a composition out of validation images: chosen once, reported once, and resumed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from art_rs_plugins.benchmark import suite as suites
from art_rs_plugins.benchmark import thresholds
from art_rs_plugins.benchmark.attacked import attack
from art_rs_plugins.benchmark.config import AttackConfig, RunConfig
from art_rs_plugins.benchmark.methods import open_estimator
from art_rs_plugins.benchmark.records import read_record
from art_rs_plugins.benchmark.tables import accuracy_of
from art_rs_plugins.benchmark.thresholds import RADII, Tuning, read_study

TEXT = """
[run]
sigma = 0.5
n = 400
n0 = 50
examples = "::6"

[train]
epochs = 8

[[cell]]
name = "core"
train = { sigma = 0.05, epochs = 25 }
run = { sigma = 0.05 }

[[cell]]
name = "aces"
train = {}
tune = { validation = "1::6", gain = 0.04, radius = 0.25 }
run = { method = "aces", options = { core = "cnn", core_weights = "core.safetensors" } }
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aces")
    (folder / "suite.toml").write_text(TEXT)
    done = suites.run(suites.read(str(folder / "suite.toml")), folder / "out")
    assert not done.failed
    return folder / "out"


def test_theta_is_chosen_on_validation_and_reported_on_other_images(output: Path) -> None:
    validation, test = (read_study(output / f"aces.{name}.json") for name in ("validation", "curve"))
    theta = validation.sweep.choose(natural=validation.plain + 0.04, radius=0.25)
    place = int(np.flatnonzero(test.sweep.theta == theta)[0])
    record = read_record(output / "aces.tsv")
    assert record.manifest["config"]["options"]["theta"] == theta
    assert (validation.total, test.total, len(record)) == (60, 60, 60)
    # the curve holds what the record's certificates say, and the parts what they are by themselves
    assert np.allclose(accuracy_of(record, RADII).accuracy, test.sweep.certified[place], atol=1e-12)
    data, classifier = open_estimator(RunConfig(**record.manifest["config"]), None, output)
    rows = np.arange(len(data.x_test))[::6]
    settings = {"n": 400, "n0": 50, "seed": 0, "indices": rows}
    alone = classifier.smoothed.certificates(data.x_test[rows], **settings)
    right = ~alone.abstained & (alone.prediction == data.y_test[rows])
    assert np.allclose([np.mean(right & (alone.radius >= r)) for r in RADII], test.certified)
    answers = classifier.core.predict(data.x_test[rows]).argmax(axis=1)
    assert test.core == np.mean(answers == data.y_test[rows])
    assert test.core > test.plain
    assert 0.0 < test.sweep.selected[place] < 1.0
    table = (output / "aces.curve.md").read_text()
    assert f"**theta {theta:g}**" in table
    assert (output / "aces.curve.svg").read_bytes().startswith(b"<svg")


def test_the_coin_is_what_a_random_choice_certifies(output: Path) -> None:
    study = read_study(output / "aces.curve.json")
    assert np.allclose(study.router(study.plain), study.certified)
    assert np.allclose(study.router(study.core), 0.0)
    assert np.allclose(study.router((study.plain + study.core) / 2), study.certified / 2)


def test_it_goes_on_and_refuses_other_settings(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suites.read(str(output.parent / "suite.toml"))

    def never(*args: object, **settings: object) -> None:
        raise AssertionError("evaluated again")

    monkeypatch.setattr(thresholds, "evaluate", never)
    before = (output / "aces.tsv").read_bytes()
    assert not suites.run(suite, output).failed
    assert (output / "aces.tsv").read_bytes() == before
    config = replace(suite.cells[1].run, weights=str(output / "aces.safetensors"))
    with pytest.raises(ValueError, match="made with other settings"):
        thresholds.write_study(config, np.arange(3), output / "aces.curve.json")


def test_validation_images_may_not_be_reported_on() -> None:
    config = RunConfig(method="aces", options={"core": "cnn", "core_weights": "none"})
    for validation, shared in (("::2", 180), (":10", 10), ("500:", 0)):
        with pytest.raises(ValueError, match=f"shares {shared} of its"):
            thresholds.tune(config, Tuning(validation), Path("nowhere") / "aces")
    with pytest.raises(ValueError, match="gain"):
        Tuning("1::2", gain=1.0)
    with pytest.raises(ValueError, match="radius"):
        Tuning("1::2", radius=0.3)
    with pytest.raises(ValueError, match="needs method 'aces'"):
        suites.Cell("a", RunConfig(), tuning=Tuning("1::2"))
    with pytest.raises(ValueError, match="leave rule"):
        open_estimator(RunConfig(method="aces", rule="one-sided", model="support:digits_network"))


def test_the_record_of_a_composition_is_attacked(output: Path) -> None:
    settings = AttackConfig(("smoothed-pgd",), (0.5,), steps=3, n=100)
    found = attack(output / "aces.tsv", [settings]).audits["all"]
    assert found.total == 60
    assert not found.contradictions

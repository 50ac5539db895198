"""Selectors of Insta-RS in a suite: trained once, known by their digest, and attacked with what was certified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from art_rs_plugins.benchmark import choosers
from art_rs_plugins.benchmark import suite as suites
from art_rs_plugins.benchmark.attacked import rebuild
from art_rs_plugins.benchmark.choosers import ChooserConfig
from art_rs_plugins.benchmark.config import RunConfig
from art_rs_plugins.benchmark.models import build, save_weights
from art_rs_plugins.benchmark.records import read_record, to_certificates

TEXT = """
[run]
sigma = 0.5
n = 200
n0 = 50
examples = "::20"

[[cell]]
name = "chosen"
train = { epochs = 3 }
selector = { examples = "::8", draws = 20, epochs = 2 }
run = { method = "insta-rs", options = { certificate = "selector", sigmas = [0.25, 0.5], selector_sigma = 0.5 } }
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chosen")
    (folder / "suite.toml").write_text(TEXT)
    assert not suites.run(suites.read(str(folder / "suite.toml")), folder / "out").failed
    return folder / "out"


def test_the_trained_selector_is_what_is_certified_and_rebuilt(output: Path) -> None:
    record = read_record(output / "chosen.tsv")
    data, estimator = rebuild(record)
    assert estimator.selector is not None
    rows = record.idx
    again = estimator.certificates(data.x_test[rows], n=200, n0=50, seed=0, indices=rows)
    assert np.array_equal(again.radius, to_certificates(record).radius)
    assert set(np.unique(again.sigma)) <= {0.25, 0.5}


def test_it_is_trained_once_and_another_one_is_noticed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **settings: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(choosers, "save_weights", never)
    suite = suites.read(str(output.parent / "suite.toml"))
    assert not suites.run(suite, output).failed
    path = output / "chosen.selector.safetensors"
    config = replace(suite.cells[0].run, weights=str(output / "chosen.safetensors"))
    with pytest.raises(ValueError, match="was trained otherwise"):
        choosers.train_chooser(config, ChooserConfig(epochs=3), path)
    before = path.read_bytes()
    try:
        save_weights(build("cnn", (1, 8, 8), 2, seed=5), path, {})
        with pytest.raises(ValueError, match="selector; restore"):
            rebuild(read_record(output / "chosen.tsv"))
    finally:
        path.write_bytes(before)


def test_bad_settings_are_named(tmp_path: Path) -> None:
    config = RunConfig(method="insta-rs", options={"certificate": "envelope", "sigmas": [0.25, 0.5]})
    with pytest.raises(ValueError, match="needs method 'insta-rs' and its certificate 'selector'"):
        suites.Cell("a", config, chooser=ChooserConfig())
    with pytest.raises(ValueError, match="epochs"):
        ChooserConfig(epochs=0)
    with pytest.raises(ValueError, match="learning_rate"):
        ChooserConfig(learning_rate=-1.0)
    plain = replace(config, method="smoothing", options={}, weights=str(tmp_path / "net.safetensors"))
    save_weights(build("cnn", (1, 8, 8), 10, seed=0), tmp_path / "net.safetensors", {})
    with pytest.raises(ValueError, match="method must be insta-rs"):
        choosers.train_chooser(plain, ChooserConfig(), tmp_path / "s.safetensors")
    assert torch.is_grad_enabled()

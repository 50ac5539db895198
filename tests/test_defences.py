"""Defences of ART beside a certificate: those that are sound keep its promise, those that void it are refused."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from art.defences.detector.evasion import BinaryActivationDetector, BinaryInputDetector
from art.defences.postprocessor import ClassLabels, GaussianNoise, HighConfidence, ReverseSigmoid, Rounded
from art.defences.preprocessor import FeatureSqueezing, GaussianAugmentation, TotalVarMin
from art.estimators.classification import PyTorchClassifier
from closed_forms import Linear, allowed
from planted import Page
from safetensors.torch import load_file
from scipy.stats import norm
from support import Recorder, X, digits_network, smooth
from torch import nn

from art_rs_plugins import PyTorchACES, PyTorchSmoothedClassifier, audit
from art_rs_plugins.benchmark import suite as suites
from art_rs_plugins.benchmark import training
from art_rs_plugins.benchmark.attacks import ATTACKS, run_attack
from art_rs_plugins.benchmark.config import RunConfig, TrainConfig
from art_rs_plugins.benchmark.data import Dataset
from art_rs_plugins.benchmark.defences import (
    DEFENCES,
    Ensemble,
    Place,
    Status,
    check_defences,
    preprocessors,
    selector,
    table,
)
from art_rs_plugins.benchmark.methods import METHODS, open_estimator
from art_rs_plugins.benchmark.suite import Cell
from art_rs_plugins.benchmark.training import train
from art_rs_plugins.cli import main

PIXEL = np.full((8, 1, 1, 1), 0.5, np.float32)
ONE_PIXEL = Dataset("pixel", PIXEL, np.zeros(8, np.int64), PIXEL, np.zeros(8, np.int64), 2)


def named(place: Place, *, made: bool = True) -> list[str]:
    return [each.name for each in DEFENCES.values() if each.place is place and (each.make is not None) == made]


def above_half(**settings) -> PyTorchSmoothedClassifier:
    """One pixel: class 0 above 1/2, class 1 below."""
    return smooth(Linear([1.0], b=-0.5), (1, 1, 1), 2, clip_values=(0, 1), **settings)


# ---------------------------------------------------------------------------------------------- inside f


@pytest.mark.parametrize("name", named(Place.INSIDE))
def test_what_sits_inside_f_is_what_the_certificate_speaks_of(name: str) -> None:
    """Each maps one pixel monotonically and leaves 1/2 within 1/14 of where it is: so is the boundary of g.

    FeatureSqueezing has 3 bits, and a step at 1/2 exactly; the others move a single pixel by rounding at most.
    """
    inside = preprocessors([name], ONE_PIXEL)
    transform = above_half(preprocessing_defences=inside)
    grid = torch.linspace(0, 1, 201)[:, None, None, None]
    answers = transform.model.f.eval()(grid).argmax(dim=1).numpy()
    steps = np.flatnonzero(np.diff(answers))
    assert len(steps) == 1
    boundary = float(grid[steps[0] + 1])
    assert abs(boundary - 0.5) <= 1 / 14
    x = np.array([0.55, 0.7, 0.9, 0.2], np.float32)[:, None, None, None]
    n = {"total-variation": 300, "jpeg": 3_000}.get(name, 20_000)
    found = transform.certificates(x, n=n, seed=0)
    distance = np.abs(x[:, 0, 0, 0] - boundary)
    assert found.prediction[~found.abstained].tolist() == (x[:, 0, 0, 0] < boundary)[~found.abstained].tolist()
    assert np.all(found.radius <= distance + 0.005)   # the grid's step
    assert np.allclose(found.count / n, norm.cdf(distance / 0.25), atol=5 * 0.5 / np.sqrt(n))


def test_the_defence_moves_the_certificate_as_it_moves_f() -> None:
    """Two bits have levels 0, 1/3, 2/3, 1: class 0 above 0.6 starts at 1/2, and not at 0.6."""
    network = Linear([1.0], b=-0.6)
    squeezed = smooth(
        network, (1, 1, 1), 2, clip_values=(0, 1), preprocessing_defences=FeatureSqueezing((0, 1), bit_depth=2)
    )
    plain = smooth(network, (1, 1, 1), 2, clip_values=(0, 1))
    x = np.full((1, 1, 1, 1), 0.8, np.float32)
    with_it, without = (each.certificates(x, n=100_000, seed=0).radius[0] for each in (squeezed, plain))
    assert 0.28 < with_it <= 0.3
    assert 0.18 < without <= 0.2


@pytest.mark.parametrize("name", ["feature-squeezing", "jpeg", "spatial-smoothing"])
def test_a_configuration_puts_it_inside_f(name: str, tmp_path) -> None:
    train(TrainConfig(epochs=1, defences=(name,), examples="::10"), tmp_path / "w.safetensors")
    config = RunConfig(weights=str(tmp_path / "w.safetensors"), defences=(name,))
    data, estimator = open_estimator(config)
    (operation,) = [layer.operation for layer in estimator.model.f.transform]
    assert type(operation).__name__ == DEFENCES[name].art
    draws = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    noisy = torch.from_numpy(data.x_test[:5] + 0.3 * draws)
    expected = estimator.model.base(torch.from_numpy(operation(noisy.clamp(0, 1).numpy())[0]).float())
    assert torch.allclose(estimator.model.f.eval()(noisy), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", named(Place.TRAINER))
def test_trainers_meet_noise_of_sigma(name: str, tmp_path, monkeypatch) -> None:
    """A constant image: what the network is trained on has the standard deviation of the noise, and little more."""
    half = np.full((96, 1, 8, 8), 0.5, np.float32)
    labels = np.arange(96) % 10
    recorder = Recorder()
    trained: list[torch.Tensor] = []
    forward = recorder.forward

    def remember(x: torch.Tensor) -> torch.Tensor:
        if recorder.training and len(x) > 8:   # not the probe of a clone
            trained.append(x.detach().flatten(1))
        return forward(x)

    monkeypatch.setattr(recorder, "forward", remember)
    monkeypatch.setattr(training, "load", lambda _: Dataset("half", half, labels, half, labels, 10))
    monkeypatch.setattr(training, "build", lambda *_, **__: recorder)
    config = TrainConfig(sigma=0.4, epochs=2, eps=1e-3, steps=1, defences=(name,), learning_rate=1e-6)
    train(config, tmp_path / "w.safetensors")
    assert float(torch.cat(trained).std()) == pytest.approx(0.4, rel=0.03)


@pytest.mark.parametrize("name", named(Place.DATA))
def test_augmentations_reach_training_and_nothing_else(name: str, tmp_path) -> None:
    settings = {"epochs": 1, "examples": "::10"}
    changed, again, plain = (tmp_path / f"{name}.safetensors" for name in ("changed", "again", "plain"))
    train(TrainConfig(defences=(name,), **settings), changed)
    train(TrainConfig(defences=(name,), **settings), again)
    train(TrainConfig(**settings), plain)
    first, second, other = (load_file(path)["0.weight"] for path in (changed, again, plain))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert open_estimator(RunConfig(weights=str(changed)))[1].model.f.transform is None


# ---------------------------------------------------------------------------------------------- base, selector


def test_an_ensemble_is_one_base_network() -> None:
    members = [Linear([1.0], b=-0.4), Linear([1.0], b=-0.6)]   # their mean turns at 1/2, where they disagree as much
    estimator = smooth(Ensemble(members), (1, 1, 1), 2, clip_values=(0, 1))
    x = np.full((1, 1, 1, 1), 0.8, np.float32)
    found = estimator.certificates(x, n=100_000, seed=0)
    assert 0.28 < found.radius[0] <= 0.3
    logits = torch.stack([member(torch.from_numpy(x)) for member in members])
    assert torch.allclose(estimator.model.f(torch.from_numpy(x)).exp(), logits.softmax(dim=2).mean(dim=0), atol=1e-6)
    with pytest.raises(ValueError, match="members must hold at least one network"):
        Ensemble([])


def test_a_detector_selects_with_a_radius_of_its_own() -> None:
    """It takes what is below 0.4 for an attack; class 0 is above 0.2: the selector's radius is smaller."""
    smoothed = smooth(Linear([1.0], b=-0.2), (1, 1, 1), 2, clip_values=(0, 1))
    watcher = smooth(Linear([1.0], b=-0.4), (1, 1, 1), 2, clip_values=(0, 1))
    detector = BinaryInputDetector(watcher)
    core = PyTorchClassifier(Linear([1.0], b=-0.2), nn.CrossEntropyLoss(), (1, 1, 1), 2, clip_values=(0, 1))
    composed = PyTorchACES(core=core, smoothed=smoothed, selector=selector(detector, 0.5))
    x = np.array([0.9, 0.7], np.float32)[:, None, None, None]
    _, attacked = detector.detect(np.concatenate([x, np.zeros_like(x)]))
    assert attacked.tolist() == [False, False, True, True]
    found = composed.certificates(x, n=50_000, seed=0)
    assert np.all(found.radius <= [0.5, 0.3])
    assert np.all(found.radius > [0.45, 0.27])
    alone = smoothed.certificates(x, n=50_000, seed=0)
    assert np.all(alone.radius > [0.5, 0.3])
    assert np.all(found.alpha == smoothed.alpha)
    part = composed.compositions(x, n=50_000, seed=0).smoothed[0]
    assert np.all(part.alpha == smoothed.alpha / 2)   # the price: alpha is shared
    plain = PyTorchClassifier(nn.Sequential(nn.Flatten(), nn.Linear(1, 2)), nn.CrossEntropyLoss(), (1, 1, 1), 2)
    for bare in (BinaryInputDetector(plain), BinaryActivationDetector(plain, plain, layer=0)):
        with pytest.raises(TypeError, match="to have a radius"):
            selector(bare, 0.5)


# ---------------------------------------------------------------------------------------------- what voids it


@pytest.mark.parametrize(
    "defence",
    [HighConfidence(cutoff=0.5), Rounded(decimals=1), ReverseSigmoid(), GaussianNoise(), ClassLabels()],
    ids=lambda defence: type(defence).__name__,
)
def test_postprocessors_are_refused(defence) -> None:
    assert type(defence).__name__ in {each.art for each in DEFENCES.values() if each.place is Place.ANSWER}
    with pytest.raises(ValueError, match="votes are counted before them"):
        smooth(digits_network(), postprocessing_defences=defence)


@pytest.mark.parametrize(
    "defence",
    [TotalVarMin(prob=0.3, max_iter=1), GaussianAugmentation(0.1, augmentation=False, apply_predict=True)],
    ids=lambda defence: type(defence).__name__,
)
def test_what_is_random_in_prediction_is_refused(defence) -> None:
    estimator = smooth(digits_network(), clip_values=(0, 1), preprocessing_defences=defence)
    with pytest.raises(ValueError, match="f is random"):
        estimator.certificates(X[:2], n=100, seed=0)


@pytest.mark.parametrize("name", [each.name for each in DEFENCES.values() if each.status is Status.VOID])
def test_a_configuration_cannot_name_what_voids_it(name: str) -> None:
    for training_too in (False, True):
        with pytest.raises(ValueError, match=r"voids the certificate: .*; leave it out"):
            check_defences([name], training=training_too)
    with pytest.raises(ValueError, match="voids the certificate"):
        Cell("cell", RunConfig(defences=(name,)))


def test_what_goes_in_elsewhere_says_where() -> None:
    for name, words in {
        "madry": "name it in the training",
        "cutout": "name it in the training",
        "ensemble": "make it a part of the network",
        "detector": "give PyTorchACES the selector",
    }.items():
        with pytest.raises(ValueError, match=words):
            check_defences([name], training=False)
    with pytest.raises(ValueError, match="did you mean 'feature-squeezing'"):
        check_defences(["feature-squeezin"], training=False)
    with pytest.raises(ValueError, match="more than one trainer"):
        check_defences(["madry", "trades"], training=True)
    for wrong in ({"eps": 0.0}, {"eps": 0.1, "method": "adre"}):
        with pytest.raises(ValueError, match="give eps > 0, and method 'gaussian'"):
            training.make_trainer(TrainConfig(defences=("madry",), **wrong))
    with pytest.raises(ValueError, match="did you mean 'madry'"):
        Cell("cell", RunConfig(), training=TrainConfig(defences=("madri",)))


class Quantised(PyTorchSmoothedClassifier):
    """Unsound on purpose: the input is rounded to one bit before the noise, and the radius handed on as it is."""

    def _certify(self, f, x, **settings):
        return super()._certify(f, (x >= 0.5).float(), **settings)

    def _predict(self, f, x, **settings):
        return super()._predict(f, (x >= 0.5).float(), **settings)


def test_a_planted_defence_before_the_noise_is_caught() -> None:
    """At 0.55 the rounded input is 1, far from the boundary, and so the false radius; a step of 0.06 turns it to 0."""
    honest = above_half()
    planted = Quantised(
        Linear([1.0], b=-0.5), nn.CrossEntropyLoss(), (1, 1, 1), 2, clip_values=(0, 1), scale=0.25, device_type="cpu"
    )
    x, labels = np.full((20, 1, 1, 1), 0.55, np.float32), np.zeros(20, int)
    for estimator, broken in ((honest, False), (planted, True)):
        certificates = estimator.certificates(x, n=2_000, seed=0)
        outcomes = run_attack(
            ATTACKS["pgd"], estimator, x, labels, budgets=(0.1, 0.3), certificates=certificates, seed=0
        )
        found = audit(certificates, outcomes, labels)
        cases = {case.index for case in found.contradictions}
        assert (len(cases) == 20) is broken
        assert len(cases) <= 20 if broken else len(cases) <= allowed(20, 0.001)
        assert bool(found.gap.min() < 0) is broken


def half_of_one_pixel() -> nn.Module:
    """What `RunConfig.model` builds: class 0 above 1/2."""
    return Linear([1.0], b=-0.5)


@pytest.mark.parametrize(("method", "broken"), [("planted", True), ("smoothing", False)])
def test_a_planted_defence_stands_at_the_top_of_the_report(method, broken, tmp_path, monkeypatch, capsys) -> None:
    """As a user would: records on disk, attacks on them, a page. True radius 0.05; the false one is near 0.5."""
    monkeypatch.setitem(METHODS, "planted", Quantised)
    x = np.array([0.55, 0.95, 0.55, 0.55], np.float32)[:, None, None, None]   # 0.95 is out of reach
    np.savez(tmp_path / "pixel.npz", x_train=x, y_train=[0, 1, 0, 0], x_test=x, y_test=[0] * 4)
    (tmp_path / "suite.toml").write_text(f"""
        [run]
        data = "{tmp_path}/pixel.npz"
        model = "test_defences:half_of_one_pixel"
        n = 2_000
        [attack]
        budgets = [0.1, 0.3]
        [[attacks]]
        names = ["fgm", "pgd"]
        [[cell]]
        name = "squeezed"
        run = {{ method = "{method}" }}
    """)
    out = tmp_path / "out"

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["art-rs", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    record, again = str(out / "squeezed.tsv"), out / "again.html"
    benchmark = call("benchmark", str(tmp_path / "suite.toml"), "--output", str(out), "--quiet")
    report = call("report", record, "--output", str(again))
    alone = call("attack", record, "--attack", "pgd", "--budget", "0.1", "--budget", "0.3", "--quiet")
    guilty = ["0", "2", "3"] if broken else []
    for code, err in (benchmark, report, alone):
        assert code == broken
        assert sorted(set(re.findall(r"CONTRADICTION at input (\d+)", err))) == guilty
        assert ("at 3 inputs" in err) is broken
        assert "FAILED" not in err
    done = suites.run(suites.read(str(tmp_path / "suite.toml")), out)   # from disk
    assert sorted({str(case.index) for case in done.audits[0]["all"].contradictions}) == guilty
    assert not done.failed
    for page in (out / "report.html", again):
        text = page.read_text()
        top = text[: text.index("<h2")]
        assert ('role="alert"' in top) is broken
        cells = [data for tag, data in Page(top).text if tag in ("td", "th")]
        named = [cells[at + 1] for at, word in enumerate(cells) if word == "squeezed"]
        assert sorted(set(named)) == guilty
        assert ("Contradictions: 0 among 4 attacked inputs." in " ".join(Page(top).words().split())) is not broken


def test_the_table_names_every_defence_and_its_worth() -> None:
    lines = table().splitlines()
    assert len(lines) == len(DEFENCES) + 2
    for line, defence in zip(lines[2:], DEFENCES.values(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells == [defence.name, defence.art, defence.place.value, defence.status.value, defence.reason]

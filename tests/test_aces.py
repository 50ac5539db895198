"""Compositions as estimators of ART: the certificate, its parts, what may take part, and attacks that aim at it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoProjectedGradientDescent, FastGradientMethod, ProjectedGradientDescent, SquareAttack
from art.defences.preprocessor import JpegCompression
from art.defences.trainer import AdversarialTrainer
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing, RandomizedSmoothingMixin
from art.estimators.classification import PyTorchClassifier
from closed_forms import Function, Linear, allowed
from scipy.stats import norm
from support import TEST, TRAIN, X, Y, digits_network, smooth
from torch import nn

from art_rs_plugins import (
    Certificates,
    Envelope,
    GridGaussian,
    OneSided,
    PatchGeometry,
    PyTorchADRE,
    PyTorchInstaRS,
    PyTorchPatchVote,
    PyTorchSmoothedClassifier,
    PyTorchSmoothReduce,
    TwoSided,
    audit,
)
from art_rs_plugins.benchmark.attacks import ATTACKS, run_attack
from art_rs_plugins.benchmark.compositions import COMPOSITION_ATTACKS, random_router, selection_rate, sweep
from art_rs_plugins.estimators.aces import PyTorchACES
from art_rs_plugins.estimators.selection import certifiable, cross_fitted, fit_selector
from art_rs_plugins.smoothing.performance import Performance
from art_rs_plugins.smoothing.selectors import (
    ComposedModule,
    ConfidenceSelector,
    FixedSelector,
    ScoreSelector,
    core_probability,
    entropy,
)
from art_rs_plugins.theory.composition import CERTIFY, CORE, Fallback, Minimum, Split
from art_rs_plugins.theory.metrics import (
    average_certified_radius,
    certified_accuracy,
    certified_correct,
    natural_accuracy,
)
from art_rs_plugins.theory.patches import Placement

SELECTORS = {
    "entropy": ScoreSelector(0.2),
    "shifted": ScoreSelector(0.1, 0.1),
    "confidence": ConfidenceSelector(0.7),
    "all": FixedSelector(True),
    "none": FixedSelector(False),
}


def as_core(network: nn.Module, shape=(1, 8, 8), classes=10, **settings) -> PyTorchClassifier:
    settings = {"device_type": "cpu", **settings}
    return PyTorchClassifier(network, nn.CrossEntropyLoss(), shape, classes, **settings)


@pytest.fixture(scope="module")
def smoothed() -> PyTorchSmoothedClassifier:
    network = digits_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    estimator = smooth(network, optimizer=optimizer, clip_values=(0, 1), bank_samples=16)
    estimator.fit(X[TRAIN], Y[TRAIN], nb_epochs=15, batch_size=64)
    return estimator


@pytest.fixture(scope="module")
def core() -> PyTorchClassifier:
    network = digits_network(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = as_core(network, optimizer=torch.optim.Adam(network.parameters(), lr=2e-3), clip_values=(0, 1))
        classifier.fit(X[TRAIN], Y[TRAIN], nb_epochs=15, batch_size=64)
    return classifier


@pytest.fixture(scope="module")
def composed(core, smoothed) -> PyTorchACES:
    return PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(0.2))


def planes(selector, certifier, *, core: int = 0, scale: float = 0.5, tau: float = 0.5, **settings) -> PyTorchACES:
    """Two half-spaces of the plane, as (w, b): where to certify, and where the class is 1; the core is constant."""
    network = Linear(-np.asarray(certifier[0], float), -certifier[1])
    gate = Linear(-np.asarray(selector[0], float), -selector[1])
    constant = as_core(Function(lambda z: torch.eye(2)[core].expand(len(z), 2)), (2,), 2)
    chosen = ScoreSelector(0.5, tau, core_probability, gate)
    parts = {"smoothed": smooth(network, (2,), 2, scale=scale, bank_samples=200), "selector": chosen}
    return PyTorchACES(core=constant, **parts, **settings)


# ---------------------------------------------------------------------------------------------- what is promised


@pytest.mark.parametrize("scale", [0.25, 0.5])
@pytest.mark.parametrize("allocation", [Split, Minimum])
def test_two_half_spaces(scale, allocation):
    """The selector's distance is 0.6, the certifier's 0.565685, at any sigma."""
    composed = planes(((3, 4), -2), ((1, -1), 0.3), scale=scale, allocation=allocation)
    x = np.tile(np.array([[1.0, 0.5]], np.float32), (5, 1))
    found = composed.compositions(x, n=100_000, seed=3)
    radius, distance = found.certificates.radius, 0.8 / np.sqrt(2.0)
    assert np.all(found.certificates.prediction == 1)
    assert np.sum(radius > distance) <= allowed(5, 0.001)
    assert np.all(radius > distance - 0.03)
    assert np.sum(found.selectors[0].radius > 0.6) <= allowed(5, 0.001)
    assert np.all(found.selectors[0].radius > 0.57)
    assert found.certificates.alpha.tolist() == [0.001] * 5


def test_the_promise_is_kept_and_nearly_spent():
    """Inputs at one distance of both boundaries, one noise for both: alpha whole for each is enough, twice is not."""
    x = np.stack([np.full(1200, 0.15), np.linspace(-3, 3, 1200)], axis=1).astype(np.float32)
    composed = planes(((1, 0), 0), ((2, 0), 0), allocation=Minimum)
    rates = []
    for alpha in (0.05, 0.1):
        composed.smoothed.set_params(alpha=alpha)
        found = composed.certificates(x, n=400, n0=100, seed=2)
        rates.append(int(np.sum(~found.abstained & ((found.prediction != 1) | (found.radius > x[:, 0])))))
    assert 0.2 * 0.05 * len(x) < rates[0] <= allowed(len(x), 0.05) < rates[1]


def test_a_selector_of_everything_is_the_smoothed_classifier(core, smoothed):
    x = X[TEST][:40]
    half = smoothed.certificates(x, n=2_000, seed=5, rule=OneSided(0.0005))
    whole = smoothed.certificates(x, n=2_000, seed=5)
    for selector, allocation, expected in (
        (ScoreSelector(1.0), Split, half),
        (ScoreSelector(1.0), Minimum, whole),
        (FixedSelector(True), Split, whole),
        (ConfidenceSelector(0.0), Minimum, whole),
        (ScoreSelector(0.0, tau=0.0), Minimum, whole),
    ):
        found = PyTorchACES(core=core, smoothed=smoothed, selector=selector, allocation=allocation).certificates(
            x, n=2_000, seed=5
        )
        beyond = expected.radius > 0.0
        assert np.array_equal(found.radius, expected.radius)
        assert np.array_equal(found.prediction[beyond], expected.prediction[beyond])
        assert np.array_equal(found.count[beyond], expected.count[beyond])


def test_a_selector_of_nothing_is_the_core(core, smoothed):
    x, y = X[TEST][:100], Y[TEST][:100]
    composed = PyTorchACES(core=core, smoothed=smoothed, selector=FixedSelector(False))
    accuracy = np.mean(core.predict(x).argmax(axis=1) == y)
    answers = composed.predictions(x, seed=0)
    assert natural_accuracy(answers.prediction, answers.abstained, y) == accuracy
    found = composed.certificates(x, n=500, seed=0)
    assert certified_accuracy(found, y, [0.0, 1e-9, 0.5]).accuracy.tolist() == [accuracy, 0.0, 0.0]
    assert average_certified_radius(certified_correct(found, y), found.radius) == 0.0


def test_composition_is_the_smaller_radius_and_beats_both_branches(composed):
    x, y = X[TEST][:200], Y[TEST][:200]
    found = composed.compositions(x, n=2_000, seed=1)
    selector, part = found.selectors[0], found.smoothed[0]
    direct = (selector.prediction == CERTIFY) & ~selector.abstained & ~part.abstained
    assert np.array_equal(found.certificates.radius[direct], np.minimum(selector.radius, part.radius)[direct])
    assert np.all(found.certificates.radius[~direct] == 0.0)
    certain = (selector.prediction == CORE) & ~selector.abstained
    assert np.array_equal(found.certificates.prediction[certain], found.core.prediction[certain])
    assert 30 < direct.sum() < 180
    assert certain.sum() > 10
    answers = composed.answers(x, n=1_000, seed=2)
    natural = natural_accuracy(answers.verdict.prediction, answers.verdict.abstained, y)
    alone = natural_accuracy(answers.smoothed[0].prediction, answers.smoothed[0].abstained, y)
    certified = certified_accuracy(found.certificates, y, [0.25]).accuracy[0]
    bare = certified_accuracy(part, y, [0.25]).accuracy
    share, coin = random_router(natural, core=np.mean(answers.core.prediction == y), smoothed=alone, certified=bare)
    assert 0.0 <= share <= 1.0
    assert certified > 0.3
    assert coin[0] <= bare[0]
    rates = selection_rate(selector, [0.0, 0.25, 1.0])
    assert rates[0] == np.mean(~selector.abstained & (selector.prediction == CERTIFY))
    assert np.all(np.diff(rates) <= 0)
    assert selection_rate(selector, 0.0, answer=CORE)[0] == certain.mean()


def test_theta_moves_what_is_certified_one_way(core, smoothed):
    x, y = X[TEST][:60], Y[TEST][:60]
    signed, certified = [], []
    for theta in (0.0, 0.05, 0.2, 0.5, 1.0):
        composed = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(theta), allocation=Minimum)
        found = composed.compositions(x, n=1_000, seed=4)
        selector = found.selectors[0]
        signed.append(np.where(selector.prediction == CERTIFY, 1, -1) * selector.radius)
        certified.append(certified_accuracy(found.certificates, y, [0.1, 0.3]).accuracy)
    assert np.all(np.diff(signed, axis=0) >= 0.0)
    assert np.all(np.diff(certified, axis=0) >= 0.0)
    assert certified[-1][0] > certified[1][0]


def test_allocation_costs_little_and_never_pays_less(core, smoothed):
    x = X[TEST][:60]
    radii = []
    for allocation in (Split, Minimum):
        composed = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(0.2), allocation=allocation)
        radii.append(composed.certificates(x, n=2_000, seed=4).radius)
    assert np.all(radii[0] <= radii[1])
    assert 0.0 < np.mean(radii[1] - radii[0]) < 0.02


# ---------------------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("name", SELECTORS)
def test_bits_do_not_depend_on_the_batch(core, smoothed, name):
    composed = PyTorchACES(core=core, smoothed=smoothed, selector=SELECTORS[name])
    x = X[TEST][:9]
    whole, parts = (composed.certificates(x, n=700, seed=7, batch_size=size) for size in (9, 4))
    assert np.array_equal(whole.radius, parts.radius)
    assert np.array_equal(whole.count, parts.count)
    first, second = (composed.predictions(x, seed=7, batch_size=size) for size in (9, 2))
    assert np.array_equal(first.abstained, second.abstained)
    assert np.array_equal(first.votes, second.votes)
    some = composed.certificates(x[4:], n=700, seed=7, indices=range(4, 9))
    assert np.array_equal(some.radius, whole.radius[4:])


def test_one_pass_gives_the_class_votes_of_the_smoothed_classifier(composed, smoothed):
    x = X[TEST][:20]
    found = composed.compositions(x, n=1_500, seed=6).smoothed[0]
    alone = smoothed.certificates(x, n=1_500, seed=6, rule=OneSided(0.0005))
    for name in ("prediction", "count", "runner_up_count", "p_lower", "radius"):
        assert np.array_equal(getattr(found, name), getattr(alone, name)), name
    answers = composed.answers(x, n=300, seed=6).smoothed[0]
    bare = smoothed.predictions(x, n=300, seed=6, alpha=0.0005)
    assert np.array_equal(answers.votes, bare.votes)
    assert np.array_equal(answers.abstained, bare.abstained)
    assert answers.alpha == 0.0005


def test_a_selector_with_the_smoothed_network_for_its_own_votes_the_same(core, smoothed):
    x, network = X[TEST][:20], smoothed.model.base
    for selector in (ScoreSelector(0.2, network=network), ScoreSelector(0.2, network=network, sigma=0.25)):
        first, second = (
            PyTorchACES(core=core, smoothed=smoothed, selector=each).compositions(x, n=1_500, seed=6)
            for each in (ScoreSelector(0.2), selector)
        )
        assert np.array_equal(first.certificates.radius, second.certificates.radius)
        assert np.array_equal(first.selectors[0].radius, second.selectors[0].radius)


def test_a_selector_has_a_sigma_of_its_own(core, smoothed):
    x = X[TEST][:3]
    for sigma, expected in ((None, 0.25), (1.0, 1.0)):
        sure = ScoreSelector(1.0, network=flat(2), sigma=sigma)
        found = PyTorchACES(core=core, smoothed=smoothed, selector=sure).compositions(x, n=1_000, seed=0)
        assert found.selectors[0].radius == pytest.approx(expected * norm.ppf(0.0005**0.001), rel=1e-6)
        assert np.all(found.smoothed[0].sigma == 0.25)


def test_a_histogram_gives_the_certificates_of_every_theta(core, smoothed):
    x, y = X[TEST][:50], Y[TEST][:50]
    composed = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(0.3))
    histogram, answers = composed.histogram(x, edges=(0.05, 0.2, 1.0), n=1_000, seed=9)
    for allocation, tau in ((Split, 0.5), (Minimum, 0.1)):
        table = sweep(histogram, answers, y, radii=(0.0, 0.2), tau=tau, allocation=allocation)
        for row, theta in enumerate((0.05, 0.2, 1.0)):
            selector = ScoreSelector(theta, tau)
            parts = {"core": core, "smoothed": smoothed, "selector": selector, "allocation": allocation}
            found = PyTorchACES(**parts).certificates(x, n=1_000, seed=9)
            assert certified_accuracy(found, y, [0.0, 0.2]).accuracy.tolist() == table.certified[row].tolist()
            expected = average_certified_radius(certified_correct(found, y), found.radius)
            assert table.average_radius[row] == pytest.approx(expected, abs=1e-12)
    own = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(0.2, network=smoothed.model.base))
    again, _ = own.histogram(x, edges=(0.05, 0.2, 1.0), n=1_000, seed=9)
    for name in ("class_selection", "class_estimation", "score_selection", "score_estimation"):
        assert np.array_equal(getattr(again, name), getattr(histogram, name))


def test_theta_is_chosen_on_one_set_and_reported_on_another(composed, core, smoothed):
    validation, y = X[TEST][200:300], Y[TEST][200:300]
    histogram, answers = composed.histogram(validation, n=1_000, seed=0)
    table = sweep(histogram, answers, y, radii=(0.0, 0.25))
    theta = table.choose(natural=0.85, radius=0.25)
    row = np.flatnonzero(table.theta == theta)[0]
    assert table.natural[row] >= 0.85
    assert table.certified[row, 1] == table.certified[table.natural >= 0.85, 1].max()
    assert table.natural[0] == pytest.approx(np.mean(answers.prediction == y), abs=0.02)   # nearly all go to the core
    assert table.selected[0] <= table.selected[-1] == 1.0
    assert np.all(np.diff(table.certified[:, 1]) >= 0)
    chosen = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(theta))
    found = chosen.certificates(X[TEST][:100], n=1_000, seed=1)
    assert certified_accuracy(found, Y[TEST][:100], [0.25]).accuracy[0] > 0.2
    with pytest.raises(ValueError, match=r"natural accuracy 1\.01 is not reached"):
        table.choose(natural=1.01, radius=0.25)
    with pytest.raises(ValueError, match="radius must be one of"):
        table.choose(natural=0.5, radius=0.3)


def test_named_radii_stop_early(composed):
    x = X[TEST][:12]
    found = composed.certificates(x, radii=(0.1, 0.3), seed=1)
    assert set(found.radius.tolist()) <= {0.0, 0.1, 0.3}
    assert found.n.mean() < 50_000
    whole = composed.certificates(x, n=20_000, seed=1)
    assert np.mean((found.radius > 0) == (whole.radius >= 0.1)) > 0.8


def test_copies_carry_everything(composed, core, tmp_path, monkeypatch):
    monkeypatch.setattr("art.config.ART_DATA_PATH", str(tmp_path))   # where ART's own cores go when they are copied
    x = X[TEST][:6]
    reference = composed.certificates(x, n=500, seed=2)
    whole = {"core": as_core(core.model, clip_values=(0, 1)), "smoothed": composed.smoothed}
    for twin in (
        copy.copy(composed),
        PyTorchACES(**composed.get_params()),
        PyTorchACES(**{**composed.get_params(), **whole}),
        pickle.loads(pickle.dumps(composed)),
        copy.deepcopy(composed),
    ):
        assert np.array_equal(twin.certificates(x, n=500, seed=2).radius, reference.radius)
    assert composed.fallback is Fallback.AGREE


# ---------------------------------------------------------------------------------------------- chains


def test_a_chain_is_a_composition_whose_core_is_one(core, smoothed):
    second = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(0.3))
    wide = smooth(smoothed.model.base, clip_values=(0, 1), scale=0.5)
    x = X[TEST][:30]
    for allocation in (Split, Minimum):
        chain = PyTorchACES(core=second, smoothed=wide, selector=ScoreSelector(0.1), allocation=allocation)
        assert (chain.bounds, chain.scale) == (4, 0.5)
        found = chain.compositions(x, n=1_000, seed=3)
        assert len(found.selectors) == len(found.smoothed) == 2
        share = allocation(0.001).share(4)
        assert found.smoothed[1].alpha.tolist() == [share] * 30
        alone = smoothed.certificates(x, n=1_000, seed=3, rule=OneSided(share))
        assert np.array_equal(found.smoothed[1].radius, alone.radius)
        skipped = (found.selectors[0].prediction == CORE) & ~found.selectors[0].abstained
        taken = skipped & (found.selectors[1].prediction == CERTIFY) & (found.certificates.radius > 0)
        path = np.min([found.selectors[0].radius, found.selectors[1].radius, found.smoothed[1].radius], axis=0)
        assert taken.sum() > 3
        assert np.all(found.certificates.radius[taken] >= path[taken])
        if allocation is Minimum:
            assert np.array_equal(found.certificates.radius[taken], path[taken])
        assert np.all(found.certificates.sigma[taken] == 0.25)
    never = PyTorchACES(core=second, smoothed=wide, selector=FixedSelector(False), allocation=Minimum)
    single = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(0.3), allocation=Minimum)
    assert np.array_equal(
        never.certificates(x, n=1_000, seed=3).radius, single.certificates(x, n=1_000, seed=3).radius
    )
    assert never.predict(x, seed=1).shape == (30, 10)


def test_a_chain_of_half_spaces():
    """The first selector is skipped at 0.4; the second certifies at 0.7, with its class at 0.5."""
    inner = planes(((1, 0), 0.3), ((0, 1), 0.1), core=0)
    for other, radius in ((1, 0.5), (0, 0.4)):   # the first stage's class agrees within 0.9, or differs
        sign = 1 if other == 1 else -1
        first = planes(((-1, 0), 0.0), ((0, sign), sign * 0.5))
        chain = PyTorchACES(core=inner, smoothed=first.smoothed, selector=first.selector)
        x = np.tile(np.array([[0.4, 0.4]], np.float32), (2, 1))
        found = chain.certificates(x, n=30_000, seed=1)
        assert np.all(found.prediction == 1)
        assert np.all(found.radius <= radius)
        assert np.all(found.radius > radius - 0.04)
        path = PyTorchACES(core=inner, smoothed=first.smoothed, selector=first.selector, allocation=Minimum)
        assert np.all(path.certificates(x, n=30_000, seed=1).radius <= 0.4)


# ---------------------------------------------------------------------------------------------- what may take part


@pytest.fixture(scope="module")
def defended(core) -> PyTorchClassifier:
    """An adversarially trained core behind JPEG compression."""
    network = copy.deepcopy(core.model)
    jpeg = JpegCompression(clip_values=(0, 1), quality=60, channels_first=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    classifier = as_core(network, optimizer=optimizer, clip_values=(0, 1), preprocessing_defences=jpeg)
    attack = ProjectedGradientDescent(classifier, norm=2, eps=0.5, eps_step=0.2, max_iter=3, verbose=False)
    AdversarialTrainer(classifier, attack, ratio=0.5).fit(X[TRAIN][:300], np.eye(10)[Y[TRAIN][:300]], nb_epochs=1)
    return classifier


def test_the_core_moves_no_certified_radius(core, defended, smoothed):
    x = X[TEST][:40]
    noisy = as_core(Function(lambda z: torch.rand(len(z), 10)))
    quantised = as_core(copy.deepcopy(core.model).to(torch.bfloat16), preprocessing=None)
    cast = as_core(Function(lambda z: quantised.model(z.to(torch.bfloat16)).float()))
    ensemble = as_core(Function(lambda z: core.model(z).softmax(1) + defended.model(z).softmax(1)))
    found = [
        PyTorchACES(core=each, smoothed=smoothed, selector=ScoreSelector(0.2)).certificates(x, n=1_000, seed=2)
        for each in (core, defended, noisy, cast, ensemble)
    ]
    beyond = found[0].radius > 0.0
    assert 5 < beyond.sum() < 38
    for other in found[1:]:
        assert np.array_equal(other.radius, found[0].radius)
        assert np.array_equal(other.prediction[beyond], found[0].prediction[beyond])
    assert np.array_equal(found[2].abstained, ~beyond)   # what a random core answers is known of no input
    assert not found[0].abstained.all()
    assert np.sum(found[0].abstained) < np.sum(~beyond)


def test_a_core_without_an_answer_abstains(smoothed):
    for outputs in (torch.full((10,), float("nan")), torch.zeros(10)):
        composed = PyTorchACES(
            core=as_core(Function(lambda z, outputs=outputs: outputs.expand(len(z), 10))),
            smoothed=smoothed,
            selector=FixedSelector(False),
        )
        assert composed.certificates(X[TEST][:3], n=100, seed=0).abstained.all()
        assert composed.predict(X[TEST][:3]).sum() == 0.0


def test_any_smoothed_classifier_takes_part(core, smoothed):
    x = X[TEST][:20]
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", "clip_values": (0, 1)}
    adre = PyTorchADRE(smoothed.model.base, nn.CrossEntropyLoss(), (1, 8, 8), 10, **settings)
    found = PyTorchACES(core=core, smoothed=adre, selector=ScoreSelector(0.2)).compositions(x, n=2_000, seed=1)
    alone = adre.certificates(x, n=2_000, seed=1, rule=TwoSided(0.0005, 0.9))
    assert np.array_equal(found.smoothed[0].radius, alone.radius)
    assert not np.array_equal(alone.p_upper, 1.0 - alone.p_lower)
    half = smooth(smoothed.model.base, clip_values=(0, 1), performance=Performance(dtype="bfloat16"))
    composed = PyTorchACES(core=core, smoothed=half, selector=ScoreSelector(0.2))
    assert composed.certificates(x[:4], n=300, seed=0).performance == "bfloat16"
    ended = nn.Sequential(smoothed.model.base, nn.Softmax(dim=1))
    twins = [
        PyTorchACES(core=core, smoothed=each, selector=ScoreSelector(0.2)).compositions(x, n=1_000, seed=1)
        for each in (smoothed, smooth(ended, clip_values=(0, 1)))
    ]
    assert np.allclose(twins[0].selectors[0].radius, twins[1].selectors[0].radius, atol=0.02)


def test_patches_share_their_passes_and_only_on_the_raw_input(core, smoothed):
    x, given = X[TEST][:6], (nn.Sequential(nn.Flatten(), nn.Linear(36, 10)), nn.CrossEntropyLoss(), (1, 8, 8), 10)
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", "clip_values": (0, 1)}
    geometry = PatchGeometry.corners((8, 8), 6)
    patches = PyTorchSmoothReduce(*given, geometry=geometry, **settings)
    found = PyTorchACES(core=core, smoothed=patches, selector=ScoreSelector(0.99)).compositions(x, n=1_000, seed=1)
    alone = patches.certificates(x, n=1_000, seed=1, rule=OneSided(0.0005))
    assert np.array_equal(found.smoothed[0].radius, alone.radius)
    assert np.array_equal(found.certificates.passes, alone.passes)
    assert type(found.certificates) is Certificates
    lifted = PyTorchSmoothReduce(*given, geometry=geometry, placement=Placement.PER_PATCH, **settings)
    for part in (lifted, PyTorchPatchVote(*given, geometry=geometry, **settings)):
        with pytest.raises(ValueError, match="does not vote at one sigma at the raw input"):
            PyTorchACES(core=core, smoothed=part, selector=ScoreSelector(0.5))
        own = PyTorchACES(core=core, smoothed=part, selector=ScoreSelector(0.5, network=smoothed.model.base))
        assert own.certificates(x, n=300, seed=0).kind == "certified"
        assert own.predict(x).shape == (6, 10)


def test_several_levels_take_part_with_a_selector_of_another_network(core, smoothed):
    x = X[TEST][:6]
    settings = {"sample_size": 100, "device_type": "cpu", "clip_values": (0, 1), "certificate": Envelope((0.25, 0.5))}
    part = PyTorchInstaRS(smoothed.model.base, nn.CrossEntropyLoss(), (1, 8, 8), 10, scale=0.25, **settings)
    with pytest.raises(ValueError, match="PyTorchInstaRS does not vote at one sigma"):
        PyTorchACES(core=core, smoothed=part, selector=ScoreSelector(0.2))
    own = ScoreSelector(0.2, network=smoothed.model.base)
    composed = PyTorchACES(core=core, smoothed=part, selector=own)
    found = composed.compositions(x, n=1_000, seed=1)
    alone = part.certificates(x, n=1_000, seed=1, rule=Envelope((0.25, 0.5), alpha=0.0005))
    direct = (found.selectors[0].prediction == CERTIFY) & (found.certificates.radius > 0)
    smaller = np.minimum(alone.radius, found.selectors[0].radius)
    assert direct.any()
    assert np.array_equal(found.certificates.radius[direct], smaller[direct])
    assert np.array_equal(found.certificates.passes, alone.passes + 1_100)
    assert composed.predict(x).shape == (6, 10)
    assert composed.loss_gradient(x, Y[TEST][:6]).shape == x.shape


def test_grid_noise_gives_exact_compositions(core, smoothed):
    x = np.round(X[TEST][:8] * 255) / 255
    grid = smooth(smoothed.model.base, clip_values=(0, 1), noise=GridGaussian)
    for selector in (ScoreSelector(0.2), ScoreSelector(0.2, network=smoothed.model.base, sigma=0.3)):
        composed = PyTorchACES(core=core, smoothed=grid, selector=selector)
        found = composed.certificates(x, n=1_000, seed=0)
        assert found.kind == "exact"
        assert (found.radius > 0.0).any()
        with pytest.raises(ValueError, match="255"):
            composed.certificates(x * 0.999, n=100)
        assert composed.predict(x * 0.999).shape == (8, 10)   # the answer for the nearest of the grid


class Kind(PyTorchSmoothedClassifier):
    """A smoothed classifier whose certificates are of another kind, as those of methods that choose sigma are."""

    kind = "conditional"

    def _certify(self, f, x, **settings) -> list[Certificates]:
        return [replace(found, kind=self.kind) for found in super()._certify(f, x, **settings)]


class Remembering(Kind):
    kind = "committed"


def test_conditional_certificates_are_refused_and_committed_ones_named(core, smoothed):
    own = ScoreSelector(0.2, network=smoothed.model.base)
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", "clip_values": (0, 1)}
    given = smoothed.model.base, nn.CrossEntropyLoss(), (1, 8, 8), 10
    parts = [family(*given, **settings) for family in (Kind, Remembering)]
    with pytest.raises(ValueError, match="Kind does not vote at one sigma"):
        PyTorchACES(core=core, smoothed=parts[0], selector=ScoreSelector(0.2))
    with pytest.raises(ValueError, match="conditional certificates cannot be composed"):
        PyTorchACES(core=core, smoothed=parts[0], selector=own).certificates(X[TEST][:2], n=200, seed=0)
    found = PyTorchACES(core=core, smoothed=parts[1], selector=own).certificates(X[TEST][:8], n=500, seed=0)
    assert found.kind == "committed"
    plain = PyTorchACES(core=core, smoothed=smoothed, selector=own).certificates(X[TEST][:8], n=500, seed=0)
    assert np.array_equal(found.radius, plain.radius)
    with pytest.raises(ValueError, match="committed certificates are no theorems"):
        certified_accuracy(found, Y[TEST][:8], [0.1])


class Stubborn(PyTorchSmoothedClassifier):
    """Certifies at its own alpha, whatever the rule says."""

    def _certify(self, f, x, *, rules, **settings) -> list[Certificates]:
        return super()._certify(f, x, rules=[OneSided(self.alpha) for _ in rules], **settings)


def test_a_part_that_overspends_is_refused(core, smoothed):
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", "clip_values": (0, 1)}
    part = Stubborn(smoothed.model.base, nn.CrossEntropyLoss(), (1, 8, 8), 10, **settings)
    selector = ScoreSelector(0.2, network=smoothed.model.base)
    with pytest.raises(ValueError, match=r"Stubborn certifies at alpha=0\.001.*its share is 0\.0005"):
        PyTorchACES(core=core, smoothed=part, selector=selector).certificates(X[TEST][:2], n=200, seed=0)
    whole = PyTorchACES(core=core, smoothed=part, selector=selector, allocation=Minimum)
    assert whole.certificates(X[TEST][:2], n=200, seed=0).alpha[0] == 0.001


class Counting(nn.Module):
    """Changes a buffer whenever it is asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        return self.network(x)


class Averaging(nn.Module):
    """Centres what it gives over its batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.network(x)
        return outputs - outputs.mean(dim=0)


class Dropping(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(nn.functional.dropout(x, 0.3, training=True))


def other(**settings) -> PyTorchSmoothedClassifier:
    return smooth(digits_network(), **{"clip_values": (0, 1), **settings})


def flat(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"core": digits_network()}, TypeError, "core must be an ART PyTorchClassifier, got Sequential"),
        ({"core": other()}, TypeError, "core is smoothed itself.*last stage of a chain"),
        ({"core": as_core(flat(7), classes=7)}, ValueError, "core must have the nb_classes of smoothed, 10, got 7"),
        ({"core": as_core(flat(10), (64,))}, ValueError, "core must have the input_shape of smoothed"),
        ({"core": as_core(flat(10), clip_values=(0, 255))}, ValueError, "clip_values of smoothed.*same raw input"),
        ({"core": as_core(digits_network(), channels_first=False)}, ValueError, "channels_first of smoothed"),
        ({"core": as_core(Counting(digits_network()))}, ValueError, "core carries state: seen changed"),
        ({"core": as_core(Averaging(digits_network()))}, ValueError, "changes with the other inputs of its batch"),
        ({"smoothed": as_core(digits_network())}, TypeError, "smoothed must be an estimator.*from_classifier"),
        ({"selector": 0.3}, TypeError, "selector must be a ScoreSelector.*clean input has no radius"),
        ({"selector": entropy}, TypeError, "selector must be a ScoreSelector"),
        ({"selector": ScoreSelector(0.5, network=nn.Linear(5, 2))}, ValueError, r"take inputs of input_shape \(1, 8"),
        ({"selector": ScoreSelector(0.5, network=nn.Flatten(0))}, ValueError, r"must return \(m, k\) for m inputs"),
        ({"selector": ScoreSelector(0.5, network=Counting(flat(10)))}, ValueError, "carries state: .*seen changed"),
        ({"selector": ScoreSelector(0.5, network=Averaging(digits_network()))}, ValueError, "other rows of its batch"),
        ({"selector": ScoreSelector(0.5, network=Dropping(digits_network()))}, ValueError, "f is random"),
        ({"selector": ScoreSelector(0.5, score=lambda log_p: log_p)}, ValueError, r"score must return shape \(m,\)"),
        ({"allocation": "split"}, TypeError, "allocation must be the class Split or Minimum"),
        ({"allocation": Split(0.01)}, TypeError, "allocation must be the class Split or Minimum"),
        ({"fallback": "agree"}, TypeError, "fallback must be a Fallback"),
        ({"fallback": Fallback.CORE}, ValueError, "CORE voids the certificate"),
    ],
)
def test_what_would_break_the_certificate_is_refused_with_its_reason(changes, error, words):
    parts = {"core": as_core(digits_network(), clip_values=(0, 1)), "smoothed": other(), "selector": ScoreSelector(0.5)}
    PyTorchACES(**parts)
    with pytest.raises(error, match=words):
        PyTorchACES(**{**parts, **changes})


def test_chains_of_parts_that_do_not_fit_are_refused(composed):
    for settings, words in (
        ({"noise": GridGaussian}, "a later stage must have the noise GridGaussian of smoothed, got Gaussian"),
        ({"clip_values": (0, 2)}, "a later stage must have the clip_values of smoothed"),
    ):
        with pytest.raises(ValueError, match=words):
            PyTorchACES(core=composed, smoothed=other(**settings), selector=ScoreSelector(0.1))
    with pytest.raises(ValueError, match="CERTIFY voids the certificates of a chain"):
        PyTorchACES(core=composed, smoothed=other(), selector=ScoreSelector(0.1), fallback=Fallback.CERTIFY)


def test_arts_own_smoothing_is_no_core(composed):
    arts = PyTorchRandomizedSmoothing(
        digits_network(), nn.CrossEntropyLoss(), (1, 8, 8), 10, device_type="cpu", scale=0.25, sample_size=50
    )
    with pytest.raises(TypeError, match="core is smoothed itself, a PyTorchRandomizedSmoothing"):
        PyTorchACES(core=arts, smoothed=composed.smoothed, selector=ScoreSelector(0.1))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"n0": 0}, ValueError, "n0 must be at least 1"),
        ({"n": 10.0}, TypeError, "n must be an integer"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"indices": [0, 0]}, ValueError, "indices must be distinct"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_numbers_are_named(composed, settings, error, words):
    with pytest.raises(error, match=words):
        composed.certificates(X[TEST][:2], **{"n": 100, **settings})


def test_bad_inputs_and_settings_are_named(composed):
    for x, words in ((X[TEST][0], "x must have shape"), (np.full((1, 1, 8, 8), 2.0), "within clip_values")):
        with pytest.raises(ValueError, match=words):
            composed.certificates(x, n=100)
    with pytest.warns(UserWarning, match="n=9 draws can never certify"):
        composed.certificates(X[TEST][:1], n=9, seed=0)
    with pytest.raises(ValueError, match="edges must be ascending"):
        composed.histogram(X[TEST][:1], edges=(0.5, 0.2))
    for change in ({"scale": 1.0}, {"core": None}):
        with pytest.raises(ValueError, match="cannot be set on a composition"):
            composed.set_params(**change)
    for act in (lambda: composed.fit(X[:4], Y[:4]), lambda: composed.fit_generator(None), composed.clone_for_refitting):
        with pytest.raises(ValueError, match="a composition is not trained"):
            act()
    fixed = PyTorchACES(core=composed.core, smoothed=composed.smoothed, selector=FixedSelector(True))
    with pytest.raises(TypeError, match="histograms need a ScoreSelector"):
        fixed.histogram(X[TEST][:1], n=100)


# ---------------------------------------------------------------------------------------------- ART


def test_arts_contract(composed):
    for family in (RandomizedSmoothingMixin, PyTorchClassifier):
        assert isinstance(composed, family)
    assert isinstance(composed.model, ComposedModule)
    assert (composed.scale, composed.alpha, composed.sample_size) == (0.25, 0.001, 100)
    assert (composed.nb_classes, composed.input_shape, composed.bank_samples) == (10, (1, 8, 8), 16)
    for name in ("scale", "alpha", "sample_size"):
        with pytest.raises(AttributeError):
            setattr(composed, name, 1)
    x = X[TEST][:10]
    answers = composed.predict(x)
    assert answers.shape == (10, 10)
    assert set(answers.sum(axis=1)) <= {0.0, 1.0}
    assert np.all(composed.predict(x, is_abstain=False, training_mode=False).sum(axis=1) == 1.0)
    labels, radii = composed.certify(x, n=500)
    assert labels.shape == radii.shape == (10,)
    assert np.all(radii[labels == -1] == 0.0)


def test_gradients_are_those_of_the_soft_composition(composed):
    x, y = X[TEST][:3], Y[TEST][:3]

    def score(z: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return composed.model.eval()(torch.from_numpy(z)).double().numpy()

    probe = np.zeros_like(x)
    probe[:, 0, 3, 4] = 2e-3
    slope = (score(x + probe) - score(x - probe)) / 4e-3
    gradient = composed.class_gradient(x)
    assert np.allclose(gradient[:, :, 0, 3, 4], slope, atol=2e-2, rtol=5e-2)
    losses = composed.compute_loss(x, y)
    assert np.allclose(losses, -score(x)[np.arange(3), y], atol=1e-4)
    assert np.allclose(composed.loss_gradient(x, y), -composed.class_gradient(x, y)[:, 0] / 3, atol=1e-5)
    tensor = composed.loss_gradient(torch.from_numpy(x), torch.from_numpy(y))
    assert isinstance(tensor, torch.Tensor)
    assert np.allclose(tensor.numpy(), composed.loss_gradient(x, y), atol=1e-6)


def test_the_view_is_soft_deterministic_and_never_abstains(composed):
    x = X[TEST][:20]
    view = composed.attack_view(samples=32, seed=3)
    scores = view.predict(x)
    assert type(view) is PyTorchClassifier
    assert np.array_equal(scores, view.predict(x))
    assert np.allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-4)
    answers = composed.predictions(x, n=2_000, seed=0)
    assert np.mean(scores.argmax(axis=1)[~answers.abstained] == answers.prediction[~answers.abstained]) >= 0.9


def test_modes_return_as_they_were(core):
    estimator = other()
    estimator.model.base.train()
    composed = PyTorchACES(core=as_core(core.model.train()), smoothed=estimator, selector=ScoreSelector(0.2))
    own = flat(2).train()
    parts = [estimator.model.base, core.model, own]
    learned = PyTorchACES(core=composed.core, smoothed=estimator, selector=ScoreSelector(0.2, network=own))
    for each in (composed, learned):
        each.certificates(X[:2], n=100, seed=0)
        each.predict(X[:2])
        each.loss_gradient(X[:2], Y[:2])
        each.class_gradient(X[:2], 3)
        each.histogram(X[:2], n=100)
        assert all(part.training for part in parts)


@pytest.mark.parametrize(
    "make",
    [
        lambda e: FastGradientMethod(e, norm=2, eps=2.5),
        lambda e: ProjectedGradientDescent(e, norm=2, eps=2.5, eps_step=0.5, max_iter=10, verbose=False),
        lambda e: AutoProjectedGradientDescent(
            e.attack_view(),
            norm=2,
            eps=2.5,
            eps_step=1.0,
            max_iter=10,
            nb_random_init=1,
            loss_type="cross_entropy",
            verbose=False,
        ),
        lambda e: SquareAttack(e.attack_view(), norm=np.inf, eps=0.5, max_iter=100, verbose=False),
    ],
    ids=["fgm", "pgd", "autopgd", "square"],
)
def test_attacks_of_art_change_the_answers(composed, make):
    right = composed.predict(X[TEST], seed=0).argmax(axis=1) == Y[TEST]
    x, y = X[TEST][right][:8], Y[TEST][right][:8]
    np.random.seed(0)   # noqa: NPY002 - ART's attacks draw from NumPy's global generator
    adversarial = make(composed).generate(x, np.eye(10, dtype=np.float32)[y])
    found = composed.predictions(adversarial, n=1_000, seed=1)
    assert np.mean((found.prediction == y) & ~found.abstained) <= 0.5


# ---------------------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize(
    ("name", "x", "boundary"),
    [("to-core", (0.6, 0.9), 0.6), ("through-smoothed", (0.9, 0.6), 0.6), ("off-selector", (0.6, 0.9), 0.6),
     ("composition", (0.9, 0.6), 0.6)],
)   # fmt: skip
def test_attacks_succeed_just_beyond_the_exact_radius_and_never_within(name, x, boundary):
    """Certified where both coordinates are positive; the core says 0, wrongly."""
    composed = planes(((1, 0), 0), ((0, 1), 0), core=0)
    points = np.tile(np.asarray([x], np.float32), (6, 1))
    certificates = composed.certificates(points, n=20_000, seed=0)
    assert np.all(certificates.radius > boundary - 0.05)
    budgets = [0.9 * certificates.radius.min(), 1.15 * boundary]
    outcomes = run_attack(
        COMPOSITION_ATTACKS[name], composed, points, np.ones(6, np.int64), budgets=budgets,
        certificates=certificates, steps=20, n=2_000, seed=4,
    )   # fmt: skip
    wrong = ~outcomes.abstained & (outcomes.prediction != 1)
    assert not wrong[0].any()
    assert wrong[1].all()
    assert not audit(certificates, outcomes, np.ones(6, np.int64)).contradictions


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "defended-core-and-adre"])
def test_no_attack_contradicts_a_certificate(composed, defended, smoothed, mixed):
    """Every objective, inside certified balls and far outside of them, where it has to succeed."""
    if mixed:
        settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", "clip_values": (0, 1), "bank_samples": 16}
        network = copy.deepcopy(smoothed.model.base)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        adre = PyTorchADRE(network, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer, draws=4, **settings)
        adre.fit(X[TRAIN], Y[TRAIN], nb_epochs=3, batch_size=64)
        composed = PyTorchACES(core=defended, smoothed=adre, selector=ScoreSelector(0.2))
    x, y = X[TEST][:60], Y[TEST][:60]
    found = composed.compositions(x, n=5_000, seed=2)
    certificates = found.certificates
    assert np.sum(certificates.radius > 0.0) > 15
    budgets = [0.1, 0.25, 0.5, 1.5]
    attacks = [*COMPOSITION_ATTACKS.values(), ATTACKS["pgd"]]
    outcomes = [
        run_attack(attack, composed, x, y, budgets=budgets, certificates=certificates, steps=10, n=300, seed=5)
        for attack in attacks
    ]
    report = audit(certificates, outcomes, y)
    assert not report.contradictions
    assert len(report.suspected) <= allowed(len(x) * len(outcomes) * len(budgets), 0.002)
    assert report.wrong[-1] > 0.5
    for outcome in outcomes:
        wrong = ~outcome.abstained & (outcome.prediction != y)
        if outcome.name != "off-selector":   # which leaves it to the core, that may be right
            assert wrong[-1].mean() > 0.3, outcome.name
    # and each objective does what it is for: off the selector, or kept on it
    far = composed.answers(x, n=300, seed=6)
    base = np.mean((far.selectors[0].prediction == CERTIFY) & ~far.selectors[0].abstained)
    pushed = [
        np.mean(composed.answers(moved(composed, name, x, y), n=300, seed=7).selectors[0].prediction == CERTIFY)
        for name in ("off-selector", "through-smoothed")
    ]
    assert pushed[0] < 0.5 * base
    assert pushed[1] > pushed[0]


def moved(composed: PyTorchACES, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return COMPOSITION_ATTACKS[name].make(composed, 1.5, 10, 0)(x, y)


# ---------------------------------------------------------------------------------------------- learned selectors


def test_cross_fitting_is_seeded_and_leaves_the_global_generator_alone(smoothed):
    before = torch.get_rng_state()
    few = {"radius": 0.1, "folds": 2, "nb_epochs": 2, "n": 200}
    first, again, other = (cross_fitted(smoothed, X[:120], Y[:120], seed=seed, **few) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_selectors_learn_what_is_certifiable(core, smoothed):
    labels = cross_fitted(smoothed, X[TRAIN], Y[TRAIN], radius=0.25, folds=2, nb_epochs=8, n=300, seed=0)
    assert 0.3 < labels.mean() < 0.95
    selector = fit_selector(smoothed, X[TRAIN], labels, theta=0.5, nb_epochs=20, seed=1)
    composed = PyTorchACES(core=core, smoothed=smoothed, selector=selector)
    truth = certifiable(smoothed, X[TEST], Y[TEST], radius=0.25, n=300, seed=3)
    plain = PyTorchACES(core=core, smoothed=smoothed, selector=ScoreSelector(0.2))
    areas = []   # under the curve of votes to certify, against what is certifiable; 1/2 for a coin
    for each in (composed, plain):
        histogram, _ = each.histogram(X[TEST], edges=(0.2, 0.5), n=200, seed=4)
        votes = histogram.at(each.selector.theta)[1][:, CERTIFY]
        areas.append(np.mean(np.sign(votes[truth][:, None] - votes[~truth])) / 2 + 0.5)
    assert areas[0] > 0.65
    assert areas[1] > 0.95   # pinned: the entropy costs nothing, and knows more
    found = composed.certificates(X[TEST][:20], n=1_000, seed=0)
    assert (found.radius > 0).any()
    twin = copy.deepcopy(selector)
    again = PyTorchACES(core=core, smoothed=smoothed, selector=twin).certificates(X[TEST][:20], n=1_000, seed=0)
    assert np.array_equal(found.radius, again.radius)


def test_fitting_a_selector_is_reproducible_and_leaves_the_smoothed_network_alone(smoothed):
    before = [p.detach().clone() for p in smoothed.model.parameters()]
    labels = np.arange(200) % 3 == 0
    weights = [
        next(fit_selector(smoothed, X[:200], labels, nb_epochs=1, seed=5).network.parameters()).detach().clone()
        for _ in range(2)
    ]
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], before[0])
    assert all(map(torch.equal, before, smoothed.model.parameters()))
    own = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    found = fit_selector(
        smoothed, X[:200], labels, network=own, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), nb_epochs=1
    )
    assert found.network.network is own
    assert found.sigma == smoothed.scale


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(50, bool), "labels must be of both kinds, got 0 to certify of 50"),
        (np.zeros(50, int), "labels must be a bool for each input, got dtype int"),
        (np.zeros(49, bool), "labels must be a bool for each input"),
    ],
)
def test_bad_labels_of_selectors(smoothed, labels, words):
    with pytest.raises(ValueError, match=words):
        fit_selector(smoothed, X[:50], labels)
    with pytest.raises(ValueError, match="folds must be at least 2"):
        cross_fitted(smoothed, X[:50], Y[:50], radius=0.1, folds=1)


# ---------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_composition_on_a_gpu():
    composed = PyTorchACES(
        core=as_core(digits_network(1), clip_values=(0, 1), device_type="gpu"),
        smoothed=smooth(digits_network(), clip_values=(0, 1), device_type="gpu"),
        selector=ScoreSelector(0.7),
    )
    x = X[TEST][:10]
    whole = composed.certificates(x, n=2_000, seed=1)
    assert np.array_equal(composed.certificates(x, n=2_000, seed=1, batch_size=3).radius, whole.radius)
    assert composed.loss_gradient(x, Y[TEST][:10]).shape == x.shape
    assert composed.histogram(x, n=500, seed=1)[0].score_estimation.sum() == 5_000

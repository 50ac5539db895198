"""PyTorchInstaRS: what it certifies is what it answers, and the published claim, which is not, is caught by attacks."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_forms import Function, Linear, Strips, allowed
from scipy.optimize import brentq
from scipy.special import ndtri
from support import TEST, TRAIN, X, Y, digits_network
from torch import nn

from art_rs_plugins import (
    BinnedSigma,
    Cascade,
    Conditional,
    ElasticSigma,
    Envelope,
    Gaussian,
    GridGaussian,
    MultiStartSearch,
    OneSided,
    Performance,
    PyTorchInstaRS,
    PyTorchSmoothedClassifier,
    Selector,
    SigmaTable,
    certified_accuracy,
    certify,
)
from art_rs_plugins.benchmark import suite as suites
from art_rs_plugins.benchmark.attacks import ATTACKS, run_attack
from art_rs_plugins.benchmark.config import RunConfig
from art_rs_plugins.benchmark.methods import open_estimator
from art_rs_plugins.benchmark.tables import leaderboard
from art_rs_plugins.estimators.tables import BoundTable
from art_rs_plugins.smoothing.modules import SmoothedModule
from art_rs_plugins.smoothing.sampling import Sampler, check_count
from art_rs_plugins.smoothing.scales import level_targets
from art_rs_plugins.smoothing.sigma import TopTwoRadius
from art_rs_plugins.smoothing.sigma_table import ThreePoint
from art_rs_plugins.theory.audit import audit
from art_rs_plugins.theory.elastic import Projection, SigmaFunction
from art_rs_plugins.theory.scales import SequentialScales

GRID = (0.25, 2.25)


def published(grid: tuple[float, float], draws: int) -> Conditional:
    """The better of two sigmas, for whichever class leads there."""
    return Conditional(MultiStartSearch(starts=grid, draws=draws, evaluations=1, bounds=grid, objective=TopTwoRadius()))


class Soft(nn.Module):
    """Class 0 where a margin of the input is positive, with logits of this slope; gradients for attacks."""

    def __init__(self, margin, slope: float = 30.0) -> None:
        super().__init__()
        self.margin = margin
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        score = self.slope * self.margin(z)
        return torch.stack([score, -score], dim=1)


def island(z: torch.Tensor) -> torch.Tensor:
    return 1.0 - z[:, 0].abs()


def first(z: torch.Tensor) -> torch.Tensor:
    return z[:, 0]


def insta(network: nn.Module, certificate, shape: tuple[int, ...] = (1,), classes: int = 2, **settings):
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", **settings}
    return PyTorchInstaRS(network, nn.CrossEntropyLoss(), shape, classes, certificate=certificate, **settings)


def line(*points: float) -> np.ndarray:
    return np.array(points, dtype=np.float32)[:, None]


ISLAND = Strips([-1.0, 1.0], [1, 0, 1], [1.0])   # class 0 on [-1, 1]


# --- the counterexample: a sigma chosen for each input ----------------------------------------------------------------


def test_the_published_claim_is_false_of_what_answers_and_says_so() -> None:
    """At 0 sigma = 0.25 wins and claims a radius of 0.958; from 0.0873 on sigma = 2.25 does, with the other class."""
    classifier = insta(ISLAND, published(GRID, 50_000), performance=Performance(block=10_000))
    x = line(0.0, 0.02, 0.2, 0.3)
    found = classifier.certificates(x, n=100_000, seed=1)
    assert found.kind == "conditional"
    assert found.sigma.tolist() == [0.25, 0.25, 2.25, 2.25]
    assert 0.85 < found.radius[0] < 0.958204
    answers = classifier.predictions(x, n=1000, seed=2)
    assert answers.prediction.tolist() == [0, 0, 1, 1]
    assert not answers.abstained.any()
    with pytest.raises(ValueError, match="conditional"):
        certified_accuracy(found, np.zeros(4, int), [0.5])


def test_the_envelope_on_the_island_is_as_wide_as_the_truth() -> None:
    classifier = insta(ISLAND, Envelope(GRID), performance=Performance(block=10_000))
    at = np.array([0.0, 0.05, 0.1, 0.15])
    found = classifier.certificates(line(*at), n=1_000_000, n0=50_000, seed=3)
    p = np.array([[ISLAND.probabilities(t, sigma) for t in at] for sigma in GRID])
    score = (np.array(GRID)[:, None, None] * ndtri(p)).max(axis=0)
    exact = 0.5 * np.abs(score[:, 0] - score[:, 1])
    assert exact[[0, 2]] == pytest.approx([0.025129, 0.006032], abs=1e-6)
    assert (found.radius <= exact).all()
    assert found.prediction[[0, 3]].tolist() == [0, 1]
    assert (found.radius > 0.2 * exact)[[0, 3]].all()
    assert found.passes.tolist() == [2 * 1_050_000] * 4
    answers = classifier.predictions(line(0.0, 0.05, 0.12, 0.2), n=200_000, seed=4)
    assert answers.prediction.tolist() == [0, 0, 1, 1]


# --- votes ------------------------------------------------------------------------------------------------------------


def test_the_votes_of_a_level_are_those_of_a_certificate_there() -> None:
    network, x = digits_network(), X[TEST][:12]
    fixed = {
        sigma: certify(network.eval(), torch.from_numpy(x), Gaussian(sigma), num_classes=10, n=400, n0=100, seed=5)
        for sigma in (0.25, 0.5)
    }
    for sigma, one in fixed.items():
        alone = insta(network, Cascade((sigma,)), (1, 8, 8), 10).certificates(x, n=400, seed=5)
        for name in ("prediction", "abstained", "count", "runner_up_count", "n", "n0", "sigma", "passes", "seed"):
            assert np.array_equal(getattr(alone, name), getattr(one, name)), name
        assert alone.radius == pytest.approx(one.radius, rel=1e-9)
    both = insta(network, Envelope((0.25, 0.5)), (1, 8, 8), 10).certificates(x, n=400, seed=5)
    assert set(both.sigma) <= {0.25, 0.5}
    for row in range(12):
        level = fixed[both.sigma[row]]
        if both.prediction[row] == level.prediction[row]:
            assert both.count[row] == level.count[row]
    assert (both.passes == 1000).all()


def test_bits_depend_on_neither_batches_nor_order_and_alpha_is_the_estimators() -> None:
    for certificate in (Envelope((0.1, 0.5), alpha=0.3), Cascade((0.5, 0.1), alpha=0.3), published(GRID, 200)):
        classifier = insta(Strips([-1.0, 1.0, 1.4], [1, 0, 1, 0], [1.0]), certificate, alpha=0.01)
        x, keys = line(*np.linspace(-2, 2, 9)), np.arange(9) + 20
        whole = classifier.certificates(x, n=300, seed=6, indices=keys, batch_size=4)
        order = np.random.default_rng(0).permutation(9)
        again = classifier.certificates(x[order], n=300, seed=6, indices=keys[order])
        for name in ("prediction", "radius", "count", "sigma", "passes", "p_upper"):
            assert getattr(whole, name)[order].tobytes() == getattr(again, name).tobytes()
        assert (whole.alpha == 0.01).all()
        assert whole.radius.max() > 0.0
        assert not np.array_equal(whole.count, classifier.certificates(x, n=300, seed=7, indices=keys).count)


def test_passes_follow_the_draws() -> None:
    network = Strips([0.0], [1, 0], [1.0])
    x = line(3.0, 0.0)   # sure at every level; a toss-up, which goes down to the last one
    cascade = insta(network, Cascade((1.0, 0.5, 0.25), 0.8)).certificates(x, n=500, n0=100, seed=8)
    assert cascade.passes.tolist() == [600, 1800]
    assert (cascade.n == 500).all()
    chosen = insta(network, Selector((0.25, 0.5), 1.0))
    chosen.selector = Strips([0.0], [1, 0], [1.0])
    assert chosen.certificates(x, n=500, n0=100, seed=8).passes.tolist() == [1200, 1200]
    searched = insta(network, Conditional(MultiStartSearch(draws=20, evaluations=4)))
    assert searched.certificates(x, n=500, n0=100, seed=8).passes.tolist() == [600 + 20 * (1 + 5 * 4)] * 2
    binned = insta(network, BinnedSigma(Projection([1.0]), [0.0], [0.5, 0.2]))
    assert binned.certificates(x, n=500, n0=100, seed=8).passes.tolist() == [600, 600]


def test_what_names_the_class_shares_no_draw_with_what_decides() -> None:
    seen: list[torch.Tensor] = []
    classifier = insta(Function(lambda z: seen.append(z.clone()) or Linear([1.0])(z)), Envelope((0.25, 0.5)))
    for ask, draws in (
        (lambda: classifier.predictions(line(1.0), n=400, seed=1), 2 * (400 + 100)),
        (lambda: classifier.certificates(line(1.0), n=400, n0=100, seed=1), 2 * (400 + 100)),
    ):
        seen.clear()
        ask()
        small = torch.cat([z for z in seen if len(z) > 8]).unique().numel()   # passes, not probes
        assert small == pytest.approx(draws, abs=2)   # but for values that meet by rounding


@dataclass(frozen=True)
class Pinned:
    """A search by other draws than the certificate's own seed would give, whose result is given."""

    sigma: float
    seed: int
    seen: list
    cost: int = 10

    def choose(self, f, x, *, num_classes, sigma, seed=None, indices=None, block=None) -> np.ndarray:
        search = MultiStartSearch(draws=50)
        self.seen.append(
            search.choose(f, x, num_classes=num_classes, sigma=sigma, seed=self.seed, indices=indices, block=block)
        )
        return np.full(len(x), self.sigma)


def test_the_search_leaves_no_trace_but_sigma() -> None:
    network, x, seen = digits_network(), X[TEST][:8], []
    runs = [
        insta(network, Conditional(Pinned(0.3, seed, seen)), (1, 8, 8), 10).certificates(x, n=300, seed=9)
        for seed in (9, 10)
    ]
    assert not np.array_equal(*seen)
    plain = certify(network.eval(), torch.from_numpy(x), Gaussian(0.3), num_classes=10, n=300, seed=9)
    for found in runs:
        assert np.array_equal(found.count, plain.count)
        assert np.array_equal(found.radius, plain.radius)
        assert found.kind == "conditional"
        assert (found.passes == plain.passes + 10).all()


# --- guarantees, end to end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "certificate", [Envelope((0.25, 0.5)), Cascade((0.5, 0.25), (0.6, 0.5)), Selector((0.25, 0.5), 0.6)]
)
def test_certificates_and_answers_keep_alpha(certificate) -> None:
    """A linear classifier, whose distance is known; so is that of its selector."""
    alpha, trials, distance, chosen = 0.05, 2000, 0.2, 0.15
    point = np.array([[distance, chosen]], dtype=np.float32)
    x = np.repeat(point, trials, axis=0)
    classifier = insta(Linear([1.0, 0.0]), certificate, (2,), alpha=alpha)
    if isinstance(certificate, Selector):
        classifier.selector = Linear([0.0, 1.0])
    found = classifier.certificates(x, n=100, n0=25, seed=11)
    least = min(distance, chosen) if isinstance(certificate, Selector) else distance
    assert (found.radius[found.prediction == 0] > least).sum() <= allowed(trials, alpha)
    assert ((found.prediction == 1) & ~found.abstained).sum() <= allowed(trials, alpha)
    assert (found.radius > 0).mean() > 0.5
    careless = classifier.certificates(x, n=100, n0=25, seed=11, rule=replace(classifier.certificate, alpha=0.6))
    assert (careless.radius[careless.prediction == 0] > least).sum() > allowed(trials, alpha)   # control

    radii = [0.05, least, 1.5 * least]   # the second is false by nothing, and may be claimed with probability alpha
    named = classifier.certificates(x[:800], radii=radii, n=1_000, n0=400, seed=14)
    assert set(named.radius.tolist()) <= {0.0, *radii}
    assert ((named.radius >= least) & (named.prediction == 0)).sum() <= allowed(800, alpha)
    # a cascade whose first level is about as sure as its threshold certifies little
    assert (named.radius[named.prediction == 0] >= 0.05).mean() > (0.15 if isinstance(certificate, Cascade) else 0.9)
    assert named.passes.max() <= len(classifier.certificate.levels) * 1_400
    assert (named.passes >= named.n + named.n0).all()

    edge = np.zeros_like(x)   # belongs to neither class
    answers = classifier.predictions(edge, n=100, seed=12)
    assert (~answers.abstained).sum() <= allowed(trials, alpha)
    answers = classifier.predictions(x, n=100, seed=13)
    assert ((answers.prediction == 1) & ~answers.abstained).sum() <= allowed(trials, alpha)
    assert (~answers.abstained).mean() > 0.5
    assert (answers.votes.sum(axis=1) == 100).all()
    assert (answers.n, answers.alpha, answers.seed) == (100, alpha, 13)


def violations(found, at: np.ndarray, labels: np.ndarray, grid: np.ndarray) -> int:
    """Certified points of a line with another exact label on the grid closer than their radius."""
    claims = zip(at[~found.abstained], found.prediction[~found.abstained], found.radius[~found.abstained], strict=True)
    return sum(bool((labels[np.abs(grid - t) < radius - 1e-9] != label).any()) for t, label, radius in claims)


def test_a_selector_that_chooses_at_random_costs_radius_and_no_truth() -> None:
    f = Strips([-1.5, -0.4, 0.6, 1.3], [0, 1, 2, 0, 1], [1.0])
    e = Strips([-1.1, -0.2, 0.9], [1, 0, 1, 0], [1.0])
    sigmas, sigma_e = (0.1, 0.6), 0.3
    classifier = insta(f, Selector(sigmas, sigma_e), classes=3)
    classifier.selector = e
    grid = np.linspace(-2.5, 2.5, 2501)
    chosen = [e.smoothed(t, sigma_e) for t in grid]
    labels = np.array([f.smoothed(t, sigmas[i]) for t, i in zip(grid, chosen, strict=True)])
    at = np.linspace(-2, 2, 81, dtype=np.float32).astype(np.float64)
    found = classifier.certificates(line(*at), n=3000, seed=14)
    assert violations(found, at, labels, grid) == 0
    assert (~found.abstained).mean() > 0.5
    alone = np.array([f.smoothed(t, sigma) for t, sigma in zip(at, found.sigma, strict=True)])
    radius = frozen_radius(f, at, found.sigma, alone)   # the selector forgotten
    assert violations(replace(found, radius=radius, abstained=radius <= 0, prediction=alone), at, labels, grid) > 3

    border = float(brentq(lambda t: e.probabilities(t, sigma_e)[0] - 0.5, -1.4, -0.8))
    undecided = classifier.certificates(np.repeat(line(border), 200, axis=0), n=3000, seed=15)
    assert undecided.abstained.all()   # whatever the classes are: f is certain there


def frozen_radius(f: Strips, at: np.ndarray, sigma: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Radius of one sigma, from exact probabilities."""
    p = np.array([f.probabilities(t, s)[c] for t, s, c in zip(at, sigma, label, strict=True)])
    return np.clip(sigma * ndtri(p), 0.0, 10.0)


@pytest.mark.parametrize(
    "certificate",
    [
        BinnedSigma(Projection([1.0]), [-0.45, 0.5], [1.8, 0.5, 1.7]),
        ElasticSigma(Projection([1.0]), base=0.5, rate=2.0, centre=0.0),
    ],
    ids=["binned", "elastic"],
)
def test_a_sigma_that_is_a_function_of_the_input_is_certified_and_answered(certificate: SigmaFunction) -> None:
    f, classifier = ISLAND, insta(ISLAND, certificate, alpha=1e-6)
    grid = np.linspace(-2.5, 2.5, 2501)
    labels = np.array([f.smoothed(t, s) for t, s in zip(grid, certificate(grid[:, None]), strict=True)])
    at = np.linspace(-2, 2, 81, dtype=np.float32).astype(np.float64)
    found = classifier.certificates(line(*at), n=3000, seed=16)
    assert found.kind == "certified"
    assert found.sigma == pytest.approx(certificate(line(*at)))
    assert violations(found, at, labels, grid) == 0
    assert (~found.abstained).mean() > 0.5
    frozen = frozen_radius(f, at, found.sigma, found.prediction)
    assert (found.radius <= frozen).all()
    assert violations(replace(found, radius=frozen, abstained=frozen <= 0), at, labels, grid) > 3   # sigma forgotten
    answers = classifier.predictions(line(*at), n=3000, seed=17)
    sure = ~answers.abstained
    assert np.array_equal(answers.prediction[sure], labels[np.searchsorted(grid, at - 1e-9)][sure])
    assert sure.mean() > 0.7
    radii = [0.0, 0.02, 0.05, 0.1]
    named = classifier.certificates(line(*at), radii=radii, n=5000, seed=16)
    assert violations(named, at, labels, grid) == 0
    assert set(named.radius.tolist()) == set(radii)   # the named ones, to the last bit
    assert (named.abstained | (named.p_lower > 0.5)).all()
    # what p_A would say under one sigma, in place of what sigma(x) asks for, is false
    forgotten = np.minimum(frozen_radius(f, at, named.sigma, named.prediction), 0.1)
    assert violations(replace(named, radius=forgotten, abstained=forgotten <= 0), at, labels, grid) > 0
    # as far as the whole radius goes, in fewer draws
    reaches = (found.radius[:, None] >= np.array(radii) + 0.01) & ~found.abstained[:, None]
    assert (named.radius >= np.where(reaches, radii, 0.0).max(axis=1)).mean() > 0.95
    assert named.n.mean() < 0.75 * 5000


# --- attacks ----------------------------------------------------------------------------------------------------------


def chooser(classifier: PyTorchInstaRS) -> PyTorchInstaRS:
    if isinstance(classifier.certificate, Selector):
        classifier.selector = Soft(lambda z: 0.1 - z[:, 1], 5.0)
    return classifier


SOFT = [
    (Envelope((0.1, 0.5), weights=(0.9, 1.0), offsets=(0.02, 0.0)), first, (0.3, 0.4)),
    (Cascade((0.5, 0.1), (0.9, 0.5)), first, (0.3, 0.4)),
    (Selector((0.1, 0.5), 0.5), first, (0.3, 0.4)),
    (BinnedSigma(Projection([0.0, 1.0]), [0.2], [0.1, 0.5]), first, (0.3, 0.6)),
]


@pytest.mark.parametrize("certificate, margin, point", SOFT, ids=["envelope", "cascade", "selector", "binned"])
@pytest.mark.parametrize("attack", ["pgd", "autopgd"])
def test_a_planted_certificate_falls_to_attacks_on_the_soft_form(certificate, margin, point, attack: str) -> None:
    classifier = chooser(insta(Soft(margin, 5.0), certificate, (2,), sample_size=200, bank_samples=128))
    x, y = np.repeat(np.array([point], dtype=np.float32), 4, axis=0), np.zeros(4, int)
    honest = classifier.certificates(x, n=5000, seed=18)
    assert (honest.prediction == 0).all()
    assert (honest.radius > 0.05).all()
    assert (honest.radius < 0.3).all()   # the distance to the other class, at any sigma
    planted = replace(honest, radius=np.full(4, 0.8))
    budgets = [float(0.9 * honest.radius.min()), 0.7]
    outcomes = run_attack(ATTACKS[attack], classifier, x, y, budgets=budgets, certificates=planted, n=2000, seed=19)
    assert not audit(honest, outcomes, y).suspected
    cases = audit(planted, outcomes, y).contradictions
    assert len({case.index for case in cases}) >= 3
    assert all(case.distance > 0.25 for case in cases)


def test_the_published_claim_falls_to_attacks_on_its_own_soft_form() -> None:
    grid = (0.5, 1.8)   # a claim of 0.84 at 0, and the other class from 0.6 on
    classifier = insta(Soft(island, 3.0), published(grid, 300), sample_size=200, scale=0.5, bank_samples=256)
    x, y = line(0.03, 0.05, -0.04), np.zeros(3, int)
    found = classifier.certificates(x, n=20_000, seed=20)
    assert found.sigma.tolist() == [0.5] * 3
    assert (found.radius > 0.75).all()
    claimed = replace(found, kind="certified")   # as published
    settings = {"steps": 5, "n": 2000, "seed": 21}
    outcomes = run_attack(ATTACKS["pgd"], classifier, x, y, budgets=[0.73], certificates=claimed, **settings)
    assert len(audit(claimed, outcomes, y).contradictions) == 3

    sound = insta(Soft(island, 3.0), Envelope(grid), sample_size=200, scale=0.5, bank_samples=256)
    proved = sound.certificates(x, n=20_000, seed=20)
    assert (proved.radius > 0.15).all()
    budgets = [float(proved.radius.min()), 0.73]
    outcomes = run_attack(ATTACKS["pgd"], sound, x, y, budgets=budgets, certificates=proved, **settings)
    assert outcomes.prediction[1].tolist() == [1, 1, 1]   # the attack is as strong, the claim is true
    assert not audit(proved, outcomes, y).suspected


def test_soft_scores_are_the_formula_of_the_rule() -> None:
    network, x = digits_network(), torch.from_numpy(X[TEST][:6])

    def mean(sigma: float, f: nn.Module = network) -> np.ndarray:
        return SmoothedModule(f, sigma, samples=16, seed=3).eval()(x).double().exp().detach().numpy()

    def scores(certificate, selector: nn.Module | None = None) -> np.ndarray:
        classifier = insta(network, certificate, (1, 8, 8), 10)
        classifier.selector = selector
        view = classifier.attack_view(samples=16, seed=3)
        found = view.predict(x.numpy())
        assert np.exp(found.astype(float)).sum(axis=1) == pytest.approx(np.ones(6), rel=1e-4)
        classifier.set_params(bank_samples=16, seed=3)
        with torch.no_grad():
            assert classifier.model.eval()(x).numpy() == pytest.approx(found, rel=1e-5)
        return found.astype(float)

    envelope = np.maximum(0.8 * 0.25 * ndtri(mean(0.25)) - 0.1, 0.5 * ndtri(mean(0.5))) / 0.25
    expected = envelope - np.log(np.exp(envelope).sum(axis=1, keepdims=True))
    assert scores(Envelope((0.25, 0.5), (0.8, 1.0), (0.1, 0.0))) == pytest.approx(expected, rel=1e-4)
    assert scores(Cascade((0.5,))) == pytest.approx(np.log(mean(0.5)), rel=1e-4)

    top = mean(0.5).max(axis=1)
    gate = 1.0 / (1.0 + (0.6 / 0.4 * (1.0 - top) / top) ** 4)
    expected = gate[:, None] * mean(0.5) + (1.0 - gate[:, None]) * mean(0.25)
    assert scores(Cascade((0.5, 0.25), (0.6, 0.5))) == pytest.approx(np.log(expected), rel=1e-4)

    selector = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    share = mean(0.7, selector) ** 4
    share /= share.sum(axis=1, keepdims=True)
    expected = share[:, :1] * mean(0.25) + share[:, 1:] * mean(0.5)
    assert scores(Selector((0.25, 0.5), 0.7), selector) == pytest.approx(np.log(expected), rel=1e-4)

    by_input = BinnedSigma(Projection(np.ones((1, 8, 8))), [2.4], [0.3, 0.6])
    sigma = by_input(x.numpy())
    assert len(set(sigma)) == 2
    expected = np.where(sigma[:, None] == 0.3, mean(0.3), mean(0.6))
    assert scores(by_input) == pytest.approx(np.log(expected), rel=1e-4)


def test_gradients_of_an_envelope_do_not_fade_where_it_is_certain() -> None:
    """Half-way up a slope whose soft probabilities are 1 in float32, at all levels."""
    classifier = insta(Soft(first, slope=10.0), Envelope((0.05, 0.1)), bank_samples=64)
    x = line(3.0)
    assert classifier.attack_view().predict(x)[0, 0] > -1e-6
    gradient = classifier.class_gradient(x, label=1)[0, 0]
    loss = classifier.loss_gradient(x, np.zeros(1, int))[0]
    assert gradient < -1.0
    assert loss < 0.0
    before = classifier.attack_view().predict(x)[0, 1]
    assert (classifier.attack_view().predict(x - 0.01)[0, 1] - before) / -0.01 == pytest.approx(gradient[0], rel=0.05)


# --- training ---------------------------------------------------------------------------------------------------------


def trainable(certificate=None, seed: int = 0, **settings) -> PyTorchInstaRS:
    network = digits_network(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    certificate = Envelope((0.25, 0.5)) if certificate is None else certificate
    return insta(network, certificate, (1, 8, 8), 10, optimizer=optimizer, **settings)


def test_training_with_a_sigma_for_each_example_goes_by_the_index() -> None:
    rng, x = np.random.default_rng(0), X[TRAIN][:640]
    wrong = rng.permutation(640)[:40]
    y = Y[TRAIN][:640].copy()
    y[wrong] = (y[wrong] + 5) % 10
    classifier = trainable(table=partial(SigmaTable, start=6, rate=0.5))
    assert classifier.table_ is None
    classifier.fit(x, y, nb_epochs=12, batch_size=64)
    sigma = classifier.table_.sigma
    assert sigma.shape == (640,)
    assert ((sigma >= 0.125) & (sigma <= 0.5)).all()
    right = np.delete(sigma, wrong)
    assert np.median(sigma[wrong]) < 0.2 < np.median(right)   # in whatever order the batches came
    assert classifier.history_[-1].noisy_accuracy > 0.7
    before = sigma.copy()
    classifier.fit(x, y, nb_epochs=7)
    assert (classifier.table_.sigma != before).any()   # goes on, from the same table
    assert classifier._training_noise() is classifier.table_

    again = trainable(table=partial(SigmaTable, start=6, rate=0.5))
    again.fit(x, y, nb_epochs=12, batch_size=64)
    assert np.array_equal(again.table_.sigma, before)
    plain = trainable()
    plain.fit(x, y, nb_epochs=1)
    assert plain.table_ is None


def test_a_table_belongs_to_one_data_set_and_is_saved_with_the_checkpoint(tmp_path: Path) -> None:
    x, y = X[TRAIN][:128], Y[TRAIN][:128]
    classifier = trainable(table=partial(SigmaTable, rate=0.5))
    with pytest.raises(ValueError, match="y must be class indices"):
        classifier.fit(x, y + 10)
    assert classifier.table_ is None   # nothing was bound to a call that failed
    classifier.fit(x, y, nb_epochs=1)
    for other in (x[:64], x[::-1], X[TRAIN][128:256]):
        with pytest.raises(ValueError, match="belongs to another data set, of 128 examples"):
            classifier.fit(other, y[: len(other)])
    with pytest.raises(ValueError, match="fit_generator does not say which example"):
        classifier.fit_generator(None)
    classifier.save("net", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"net.model", "net.optimizer", "net.sigmas"}

    again = trainable(table=partial(SigmaTable, rate=0.5))
    again.load("net", str(tmp_path))
    assert np.array_equal(again.table_.sigma, classifier.table_.sigma)
    with pytest.raises(ValueError, match="belongs to another data set"):
        again.fit(X[TRAIN][128:256], y)
    again.fit(x, y, nb_epochs=1)
    before = again.table_
    with pytest.raises(ValueError, match="alpha"):
        again.set_params(table=SigmaTable, alpha=2.0)
    assert again.table_ is before
    trainable(table=partial(SigmaTable, rate=0.5)).save("net", str(tmp_path))   # untrained, over the older files
    assert {path.name for path in tmp_path.iterdir()} == {"net.model", "net.optimizer"}
    again.load("net", str(tmp_path))
    assert again.table_ is None
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert np.array_equal(twin.table_.sigma, classifier.table_.sigma)
        twin.fit(x, y, nb_epochs=1)
        assert not np.array_equal(twin.table_.sigma, classifier.table_.sigma)
    clone = classifier.clone_for_refitting()
    assert clone.table_ is None
    assert clone.table is classifier.table
    with pytest.raises(ValueError, match="state must hold log_sigma and data"):
        BoundTable(SigmaTable).load_state_dict({"log_sigma": torch.zeros(3)}, 0.25)
    with pytest.raises(ValueError, match="belongs to another data set, of 7 examples"):
        trainable(table=lambda size, sigma: SigmaTable(7, sigma)).fit(x, y)
    with pytest.raises(TypeError, match="table must make a SigmaTable"):
        trainable(table=lambda size, sigma: None).fit(x, y)


def test_labels_serve_in_training_alone() -> None:
    classifier = trainable(Conditional())
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        classifier.certificates(X[:1], y=Y[:1])
    for taught in (ThreePoint(), SigmaTable(5, 0.25), SigmaTable, MultiStartSearch):
        with pytest.raises(TypeError, match="labels are for training only"):
            Conditional(taught)


def meadow(z: torch.Tensor) -> torch.Tensor:
    """Class 0 on |v| < 0.5 where u < 0, and on v > 0 where u > 0."""
    return torch.where(z[:, 0] < 0, 0.5 - z[:, 1].abs(), z[:, 1])


def test_a_selector_learns_which_level_suits() -> None:
    rule, rng = Selector((0.2, 0.8), 0.8), np.random.default_rng(1)
    classifier = insta(Soft(meadow), rule, (2,))
    u = rng.uniform(-6, 6, 400)
    x = np.stack([u, np.where(u < 0, 0.0, 2.0)], axis=1).astype(np.float32)
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.zero_()
        network.bias.zero_()
    settings = {"num_classes": 2, "seed": 0}
    far = torch.tensor([[-6.0, 0.0], [6.0, 2.0], [6.0, -2.0]])
    weights = level_targets(classifier.model.f.eval(), far, np.zeros(3, int), rule.sigmas, **settings)
    assert weights.argmax(axis=1).tolist() == [0, 1, 0]
    assert weights[2] == pytest.approx([0.5, 0.5])   # of another class at every level: no preference
    radius = 0.2 * ndtri(0.98758)   # 2.5 standard deviations to either side, of 100 votes and a bound at n = 100,000
    assert weights[0, 0] == pytest.approx(1.0 / (1.0 + np.exp(-10 * radius)), abs=0.04)

    history = classifier.fit_selector(
        x, np.zeros(400, int), network, optimizer=torch.optim.Adam(network.parameters(), lr=0.05), nb_epochs=20
    )
    assert classifier.selector is network
    assert history[-1].noisy_accuracy > 0.9
    found = classifier.certificates(np.array([[-5.0, 0.0], [5.0, 2.0]], np.float32), n=2000, seed=22)
    assert found.sigma.tolist() == [0.2, 0.8]
    assert found.prediction.tolist() == [0, 0]
    small, large = found.radius
    assert 0.35 < small < 0.5
    assert 1.4 < large < 2.0
    worse = insta(Soft(meadow), Cascade((0.2,)), (2,)).certificates(np.array([[5.0, 2.0]], np.float32), n=2000, seed=22)
    assert worse.radius[0] < 0.6


# --- an estimator like its parent -------------------------------------------------------------------------------------


def test_settings_survive_copies_and_changes() -> None:
    rule = Selector((0.25, 0.5), 0.6)
    classifier = trainable(rule, alpha=0.01, table=SigmaTable)
    classifier.selector = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = X[TEST][:4]
    here = classifier.certificates(x, n=200, seed=23)
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert twin.certificate == replace(rule, alpha=0.01)
        assert np.array_equal(twin.certificates(x, n=200, seed=23).count, here.count)
    clone = classifier.clone_for_refitting()
    assert (clone.certificate, clone.table, clone.selector) == (classifier.certificate, SigmaTable, None)

    other = PyTorchInstaRS.from_classifier(
        PyTorchSmoothedClassifier.from_classifier(classifier), certificate=Envelope((0.25, 0.5))
    )
    assert other.model.base is classifier.model.base
    other.set_params(certificate=Cascade((0.5, 0.25)), alpha=0.02)
    assert other.certificate == Cascade((0.5, 0.25), alpha=0.02) == other.get_params()["certificate"]
    assert other.model.certificate == Cascade((0.5, 0.25))
    with pytest.raises(ValueError, match="alpha"):
        other.set_params(certificate=Envelope((0.25, 0.5)), alpha=2.0)
    assert (other.certificate, other.alpha) == (Cascade((0.5, 0.25), alpha=0.02), 0.02)
    assert other.model.certificate == Cascade((0.5, 0.25), alpha=0.02)


def test_the_selector_votes_as_the_network_does_and_changes_are_noticed(tmp_path: Path) -> None:
    classifier = trainable(Selector((0.25, 0.5), 0.6), performance=Performance("bfloat16", block=100))
    classifier.selector = selector = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    x = X[TEST][:6]
    before = classifier.certificates(x, n=200, seed=24)
    assert before.performance == "bfloat16"
    assert classifier._voter(classifier.model.chooser()) is classifier._voter(classifier.model.chooser())
    assert classifier._voter() is classifier._voter()
    with torch.no_grad():
        selector[1].weight.neg_()
        selector[1].bias.neg_()
    after = classifier.certificates(x, n=200, seed=24)
    assert set(before.sigma + after.sigma) == {0.75}
    classifier.save("net", str(tmp_path))
    assert set(torch.load(tmp_path / "net.selector", weights_only=True)) == {"1.weight", "1.bias"}


def test_preprocessing_stands_before_the_selector_too() -> None:
    classifier = insta(Linear([1.0]), Selector((0.2, 0.4), 0.4), preprocessing=(5.0, 1.0))
    classifier.selector = Linear([-1.0])
    found = classifier.certificates(line(6.0, 4.0), n=500, seed=25)   # 1 and -1 to both networks
    assert found.prediction.tolist() == [0, 1]
    assert found.sigma.tolist() == [0.4, 0.2]
    view = classifier.attack_view().predict(line(6.0, 4.0))
    assert view.argmax(axis=1).tolist() == [0, 1]


def test_networks_that_end_in_a_softmax_are_searched_and_viewed() -> None:
    network = nn.Sequential(digits_network(), nn.Softmax(dim=1))
    x = X[TEST][:3]
    bare = insta(digits_network(), Conditional(MultiStartSearch(draws=50)), (1, 8, 8), 10)
    ended = insta(network, Conditional(MultiStartSearch(draws=50)), (1, 8, 8), 10)
    assert np.array_equal(*(c.certificates(x, n=200, seed=26).sigma for c in (bare, ended)))
    assert bare.attack_view().predict(x) == pytest.approx(ended.attack_view().predict(x), rel=1e-4)
    learner = insta(network, Envelope((0.2, 0.4)), (1, 8, 8), 10, table=SigmaTable,
                    optimizer=torch.optim.SGD(network.parameters(), lr=0.1))   # fmt: skip
    with pytest.raises(ValueError, match="table needs logits"):
        learner.fit(x, Y[TEST][:3])


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: insta(ISLAND, Envelope(())), ValueError, "sigmas must be finite and > 0"),
        (lambda: insta(ISLAND, Envelope((0.5, 0.25))), ValueError, "strictly increasing"),
        (lambda: insta(ISLAND, Envelope((0.25, 0.25))), ValueError, "strictly increasing"),
        (lambda: insta(ISLAND, Cascade((0.5, 0.0))), ValueError, "sigmas must be finite and > 0"),
        (lambda: insta(ISLAND, "envelope"), TypeError, "certificate must be an Envelope"),
        (lambda: insta(ISLAND, Envelope), TypeError, "certificate must be an Envelope"),
        (lambda: insta(ISLAND, Gaussian(0.5)), TypeError, "certificate must be an Envelope"),
        (lambda: insta(ISLAND, BinnedSigma), TypeError, "certificate must be an Envelope"),
        (lambda: insta(ISLAND, Envelope((0.25,)), table=5), TypeError, "table must make a SigmaTable"),
        (lambda: insta(ISLAND, Envelope((0.25,)), noise=GridGaussian), ValueError, "noise must be Gaussian"),
        (lambda: PyTorchInstaRS(ISLAND, nn.CrossEntropyLoss(), (1,), 2), TypeError, "certificate"),
    ],
)
def test_bad_settings_are_named(make, error, words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_what_a_certificate_over_levels_cannot_take_is_refused() -> None:
    classifier, x = insta(ISLAND, Envelope(GRID)), line(0.0)
    with pytest.raises(TypeError, match="rule must be the certificate"):
        classifier.certificates(x, rule=SequentialScales(Envelope((0.5, 1.0)), (0.1,)))
    for choice in ({"tolerance": 0.1}, {"rule": OneSided()}, {"rule": Cascade((0.5,))}, {"rule": Envelope((0.5, 1.0))}):
        with pytest.raises(TypeError, match="rule must be the certificate"):
            classifier.certificates(x, **choice)
    for undefined in (classifier.certificates, classifier.predictions):
        with pytest.raises(ValueError, match="shape"):
            undefined(np.zeros((1, 2), np.float32))


def test_too_few_draws_for_a_look_are_refused_before_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "count", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ValueError, match="n_max must be at least the first look"):
        insta(ISLAND, Envelope(GRID)).certificates(line(0.0), radii=[0.1], n=50)


def test_an_untrained_selector_is_named() -> None:
    classifier, x = insta(ISLAND, Selector(GRID, 1.0)), line(0.0)
    for ask in (
        lambda: classifier.certificates(x, n=20),
        lambda: classifier.predict(x),
        lambda: classifier.attack_view().predict(x),
        lambda: classifier.loss_gradient(x, np.zeros(1, int)),
    ):
        with pytest.raises(ValueError, match="the selector is not trained: call fit_selector"):
            ask()
    with pytest.raises(ValueError, match="network must have 2 outputs, one for each sigma"):
        classifier.fit_selector(x, np.zeros(1, int), nn.Linear(1, 3))
    assert classifier.selector is None
    with pytest.raises(TypeError, match=r"selector must be a torch\.nn\.Module"):
        classifier.selector = 3
    classifier.selector = nn.Linear(1, 3)
    with pytest.raises(ValueError, match=r"logits of shape \(m, 2\)"):
        classifier.certificates(x, n=20)
    with pytest.raises(ValueError, match="certificate must be a Selector to train one"):
        insta(ISLAND, Envelope(GRID)).fit_selector(x, np.zeros(1, int), nn.Linear(1, 2))


# --- configurations ---------------------------------------------------------------------------------------------------

TINY = """
[run]
data = "digits"
n = 300
n0 = 50
examples = "::40"
[train]
epochs = 2
[[cell]]
name = "fixed"
train = {}
[[cell]]
name = "envelope"
train = {}
run = { method = "insta-rs", options = { certificate = "envelope", sigmas = [0.15, 0.25], offsets = [0.1, 0.0] } }
[[cell]]
name = "conditional"
train = {}
run = { method = "insta-rs", options = { certificate = "conditional", starts = [0.25], draws = 20, evaluations = 3 } }
"""


def test_a_suite_compares_them_by_all_their_passes(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    done = suites.run(suites.read(str(tmp_path / "tiny.toml")), tmp_path / "out")
    assert not done.failed
    rows = {row["record"]: row for row in leaderboard(done.records)}
    assert [rows[name]["passes"] for name in ("fixed", "envelope", "conditional")] == ["350", "700", "430"]
    assert [rows[name]["kind"] for name in ("envelope", "conditional")] == ["certified", "conditional"]
    config = RunConfig(weights=str(tmp_path / "out" / "envelope.safetensors"), method="insta-rs",
                       options={"certificate": "cascade", "sigmas": [0.5, 0.25], "threshold": [0.6, 0.5]})   # fmt: skip
    data, classifier = open_estimator(config)
    assert classifier.certificate == Cascade((0.5, 0.25), (0.6, 0.5))
    assert check_count(int(classifier.certificates(data.x_test[:1], n=100).n[0]), "n") == 100
    for options, words in (
        ({"certificate": "envelop", "sigmas": [0.5]}, "did you mean 'envelope'"),
        ({"certificate": "cascade"}, "needs the option sigmas"),
        ({"sigmas": [0.5, 0.25]}, "strictly increasing"),
    ):
        with pytest.raises(ValueError, match=words):
            open_estimator(replace(config, options=options))


def test_suites_of_the_package_hold_these_methods() -> None:
    for name in ("insta-rs-digits", "insta-rs-cifar10"):
        found = suites.read(name)
        kinds = {cell.run.options.get("certificate") for cell in found.cells}
        assert kinds == {None, "envelope", "cascade", "conditional", "selector"}

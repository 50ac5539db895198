"""The promise itself, simulated with the real code against classifiers whose truth is known in closed form.

Each simulation counts violations and compares them with the binomial quantile at a false-alarm rate of 1e-6, at a
fixed seed; and each shows that it would have caught a library that breaks its promise slightly.
"""

import numpy as np
import pytest
import torch
from closed_forms import Largest, Linear, Strips, allowed
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from art_rs_plugins.smoothing.certify import certify, predict
from art_rs_plugins.smoothing.noise import Gaussian, Stage
from art_rs_plugins.smoothing.sampling import count_votes
from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.rules import OneSided

ALPHA = 0.05
BLOCK = 250   # rows of a pass are part of what fixes the draws


def violations(certificates: Certificates, truth: np.ndarray, distance: np.ndarray, *, inflate: float = 1.0) -> int:
    """Certificates that claim a class which the smoothed classifier leaves within their radius."""
    wrong_class = certificates.prediction != truth
    return int((~certificates.abstained & (wrong_class | (certificates.radius * inflate > distance))).sum())


def at_distance(w: np.ndarray, distance: float, count: int, *, b: float = 0.0) -> torch.Tensor:
    """Points at a distance from the hyperplane w.x + b = 0, scattered along it."""
    w = np.asarray(w, dtype=np.float64)
    unit = w / np.linalg.norm(w)
    along = np.random.default_rng(17).normal(size=(count, len(w)))
    along -= np.outer(along @ unit, unit)
    return torch.from_numpy((along + (distance - b / np.linalg.norm(w)) * unit).astype(np.float32))


@pytest.mark.parametrize(
    "dimension, inputs, distance",
    [(2, 2000, 0.0), (2, 2000, 0.05), (2, 2000, 0.5), (2, 8000, 1.0), (2, 2000, -0.7),
     pytest.param(64, 2000, 0.5, marks=pytest.mark.slow), pytest.param(3072, 1200, 0.8, marks=pytest.mark.slow)],
)   # fmt: skip
def test_linear_classifiers_keep_the_promise(dimension: int, inputs: int, distance: float) -> None:
    w = np.random.default_rng(dimension).normal(size=dimension)
    f, sigma = Linear(w, b=0.3), Gaussian(0.5)
    x = at_distance(w, distance, inputs, b=0.3)
    signed = f.distance(x)
    assert signed == pytest.approx(np.full(inputs, distance), abs=2e-5)
    truth = (signed < 0).astype(int)

    result, doubled = (
        certify(f, x, sigma, num_classes=2, n=1000, n0=100, rule=OneSided(alpha), seed=20, block=BLOCK)
        for alpha in (ALPHA, 2 * ALPHA)
    )
    false = violations(result, truth, np.abs(signed))
    # the second inequality: the promise is spent, so the first one says something
    assert allowed(inputs, ALPHA) >= false > 0.2 * ALPHA * inputs
    if abs(distance) >= 0.5:
        # the same count catches a doubled failure probability and a radius that is 5 % too long
        assert violations(doubled, truth, np.abs(signed)) > allowed(inputs, ALPHA)
        assert violations(result, truth, np.abs(signed), inflate=1.05) > allowed(inputs, ALPHA)


def test_selecting_and_estimating_with_the_same_draws_is_caught() -> None:
    inputs, f, noise = 4000, Linear([1.0, 1.0]), Gaussian(0.5)
    x = torch.zeros(inputs, 2)   # on the boundary, where any certificate is false
    votes = count_votes(f, x, noise, 1000, num_classes=2, seed=5).numpy()
    reused = OneSided(ALPHA).decide(votes, votes, 1000)
    assert int((~reused.abstained).sum()) > allowed(inputs, ALPHA)
    fresh = count_votes(f, x, noise, 101, num_classes=2, seed=5, stage=Stage.SELECTION, block=BLOCK).numpy()
    honest = OneSided(ALPHA).decide(fresh, votes, 1000)
    assert 0 < int((~honest.abstained).sum()) <= allowed(inputs, ALPHA)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_radius_is_tight_at_a_hundred_thousand_draws(ratio: float) -> None:
    f, sigma, n, inputs = Linear([3.0, 4.0], b=1.0), 0.25, 100_000, 100
    x = at_distance(np.array([3.0, 4.0]), ratio * sigma, inputs, b=1.0)
    result = certify(f, x, Gaussian(sigma), num_classes=2, n=n, seed=8, block=10_000)
    truth = f.distance(x)
    assert not result.abstained.any()
    assert violations(result, np.zeros(inputs), truth) <= allowed(inputs, 0.001)
    assert 0.97 < np.median(result.radius) / (ratio * sigma) <= 1.0
    # and the median count gives the same, so that this is no luck of the seed
    typical = binom.median(n, ndtr(ratio))
    assert np.median(result.count) == pytest.approx(typical, abs=5 * np.sqrt(n * ndtr(ratio) * ndtr(-ratio)))


@pytest.mark.parametrize("classes, inputs", [(3, 1500), pytest.param(10, 1500, marks=pytest.mark.slow)])
def test_many_classes_with_a_known_nearest_boundary(classes: int, inputs: int) -> None:
    # the two largest coordinates are close, the rest far below: p_A is near 1/2 and beyond, the rival holds the rest
    rng = np.random.default_rng(classes)
    base = rng.normal(size=(inputs, classes)) * 0.05 - 4.0
    winner, rival = rng.permuted(np.tile(np.arange(classes), (inputs, 1)), axis=1)[:, :2].T
    rows = np.arange(inputs)
    base[rows, rival] = 0.0
    base[rows, winner] = 0.6
    x = torch.from_numpy(base.astype(np.float32))
    distance = Largest.distance(x)
    assert distance == pytest.approx(np.full(inputs, 0.6 / np.sqrt(2)), rel=1e-5)

    result, doubled = (
        certify(Largest(), x, Gaussian(0.5), num_classes=classes, n=1000, rule=OneSided(alpha), seed=4, block=BLOCK)
        for alpha in (ALPHA, 2 * ALPHA)
    )
    assert 0 < violations(result, winner, distance) <= allowed(inputs, ALPHA)
    assert violations(doubled, winner, distance) > allowed(inputs, ALPHA)
    assert violations(result, winner, distance, inflate=1.05) > allowed(inputs, ALPHA)


@pytest.mark.parametrize(
    "edges, classes, sigma",
    [([-0.5, 0.5], [1, 0, 1], 0.5), ([-0.5, 0.5], [1, 0, 1], 0.2), ([-0.5, 0.5], [1, 0, 1], 1.5),
     ([-0.4, 0.9], [0, 1, 2], 0.5), ([-1.0, -0.2, 0.1, 0.8], [0, 1, 0, 2, 1], 0.3)],
)   # fmt: skip
@pytest.mark.parametrize("dimension", [1, 2, pytest.param(64, marks=pytest.mark.slow)])
def test_strips_never_let_a_ball_cross_the_smoothed_boundary(
    edges: list[float], classes: list[int], sigma: float, dimension: int
) -> None:
    direction = np.random.default_rng(dimension).normal(size=dimension)
    f = Strips(edges, classes, direction)
    unit = f.u.detach().double().numpy()
    positions = np.tile(np.linspace(-2.0, 2.0, 41), 25)
    x = torch.from_numpy(np.outer(positions, unit).astype(np.float32))
    where = {t: (f.smoothed(t, sigma), f.distance(t, sigma, reach=12.0)) for t in np.unique(positions)}
    truth, distance = (np.array([where[t][i] for t in positions]) for i in range(2))

    result, looser = (
        certify(f, x, Gaussian(sigma), num_classes=max(classes) + 1, n=1000, rule=OneSided(alpha), seed=6, block=BLOCK)
        for alpha in (ALPHA, 3 * ALPHA)
    )
    assert (~result.abstained).mean() > 0.3
    assert violations(result, truth, distance) <= allowed(len(x), ALPHA)
    # the bound behind the radius, whatever class it speaks of: here nothing is lost to the shape of the classes
    p = np.array([f.probabilities(t, sigma)[c] for t, c in zip(positions, result.prediction, strict=True)])
    inside = (p > 1e-3) & (p < 1 - 1e-3)
    assert int((result.p_lower > p)[inside].sum()) <= allowed(int(inside.sum()), ALPHA)
    assert int((looser.p_lower > p)[inside].sum()) > allowed(int(inside.sum()), ALPHA)


def test_smoothed_class_differs_from_the_class_at_the_point() -> None:
    # a strip much narrower than the noise: f(x) = 0 at x = 0, but the smoothed classifier says 1 everywhere
    f = Strips([-0.1, 0.1], [1, 0, 1], [1.0])
    x = torch.zeros(1, 1)
    assert int(f(x).argmax()) == 0
    result = certify(f, x, Gaussian(1.0), num_classes=2, n=10_000, seed=1)
    p = f.probabilities(0.0, 1.0)[1]
    assert result.prediction.tolist() == [1]
    assert 0.9 * ndtri(p) < result.radius[0] < ndtri(p)
    assert f.distance(0.0, 1.0, reach=12.0) == np.inf


def test_wrong_answers_of_predict_are_rare() -> None:
    f = Strips([-0.4, 0.9], [0, 1, 2], [1.0])
    inputs, sigma, n = 4000, 1.0, 200
    x = torch.full((inputs, 1), -0.2)   # 0.42, 0.44 and 0.14: nearly a tie, and a third class
    best = f.smoothed(-0.2, sigma)
    answers = predict(f, x, Gaussian(sigma), num_classes=3, n=n, alpha=0.2, seed=3, block=BLOCK)
    assert 0 < int((~answers.abstained & (answers.prediction != best)).sum()) <= allowed(inputs, 0.2)
    # without the test, the leader alone is wrong far more often
    assert int((answers.prediction != best).sum()) > allowed(inputs, 0.2)


@pytest.mark.slow
def test_promise_at_one_in_a_thousand() -> None:
    inputs, alpha = 20_000, 0.001
    f = Linear([1.0, -1.0])
    x = at_distance(np.array([1.0, -1.0]), 0.5, inputs)
    result = certify(f, x, Gaussian(0.5), num_classes=2, n=1000, rule=OneSided(alpha), seed=12, block=BLOCK)
    distance = f.distance(x)
    assert violations(result, np.zeros(inputs), distance) <= allowed(inputs, alpha)
    assert violations(result, np.zeros(inputs), distance, inflate=1.05) > allowed(inputs, alpha)

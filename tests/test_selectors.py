"""Scores, the votes on them, and their soft form: closed forms, and one pass against two."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closed_forms import Function, Linear, Strips, allowed
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import entropy as second_opinion
from torch import nn

from art_rs_plugins.smoothing.certify import certify_all
from art_rs_plugins.smoothing.modules import SmoothedModule
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.smoothing.sampling import count_votes
from art_rs_plugins.smoothing.selectors import (
    ComposedModule,
    ConfidenceSelector,
    FixedSelector,
    Gate,
    JointVotes,
    ScoreSelector,
    core_probability,
    entropy,
    log_probabilities,
    mixed,
)
from art_rs_plugins.theory.composition import CERTIFY, CORE, Leading, Threshold, by_answer, by_class, by_score
from art_rs_plugins.theory.rules import Marginal, OneSided, Sequential

SIGMA = 0.5


def p_certify(m: float) -> float:
    """P(entropy <= 1/2) of two classes with logit gap 4 t at t ~ N(m, 1/4): the gap has to exceed 2.0905 either way."""
    return float(ndtr((4.0 * m - GAP) / 2.0) + ndtr((-4.0 * m - GAP) / 2.0))


GAP = brentq(lambda gap: second_opinion([1 / (1 + math.exp(-gap)), 1 / (1 + math.exp(gap))], base=2) - 0.5, 0, 9)


# ---------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_entropy_is_normalised_by_the_number_of_classes(classes):
    uniform, certain = torch.zeros(1, classes), torch.eye(classes)[:1] * 1e4
    score = entropy(log_probabilities(torch.cat([uniform, certain]), False))
    assert score.tolist() == [pytest.approx(1.0, abs=1e-6), 0.0]
    assert score.max() <= 1.0
    logits = torch.randn(50, classes, generator=torch.Generator().manual_seed(0)) * 3.0
    expected = second_opinion(logits.double().softmax(dim=1).numpy(), base=classes, axis=1)
    assert entropy(log_probabilities(logits, False)).numpy() == pytest.approx(expected, abs=1e-5)
    assert entropy(log_probabilities(logits.softmax(dim=1), True)).numpy() == pytest.approx(expected, abs=1e-5)


def test_a_half_of_entropy_is_the_known_gap():
    assert pytest.approx(2.090457, abs=1e-6) == GAP
    assert 1 / (1 + math.exp(-GAP)) == pytest.approx(0.889972, abs=1e-6)
    score = entropy(log_probabilities(torch.tensor([[GAP, 0.0]], dtype=torch.float64), False))
    assert float(score) == pytest.approx(0.5, abs=1e-12)


def test_the_core_is_the_first_output():
    assert core_probability(log_probabilities(torch.tensor([[0.0, 0.0], [99.0, 0.0]]), False)).tolist() == [0.5, 1.0]


# ---------------------------------------------------------------------------------------------- votes


def test_one_pass_counts_what_two_passes_count():
    """Classes exactly as the bare network's; answers exactly as those of a network that votes on nothing else."""
    f = Strips([-0.7, -0.1, 0.2, 0.9], [0, 1, 2, 1, 0], [1.0, 2.0])
    soft = Function(lambda z: torch.stack([3.0 * z[:, 0], 3.0 * z[:, 1], -3.0 * z[:, 0]], dim=1))
    x = torch.tensor([[0.0, 0.0], [0.3, -0.2], [2.0, 1.0]])
    for network, block in ((f, None), (soft, None), (soft, 40)):
        settings = {"seed": 3, "indices": [4, 7, 1], "block": block}
        joint = JointVotes(network, entropy, (0.55,))
        votes = count_votes(joint, x, Gaussian(0.4), 700, num_classes=9, **settings).numpy()
        classes = count_votes(network, x, Gaussian(0.4), 700, num_classes=3, **settings).numpy()
        assert np.array_equal(by_class(votes, 3), classes)

        def bits(z: torch.Tensor, network: nn.Module = network) -> torch.Tensor:
            certify = entropy(log_probabilities(network(z), False)) <= 0.55
            return torch.stack([~certify, certify], dim=1).float()

        answers = count_votes(Function(bits), x, Gaussian(0.4), 700, num_classes=2, **settings).numpy()
        assert np.array_equal(by_answer(by_score(votes, 3), 0), answers)
    assert 50 < answers[0, CERTIFY] < 650   # so that the equality says something


def test_a_histogram_holds_the_votes_of_every_threshold():
    f = Linear([2.0])
    x, edges = torch.tensor([[0.8], [0.3]]), [0.0, 0.2, 0.5, 1.0]
    histogram = JointVotes(f, entropy, edges)
    scores = by_score(count_votes(histogram, x, Gaussian(SIGMA), 900, num_classes=12, seed=1).numpy(), 6)
    for position, theta in enumerate(edges):
        one = count_votes(JointVotes(f, entropy, (theta,)), x, Gaussian(SIGMA), 900, num_classes=6, seed=1).numpy()
        assert np.array_equal(by_answer(scores, position), by_answer(by_score(one, 3), 0))
    certify = [by_answer(scores, position)[:, CERTIFY] for position in range(4)]
    assert np.all(np.diff(certify, axis=0) >= 0)
    assert np.array_equal(certify[3], [900, 900])   # at 1 every valid vote certifies
    assert np.array_equal(scores[:, -1], [0, 0])


def test_scores_at_theta_certify_and_broken_ones_vote_for_nothing():
    values = torch.tensor([0.0, 0.25, 0.2500001, 1.0, 1.1, -0.1, float("nan"), float("inf")])
    first = Function(lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), 2))
    joint = JointVotes(first, lambda _: values, (0.25,))
    bins = joint(torch.zeros(8, 1)).argmax(dim=1) % 3
    assert bins.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    zero = ScoreSelector(0.0, score=lambda log_p: log_p[:, 0] * 0.0)
    assert JointVotes(Linear([1.0]), zero.score, (zero.theta,))(torch.ones(1, 1)).argmax() % 3 == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_networks_without_a_class_have_no_vote_at_all(value):
    spoilt = Function(lambda z: torch.full((len(z), 3), value))
    joint = JointVotes(spoilt, entropy, (1.0,))
    votes = count_votes(joint, torch.ones(1, 2), Gaussian(0.5), 100, num_classes=9, seed=0)
    assert int(votes.sum()) == 0


@pytest.mark.parametrize(
    ("m", "p", "radius", "distance"),
    [(0.8, 0.714556, 0.28337, 0.30341), (1.5, 0.974721, 0.97761, 1.00341), (0.3, 0.378039, None, None)],
)
def test_entropy_selects_within_the_distance_that_is_known(m, p, radius, distance):
    assert p_certify(m) == pytest.approx(p, abs=1e-6)
    boundary = brentq(lambda t: p_certify(t) - 0.5, 0.0, 2.0)
    inputs, n = 200, 5_000
    f = Linear([2.0])   # logits (2 t, -2 t)
    joint = JointVotes(f, entropy, (0.5,))
    rule = Marginal(0.01, ScoreSelector(0.5).rule(0.01), lambda votes: by_answer(by_score(votes, 3), 0))
    x = torch.full((inputs, 1), m)
    (found,) = certify_all(joint, x, Gaussian(SIGMA), num_classes=6, n=n, n0=1000, rules=[rule], seed=11)
    share = found.count.sum() / (inputs * n)
    certified = p if radius is not None else 1.0 - p
    assert share == pytest.approx(certified, abs=5 * math.sqrt(certified * (1 - certified) / (inputs * n)))
    if radius is None:
        assert np.all(found.prediction != CERTIFY)
        assert np.sum(found.radius > boundary - m) <= allowed(inputs, 0.01)
        return
    assert np.all(found.prediction == CERTIFY)
    assert SIGMA * ndtri(p) == pytest.approx(radius, abs=1e-4)
    assert m - boundary == pytest.approx(distance, abs=1e-5)
    assert np.sum(found.radius > distance) <= allowed(inputs, 0.01)
    assert 0.05 > radius - np.median(found.radius) > 0.0
    # the entropy of averaged probabilities would be another selector: here it is the same for all copies
    averaged = entropy(SoftmaxMean(f)(x[:1]).log())
    assert bool(averaged <= 0.5) is (m > 1.0)


class SoftmaxMean(nn.Module):
    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        draws = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)) * SIGMA
        return self.f(x + draws).softmax(dim=1).mean(dim=0, keepdim=True)


@pytest.mark.parametrize("tau", [0.1, 0.25, 0.7])
def test_a_shifted_threshold_keeps_the_promise_of_a_linear_selector(tau):
    """Certify where the share of votes is at least tau: the boundary moves by sigma times the quantile of tau."""
    inputs, n = 400, 1_000
    selector = ScoreSelector(0.5, tau, core_probability, Linear([-3.0, -4.0], 2.0), SIGMA)
    joint = JointVotes(selector.network, selector.score, (selector.theta,))   # 3 u + 4 v >= 2 certifies
    rule = Marginal(0.05, selector.rule(0.05), lambda votes: by_answer(by_score(votes, 3), 0))
    for margin in (0.6, -0.4):   # signed distance to the line where half of the votes certify
        x = (torch.tensor([[0.6, 0.8]]) * (margin + 0.4)).expand(inputs, 2)
        (found,) = certify_all(joint, x, Gaussian(SIGMA), num_classes=6, n=n, rules=[rule], seed=5)
        distance = margin - SIGMA * ndtri(tau)
        right = CERTIFY if distance > 0 else CORE
        false = ~found.abstained & ((found.prediction != right) | (found.radius > abs(distance)))
        assert 0 < false.sum() <= allowed(inputs, 0.05)
        assert np.median(found.radius) > abs(distance) - 0.1


def test_rules_of_selectors():
    assert ScoreSelector(0.3).rule(0.01) == Threshold(0.5, 0.01)
    assert ScoreSelector(0.3, 0.1).rule(0.01, (0.25,)) == Threshold(0.1, 0.01)
    assert ScoreSelector(0.3).rule(0.01, (0.25,)) == Sequential((0.25,), 0.01)
    assert ConfidenceSelector(0.7).rule(0.01) == Leading(0.7, 0.01)


# ---------------------------------------------------------------------------------------------- the soft form


def soft(selector, f: nn.Module, **settings) -> tuple[Gate, SmoothedModule]:
    smoothed = SmoothedModule(f, SIGMA, samples=4000, seed=1).eval()
    bank = {"probabilities": False, "samples": 4000, "seed": 1, "block": None, **settings}
    return Gate(selector, smoothed, f, **bank).eval(), smoothed


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_the_soft_gate_changes_sides_where_the_selector_does(tau):
    f = Linear([3.0, 4.0], -2.0)
    own = ScoreSelector(0.5, tau, core_probability, Linear([-30.0, -40.0], 20.0), SIGMA)
    gate, smoothed = soft(own, own.network)
    unit = torch.tensor([[0.6, 0.8]])
    boundary = SIGMA * float(ndtri(tau))
    for distance, certifies in ((boundary + 0.06, True), (boundary - 0.06, False)):
        x = (unit * (0.4 + distance)).requires_grad_()
        odds = gate(x, smoothed(x))
        assert bool(odds > 0) is certifies
        (slope,) = torch.autograd.grad(odds.sum(), x)
        assert torch.nn.functional.cosine_similarity(slope, unit).item() == pytest.approx(1.0, abs=1e-3)
    gate, smoothed = soft(ConfidenceSelector(0.9), f)
    for distance, certifies in ((0.9, True), (0.3, False), (-0.9, True)):
        x = unit * (0.4 + distance)
        assert bool(gate(x, smoothed(x)) > 0) is certifies


def test_the_gate_follows_a_sigma_that_is_set_later():
    f = Linear([2.0])
    gate, smoothed = soft(ScoreSelector(0.5), f)
    x = torch.tensor([[1.0]])
    before = gate(x, smoothed(x))
    smoothed.sigma = 2.0
    other, fresh = soft(ScoreSelector(0.5), f)
    fresh.sigma = 2.0
    assert torch.equal(gate(x, smoothed(x)), other(x, fresh(x)))
    assert not torch.equal(gate(x, smoothed(x)), before)


def test_the_composed_module_is_the_mixture_and_stays_in_eval_mode():
    f, core = Linear([2.0]), Linear([-1.0], 0.3)
    for selector, weight in ((FixedSelector(True), 1.0), (FixedSelector(False), 0.0), (ScoreSelector(0.5), None)):
        gate, smoothed = soft(selector, f)
        module = ComposedModule([(gate, smoothed)], core, core_probabilities=False).train()
        assert not any(part.training for part in module.modules())
        x = torch.tensor([[0.4], [1.0]])
        share = torch.sigmoid(gate(x, smoothed(x)))[:, None] if weight is None else weight
        expected = share * smoothed(x).exp() + (1 - share) * core(x).softmax(dim=1)
        assert torch.allclose(module(x).exp(), expected, atol=1e-6)
        assert torch.allclose(module(x).exp().sum(dim=1), torch.ones(2), atol=1e-5)
        assert module.f is module
    chain = ComposedModule([soft(FixedSelector(False), f), (gate, smoothed)], core, core_probabilities=False)
    assert torch.allclose(chain(x), module(x), atol=1e-5)


def test_gradients_reach_all_parts_and_do_not_fade():
    odds = torch.tensor([60.0, -60.0], requires_grad=True)
    here, rest = torch.tensor([-0.1, -0.1]), torch.tensor([-3.0, -3.0])
    (slope,) = torch.autograd.grad(mixed(odds, here, rest).sum(), odds)
    assert torch.all(slope > 0.0)
    f, core = Linear([2.0, 0.0]), Linear([0.0, 1.0])
    module = ComposedModule([soft(ScoreSelector(0.5), f)], core, core_probabilities=False)
    x = torch.tensor([[0.5, 0.3]], requires_grad=True)
    (slope,) = torch.autograd.grad(module(x)[0, 0], x)
    assert torch.all(slope != 0.0)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("theta", [-0.01, 1.01, float("nan"), float("inf"), -float("inf")])
def test_bad_theta(theta):
    with pytest.raises(ValueError, match=r"theta must lie in \[0, 1\].*FixedSelector"):
        ScoreSelector(theta)


@pytest.mark.parametrize("tau", [-0.01, 1.0, float("nan")])
def test_bad_tau(tau):
    for make in (lambda t: ScoreSelector(0.5, t), ConfidenceSelector):
        with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\)"):
            make(tau)


def test_bad_selectors():
    with pytest.raises(TypeError, match="score must be a function"):
        ScoreSelector(0.5, score=0.3)
    with pytest.raises(TypeError, match=r"network must be a torch\.nn\.Module"):
        ScoreSelector(0.5, network=lambda x: x)
    with pytest.raises(ValueError, match="sigma is that of a network"):
        ScoreSelector(0.5, sigma=0.5)
    with pytest.raises(ValueError, match="sigma must be finite and > 0"):
        ScoreSelector(0.5, network=Linear([1.0]), sigma=-1.0)
    with pytest.raises(TypeError, match="certify must be a bool"):
        FixedSelector(1)


def test_bits_are_ordered_as_the_rules_expect():
    f = Linear([2.0])
    joint = JointVotes(f, entropy, (0.5,))
    votes = count_votes(joint, torch.tensor([[9.0]]), Gaussian(0.1), 100, num_classes=6, seed=0)
    assert by_answer(by_score(votes.numpy(), 3), 0).tolist() == [[0, 100]]
    assert OneSided().decide(by_class(votes.numpy(), 3), by_class(votes.numpy(), 3), 100).prediction[0] == 0

"""certify and predict: what they return is what the votes and the rule say, row by row."""

import dataclasses

import numpy as np
import pytest
import torch
from closed_forms import Function, Linear, allowed
from scipy.special import ndtri
from scipy.stats import beta, binomtest

from art_rs_plugins.smoothing.certify import certify, certify_all, predict
from art_rs_plugins.smoothing.noise import Gaussian, Stage
from art_rs_plugins.smoothing.sampling import count_votes
from art_rs_plugins.theory.rules import OneSided, Planned, Sequential, TopTwo

F = Linear([1.0, -2.0, 0.5])
X = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32))
SIGMA = Gaussian(0.7)


def test_certificate_is_the_theorem_applied_to_the_votes() -> None:
    result = certify(F, X, SIGMA, num_classes=2, n=1000, n0=50, rule=OneSided(0.01), seed=3)
    selection = count_votes(F, X, SIGMA, 50, num_classes=2, seed=3, stage=Stage.SELECTION).numpy()
    estimation = count_votes(F, X, SIGMA, 1000, num_classes=2, seed=3, stage=Stage.ESTIMATION).numpy()
    for i in range(8):
        guess = int(selection[i].argmax())
        k = int(estimation[i, guess])
        p = beta.ppf(0.01, k, 1001 - k)
        assert (result.prediction[i], result.count[i], result.runner_up_count[i]) == (guess, k, 1000 - k)
        assert result.p_lower[i] == pytest.approx(p, rel=1e-8)
        assert result.p_upper[i] == pytest.approx(1 - p, rel=1e-8)
        assert bool(result.abstained[i]) == (p <= 0.5)
        assert result.radius[i] == pytest.approx(0.7 * max(ndtri(p), 0.0), rel=1e-8)
    assert result.n.tolist() == [1000] * 8
    assert result.n0.tolist() == [50] * 8
    assert result.sigma.tolist() == [0.7] * 8
    assert result.alpha.tolist() == [0.01] * 8
    assert result.index.tolist() == list(range(8))
    assert result.seed.tolist() == [3] * 8
    assert (result.kind, result.norm) == ("certified", 2.0)


def test_default_rule_is_that_of_cohen_at_one_in_a_thousand() -> None:
    a = certify(F, X, SIGMA, num_classes=2, n=500, seed=3)
    b = certify(F, X, SIGMA, num_classes=2, n=500, n0=100, rule=OneSided(alpha=0.001), seed=3)
    assert np.array_equal(a.radius, b.radius)
    assert a.alpha.tolist() == [0.001] * 8


def test_saturated_votes_reach_the_ceiling_and_not_more() -> None:
    x = 50.0 * torch.tensor([[1.0, -2.0, 0.5]])
    result = certify(F, x, SIGMA, num_classes=2, n=1000, seed=1)
    assert result.count[0] == 1000
    ceiling = 0.7 * ndtri(0.001 ** (1 / 1000))
    assert ceiling * (1 - 1e-8) < result.radius[0] <= ceiling


def test_same_seed_same_certificates_however_they_are_batched() -> None:
    whole = certify(F, X, SIGMA, num_classes=2, n=500, seed=3)
    order = np.array([5, 1, 6])
    part = certify(F, X[order], SIGMA, num_classes=2, n=500, seed=3, indices=order)
    for name in ("prediction", "radius", "count", "index"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[order])
    other = certify(F, X, SIGMA, num_classes=2, n=500, seed=4)
    assert not np.array_equal(other.count, whole.count)


def test_recorded_seed_reproduces_a_run_without_one() -> None:
    first = certify(F, X, SIGMA, num_classes=2, n=500)
    assert len(set(first.seed.tolist())) == 1
    again = certify(F, X, SIGMA, num_classes=2, n=500, seed=int(first.seed[0]))
    assert np.array_equal(first.count, again.count)
    second = certify(F, X, SIGMA, num_classes=2, n=500)
    assert first.seed[0] != second.seed[0]
    answers = predict(F, X, SIGMA, num_classes=2, n=500)
    assert np.array_equal(answers.votes, predict(F, X, SIGMA, num_classes=2, n=500, seed=answers.seed).votes)


def test_sigma_for_each_input_scales_its_radius() -> None:
    x = 50.0 * torch.tensor([[1.0, -2.0, 0.5], [2.0, -4.0, 1.0]])
    result = certify(F, x, Gaussian([0.5, 1.0]), num_classes=2, n=200, seed=1)
    assert result.sigma.tolist() == [0.5, 1.0]
    assert result.radius[1] == 2 * result.radius[0] > 0


def test_selection_and_estimation_never_share_draws() -> None:
    # on the boundary every vote is a fair coin: shared draws would show as correlation
    x = torch.zeros(400, 3)
    selection, estimation = (
        count_votes(F, x, SIGMA, 100, num_classes=2, seed=9, stage=stage)[:, 0].numpy()
        for stage in (Stage.SELECTION, Stage.ESTIMATION)
    )
    assert abs(np.corrcoef(selection, estimation)[0, 1]) < 5 / np.sqrt(400)
    result = certify(F, x, SIGMA, num_classes=2, n=100, n0=100, rule=OneSided(0.05), seed=9)
    assert np.array_equal(result.prediction, (selection < 50).astype(int))
    assert int((~result.abstained).sum()) <= allowed(400, 0.05)


def test_predictions_follow_the_rule_on_votes_of_their_own() -> None:
    answers = predict(F, X, SIGMA, num_classes=2, n=60, alpha=0.01, seed=3)
    assert np.array_equal(
        answers.votes, count_votes(F, X, SIGMA, 60, num_classes=2, seed=3, stage=Stage.PREDICTION).numpy()
    )
    for i, row in enumerate(answers.votes):
        assert answers.prediction[i] == row.argmax()
        assert bool(answers.abstained[i]) == (binomtest(int(row.max()), 60, 0.5).pvalue > 0.01)
    assert 0 < answers.abstained.sum() < 8
    assert (answers.n, answers.alpha, answers.seed) == (60, 0.01, 3)
    confirmed = predict(F, X, SIGMA, num_classes=2, n=60, seed=3, stage=Stage.CONFIRMATION)
    assert not np.array_equal(confirmed.votes, answers.votes)


def test_prediction_abstains_on_invalid_votes_and_few_draws() -> None:
    sure = 50.0 * torch.tensor([[1.0, -2.0, 0.5]])
    assert not predict(F, sure, SIGMA, num_classes=2, n=11, seed=1).abstained[0]
    assert predict(F, sure, SIGMA, num_classes=2, n=10, seed=1).abstained[0]
    nothing = Function(lambda z: torch.full((len(z), 2), float("nan")))
    assert predict(nothing, sure, SIGMA, num_classes=2, n=1000, seed=1).abstained[0]
    with pytest.raises(ValueError, match="alpha must lie"):
        predict(F, sure, SIGMA, num_classes=2, n=10, alpha=1.0)


def test_rules_of_ones_own_are_used() -> None:
    class Never:
        alpha = 0.25

        def run(self, selection, n0, sample, n, sigma):
            estimation = sample(np.arange(len(selection)), 0, n)
            decision = OneSided(self.alpha).decide(selection, estimation, n)
            verdict = TopTwo(self.alpha).decide(estimation, n)
            object.__setattr__(decision, "abstained", np.ones_like(verdict.abstained))
            return decision

    result = certify(F, 50 * X, SIGMA, num_classes=2, n=500, rule=Never(), seed=3)
    assert result.abstained.all()
    assert result.radius.tolist() == [0.0] * 8
    assert result.alpha.tolist() == [0.25] * 8


def test_rules_that_share_draws_decide_as_they_do_alone() -> None:
    rules = [OneSided(0.01), Sequential((0.1, 0.3, 0.5), 0.01), Sequential((0.2,), 0.001), Planned(0.05, 0.01)]
    x = torch.linspace(-0.5, 0.7, 6)[:, None].repeat(1, 2)
    seen = []

    def f(noisy: torch.Tensor) -> torch.Tensor:
        seen.append(len(noisy))
        return torch.stack([noisy[:, 0], torch.zeros(len(noisy))], dim=1)

    settings = {"num_classes": 2, "n": 20_000, "n0": 100, "seed": 4, "block": 200}
    alone, passes = [], []
    for rule in rules:
        seen.clear()
        alone.append(certify(f, x, Gaussian(0.5), rule=rule, **settings))
        passes.append(sum(seen))
    seen.clear()
    shared = certify_all(f, x, Gaussian(0.5), rules=rules, **settings)
    assert sum(seen) <= passes[0] + 200   # the others ask for nothing that the first did not draw
    for one, other in zip(alone, shared, strict=True):
        for field in dataclasses.fields(one):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name
    backwards = certify_all(f, x, Gaussian(0.5), rules=rules[::-1], **settings)[::-1]
    assert all(np.array_equal(a.count, b.count) for a, b in zip(shared, backwards, strict=True))
    with pytest.raises(ValueError, match="rules must hold"):
        certify_all(f, x, Gaussian(0.5), rules=[], **settings)
    few = certify_all(f, x, Gaussian(0.5), rules=[OneSided(0.1), OneSided(0.2)], **{**settings, "n": 40})
    assert np.array_equal(few[0].count, certify(f, x, Gaussian(0.5), rule=OneSided(0.1), **{**settings, "n": 40}).count)

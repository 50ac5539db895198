"""Training losses: golden values, closed-form gradients, second implementations, half precision, bad input."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax
from scipy.stats import norm
from torch import Tensor

from art_rs_plugins.smoothing.losses import ADRE, MACER, Consistency, adre, consistency, cross_entropy, macer

SECOND_WRONG = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0]])   # the runner-up 2 leads in the mean
SECOND_RIGHT = torch.tensor([[2.0, 0.0, 1.0], [3.0, 1.0, 0.0]])   # the label leads
ZERO = torch.tensor([0])


def gradient(loss, logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf, labels), leaf)
    return found


def sample(seed: int = 0, m: int = 4, b: int = 6, k: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(m, b, k)) * scale), torch.from_numpy(rng.integers(0, k, size=b))


# ---------------------------------------------------------------------------------------------------------- ADRE


@pytest.mark.parametrize(
    "logits, mean, value, slope",
    [
        (
            SECOND_WRONG,
            [0.353626, 0.102113, 0.544262],
            1.727893,
            [[-0.182336, 0.042991, 0.139345], [-0.482251, 0.048245, 0.434006]],
        ),
        (
            SECOND_RIGHT,
            [0.754518, 0.102113, 0.143369],
            0.094493,
            [[-0.224157, 0.037331, 0.186826], [-0.090465, 0.055425, 0.035041]],
        ),
    ],
)
def test_adre_golden_value_and_gradient(logits, mean, value, slope):
    assert np.allclose(logits.softmax(1).mean(0), mean, atol=1e-6)
    batch = logits[:, None]
    assert float(ADRE(0.1)(batch, ZERO)) == pytest.approx(value, abs=1e-6)
    found = gradient(ADRE(0.1), batch, ZERO)[:, 0]
    assert np.allclose(found, slope, atol=1e-6)
    assert np.allclose(found.sum(dim=1), 0.0, atol=1e-6)


def adre_by_hand(logits: NDArray, labels: NDArray, weight: float) -> tuple[float, NDArray]:
    """Value and closed-form gradient, example by example."""
    m, b, _ = logits.shape
    s, slope, value = softmax(logits, axis=2), np.zeros_like(logits), 0.0
    for i, y in enumerate(labels):
        mean = s[:, i].mean(axis=0)
        c = max((j for j in range(len(mean)) if j != y), key=lambda j: mean[j])
        value += (-np.log(s[:, i, y]).mean() + weight * np.log(mean[c])) / b
        responsibility = s[:, i, c] / s[:, i, c].sum()
        for j in range(m):
            one = np.eye(len(mean))
            slope[j, i] = ((s[j, i] - one[y]) / m + weight * responsibility[j] * (one[c] - s[j, i])) / b
    return value, slope


@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 6),
    b=st.integers(1, 4),
    k=st.integers(2, 6),
    weight=st.sampled_from([0.0, 0.05, 0.1, 3.0]),
)
def test_adre_is_its_closed_form(seed, m, b, k, weight):
    logits, labels = sample(seed, m, b, k)
    value, slope = adre_by_hand(logits.numpy(), labels.numpy(), weight)
    assert float(ADRE(weight)(logits, labels)) == pytest.approx(value, abs=1e-12)
    assert np.allclose(gradient(ADRE(weight), logits, labels), slope, atol=1e-12)


@pytest.mark.parametrize("loss", [ADRE(0.3), Consistency(10.0), Consistency(2.0, 0.0), MACER(0.25, 12.0, beta=2.0)])
def test_gradients_are_finite_differences(loss):
    logits, labels = sample(3)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_(), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("weight", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("logits", [SECOND_WRONG, SECOND_RIGHT])
def test_adre_rewards_a_weaker_runner_up(logits, weight):
    weaker = logits - torch.tensor([0.0, 0.0, 0.3])
    before, after = (ADRE(weight)(z[:, None], ZERO) for z in (logits, weaker))
    assert after < before
    plain, plain_after = (cross_entropy(z[:, None], ZERO) for z in (logits, weaker))
    assert after - before < plain_after - plain   # the regulariser has its part in it, and not the opposite one


def test_adre_of_two_classes_falls_without_bound_until_the_floor():
    for margin, known in ((0.0, 0.624), (5.0, -0.494), (10.0, -1.0), (20.0, -2.0)):
        logits = torch.tensor([[[margin, 0.0]]])
        expected = math.log1p(math.exp(-margin)) - 0.1 * math.log1p(math.exp(margin))
        assert float(ADRE(0.1)(logits, ZERO)) == pytest.approx(expected, abs=1e-6)
        assert expected == pytest.approx(known, abs=1e-3)
    for floor, margin in ((1e-10, 24.0), (1e-10, 500.0), (1e-6, 14.0), (1e-6, 3e38)):
        logits = torch.tensor([[[margin, 0.0]], [[margin, 0.0]]])
        regulariser = ADRE(1.0, floor)(logits, ZERO) - cross_entropy(logits, ZERO)
        assert float(regulariser) == pytest.approx(math.log(floor), rel=1e-6)
        assert torch.equal(gradient(ADRE(1e9, floor), logits, ZERO), gradient(cross_entropy, logits, ZERO))
    near = torch.tensor([[[23.0, 0.0]]])   # log 1e-10 is -23.03
    assert float(gradient(ADRE(1.0), near, ZERO)[0, 0, 0]) == pytest.approx(-1.0, abs=1e-6)


def test_adre_runner_up_is_never_the_label_and_the_lowest_on_ties():
    logits, labels = sample(5, m=1, b=200, k=2)
    regulariser = gradient(ADRE(1.0), logits, labels) - gradient(cross_entropy, logits, labels)
    s, other = logits[0].softmax(1), 1 - labels
    expected = torch.eye(2, dtype=torch.float64)[other] - s   # one copy: one-hot of the rival minus softmax
    assert np.allclose(200 * regulariser[0], expected, atol=1e-12)
    tied = torch.zeros(3, 1, 5, dtype=torch.float64)
    for label, rival in ((0, 1), (1, 0), (4, 0)):
        y = torch.tensor([label])
        slope = (gradient(ADRE(1.0), tied, y) - gradient(cross_entropy, tied, y)).sum(dim=0)[0]
        assert np.allclose(slope, np.eye(5)[rival] - 0.2)


def test_adre_spreads_what_is_left_over_the_other_classes():
    """Plain gradient descent on one logit vector, until the label has probability 0.6."""
    found = []
    for weight in (0.0, 0.05, 0.1, 0.2, 0.5):
        z = torch.zeros(1, 1, 10, dtype=torch.float64)
        z[0, 0, :2] = torch.tensor([1.0, 0.8])
        while z.softmax(2)[0, 0, 0] < 0.6:
            z = z - 0.1 * gradient(ADRE(weight), z, ZERO)
        p = z.softmax(2)[0, 0]
        found.append(float(p[1:].max() / (1.0 - p[0])))
    assert found == pytest.approx([0.19088, 0.17518, 0.16137, 0.13888, 0.11333], abs=1e-5)
    assert all(b < a for a, b in pairwise(found))
    assert min(found) > 1 / 9


# ------------------------------------------------------------------------------------- consistency, MACER, plain


def consistency_by_hand(logits: NDArray, labels: NDArray, weight: float, entropy_weight: float) -> float:
    m, b, _ = logits.shape
    s = [[softmax(logits[j, i]) for i in range(b)] for j in range(m)]
    total = 0.0
    for i in range(b):
        mean = sum(s[j][i] for j in range(m)) / m
        total += sum(-math.log(s[j][i][labels[i]]) for j in range(m)) / m
        total += weight * sum(float((mean * np.log(mean / s[j][i])).sum()) for j in range(m)) / m
        total += entropy_weight * -float((mean * np.log(np.clip(mean, 1e-20, None))).sum())
    return total / b


def macer_by_hand(
    logits: NDArray, labels: NDArray, sigma: float, weight: float, gamma: float, beta: float
) -> tuple[float, int]:
    """Value, and number of inputs that are counted in the hinge."""
    _, b, _ = logits.shape
    classification, hinge, counted = 0.0, 0.0, 0
    for i, y in enumerate(labels):
        classification -= math.log(softmax(logits[:, i], axis=1).mean(axis=0)[y] + 1e-10)
        mean = softmax(beta * logits[:, i], axis=1).mean(axis=0)
        first, second = np.argsort(-mean, kind="stable")[:2]
        with np.errstate(invalid="ignore"):
            gap = norm.isf(np.delete(mean, y).sum()) - norm.ppf(mean[second])
        if first == y and math.isfinite(gap) and abs(gap) <= gamma:
            hinge, counted = hinge + sigma / 2 * (gamma - gap), counted + 1
    return (classification + weight * hinge) / b, counted


@given(seed=st.integers(0, 10_000), m=st.integers(1, 6), scale=st.sampled_from([0.3, 2.0, 8.0]))
def test_consistency_is_the_authors_formula(seed, m, scale):
    logits, labels = sample(seed, m, scale=scale)
    expected = consistency_by_hand(logits.numpy(), labels.numpy(), 20.0, 0.5)
    assert float(Consistency(20.0)(logits, labels)) == pytest.approx(expected, rel=1e-10)


@given(
    seed=st.integers(0, 10_000),
    m=st.integers(1, 16),
    scale=st.sampled_from([0.05, 0.3, 1.0, 4.0]),
    gamma=st.sampled_from([0.5, 2.0, 8.0]),
)
def test_macer_is_the_authors_formula(seed, m, scale, gamma):
    logits, labels = sample(seed, m, scale=scale)
    labels[:3] = logits.softmax(2).mean(0)[:3].argmax(1)
    expected, _ = macer_by_hand(logits.numpy(), labels.numpy(), 0.5, 4.0, gamma, 16.0)
    assert float(MACER(0.5, 4.0, gamma)(logits, labels)) == pytest.approx(expected, rel=1e-9)


def test_macer_leaves_out_what_is_wrong_or_wide_or_infinite():
    rows = [[0.2, 0.0, 0.0], [0.0, 0.2, 0.0], [3.0, 0.0, 0.0], [9e4, 0.0, 0.0], [-9e4, 0.0, 0.0]]
    logits = torch.tensor([rows, rows], dtype=torch.float64)
    labels = torch.zeros(5, dtype=torch.int64)
    value, counted = macer_by_hand(logits.numpy(), labels.numpy(), 0.25, 12.0, 8.0, 16.0)
    assert counted == 1
    assert float(MACER(0.25, 12.0)(logits, labels)) == pytest.approx(value, rel=1e-12)
    hinge = gradient(MACER(0.25, 12.0), logits, labels) - gradient(MACER(0.25, 0.0), logits, labels)
    assert torch.isfinite(hinge).all()
    assert (hinge.abs().sum(dim=(0, 2)) > 0).tolist() == [True, False, False, False, False]
    assert float(hinge[0, 0, 0]) < 0.0   # descent widens the gap


def test_macer_keeps_its_digits_in_single_precision():
    """At 1 - T = 2e-5, of which 1 - T in float32 would keep three digits."""
    logits = torch.tensor([[[0.72, 0.0, -0.5, -0.6]], [[0.75, 0.0, -0.5, -0.6]]])
    labels = torch.tensor([0])
    expected, counted = macer_by_hand(logits.double().numpy(), labels.numpy(), 0.25, 12.0, 10.0, 16.0)
    assert counted == 1
    assert float(MACER(0.25, 12.0, 10.0)(logits, labels)) == pytest.approx(expected, rel=1e-6)
    wide = 20.0 * logits   # a gap of 42, and slopes of a quantile beyond float32
    expected, counted = macer_by_hand(wide.double().numpy(), labels.numpy(), 0.25, 12.0, 50.0, 16.0)
    assert counted == 1
    assert float(MACER(0.25, 12.0, 50.0)(wide, labels)) == pytest.approx(expected, rel=1e-6)
    slope = gradient(MACER(0.25, 12.0, 50.0), wide, labels)
    assert torch.isfinite(slope).all()
    assert float(slope[0, 0, 0]) < -0.1


def test_cross_entropy_is_the_mean_over_copies_and_inputs():
    logits, labels = sample(0, 3, 4, 5)
    expected = np.mean([-log_softmax(logits[j, i])[labels[i]] for j in range(3) for i in range(4)])
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-12)
    soft = sample(1, 1, 4, 5)[0][0].softmax(1)
    expected = np.mean([-log_softmax(logits[j, i]) @ soft[i].numpy() for j in range(3) for i in range(4)])
    assert float(cross_entropy(logits, soft)) == pytest.approx(expected, rel=1e-12)


def test_consistency_takes_probabilities_as_labels():
    logits, labels = sample(2)
    rows = torch.eye(5, dtype=torch.float64)[labels]
    assert float(Consistency(3.0)(logits, rows)) == pytest.approx(float(Consistency(3.0)(logits, labels)), rel=1e-12)


# ------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("loss", [cross_entropy, ADRE(0.1), Consistency(10.0), MACER(0.25, 12.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_half_precision_logits_lose_no_more_than_they_have_lost(loss, dtype, scale):
    logits, labels = sample(7, scale=scale)
    half = logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, slope = loss(half, labels), gradient(loss, half, labels)
    assert value.dtype == torch.float32
    exact = half.double()
    assert float(value) == pytest.approx(float(loss(exact, labels)), rel=1e-5)
    assert torch.isfinite(slope).all()
    unit = float(torch.finfo(dtype).eps) * float(slope.abs().max())
    assert torch.allclose(slope.double(), gradient(loss, exact, labels), rtol=1e-2, atol=unit)


# ---------------------------------------------------------------------------------------------- settings, bad input


def test_bad_settings_are_refused_when_they_are_made():
    for wrong in (-0.1, math.nan, math.inf):
        for make in (
            ADRE,
            Consistency,
            lambda w: Consistency(1.0, w),
            lambda w: MACER(0.25, w),
        ):
            with pytest.raises(ValueError, match=r"weight must be finite and >= 0, got"):
                make(wrong)
    for wrong in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="floor must lie strictly between 0 and 1"):
            ADRE(0.1, wrong)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sigma must be"):
            MACER(wrong, 1.0)
        with pytest.raises(ValueError, match="gamma must be finite and > 0"):
            MACER(0.25, 1.0, wrong)
        with pytest.raises(ValueError, match="beta must be finite and > 0"):
            MACER(0.25, 1.0, 8.0, wrong)
    with pytest.raises(ValueError, match="sigma must be a single number"):
        MACER([0.25, 0.5], 1.0)


@pytest.mark.parametrize("loss", [cross_entropy, ADRE(), Consistency(1.0), MACER(0.25, 1.0)])
def test_logits_and_labels_that_do_not_fit_are_named(loss):
    logits, labels = sample()
    for wrong in (logits[0], logits[:0], logits[:, :0], logits[:, :, :1]):
        with pytest.raises(ValueError, match=r"logits must have shape \(m, b, k\)"):
            loss(wrong, labels)
    for value in (-100, -1, 5):   # PyTorch itself leaves -100 out in silence
        outside = labels.clone()
        outside[2] = value
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 5\), got values in"):
            loss(logits, outside)
    with pytest.raises(ValueError, match=r"labels must be class indices of shape \(6,\)"):
        loss(logits, labels[:5])
    for wrong in (labels.double(), labels.int()):
        with pytest.raises(TypeError, match="labels must be int64"):
            loss(logits, wrong)


@pytest.mark.parametrize("loss", [ADRE(), MACER(0.25, 1.0)])
def test_probabilities_name_no_runner_up(loss):
    logits, labels = sample()
    with pytest.raises(ValueError, match=f"labels of {type(loss).__name__} must be class indices"):
        loss(logits, torch.eye(5, dtype=torch.float64)[labels])


def test_one_draw_is_warned_of():
    for loss, reason in ((ADRE(), "votes that vary with the noise"), (Consistency(1.0), "weight has no effect")):
        with pytest.warns(UserWarning, match=reason):
            loss.check_draws(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss.check_draws(2)


def test_functions_are_the_losses_in_one_call() -> None:
    logits, labels = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 4, 2])
    pairs = [
        (adre(logits, labels, 0.3, floor=1e-6), ADRE(0.3, 1e-6)),
        (consistency(logits, labels, 2.0, entropy_weight=0.1), Consistency(2.0, 0.1)),
        (macer(logits, labels, 0.5, 4.0, gamma=6.0, beta=2.0), MACER(0.5, 4.0, 6.0, 2.0)),
    ]
    for value, loss in pairs:
        assert torch.equal(value, loss(logits, labels))
    with pytest.raises(ValueError, match="weight"):
        adre(logits, labels, -1.0)

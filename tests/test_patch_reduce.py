"""PatchReduce against closed forms: what linear networks on patches make of noise is known exactly."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from closed_forms import Function, Linear, allowed
from scipy.special import ndtr, ndtri
from support import TEST, TRAIN, X, Y, digits_network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from art_rs_plugins.benchmark.models import build
from art_rs_plugins.smoothing.adversary import SmoothedPGD
from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.grid import GridGaussian
from art_rs_plugins.smoothing.modules import BaseClassifier, Normalize, PatchReduce, SmoothedModule
from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, standard_normal
from art_rs_plugins.smoothing.performance import Performance, Voter
from art_rs_plugins.smoothing.sampling import count_votes
from art_rs_plugins.smoothing.video import Lifted, Max, Mean, Vote
from art_rs_plugins.theory.bounds import clopper_pearson_lower
from art_rs_plugins.theory.patches import CertifiedVote, Pad, PatchCertificates, PatchGeometry, Placement, Resize
from art_rs_plugins.theory.rules import OneSided, Planned, Sequential

SHARED, GRID, STACK = Placement.SHARED_INPUT, Placement.SHARED_RESIZED, Placement.PER_PATCH
NINE = PatchGeometry.grid((8, 8), 6, 1)
SIGMA = 0.5
RAW = Mean(softmax=False)
BLUR = torch.ones(6, 6) / 6.0   # a network of norm 1 on patches of the fixture
CONSTANT = torch.full((1, 1, 8, 8), 0.5 / 6.0)   # where its margin is 0.5 on every patch


def normal(*shape: int, seed: int = 0) -> Tensor:
    return standard_normal(shape, Key(seed, 0, Stage.ATTACK, 7))


def linear(w: Tensor, geometry: PatchGeometry, placement: Placement = SHARED, **settings) -> PatchReduce:
    """Mean of linear margins: a linear classifier of what the noise is added to."""
    return PatchReduce(Linear(w), geometry, reduction=RAW, placement=placement, **settings).eval()


def certified(f: PatchReduce, x: Tensor, sigma: float = SIGMA, *, n: int = 1000, rule=None, seed: int = 1, **settings):
    found = certify(
        f, f.lift(x), f.lifted(Gaussian(sigma)), num_classes=2, n=n, rule=rule or OneSided(0.001), seed=seed, **settings
    )
    return PatchCertificates.of(found, f.lift_norm)


def slope(f: PatchReduce, z: Tensor) -> Tensor:
    """Gradient of the margin with respect to what the noise is added to."""
    z = z.clone().requires_grad_()
    scores = f(z)
    (gradient,) = torch.autograd.grad((scores[:, 0] - scores[:, 1]).sum() / 2.0, z)
    return gradient[0]


class Outputs(nn.Module):
    """Reads its outputs off the patch, a row of k numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def stack_of(m: int, k: int) -> PatchGeometry:
    """Patches are the m rows of an image (m, k)."""
    return PatchGeometry.grid((m, k), (1, k), (1, k))


# ---------------------------------------------------------------------- the fixture, in closed form


def test_shared_noise_is_certified_up_to_the_truth() -> None:
    f = linear(BLUR, NINE)
    norm = float(slope(f, CONSTANT).norm())
    assert norm == pytest.approx(46.0 / 54.0, rel=1e-6)   # of the mean margin; 1 for each patch
    truth = 0.5 / norm
    p = ndtr(truth / SIGMA)
    assert (p, truth) == (pytest.approx(0.879785, abs=1e-6), pytest.approx(0.586957, abs=1e-6))
    found = certified(f, CONSTANT, n=100_000)
    assert 0.57 < found.radius[0] < truth
    assert abs(found.count[0] - 100_000 * p) < 5 * np.sqrt(100_000 * p * (1 - p))
    for sigma in (0.25, 1.0):   # the same distance under any noise
        assert 0.94 * truth < certified(f, CONSTANT, sigma, n=20_000).radius[0] < truth


def test_no_placement_claims_more_than_the_distance_to_the_boundary() -> None:
    truth = 0.586957
    direction = slope(linear(BLUR, NINE), CONSTANT)
    beyond = CONSTANT - 1.02 * truth * direction / direction.norm()
    for placement in (SHARED, GRID, STACK):
        f = linear(BLUR, NINE, placement)
        found = certified(f, CONSTANT, n=100_000)
        assert 0.0 < found.radius[0] < truth
        votes = count_votes(f, f.lift(beyond), Gaussian(SIGMA), 100_000, num_classes=2, seed=2)[0] / 100_000
        assert float(votes[0]) == pytest.approx(0.474 if placement == STACK else 0.490, abs=0.006)
        if placement == STACK:   # what is published as the radius is 2.5 times the truth, and false at 0.5987
            assert found.raw_radius[0] == pytest.approx(3.0 * 0.5, rel=0.05)
            assert found.raw_radius[0] > 2.4 * truth
            assert 0.45 < found.radius[0] <= 0.5
        else:
            assert found.raw_radius[0] == found.radius[0]


@pytest.mark.parametrize("placement", [GRID, STACK])
def test_radii_behind_a_map_keep_the_promise(placement: Placement) -> None:
    # at the top singular vector of the map the bound is sharp: a little more, and the certificates are false
    geometry, alpha, trials = PatchGeometry.grid((3, 3), 3, 1, before=Resize((4, 4))), 0.05, 800
    probe = PatchReduce(nn.Flatten(), geometry, placement=placement)
    basis = probe.lift(torch.eye(9).view(9, 1, 3, 3)).flatten(1).double()
    top = torch.linalg.svd(basis.T).Vh[0]
    f, noise = Linear(top @ basis), Lifted(Gaussian(SIGMA), probe.lift_norm)   # aligned with what an input can do
    distance = 0.5 / probe.lift_norm
    x = (top * distance).float().view(1, 1, 3, 3).expand(trials, -1, -1, -1)
    z = probe.lift(x)
    np.testing.assert_allclose(np.abs(f.distance(z)), 0.5, rtol=1e-5)
    settings = {"num_classes": 2, "n": 500, "n0": 50, "rule": OneSided(alpha), "seed": 20, "block": 1000}
    radius = certify(f, z, noise, **settings).radius
    assert 0.2 * alpha * trials < (radius > distance).sum() <= allowed(trials, alpha)
    assert (radius * 1.05 > distance).sum() > allowed(trials, alpha)
    plain = certify(f, z, Gaussian(SIGMA), **settings)   # radii that forget the map
    assert (plain.radius > distance).sum() > 0.9 * trials


def test_named_radii_and_plans_are_in_units_of_the_input() -> None:
    f = linear(BLUR, NINE, STACK)
    named = certified(f, CONSTANT, n=20_000, rule=Sequential((0.1, 0.3, 0.45, 0.52)))
    assert named.radius[0] == 0.45
    assert named.holds_at(0.45).all()
    assert named.raw_radius[0] == pytest.approx(1.35)
    planned = certified(f, CONSTANT, n=100_000, n0=500, rule=Planned(0.05))
    assert planned.n[0] < 20_000
    assert 0.35 < planned.radius[0] < 0.5


def test_exact_noise_stays_exact_behind_a_cut() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 1, 8, 8)) / 255.0).float()
    for placement in (SHARED, STACK):
        f = linear(BLUR, NINE, placement)
        found = certify(f, f.lift(images), f.lifted(GridGaussian(SIGMA)), num_classes=2, n=500, seed=0)
        assert found.kind == "exact"
    f = linear(torch.ones(9, 9), PatchGeometry.grid((8, 8), 9, 1, before=Resize((9, 9))), GRID)
    with pytest.raises(ValueError, match="grid k / 255"):
        certify(f, f.lift(images), f.lifted(GridGaussian(SIGMA)), num_classes=2, n=500, seed=0)


@pytest.mark.parametrize("reduction", [Mean(), RAW, Max(), Max(softmax=False), Vote()])
@pytest.mark.parametrize("placement", [SHARED, GRID, STACK])
def test_one_patch_is_plain_smoothing(reduction, placement: Placement) -> None:
    network = digits_network()
    f = PatchReduce(network, PatchGeometry.grid((8, 8), 8, 1), reduction=reduction, placement=placement).eval()
    x = torch.from_numpy(X[:4])
    settings = {"num_classes": 10, "seed": 5}
    assert f.lift_norm == 1.0
    plain = count_votes(network.eval(), x, Gaussian(0.3), 500, **settings)
    assert torch.equal(count_votes(f, f.lift(x), f.lifted(Gaussian(0.3)), 500, **settings), plain)


def test_copies_of_a_patch_add_cost_and_nothing_else() -> None:
    network, x = digits_network().eval(), torch.from_numpy(X[:4])
    with pytest.warns(UserWarning, match="distinct"):
        copies = PatchGeometry((8, 8), (8, 8), ((0, 0),) * 4)
    plain = count_votes(network, x, Gaussian(0.3), 500, num_classes=10, seed=5)
    for reduction in (Max(), Vote(), Mean(), RAW):
        f = PatchReduce(network, copies, reduction=reduction, block=4000).eval()
        assert torch.equal(count_votes(f, x, Gaussian(0.3), 500, num_classes=10, seed=5), plain)
    f = linear(torch.ones(8, 8), copies, STACK)
    assert f.lift_norm == 2.0
    w = slope(f, f.lift(CONSTANT))
    margin = float(CONSTANT.sum())
    # in the linear case nothing is lost either: the limit of the certified radius is the true distance
    assert margin / float(w.norm()) / f.lift_norm == pytest.approx(margin / 8.0, rel=1e-6)


def test_one_draw_for_all_patches_is_refused() -> None:
    # sign<w, x1 - x2> sees none of it: a margin of 1e-3 would be certified at 3.8 sigma
    halves, w = PatchGeometry.grid((8, 8), (8, 4), (8, 4)), torch.ones(8, 4) / np.sqrt(64.0)
    x = torch.zeros(1, 1, 8, 8)
    x[..., :4] = 1e-3 / float(w.sum())
    noisy = PatchReduce(nn.Flatten(), halves, placement=STACK).lift(x) + SIGMA * normal(1000, 1, 1, 8, 4)
    difference = (noisy[:, 0] - noisy[:, 1]).flatten(1) @ w.flatten()
    assert (difference > 0).all()
    assert SIGMA * ndtri(clopper_pearson_lower(100_000, 100_000, 0.001)) == pytest.approx(3.81 * SIGMA, abs=1e-2)
    with pytest.raises(ValueError, match="no radius is certified under COMMON_PATCH"):
        PatchReduce(Linear(w), halves, placement=Placement.COMMON_PATCH)


@pytest.mark.parametrize("n, ratio", [(100, 1.5005), (1000, 2.4633), (10_000, 3.1986), (100_000, 3.8115)])
def test_ceilings_do_not_depend_on_patches(n: int, ratio: float) -> None:
    f = PatchReduce(Function(lambda x: torch.stack([x[:, 0, 0, 0] * 0 + 1, x[:, 0, 0, 0] * 0], 1)), stack_of(4, 2))
    found = certified(f.eval(), torch.zeros(1, 1, 4, 2), n=n, block=10_000)
    assert found.radius[0] / SIGMA == pytest.approx(ratio, abs=1e-4)


# ---------------------------------------------------------------------- how much noise is left


def test_shared_noise_is_averaged_as_far_as_patches_differ() -> None:
    for placement, ratio in ((SHARED, 0.725652), (STACK, 1.0 / 9.0)):
        f = PatchReduce(Linear(BLUR), NINE, reduction=RAW, placement=placement)
        assert float(slope(f, f.lift(CONSTANT)).norm()) ** 2 == pytest.approx(ratio, rel=1e-5)
        noisy = normal(100_000, *f.lift(CONSTANT).shape[1:])
        with torch.no_grad():
            assert float(f(noisy)[:, 0].var()) == pytest.approx(ratio, rel=0.02)


def test_noise_left_by_25_crops_of_a_resized_image() -> None:
    rows = torch.arange(32.0) - 15.5
    blob = torch.exp(-(rows[:, None] ** 2 + rows**2) / (2 * 6.0**2))
    gabor = blob * torch.cos(2 * np.pi * torch.arange(32.0) / 8.0)
    geometry = PatchGeometry.grid((32, 32), 32, 1, before=Resize((36, 36)))
    for w, ratio in ((torch.ones(32, 32) / 32.0, 0.9500), (blob, 0.9729), (gabor, 0.4901)):
        f = linear(w / w.norm(), geometry, GRID)
        assert float(slope(f, torch.zeros(1, 1, 36, 36)).norm()) == pytest.approx(ratio, abs=1e-3)
    # claimed / true radius of noise on every patch, by the receptive filter
    for w, ratio in ((torch.ones(32, 32), 5.33), (blob, 5.46), (gabor, 2.61)):
        f = linear(w / w.norm(), geometry)
        true = float(slope(f, torch.zeros(1, 1, 32, 32)).norm())
        assert 5.0 * true == pytest.approx(ratio, abs=0.01)
        assert 5.0 * true <= geometry.norm(STACK)


def test_a_noisy_ring_costs_a_little_radius_and_is_certified() -> None:
    # noise behind zero padding: on the ring as well, where no input is
    w = normal(8, 8, seed=3)
    geometry = PatchGeometry.grid((8, 8), 8, 2, before=Pad(2))
    f = linear(w / w.norm(), geometry, GRID)
    x = normal(1, 1, 8, 8, seed=4)
    assert f.lift_norm == 1.0
    assert len(geometry.offsets) == 9
    gradient = slope(f, f.lift(x))
    inside = gradient[:, 2:10, 2:10].norm()
    margin = 1.25 * float(gradient.norm())   # it is linear in x
    x = x * margin / float(f(f.lift(x)).detach()[0, 0])
    found = certified(f, x, n=100_000)
    with_ring, alone = margin / float(gradient.norm()), margin / float(inside)
    assert 0.97 * with_ring < found.radius[0] <= with_ring < alone
    assert found.raw_radius[0] == found.radius[0]
    silent = certified(linear(w / w.norm(), geometry), x, n=100_000)   # the ring stays zero
    assert with_ring < silent.radius[0] <= alone


# ---------------------------------------------------------------------- reductions


def test_max_is_the_most_confident_patch() -> None:
    logits = 2.0 * normal(5000, 1, 7, 5)
    outputs = logits[:, 0].transpose(0, 1)
    best = outputs.softmax(-1).flatten(2).amax(-1).argmax(0)
    expected = outputs[best, torch.arange(5000)].argmax(1)
    found = PatchReduce(Outputs(), stack_of(7, 5), reduction=Max())(logits)
    assert torch.equal(found.argmax(1), expected)
    raw = PatchReduce(Outputs(), stack_of(7, 5), reduction=Max(softmax=False))(logits)
    assert float((raw.argmax(1) != expected).float().mean()) == pytest.approx(0.39, abs=0.03)


def test_two_patches_of_two_classes_leave_nothing_to_choose() -> None:
    logits = normal(5000, 1, 2, 2)
    rules = (Max(), Mean(), RAW, Vote())
    found = [PatchReduce(Outputs(), stack_of(2, 2), reduction=rule)(logits).argmax(1) for rule in rules]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_constants_on_the_logits_of_a_patch() -> None:
    logits = 2.0 * normal(2000, 1, 4, 5)
    moved = logits + 5.0 * normal(2000, 1, 4, 1, seed=1)
    for reduction in (Max(), RAW, Mean(), Vote(), Max(softmax=False)):
        f = PatchReduce(Outputs(), stack_of(4, 5), reduction=reduction)
        assert torch.equal(f(logits).argmax(1), f(moved).argmax(1)) == (reduction != Max(softmax=False))


def test_scores_are_logits_of_what_they_say() -> None:
    logits = 3.0 * normal(200, 1, 5, 4)
    outputs = logits[:, 0].transpose(0, 1)
    mean = PatchReduce(Outputs(), stack_of(5, 4))(logits)
    torch.testing.assert_close(mean.softmax(1), outputs.softmax(-1).mean(0))
    torch.testing.assert_close(mean.exp(), outputs.softmax(-1).mean(0))
    vote = PatchReduce(Outputs(), stack_of(5, 4), reduction=Vote())(logits).exp() * 5
    counts = nn.functional.one_hot(outputs.argmax(-1), 4).sum(0)
    torch.testing.assert_close(vote, counts + outputs.softmax(-1).mean(0) / 2)
    torch.testing.assert_close(PatchReduce(Outputs(), stack_of(5, 4), reduction=RAW)(logits), outputs.mean(0))
    saturated = torch.tensor([[[[200.0, 0.0, 0.0], [0.0, 0.0, 100.0]]]])
    for reduction in (Mean(), Max(), Vote()):   # probabilities that underflow are no reason for an invalid vote
        assert torch.isfinite(PatchReduce(Outputs(), stack_of(2, 3), reduction=reduction)(saturated)).all()


@pytest.mark.parametrize("reduction", [Mean(), RAW, Max(), Vote()])
def test_bad_outputs_of_one_patch_spoil_the_vote(reduction) -> None:
    f = PatchReduce(Outputs(), stack_of(3, 2), reduction=reduction).eval()
    x = torch.tensor([[[[2.0, 0.0], [torch.nan, 0.0], [2.0, 0.0]]], [[[2.0, 0.0], [0.0, torch.inf], [2.0, 0.0]]]])
    votes = count_votes(f, x, Gaussian(0.1), 100, num_classes=2, seed=0)
    assert votes.sum() == 0


def test_ties_of_votes_go_to_the_more_probable_class() -> None:
    f = PatchReduce(Outputs(), stack_of(2, 3), reduction=Vote())
    assert f(torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 0.0, 3.0]]]])).argmax(1).item() == 2
    tie = f(torch.tensor([[[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]]))[0]
    assert tie[0] == tie[1] > tie[2]   # an exact tie is left to be counted as invalid


@pytest.mark.parametrize("reduction", [Mean(), RAW, Max(), Vote()])
def test_order_of_patches_and_names_of_classes(reduction) -> None:
    logits = 3.0 * normal(500, 1, 6, 4)
    f = PatchReduce(Outputs(), stack_of(6, 4), reduction=reduction)
    scores, order, names = f(logits), torch.randperm(6, generator=torch.Generator().manual_seed(0)), [2, 0, 3, 1]
    shuffled = f(logits[:, :, order])
    if isinstance(reduction, Max):
        assert torch.equal(shuffled, scores)
    torch.testing.assert_close(shuffled, scores, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(f(logits[..., names]), scores[:, names], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(f(logits[[7]]), scores[[7]], atol=2e-6, rtol=1e-6)   # a row is alone


# ---------------------------------------------------------------------- fewer passes


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("reduction", [Mean(), Vote()])
@pytest.mark.parametrize("consensus", [None, 3])
def test_early_exit_names_the_same_winner(reduction, k: int, consensus: int | None) -> None:
    logits = 8.0 * normal(20_000, 1, 9, k)   # confident patches, so that much is decided early
    logits[:, :, :, 0] += 4.0
    seen = []
    f = PatchReduce(Outputs(), stack_of(9, k), reduction=reduction, consensus=consensus, block=1).eval()
    fast = PatchReduce(Outputs(), stack_of(9, k), reduction=reduction, consensus=consensus, block=1, early_exit=True)
    fast.f.register_forward_hook(lambda *call: seen.append(len(call[2])))
    with torch.no_grad():
        full, early = f(logits), fast.eval()(logits)
        assert len(fast(logits[:0])) == 0
    clear = full.topk(2).values.diff().abs()[:, 0] > 1e-5   # rounding decides the others
    assert clear.float().mean() > 0.999
    assert torch.equal(full.argmax(1)[clear], early.argmax(1)[clear])
    assert set(seen) == {0, 20_000}   # every pass has the same shape
    assert np.count_nonzero(seen) <= 9
    torch.testing.assert_close(fast(logits), full)   # where gradients are taken, from all patches


def test_early_exit_saves_what_is_certain_and_no_more() -> None:
    sure = torch.tensor([30.0, 0.0])
    open_ = torch.stack([sure, sure.flip(0)] * 4 + [sure])
    x = torch.stack([torch.stack([sure] * 9), open_])[:, None]
    f = PatchReduce(Outputs(), stack_of(9, 2), early_exit=True, block=1)
    calls = []
    f.f.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].flatten(1).clone()))
    with torch.no_grad():
        assert f(x).argmax(1).tolist() == [0, 0]
    assert len(calls) == 5 + 2   # five of nine agree; then two patches of the row that is left fit one pass
    assert all(len(call) == 2 for call in calls)


def test_consensus_is_another_classifier_and_keeps_the_promise() -> None:
    logits = 2.0 * normal(20_000, 1, 5, 3)
    full = PatchReduce(Outputs(), stack_of(5, 3))(logits).argmax(1)
    first = PatchReduce(Outputs(), stack_of(5, 3), consensus=2)(logits).argmax(1)
    two = logits[:, 0, :2].argmax(-1)
    agree = two[:, 0] == two[:, 1]
    assert torch.equal(first[agree], two[agree, 0])
    assert torch.equal(first[~agree], full[~agree])
    assert 0.01 < float((first != full).float().mean()) < 0.3
    # its own boundary, on the fixture, by bisection on the exact law of margins along the gradient
    f = linear(BLUR, NINE, consensus=2)
    x = CONSTANT * 0.6
    found = certified(f, x, n=100_000)
    direction = slope(linear(BLUR, NINE), CONSTANT)
    direction /= direction.norm()
    inside, outside = (
        count_votes(f, x - step * direction, Gaussian(SIGMA), 100_000, num_classes=2, seed=8)[0, 0] / 100_000
        for step in (float(found.radius[0]), 0.38)
    )
    assert inside > 0.5
    assert outside < 0.5


@pytest.mark.parametrize("call, message", [
    (lambda: PatchReduce(Outputs(), stack_of(3, 2), consensus=4), "consensus must be at most the number of patches, 3"),
    (lambda: PatchReduce(Outputs(), stack_of(3, 2), consensus=0), "consensus must be at least 1"),
    (lambda: PatchReduce(Outputs(), stack_of(3, 2), reduction=Max(), early_exit=True), "early_exit needs"),
    (lambda: PatchReduce(Outputs(), stack_of(3, 2), reduction=RAW, early_exit=True), "early_exit needs"),
    (lambda: PatchReduce(Outputs(), stack_of(3, 2), block=0), "block must be at least 1"),
    (lambda: PatchReduce(Outputs(), stack_of(3, 2))(torch.zeros(1, 1, 2, 2)), "does not fit"),
    (lambda: PatchReduce(Outputs(), stack_of(3, 2)).lift(torch.zeros(1, 6)), "does not fit"),
    (lambda: PatchReduce(Outputs(), stack_of(3, 2), placement=STACK)(torch.zeros(1, 1, 3, 2)), "does not fit"),
    (lambda: PatchReduce(Outputs(), stack_of(3, 2), placement=GRID)(torch.zeros(1, 1, 3, 3)), "does not fit"),
    (lambda: Lifted(Gaussian(0.5), 0.0), "lift_norm must be finite and > 0"),
])   # fmt: skip
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_consensus_alone_lets_the_maximum_exit() -> None:
    logits = 3.0 * normal(3000, 1, 6, 3) + torch.tensor([4.0, 0.0, 0.0])
    settings = {"reduction": Max(), "consensus": 2}
    calls = []
    fast = PatchReduce(Outputs(), stack_of(6, 3), early_exit=True, block=1, **settings)
    fast.f.register_forward_hook(lambda *call: calls.append(len(call[2])))
    slow = PatchReduce(Outputs(), stack_of(6, 3), **settings)
    with torch.no_grad():
        assert torch.equal(slow(logits).argmax(1), fast(logits).argmax(1))
    assert 2 < len(calls) < 6


# ---------------------------------------------------------------------- as a module


def test_patches_are_where_the_geometry_says() -> None:
    x = normal(2, 3, 9, 7)
    geometry = PatchGeometry.random((9, 7), (4, 5), 6, seed=1)
    stack = PatchReduce(nn.Flatten(), geometry, placement=STACK).lift(x)
    assert stack.shape == (2, 6, 3, 4, 5)
    for patch, (a, b) in enumerate(geometry.offsets):
        assert torch.equal(stack[:, patch], x[:, :, a : a + 4, b : b + 5])
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 4)).eval()
    expected = torch.stack([network(stack[:, p]) for p in range(6)]).softmax(-1).mean(0).log()
    for placement in (SHARED, GRID, STACK):
        f = PatchReduce(network, geometry, placement=placement)
        torch.testing.assert_close(f(f.lift(x)), expected)


@pytest.mark.parametrize("before", [
    Pad(2), Resize((12, 12)), Resize((12, 12), "bicubic"), Resize((5, 6), "bilinear", True),
])   # fmt: skip
def test_placements_agree_without_noise_and_with_pytorch(before) -> None:
    x = normal(3, 2, 8, 8)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 16, 4)).eval()
    geometry = PatchGeometry.corners((8, 8), 4, before=before)
    if isinstance(before, Pad):
        canvas = nn.functional.pad(x, [2] * 4)
    else:
        settings = {"mode": before.mode, "align_corners": False, "antialias": before.antialias}
        canvas = nn.functional.interpolate(x, size=before.size, **settings)
    expected = torch.stack([network(canvas[:, :, a : a + 4, b : b + 4]) for a, b in geometry.offsets])
    expected = expected.softmax(-1).mean(0).log()
    for placement in (SHARED, GRID, STACK):
        f = PatchReduce(network, geometry, placement=placement)
        torch.testing.assert_close(f(f.lift(x)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("placement", [SHARED, STACK])
def test_votes_do_not_depend_on_how_work_is_split(placement: Placement) -> None:
    x, noise = torch.from_numpy(X[:3]), Gaussian(0.3)
    network = trained_on_patches()
    counts = []
    for block in (1, 21, 1000):
        f = PatchReduce(network, NINE, placement=placement, block=block).eval()
        counts.append(count_votes(f, f.lift(x), noise, 300, num_classes=10, seed=9, block=100))
    assert all(torch.equal(counts[0], other) for other in counts[1:])
    alone = count_votes(f, f.lift(x[[2]]), noise, 300, num_classes=10, seed=9, indices=[2], block=100)
    assert torch.equal(alone[0], counts[0][2])
    f = PatchReduce(network, NINE, placement=placement).eval()
    settings = {"num_classes": 10, "n": 200, "seed": 1}
    joined = [certify(f, f.lift(x[[row]]), noise, indices=[row], **settings) for row in range(3)]
    assert [int(c.count[0]) for c in joined] == certify(f, f.lift(x), noise, **settings).count.tolist()


def trained_on_patches(epochs: int = 6, sigma: float = 0.3) -> nn.Module:
    """A small network for patches of 6 x 6, trained under noise; the same in each run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, 10),
        )   # fmt: skip
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        x, y = torch.from_numpy(X[TRAIN]), torch.from_numpy(Y[TRAIN])
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                a, b = torch.randint(0, 3, (2,)).tolist()
                noisy = (x[rows] + sigma * torch.randn(len(rows), 1, 8, 8))[:, :, a : a + 6, b : b + 6]
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(noisy), y[rows]).backward()
                optimizer.step()
    return network.eval()


@pytest.mark.slow
def test_attacks_within_the_radius_never_change_the_class() -> None:
    network, x, y = trained_on_patches(), torch.from_numpy(X[TEST][:14]), torch.from_numpy(Y[TEST][:14])
    attack, sigma, flipped = SmoothedPGD(steps=15, samples=16), 0.3, {}
    for placement in (SHARED, STACK):
        f = PatchReduce(network, NINE, placement=placement).eval()
        found = certify(f, f.lift(x), f.lifted(Gaussian(sigma)), num_classes=10, n=10_000, n0=100, seed=3)
        found = PatchCertificates.of(found, f.lift_norm)
        assert (~found.abstained).sum() >= 11
        assert (found.prediction == y.numpy()).sum() >= 10
        soft = SmoothedModule(f, sigma, samples=48)

        def changed(radii: np.ndarray, f=f, found=found, soft=soft) -> int:
            budget, rows = torch.from_numpy(radii).float().view(-1, 1, 1, 1), torch.arange(len(x))
            delta = torch.zeros_like(x)
            for _ in range(12):   # through the lift, on the bank
                here = (x + delta).requires_grad_()
                (slopes,) = torch.autograd.grad(-soft(here)[rows, torch.tensor(found.prediction)].sum(), here)
                steepest = slopes / slopes.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
                delta = delta + 0.25 * budget * steepest
                norms = delta.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
                delta = delta * (budget * (1 - 1e-6) / norms).clamp_max(1.0)
            votes = count_votes(f, f.lift(x + delta), Gaussian(sigma), 10_000, num_classes=10, seed=4)
            return int((votes.argmax(1).numpy() != found.prediction)[~found.abstained].sum())

        assert changed(0.99 * found.radius) == 0
        flipped[placement] = changed(found.raw_radius)
    assert flipped[SHARED] == 0
    assert flipped[STACK] > 0   # the same attack, at the radius that forgets the map
    f = PatchReduce(network, NINE).eval()
    moved = attack.perturb(f, x, y, Gaussian(sigma), 2.0, seed=0)
    votes = count_votes(f, moved, Gaussian(sigma), 1000, num_classes=10, seed=4)
    assert (votes.argmax(1) != y).float().mean() > 0.5   # and it is an attack worth the name


def test_the_soft_view_is_the_mean_over_the_bank_and_its_gradient_reaches_the_input() -> None:
    network, x = trained_on_patches(epochs=1), torch.from_numpy(X[:2])
    for placement, before in ((SHARED, None), (GRID, Pad(1)), (STACK, None)):
        geometry = PatchGeometry.grid((8, 8), 6, 2, before=before)
        whole, parts = (PatchReduce(network, geometry, placement=placement, block=b) for b in (10_000, 1))
        soft, again = (SmoothedModule(f, 0.3, samples=5, block=10).eval() for f in (whole, parts))
        bank = standard_normal((5, *whole.lift(x).shape[1:]), Key(0, 0, Stage.BANK, 1)) * 0.3
        expected = torch.stack([whole(whole.lift(x) + draw).softmax(1) for draw in bank]).mean(0).log()
        torch.testing.assert_close(soft(x), expected, atol=1e-5, rtol=1e-5)
        gradients = []
        for view in (soft, again):
            leaf = x.clone().requires_grad_()
            gradients.append(torch.autograd.grad(view(leaf)[:, 3].sum(), leaf)[0])
        assert gradients[0].abs().sum() > 0
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
        assert again.train()(x).shape == (2, 10)


@pytest.mark.parametrize("performance", [
    Performance(channels_last=True), Performance(dtype="bfloat16"), Performance(dtype="bfloat16", channels_last=True),
])   # fmt: skip
def test_layouts_and_dtypes(performance: Performance) -> None:
    network = build("resnet20", (3, 32, 32), 10, seed=0)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_var.fill_(2.0)
        network.linear.weight.mul_(3.0)
    for before in (Pad(2), Resize((36, 36))):
        f = PatchReduce(network, PatchGeometry.grid((32, 32), 32, 4, before=before), transform=Normalize(0.5, 0.25))
        voter = Voter(BaseClassifier(f.eval()), performance)
        assert not any(isinstance(part, nn.BatchNorm2d) for part in voter.modules())   # folded inside
        layouts = []
        inner = voter.f.network.f.network
        inner.register_forward_pre_hook(lambda _, x, seen=layouts: seen.append(x[0]))
        x = normal(6, 3, 32, 32)
        with torch.no_grad():
            scores, plain = voter(x), f(x)
        assert scores.dtype == torch.float32
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in layouts) or not performance.channels_last
        tolerance = 1e-3 if performance.dtype == "float32" else 0.15 * float(plain.abs().max())
        assert float((scores - plain).abs().max()) <= tolerance
        close = {"atol": 1e-4 if performance.dtype == "float32" else 0.05, "rtol": 0.05}
        torch.testing.assert_close(voter(x[[4, 1]]).detach(), scores[[4, 1]], **close)   # rows alone


def test_whole_networks_in_other_dtypes() -> None:
    x = normal(2, 1, 8, 8)
    geometry = PatchGeometry.corners((8, 8), 6, before=Resize((9, 9)))
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    expected = PatchReduce(network, geometry)(x)
    wide = PatchReduce(copy.deepcopy(network).double(), geometry)(x)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected, atol=1e-5, rtol=1e-5)
    narrow = PatchReduce(copy.deepcopy(network).bfloat16(), geometry)(x)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, expected, atol=0.05, rtol=0.05)
    state = PatchReduce(network, geometry).state_dict()
    assert set(state) == {"f.network.1.weight", "f.network.1.bias"}   # weights only


def test_passes_have_one_shape_and_a_bounded_size() -> None:
    seen = []
    network = Function(lambda x: seen.append(tuple(x.shape)) or x.flatten(1)[:, :2])
    geometry = PatchGeometry.random((12, 12), 6, 12, seed=0)
    for block, shape in ((1, 10), (35, 30), (40, 40), (10_000, 120)):
        seen.clear()
        PatchReduce(network, geometry, block=block)(normal(10, 1, 12, 12))
        assert set(seen) == {(shape, 1, 6, 6)}
        assert len(seen) * shape == 120


def test_volumes_and_clips_take_the_same_road() -> None:
    x = normal(2, 3, 6, 8, 7)
    geometry = PatchGeometry.corners((6, 8, 7), (4, 5, 7))
    assert len(geometry.offsets) == 5   # both corners of two axes, and the middle
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5 * 7, 4))
    f = PatchReduce(network, geometry, reduction=RAW)
    boxes = [x[:, :, a : a + 4, b : b + 5, c : c + 7] for a, b, c in geometry.offsets]
    torch.testing.assert_close(f(x), torch.stack([network(box) for box in boxes]).mean(0))


def test_certified_vote_of_patches_against_the_truth() -> None:
    # two linear classifiers of disjoint halves and their vote, and one of all three thirds; the boundary is known
    thirds = PatchGeometry.grid((1, 9), (1, 3), (1, 3))
    w = torch.tensor([1.0, 1.0, 1.0]) / np.sqrt(3.0)
    f, vote, sigma = Linear(w), CertifiedVote(thirds), 0.5
    margins = np.array([0.5, 0.6, 0.7])
    x = torch.from_numpy(np.repeat(margins / np.sqrt(3.0), 3).astype(np.float32)).view(1, 1, 1, 9)
    stack = PatchReduce(f, thirds, placement=STACK).lift(x)
    settings = {"num_classes": 2, "n": 50_000, "rule": OneSided(vote.level(0.001))}
    found = vote.combine([certify(f, stack[:, p], Gaussian(sigma), seed=p, **settings) for p in range(3)])
    truth = np.hypot(*np.sort(margins)[:2])   # two of three have to change
    assert 0.97 * truth < found.radius[0] < truth
    assert found.alpha[0] == pytest.approx(0.001)
    assert found.n[0] == 150_000


PROBE = """
import sys
import torch
from torch import nn
from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.modules import PatchReduce
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.theory.patches import Pad, PatchGeometry

torch.set_num_threads(1)
network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
f = PatchReduce(network, PatchGeometry.grid((32, 32), 32, 4, before=Pad(2))).eval()
certify(f, torch.full((1, 3, 32, 32), 0.5), Gaussian(0.5), num_classes=10, n=int(sys.argv[1]), seed=0)
# of this process alone: getrusage begins with the peak of the one that started it
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_does_not_grow_with_draws() -> None:
    small, large = (
        int(subprocess.run([sys.executable, "-c", PROBE, n], capture_output=True, text=True, check=True).stdout)
        for n in ("1000", "30000")
    )
    assert large <= 1.10 * small


class Waits(TorchDispatchMode):
    """Notes the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        masks = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masks or name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_early_exits_only() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval()
    for before in (None, Pad(1), Resize((9, 9))):
        geometry = PatchGeometry.corners((8, 8), 6, before=before)
        for settings in ({}, {"reduction": Vote()}, {"reduction": Max(), "consensus": 3}, {"early_exit": True}):
            f = PatchReduce(network, geometry, **settings).eval()
            with torch.no_grad(), Waits() as waits:
                f(CONSTANT.expand(5, -1, -1, -1))
            assert bool(waits.seen) == ("early_exit" in settings)
            if before == Pad(1) and "early_exit" not in settings:   # and the compiler sees one graph
                torch.compiler.reset()
                compiled = torch.compile(f, fullgraph=True, backend="eager", dynamic=False)
                with torch.no_grad():
                    torch.testing.assert_close(compiled(CONSTANT), f(CONSTANT))

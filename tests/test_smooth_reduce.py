"""PyTorchSmoothReduce: patches inside f, what each placement is worth, and attacks that would catch a lie."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from art.defences.preprocessor import FeatureSqueezing
from closed_forms import allowed
from support import TEST, TRAIN, X, Y, digits_network
from torch import nn

from art_rs_plugins import PyTorchPatchVote, PyTorchSmoothedClassifier, PyTorchSmoothReduce, SmoothedModule, audit
from art_rs_plugins.benchmark.attacks import ATTACKS, run_attack
from art_rs_plugins.smoothing.modules import Normalize, PatchReduce
from art_rs_plugins.smoothing.performance import Performance
from art_rs_plugins.smoothing.video import Max, Mean, Vote
from art_rs_plugins.theory.patches import PatchCertificates, PatchGeometry, Placement, Resize
from art_rs_plugins.theory.rules import OneSided, Sequential

CORNERS = PatchGeometry.corners((8, 8), 6)


def patch_network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def reduce(network: nn.Module, family: type = PyTorchSmoothReduce, **settings):
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", "geometry": CORNERS, **settings}
    settings = {"clip_values": (0, 1), **settings}
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    return family(network, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer, **settings)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    network = patch_network()
    reduce(network).fit(X[TRAIN], Y[TRAIN], batch_size=64, nb_epochs=12)
    return network


def test_it_is_plain_smoothing_of_the_network_of_all_patches(network: nn.Module) -> None:
    x = X[TEST][:12]
    for settings in ({}, {"reduction": Max()}, {"reduction": Vote()}, {"consensus": 3}, {"early_exit": True}):
        own = reduce(network, **settings).certificates(x, n=1_000, seed=2)
        whole = PatchReduce(network, CORNERS, **settings)
        plain = PyTorchSmoothedClassifier(
            whole, nn.CrossEntropyLoss(), (1, 8, 8), 10, scale=0.25, sample_size=100, device_type="cpu"
        ).certificates(x, n=1_000, seed=2)
        assert np.array_equal(own.radius, plain.radius)
        assert np.array_equal(own.count, plain.count)
        assert isinstance(own, PatchCertificates)
        assert np.all(own.lift_norm == 1.0)


def test_accuracy_and_certificates_of_a_trained_network(network: nn.Module) -> None:
    classifier = reduce(network)
    found = classifier.certificates(X[TEST][:60], n=1_000, seed=0)
    assert np.mean((found.prediction == Y[TEST][:60]) & (found.radius > 0.1)) > 0.6
    assert np.mean(classifier.predict(X[TEST][:60], seed=1).argmax(axis=1) == Y[TEST][:60]) > 0.8


def linear(weight: np.ndarray) -> nn.Module:
    """Two classes, by the sign of a linear function of one patch."""
    layer = nn.Linear(len(weight), 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.stack([weight, -weight])).float())
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize("placement", [Placement.SHARED_INPUT, Placement.SHARED_RESIZED, Placement.PER_PATCH])
def test_radii_hold_for_linear_networks_and_the_published_one_does_not(placement: Placement) -> None:
    """The mean of logits of linear patches is linear in x: its true distance to the boundary is a closed form."""
    geometry = PatchGeometry.grid((8, 8), 8, 2, before=Resize((12, 12)))
    weight = np.ones(64)   # sees low frequencies, which the patches share
    classifier = PyTorchSmoothReduce(
        linear(weight),
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        2,
        scale=0.5,
        sample_size=100,
        alpha=0.001,
        device_type="cpu",
        geometry=geometry,
        reduction=Mean(),
        placement=placement,
    )
    base = classifier.model.base
    basis = torch.eye(64).view(64, 1, 8, 8)
    with torch.no_grad():
        canvas = PatchReduce(linear(weight), geometry, placement=Placement.SHARED_RESIZED).lift(basis)
        rows = torch.stack(
            [canvas[:, 0, a : a + 8, b : b + 8].flatten(1) @ torch.ones(64) for a, b in geometry.offsets]
        ).mean(dim=0).numpy()
    direction = rows / np.linalg.norm(rows)
    distance = np.array([0.05, 0.1, 0.2, 0.3, 0.4])
    x = (distance[:, None] * direction).reshape(-1, 1, 8, 8).astype(np.float32)
    found = classifier.certificates(x, n=20_000, seed=3)
    assert np.all(found.prediction == 0)
    assert np.all(found.radius <= distance + 1e-6)
    assert np.all(found.radius[2:] > 0.0)
    assert found.lift_norm[0] == base.lift_norm
    if placement == Placement.PER_PATCH:   # the radius as published: about the stack, and false for the image
        assert np.all(found.raw_radius[2:] > 1.5 * distance[2:])
        step = 1.05 * distance[:, None, None, None] * direction.reshape(1, 1, 8, 8)
        flipped = classifier.predictions((x - step).astype(np.float32), n=5_000, seed=4)
        assert np.all(flipped.prediction[2:] == 1)


def test_attacks_at_the_certified_radius_never_succeed(network: nn.Module) -> None:
    """Smoothed PGD at .99 of the radius, at the published one (reported), and far beyond (a control)."""
    geometry = PatchGeometry.corners((8, 8), 6)
    classifier = reduce(network, geometry=geometry, placement=Placement.PER_PATCH, scale=0.5)
    x, y = X[TEST][:40], Y[TEST][:40]
    found = classifier.certificates(x, n=2_000, seed=0)
    right = np.flatnonzero((found.prediction == y) & (found.radius > 0))
    assert len(right) >= 10
    outcomes = {}
    claims = {"certified": found.radius, "published": found.raw_radius, "control": 4.0 * found.raw_radius}
    for name, radii in claims.items():
        broken = 0
        for row in right:
            point = torch.from_numpy(x[row : row + 1])
            view = classifier.attack_view(samples=64, seed=1).model
            moved = descend(view, point, int(y[row]), 0.99 * float(radii[row]))
            answer = classifier.predictions(moved.numpy(), n=2_000, alpha=1e-6, seed=9)
            broken += int(answer.prediction[0] != y[row] and not answer.abstained[0])
        outcomes[name] = broken
    print(f"\nof {len(right)} certificates, attacks succeed at .99 of the radius: {outcomes}")
    assert outcomes["certified"] == 0
    assert outcomes["control"] > len(right) / 2


def descend(view: nn.Module, x: torch.Tensor, label: int, budget: float) -> torch.Tensor:
    """l2 gradient ascent on the loss of the view."""
    delta = torch.zeros_like(x)
    for _ in range(20):
        here = (x + delta).requires_grad_()
        loss = nn.functional.cross_entropy(view(here), torch.tensor([label]))
        (gradient,) = torch.autograd.grad(loss, here)
        delta = delta + 0.2 * budget * gradient / gradient.norm().clamp_min(1e-12)
        delta = delta * min(1.0, budget * (1 - 1e-6) / float(delta.norm().clamp_min(1e-12)))
    return (x + delta).detach()


def test_a_planted_false_certificate_is_found_through_the_estimator(network: nn.Module) -> None:
    classifier = reduce(network)
    x, y = X[TEST][:30], Y[TEST][:30]
    honest = classifier.certificates(x, n=1_000, seed=0)
    budgets = (0.25, 0.5, 1.0)
    outcomes = run_attack(ATTACKS["pgd"], classifier, x, y, budgets=budgets, certificates=honest, steps=10, seed=0)
    assert not audit(honest, outcomes, y).contradictions
    planted = replace(honest, radius=honest.radius + 1.2 * ~honest.abstained)
    outcomes = run_attack(ATTACKS["pgd"], classifier, x, y, budgets=budgets, certificates=planted, steps=10, seed=0)
    assert audit(planted, outcomes, y).contradictions


def test_copies_keep_the_patches(network: nn.Module) -> None:
    classifier = reduce(network, reduction=Max(), scale=0.5)
    before = classifier.certificates(X[:4], n=500, seed=1)
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert np.array_equal(twin.certificates(X[:4], n=500, seed=1).count, before.count)
    again = PyTorchSmoothReduce.from_classifier(classifier)   # its network is not wrapped twice
    assert isinstance(again.model.base.f.network, nn.Sequential)
    assert np.array_equal(again.certificates(X[:4], n=500, seed=1).count, before.count)
    assert isinstance(classifier.attack_view().model, SmoothedModule | nn.Module)
    with pytest.raises(ValueError, match="reduction cannot be changed"):
        classifier.set_params(reduction=Vote())
    classifier.set_params(scale=0.3, reduction=classifier.reduction)
    assert classifier.scale == 0.3


def test_the_vote_of_patches_is_certified_through_its_patches() -> None:
    """Each patch decides by the sum of its pixels; disjoint patches, so that the sharp radius is known."""
    geometry = PatchGeometry.grid((8, 8), 4, 4)
    settings = {"scale": 0.25, "sample_size": 100, "alpha": 0.01, "device_type": "cpu"}
    vote = PyTorchPatchVote(linear(np.ones(16)), nn.CrossEntropyLoss(), (1, 8, 8), 2, geometry=geometry, **settings)
    distance = 0.3   # of every patch to its boundary
    x = np.full((1, 1, 8, 8), distance / 4.0, dtype=np.float32)
    found = vote.certificates(x, n=10_000, seed=0)
    # of four patches three are needed, so two have to be moved: true distance sqrt(2) * 0.3
    assert found.prediction[0] == 0
    assert 0.8 * np.sqrt(2) * distance < found.radius[0] <= np.sqrt(2) * distance
    assert found.alpha[0] == pytest.approx(0.01)
    moved = x.copy()
    moved[0, 0, :4] -= 1.05 * distance / 4.0   # two patches beyond their boundaries
    assert vote.predictions(x, n=1_000, seed=1).abstained.tolist() == [False]
    assert vote.predictions(moved, n=20_000, seed=1).abstained.tolist() == [True]
    named = vote.certificates(x, radii=[0.1, 0.2], seed=0)
    assert named.radius[0] <= np.sqrt(2) * distance


@pytest.mark.slow
def test_vote_of_patches_errs_no_more_than_alpha() -> None:
    geometry, alpha, runs = PatchGeometry.grid((4, 4), 2, 2), 0.2, 300
    settings = {"scale": 0.25, "sample_size": 20, "alpha": alpha, "device_type": "cpu"}
    vote = PyTorchPatchVote(linear(np.ones(4)), nn.CrossEntropyLoss(), (1, 4, 4), 2, geometry=geometry, **settings)
    distance = 0.15
    x = np.full((runs, 1, 4, 4), distance / 2.0, dtype=np.float32)
    radius = vote.certificates(x, n=300, seed=5).radius
    assert (radius > np.sqrt(2) * distance).sum() <= allowed(runs, alpha)
    assert (1.3 * radius > np.sqrt(2) * distance).sum() > allowed(runs, alpha)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"geometry": PatchGeometry.corners((9, 9), 6)}, ValueError, "geometry is of inputs of size"),
        ({"geometry": None}, TypeError, "geometry must be a PatchGeometry"),
        ({"placement": Placement.COMMON_PATCH}, ValueError, "no radius is certified"),
        ({"consensus": 9}, ValueError, "consensus must be at most"),
        ({"geometry": PatchGeometry.corners((8, 8), 4)}, ValueError, "model cannot take inputs"),
    ],
)
def test_bad_settings_are_named(settings, error, words) -> None:
    with pytest.raises(error, match=words):
        reduce(patch_network(), **settings)


@pytest.mark.parametrize("placement", [Placement.SHARED_INPUT, Placement.PER_PATCH])
def test_preprocessing_meets_the_noisy_patches(placement: Placement) -> None:
    """Normalisation in ART's way and as a layer are one and the same."""
    network = patch_network()
    by_art = reduce(network, placement=placement, preprocessing=(0.4, 0.5))
    as_layer = reduce(nn.Sequential(Normalize(0.4, 0.5), network), placement=placement)
    found = [each.certificates(X[:5], n=500, seed=3) for each in (by_art, as_layer)]
    assert np.array_equal(found[0].count, found[1].count)
    assert np.array_equal(by_art.predict(X[:5], seed=1), as_layer.predict(X[:5], seed=1))
    gradients = [each.loss_gradient(X[:5], Y[:5]) for each in (by_art, as_layer)]
    assert np.allclose(*gradients, atol=1e-6)
    bare = [each.loss_gradient(X[:5], Y[:5], sampling=False) for each in (by_art, as_layer)]
    assert np.allclose(*bare, atol=1e-6)


def test_passes_count_every_patch_and_the_block_bounds_them(network: nn.Module) -> None:
    classifier = reduce(network, performance=Performance(block=200))
    found = classifier.certificates(X[:3], n=1_000, seed=0)
    assert found.passes.tolist() == [5 * 1_100] * 3
    classifier.performance = Performance(block=100)
    assert classifier.model.base.block == 100
    assert np.array_equal(classifier.certificates(X[:3], n=1_000, seed=0).count, found.count)
    assert reduce(network, PyTorchPatchVote).certificates(X[:3], n=1_000, seed=0).passes.tolist() == [5 * 1_100] * 3


def test_reductions_share_their_draws_and_keep_their_bits(network: nn.Module) -> None:
    network = copy.deepcopy(network)
    reductions, rules = (Mean(), Max(), Vote()), (OneSided(0.001), Sequential((0.0, 0.1), 0.001))
    shared = reduce(network, consensus=2)
    draws = {"n": 1000, "n0": 50, "seed": 3, "indices": [4, 9, 2]}
    found = iter(shared.compare(X[:3], rules, reductions=reductions, **draws))
    for reduction in reductions:
        alone = reduce(network, reduction=reduction, consensus=2)
        for rule in rules:
            mine = next(found)
            theirs = alone.certificates(X[:3], rule=rule, **draws)
            for name in ("prediction", "radius", "count", "runner_up_count", "n", "passes", "lift_norm"):
                assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
    assert len({tuple(c.count) for c in shared.compare(X[:3], rules[:1], reductions=reductions, **draws)}) > 1
    with torch.no_grad():
        network[-1].bias += torch.arange(len(network[-1].bias)) % 2 * 5.0   # the joint estimator is asked anew
    again = shared.compare(X[:3], rules[:1], reductions=(Max(),), **draws)[0]
    theirs = reduce(network, reduction=Max(), consensus=2).certificates(X[:3], rule=rules[0], **draws)
    assert np.array_equal(again.count, theirs.count)


def test_reductions_that_cannot_be_compared_are_refused(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="joint outcomes"):
        reduce(network).compare(X[:1], [OneSided()], reductions=(Mean(),) * 5, n=100)
    with pytest.raises(ValueError, match="no reductions to compare"):
        reduce(network, PyTorchPatchVote).compare(X[:1], [OneSided()], reductions=(Mean(),), n=100)
    with pytest.raises(ValueError, match="at least one reduction"):
        reduce(network).compare(X[:1], [OneSided()], reductions=(), n=100)


def test_placements_behind_the_input_are_not_trained_here() -> None:
    with pytest.raises(ValueError, match="train the network of one patch"):
        reduce(patch_network(), placement=Placement.PER_PATCH).fit(X[:8], Y[:8], nb_epochs=1)


@pytest.mark.parametrize("placement", [Placement.SHARED_INPUT, Placement.PER_PATCH])
def test_smoothed_pgd_aims_at_what_is_certified(network: nn.Module, placement: Placement) -> None:
    """Behind a map as on the input: within the budget, downhill, and right about a planted false certificate."""
    classifier = reduce(network, placement=placement)
    x, y = X[TEST][:30], Y[TEST][:30]
    moved = ATTACKS["smoothed-pgd"].make(classifier, 1.0, 10, 0)(x, y)
    assert np.linalg.norm((moved - x).reshape(30, -1), axis=1).max() <= 1.0 + 1e-5
    assert moved.min() >= 0.0
    assert moved.max() <= 1.0
    honest = classifier.certificates(x, n=1_000, seed=0)
    planted = replace(honest, radius=honest.radius + 1.2 * ~honest.abstained)
    for certificates, expected in ((honest, False), (planted, True)):
        attack = ATTACKS["smoothed-pgd"]
        found = run_attack(attack, classifier, x, y, budgets=(1.0,), certificates=certificates, steps=10, seed=0)
        assert bool(audit(certificates, found, y).contradictions) == expected


def test_a_changed_defence_votes_at_once_whatever_the_performance(network: nn.Module) -> None:
    settings = {"performance": Performance("bfloat16"), "preprocessing_defences": FeatureSqueezing((0, 1), bit_depth=8)}
    classifier = reduce(copy.deepcopy(network), **settings)
    classifier.certificates(X[:3], n=200, seed=0)
    classifier.set_params(preprocessing_defences=FeatureSqueezing((0, 1), bit_depth=1))
    fresh = reduce(network, **{**settings, "preprocessing_defences": FeatureSqueezing((0, 1), bit_depth=1)})
    asked = {"n": 200, "seed": 0}
    assert np.array_equal(classifier.certificates(X[:3], **asked).count, fresh.certificates(X[:3], **asked).count)


def test_comparing_holds_inputs_to_the_limits_of_now(network: nn.Module) -> None:
    classifier = reduce(network, clip_values=None)
    classifier.compare(X[:1] + 5, [OneSided()], reductions=(Mean(),), n=100)
    classifier.set_params(clip_values=(0, 1))
    with pytest.raises(ValueError, match="clip_values"):
        classifier.compare(X[:1] + 5, [OneSided()], reductions=(Mean(),), n=100)


def test_patches_of_a_classifier_with_preprocessing(network: nn.Module) -> None:
    plain = PyTorchSmoothedClassifier(
        digits_network(), nn.CrossEntropyLoss(), (1, 8, 8), 10, device_type="cpu", preprocessing=(0.5, 0.5), scale=0.25
    )
    whole = PatchGeometry.grid((8, 8), 8, 8)
    patched = PyTorchSmoothReduce.from_classifier(plain, geometry=whole)
    asked = {"n": 200, "n0": 50, "seed": 0}
    assert np.array_equal(patched.certificates(X[:3], **asked).count, plain.certificates(X[:3], **asked).count)

"""PyTorchADRE: trained by its loss, certified by its rules, and an ART estimator like its parent."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from support import TEST, TRAIN, X, Y, digits_network
from torch import nn

from art_rs_plugins import PyTorchADRE, PyTorchSmoothedClassifier, SequentialTwoSided, SmoothAdv, TwoSided
from art_rs_plugins.smoothing.losses import ADRE, MACER


def adre(network: nn.Module, **settings) -> PyTorchADRE:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    settings = {"sample_size": 100, "scale": 0.25, "device_type": "cpu", **settings}
    return PyTorchADRE(network, nn.CrossEntropyLoss(), (1, 8, 8), 10, optimizer, **settings)


@pytest.fixture(scope="module")
def trained() -> PyTorchADRE:
    found = adre(digits_network(), draws=4)
    found.fit(X[TRAIN], Y[TRAIN], batch_size=64, nb_epochs=3)
    return found


def test_fit_minimises_the_regularised_loss(trained: PyTorchADRE) -> None:
    assert [epoch.inputs for epoch in trained.history_] == [1437] * 3
    assert trained.history_[-1].noisy_accuracy > 0.75
    plain = adre(digits_network(), weight=0.0, draws=4)
    plain.fit(X[TRAIN], Y[TRAIN], batch_size=64, nb_epochs=3)
    heavy = adre(digits_network(), weight=1.0, draws=4)
    heavy.fit(X[TRAIN], Y[TRAIN], batch_size=64, nb_epochs=3)
    assert heavy.history_[-1].loss < 0 < plain.history_[-1].loss   # log of the runner-up, with a plus sign

    def runner_up(classifier: PyTorchADRE) -> float:
        scores = np.sort(classifier.attack_view().predict(X[TEST]), axis=1)
        return float(scores[:, -2].mean())

    assert runner_up(heavy) < runner_up(plain)


def test_rules_are_two_sided_and_any_estimator_takes_them(trained: PyTorchADRE) -> None:
    x = X[TEST][:20]
    own = trained.certificates(x, n=2_000, seed=1)
    parent = PyTorchSmoothedClassifier.from_classifier(trained)
    same = parent.certificates(x, n=2_000, seed=1, rule=TwoSided(trained.alpha))
    assert np.array_equal(own.radius, same.radius)
    assert np.array_equal(own.p_upper, same.p_upper)
    one = parent.certificates(x, n=2_000, seed=1)
    at_share = parent.certificates(x, n=2_000, seed=1, rule=type(parent._rule(None))(0.9 * trained.alpha))
    assert np.array_equal(one.count, own.count)
    assert np.all(own.radius >= at_share.radius)
    named = trained.certificates(x, radii=[0.1, 0.2], n=2_000, seed=1)
    again = parent.certificates(x, n=2_000, seed=1, rule=SequentialTwoSided((0.1, 0.2), trained.alpha))
    assert np.array_equal(named.radius, again.radius)
    assert set(np.unique(named.radius)) <= {0.0, 0.1, 0.2}


def test_settings_survive_copies_and_changes(trained: PyTorchADRE) -> None:
    classifier = adre(digits_network(), weight=0.3, split=None, adversary=SmoothAdv(0.1, steps=1))
    for twin in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier)), classifier.clone_for_refitting()):
        assert (twin.weight, twin.split, twin.draws) == (0.3, None, 8)
        assert twin.adversary.eps == 0.1
        assert twin.objective == ADRE(0.3)
    classifier.set_params(weight=0.5, split=0.7)
    assert (classifier.objective, classifier.split) == (ADRE(0.5), 0.7)
    with pytest.raises(ValueError, match="weight"):
        classifier.set_params(weight=-1.0, split=0.8)
    assert (classifier.weight, classifier.split) == (0.5, 0.7)


def test_adversarial_training_runs_and_eps_0_is_adre() -> None:
    networks = [digits_network() for _ in range(3)]
    histories = []
    for network, adversary in zip(networks, (None, SmoothAdv(0.0), SmoothAdv(0.5, steps=2, warmup=0)), strict=True):
        classifier = adre(network, draws=2, adversary=adversary)
        classifier.fit(X[:256], Y[:256], nb_epochs=2)
        histories.append(classifier.history_)
    assert histories[0] == histories[1]
    assert histories[2][-1].loss > histories[0][-1].loss
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_other_objectives_go_through_the_same_fit() -> None:
    network = digits_network()
    classifier = PyTorchSmoothedClassifier(
        network,
        nn.CrossEntropyLoss(),
        (1, 8, 8),
        10,
        torch.optim.SGD(network.parameters(), lr=0.05),
        scale=0.25,
        sample_size=100,
        objective=MACER(0.25, 1.0),
        draws=4,
    )
    classifier.fit(X[:256], Y[:256], nb_epochs=2)
    assert classifier.history_[-1].loss < classifier.history_[0].loss


def test_art_attacks_it(trained: PyTorchADRE) -> None:
    attack = ProjectedGradientDescentPyTorch(
        trained, norm=2, eps=1.5, eps_step=0.4, max_iter=10, batch_size=64, verbose=False
    )
    x, y = X[TEST][:64], Y[TEST][:64]
    before, after = (trained.predictions(points, n=200, seed=5).prediction for points in (x, attack.generate(x, y)))
    assert (after == y).mean() < (before == y).mean() - 0.3


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"weight": -0.1}, ValueError, "weight must be finite and >= 0"),
        ({"weight": float("nan")}, ValueError, "weight must be finite and >= 0"),
        ({"draws": 0}, ValueError, "draws must be at least 1"),
        ({"split": 0.0}, ValueError, "split must be None or lie strictly between 0 and 1"),
        ({"split": 1.0}, ValueError, "split must be None or lie strictly between 0 and 1"),
        ({"objective": ADRE()}, TypeError, "use PyTorchSmoothedClassifier"),
        ({"adversary": 0.5}, TypeError, "adversary must have a method attack"),
    ],
)
def test_bad_settings_are_named(settings, error, words) -> None:
    with pytest.raises(error, match=words):
        adre(digits_network(), **settings)
    with pytest.raises(ValueError, match="eps must be finite and >= 0"):
        SmoothAdv(-0.5)


def test_labels_outside_the_classes_and_one_draw() -> None:
    with pytest.raises(ValueError, match="y must be class indices"):
        adre(digits_network()).fit(X[:8], np.full(8, 10))
    with pytest.warns(UserWarning, match="draws=1"):
        adre(digits_network(), draws=1).fit(X[:8], Y[:8], nb_epochs=1)


def test_the_adversary_is_held_to_the_range_of_the_inputs() -> None:
    seen = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.detach())
            return self.linear(x.flatten(1))

    network = Watch()
    classifier = adre(network, scale=1e-6, clip_values=(0, 1), adversary=SmoothAdv(5.0, steps=1, warmup=0), draws=2)
    seen.clear()
    classifier.fit(X[:64], Y[:64], nb_epochs=1)
    noise = 1e-5
    assert all(float(x.min()) > -noise and float(x.max()) < 1 + noise for x in seen)
    assert classifier.adversary.clip_values is None


def test_losses_of_logits_refuse_networks_that_end_in_a_softmax() -> None:
    classifier = adre(nn.Sequential(digits_network(), nn.Softmax(dim=1)))
    with pytest.raises(ValueError, match="without that layer"):
        classifier.fit(X[:8], Y[:8], nb_epochs=1)

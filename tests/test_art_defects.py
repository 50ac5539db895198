"""Defects of ART 1.20.1 around randomized smoothing: which are repaired, and which are refused with a clear error.

| where in ART | what was wrong | here | test |
|---|---|---|---|
| fit / predict / certify with preprocessing | sigma means std 0.5 in training, 2.0 in prediction | repaired | sigma_means_the_same_everywhere |
| loss_gradient, default | gradient of the undefended network | repaired | test_estimator: gradients_are_those_of_... |
| loss_gradient(sampling=True), clamp | result of clamp discarded | repaired | test_estimator: gradients_are_those_of_... |
| loss_gradient(sampling=True), softmax | applied twice on probability outputs | repaired | probability_outputs_are_not_softmaxed_twice |
| loss_gradient(sampling=True), labels, tensors | crashes on indices and on tensors | repaired | test_estimator: tensors_lists_... |
| loss_gradient(sampling=True), memory | batch times sample_size in one forward pass | repaired | gradients_are_taken_in_blocks |
| class_gradient | NotImplementedError | repaired | test_estimator: gradients_are_those_of_... |
| predict(training_mode=...) | TypeError, keyword given twice | repaired | callers_keywords_are_absorbed |
| certify, predict: noise | NumPy's global generator, float64, on the host | repaired | global_generators_are_left_alone |
| certify: memory | grows with n | repaired | test_memory |
| certify(n < 10), predict(sample_size <= 10) | abstains always, in silence | warned | test_estimator: hopeless_budgets_... |
| certify(n=0); scale, alpha, sample_size | crash, or a certificate of NaN | refused | test_estimator: bad_numbers_..., bad_settings_.. |
| certify: lists, tensors | not accepted | repaired | test_estimator: tensors_lists_... |
| certify: statsmodels | undeclared dependency | repaired | statsmodels_is_not_needed |
| fit: float64 | crash | repaired | fit_takes_float64_and_soft_labels |
| fit_generator | trains without noise | repaired | trainers_meet_the_noise |
| AdversarialTrainer TRADES / AWP / OAAT | train without noise | repaired | trainers_meet_the_noise |
| AdversarialTrainer FBF | trains in whatever mode it finds: after model.train() under fresh noise, after model.eval() on the smoothed score with its fixed bank | kept | fbf_trains_in_the_mode_it_finds |
| TRADES / AWP with a scheduler of torch 2 | "Invalid Pytorch scheduler": looks for a class that StepLR left | ART's own | schedulers_of_torch_are_refused_by_trades_and_awp |
| AdversarialTrainer with an attack on attack_view | another estimator to ART: examples are made once, before training | kept | attacks_on_the_view_are_precomputed |
| AutoPGD(ce, dlr), Brendel-Bethge, AutoAttack | attack the undefended network | repaired | model_is_the_smoothed_classifier |
| AutoPGD(ce, dlr), Brendel-Bethge, AutoAttack on the estimator | refuse probabilities, unless the all-ones input abstains | see view | test_attacks: refusals_hang_on_one_input |
| C&W, DeepFool on the estimator | crash | see view | test_attacks: what_the_other_attacks_do_... |
| Square, HopSkipJump, Boundary on the estimator | flat scores, abstention = class 0 | see view | test_attacks: what_the_other_attacks_do_... |
| clone_for_refitting, set_params | derived state goes stale | repaired | test_estimator: params_and_clones_..., set_... |
| pickle, deepcopy | leave files in the data folder, not portable | repaired | test_estimator: copies_carry_everything_... |
| two NumPy defences | NotImplementedError | repaired | any_defence_sits_behind_the_noise |
| FeatureSqueezing under NumPy 2 | crash (double and float) | repaired | any_defence_sits_behind_the_noise |
| JpegCompression | crash on negative noisy pixels | repaired | any_defence_sits_behind_the_noise |
| per-channel mean where width equals channels | normalises the columns | repaired | means_belong_to_channels |
| (n, t, c, h, w) inputs, mean for each channel | means belong to the first axis, t | refused | clips_with_time_first |
| augmentation=True beside smoothing noise | noise of two kinds adds up | kept | augmentations_change_training_data_alone |
| postprocessing_defences | take part in some paths only | refused | postprocessors_are_refused |
| metrics: clever_u | crash (class_gradient) | repaired | metrics_are_those_of_a_half_space |
| metrics: adversarial_accuracy | counts an abstention as class 0 | ART's own | abstentions_are_class_zero_to_arts_metrics |
| detectors | nothing: activations of the base network at clean inputs | kept | detectors_run |
"""

from __future__ import annotations

import copy
import inspect
import sys

import numpy as np
import pytest
import torch
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.data_generators import NumpyDataGenerator, PyTorchDataGenerator
from art.defences.detector.evasion import BinaryActivationDetector, BinaryInputDetector
from art.defences.postprocessor import HighConfidence
from art.defences.preprocessor import (
    FeatureSqueezing,
    GaussianAugmentation,
    JpegCompression,
    LabelSmoothing,
    SpatialSmoothing,
)
from art.defences.trainer import (
    AdversarialTrainer,
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerFBFPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerOAATPyTorch,
    AdversarialTrainerTRADESPyTorch,
)
from art.estimators.classification import PyTorchClassifier
from art.metrics import adversarial_accuracy, clever_u, empirical_robustness, loss_sensitivity
from support import X, Y, digits_network, recording, smooth
from torch import nn

from art_rs_plugins import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.performance import Performance

HALF = np.full((64, 1, 8, 8), 0.5, np.float32)
LABELS = np.arange(64) % 10


@pytest.mark.parametrize("preprocessing", [None, (0.0, 1.0), (0.5, 0.25), (np.array([0.3]), np.array([0.25]))])
def test_sigma_means_the_same_everywhere(preprocessing):
    recorder, estimator = recording(preprocessing=preprocessing)
    divisor = 1.0 if preprocessing in (None, (0.0, 1.0)) else 0.25
    for act in (
        lambda: estimator.fit(HALF, LABELS, nb_epochs=2, batch_size=32),
        lambda: estimator.predict(HALF),
        lambda: estimator.certify(HALF[:4], n=500),
        lambda: estimator.loss_gradient(HALF, LABELS),
        lambda: estimator.attack_view().predict(HALF),
        lambda: estimator.loss_gradient(HALF, LABELS, training_mode=True),
    ):
        recorder.seen = []
        act()
        recorder.seen = [seen for seen in recorder.seen if len(seen) != 4]   # not the probe of other rows' influence
        assert recorder.std() == pytest.approx(0.5 / divisor, rel=0.03), inspect.getsource(act)
    estimator.loss_gradient(HALF, LABELS, sampling=False)
    assert recorder.std() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["numpy", "loader", "madry", "adversarial", "trades", "awp", "oaat"])
def test_trainers_meet_the_noise(kind, monkeypatch):
    recorder, estimator = recording(clip_values=(0, 1))
    one_hot = np.eye(10, dtype=np.float32)[LABELS]
    tiny = {"eps": 1e-3, "eps_step": 1e-3}
    pgd = ProjectedGradientDescent(estimator, max_iter=1, verbose=False, **tiny)
    proxy, other = copy.deepcopy(estimator), copy.deepcopy(estimator)
    trained = []
    forward = recorder.forward

    def remember(x: torch.Tensor) -> torch.Tensor:
        if estimator.model.training:
            trained.append(x.detach().flatten(1).std().item())
        return forward(x)

    monkeypatch.setattr(recorder, "forward", remember)
    if kind == "numpy":
        estimator.fit_generator(NumpyDataGenerator(HALF, one_hot, batch_size=32), nb_epochs=2)
    elif kind == "loader":
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.from_numpy(HALF), torch.from_numpy(one_hot)), batch_size=32
        )
        estimator.fit_generator(PyTorchDataGenerator(loader, size=64, batch_size=32), nb_epochs=2)
    elif kind == "madry":
        trainer = AdversarialTrainerMadryPGD(
            estimator, nb_epochs=1, batch_size=32, eps=1e-3, eps_step=1e-3, max_iter=1
        )
        trainer.fit(HALF, one_hot, validation_data=None)
    elif kind == "adversarial":
        AdversarialTrainer(estimator, FastGradientMethod(estimator, **tiny)).fit(
            HALF, one_hot, nb_epochs=2, batch_size=32
        )
    elif kind == "trades":
        AdversarialTrainerTRADESPyTorch(estimator, pgd, beta=1.0).fit(HALF, one_hot, nb_epochs=1, batch_size=32)
    elif kind == "awp":
        trainer = AdversarialTrainerAWPPyTorch(estimator, proxy, pgd, mode="PGD", gamma=0.01, beta=1.0, warmup=0)
        trainer.fit(HALF, one_hot, nb_epochs=1, batch_size=32)
    else:
        settings = {
            "epsilon": 1e-3, "i_epsilon": 1e-3, "alternate_iter_eps": 1.0, "max_iter": 1,
            "beta": 1.0, "awp_gamma": 0.01, "awp_warmup": 0, "oaat_warmup": 0, "mixup_epsilon": 1e-3,
            "lr": 1e-3, "lr_schedule": "cosine", "momentum": 0.0, "weight_decay": 0.0,
            "list_swa_epoch": [], "list_swa_tau": [], "swa_save_epoch": 9,
        }   # fmt: skip
        trainer = AdversarialTrainerOAATPyTorch(estimator, proxy, other, [], pgd, settings)
        trainer.fit(HALF, one_hot, nb_epochs=1, batch_size=32)
    assert len(trained) >= 2
    assert np.mean(trained) == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("training", [True, False])
def test_fbf_trains_in_the_mode_it_finds(training, monkeypatch):
    recorder, estimator = recording(clip_values=(0, 1), bank_samples=15)
    estimator.model.train(training)
    steps, before = [], recorder.linear.weight.detach().clone()
    forward = recorder.forward

    def remember(x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:   # a step of training, not the gradient that its attack asks for
            steps.append(x.detach().flatten(1))
        return forward(x)

    monkeypatch.setattr(recorder, "forward", remember)
    AdversarialTrainerFBFPyTorch(estimator, eps=1e-3).fit(
        HALF, np.eye(10, dtype=np.float32)[LABELS], nb_epochs=1, batch_size=32
    )
    first, second = steps
    assert len(first) == (32 if training else 15 * 32)
    assert float(first.std()) == pytest.approx(0.5, rel=0.08)
    assert torch.allclose(first, second, atol=5e-3) is not training   # the inputs differ by 2 eps at most
    assert not torch.equal(recorder.linear.weight, before)
    assert estimator.model.training is training


def test_schedulers_of_torch_are_refused_by_trades_and_awp():
    _, estimator = recording(clip_values=(0, 1))
    pgd = ProjectedGradientDescent(estimator, max_iter=1, eps=1e-3, eps_step=1e-3, verbose=False)
    scheduler = torch.optim.lr_scheduler.StepLR(estimator.optimizer, step_size=1)
    awp = AdversarialTrainerAWPPyTorch(
        estimator, copy.deepcopy(estimator), pgd, mode="PGD", gamma=0.01, beta=1.0, warmup=0
    )
    for trainer in (AdversarialTrainerTRADESPyTorch(estimator, pgd, beta=1.0), awp):
        with pytest.raises(ValueError, match="Invalid Pytorch scheduler"):
            trainer.fit(HALF, np.eye(10, dtype=np.float32)[LABELS], nb_epochs=1, scheduler=scheduler)


def test_attacks_on_the_view_are_precomputed(monkeypatch):
    _, estimator = recording(clip_values=(0, 1))
    one_hot = np.eye(10, dtype=np.float32)[LABELS]
    for target, times in ((estimator, [32] * 6), (estimator.attack_view(), [64])):
        attack = FastGradientMethod(target, eps=1e-3)
        generate, calls = attack.generate, []
        monkeypatch.setattr(
            attack, "generate", lambda x, y, calls=calls, make=generate: calls.append(len(x)) or make(x, y)
        )
        AdversarialTrainer(estimator, attack, ratio=1.0).fit(HALF, one_hot, nb_epochs=3, batch_size=32)
        assert calls == times


def test_adversarial_training_draws_fresh_noise_for_every_batch():
    recorder, estimator = recording(clip_values=(0, 1))
    for _ in range(3):
        estimator.fit(HALF[:8], LABELS[:8], nb_epochs=1, batch_size=8)
    first, second, third = recorder.seen
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_fit_takes_float64_and_soft_labels():
    recorder, estimator = recording()
    soft = np.full((64, 10), 0.1)
    before = recorder.linear.weight.detach().clone()
    estimator.fit(HALF.astype(np.float64), soft, nb_epochs=1)
    assert not torch.equal(before, recorder.linear.weight)


def test_probability_outputs_are_not_softmaxed_twice():
    logits = digits_network()
    soft = nn.Sequential(*logits, nn.Softmax(dim=1))
    first, second = smooth(logits), smooth(soft)
    assert not first.model.probabilities
    assert second.model.probabilities
    assert np.allclose(first.attack_view().predict(X[:5]), second.attack_view().predict(X[:5]), atol=1e-5)
    assert np.allclose(first.loss_gradient(X[:5], Y[:5]), second.loss_gradient(X[:5], Y[:5]), atol=1e-5)


def test_gradients_are_taken_in_blocks():
    recorder, estimator = recording(performance=Performance(block=16))
    estimator.loss_gradient(HALF[:10], LABELS[:10])
    assert max(len(seen) for seen in recorder.seen) <= 16
    whole = smooth(recorder, scale=0.5, performance=Performance(block=1000)).loss_gradient(HALF[:10], LABELS[:10])
    assert np.allclose(estimator.loss_gradient(HALF[:10], LABELS[:10]), whole, atol=1e-6)


def test_callers_keywords_are_absorbed():
    estimator = smooth(digits_network())
    assert estimator.predict(X[:2], training_mode=False, logits=True, batch_size=1).shape == (2, 10)
    with pytest.raises(ValueError, match="is_abstain must be a bool"):
        estimator.predict(X[:2], is_abstain="yes")


def test_global_generators_are_left_alone():
    _, estimator = recording()
    np.random.seed(0)   # noqa: NPY002 - the global state is what is looked at
    torch.manual_seed(0)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()   # noqa: NPY002
    estimator.fit(HALF, LABELS, nb_epochs=1)
    estimator.certify(HALF[:1], n=100)
    estimator.predict(HALF[:1])
    estimator.loss_gradient(HALF[:1], LABELS[:1])
    assert np.array_equal(states[0], np.random.get_state()[1])   # noqa: NPY002
    assert torch.equal(states[1], torch.get_rng_state())


def test_statsmodels_is_not_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.stats.proportion", None)
    smooth(digits_network()).certify(X[:1], n=100)


def test_model_is_the_smoothed_classifier():
    """What AutoPGD, AutoAttack and Brendel-Bethge build inside themselves meets the noise."""
    recorder, estimator = recording()
    inner = PyTorchClassifier(estimator.model, nn.CrossEntropyLoss(), (1, 8, 8), 10, device_type="cpu")
    inner.predict(HALF[:8])
    assert recorder.std() == pytest.approx(0.5, rel=0.05)


def test_any_defence_sits_behind_the_noise():
    for defences in (
        FeatureSqueezing(clip_values=(0, 1), bit_depth=3),
        JpegCompression(clip_values=(0, 1), quality=80, channels_first=True),
        [SpatialSmoothing(window_size=3, channels_first=True), FeatureSqueezing(clip_values=(0, 1), bit_depth=4)],
    ):
        estimator = smooth(digits_network(), clip_values=(0, 1), preprocessing_defences=defences)
        found = estimator.certificates(X[:2], n=200, seed=0)
        assert np.all(found.count <= 200)
        assert np.isfinite(estimator.loss_gradient(X[:2], Y[:2])).all()
        assert estimator.get_params()["preprocessing_defences"] == (
            defences if isinstance(defences, list) else [defences]
        )
    # the defence is a part of f: votes are those of a network that squeezes by itself
    squeeze = FeatureSqueezing(clip_values=(0, 1), bit_depth=1)

    class Squeezing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = digits_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network((x.clamp(0, 1) * 1.0).round())

    defended = smooth(digits_network(), clip_values=(0, 1), preprocessing_defences=squeeze)
    inside = smooth(Squeezing())
    votes = [estimator.predictions(X[:5], n=300, seed=4).votes for estimator in (defended, inside)]
    assert np.array_equal(*votes)


def test_means_belong_to_channels():
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 4.0])
    network = nn.Sequential(nn.Flatten(), nn.Linear(27, 2))
    estimator = smooth(network, (3, 3, 3), 2, preprocessing=(mean, std))
    x = torch.rand(2, 3, 3, 3)
    centre, width = torch.tensor(mean).float(), torch.tensor(std).float()
    expected = network((x - centre.view(3, 1, 1)) / width.view(3, 1, 1))
    assert torch.allclose(estimator.model.f(x), expected, atol=1e-6)
    last = smooth(network, (3, 3, 3), 2, preprocessing=(mean, std), channels_first=False)
    assert torch.allclose(last.model.f(x), network((x - centre) / width), atol=1e-6)


def test_clips_with_time_first():
    """(t, c, h, w) certifies as it is; a mean for each channel would be taken for one of each moment."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 4 * 4, 2))
    x = np.random.default_rng(0).random((3, 2, 3, 4, 4), dtype=np.float32)
    assert np.all(smooth(network, (2, 3, 4, 4), 2).certificates(x, n=100).n == 100)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match="mean has 3 entries, but x has 2 channels"):
        smooth(network, (2, 3, 4, 4), 2, preprocessing=(mean, std))
    shaped = smooth(network, (2, 3, 4, 4), 2, preprocessing=(mean[:, None, None], std[:, None, None]))
    centre, width = (torch.tensor(part).float().view(3, 1, 1) for part in (mean, std))
    clips = torch.from_numpy(x)
    assert torch.allclose(shaped.model.f(clips), network((clips - centre) / width), atol=1e-6)


def test_augmentations_change_training_data_alone():
    recorder, estimator = recording(
        preprocessing_defences=[
            GaussianAugmentation(sigma=1e-6, augmentation=True, ratio=1.0),
            LabelSmoothing(max_value=0.9),
        ]
    )
    estimator.fit(HALF, LABELS, nb_epochs=1, batch_size=128)
    assert sum(len(seen) for seen in recorder.seen) == 128
    assert estimator.model.f.transform is None


def test_postprocessors_are_refused():
    with pytest.raises(ValueError, match="postprocessing_defences are not supported"):
        smooth(digits_network(), postprocessing_defences=HighConfidence(cutoff=0.2))


def half_space(**settings) -> PyTorchSmoothedClassifier:
    """Class 0 where the mean of 4 x 4 pixels is above 1/2: the distance is 4 (mean - 1/2), the logits' slope 6."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[0.75], [-0.75]]).expand(2, 16))
        network[1].bias.copy_(torch.tensor([-6.0, 6.0]))
    return smooth(network, (1, 4, 4), 2, clip_values=(0, 1), scale=0.01, **settings)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:scipy.*")   # clever_u fits a distribution to maxima that are equal
def test_metrics_are_those_of_a_half_space():
    estimator = half_space(bank_samples=64)
    x = np.full((1, 1, 4, 4), 0.55, np.float32)   # at distance 0.2
    settings = {"nb_batches": 3, "batch_size": 4, "radius": 0.1, "norm": 2, "verbose": False}
    view = estimator.attack_view()
    assert clever_u(view, x[0], **{**settings, "radius": 0.3}) == pytest.approx(0.2, rel=0.05)
    assert clever_u(view, x[0], **settings) == pytest.approx(0.1)   # never more than the radius
    votes = clever_u(estimator, x[0], **{**settings, "radius": 0.3})   # scores one and zero, over the slope of soft ones
    assert votes == pytest.approx(1 / 6, rel=0.05)
    robust = empirical_robustness(
        estimator, x, attack_name="fgsm", attack_params={"eps": 0.5, "eps_step": 0.02, "norm": 2}
    )
    assert 0.2 <= robust * np.linalg.norm(x) <= 0.2 + 2 * 0.02 + 0.01
    logit = 6 * 0.2
    expected = 6 / (1 + np.exp(logit))   # slope of the cross-entropy of the right class
    assert loss_sensitivity(estimator, x, np.array([[1.0, 0.0]], np.float32)) == pytest.approx(expected, rel=0.05)


def test_abstentions_are_class_zero_to_arts_metrics():
    class Undecided(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10)

    class Still:
        def generate(self, x: np.ndarray) -> np.ndarray:
            return x.copy()

    estimator = smooth(Undecided())
    assert estimator.predictions(X[:4], seed=0).abstained.all()
    labels = np.zeros(4, np.int64)
    assert adversarial_accuracy(estimator, X[:4], labels, attack_crafter=Still()) == 1.0
    assert estimator.certificates(X[:4], n=100).abstained.all()


def test_detectors_run():
    """A smoothed detector meets the noise in training; activations are those of the base network at clean inputs."""
    recorder, detector = recording(classes=2)
    clean = np.arange(64) % 2
    both = np.eye(2, dtype=np.float32)[clean]
    inputs = BinaryInputDetector(detector)
    inputs.fit(HALF, both, nb_epochs=1, batch_size=32)
    assert recorder.std() == pytest.approx(0.5, rel=0.03)
    report, found = inputs.detect(HALF[:5])
    assert report["predictions"].shape == (5, 2)
    assert found.shape == (5,)
    estimator = smooth(digits_network())
    head = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    plain = PyTorchClassifier(head, nn.CrossEntropyLoss(), (16, 4, 4), 2, optimizer=optimizer, device_type="cpu")
    activations = BinaryActivationDetector(estimator, plain, layer=1)
    activations.fit(X[:64], both, nb_epochs=1, batch_size=32)
    report, _ = activations.detect(X[:5])
    at_layer = estimator.model.base[:2](torch.from_numpy(X[:5])).detach().numpy()
    assert np.allclose(report["predictions"], plain.predict(at_layer), atol=1e-5)


def test_private_attributes_of_art_are_still_there():
    """What we override or read; ART is pinned to 1.20.*, and this fails where a new version moves them."""
    source = inspect.getsource(PyTorchClassifier)
    for name in ("_make_model_wrapper", "_model_wrapper", "_layer_names", "_device", "_optimizer", "_loss"):
        assert name in source, name
    estimator = smooth(digits_network())
    assert estimator._model._model is estimator.model
    for method in ("_update_preprocessing_operations", "_set_preprocessing", "_set_preprocessing_defences"):
        assert callable(getattr(estimator, method))
    assert callable(estimator.reduce_labels)
    assert estimator._device == torch.device("cpu")

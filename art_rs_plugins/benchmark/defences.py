"""ART's defences beside a certificate: where each goes in, and what the certificate is worth with it.

A certificate speaks of the base classifier f under noise. What happens after the noise is a part of f, and what happens
in training made f: neither can move the certificate. What happens to the input before the noise, or to the answer after
the votes, makes another classifier than the one that was certified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.defences.detector.evasion import BinaryInputDetector
from art.defences.preprocessor import (
    CutMix,
    Cutout,
    FeatureSqueezing,
    GaussianAugmentation,
    JpegCompression,
    LabelSmoothing,
    Mixup,
    SpatialSmoothing,
    TotalVarMin,
)
from art.defences.trainer import (
    AdversarialTrainer,
    AdversarialTrainerAWPPyTorch,
    AdversarialTrainerFBFPyTorch,
    AdversarialTrainerMadryPGD,
    AdversarialTrainerTRADESPyTorch,
)
from tabulate import tabulate
from torch import Tensor, nn

from art_rs_plugins.benchmark.config import check_name
from art_rs_plugins.benchmark.data import Dataset
from art_rs_plugins.benchmark.evasion import linf_budget
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.selectors import ScoreSelector

__all__ = ["DEFENCES", "Defence", "Ensemble", "Place", "Status", "check_defences", "preprocessors", "selector", "table"]


class Status(Enum):
    """What a certificate is worth with a defence."""

    SOUND = "sound"
    FACTOR = "sound with a factor"
    VOID = "voids the certificate"


class Place(Enum):
    """Where a defence goes in."""

    INSIDE = "inside f, after the noise"
    DATA = "training data"
    TRAINER = "training"
    BASE = "the base network"
    SELECTOR = "selector of a composition"
    INPUT = "the input, before the noise"
    ANSWER = "the answer, after the votes"


@dataclass(frozen=True, slots=True)
class Defence:
    """A defence of ART's and its place beside a certificate.

    Attributes
    ----------
    name : str
        As in configurations and tables.
    art : str
        Its class in ART.
    place : Place
        Where it goes in.
    status : Status
        What the certificate is worth with it.
    reason : str
        Why, in a sentence.
    make : callable, optional
        For ``INSIDE`` and ``DATA``, from a data set to ART's preprocessor; for ``TRAINER``, from (estimator, l2 budget,
        steps) to ART's trainer. None where it goes in by other means than a configuration.
    """

    name: str
    art: str
    place: Place
    status: Status
    reason: str
    make: Callable[..., Any] | None = None


def _squeeze(data: Dataset) -> FeatureSqueezing:
    return FeatureSqueezing(clip_values=data.clip_values, bit_depth=3, apply_fit=True)


def _jpeg(data: Dataset) -> JpegCompression:
    return JpegCompression(clip_values=data.clip_values, quality=75, channels_first=True, apply_fit=True)


def _median(data: Dataset) -> SpatialSmoothing:
    return SpatialSmoothing(window_size=3, channels_first=True, clip_values=data.clip_values, apply_fit=True)


def _variation(data: Dataset) -> TotalVarMin:
    # keeping every pixel makes it a function of its input; it takes the last axis for channels, so each column is one
    return TotalVarMin(prob=1.0, lamb=0.1, max_iter=5, clip_values=data.clip_values, apply_fit=False)


def _augment(data: Dataset) -> GaussianAugmentation:
    return GaussianAugmentation(sigma=0.05, augmentation=True, ratio=0.5, clip_values=data.clip_values)


def _attack(estimator: PyTorchSmoothedClassifier, budget: float, steps: int) -> ProjectedGradientDescent:
    settings = {"eps": budget, "eps_step": 2.5 * budget / steps, "max_iter": steps, "batch_size": 256}
    return ProjectedGradientDescent(estimator, norm=2, verbose=False, **settings)


def _adversarial(estimator: PyTorchSmoothedClassifier, budget: float, steps: int) -> AdversarialTrainer:
    return AdversarialTrainer(estimator, _attack(estimator, budget, steps), ratio=0.5)


def _madry(estimator: PyTorchSmoothedClassifier, budget: float, steps: int) -> AdversarialTrainerMadryPGD:
    eps = linf_budget(estimator, budget)
    return AdversarialTrainerMadryPGD(estimator, eps=eps, eps_step=2.5 * eps / steps, max_iter=steps)


def _trades(estimator: PyTorchSmoothedClassifier, budget: float, steps: int) -> AdversarialTrainerTRADESPyTorch:
    return AdversarialTrainerTRADESPyTorch(estimator, _attack(estimator, budget, steps), beta=1.0)


def _awp(estimator: PyTorchSmoothedClassifier, budget: float, steps: int) -> AdversarialTrainerAWPPyTorch:
    proxy, settings = estimator.clone_for_refitting(), {"mode": "PGD", "gamma": 0.005, "beta": 1.0, "warmup": 0}
    return AdversarialTrainerAWPPyTorch(estimator, proxy, _attack(estimator, budget, steps), **settings)


def _fast(estimator: PyTorchSmoothedClassifier, budget: float, steps: int) -> AdversarialTrainerFBFPyTorch:   # noqa: ARG001
    estimator.model.train()   # it trains in the mode that it finds
    return AdversarialTrainerFBFPyTorch(estimator, eps=linf_budget(estimator, budget))


_INSIDE = "a function of the noisy input is a part of f"
_RANDOM = "training data and labels only make f"
_TRAINED = "training only makes f; it meets noise of the same sigma"
_MOVED = "its jumps may carry two near inputs far apart, and no Lipschitz constant brings the radius back"
_DRESSED = "votes are counted before it, so that what is deployed is not what was certified"

DEFENCES: Mapping[str, Defence] = {
    defence.name: defence
    for defence in (
        Defence("feature-squeezing", "FeatureSqueezing", Place.INSIDE, Status.SOUND, _INSIDE, _squeeze),
        Defence("jpeg", "JpegCompression", Place.INSIDE, Status.SOUND, _INSIDE, _jpeg),
        Defence("spatial-smoothing", "SpatialSmoothing", Place.INSIDE, Status.SOUND, _INSIDE, _median),
        Defence("total-variation", "TotalVarMin(prob=1)", Place.INSIDE, Status.SOUND, _INSIDE, _variation),
        Defence("denoiser", "PixelDefend, any deterministic denoiser", Place.BASE, Status.SOUND, _INSIDE),
        Defence("gaussian-augmentation", "GaussianAugmentation", Place.DATA, Status.SOUND, _RANDOM, _augment),
        Defence("label-smoothing", "LabelSmoothing", Place.DATA, Status.SOUND, _RANDOM, lambda _: LabelSmoothing(0.9)),
        Defence(
            "cutout", "Cutout", Place.DATA, Status.SOUND, _RANDOM,
            lambda data: Cutout(length=max(1, data.x_test.shape[-1] // 4), channels_first=True),
        ),
        Defence("mixup", "Mixup", Place.DATA, Status.SOUND, _RANDOM, lambda data: Mixup(data.num_classes)),
        Defence(
            "cutmix", "CutMix", Place.DATA, Status.SOUND, _RANDOM,
            lambda data: CutMix(data.num_classes, channels_first=True),
        ),
        Defence("adversarial-training", "AdversarialTrainer", Place.TRAINER, Status.SOUND, _TRAINED, _adversarial),
        Defence("madry", "AdversarialTrainerMadryPGD", Place.TRAINER, Status.SOUND, _TRAINED, _madry),
        Defence("trades", "AdversarialTrainerTRADESPyTorch", Place.TRAINER, Status.SOUND, _TRAINED, _trades),
        Defence("awp", "AdversarialTrainerAWPPyTorch", Place.TRAINER, Status.SOUND, _TRAINED, _awp),
        Defence("fbf", "AdversarialTrainerFBFPyTorch", Place.TRAINER, Status.SOUND, _TRAINED, _fast),
        Defence("distillation", "DefensiveDistillation", Place.BASE, Status.SOUND, _RANDOM),
        Defence("ensemble", "EnsembleClassifier", Place.BASE, Status.SOUND, "the mean of the members is one f"),
        Defence(
            "detector", "BinaryInputDetector", Place.SELECTOR, Status.FACTOR,
            "smoothed as well, it has a radius of its own: the smaller one holds, and alpha is shared",
        ),
        Defence(
            "bare-detector", "BinaryInputDetector, BinaryActivationDetector", Place.INPUT, Status.VOID,
            "nobody knows how far it keeps its answer: whoever sets it off, or passes it, is not bound by the radius",
        ),
        Defence(
            "input-transform", "any preprocessor ahead of the noise", Place.INPUT, Status.VOID, _MOVED,
        ),
        Defence(
            "random-transform", "TotalVarMin(prob<1), GaussianAugmentation in prediction", Place.INSIDE, Status.VOID,
            "it draws from a global generator: no vote can be repeated, and nobody knows whether two are independent",
        ),
        Defence("reverse-sigmoid", "ReverseSigmoid", Place.ANSWER, Status.VOID, _DRESSED),
        Defence("high-confidence", "HighConfidence", Place.ANSWER, Status.VOID, _DRESSED),
        Defence("rounded", "Rounded", Place.ANSWER, Status.VOID, _DRESSED),
        Defence("gaussian-noise", "GaussianNoise", Place.ANSWER, Status.VOID, _DRESSED),
        Defence("class-labels", "ClassLabels", Place.ANSWER, Status.VOID, _DRESSED),
    )
}   # fmt: skip
"""Defences by name."""

_OTHERWISE = {
    Place.BASE: "make it a part of the network, and give that as model = 'package.module:factory'",
    Place.SELECTOR: "give PyTorchACES the selector that defences.selector makes of it",
    Place.DATA: "name it in the training of the network",
    Place.TRAINER: "name it in the training of the network",
}


def check_defences(names: Sequence[str], *, training: bool) -> list[Defence]:
    """Defences that a configuration may name, or the reason why not.

    Parameters
    ----------
    names : sequence of str
        Among `DEFENCES`.
    training : bool
        True where a network is trained, False where one is certified.

    Raises
    ------
    ValueError
        For an unknown one, with the nearest name; for one that voids the certificate, or has its place elsewhere, with
        the reason; for several trainers.
    """
    places = {Place.INSIDE, Place.DATA, Place.TRAINER} if training else {Place.INSIDE}
    found = [DEFENCES[check_name(name, DEFENCES, "defence")] for name in names]
    for defence in found:
        if defence.status is Status.VOID:
            raise ValueError(f"defence {defence.name!r} voids the certificate: {defence.reason}; leave it out")
        if defence.place not in places or defence.make is None:
            raise ValueError(f"defence {defence.name!r} does not go in here: {_OTHERWISE[defence.place]}")
    if sum(defence.place is Place.TRAINER for defence in found) > 1:
        raise ValueError(f"defences {', '.join(names)} hold more than one trainer; take one")
    return found


def preprocessors(names: Sequence[str], data: Dataset, *, training: bool = False) -> list[Any]:
    """ART's preprocessors for an estimator's ``preprocessing_defences``, in the order of the names."""
    found = check_defences(names, training=training)
    return [each.make(data) for each in found if each.place is not Place.TRAINER and each.make is not None]


def selector(detector: BinaryInputDetector, theta: float, *, sigma: float | None = None) -> ScoreSelector:
    """Selector of a composition out of a detector: certify what it scores as an attack with at most theta.

    Parameters
    ----------
    detector : BinaryInputDetector
        Of ART, around a `PyTorchSmoothedClassifier` of two classes, clean and attacked, trained under noise.
    theta : float
        In [0, 1].
    sigma : float, optional
        Noise level of its votes; its own by default.

    Raises
    ------
    TypeError, ValueError
        For another detector: one that is not smoothed has no radius, and one of activations no input to smooth.
    """
    inner = getattr(detector, "detector", None)
    if not isinstance(detector, BinaryInputDetector) or not isinstance(inner, PyTorchSmoothedClassifier):
        raise TypeError("detector must be a BinaryInputDetector around a PyTorchSmoothedClassifier, to have a radius")
    if inner.nb_classes != 2:
        raise ValueError(f"detector must know two classes, clean and attacked, got {inner.nb_classes}")
    level = inner.scale if sigma is None else sigma
    return ScoreSelector(theta, score=attack_probability, network=inner.model.f, sigma=level)


def attack_probability(log_p: Tensor) -> Tensor:
    """Probability of the second of two outputs, which ART's detectors take for an attack. Shape (m,)."""
    return log_p[:, 1].exp()


class Ensemble(nn.Module):
    """Mean probability of several networks, as one base network; returns its logarithm, (m, ...) to (m, k).

    Parameters
    ----------
    members : sequence of Module
        Networks that return logits; at least one.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("members must hold at least one network")
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Log of the mean softmax."""
        scores = torch.stack([member(x).log_softmax(dim=1) for member in self.members])
        return scores.logsumexp(dim=0) - torch.tensor(float(len(self.members))).log()


def table() -> str:
    """All defences as a Markdown table."""
    rows = [
        {
            "defence": defence.name,
            "of ART": defence.art,
            "where": defence.place.value,
            "with the certificate": defence.status.value,
            "why": defence.reason,
        }
        for defence in DEFENCES.values()
    ]
    return str(tabulate(rows, "keys", "github", disable_numparse=True))

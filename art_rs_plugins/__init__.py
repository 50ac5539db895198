"""Certified classifiers by randomized smoothing for the Adversarial Robustness Toolbox.

Public names are loaded on first use: importing ART costs seconds, and neither ``import art_rs_plugins`` nor
``art-rs --help`` should pay them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from art_rs_plugins.estimators.aces import PyTorchACES
    from art_rs_plugins.estimators.adre import PyTorchADRE
    from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier, share_votes
    from art_rs_plugins.estimators.data_dependent import PyTorchDataDependentSmoothing
    from art_rs_plugins.estimators.insta_rs import PyTorchInstaRS
    from art_rs_plugins.estimators.modes import Commit, Frozen
    from art_rs_plugins.estimators.selection import fit_selector
    from art_rs_plugins.estimators.smooth_reduce import PyTorchPatchVote, PyTorchSmoothReduce
    from art_rs_plugins.smoothing.adversary import SmoothAdv
    from art_rs_plugins.smoothing.certify import certify, predict
    from art_rs_plugins.smoothing.grid import GridGaussian
    from art_rs_plugins.smoothing.losses import ADRE, MACER, Consistency
    from art_rs_plugins.smoothing.modules import Normalize, SmoothedModule
    from art_rs_plugins.smoothing.noise import Gaussian
    from art_rs_plugins.smoothing.performance import Performance
    from art_rs_plugins.smoothing.sampling import count_votes
    from art_rs_plugins.smoothing.scales import Conditional
    from art_rs_plugins.smoothing.selectors import ConfidenceSelector, FixedSelector, ScoreSelector
    from art_rs_plugins.smoothing.sigma import GradientAscent, GridAscent, MultiStartSearch
    from art_rs_plugins.smoothing.sigma_table import SigmaTable
    from art_rs_plugins.theory.audit import AttackOutcomes, Audit, audit
    from art_rs_plugins.theory.certificates import Certificates
    from art_rs_plugins.theory.composition import Fallback
    from art_rs_plugins.theory.elastic import BinnedSigma, ElasticSigma, ExtendedSigma, NeighbourDistance
    from art_rs_plugins.theory.metrics import certified_accuracy
    from art_rs_plugins.theory.patches import PatchGeometry
    from art_rs_plugins.theory.regions import EndlessBudget, SharedBudget
    from art_rs_plugins.theory.rules import OneSided, Planned, Sequential
    from art_rs_plugins.theory.scales import Cascade, Envelope, Selector, SequentialScales
    from art_rs_plugins.theory.two_sided import SequentialTwoSided, TwoSided

__version__ = "0.1.0"

_HOMES = {
    "ADRE": "smoothing.losses",
    "AttackOutcomes": "theory.audit",
    "Audit": "theory.audit",
    "BinnedSigma": "theory.elastic",
    "Cascade": "theory.scales",
    "Certificates": "theory.certificates",
    "Commit": "estimators.modes",
    "Conditional": "smoothing.scales",
    "ConfidenceSelector": "smoothing.selectors",
    "Consistency": "smoothing.losses",
    "ElasticSigma": "theory.elastic",
    "EndlessBudget": "theory.regions",
    "Envelope": "theory.scales",
    "ExtendedSigma": "theory.elastic",
    "Fallback": "theory.composition",
    "FixedSelector": "smoothing.selectors",
    "Frozen": "estimators.modes",
    "Gaussian": "smoothing.noise",
    "GradientAscent": "smoothing.sigma",
    "GridAscent": "smoothing.sigma",
    "GridGaussian": "smoothing.grid",
    "MACER": "smoothing.losses",
    "MultiStartSearch": "smoothing.sigma",
    "NeighbourDistance": "theory.elastic",
    "Normalize": "smoothing.modules",
    "OneSided": "theory.rules",
    "PatchGeometry": "theory.patches",
    "Performance": "smoothing.performance",
    "Planned": "theory.rules",
    "PyTorchACES": "estimators.aces",
    "PyTorchADRE": "estimators.adre",
    "PyTorchDataDependentSmoothing": "estimators.data_dependent",
    "PyTorchInstaRS": "estimators.insta_rs",
    "PyTorchPatchVote": "estimators.smooth_reduce",
    "PyTorchSmoothReduce": "estimators.smooth_reduce",
    "PyTorchSmoothedClassifier": "estimators.base",
    "ScoreSelector": "smoothing.selectors",
    "Selector": "theory.scales",
    "Sequential": "theory.rules",
    "SequentialScales": "theory.scales",
    "SequentialTwoSided": "theory.two_sided",
    "SharedBudget": "theory.regions",
    "SigmaTable": "smoothing.sigma_table",
    "SmoothAdv": "smoothing.adversary",
    "SmoothedModule": "smoothing.modules",
    "TwoSided": "theory.two_sided",
    "audit": "theory.audit",
    "certified_accuracy": "theory.metrics",
    "certify": "smoothing.certify",
    "count_votes": "smoothing.sampling",
    "fit_selector": "estimators.selection",
    "predict": "smoothing.certify",
    "share_votes": "estimators.base",
}

__all__ = [
    "ADRE",
    "MACER",
    "AttackOutcomes",
    "Audit",
    "BinnedSigma",
    "Cascade",
    "Certificates",
    "Commit",
    "Conditional",
    "ConfidenceSelector",
    "Consistency",
    "ElasticSigma",
    "EndlessBudget",
    "Envelope",
    "ExtendedSigma",
    "Fallback",
    "FixedSelector",
    "Frozen",
    "Gaussian",
    "GradientAscent",
    "GridAscent",
    "GridGaussian",
    "MultiStartSearch",
    "NeighbourDistance",
    "Normalize",
    "OneSided",
    "PatchGeometry",
    "Performance",
    "Planned",
    "PyTorchACES",
    "PyTorchADRE",
    "PyTorchDataDependentSmoothing",
    "PyTorchInstaRS",
    "PyTorchPatchVote",
    "PyTorchSmoothReduce",
    "PyTorchSmoothedClassifier",
    "ScoreSelector",
    "Selector",
    "Sequential",
    "SequentialScales",
    "SequentialTwoSided",
    "SharedBudget",
    "SigmaTable",
    "SmoothAdv",
    "SmoothedModule",
    "TwoSided",
    "__version__",
    "audit",
    "certified_accuracy",
    "certify",
    "count_votes",
    "fit_selector",
    "predict",
    "share_votes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""Certified classifiers by randomized smoothing for the Adversarial Robustness Toolbox.

Public names are loaded on first use: importing ART costs seconds, and neither ``import art_rs_plugins`` nor
``art-rs --help`` should pay them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from art_rs_plugins.estimators.adre import PyTorchADRE
    from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
    from art_rs_plugins.smoothing.adversary import SmoothAdv
    from art_rs_plugins.smoothing.certify import certify, predict
    from art_rs_plugins.smoothing.grid import GridGaussian
    from art_rs_plugins.smoothing.losses import ADRE, MACER, Consistency
    from art_rs_plugins.smoothing.modules import Normalize, SmoothedModule
    from art_rs_plugins.smoothing.noise import Gaussian
    from art_rs_plugins.smoothing.performance import Performance
    from art_rs_plugins.smoothing.sampling import count_votes
    from art_rs_plugins.theory.audit import AttackOutcomes, Audit, audit
    from art_rs_plugins.theory.certificates import Certificates
    from art_rs_plugins.theory.metrics import certified_accuracy
    from art_rs_plugins.theory.rules import OneSided, Planned, Sequential
    from art_rs_plugins.theory.two_sided import SequentialTwoSided, TwoSided

__version__ = "0.1.0"

_HOMES = {
    "ADRE": "smoothing.losses",
    "AttackOutcomes": "theory.audit",
    "Audit": "theory.audit",
    "Certificates": "theory.certificates",
    "Consistency": "smoothing.losses",
    "Gaussian": "smoothing.noise",
    "GridGaussian": "smoothing.grid",
    "MACER": "smoothing.losses",
    "Normalize": "smoothing.modules",
    "OneSided": "theory.rules",
    "Performance": "smoothing.performance",
    "Planned": "theory.rules",
    "PyTorchADRE": "estimators.adre",
    "PyTorchSmoothedClassifier": "estimators.base",
    "Sequential": "theory.rules",
    "SequentialTwoSided": "theory.two_sided",
    "SmoothAdv": "smoothing.adversary",
    "SmoothedModule": "smoothing.modules",
    "TwoSided": "theory.two_sided",
    "audit": "theory.audit",
    "certified_accuracy": "theory.metrics",
    "certify": "smoothing.certify",
    "count_votes": "smoothing.sampling",
    "predict": "smoothing.certify",
}

__all__ = [
    "ADRE",
    "MACER",
    "AttackOutcomes",
    "Audit",
    "Certificates",
    "Consistency",
    "Gaussian",
    "GridGaussian",
    "Normalize",
    "OneSided",
    "Performance",
    "Planned",
    "PyTorchADRE",
    "PyTorchSmoothedClassifier",
    "Sequential",
    "SequentialTwoSided",
    "SmoothAdv",
    "SmoothedModule",
    "TwoSided",
    "__version__",
    "audit",
    "certified_accuracy",
    "certify",
    "count_votes",
    "predict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""From a configuration to a data set and an estimator: the methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from art_rs_plugins.benchmark.config import NOISES, RunConfig, check_name
from art_rs_plugins.benchmark.data import Dataset, load
from art_rs_plugins.benchmark.models import build, load_weights
from art_rs_plugins.benchmark.modes import data_dependent
from art_rs_plugins.estimators.adre import PyTorchADRE
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.estimators.insta_rs import PyTorchInstaRS
from art_rs_plugins.estimators.smooth_reduce import PyTorchSmoothReduce
from art_rs_plugins.smoothing.scales import Conditional
from art_rs_plugins.smoothing.sigma import MultiStartSearch
from art_rs_plugins.smoothing.video import Max, Mean, Vote
from art_rs_plugins.theory.patches import Pad, PatchGeometry, Placement
from art_rs_plugins.theory.scales import Cascade, Envelope

__all__ = ["CERTIFICATES", "METHODS", "REDUCTIONS", "open_estimator", "smooth"]

CERTIFICATES: dict[str, type[Envelope] | type[Cascade] | type[MultiStartSearch]] = {
    "envelope": Envelope,
    "cascade": Cascade,
    "conditional": MultiStartSearch,
}
"""Certificates of Insta-RS by name, with the class whose settings are among the options; alpha is the estimator's."""


def insta_rs(*args: Any, certificate: str = "envelope", **options: Any) -> PyTorchInstaRS:
    """`PyTorchInstaRS` from the values of a configuration, such as certificate = "envelope", sigmas = [0.25, 0.5]."""
    family = CERTIFICATES[check_name(certificate, CERTIFICATES, "certificate")]
    if family is not MultiStartSearch and "sigmas" not in options:
        raise ValueError(f"certificate {certificate!r} needs the option sigmas, such as sigmas = [0.25, 0.5]")
    names = [field.name for field in fields(family) if field.name in options and field.name != "alpha"]
    own: dict[str, Any] = {name: _frozen(options.pop(name)) for name in names}
    chosen = family(**own)
    made = Conditional(chosen) if isinstance(chosen, MultiStartSearch) else chosen
    return PyTorchInstaRS(*args, certificate=made, **options)


REDUCTIONS: dict[str, type[Mean] | type[Max] | type[Vote]] = {"mean": Mean, "max": Max, "vote": Vote}
"""Reductions of patches by name."""


def smooth_reduce(
    *args: Any, patch: int, stride: int, pad: int = 0, reduction: str = "mean", placement: str = "input", **options: Any
) -> PyTorchSmoothReduce:
    """`PyTorchSmoothReduce` from the values of a configuration: patches on a grid, of a padded image if need be."""
    placements = {"input": Placement.SHARED_INPUT, "padded": Placement.SHARED_RESIZED, "patch": Placement.PER_PATCH}
    check_name(reduction, REDUCTIONS, "reduction"), check_name(placement, placements, "placement")
    size = tuple(options["input_shape"][1:])
    geometry = PatchGeometry.grid(size, patch, stride, before=Pad(pad) if pad else None)
    settings: dict[str, Any] = {"reduction": REDUCTIONS[reduction](), "placement": placements[placement]}
    return PyTorchSmoothReduce(*args, geometry=geometry, **settings, **options)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


METHODS: dict[str, Callable[..., PyTorchSmoothedClassifier]] = {
    "smoothing": PyTorchSmoothedClassifier,
    "adre": PyTorchADRE,
    "insta-rs": insta_rs,
    "data-dependent": data_dependent,
    "smooth-reduce": smooth_reduce,
}
"""Estimators by name; the options of a configuration are arguments of the class."""


def smooth(
    network: nn.Module, data: Dataset, sigma: float, device: str, seed: int, method: str = "smoothing", **settings: Any
) -> PyTorchSmoothedClassifier:
    """Smoothed classifier of a network, for the inputs and classes of a data set."""
    return METHODS[check_name(method, METHODS, "method")](
        network,
        nn.CrossEntropyLoss(),
        input_shape=data.x_test.shape[1:],
        nb_classes=data.num_classes,
        clip_values=data.clip_values,
        device_type=device,
        scale=sigma,
        seed=seed,
        **settings,
    )


def open_estimator(
    config: RunConfig, block: int | None = None, folder: Path = Path()
) -> tuple[Dataset, PyTorchSmoothedClassifier]:
    """Data set and smoothed classifier of a configuration; `block` rows in a forward pass where it names none.

    A memory is a file of `folder`.

    Raises
    ------
    ValueError, TypeError, OSError
        For an unknown data set, architecture, method or option, or weights that are missing, truncated or of another
        network.
    """
    data = load(config.data)
    network = build(config.model, data.x_test.shape[1:], data.num_classes, seed=config.seed)
    if config.weights is not None:
        load_weights(network, Path(config.weights))
    elif ":" not in config.model:
        raise ValueError(f"weights are needed for model {config.model!r}; train it first, or give a factory's path")
    settings = {
        "sample_size": config.n0,
        "alpha": config.alpha,
        "noise": NOISES[config.noise],
        "performance": config.performance(block),
        **config.options,
    }
    if config.method == "data-dependent":
        settings |= {"dataset": data, "folder": folder}
    return data, smooth(network, data, config.sigma, config.device, config.seed, config.method, **settings)

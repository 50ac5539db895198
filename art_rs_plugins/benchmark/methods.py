"""From a configuration to a data set and an estimator: the methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from art_rs_plugins.benchmark.baselines import ArtSmoothing
from art_rs_plugins.benchmark.config import NOISES, RunConfig, check_name
from art_rs_plugins.benchmark.data import Dataset, load
from art_rs_plugins.benchmark.defences import preprocessors
from art_rs_plugins.benchmark.models import build, load_weights
from art_rs_plugins.benchmark.modes import data_dependent
from art_rs_plugins.estimators.aces import PyTorchACES
from art_rs_plugins.estimators.adre import PyTorchADRE
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.estimators.insta_rs import PyTorchInstaRS
from art_rs_plugins.estimators.selection import as_core
from art_rs_plugins.estimators.smooth_reduce import PyTorchSmoothReduce
from art_rs_plugins.smoothing.scales import Conditional
from art_rs_plugins.smoothing.selectors import ScoreSelector
from art_rs_plugins.smoothing.sigma import MultiStartSearch
from art_rs_plugins.smoothing.video import Max, Mean, Vote
from art_rs_plugins.theory.patches import Pad, PatchGeometry, Placement
from art_rs_plugins.theory.scales import Cascade, Envelope, Selector

__all__ = ["CERTIFICATES", "METHODS", "REDUCTIONS", "make_estimator", "open_estimator", "open_network", "smooth"]

CERTIFICATES: dict[str, type[Envelope] | type[Cascade] | type[Selector] | type[MultiStartSearch]] = {
    "envelope": Envelope,
    "cascade": Cascade,
    "selector": Selector,
    "conditional": MultiStartSearch,
}
"""Certificates of Insta-RS by name, with the class whose settings are among the options; alpha is the estimator's."""


def insta_rs(
    *args: Any,
    certificate: str = "envelope",
    selector_model: str | None = None,
    selector_weights: str | None = None,
    **options: Any,
) -> PyTorchInstaRS:
    """`PyTorchInstaRS` from the values of a configuration, such as certificate = "envelope", sigmas = [0.25, 0.5].

    The network of a ``selector`` comes from ``selector_model`` and ``selector_weights``; see `train_chooser`.
    """
    family = CERTIFICATES[check_name(certificate, CERTIFICATES, "certificate")]
    if family is not MultiStartSearch and "sigmas" not in options:
        raise ValueError(f"certificate {certificate!r} needs the option sigmas, such as sigmas = [0.25, 0.5]")
    names = [field.name for field in fields(family) if field.name in options and field.name != "alpha"]
    own: dict[str, Any] = {name: _frozen(options.pop(name)) for name in names}
    chosen = family(**own)
    made = Conditional(chosen) if isinstance(chosen, MultiStartSearch) else chosen
    classifier = PyTorchInstaRS(*args, certificate=made, **options)
    if selector_model is not None and selector_weights is not None:
        chooser = build(selector_model, classifier.input_shape, len(own["sigmas"]), seed=0)
        load_weights(chooser, Path(selector_weights))
        classifier.selector = chooser.eval()
    return classifier


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


def aces(
    network: nn.Module,
    *args: Any,
    core: str,
    core_weights: str,
    folder: Path,
    theta: float = 0.3,
    tau: float = 0.5,
    **options: Any,
) -> PyTorchACES:
    """`PyTorchACES` from the values of a configuration: an entropy selector, and a core of another architecture.

    Parameters
    ----------
    network, *args, **options
        Of the smoothed classifier; see `PyTorchSmoothedClassifier`.
    core, core_weights : str
        Architecture by name, and its weights; a relative path begins in `folder`.
    folder : Path
        Of the record.
    theta, tau : float
        See `ScoreSelector`.
    """
    smoothed = PyTorchSmoothedClassifier(network, *args, **options)
    accurate = build(core, smoothed.input_shape, smoothed.nb_classes, seed=0)
    load_weights(accurate, folder / core_weights)
    return PyTorchACES(core=as_core(accurate, smoothed), smoothed=smoothed, selector=ScoreSelector(theta, tau))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


METHODS: dict[str, Callable[..., PyTorchSmoothedClassifier]] = {
    "smoothing": PyTorchSmoothedClassifier,
    "adre": PyTorchADRE,
    "insta-rs": insta_rs,
    "data-dependent": data_dependent,
    "smooth-reduce": smooth_reduce,
    "aces": aces,
    "art": ArtSmoothing,
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


def open_network(config: RunConfig, data: Dataset) -> nn.Module:
    """Network of a configuration, with its weights; see `open_estimator` for the errors."""
    network = build(config.model, data.x_test.shape[1:], data.num_classes, seed=config.seed)
    if config.weights is not None:
        load_weights(network, Path(config.weights))
    elif ":" not in config.model:
        raise ValueError(f"weights are needed for model {config.model!r}; train it first, or give a factory's path")
    return network


def open_estimator(
    config: RunConfig, block: int | None = None, folder: Path = Path()
) -> tuple[Dataset, PyTorchSmoothedClassifier]:
    """Data set and smoothed classifier of a configuration; see `make_estimator`.

    Raises
    ------
    ValueError, TypeError, OSError
        For an unknown data set, architecture, method or option, or weights that are missing, truncated or of another
        network.
    """
    data = load(config.data)
    return data, make_estimator(config, data, open_network(config, data), block, folder)


def make_estimator(
    config: RunConfig, data: Dataset, network: nn.Module, block: int | None, folder: Path
) -> PyTorchSmoothedClassifier:
    """Smoothed classifier of a configuration, around a network that others may hold as well.

    `block` are the rows of a forward pass where the configuration names none. A memory, and the weights of a core, are
    files of `folder`. See `open_estimator` for the errors.
    """
    settings = {
        "sample_size": config.n0,
        "alpha": config.alpha,
        "noise": NOISES[config.noise],
        "performance": config.performance(block),
        **config.options,
    }
    if config.defences:
        settings["preprocessing_defences"] = preprocessors(config.defences, data)
    if config.method == "data-dependent":
        settings |= {"dataset": data, "folder": folder}
    if config.method == "aces":
        if config.rule is not None or config.tolerance is not None:
            raise ValueError("method 'aces' shares alpha out to its parts, for n or named radii; leave rule and "
                             "tolerance out")   # fmt: skip
        settings |= {"folder": folder}
    return smooth(network, data, config.sigma, config.device, config.seed, config.method, **settings)

"""From a configuration to a data set and an estimator: the methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from art_rs_plugins.benchmark.config import NOISES, RunConfig
from art_rs_plugins.benchmark.data import Dataset, load
from art_rs_plugins.benchmark.models import build, load_weights
from art_rs_plugins.estimators.adre import PyTorchADRE
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier

__all__ = ["METHODS", "open_estimator", "smooth"]

METHODS: dict[str, Callable[..., PyTorchSmoothedClassifier]] = {
    "smoothing": PyTorchSmoothedClassifier,
    "adre": PyTorchADRE,
}
"""Estimators by name; the options of a configuration are arguments of the class."""


def smooth(
    network: nn.Module, data: Dataset, sigma: float, device: str, seed: int, method: str = "smoothing", **settings: Any
) -> PyTorchSmoothedClassifier:
    """Smoothed classifier of a network, for the inputs and classes of a data set."""
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1) or list(METHODS)
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}; did you mean {near[0]!r}?")
    return METHODS[method](
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


def open_estimator(config: RunConfig, block: int | None = None) -> tuple[Dataset, PyTorchSmoothedClassifier]:
    """Data set and smoothed classifier of a configuration; `block` rows in a forward pass where it names none.

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
    return data, smooth(network, data, config.sigma, config.device, config.seed, config.method, **settings)

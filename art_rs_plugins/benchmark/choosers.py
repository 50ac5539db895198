"""Training the selector of Insta-RS: the network that chooses a noise level, from images of the training split."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from art_rs_plugins.benchmark.config import RunConfig, check_learning_rate, parse_examples
from art_rs_plugins.benchmark.files import check_folder, digest_rows
from art_rs_plugins.benchmark.methods import open_estimator
from art_rs_plugins.benchmark.models import build, read_training, save_weights
from art_rs_plugins.estimators.insta_rs import PyTorchInstaRS
from art_rs_plugins.smoothing.digest import network_digest
from art_rs_plugins.smoothing.noise import derive_seed
from art_rs_plugins.smoothing.sampling import check_count

__all__ = ["ChooserConfig", "train_chooser"]


@dataclass(frozen=True, slots=True)
class ChooserConfig:
    """How the network of a `Selector` is trained; see `PyTorchInstaRS.fit_selector`.

    Attributes
    ----------
    examples : str
        Images of the training split, start:stop:step.
    model : str
        Architecture by name.
    draws : int
        Votes at each level, for the targets.
    epochs, batch_size : int
        Passes over the images, images of a batch.
    learning_rate : float
        Of Adam.
    """

    examples: str = "::50"
    model: str = "cnn"
    draws: int = 100
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        parse_examples(self.examples, 1)
        for name in ("draws", "epochs", "batch_size"):
            check_count(getattr(self, name), name)
        check_learning_rate(self.learning_rate)


def train_chooser(config: RunConfig, chooser: ChooserConfig, path: Path) -> RunConfig:
    """Train the selector of a configuration, unless `path` holds it already.

    Parameters
    ----------
    config : RunConfig
        Of method ``insta-rs`` with certificate ``selector``.
    chooser : ChooserConfig
        How to train.
    path : Path
        Weights, as safetensors with the settings in the header.

    Returns
    -------
    RunConfig
        With the options ``selector_model`` and ``selector_weights``.

    Raises
    ------
    ValueError, TypeError, OSError
        For another certificate, for weights that were trained otherwise, and as `open_estimator`.
    """
    data, estimator = open_estimator(config)
    if not isinstance(estimator, PyTorchInstaRS):
        raise ValueError(f"method must be insta-rs to train a selector, got {config.method!r}")
    rows = parse_examples(chooser.examples, len(data.x_train))
    settings = {
        "chooser": json.dumps(asdict(chooser)),
        "config": json.dumps(asdict(config)),
        "network": network_digest(estimator.model.base),
        "data": digest_rows(data.x_train, rows),
    }
    trained = {"selector_model": chooser.model, "selector_weights": str(path)}
    known = replace(config, options={**config.options, **trained})
    if path.exists():
        if read_training(path) != settings:
            raise ValueError(f"{path} was trained otherwise; choose another output folder, or delete it")
        return known
    check_folder(path)
    levels = len(config.options["sigmas"])
    network = build(chooser.model, data.x_train.shape[1:], levels, seed=derive_seed(config.seed, levels))
    estimator.fit_selector(
        data.x_train[rows],
        data.y_train[rows],
        network,
        optimizer=torch.optim.Adam(network.parameters(), lr=chooser.learning_rate),
        draws=chooser.draws,
        batch_size=chooser.batch_size,
        nb_epochs=chooser.epochs,
    )
    save_weights(network, path, settings)
    return known

"""Training of reference networks: a frozen configuration in, weights out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from art_rs_plugins.benchmark.config import TrainConfig, parse_examples
from art_rs_plugins.benchmark.data import load
from art_rs_plugins.benchmark.files import check_folder
from art_rs_plugins.benchmark.methods import smooth
from art_rs_plugins.benchmark.models import build, load_weights, save_weights
from art_rs_plugins.smoothing.adversary import SmoothAdv
from art_rs_plugins.smoothing.losses import ADRE, MACER, Consistency
from art_rs_plugins.smoothing.training import Loss

if TYPE_CHECKING:
    from art_rs_plugins.smoothing.training import Epoch

__all__ = ["LOSSES", "header", "train"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Weight of the regulariser and noisy copies of an input, as the authors of a loss use them."""

    weight: float
    draws: int


LOSSES = {
    "gaussian": Recipe(0.0, 1),
    "adre": Recipe(0.1, 8),
    "consistency": Recipe(20.0, 2),
    "macer": Recipe(12.0, 16),
}
"""Losses of training by name; each of them can meet an adversary."""


def make_loss(config: TrainConfig) -> tuple[Loss | None, int]:
    """Loss and noisy copies of an input that a configuration asks for; ``ValueError`` for an unknown method."""
    if config.method not in LOSSES:
        raise ValueError(f"method must be one of {', '.join(LOSSES)}, got {config.method!r}")
    recipe = LOSSES[config.method]
    weight = recipe.weight if config.weight is None else config.weight
    losses: dict[str, Loss | None] = {
        "gaussian": None,
        "adre": ADRE(weight),
        "consistency": Consistency(weight),
        "macer": MACER(config.sigma, weight),
    }
    return losses[config.method], recipe.draws if config.draws is None else config.draws


def train(config: TrainConfig, output: Path, *, verbose: bool = False) -> list[Epoch]:
    """Train a network under noise and write its weights.

    Parameters
    ----------
    config : TrainConfig
        Data set, architecture, noise, loss and optimisation.
    output : Path
        Weights, as safetensors with the configuration in the header; replaced whole or not at all.
    verbose : bool
        Show a progress bar.

    Returns
    -------
    list of Epoch

    Raises
    ------
    ValueError, TypeError, OSError
        For a configuration that does not fit, or a folder that cannot be written.
    """
    check_folder(output)
    loss, draws = make_loss(config)
    adversary = SmoothAdv(config.eps, config.steps, config.warmup) if config.eps else None
    data = load(config.data)
    network = build(config.model, data.x_train.shape[1:], data.num_classes, seed=config.seed)
    if config.weights is not None:
        load_weights(network, Path(config.weights))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    settings: dict[str, Any] = {"optimizer": optimizer, "objective": loss, "draws": draws, "adversary": adversary}
    estimator = smooth(network, data, config.sigma, config.device, config.seed, **settings)
    rows = parse_examples(config.examples, len(data.x_train))
    estimator.fit(
        data.x_train[rows],
        data.y_train[rows],
        batch_size=config.batch_size,
        nb_epochs=config.epochs,
        scheduler=schedule,
        verbose=verbose,
    )
    save_weights(network, output, header(config))
    return list(estimator.history_)


def header(config: TrainConfig) -> dict[str, str]:
    """What the header of a weights file says of the training."""
    return {name: str(value) for name, value in asdict(config).items()}

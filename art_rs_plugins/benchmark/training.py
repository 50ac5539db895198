"""Training of reference networks: a frozen configuration in, weights out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from art_rs_plugins.benchmark.baselines import TRAINED_BY_ART, baseline
from art_rs_plugins.benchmark.config import TrainConfig, check_name, parse_examples
from art_rs_plugins.benchmark.data import load
from art_rs_plugins.benchmark.defences import Place, check_defences, preprocessors
from art_rs_plugins.benchmark.evasion import global_seeds
from art_rs_plugins.benchmark.files import check_folder
from art_rs_plugins.benchmark.methods import smooth
from art_rs_plugins.benchmark.models import build, load_weights, save_weights
from art_rs_plugins.smoothing.adversary import SmoothAdv
from art_rs_plugins.smoothing.losses import ADRE, MACER, Consistency
from art_rs_plugins.smoothing.noise import derive_seed
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
    """Loss and noisy copies of an input that a configuration asks for; ``ValueError`` for an unknown method.

    ART's classes bring their own.
    """
    if check_name(config.method, (*LOSSES, *TRAINED_BY_ART), "method") in TRAINED_BY_ART:
        return None, 1
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
    trainer = make_trainer(config)
    adversary = SmoothAdv(config.eps, config.steps, config.warmup) if config.eps and trainer is None else None
    data = load(config.data)
    network = build(config.model, data.x_train.shape[1:], data.num_classes, seed=config.seed)
    if config.weights is not None:
        load_weights(network, Path(config.weights))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    settings: dict[str, Any] = {"optimizer": optimizer, "objective": loss, "draws": draws, "adversary": adversary}
    inside = preprocessors(config.defences, data, training=True)
    settings |= {"preprocessing_defences": inside} if inside else {}
    if config.method in TRAINED_BY_ART:
        if config.defences:
            raise ValueError(f"defences {', '.join(config.defences)} have no place in {config.method}: leave them out")
        estimator = baseline(config, network, optimizer, data)
    else:
        estimator = smooth(network, data, config.sigma, config.device, config.seed, **settings)
    rows = parse_examples(config.examples, len(data.x_train))
    x, y = data.x_train[rows], np.eye(data.num_classes, dtype=np.float32)[data.y_train[rows]]
    lengths: dict[str, Any] = {"batch_size": config.batch_size, "nb_epochs": config.epochs}
    with global_seeds(derive_seed(config.seed, 0)):
        if trainer is None:
            estimator.fit(x, y, scheduler=schedule, verbose=verbose, **lengths)
        else:
            quiet = nullcontext() if verbose else redirect_stderr(StringIO())   # some of ART's draw bars unasked
            with quiet:
                trainer(estimator, config.eps, config.steps).fit(x, y, **lengths)   # at one learning rate
    save_weights(network, output, header(config))
    return list(getattr(estimator, "history_", ()))


def make_trainer(config: TrainConfig) -> Callable[..., Any] | None:
    """ART's trainer that the defences name, if any; ``ValueError`` where eps or the loss does not fit it."""
    found = [each for each in check_defences(config.defences, training=True) if each.place is Place.TRAINER]
    if not found:
        return None
    if not config.eps or config.method != "gaussian":
        raise ValueError(
            f"defence {found[0].name!r} trains within an l2 budget, with a loss of its own: give eps > 0, and method "
            f"'gaussian'; got eps = {config.eps} and {config.method!r}"
        )
    return found[0].make


def header(config: TrainConfig) -> dict[str, str]:
    """What the header of a weights file says of the training."""
    return {name: str(value) for name, value in asdict(config).items()}

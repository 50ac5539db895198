"""Modes of data-dependent smoothing out of the values of a configuration: what needs training data is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.benchmark.config import check_name, parse_examples
from art_rs_plugins.benchmark.data import Dataset
from art_rs_plugins.estimators.data_dependent import PyTorchDataDependentSmoothing
from art_rs_plugins.estimators.modes import Commit, Frozen
from art_rs_plugins.smoothing.sampling import CHUNK
from art_rs_plugins.smoothing.scales import Conditional
from art_rs_plugins.smoothing.sigma import GridAscent
from art_rs_plugins.theory.elastic import BinnedSigma, ElasticSigma, NeighbourDistance
from art_rs_plugins.theory.regions import EndlessBudget, SharedBudget

__all__ = ["MODES", "data_dependent"]

CALIBRATION = 500
"""Training inputs, at most, that edges and centres are taken from."""


def _search(options: dict[str, Any]) -> GridAscent:
    names = [field.name for field in fields(GridAscent) if field.name in options]
    taken: dict[str, Any] = {name: options.pop(name) for name in names}
    if "bounds" in taken:
        taken["bounds"] = tuple(taken["bounds"])
    return GridAscent(**taken)


def _commit(options: dict[str, Any], data: Dataset, sigma: float, folder: Path) -> Commit:  # noqa: ARG001
    """``path`` of the memory, beside the record; ``budget``, its whole alpha; ``attempts`` that share it equally."""
    total, attempts = options.pop("budget", 0.001), options.pop("attempts", None)
    budget = EndlessBudget(total) if attempts is None else SharedBudget(total, attempts)
    path = options.pop("path", None)
    return Commit(_search(options), None if path is None else folder / path, budget)


def _conditional(options: dict[str, Any], data: Dataset, sigma: float, folder: Path) -> Conditional:  # noqa: ARG001
    return Conditional(_search(options))


def _feature(options: dict[str, Any], data: Dataset) -> tuple[NeighbourDistance, NDArray[np.float64]]:
    """Mean distance to the nearest of the training inputs ``points``; its values at others, to calibrate on."""
    chosen = parse_examples(options.pop("points", "::100"), len(data.x_train))
    feature = NeighbourDistance(data.x_train[chosen].astype(np.float64), int(options.pop("neighbours", 20)))
    others = np.setdiff1d(np.arange(len(data.x_train)), chosen)
    if not len(others):
        raise ValueError("points must leave some training inputs out, which sigma is calibrated on; take fewer")
    return feature, feature(data.x_train[others[:: -(-len(others) // CALIBRATION)]])


def _bins(options: dict[str, Any], data: Dataset, sigma: float, folder: Path) -> BinnedSigma:  # noqa: ARG001
    """``sigmas`` from the nearest inputs to the farthest; bins meet at ``quantiles``, or hold equally many inputs."""
    if "sigmas" not in options:
        raise ValueError("mode 'bins' needs the option sigmas, such as sigmas = [0.4, 0.5, 0.6]")
    sigmas = options.pop("sigmas")
    quantiles = options.pop("quantiles", [part / len(sigmas) for part in range(1, len(sigmas))])
    feature, values = _feature(options, data)
    return BinnedSigma(feature, np.quantile(values, quantiles).tolist(), sigmas)


def _elastic(options: dict[str, Any], data: Dataset, sigma: float, folder: Path) -> ElasticSigma:  # noqa: ARG001
    """Sigma of the network at the median distance, and exp(``slope``) times as much at each unit beyond."""
    feature, values = _feature(options, data)
    return ElasticSigma(feature, base=sigma, rate=float(options.pop("slope", 0.01)), centre=float(np.median(values)))


MODES: dict[str, Callable[[dict[str, Any], Dataset, float, Path], Any]] = {
    "commit": _commit,
    "conditional": _conditional,
    "bins": _bins,
    "elastic": _elastic,
}
"""Modes by name, each with what makes it of its options; ``frozen`` is made of certificates."""


def data_dependent(
    *args: Any, dataset: Dataset, folder: Path, mode: str = "commit", **options: Any
) -> PyTorchDataDependentSmoothing:
    """`PyTorchDataDependentSmoothing` from the values of a configuration, such as mode = "commit", attempts = 1000.

    ``frozen`` promises what a search finds at some training ``inputs``, with ``n`` draws for each, and nothing after.

    Parameters
    ----------
    *args, **options
        Arguments of the class, and settings of the mode.
    dataset : Dataset
        Its training inputs serve, labels unseen; its test inputs do not.
    folder : Path
        Where a relative ``path`` of a memory begins.
    mode : str
        Among `MODES`, or ``frozen``.

    Raises
    ------
    ValueError, TypeError
        For an unknown mode, or settings that do not fit.
    """
    if check_name(mode, (*MODES, "frozen"), "mode") != "frozen":
        made = MODES[mode](options, dataset, float(options["scale"]), folder)
        return PyTorchDataDependentSmoothing(*args, mode=made, **options)
    chosen, n = parse_examples(options.pop("inputs", "::500"), len(dataset.x_train)), options.pop("n", 1000)
    classifier = PyTorchDataDependentSmoothing(*args, mode=Conditional(_search(options)), **options)
    x, performance = dataset.x_train[chosen], classifier.performance
    # whole chunks, so that a resumed run, which knows its block, makes the memory that the first one made
    classifier.set_params(performance=replace(performance, block=CHUNK))
    classifier.mode = Frozen.of(x, classifier.certificates(x, n=n, seed=classifier.seed))
    classifier.set_params(performance=performance)
    return classifier

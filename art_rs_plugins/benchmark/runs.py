"""Runs: a frozen configuration and a loop that records, resumes and shows its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from art_rs_plugins.benchmark.attacks import ATTACKS, run_attack
from art_rs_plugins.benchmark.audits import AUDITED, save_audit
from art_rs_plugins.benchmark.data import Dataset, load
from art_rs_plugins.benchmark.files import digest
from art_rs_plugins.benchmark.models import (
    build,
    load_weights,
    network_digest,
    network_outputs,
    read_training,
    same_outputs,
    save_weights,
)
from art_rs_plugins.benchmark.records import Record, read_manifest, read_record, to_certificates
from art_rs_plugins.benchmark.writer import RecordWriter
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.grid import GridGaussian
from art_rs_plugins.smoothing.noise import Gaussian, check_seed, derive_seed
from art_rs_plugins.smoothing.performance import Performance, measure_block
from art_rs_plugins.smoothing.sampling import check_count, default_block, evaluating
from art_rs_plugins.theory.audit import AttackOutcomes, Audit, audit
from art_rs_plugins.theory.bounds import check_alpha
from art_rs_plugins.theory.radii import check_sigma
from art_rs_plugins.theory.rules import Planned, Sequential

if TYPE_CHECKING:
    from art_rs_plugins.smoothing.training import Epoch

__all__ = ["Demo", "RunConfig", "TrainConfig", "attack", "certify", "demo", "open_estimator", "train"]

GROUP = 16
"""Inputs between two writes of a record: what a crash can cost."""


NOISES: dict[str, type[Gaussian] | type[GridGaussian]] = {"gaussian": Gaussian, "grid": GridGaussian}


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One training run; see `train`."""

    data: str = "digits"
    model: str = "cnn"
    sigma: float = 0.25
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 0
    device: str = "gpu"

    def __post_init__(self) -> None:
        check_sigma(self.sigma), check_seed(self.seed), check_device(self.device)
        check_count(self.epochs, "epochs"), check_count(self.batch_size, "batch_size")
        if not 0.0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}")


@dataclass(frozen=True, slots=True)
class RunConfig:
    """One certification run; see `certify`. Every field changes the result, and all are in the manifest."""

    data: str = "digits"
    model: str = "cnn"
    weights: str | None = None
    sigma: float = 0.25
    n: int = 10_000
    n0: int = 100
    alpha: float = 0.001
    examples: str = "::1"
    seed: int = 0
    device: str = "gpu"
    radii: tuple[float, ...] | None = None
    tolerance: float | None = None
    noise: Literal["gaussian", "grid"] = "gaussian"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    block: int | None = None

    def __post_init__(self) -> None:
        check_sigma(self.sigma), check_alpha(self.alpha), check_seed(self.seed), check_device(self.device)
        check_count(self.n, "n"), check_count(self.n0, "n0")
        parse_examples(self.examples, 1)
        if self.radii is not None:
            object.__setattr__(self, "radii", Sequential(tuple(self.radii)).radii)
        if self.tolerance is not None:
            Planned(self.tolerance)
        if self.radii is not None and self.tolerance is not None:
            raise ValueError("radii and tolerance each say how to decide; give one of them")
        if self.noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {self.noise!r}")
        self.performance(None)

    def performance(self, block: int | None) -> Performance:
        """How the network votes, with `block` rows where none were asked for."""
        return Performance(self.dtype, self.channels_last, self.compile, block if self.block is None else self.block)


def check_device(device: str) -> str:
    """Return ART's name of a device, or say which there are."""
    if device not in ("gpu", "cpu"):
        raise ValueError(f"device must be 'gpu' (falls back to the CPU without CUDA) or 'cpu', got {device!r}")
    return device


def parse_examples(examples: str, total: int) -> NDArray[np.int64]:
    """Indices of ``start:stop:step`` among `total` examples, such as ``"::20"``."""
    parts = examples.split(":")
    try:
        bounds = [int(part) if part else None for part in parts]
        if len(bounds) not in (2, 3):
            raise ValueError
        return np.arange(total)[slice(*bounds)]
    except ValueError:
        raise ValueError(f"examples must be start:stop:step, such as '::20' or ':500', got {examples!r}") from None


def train(config: TrainConfig, output: Path, *, verbose: bool = False) -> list[Epoch]:
    """Train a network under Gaussian noise and write its weights.

    Parameters
    ----------
    config : TrainConfig
        Data set, architecture, noise and optimisation.
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
    data = load(config.data)
    network = build(config.model, data.x_train.shape[1:], data.num_classes, seed=config.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    estimator = _smooth(network, data, config.sigma, config.device, config.seed, optimizer=optimizer)
    estimator.fit(
        data.x_train,
        data.y_train,
        batch_size=config.batch_size,
        nb_epochs=config.epochs,
        scheduler=schedule,
        verbose=verbose,
    )
    save_weights(network, output, _header(config))
    return list(estimator.history_)


def _header(config: TrainConfig) -> dict[str, str]:
    """What the header of a weights file says of the training."""
    return {name: str(value) for name, value in asdict(config).items()}


def check_folder(output: Path) -> None:
    """Make the folder of a file, or raise ``OSError`` that says what stands in the way, before any work is done."""
    if output.is_dir():
        raise IsADirectoryError(f"output {output} is a folder; give the name of a file in it")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        probe = output.parent / f".{output.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"output {output} cannot be written ({error}); choose a folder that can be") from error


def _smooth(
    network: nn.Module, data: Dataset, sigma: float, device: str, seed: int, **settings: Any
) -> PyTorchSmoothedClassifier:
    return PyTorchSmoothedClassifier(
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
    ValueError, OSError
        For an unknown data set or architecture, or weights that are missing, truncated or of another network.
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
    }
    return data, _smooth(network, data, config.sigma, config.device, config.seed, **settings)


def certify(config: RunConfig, output: Path, *, verbose: bool = False) -> Record:
    """Certify test examples and record them, going on where an earlier run with this configuration stopped.

    Parameters
    ----------
    config : RunConfig
        What to certify, and how.
    output : Path
        Record (TSV); its manifest is written beside it first.
    verbose : bool
        Show a progress bar with votes per second and abstentions.

    Returns
    -------
    Record

    Raises
    ------
    ValueError, TypeError, OSError
        For a configuration that does not fit, an output made by another configuration, or a folder that cannot be
        written.

    Notes
    -----
    *Guarantee.* Each row is a certificate of `PyTorchSmoothedClassifier.certificates`. A row that was lost is drawn
    again with the same noise: it is the same experiment, not a second try at alpha.
    """
    check_folder(output)
    known = read_manifest(output)
    training = None if config.weights is None else read_training(config.weights)
    data, estimator = open_estimator(config, None if known is None else known.get("block"))
    indices = parse_examples(config.examples, len(data.x_test))
    if not len(indices):
        raise ValueError(f"examples {config.examples!r} selects none of the {len(data.x_test)} test examples")
    if known is None and config.block is None:
        with evaluating(estimator.model):
            block = measure_block(estimator.model.f, estimator.input_shape, estimator.device)
        estimator.set_params(performance=config.performance(block))
    outputs = network_outputs(estimator.model.base, estimator.input_shape)
    facts = _facts(config, data, indices, estimator)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    notes = {"network_outputs": outputs, "training": training, "command": command}
    with RecordWriter(output, asdict(config), facts=facts, notes=notes) as writer:
        if known is not None and not same_outputs(known.get("network_outputs", []), outputs):
            raise ValueError(
                f"{output} belongs to a network of the same weights that answers otherwise; restore its code, choose "
                "another output path, or delete the record and its manifest"
            )
        left = np.array([index for index in indices if int(index) not in writer.done], dtype=np.int64)
        votes = abstained = 0
        start = time.perf_counter()
        with tqdm(total=len(indices), initial=len(indices) - len(left), desc="certify", disable=not verbose) as bar:
            for first in range(0, len(left), GROUP):
                rows = left[first : first + GROUP]
                begun = time.perf_counter()
                found = estimator.certificates(
                    data.x_test[rows],
                    n=config.n,
                    radii=config.radii,
                    tolerance=config.tolerance,
                    n0=config.n0,
                    indices=rows,
                    seed=config.seed,
                )
                writer.append(found, data.y_test[rows], (time.perf_counter() - begun) / len(rows))
                votes += int((found.n + found.n0).sum())
                abstained += int(found.abstained.sum())
                bar.update(len(rows))
                bar.set_postfix_str(f"{votes / (time.perf_counter() - start):,.0f} votes/s, {abstained} abstained")
    return read_record(output)


def _facts(
    config: RunConfig, data: Dataset, indices: NDArray[np.int64], estimator: PyTorchSmoothedClassifier
) -> dict[str, Any]:
    """What the rows depend on beyond the configuration; whoever goes on, or attacks, must agree on the digests."""
    device = estimator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "performance": str(estimator.performance),
        "block": estimator.performance.block or default_block(estimator.input_shape, device),
        "seed": config.seed,
        "network_sha256": network_digest(estimator.model.base),
        "data_sha256": digest(np.ascontiguousarray(data.x_test[indices])),
        "labels_sha256": digest(np.ascontiguousarray(data.y_test[indices])),
        "indices_sha256": digest(indices),
    }


_MEANING = {
    "network_sha256": "network",
    "data_sha256": "data",
    "labels_sha256": "labels",
    "indices_sha256": "indices",
}
"""Facts of the manifest that an attack must agree with, in words."""


def _rebuild(record: Record) -> tuple[Dataset, PyTorchSmoothedClassifier]:
    """Data set and classifier that a record speaks of; ``ValueError`` that names what is no longer the same."""
    path, manifest = record.path, record.manifest
    if manifest is None:
        raise ValueError(f"{path} has no manifest beside it, so its classifier cannot be rebuilt; certify it again")
    settings = manifest.get("config")
    if not isinstance(settings, dict):
        raise ValueError(f"the manifest of {path} has no config, so its classifier cannot be rebuilt; certify it again")
    unknown = sorted(set(settings) - {field.name for field in fields(RunConfig)})
    if unknown:
        raise ValueError(f"the manifest of {path} has settings unknown to this version: {', '.join(unknown)}; update")
    config = RunConfig(**settings)
    data, estimator = open_estimator(config, manifest.get("block"))
    indices = parse_examples(config.examples, len(data.x_test))
    facts = _facts(config, data, indices, estimator)
    changed = [what for fact, what in _MEANING.items() if manifest.get(fact) != facts[fact]]
    outputs = network_outputs(estimator.model.base, estimator.input_shape)
    if "network" not in changed and not same_outputs(manifest.get("network_outputs", []), outputs):
        changed.append("what the network answers")
    if changed:
        raise ValueError(
            f"{path} was made with other things than {config.data} and {config.weights or config.model} hold now: "
            f"{', '.join(changed)}; restore them, or certify again"
        )
    if not np.all(np.isin(record.idx, indices)) or not np.array_equal(data.y_test[record.idx], record.label):
        raise ValueError(f"{path} has indices or labels that its data has not; restore the file, or certify again")
    return data, estimator


def attack(
    record: Path,
    names: Sequence[str],
    budgets: Sequence[float],
    *,
    steps: int = 20,
    n: int = 200,
    seed: int = 0,
    verbose: bool = False,
) -> dict[str, Audit]:
    """Attack the classifier behind a record, and join the outcome with its certificates input by input.

    Parameters
    ----------
    record : Path
        Written by `certify`; its manifest says how to rebuild the classifier.
    names : sequence of str
        Attacks among ``ATTACKS``.
    budgets : sequence of float
        l2 budgets, in the units of the input.
    steps, n, seed : int
        As in `run_attack`.
    verbose : bool
        Show progress bars.

    Returns
    -------
    dict of Audit
        One for each attack, and ``"all"`` for the worst of them at each input; that one is written beside the record.

    Raises
    ------
    ValueError, OSError
        For unknown attacks, records that cannot be rebuilt or hold no certified radii, or a network, data, labels or
        indices that are no longer those of the record.
    """
    unknown = [name for name in names if name not in ATTACKS]
    if unknown or not names:
        raise ValueError(f"attack must be among {', '.join(ATTACKS)}; got {', '.join(unknown) or 'none'}")
    known = read_record(record)
    if known.kind is not None and known.kind not in AUDITED:
        raise ValueError(
            f"{record} holds {known.kind} certificates, which are not certified accuracy and cannot be audited; attack "
            "a record of certified or exact ones"
        )
    data, estimator = _rebuild(known)
    x, labels = data.x_test[known.idx], data.y_test[known.idx]
    certificates = to_certificates(known)
    outcomes: list[AttackOutcomes] = []
    for number, name in enumerate(names):
        outcomes.append(
            run_attack(
                ATTACKS[name],
                estimator,
                x,
                labels,
                budgets=budgets,
                certificates=certificates,
                steps=steps,
                n=n,
                seed=derive_seed(seed, number),
                verbose=verbose,
            )
        )
    audits = {outcome.name: audit(certificates, outcome, labels) for outcome in outcomes}
    audits["all"] = audit(certificates, outcomes, labels)
    save_audit(audits["all"], known)
    return audits


@dataclass(frozen=True, slots=True)
class Demo:
    """What `demo` did at one sigma: its record, and its audits by attack."""

    sigma: float
    record: Record
    audits: dict[str, Audit]


def demo(folder: Path, *, sigmas: Sequence[float] = (0.25, 0.5), verbose: bool = False) -> list[Demo]:
    """Train, certify and attack a small network on scikit-learn's digits, at each sigma.

    Parameters
    ----------
    folder : Path
        Weights, records, manifests and audits go here; a run that was stopped goes on.
    sigmas : sequence of float
        Noise levels.
    verbose : bool
        Show progress bars.
    """
    results = []
    with _one_thread():
        for sigma in sigmas:
            weights, record = folder / f"digits_sigma{sigma:g}.safetensors", folder / f"digits_sigma{sigma:g}.tsv"
            config = TrainConfig(sigma=sigma)
            if not weights.exists():
                train(config, weights, verbose=verbose)
            elif read_training(weights) != _header(config):
                raise ValueError(f"{weights} was trained otherwise than the demo trains; choose another output folder")
            certify(RunConfig(weights=str(weights), sigma=sigma), record, verbose=verbose)
            audits = attack(record, ("pgd", "smoothed-pgd"), (0.25, 0.5, 0.75, 1.0), verbose=verbose)
            results.append(Demo(sigma, read_record(record), audits))
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for networks so small that several would wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

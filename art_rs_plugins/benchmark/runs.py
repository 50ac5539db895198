"""Runs: a frozen configuration and a loop that records, resumes and shows its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from art_rs_plugins.benchmark.config import RunConfig, parse_examples
from art_rs_plugins.benchmark.data import Dataset
from art_rs_plugins.benchmark.files import check_folder, digest
from art_rs_plugins.benchmark.methods import REDUCTIONS, open_estimator
from art_rs_plugins.benchmark.models import network_outputs, read_training, same_outputs
from art_rs_plugins.benchmark.records import Record, read_manifest, read_record
from art_rs_plugins.benchmark.writer import RecordWriter
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.digest import network_digest
from art_rs_plugins.smoothing.performance import measure_block
from art_rs_plugins.smoothing.sampling import default_block, evaluating
from art_rs_plugins.theory.certificates import Certificates

__all__ = ["certify", "certify_rules", "facts"]

GROUP = 16
"""Inputs between two writes of a record: what a crash can cost."""


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
    *Guarantee.* Each row is a certificate of the method's `certificates`. A row that was lost is drawn again with the
    same noise: it is the same experiment, not a second try at alpha.
    """
    return certify_rules([config], [output], verbose=verbose)[0]


def certify_rules(configs: Sequence[RunConfig], outputs: Sequence[Path], *, verbose: bool = False) -> list[Record]:
    """Certify under several rules, or reductions, that share their draws, each with a record of its own; see `certify`.

    Parameters
    ----------
    configs : sequence of RunConfig
        The same but for ``rule``, which each of several must name, and the option ``reduction``: each rule for the
        first reduction, then for the next.
    outputs : sequence of Path
        One record for each.
    verbose : bool
        Show a progress bar.

    Returns
    -------
    list of Record
    """
    config = configs[0]
    if len({output.resolve() for output in outputs}) != len(configs):
        raise ValueError(f"outputs must be {len(configs)} different files, one for each config, got {len(outputs)}")
    asked = [(each.options.get("reduction"), each.rule) for each in configs]
    reductions, rules = (list(dict.fromkeys(names)) for names in zip(*asked, strict=True))
    if any(replace(each, rule=config.rule, options=_rest(each)) != replace(config, options=_rest(config))
           for each in configs) or asked != list(product(reductions, rules)):
        raise ValueError(
            "configs may differ in their rule and reduction alone, each rule for each reduction in order: what shares "
            "draws shares all else"
        )
    for output in outputs:
        check_folder(output)
    known = read_manifest(outputs[0])
    data, estimator = open_estimator(config, None if known is None else known.get("block"), outputs[0].parent)
    indices = parse_examples(config.examples, len(data.x_test))
    if not len(indices):
        raise ValueError(f"examples {config.examples!r} selects none of the {len(data.x_test)} test examples")
    if known is None and config.block is None:
        with evaluating(estimator.model):
            block = measure_block(estimator.model.f, estimator.input_shape, estimator.device)
        estimator.set_params(performance=config.performance(block))
    with ExitStack() as stack:
        stack.callback(estimator.close)
        writers = []
        for each, output in zip(configs, outputs, strict=True):
            same = each.options == config.options
            own = estimator if same else open_estimator(each, estimator.performance.block, output.parent)[1]
            writers.append(stack.enter_context(_writer(each, output, data, indices, own)))
        _record(configs, writers, data, indices, estimator, verbose)
    return [read_record(output) for output in outputs]


def _writer(
    config: RunConfig, output: Path, data: Dataset, indices: NDArray[np.int64], estimator: PyTorchSmoothedClassifier
) -> RecordWriter:
    """Writer of one record; ``ValueError`` if it was begun with a network that answers otherwise."""
    known, outputs = read_manifest(output), network_outputs(estimator.model.base, estimator.input_shape)
    notes = {
        "network_outputs": outputs,
        "training": None if config.weights is None else read_training(config.weights),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    writer = RecordWriter(output, asdict(config), facts=facts(config, data, indices, estimator), notes=notes)
    if known is not None:
        writer.check(known)
        if not same_outputs(known.get("network_outputs", []), outputs):
            raise ValueError(
                f"{output} belongs to a network of the same weights that answers otherwise; restore its code, choose "
                "another output path, or delete the record and its manifest"
            )
    return writer


def _record(
    configs: Sequence[RunConfig],
    writers: Sequence[RecordWriter],
    data: Dataset,
    indices: NDArray[np.int64],
    estimator: PyTorchSmoothedClassifier,
    verbose: bool,
) -> None:
    """Certify what is not yet in every record, a few inputs at a time."""
    finished = set.intersection(*(writer.done for writer in writers))
    left = np.array([index for index in indices if int(index) not in finished], dtype=np.int64)
    votes = abstained = 0
    start = time.perf_counter()
    with tqdm(total=len(indices), initial=len(indices) - len(left), desc="certify", disable=not verbose) as bar:
        for first in range(0, len(left), GROUP):
            rows, begun = left[first : first + GROUP], time.perf_counter()
            found = _certificates(configs, estimator, data.x_test[rows], rows)
            seconds = (time.perf_counter() - begun) / len(rows)
            for writer, certificates in zip(writers, found, strict=True):
                new = np.array([int(index) not in writer.done for index in rows])
                writer.append(certificates[new], data.y_test[rows[new]], seconds)
            votes += int(np.max([certificates.passes for certificates in found], axis=0).sum())
            abstained += int(found[0].abstained.sum())
            bar.update(len(rows))
            bar.set_postfix_str(f"{votes / (time.perf_counter() - start):,.0f} votes/s, {abstained} abstained")


def _certificates(
    configs: Sequence[RunConfig], estimator: PyTorchSmoothedClassifier, x: NDArray[np.float32], rows: NDArray[np.int64]
) -> list[Certificates]:
    config, rules = configs[0], [config.decide() for config in configs]
    settings: dict[str, Any] = {"n": config.n, "n0": config.n0, "indices": rows, "seed": config.seed}
    reductions = dict.fromkeys(str(each.options.get("reduction")) for each in configs)
    if len(reductions) > 1:
        settings["reductions"] = [REDUCTIONS[name]() for name in reductions]
        rules = rules[: len(rules) // len(reductions)]
    named = [rule for rule in rules if rule is not None]
    if len(named) == len(rules):
        return estimator.compare(x, named, **settings)
    if len(configs) > 1:
        raise ValueError("rule must be named in each of several configs")
    return [estimator.certificates(x, radii=config.radii, tolerance=config.tolerance, **settings)]


def _rest(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.options.items() if name != "reduction"}


def facts(
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

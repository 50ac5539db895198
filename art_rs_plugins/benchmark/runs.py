"""Runs: a frozen configuration and a loop that records, resumes and shows its progress."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from art_rs_plugins.benchmark.config import RunConfig, parse_examples
from art_rs_plugins.benchmark.data import Dataset, load
from art_rs_plugins.benchmark.files import check_folder, digest, digest_rows
from art_rs_plugins.benchmark.methods import REDUCTIONS, make_estimator, open_network
from art_rs_plugins.benchmark.models import network_outputs, read_training, same_outputs
from art_rs_plugins.benchmark.records import Record, read_manifest, read_record
from art_rs_plugins.benchmark.shards import Shard
from art_rs_plugins.benchmark.workers import (
    GROUP,
    HERE,
    Group,
    Survey,
    Task,
    Together,
    Workers,
    device_name,
    record_groups,
    refuse_memory,
    voting_stage,
)
from art_rs_plugins.benchmark.writer import RecordWriter
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.digest import network_digest
from art_rs_plugins.smoothing.sampling import default_block

__all__ = ["certify", "certify_together", "facts", "shared_part"]


def certify(
    config: RunConfig, output: Path, *, verbose: bool = False, workers: Workers = HERE, shard: Shard | None = None
) -> Record:
    """Certify test examples and record them, going on where an earlier run with this configuration stopped.

    Parameters
    ----------
    config : RunConfig
        What to certify, and how.
    output : Path
        Record (TSV); its manifest is written beside it first.
    verbose : bool
        Show a progress bar with time left, votes per second and abstentions.
    workers : Workers
        Who votes: this process, or those of `benchmark.cluster`. Rows are written here, in the order of the examples.
    shard : Shard, optional
        Certify this part of the examples alone; `benchmark.shards.merge` joins the parts.

    Returns
    -------
    Record

    Raises
    ------
    ValueError, TypeError, OSError
        For a configuration that does not fit, an output made by another configuration or being written by another
        process, a folder that cannot be written, or a memory that would be asked in parallel.

    Notes
    -----
    *Guarantee.* Each row is a certificate of the method's `certificates`. A row that was lost is drawn again with the
    same noise: it is the same experiment, not a second try at alpha.
    """
    return certify_together([{output: config}], verbose=verbose, workers=workers, shard=shard)[0][0]


def certify_together(
    families: Sequence[Mapping[Path, RunConfig]],
    *,
    verbose: bool = False,
    workers: Workers = HERE,
    shard: Shard | None = None,
) -> list[list[Record]]:
    """Certify under several configurations that share their draws, each with a record of its own; see `certify`.

    Parameters
    ----------
    families : sequence of mapping from Path to RunConfig
        Configurations of one network and the same inputs, by their records. Those of a family differ in ``rule`` and
        the option ``reduction`` alone, and one estimator certifies them: each rule, which all of them name, for the
        first reduction, then for the next.
    verbose, workers, shard
        As of `certify`.

    Returns
    -------
    list of list of Record
        What each alone would record, but for the seconds, which are those of all: a draw is voted on once, whoever
        asks.
    """
    notes = {}
    if shard is not None:
        notes = {"shard": shard.note(next(iter(families[0].values())).examples)}
        families = [
            {output: replace(each, examples=shard.of(each.examples)) for output, each in family.items()}
            for family in families
        ]
    _check_families(families)
    first, config = next(iter(families[0].items()))
    known, data = read_manifest(first), load(config.data)
    network = open_network(config, data)
    estimator = make_estimator(config, data, network, None if known is None else known.get("block"), first.parent)
    indices = parse_examples(config.examples, len(data.x_test))
    if not len(indices):
        raise ValueError(f"examples {config.examples!r} selects none of the {len(data.x_test)} test examples")
    device, begun = _settle(config, known, estimator, workers, shard), []
    with ExitStack() as stack:
        stack.callback(estimator.close)
        for family in families:
            opened: dict[str, PyTorchSmoothedClassifier] = {}   # by reduction; the first of them votes for all
            writers = []
            for output, each in family.items():
                reduction = each.options.get("reduction", "mean")
                if reduction not in opened and each is config:
                    opened[reduction] = estimator
                elif reduction not in opened:
                    block = estimator.performance.block
                    opened[reduction] = make_estimator(each, data, network, block, output.parent)
                    stack.callback(opened[reduction].close)
                found = facts(each, data, indices, opened[reduction]) | {"device": device}
                writers.append(stack.enter_context(_writer(each, output, found, notes, opened[reduction])))
            finished = set.intersection(*(writer.done for writer in writers))
            task = _task(list(family.values()), next(iter(opened.values())))
            begun.append((task, writers, {int(index) for index in indices} - finished))
        begun = [part for part in begun if part[2]] or begun[:1]   # what is whole asks for no votes
        missing = set[int]().union(*(part[2] for part in begun))
        left = np.array([index for index in indices if int(index) in missing], dtype=np.int64)
        parts = (left[at : at + GROUP] for at in range(0, len(left), GROUP))
        groups = (Group(rows, data.x_test[rows], data.y_test[rows]) for rows in parts)
        everyone = [writer for part in begun for writer in part[1]]
        joint = begun[0][0] if len(begun) == 1 else Together(tuple(part[0] for part in begun))
        record_groups(joint, groups, everyone, total=len(indices), workers=workers, verbose=verbose)
    return [[read_record(output) for output in family] for family in families]


def shared_part(config: RunConfig) -> RunConfig:
    """A configuration less what may differ among those that share their draws: who asks the network, and how often."""
    rest: dict[str, Any] = {"rule": None, "radii": None, "tolerance": None, "method": "smoothing", "options": {}}
    return replace(config, sigma=1.0, n=1, n0=1, alpha=0.5, **rest)


def _check_families(families: Sequence[Mapping[Path, RunConfig]]) -> None:
    """Raise ``ValueError`` for what cannot share draws, and ``OSError`` for a folder that cannot be written."""
    outputs = [output for family in families for output in family]
    if len({output.resolve() for output in outputs}) != len(outputs):
        raise ValueError(f"outputs must be different files, one for each config, got {', '.join(map(str, outputs))}")
    everyone = [each for family in families for each in family.values()]
    if any(shared_part(each) != shared_part(everyone[0]) for each in everyone):
        raise ValueError(
            "configs must be of one network and the same inputs to share draws: they may differ in method, options, "
            "sigma, n, n0, alpha, radii, tolerance and rule alone"
        )
    for family in families:
        configs = list(family.values())
        asked = [(each.options.get("reduction", "mean"), each.rule) for each in configs]
        reductions, rules = (list(dict.fromkeys(names)) for names in zip(*asked, strict=True))
        if any(_rest(each) != _rest(configs[0]) for each in configs) or asked != list(product(reductions, rules)):
            raise ValueError(
                "configs of a family may differ in their rule and reduction alone, each rule for each reduction in "
                f"order; got {asked}"
            )
    for output in outputs:
        check_folder(output)


def _rest(config: RunConfig) -> RunConfig:
    options = {name: value for name, value in config.options.items() if name != "reduction"}
    return replace(config, rule=None, options=options)


def _settle(
    config: RunConfig,
    known: dict[str, Any] | None,
    estimator: PyTorchSmoothedClassifier,
    workers: Workers,
    shard: Shard | None,
) -> str:
    """Settle the rows of a forward pass, and return the name of the device that votes."""
    if workers is not HERE or shard is not None:
        refuse_memory(estimator)
    if workers is HERE and (known is not None or config.block is not None or shard is not None):
        return device_name(estimator)   # shards do not measure: each might find another number
    block = config.block or (known or {}).get("block")
    if shard is not None:
        block = block or default_block(estimator.input_shape, estimator.device)
    device, block = next(iter(workers(Survey(estimator), [block])))
    voting_stage(estimator).set_params(performance=config.performance(block))
    return str(device)


def _writer(
    config: RunConfig,
    output: Path,
    found: dict[str, Any],
    more: dict[str, Any],
    estimator: PyTorchSmoothedClassifier,
) -> RecordWriter:
    """Writer of one record; ``ValueError`` if it was begun with a network that answers otherwise."""
    known, outputs = read_manifest(output), network_outputs(estimator.model.base, estimator.input_shape)
    notes = {
        **more,
        "network_outputs": outputs,
        "training": None if config.weights is None else read_training(config.weights),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    writer = RecordWriter(output, asdict(config), facts=found, notes=notes)
    if known is not None:
        writer.check(known)
        if not same_outputs(known.get("network_outputs", []), outputs):
            raise ValueError(
                f"{output} belongs to a network of the same weights that answers otherwise; restore its code, choose "
                "another output path, or delete the record and its manifest"
            )
    return writer


def _task(configs: Sequence[RunConfig], estimator: PyTorchSmoothedClassifier) -> Task:
    """What to ask an estimator about each group, so that it answers for every configuration."""
    config, rules = configs[0], [config.decide() for config in configs]
    settings: dict[str, Any] = {"n": config.n, "n0": config.n0, "seed": config.seed}
    reductions = dict.fromkeys(str(each.options.get("reduction", "mean")) for each in configs)
    if len(reductions) > 1:
        settings["reductions"] = [REDUCTIONS[name]() for name in reductions]
        rules = rules[: len(rules) // len(reductions)]
    named = [rule for rule in rules if rule is not None]
    if len(named) == len(rules):
        return Task(estimator, settings, tuple(named))
    if len(configs) > 1:
        raise ValueError("rule must be named in each of several configs")
    asked = {"radii": config.radii, "tolerance": config.tolerance}
    return Task(estimator, settings | {name: value for name, value in asked.items() if value is not None})


def facts(
    config: RunConfig, data: Dataset, indices: NDArray[np.int64], estimator: PyTorchSmoothedClassifier
) -> dict[str, Any]:
    """What the rows depend on beyond the configuration; whoever goes on, or attacks, must agree on the digests."""
    chooser = getattr(estimator, "selector", None)   # of Insta-RS a network, of a composition a part of the model
    return {
        "device": device_name(estimator),
        "performance": str(estimator.performance),
        "block": estimator.performance.block or default_block(estimator.input_shape, estimator.device),
        "seed": config.seed,
        "network_sha256": network_digest(estimator.model.base),
        "data_sha256": digest_rows(data.x_test, indices),
        "labels_sha256": digest_rows(data.y_test, indices),
        "indices_sha256": digest(indices),
        **({"selector_sha256": network_digest(chooser)} if isinstance(chooser, nn.Module) else {}),
    }

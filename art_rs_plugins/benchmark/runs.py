"""Runs: a frozen configuration and a loop that records, resumes and shows its progress."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
from art_rs_plugins.benchmark.methods import REDUCTIONS, open_estimator, open_network
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
    return certify_together([config], [output], verbose=verbose, workers=workers, shard=shard)[0]


def certify_together(
    configs: Sequence[RunConfig],
    outputs: Sequence[Path],
    *,
    verbose: bool = False,
    workers: Workers = HERE,
    shard: Shard | None = None,
) -> list[Record]:
    """Certify under several configurations that share their draws, each with a record of its own; see `certify`.

    Parameters
    ----------
    configs : sequence of RunConfig
        Of one network and the same inputs. Neighbours that differ in ``rule`` and the option ``reduction`` alone are
        certified by one estimator: each rule, which all of them name, for the first reduction, then for the next.
    outputs : sequence of Path
        One record for each.
    verbose, workers, shard
        As of `certify`.

    Returns
    -------
    list of Record
        What each alone would record, but for the seconds: a draw is voted on once, whoever asks.
    """
    notes = {} if shard is None else {"shard": shard.note(configs[0].examples)}
    configs = [each if shard is None else replace(each, examples=shard.of(each.examples)) for each in configs]
    config = configs[0]
    if len({output.resolve() for output in outputs}) != len(configs):
        raise ValueError(f"outputs must be {len(configs)} different files, one for each config, got {len(outputs)}")
    families = _families(configs)
    for output in outputs:
        check_folder(output)
    known, data = read_manifest(outputs[0]), load(config.data)
    network = open_network(config, data)
    block = None if known is None else known.get("block")
    estimator = open_estimator(config, block, outputs[0].parent, network)[1]
    indices = parse_examples(config.examples, len(data.x_test))
    if not len(indices):
        raise ValueError(f"examples {config.examples!r} selects none of the {len(data.x_test)} test examples")
    device = _settle(config, known, estimator, workers, shard)
    with ExitStack() as stack:
        stack.callback(estimator.close)
        opened = [(replace(config, rule=None), estimator)]
        writers = []
        for each, output in zip(configs, outputs, strict=True):
            plain = replace(each, rule=None)
            own = next((own for other, own in opened if other == plain), None)
            if own is None:
                own = open_estimator(each, estimator.performance.block, output.parent, network)[1]
                stack.callback(own.close)
                opened.append((plain, own))
            found = facts(each, data, indices, own) | {"device": device}
            writers.append(stack.enter_context(_writer(each, output, found, notes, own)))
        finished = set.intersection(*(writer.done for writer in writers))
        left = np.array([index for index in indices if int(index) not in finished], dtype=np.int64)
        parts = (left[first : first + GROUP] for first in range(0, len(left), GROUP))
        groups = (Group(rows, data.x_test[rows], data.y_test[rows]) for rows in parts)
        leaders = (replace(family[0], rule=None) for family in families)
        tasks = [
            _task(family, next(own for other, own in opened if other == leader))
            for family, leader in zip(families, leaders, strict=True)
        ]
        task = tasks[0] if len(tasks) == 1 else Together(tuple(tasks))
        record_groups(task, groups, writers, total=len(indices), workers=workers, verbose=verbose)
    return [read_record(output) for output in outputs]


def shared_part(config: RunConfig) -> RunConfig:
    """A configuration less what may differ among those that share their draws: who asks the network, and how often."""
    rest: dict[str, Any] = {"rule": None, "radii": None, "tolerance": None, "method": "smoothing", "options": {}}
    return replace(config, sigma=1.0, n=1, n0=1, alpha=0.5, **rest)


def _families(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Configurations by the estimator that certifies them; ``ValueError`` if they are not of one network and inputs."""
    families: list[list[RunConfig]] = []
    for each in configs:
        if families and _family(families[-1][0]) == _family(each):
            families[-1].append(each)
        else:
            families.append([each])
    if any(shared_part(each) != shared_part(configs[0]) for each in configs):
        raise ValueError(
            "configs must be of one network and the same inputs to share draws: they may differ in method, options, "
            "sigma, n, n0, alpha, radii, tolerance and rule alone"
        )
    for family in families:
        asked = [(each.options.get("reduction", "mean"), each.rule) for each in family]
        reductions, rules = (list(dict.fromkeys(names)) for names in zip(*asked, strict=True))
        if asked != list(product(reductions, rules)):
            raise ValueError(f"configs must name each rule for each reduction, in order; got {asked}")
    return families


def _family(config: RunConfig) -> RunConfig:
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

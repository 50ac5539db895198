"""Attacks on a record: the classifier behind it is rebuilt, attacked, and held against its certificates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from art_rs_plugins.benchmark.attacks import ATTACKS, run_attack
from art_rs_plugins.benchmark.audits import AUDITED, save_audit
from art_rs_plugins.benchmark.config import RunConfig, parse_examples
from art_rs_plugins.benchmark.data import Dataset
from art_rs_plugins.benchmark.methods import open_estimator
from art_rs_plugins.benchmark.models import network_outputs, same_outputs
from art_rs_plugins.benchmark.records import Record, read_record, to_certificates
from art_rs_plugins.benchmark.runs import facts
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.noise import derive_seed
from art_rs_plugins.theory.audit import AttackOutcomes, Audit, audit

__all__ = ["attack", "rebuild"]

_MEANING = {
    "network_sha256": "network",
    "data_sha256": "data",
    "labels_sha256": "labels",
    "indices_sha256": "indices",
}
"""Facts of the manifest that an attack must agree with, in words."""


def rebuild(record: Record) -> tuple[Dataset, PyTorchSmoothedClassifier]:
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
    data, estimator = open_estimator(config, manifest.get("block"), path.parent)
    indices = parse_examples(config.examples, len(data.x_test))
    found = facts(config, data, indices, estimator)
    changed = [what for fact, what in _MEANING.items() if manifest.get(fact) != found[fact]]
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
    data, estimator = rebuild(known)
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

"""Attacks on a record: the classifier behind it is rebuilt, attacked, and held against its certificates."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.benchmark.attacks import ATTACKS
from art_rs_plugins.benchmark.audits import AUDITED, AttackRun, load_run, save_audits, save_run
from art_rs_plugins.benchmark.compositions import COMPOSITION_ATTACKS
from art_rs_plugins.benchmark.config import AttackConfig, RunConfig, check_name, parse_examples
from art_rs_plugins.benchmark.data import Dataset
from art_rs_plugins.benchmark.evasion import Attack, Images, check_votes, find_examples, judge
from art_rs_plugins.benchmark.methods import open_estimator
from art_rs_plugins.benchmark.models import network_outputs, same_outputs
from art_rs_plugins.benchmark.nearest import Nearest, nearest_of, save_nearest
from art_rs_plugins.benchmark.records import Record, read_record, to_certificates
from art_rs_plugins.benchmark.runs import facts
from art_rs_plugins.estimators.base import PyTorchSmoothedClassifier
from art_rs_plugins.smoothing.noise import derive_seed
from art_rs_plugins.theory.audit import AttackOutcomes, Audit, audit
from art_rs_plugins.theory.certificates import Certificates

__all__ = ["KNOWN", "Attacked", "attack", "nearest_examples", "rebuild"]

logger = logging.getLogger(__name__)

KNOWN: Mapping[str, Attack] = {**ATTACKS, **COMPOSITION_ATTACKS}
"""Attacks by name: those on any classifier, and those on the parts of a composition."""

SHOWN = 12
"""Inputs whose nearest adversarial example is kept, at most."""

VOTES = 500
"""Votes that confirm one, at the estimator's alpha, beside those that judged the attack."""

_MEANING = {
    "network_sha256": "network",
    "data_sha256": "data",
    "labels_sha256": "labels",
    "indices_sha256": "indices",
    "selector_sha256": "selector",
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
    changed = [what for fact, what in _MEANING.items() if manifest.get(fact) != found.get(fact)]
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


@dataclass(frozen=True, slots=True)
class Attacked:
    """What attacks on a record came to.

    Attributes
    ----------
    audits : dict of Audit
        One for each attack that ran, by name, and ``"all"`` for the worst of them at each input; empty if none ran.
    nearest : Nearest or None
        Nearest adversarial examples of the first inputs that were attacked.
    failed : dict of str
        Attacks that could not run, each with its reason in a sentence.
    """

    audits: dict[str, Audit]
    nearest: Nearest | None
    failed: dict[str, str]


def attack(record: Path, groups: Sequence[AttackConfig], *, verbose: bool = False) -> Attacked:
    """Attack the classifier behind a record, and join the outcome with its certificates input by input.

    Outcomes are written beside the record attack by attack, and taken from there where settings and record are still
    the same. An attack that fails does not stop the others.

    Parameters
    ----------
    record : Path
        Written by `certify`; its manifest says how to rebuild the classifier.
    groups : sequence of AttackConfig
        Attacks among ``KNOWN``, at the same budgets; some may take fewer inputs, or more steps, than others.
    verbose : bool
        Show progress bars.

    Returns
    -------
    Attacked
        ``"all"`` is about every input that any attack took; where another attack did not look, it found nothing. Audits
        and nearest examples are written beside the record as well.

    Raises
    ------
    ValueError, OSError
        For unknown attacks, groups that do not fit, records that cannot be rebuilt or hold no certified radii, or a
        network, data, labels or indices that are no longer those of the record.
    """
    names = [check_name(name, KNOWN, "attack") for group in groups for name in group.names]
    if not names or len(set(names)) < len(names) or len({group.budgets for group in groups}) > 1:
        raise ValueError(f"groups must name each attack once, at the same budgets, and at least one; got {names}")
    known = read_record(record)
    if known.kind is not None and known.kind not in AUDITED:
        raise ValueError(
            f"{record} holds {known.kind} certificates, which are not certified accuracy and cannot be audited; attack "
            "a record of certified or exact ones"
        )
    data, estimator = rebuild(known)
    certificates, runs, failed = to_certificates(known), {}, {}
    for group in groups:
        for name in group.names:
            found = load_run(known, name, _settings(known, group))
            if found is None:
                try:
                    found = _run(KNOWN[name], group, known, certificates, data, estimator, verbose=verbose)
                except Exception as error:   # of ART's attacks, which raise what they like
                    logger.debug("%s failed", name, exc_info=True)
                    failed[name] = f"could not run: {str(error).strip() or type(error).__name__}"
                    continue
                save_run(known, found, _settings(known, group))
            runs[name] = found
    audits = {name: audit(certificates[run.rows], run.outcomes, known.label[run.rows]) for name, run in runs.items()}
    if runs:
        audits["all"] = _joint(certificates, known, list(runs.values()))
        save_audits(audits, known)
    nearest = nearest_of([run.nearest for run in runs.values()])
    if nearest is not None:
        save_nearest(nearest, known)
    return Attacked(audits, nearest, failed)


def _settings(record: Record, group: AttackConfig) -> dict[str, Any]:
    """What the outcomes of one attack depend on, beside the rows of the record."""
    made = {name: (record.manifest or {}).get(name) for name in ("config", "versions", *_MEANING)}
    return {**{name: value for name, value in asdict(group).items() if name != "names"}, "record": made}


def _run(
    kind: Attack,
    group: AttackConfig,
    record: Record,
    certificates: Certificates,
    data: Dataset,
    estimator: PyTorchSmoothedClassifier,
    *,
    verbose: bool,
) -> AttackRun:
    """One attack on some rows of a record: crafted, judged, and its nearest examples confirmed."""
    rows = np.argsort(record.idx, kind="stable")[parse_examples(group.attacked, len(record))]
    if not len(rows):
        raise ValueError(f"attacked {group.attacked!r} selects none of {len(record)} inputs")
    x, labels, seed = data.x_test[record.idx[rows]], record.label[rows], _seed(group, kind)
    check_votes(estimator, group.n)
    grid: dict[str, Any] = {"budgets": group.budgets, "seed": seed}
    adversarial = find_examples(kind, estimator, x, labels, steps=group.steps, verbose=verbose, **grid)
    outcomes = judge(kind.name, estimator, x, adversarial, certificates=certificates[rows], n=group.n, **grid)
    nearest = nearest_examples(estimator, x, labels, record.idx[rows], outcomes, adversarial, seed=seed)
    return AttackRun(rows, outcomes, nearest)


def _seed(group: AttackConfig, kind: Attack) -> int:
    """Seed of one attack, whatever the others are."""
    return derive_seed(group.seed, zlib.crc32(kind.name.encode()))


def _joint(certificates: Certificates, record: Record, runs: Sequence[AttackRun]) -> Audit:
    """Audit of all attacks together, on every input that one of them took."""
    rows = np.unique(np.concatenate([run.rows for run in runs]))
    return audit(certificates[rows], [_spread(run, rows) for run in runs], record.label[rows])


def _spread(run: AttackRun, rows: NDArray[np.int64]) -> AttackOutcomes:
    """Outcomes on more inputs: on those that the attack did not take, beyond every budget and radius."""
    where, outcomes = np.searchsorted(rows, run.rows), run.outcomes
    shape = (len(outcomes.budgets), len(rows))
    parts: dict[str, Any] = {
        "prediction": np.zeros(shape, dtype=np.int64),
        "abstained": np.ones(shape, dtype=bool),
        "distance": np.full(shape, np.finfo(np.float64).max),
        "confirmed": np.zeros(shape, dtype=bool),
    }
    for name, values in parts.items():
        values[:, where] = getattr(outcomes, name)
    return replace(outcomes, **parts)


def nearest_examples(
    estimator: PyTorchSmoothedClassifier,
    x: Images,
    labels: NDArray[np.int64],
    index: NDArray[np.int64],
    outcomes: AttackOutcomes,
    adversarial: Images,
    *,
    seed: int,
) -> Nearest:
    """For the first inputs the nearest example of one attack that is answered wrongly, and again when asked again.

    Parameters
    ----------
    estimator : PyTorchSmoothedClassifier
        The classifier under attack.
    x : ndarray of float32, shape (b, *input_shape)
        Inputs.
    labels, index : ndarray of int64, shape (b,)
        True classes, and names of the inputs.
    outcomes : AttackOutcomes
        Of the attack on them, over e budgets.
    adversarial : ndarray of float32, shape (e, b, *input_shape)
        What it found.
    seed : int
        Of the votes.

    Returns
    -------
    Nearest
        Of those among the first `SHOWN` that have one.
    """
    wrong = ~outcomes.abstained & (outcomes.prediction != labels)
    distance = np.where(wrong, outcomes.distance, np.inf)[:, :SHOWN]
    columns = np.arange(distance.shape[1])
    confirmed = np.zeros(len(columns), dtype=bool)
    for attempt in range(len(distance)):
        best = distance.argmin(axis=0)
        todo = np.flatnonzero(~confirmed & np.isfinite(distance[best, columns]))
        if not len(todo):
            break
        again = estimator.predictions(adversarial[best[todo], todo], n=VOTES, seed=derive_seed(seed, attempt, 4))
        right = ~again.abstained & (again.prediction != labels[todo])
        confirmed[todo] = right
        distance[best[todo[~right]], todo[~right]] = np.inf
    best, rows = distance.argmin(axis=0), np.flatnonzero(confirmed)
    return Nearest(
        index=index[rows],
        original=x[rows],
        adversarial=adversarial[best[rows], rows],
        distance=distance[best[rows], rows],
        attack=(outcomes.name,) * len(rows),
    )

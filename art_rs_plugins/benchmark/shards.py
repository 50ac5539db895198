"""Shards: parts of one run that are certified apart, and joined without a gap, a duplicate or a mixture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from art_rs_plugins.benchmark.config import parse_examples
from art_rs_plugins.benchmark.data import load
from art_rs_plugins.benchmark.files import check_folder, digest, digest_rows
from art_rs_plugins.benchmark.models import same_outputs
from art_rs_plugins.benchmark.records import Record, read_record, to_certificates
from art_rs_plugins.benchmark.writer import RecordWriter, compare_versions
from art_rs_plugins.theory.certificates import Certificates

__all__ = ["Shard", "merge"]

_OWN = {"data_sha256", "labels_sha256", "indices_sha256", "schema", "created", "versions", "config"}
_OWN |= {"network_outputs", "training", "command", "shard", "shards"}
"""What manifests of shards of one run may differ in; configurations, in their examples alone."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Every `count`-th example, from the one at place `number` on.

    Raises
    ------
    ValueError
        Unless 0 <= number < count.

    Examples
    --------
    >>> Shard(1, 3).of("100:500:2")
    '102:500:6'
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"shard must be number/count with 0 <= number < count, got {self.number}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Shard out of ``0/3``."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise ValueError(f"shard must be number/count, such as 0/3, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def of(self, examples: str) -> str:
        """The examples ``start:stop:step`` of this shard."""
        parse_examples(examples, 1)
        start, stop, step = (int(part) if part else None for part in [*examples.split(":"), ""][:3])
        first, by = start or 0, 1 if step is None else step
        if first < 0 or by < 0:
            raise ValueError(f"examples must count forwards from 0 or more to be divided into shards, got {examples!r}")
        return f"{first + self.number * by}:{'' if stop is None else stop}:{by * self.count}"

    def note(self, examples: str) -> dict[str, Any]:
        """What the manifest says of this shard of the examples."""
        return {"number": self.number, "count": self.count, "of": examples}


def merge(records: Sequence[Record], output: str | Path) -> Record:
    """Join the shards of one run into the record that the whole run would have written, but for its times.

    Parameters
    ----------
    records : sequence of Record
        Finished, of one configuration but for their examples; in any order.
    output : path
        Where to write the whole, with its manifest.

    Returns
    -------
    Record

    Raises
    ------
    ValueError
        For shards that are not finished, not of one run, overlap, or leave a gap; for certificates of a memory, each of
        which would be of its own; and if the data is no longer that of the shards. The message names the record.
    OSError
        If the data is not there, or the output cannot be written.

    Notes
    -----
    Shards made with `Shard` say what they are a part of. Of others the union must be evenly spaced; whether something
    is missing before the first or after the last of its inputs, nobody can tell then.
    """
    target = Path(output)
    if not records or target.resolve() in {record.path.resolve() for record in records}:
        raise ValueError(f"records must hold at least one shard, and output another path than theirs, got {target}")
    check_folder(target)
    manifests = [_manifest(record) for record in records]
    for record, manifest in zip(records[1:], manifests[1:], strict=True):
        _check_same(records[0], manifests[0], record, manifest)
    first = manifests[0]
    data = load(first["config"]["data"])
    for record, manifest in zip(records, manifests, strict=True):
        if manifest.get("data_sha256") != digest_rows(data.x_test, record.idx):
            raise ValueError(f"{record.path} was made with other inputs than {data.name} holds now; restore them")
        if manifest.get("labels_sha256") != digest_rows(data.y_test, record.idx):
            raise ValueError(f"{record.path} was made with other labels than {data.name} holds now; restore them")
    examples = _whole([record.path for record in records], manifests)
    found = _check_cover(records, parse_examples(examples, len(data.x_test)) if examples else None)
    examples = examples or f"{found[0]}:{found[-1] + 1}:{found[1] - found[0] if len(found) > 1 else 1}"
    facts = {
        **{name: value for name, value in first.items() if name not in _OWN},
        "data_sha256": digest_rows(data.x_test, found),
        "labels_sha256": digest_rows(data.y_test, found),
        "indices_sha256": digest(found),
    }
    notes = {name: first.get(name) for name in ("network_outputs", "training")}
    notes["shards"] = [record.path.name for record in records]
    rows = np.concatenate([record.idx for record in records])
    places = np.argsort(rows)[np.searchsorted(np.sort(rows), found)]
    certificates = Certificates.concatenate([to_certificates(record) for record in records])[places]
    labels, times = (np.concatenate([getattr(record, name) for record in records]) for name in ("label", "time"))
    with RecordWriter(target, {**first["config"], "examples": examples}, facts=facts, notes=notes) as writer:
        new = np.array([int(index) not in writer.done for index in found])
        writer.append(certificates[new], labels[places][new], times[places][new])
    return read_record(target)


def _manifest(record: Record) -> dict[str, Any]:
    """Manifest of a shard that is finished, and may be joined with others."""
    known = record.manifest
    if known is None or not isinstance(known.get("config"), dict):
        raise ValueError(f"{record.path} has no manifest of a run beside it, so nobody knows what it is a part of")
    if record.kind == "committed":
        raise ValueError(f"{record.path} holds promises of a memory, which say nothing of those of another memory")
    if known.get("indices_sha256") != digest(record.idx):
        raise ValueError(f"{record.path} is not finished: run the command again that began it, and it goes on")
    return known


def _check_same(first: Record, known: dict[str, Any], other: Record, manifest: dict[str, Any]) -> None:
    """``ValueError`` that names what two shards do not have in common."""
    one, two = ({**each["config"], "examples": None} for each in (known, manifest))
    changed = [f"config.{name}" for name in sorted({*one, *two}) if one.get(name) != two.get(name)]
    changed += [name for name in sorted({*known, *manifest} - _OWN) if known.get(name) != manifest.get(name)]
    if not same_outputs(known.get("network_outputs", []), manifest.get("network_outputs", [])):
        changed.append("what the network answers")
    if changed or first.kind != other.kind:
        raise ValueError(
            f"{first.path} and {other.path} are not of one run: they differ in {', '.join(changed) or 'kind'}; name "
            "the shards of one run alone"
        )
    compare_versions(other.path, manifest, known.get("versions", {}))


def _whole(paths: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> str | None:
    """Examples of the whole run, if the shards know it."""
    notes = [manifest.get("shard") for manifest in manifests]
    if not any(notes):
        return None
    known = [note or {} for note in notes]
    if len({(note.get("count"), note.get("of")) for note in known}) > 1:
        raise ValueError(f"{', '.join(map(str, paths))} are not shards of one division; name those of one run alone")
    count = int(known[0]["count"])
    missing = sorted({*range(count)} - {note["number"] for note in known})
    if missing:
        names = ", ".join(f"{number}/{count}" for number in missing)
        raise ValueError(f"shard {names} is missing beside {', '.join(map(str, paths))}; name it too")
    return str(known[0]["of"])


def _check_cover(records: Sequence[Record], wanted: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Indices of the whole, in order; ``ValueError`` for inputs that come twice, or not at all."""
    rows = np.concatenate([record.idx for record in records])
    known, counts = np.unique(rows, return_counts=True)
    if np.any(counts > 1):
        twice = int(known[counts > 1][0])
        names = [str(record.path) for record in records if twice in record.idx]
        raise ValueError(f"input {twice} is in {' and in '.join(names)}; an input counts once: leave one of them out")
    steps = np.diff(known)
    expected = np.arange(known[0], known[-1] + 1, steps.min() if len(steps) else 1) if wanted is None else wanted
    absent = np.setdiff1d(expected, known)
    if len(absent) or len(expected) != len(known):
        gap = int(absent[0]) if len(absent) else int(np.setdiff1d(known, expected)[0])
        raise ValueError(f"input {gap} does not fit between the others: a shard is missing, or one is of another run")
    return expected

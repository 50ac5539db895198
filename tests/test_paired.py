"""Paired differences: against a closed form, and what they are not allowed to compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted import LABELS, our_certificates, ours

from art_rs_plugins.benchmark.paired import paired
from art_rs_plugins.benchmark.records import Record, read_record
from art_rs_plugins.benchmark.writer import RecordWriter
from art_rs_plugins.theory.metrics import paired_difference


def test_difference_and_standard_error_are_those_of_the_pairs() -> None:
    rng = np.random.default_rng(3)
    first = rng.normal(size=400)
    second = first + rng.normal(0.1, 0.05, size=400)   # far closer to one another than each is to its mean
    difference, error = paired_difference(second, first)
    assert difference == pytest.approx(np.mean(second) - np.mean(first))
    assert error == pytest.approx(0.05 / 20, rel=0.2)
    assert paired_difference([1, 0, 1], [1, 0, 1]) == (0.0, 0.0)
    for values, baseline in (([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0]), (np.zeros((2, 2)), np.zeros((2, 2)))):
        with pytest.raises(ValueError, match="one shape"):
            paired_difference(values, baseline)


def record(folder: Path, name: str, **changes: np.ndarray) -> Record:
    with RecordWriter(folder / f"{name}.tsv", {}) as writer:
        writer.append(replace(our_certificates(), **changes), LABELS, 0.1)
    return read_record(folder / f"{name}.tsv")


def test_records_are_compared_with_the_first_input_by_input(tmp_path: Path) -> None:
    first = ours(tmp_path)   # right with radii .6 and .3, an abstention, and wrong with .9
    better = record(tmp_path, "better", radius=np.array([0.6, 0.5, 0.0, 0.9]), prediction=np.array([0, 1, 1, 1]))
    table = paired([first, ours(tmp_path, "conditional", "published"), better], (0.0, 0.4))
    assert table is not None
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0] == ["", "r=0", "r=0.4", "ACR"]
    at_0, at_4 = np.array([0, 0, 0, 1]), np.array([0, 1, 0, 1])
    average = np.array([0.0, 0.2, 0.0, 0.9])
    assert rows[2][0] == "better"
    assert rows[2][1:] == [f"{d.mean():+.3f} ± {d.std(ddof=1) / 2:.3f}" for d in (at_0, at_4, average)]
    assert len(rows) == 3   # what is conditional is not compared
    assert paired([first], (0.0,)) is None
    turned = ours(tmp_path, name="turned")
    order = np.array([2, 0, 3, 1])
    names = ("idx", "label", "predict", "radius", "correct")
    shuffled = replace(turned, **{name: getattr(turned, name)[order] for name in names})
    assert "+0.000 ± 0.000" in str(paired([first, shuffled], (0.0,)))
    with pytest.raises(ValueError, match="other inputs"):
        paired([first, replace(turned, label=turned.label + 1)], (0.0,))
    with pytest.raises(ValueError, match="other inputs"):
        paired([first, record(tmp_path, "other", index=np.array([3, 5, 7, 8]))], (0.0,))

"""Inputs beside their nearest adversarial examples, with what was certified about them."""

from __future__ import annotations

import html

import numpy as np

from art_rs_plugins.benchmark.markup import html_table, png
from art_rs_plugins.benchmark.nearest import Nearest
from art_rs_plugins.benchmark.records import Record

__all__ = ["gallery"]


def gallery(nearest: Nearest, record: Record) -> str:
    """Images of shape (1 or 3, h, w) as cards: input, difference made visible, adversarial example; else a table.

    Parameters
    ----------
    nearest : Nearest
        At least one input.
    record : Record
        With a row for each of the inputs.

    Raises
    ------
    ValueError
        For no inputs, or inputs that are not in the record.
    """
    missing = sorted(set(nearest.index.tolist()) - set(record.idx.tolist()))
    if missing or not len(nearest.index):
        raise ValueError(
            f"nearest must hold inputs of {record.path.name}, got {missing or 'none'}; attack the record again"
        )
    rows = [int(np.flatnonzero(record.idx == index)[0]) for index in nearest.index]
    shape = nearest.original.shape[1:]
    if len(shape) == 3 and shape[0] in (1, 3):
        return f'<ul class="gallery">{"".join(_card(nearest, record, *pair) for pair in enumerate(rows))}</ul>'
    table = [
        {
            "input": f"{record.idx[row]}",
            "label": f"{record.label[row]}",
            "certified class": "" if record.abstained[row] else f"{record.predict[row]}",
            "radius": f"{record.radius[row]:.4g}",
            "distance": f"{nearest.distance[number]:.4g}",
            "attack": nearest.attack[number],
        }
        for number, row in enumerate(rows)
    ]
    return html_table(table, "Nearest adversarial examples")


def _card(nearest: Nearest, record: Record, number: int, row: int) -> str:
    """One input; a certificate that its example contradicts stands out."""
    original, adversarial = nearest.original[number], nearest.adversarial[number]
    difference = adversarial.astype(np.float64) - original
    gain = 0.5 / max(float(np.abs(difference).max()), 1e-12)
    pictures = (("as it is", original), ("difference", 0.5 + gain * difference), ("adversarial example", adversarial))
    index, radius, distance = record.idx[row], record.radius[row], nearest.distance[number]
    images = "".join(f'<img src="{png(picture)}" alt="Input {index}: {what}">' for what, picture in pictures)
    # The nearest example may keep the certified class where that is wrong: only a right one can be contradicted by it.
    broken = bool(record.correct[row]) and distance < radius
    claim = "Nothing certified." if record.abstained[row] else f"Class {record.predict[row]} certified within "
    claim += "" if record.abstained[row] else f"<b>{radius:.3f}</b>."
    return (
        f'<li{" class=broken" if broken else ""}><div>{images}</div>'
        f"<p><b>Input {index}</b>, label {record.label[row]}. {claim} Nearest adversarial example "
        f"at <b>{distance:.3f}</b> ({html.escape(nearest.attack[number])})"
        f"{', <b>inside the certified ball</b>' if broken else ''}. Difference &times; {gain:.2g}.</p></li>"
    )

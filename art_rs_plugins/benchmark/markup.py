"""Pieces of a page: tables that scroll, drawings and images inlined, and the little Markdown that notes are in."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import NDArray

from art_rs_plugins.benchmark.tables import TEXT

__all__ = ["drawing", "html_table", "markdown", "png", "svg"]


def html_table(rows: Sequence[Mapping[str, str]], label: str) -> str:
    """Rows of cells as a table that scrolls on its own where it is wide, with a mouse or with the arrow keys.

    Parameters
    ----------
    rows : sequence of mappings
        At least one, all with the same columns; the first column names the row.
    label : str
        What a screen reader calls it.
    """

    def cells(values: Mapping[str, str], first: str, rest: str) -> str:
        parts = []
        for number, (name, value) in enumerate(values.items()):
            kind = ' class="text"' if name in TEXT else ""
            tag, scope = (rest, "") if number else (first, ' scope="row"')
            if rest == "th":
                scope = ' scope="col"'
            parts.append(f"<{tag}{scope}{kind}>{html.escape(value)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    head = cells({name: name for name in rows[0]}, "th", "th")
    body = "\n".join(cells(row, "th", "td") for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}">'
        f"<table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>"
    )


def drawing(draw: Callable[[Axes], object]) -> str:
    """SVG of what `draw` puts on fresh axes; text stays text."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "art_rs_plugins", "font.size": 11}):
        figure = Figure(figsize=(8.2, 4.4), layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = stream.getvalue()
    return text[text.index("<svg") :]


def svg(draw: Callable[[Axes], object]) -> str:
    """`drawing` to stand in a page, where nothing refers to the outside."""
    return _inline(drawing(draw))


def _inline(text: str) -> str:
    for namespace in ('xmlns:xlink="http://www.w3.org/1999/xlink"', 'xmlns="http://www.w3.org/2000/svg"'):
        text = text.replace(namespace, "", 1)   # HTML needs neither
    return text


def png(image: NDArray[np.floating]) -> str:
    """Image (1 or 3, h, w) with values in [0, 1], clipped to them, as a ``data:`` address."""
    pixels = np.rint(np.clip(np.moveaxis(image, 0, -1), 0.0, 1.0) * 255.0).astype(np.uint8)
    stream = io.BytesIO()
    imsave(stream, np.broadcast_to(pixels, (*pixels.shape[:2], 3)), format="png", metadata={"Software": ""})
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def markdown(text: str) -> str:
    """Tables, paragraphs and inline drawings (SVG) of Markdown as HTML; all else is shown as it is written.

    Examples
    --------
    >>> markdown("a < b")
    '<p>a &lt; b</p>'
    """
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if len(lines) > 2 and all(line.lstrip().startswith("|") for line in lines):
            names, _, *rows = [_cells(line) for line in lines]
            parts.append(html_table([dict(zip(names, row, strict=False)) for row in rows], "Table"))
        elif block.startswith("<svg"):
            parts.append(_inline(block))
        else:
            parts.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(parts)


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]

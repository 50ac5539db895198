"""Curves and audits as interactive figures: hover shows the values, and a legend of buttons toggles what is drawn.

The same pictures as `plots`, for a page; nothing is loaded from anywhere.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from plotly import graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from art_rs_plugins.benchmark.plots import ALARM, COLOURS, bracket
from art_rs_plugins.theory.audit import Audit
from art_rs_plugins.theory.metrics import Curve

__all__ = ["audit_figure", "curves_figure", "figure_html", "plotly_script"]

_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "pentagon", "star", "hexagon")
_DASHES = ("solid", "dash", "dot")
_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtons": [["zoom2d", "pan2d", "resetScale2d", "toImage"]],   # none that sends anything anywhere
}
_AXIS = {"showline": True, "linecolor": "#888888", "gridcolor": "#e6e6e6", "zeroline": False, "automargin": True}
_LAYOUT = {
    "template": "none",
    "showlegend": False,   # buttons toggle; Plotly's own legend needs a mouse
    "hovermode": "x unified",
    "dragmode": False,     # a finger scrolls the page
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8a94a0", "activecolor": "#3b82c4"},
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif", "size": 13},
    "margin": {"l": 52, "r": 16, "t": 34, "b": 48},
}


def plotly_script() -> str:
    """The library, as one script for a page; once, before the first figure."""
    return f"<script>{get_plotlyjs()}</script>"


def _figure(end: float) -> go.Figure:
    figure = go.Figure(layout=_LAYOUT)
    figure.update_xaxes(
        title="l2 radius (units of the input)",
        range=[0.0, end or 1.0],
        unifiedhovertitle={"text": "radius %{x:.4~g}"},
        showgrid=False,
        **_AXIS,
    )
    figure.update_yaxes(title="accuracy", range=[0.0, 1.02], **_AXIS)
    return figure


def _line(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % len(COLOURS)], "dash": _DASHES[number // len(COLOURS) % len(_DASHES)]}


def _fill(
    x: NDArray[np.float64], lower: NDArray[np.float64], upper: NDArray[np.float64], *, colour: str, group: str
) -> go.Scatter:
    """Area between two lines."""
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([upper, lower[::-1]]),
        fill="toself",
        fillcolor=f"rgba{(*(int(colour[i : i + 2], 16) for i in (1, 3, 5)), 0.16)}",
        line={"width": 0, "color": colour},
        mode="lines",
        hoverinfo="skip",
        legendgroup=group,
    )


def _add_curve(figure: go.Figure, name: str, curve: Curve, number: int) -> None:
    """Line and band of one curve; hover shows accuracy, band and the number of inputs."""
    line = _line(number)
    figure.add_trace(_fill(curve.radii, curve.lower, curve.upper, colour=line["color"], group=name))
    counts = np.rint(curve.accuracy * curve.total)
    figure.add_trace(
        go.Scatter(
            x=curve.radii,
            y=curve.accuracy,
            customdata=np.stack([curve.lower, curve.upper, counts], axis=1),
            hovertemplate="%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}], "
            f"%{{customdata[2]:.0f}} of {curve.total}",
            mode="lines",
            line={"width": 2.2, **line},
            name=html.escape(name),
            legendgroup=name,
        )
    )


def curves_figure(curves: Mapping[str, Curve]) -> go.Figure:
    """Accuracy by radius with its band, one line for each curve.

    Parameters
    ----------
    curves : mapping of Curve
        By the name that the legend shows.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    ValueError
        For no curves.
    """
    if not curves:
        raise ValueError("curves must hold at least one curve")
    figure = _figure(max(float(curve.radii[-1]) for curve in curves.values()))
    for number, (name, curve) in enumerate(curves.items()):
        _add_curve(figure, name, curve, number)
    return figure


def audit_figure(audits: Mapping[str, Audit], curve: Curve) -> go.Figure:
    """The bracket of the true robust accuracy: the certified curve below, what each attack left above.

    Parameters
    ----------
    audits : mapping of Audit
        By attack; ``"all"``, the worst of them, is the upper end of the bracket.
    curve : Curve
        Certified accuracy of the same inputs, at as many radii as the picture shall show.

    Returns
    -------
    plotly.graph_objects.Figure
        Every contradiction is a red cross at the distance of its adversarial input.
    """
    worst = audits["all"]
    figure = _figure(max(1.02 * float(worst.budgets[-1]), float(curve.radii[-1])))
    _add_curve(figure, "certified", curve, 0)
    radii, lower, upper = bracket(worst, curve)
    figure.add_trace(_fill(radii, lower, np.maximum(lower, upper), colour="#8a94a0", group="undecided"))
    shown = [name for name in audits if name != "all"]
    for number, name in enumerate(["all", *shown] if len(shown) != 1 else shown, start=1):
        figure.add_trace(_attack(name, audits[name], number))
    if worst.contradictions:
        figure.add_trace(_crosses(worst, curve))
    return figure


def _attack(name: str, audit: Audit, number: int) -> go.Scatter:
    """What one attack left; robust accuracy cannot rise, so a budget's value holds up to the next one."""
    return go.Scatter(
        x=audit.budgets,
        y=audit.attacked,
        customdata=np.stack([audit.correct, audit.abstained, audit.wrong, audit.gap], axis=1),
        hovertemplate="%{y:.3f} not deceived (right %{customdata[0]:.3f}, abstained %{customdata[1]:.3f}), "
        f"gap %{{customdata[3]:.3f}}, {audit.total} inputs",
        mode="lines+markers",
        line={"width": 3.0 if name == "all" else 1.2, "shape": "hv", **_line(number)},
        marker={"size": 7, "symbol": _MARKERS[number % len(_MARKERS)]},
        name=html.escape("all attacks" if name == "all" else name),
        legendgroup="all attacks" if name == "all" else name,
    )


def _crosses(worst: Audit, curve: Curve) -> go.Scatter:
    cases = worst.contradictions
    distances = [case.distance for case in cases]
    return go.Scatter(
        x=distances,
        y=np.interp(distances, curve.radii, curve.accuracy),
        customdata=[
            f"input {case.index}: {html.escape(case.attack)} at {case.distance:.4g} inside radius {case.radius:.4g}"
            for case in cases
        ],
        hovertemplate="%{customdata}",
        mode="markers",
        line={"color": ALARM},
        marker={"symbol": "x", "size": 13, "color": ALARM},
        name="contradiction",
        legendgroup=f"contradictions: {len(cases)}",
    )


def figure_html(figure: go.Figure, name: str) -> str:
    """A figure as part of a page that holds `plotly_script`, with its legend: a button for each group of traces.

    Parameters
    ----------
    figure : plotly.graph_objects.Figure
        Its traces' ``legendgroup`` names what a button toggles.
    name : str
        Of the element; each figure of a page needs its own.

    Returns
    -------
    str
    """
    groups: dict[str, list[int]] = {}
    for number, trace in enumerate(figure.data):
        groups.setdefault(trace.legendgroup, []).append(number)
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-traces="{json.dumps(traces)}">'
        f'<span style="background:{figure.data[traces[0]].line.color}"></span>{html.escape(group)}</button>'
        for group, traces in groups.items()
    )
    plot = to_html(
        figure, config=_CONFIG, include_plotlyjs=False, full_html=False, default_height="26rem", div_id=name
    )
    return (
        f'<div class="legend" role="group" aria-label="Show or hide">{buttons}</div>\n'
        f'<div role="img" aria-label="Plot; its numbers are in the table below">{plot}</div>'
    )

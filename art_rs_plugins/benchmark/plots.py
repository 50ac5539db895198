"""Curves and audits as pictures: axes in, axes out. Reads the structs of theory, never an estimator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from art_rs_plugins.theory.audit import Audit
from art_rs_plugins.theory.metrics import Curve

__all__ = ["ALARM", "COLOURS", "bracket", "plot_audit", "plot_certified_accuracy"]

COLOURS = ("#3b82c4", "#d9752b", "#36a269", "#9a6bc9", "#b08a3e", "#2f9fb3", "#d4578f", "#758a2e")
"""Colours of curves, told apart from one another, from white and from black."""
ALARM = "#e02020"
"""Colour of contradictions."""
_ATTACK, _INK = COLOURS[1], "#333333"
_LONG = 40   # letters of a name that leave room for the curves


def _axes(ax: Axes | None) -> Axes:
    """Return the axes given, or fresh ones on a figure that no global state knows."""
    if ax is not None:
        return ax
    return Figure(figsize=(7.2, 4.2), layout="constrained").subplots()


def _finish(ax: Axes, end: float) -> Axes:
    """Label the axes and leave out the furniture."""
    ax.set(xlim=(0.0, end or 1.0), ylim=(0.0, 1.0), xlabel="l2 radius (units of the input)", ylabel="accuracy")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#888888")
    ax.tick_params(colors=_INK)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def _draw_curve(ax: Axes, curve: Curve, colour: str) -> None:
    ax.fill_between(curve.radii, curve.lower, curve.upper, color=colour, alpha=0.15, linewidth=0)
    ax.plot(curve.radii, curve.accuracy, color=colour, linewidth=1.8)


def plot_certified_accuracy(curves: Mapping[str, Curve], ax: Axes | None = None) -> Axes:
    """Draw accuracy by radius with its band, one line for each curve.

    Parameters
    ----------
    curves : mapping of Curve
        By the name that the legend shows.
    ax : Axes, optional
        Where to draw; fresh ones by default, whose figure is ``ax.figure``.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        For no curves.
    """
    if not curves:
        raise ValueError("curves must hold at least one curve")
    ax = _axes(ax)
    for number, curve in enumerate(curves.values()):
        _draw_curve(ax, curve, COLOURS[number % len(COLOURS)])
    legend = ax.legend(ax.lines[-len(curves) :], ["-"] * len(curves), frameon=False)
    for text, name in zip(legend.get_texts(), curves, strict=True):
        text.set_parse_math(False)  # a "$" in a file's name is no formula
        text.set_text(name if len(name) <= _LONG else f"…{name[1 - _LONG :]}")
    return _finish(ax, max(float(curve.radii[-1]) for curve in curves.values()))


def bracket(audit: Audit, curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Radii from the first budget to the last, and both ends of the bracket of the true robust accuracy at them.

    Robust accuracy cannot rise with the radius, so what an attack left at one budget holds up to the next one.
    """
    inside = curve.radii[(curve.radii > audit.budgets[0]) & (curve.radii < audit.budgets[-1])]
    just_before = np.nextafter(audit.budgets[1:], 0.0)   # both sides of a step
    radii = np.unique(np.concatenate([audit.budgets, just_before, inside]))
    upper = audit.attacked[np.searchsorted(audit.budgets, radii, side="right") - 1]
    return radii, np.interp(radii, curve.radii, curve.accuracy), upper


def plot_audit(audit: Audit, curve: Curve, ax: Axes | None = None) -> Axes:
    """Draw the bracket of the true robust accuracy: certified below, attacked above, the gap between them shaded.

    Parameters
    ----------
    audit : Audit
        Attacked accuracy at the budgets.
    curve : Curve
        Certified accuracy of the same inputs, at as many radii as the picture shall show.
    ax : Axes, optional
        Where to draw; fresh ones by default, whose figure is ``ax.figure``.

    Returns
    -------
    Axes
        Every contradiction is a red cross at the distance of its adversarial input.
    """
    ax = _axes(ax)
    _draw_curve(ax, curve, COLOURS[0])
    certified = ax.lines[-1]
    end = float(audit.budgets[-1])
    radii, lower, upper = bracket(audit, curve)
    gap = ax.fill_between(radii, lower, upper, where=list(upper >= lower), color=_ATTACK, alpha=0.13, linewidth=0)
    (attacked,) = ax.plot(
        audit.budgets, audit.attacked, color=_ATTACK, linewidth=1.8, marker="o", markersize=4, drawstyle="steps-post"
    )
    handles, names = [attacked, gap, certified], ["under attack", "undecided", "certified"]
    cases = audit.contradictions
    if cases:
        distances = [case.distance for case in cases]
        (marks,) = ax.plot(
            distances, np.interp(distances, curve.radii, curve.accuracy), "X", color=ALARM, markersize=11, zorder=5
        )
        handles, names = [marks, *handles], [f"contradictions: {len(cases)}", *names]
    ax.legend(handles, names, frameon=False)
    return _finish(ax, max(1.02 * end, float(curve.radii[-1])))

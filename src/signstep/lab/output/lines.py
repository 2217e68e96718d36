"""Line charts over a number, in the style of `signstep.lab.output.figures`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from signstep.lab.output import figures
from signstep.lab.output.stats import MeanEstimate


@dataclass(frozen=True)
class Line:
    """Values over x; an estimate's interval is drawn as a bar."""

    label: str
    colour: str
    """A name of the palette of `figures`."""
    x: tuple[float, ...]
    y: tuple[MeanEstimate, ...]
    dashed: bool = False
    marks: bool = True
    """A mark at each value."""
    joined: bool = True
    """A line through the values."""


def lines(
    chosen: Sequence[Line],
    *,
    across: str,
    up: str,
    heading: tuple[str, str],
    ticks: Sequence[float] | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> Figure:
    """Lines named at their right ends.

    Args:
        chosen: a line without a label is not named.
        across: what x is.
        up: what y is.
        heading: title and subtitle.
        ticks: of x; None: chosen for it.
        limits: of y; None: by the values.
    """
    width, height, right, top = 680.0, 400.0, 190.0, 70.0
    figure, axes = figures.single_plot(width, height, left=40, right=right, top=top, bottom=40)
    for order, line in enumerate(chosen):
        style: dict[str, Any] = {"color": figures.shade(line.colour), "zorder": 3 + order}
        y = [e.mean for e in line.y]
        if line.joined:
            axes.plot(line.x, y, linestyle=(0, (4, 2)) if line.dashed else "-", linewidth=1.6, **style)
        if line.marks:
            axes.plot(line.x, y, "o", markersize=3.6, clip_on=False, **style)
        for x, e in zip(line.x, line.y, strict=True):
            if e.half_width is not None:
                axes.plot([x, x], [e.mean - e.half_width, e.mean + e.half_width], linewidth=1.2, **style)
    x_values = [x for line in chosen for x in line.x]
    axes.set_xlim(min(x_values), max(x_values))
    axes.set_ylim(*limits)
    if ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=figures.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(across, color=figures.MUTED, fontsize=10, loc="right", labelpad=3)
    figures.annotate(axes, up, (0, 1), "axes fraction", (-30, 7))
    low, high = axes.get_ylim()
    named = sorted((line for line in chosen if line.label), key=lambda line: line.y[-1].mean)
    gap = (high - low) * 14 / (height - top - 40)
    places = figures.spread_out([line.y[-1].mean for line in named], gap, low, high)
    for line, place in zip(named, places, strict=True):
        shade = figures.shade(line.colour)
        axes.annotate(
            "", (line.x[-1], line.y[-1].mean), (1.05, place), textcoords=("axes fraction", "data"),
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 1},
        )  # fmt: skip
        figures.annotate(
            axes,
            line.label,
            (1, place),
            ("axes fraction", "data"),
            (26, 0),
            color=figures.INK,
            fontsize=9.5,
            va="center",
        )
    figures.add_heading(figure, heading, 6)
    return figure

"""The benchmarks' bar charts: panels of horizontal bars on a logarithmic axis, names at the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, NullLocator

from signstep.lab.bench.spread import Spread, number
from signstep.lab.output import figures


def draw_bars(
    axes: Axes,
    title: str,
    bars: Sequence[tuple[str, Spread | None]],
    *,
    start: float,
    span: tuple[float, float],
    ticks: Locator,
) -> None:
    """Draw one bar below the other, from `start` to the median, with a line from the 10th to the 90th percentile.

    Each bar has a colour, which is a name of the palette, and a value; where that is None, its place stays empty.
    `span` has the ends of the axis.
    """
    axes.tick_params(labelsize=9)
    axes.set_xscale("log")
    axes.set_xlim(*span)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.yaxis.set_visible(False)
    axes.xaxis.set_major_locator(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", color=figures.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    figures.annotate(axes, title, (0, 1), "axes fraction", (0, 6), color=figures.INK, fontsize=9.5)
    for y, (colour, spread) in enumerate(bars):
        if spread is None:
            continue
        axes.barh(y, spread.median - start, 0.62, left=start, color=figures.shade(colour), zorder=3)
        axes.plot([spread.low, spread.high], [y, y], color=figures.MUTED, linewidth=1, zorder=4)
        style: dict[str, Any] = {"color": figures.INK, "fontsize": 8.5, "va": "center", "ha": "right"}
        figures.annotate(axes, number(spread.median), (1, y), ("axes fraction", "data"), (34, 0), **style)


def name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Write the names of a panel's bars at its left."""
    style: dict[str, Any] = {"color": figures.INK, "fontsize": 9, "va": "center", "ha": "right"}
    for y, name in enumerate(names):
        figures.annotate(axes, name, (0, y), ("axes fraction", "data"), (-6, 0), **style)


def draw_legend(figure: Figure, kinds: Sequence[tuple[str, str]]) -> None:
    """Write what the colours mean under a figure's heading; `kinds` has a name and a colour for each."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    x = 12.0
    for name, colour in kinds:
        shade = figures.shade(colour)
        figure.text(x / width, 1 - 49 / height, f"■ {name}", color=shade, fontsize=9, va="center")
        x += 22 + 5.2 * len(name)

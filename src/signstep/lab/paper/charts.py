"""The figures of the results: accuracy over epochs as in the paper's Figures 1 to 3, and Table I as dots.

First what a figure shows (`curves`, `dots`, `difference_dots`), then how it is drawn (`draw_curves`, `draw_dots`), in
the style of `signstep.lab.output.figures`. Results are in the unit of their metric.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from signstep.lab.output import figures, stats
from signstep.lab.output.stats import MIN_SEEDS, MeanEstimate, number, signed
from signstep.lab.paper.experiments import Row
from signstep.lab.paper.results import Results
from signstep.lab.training.records import Run
from signstep.lab.training.tasks import ACCURACY, Metric

_COLOURS = {
    "sgd": "black",
    "adam": "grey",
    "signsgd": "blue",
    "signsgd-bfloat16": "orange",
    "signsgd-int8": "pink",
    "post-0.1": "pink",
    "post-0.5": "brown",
    "pre-0.5": "vermillion",
    "pre-0.1": "orange",
    "pre-0.01": "olive",
    "pre-relative": "violet",
    "hybrid": "green",
    "hybrid-ratio": "olive",
    "hybrid-pre-0.1": "violet",
    "switch-sign-lr": "vermillion",
    "switch-sgd-lr": "brown",
    "switch-sgd-momentum": "pink",
    "hybrid-norm": "orange",
    "hybrid-norm-group": "pink",
    "hybrid-norm-plain": "brown",
    "dither-norm": "vermillion",
    "dither-norm-0.3": "brown",
    "dither-norm-0.7": "olive",
    "dither-auto": "grey",
    "lion": "pink",
    "lion-dither": "brown",
    "expected-relative": "olive",
    "swats": "green",
    "swats-0.001": "olive",
    "sgd-noise-0.01": "orange",
    "sgd-noise-0.3": "vermillion",
    "sgd-noise-1.0": "brown",
}
_SPARE = ("violet", "brown", "pink", "olive", "vermillion")


def colour(method: str) -> str:
    """Name of the palette colour of a method, by its row's key: the same in every figure and table.

    A method that this module does not know gets one that depends on its key alone.
    """
    return _COLOURS.get(method) or _SPARE[zlib.crc32(method.encode()) % len(_SPARE)]


@dataclass(frozen=True)
class Curve:
    """One method's result over epochs: mean over seeds, and the interval where there is one."""

    method: str
    label: str
    short: str
    """The label on the chart itself."""
    epochs: tuple[int, ...]
    estimates: tuple[MeanEstimate, ...]
    runs: tuple[Mapping[int, float], ...] = ()
    """Result by epoch of each seed."""
    own: bool = False
    """A method that is not in the paper: drawn dashed."""
    diverged_at: tuple[int, ...] = ()
    """Epochs in which a seed's run was stopped by a non-finite loss."""
    diverged: bool = False
    """Every seed diverged: the line ends before the run does, and no number belongs to it."""


@dataclass(frozen=True)
class Dot:
    """One method's line in a dot plot."""

    method: str
    label: str
    short: str
    """The label on the chart itself."""
    estimate: MeanEstimate | None
    values: tuple[float, ...]
    """One value per seed."""
    paper: float | None
    text: str
    """The estimate as printed, or why there is none."""


def curves(results: Results, dataset: str) -> tuple[Curve, ...]:
    """Mean result over epochs of each row that has been evaluated; its last point is the table's number."""
    lines = []
    for row in results.experiment.rows:
        cell = results.cells[row.key, dataset]
        series = [_series(run, to_the_end=not cell.all_diverged) for run in cell.runs]
        epochs = sorted({epoch for values in series for epoch in values})
        ended = tuple(int(run.end["epoch"]) for run in cell.runs if run.diverged and run.end)
        for run, values in zip(cell.runs, series, strict=True):
            if run.diverged and run.end and not cell.all_diverged:
                # It goes on at chance wherever another was evaluated after its end.
                rest = [epoch for epoch in epochs if epoch not in values and epoch >= int(run.end["epoch"])]
                values |= dict.fromkeys(rest, run.result)
        points = [stats.estimate([values[epoch] for values in series if epoch in values]) for epoch in epochs]
        if epochs:
            lines.append(
                Curve(
                    method=row.key,
                    label=row.label,
                    short=row.short_label,
                    epochs=tuple(epochs),
                    estimates=tuple(points),
                    runs=tuple(dict(sorted(values.items())) for values in series),
                    own=not row.in_paper,
                    diverged_at=ended,
                    diverged=cell.all_diverged,
                )
            )
    return tuple(lines)


def by_result(results: Results, dataset: str) -> list[tuple[Curve, str]]:
    """The curves from the best final result to the worst, each with that result as printed."""
    sign, digits = results.metric.sign, results.metric.digits
    lines = sorted(curves(results, dataset), key=lambda line: (line.diverged, -sign * line.estimates[-1].mean))
    return [
        (line, "diverged" if line.diverged else stats.with_interval(line.estimates[-1], digits=digits))
        for line in lines
    ]


def curve_values(results: Results, dataset: str) -> list[dict[str, Any]]:
    """What the page's script shows under the pointer."""
    return [
        {
            "method": c.method,
            "epochs": c.epochs,
            "text": [stats.with_interval(e, digits=results.metric.digits) for e in c.estimates],
        }
        for c in curves(results, dataset)
    ]


def dots(results: Results, dataset: str) -> tuple[Dot, ...]:
    """The table's column of a data set."""
    return tuple(
        Dot(
            row.key,
            row.label,
            row.short_label,
            cell.estimate,
            tuple(cell.results.values()) if cell.estimate else (),
            cell.paper,
            cell.text,
        )
        for _, rows in results.groups
        for row in rows
        if (cell := results.cells[row.key, dataset])
    )


def difference_dots(results: Results, dataset: str, baseline: Row) -> tuple[Dot, ...]:
    """The differences to a baseline on a data set."""
    base = results.cells[baseline.key, dataset].results
    lines = []
    for _, rows in results.groups:
        for row in rows:
            each = results.difference(dataset, row, baseline)
            if each is not None:
                own = results.cells[row.key, dataset].results
                values = tuple(own[s] - base[s] for s in own if s in base) if each.estimate else ()
                text = (
                    stats.with_interval(each.estimate, sign=True, digits=results.metric.digits)
                    if each.estimate
                    else "—"
                )
                lines.append(Dot(row.key, row.label, row.short_label, each.estimate, values, each.paper, text))
    return tuple(lines)


def _series(run: Run, *, to_the_end: bool) -> dict[int, float]:
    """Result by epoch; with `to_the_end` a diverged run's last epoch has that of chance."""
    values = {int(e["epoch"]): value for e in run.epochs if (value := run.result_of(e)) is not None}
    if run.diverged and to_the_end:
        values[run.config.epochs] = run.result
    return values


def axis_title(metric: Metric, what: str = "test") -> str:
    """What an axis or a column shows, with its unit.

    >>> axis_title(ACCURACY)
    'test accuracy, %'
    """
    return f"{what} {metric.name}" + (f", {metric.unit}" if metric.unit != metric.name else "")


def draw_curves(
    lines: Sequence[Curve],
    *,
    switches: Iterable[float],
    epochs: int,
    metric: Metric = ACCURACY,
    heading: tuple[str, str] | None = None,
) -> Figure:
    """The result over epochs, the interval over seeds as a band (of two seeds: each as a thin line), the switch to
    SGD as a red dashed line.

    Args:
        lines: the methods; later ones are drawn on top.
        switches: epochs (may be fractional) after which a hybrid method goes on as SGD.
        epochs: length of the runs, the right end of the axis.
        metric: what the values are.
        heading: title and subtitle of a figure that stands alone, where the lines are named at their ends; None:
            the page around the figure has a title and a key.
    """
    width, height, right, top = (680.0, 400.0, 245.0, 70.0) if heading else (400.0, 290.0, 14.0, 22.0)
    figure, axes = figures.single_plot(width, height, left=36, right=right, top=top, bottom=40)
    marker = "o" if max((len(line.epochs) for line in lines), default=0) <= 16 else None
    for order, line in enumerate(lines):
        name = colour(line.method)
        style: dict[str, Any] = {
            "color": figures.shade(name),
            "gid": figures.method_id(line.method),
            "zorder": 3 + order,
        }
        mean = [e.mean for e in line.estimates]
        banded = [(epoch, e) for epoch, e in zip(line.epochs, line.estimates, strict=True) if e.n >= MIN_SEEDS]
        if banded:
            axes.fill_between(
                [epoch for epoch, _ in banded],
                [max(e.mean - (e.half_width or 0), metric.least) for _, e in banded],
                [min(e.mean + (e.half_width or 0), metric.most) for _, e in banded],
                alpha=0.13,
                linewidth=0,
                **style,
            )
        if 1 < len(line.runs) < MIN_SEEDS:
            for values in line.runs:
                axes.plot(list(values), list(values.values()), linewidth=0.6, alpha=0.6, **style)
        dashes = (0, (4, 1.6)) if line.own else "-"
        axes.plot(
            line.epochs, mean, linestyle=dashes, linewidth=1.6, marker=marker, markersize=3.4, clip_on=False, **style
        )
        for epoch in line.diverged_at:
            at = [e.mean for at, e in zip(line.epochs, line.estimates, strict=True) if at <= epoch]
            axes.plot([epoch], [at[-1] if at else 0], marker="x", markersize=8, markeredgewidth=2, **style)
    ordered = sorted(set(switches))
    for switch in ordered:
        axes.axvline(switch, color=figures.SWITCH, linestyle=(0, (5, 3)), linewidth=1.2, zorder=2)
    if ordered:
        last, where = (ordered[-1], 1), ("data", "axes fraction")
        figures.annotate(axes, "switch to SGD", last, where, (3, 3), color=figures.SWITCH)
    axes.set_xlim(0, max(epochs, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=figures.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("epoch", color=figures.MUTED, fontsize=10, loc="right", labelpad=7)
    figures.annotate(axes, axis_title(metric), (0, 1), "axes fraction", (-30, 7))
    if heading:
        figures.add_heading(figure, heading, 6)
        _label_ends(axes, lines, height - top - 40, metric.digits)
    return figure


def _label_ends(axes: Axes, lines: Sequence[Curve], plot_height: float, digits: int) -> None:
    low, high = axes.get_ylim()
    ordered = sorted(lines, key=lambda line: line.estimates[-1].mean)
    gap = (high - low) * min(15 / plot_height, 1 / max(len(ordered), 1))
    places = figures.spread_out([line.estimates[-1].mean for line in ordered], gap, low, high)
    for line, place in zip(ordered, places, strict=True):
        last = line.estimates[-1]
        shade = figures.shade(colour(line.method))
        ending = "diverged" if line.diverged else number(last.mean, digits)
        axes.annotate(
            "", (line.epochs[-1], last.mean), (1.03, place), textcoords=("axes fraction", "data"),
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 1},
        )  # fmt: skip
        text, right = f"{line.short}  {ending}", ("axes fraction", "data")
        figures.annotate(axes, text, (1, place), right, (14, 0), color=figures.INK, fontsize=9.5, va="center")


def draw_dots(
    lines: Sequence[Dot],
    *,
    axis: str,
    zero: str = "",
    metric: Metric = ACCURACY,
    heading: tuple[str, str] | None = None,
) -> Figure:
    """One line per method: mean and interval, each seed as a small tick, the paper's number as a hollow mark.

    Args:
        lines: from top to bottom.
        axis: what the numbers are, printed below.
        zero: where not empty, the numbers are differences, and this names what the line at 0 stands for.
        metric: what the values are.
        heading: title and subtitle of a figure that stands alone.
    """
    step, bottom, width = 36.0, 40.0, 400.0
    top = (48.0 if heading else 4.0) + (20.0 if zero else 0.0)
    margin = 12.0 if heading else 3.0
    height = top + bottom + step * len(lines)
    figure, axes = figures.single_plot(width, height, left=margin, right=margin, top=top, bottom=bottom)
    axes.set_ylim(len(lines), 0)
    axes.yaxis.set_visible(False)
    for i, line in enumerate(lines):
        y = i + 0.68
        shade = figures.shade(colour(line.method))
        gid = figures.method_id(line.method)
        axes.axhline(y, color=figures.GRID, linewidth=0.8, zorder=1)
        above = ("axes fraction", "data")
        figures.annotate(axes, line.short, (0, i + 0.27), above, color=figures.INK, va="center")
        shown = figures.INK if line.estimate else figures.MUTED
        figures.annotate(axes, line.text, (1, i + 0.27), above, color=shown, va="center", ha="right")
        axes.plot(line.values, [y] * len(line.values), "|", color=shade, markersize=7, markeredgewidth=1, alpha=0.6,
                  gid=gid, zorder=3)  # fmt: skip
        if line.estimate is not None:
            e = line.estimate
            if e.half_width is not None:
                ends = [e.mean - e.half_width, e.mean + e.half_width]
                if not zero:
                    ends = [max(ends[0], metric.least), min(ends[1], metric.most)]
                axes.plot(ends, [y, y], color=shade, linewidth=2.2,
                          solid_capstyle="butt", gid=gid, zorder=3)  # fmt: skip
            axes.plot([e.mean], [y], "o", color=shade, markersize=6.5, gid=gid, zorder=5)
        if line.paper is not None:
            axes.plot(
                [line.paper],
                [y],
                "o",
                color=figures.INK,
                markerfacecolor="none",
                markersize=7,
                markeredgewidth=1.2,
                zorder=6,
            )
    axes.margins(x=0.04)
    axes.autoscale(axis="x")
    if zero:
        # Short of the text above each line.
        axes.vlines([0] * len(lines), [i + 0.5 for i in range(len(lines))], [i + 0.86 for i in range(len(lines))],
                    color=figures.MUTED, linewidth=1, zorder=2)  # fmt: skip
        figures.annotate(axes, zero, (0, 1), ("data", "axes fraction"), (0, 4), fontsize=9.5, ha="center")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if zero:
        whole = metric.digits if metric.better == "lower" else 0
        part = whole or 1
        axes.xaxis.set_major_formatter(lambda value, _: signed(value, whole if value == int(value) else part))
    axes.set_xlabel(axis, color=figures.MUTED, fontsize=10, loc="right", labelpad=7)
    if heading:
        figures.add_heading(figure, heading, 12)
    return figure

"""Figures of a monitor's records, in the style of `signstep.lab.output.figures`.

A run is its label and its records, in any order; of several records of one step the last counts. Every function draws a
figure that stands alone. With `page=True` it draws a narrow one, without the title and key that the page around it has.
A function raises `NothingToDraw` where no record has its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from signstep.lab.output import figures
from signstep.lab.studies.monitor_numbers import RULE_LABELS, Record, at, below_one, by_step, count, number, ratio
from signstep.monitor.reliability import SNR_EDGES
from signstep.theory.bounds import CRITICAL_SNR

LabelledRun = tuple[str, Sequence[Record]]

_SERIES = ("blue", "vermillion", "green", "violet", "orange", "pink", "olive", "brown", "black", "grey")
RULE_COLOURS = {
    "paper": "vermillion",
    "ratio": "green",
    "applied": "blue",
    "lagged": "violet",
    "swats": "orange",
    "calibrated_lr": "black",
}
"""Palette names, by rule; the last one is of the rate that the optimizer itself keeps."""
GAUSSIAN = (2.05, 3.0)
"""What alignment over Phi / 3 is under Gaussian noise: 3 erf(S / sqrt 2) / min(1, S) for every S."""
MATCH = 10.0
"""Factor between rms(m) and sigma up to which they are said to match."""
_BINS = 4.0
_DASHES = (0, (4, 2))


class NothingToDraw(ValueError):
    """No record has the numbers of this figure."""


def colour(index: int) -> str:
    """Palette name of the run that is drawn as number `index`."""
    return _SERIES[index % len(_SERIES)]


def noise_histograms(early: Record, late: Record | None = None, *, page: bool = False) -> Figure:
    """Gradients of micro-batches at a few coordinates, standardised, on the normal law that has their mean and spread.

    Args:
        early: a record with "samples".
        late: a record of a later step of the same model.
        page: narrow, without a title.
    """
    shown = [record for record in (early, late) if record is not None and samples(record)]
    columns = [samples(record) for record in shown]
    if not columns:
        raise NothingToDraw("no record has samples: they need at least 20 micro-batches")
    coordinates = list(dict.fromkeys(key for column in columns for key in column))
    across = len(columns)
    groups = min((2 if page else 4) // across, len(coordinates))
    rows = -(-len(coordinates) // groups)
    width = 400.0 if page else 680.0
    top, margin, gap, between = (2.0 if page else 48.0), 3.0 if page else 8.0, 12.0, 26.0
    step, plot, below = 118.0, 66.0, 24.0
    cell = (width - 2 * margin - gap * groups * (across - 1) - between * (groups - 1)) / (groups * across)
    height = top + rows * step + below
    figure = figures.blank(width, height)
    for place, key in enumerate(coordinates):
        row, group = divmod(place, groups)
        left = margin + group * (across * cell + (across - 1) * gap + between)
        bottom = height - top - row * step - 34 - plot
        for index, column in enumerate(columns):
            axes = figures.add_plot(figure, left + index * (cell + gap), bottom, cell, plot)
            words = _histogram(axes, column.get(key))
            when = f"step {count(at(shown[index], 'step'))}"
            figures.annotate(axes, f"{when}: {words}", (0, 1), "axes fraction", (0, 5), fontsize=9.5)
            axes.tick_params(labelbottom=row == rows - 1 or place + groups >= len(coordinates))
            if index == 0:
                name = _short(f"{key[0]} [{key[1]}]", (across * cell + (across - 1) * gap) / 5.4)
                figures.annotate(axes, name, (0, 1), "axes fraction", (0, 18), color=figures.INK, fontsize=9.5)
    if not page:
        counts = " and ".join(dict.fromkeys(str(len(next(iter(column.values())))) for column in columns))
        subtitle = f"gradients of {counts} micro-batches, less their mean, over their standard deviation; grey: the "
        figures.add_heading(figure, ("Noise of the gradient at single coordinates", subtitle + "normal law"), 8)
    return figure


def samples(record: Record) -> dict[tuple[str, int], list[float]]:
    """Values by (parameter, index)."""
    found = {}
    listed = record.get("samples")
    for sample in listed if isinstance(listed, Sequence) else ():
        values = sample.get("values") if isinstance(sample, Mapping) else None
        index = at(sample, "index")
        if isinstance(values, Sequence) and index is not None:
            known = [x for i in range(len(values)) if (x := at(values, i)) is not None]
            if len(known) >= 2:
                name = sample.get("name")
                found[name if isinstance(name, str) else "unnamed", int(index)] = known
    return found


def _histogram(axes: Axes, values: Sequence[float] | None) -> str:
    """Draw the histogram of a coordinate; returns how many of its values are 0, in words."""
    axes.set_xlim(-_BINS, _BINS)
    axes.xaxis.set_major_locator(FixedLocator([-2, 0, 2]))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.tick_params(labelsize=9)
    axes.yaxis.set_visible(False)
    x = np.linspace(-_BINS, _BINS, 81)
    normal = scipy.stats.norm.pdf(x)
    axes.fill_between(x, normal, color=figures.GRID, linewidth=0, zorder=1)
    axes.plot(x, normal, color=figures.MUTED, linewidth=0.8, zorder=4)
    axes.set_ylim(0, 0.5)
    if values is None:
        return "not measured"
    array = np.asarray(values, dtype=np.float64)
    zeros = float((array == 0).mean())
    spread = float(array.std(ddof=1))
    if not spread > 0 or not math.isfinite(spread):
        return "all are 0" if zeros == 1 else "does not vary"
    edges = np.arange(-_BINS, _BINS + 0.25, 0.5 if len(array) < 200 else 0.25)
    inside = np.clip((array - array.mean()) / spread, -_BINS, _BINS)
    density, _ = np.histogram(inside, edges, density=True)
    axes.stairs(density, edges, fill=True, color=figures.shade("blue"), alpha=0.75, linewidth=0, zorder=2)
    axes.set_ylim(0, max(0.5, 1.05 * float(density.max())))
    return "no zeros" if zeros == 0 else f"{100 * zeros:.0f} % are 0" if zeros >= 0.01 else "under 1 % are 0"


def _short(text: str, most: float) -> str:
    """The text; if it has more than `most` letters, without its middle."""
    keep = (int(most) - 1) // 2
    return text if len(text) <= most else f"{text[:keep]}…{text[-keep:]}"


def snr_distribution(runs: Sequence[LabelledRun], *, page: bool = False) -> Figure:
    """Share of the coordinates with S of a micro-batch above x, in the first record and in the last.

    Grey is what as many micro-batches show of coordinates without any signal, S = 0, under Gaussian noise.
    """
    figure, axes, plot = _one(page, named=any(label for label, _ in runs))
    ends: list[tuple[str, str, float, float]] = []
    counts, beyond = set(), [CRITICAL_SNR]
    for index, (label, records) in enumerate(runs):
        known = [(record, shares) for record in by_step(records) if (shares := _histogram_of(record)) is not None]
        shade = figures.shade(colour(index))
        for place in dict.fromkeys((0, len(known) - 1)) if known else ():
            record, shares = known[place]
            late = place == len(known) - 1
            above = [sum(shares[first + 2 :]) for first in range(len(SNR_EDGES))]
            seen = [100 * x if x > 0 else math.nan for x in above]
            style: dict[str, Any] = {"color": shade, "linewidth": 1.6 if late else 1.1, "zorder": 4 + index}
            axes.plot(SNR_EDGES, seen, linestyle="-" if late else _DASHES, **style)
            beyond += [edge for edge, x in zip(SNR_EDGES, above, strict=True) if x > 0]
            compared = at(record, "micro_batches")
            counts.add(None if compared is None else int(compared))
            if late:
                ends.append((label, shade, math.nan, sum(above)))
    if not ends:
        raise NothingToDraw("no record has a histogram of S")
    few = counts.pop() if len(counts) == 1 else None
    if few is not None and few >= 4:
        # At the same edges, so that straight lines between them are as wrong.
        silent = [100 * max(1 - _silent(s, few), 1e-9) for s in SNR_EDGES]
        axes.fill_between(SNR_EDGES, silent, 1e-9, color=figures.GRID, linewidth=0, zorder=1)
    axes.axvline(CRITICAL_SNR, color=figures.SWITCH, linestyle=(0, (5, 3)), linewidth=1.2, zorder=2)
    figures.annotate(axes, "2/√3", (CRITICAL_SNR, 1), ("data", "axes fraction"), (3, 3), color=figures.SWITCH)
    axes.set_xscale("log")
    axes.set_xlim(0.03, min(100.0, 2 * max(beyond)))
    axes.xaxis.set_major_locator(FixedLocator([0.03, 0.1, 0.3, 1, 3, 10, 30, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yscale("log")
    axes.set_ylim(0.01, 100)
    _log(axes)
    _finish(axes, "estimated S of a micro-batch", "coordinates with S above, %")
    if not page:
        # Lines end below the plot: names by how far right each is.
        _name_ends(axes, ends, plot, joined=False)
        grey = "" if few is None else f"; grey: without any signal, from {few} micro-batches"
        figures.add_heading(
            figure, ("Signal over noise of single coordinates", f"dashed: first record; solid: last{grey}"), 6
        )
    return figure


def _histogram_of(record: Record) -> list[float] | None:
    shares = [at(record, "reliability", "snr_histogram", i) for i in range(len(SNR_EDGES) + 2)]
    known = [x for x in shares if x is not None]
    return known if len(known) == len(shares) else None


def _silent(snr: float, count: int) -> float:
    """Chance that the estimate of S is at most `snr` where S = 0: its square is ((N-3)/(N-1) t^2 - 1) / N."""
    t = math.sqrt((count * snr * snr + 1) * (count - 1) / (count - 3))
    return float(2 * scipy.stats.t.cdf(t, count - 1) - 1)


def violations(runs: Sequence[LabelledRun], *, page: bool = False) -> Figure:
    """Over steps, alignment over Phi / 3 with the interval of the margin; below, the share of layers where it is < 1.

    Gaussian noise lies in the grey band; below 1 inequality (7) does not hold. There is a gap where neither Phi can be
    told from 0 nor the ratio from 1. A triangle at an edge stands for a value beyond it. A solid line counts the layers
    whose whole interval, corrected for their number, is below 1; a dotted line counts those whose estimate is.
    """
    named = any(label for label, _ in runs)
    width, height, right, top = (
        (680.0, 430.0, 190.0 if named else 16.0, 70.0) if not page else (400.0, 360.0, 14.0, 22.0)
    )
    lower, upper = (88.0, height - top - 40.0 - 88.0 - 36.0)
    figure = figures.blank(width, height)
    above = figures.add_plot(figure, 40, height - top - upper, width - 40 - right, upper)
    below = figures.add_plot(figure, 40, 40, width - 40 - right, lower)
    ends: list[tuple[str, str, float, float]] = []
    seen: list[float] = []
    lows, highs, most = [0.0], [3.2], 0.0
    beyond: list[tuple[str, float, float]] = []
    for index, (label, records) in enumerate(runs):
        found = [(step, *_floats(ratio(record.get("reliability")))) for step, record in _over(records)]
        known = [(step, value, low, high) for step, value, low, high in found if not math.isnan(value)]
        if not known:
            continue
        shade = figures.shade(colour(index))
        steps, values, low_ends, high_ends = zip(*found, strict=True)
        seen += steps
        above.fill_between(steps, low_ends, high_ends, color=shade, alpha=0.14, linewidth=0, zorder=3)
        for i, (step, value, low, high) in enumerate(found):
            beside = [values[j] for j in (i - 1, i + 1) if 0 <= j < len(values)]
            if not math.isnan(value) and all(map(math.isnan, beside)):  # no band
                above.plot([step, step], [low, high], color=shade, linewidth=1.2, zorder=3)
        _line(above, steps, values, shade, zorder=4 + index)
        lows += [low for *_, low, _ in known if not math.isnan(low)]
        highs += [high for *_, high in known if not math.isnan(high)]
        beyond += [(shade, step, value) for step, value, _, _ in known]
        ends.append((label, shade, known[-1][0], known[-1][1]))
        shares = [(step, *s) for step, r in _over(records) if (s := _layers_below(r)) is not None]
        if shares:
            at_steps, sure, guessed = zip(*shares, strict=True)
            _line(below, at_steps, guessed, shade, zorder=3, dashed=(0, (1, 1.6)), width=1.1, marked=False)
            _line(below, at_steps, sure, shade, zorder=4 + index)
            most = max(most, *guessed, *sure)
    if not ends:
        raise NothingToDraw("no record has both sides of inequality (7)")
    above.axhspan(*GAUSSIAN, color=figures.GRID, alpha=0.7, linewidth=0, zorder=1)
    for axes in (above, below):
        _steps(axes, seen)
    above.axhline(1, color=figures.SWITCH, linestyle=(0, (5, 3)), linewidth=1.2, zorder=2)
    above.set_ylim(max(-2.0, min(lows)), min(6.0, max(highs)))
    low, high = above.get_ylim()
    for shade, step, value in beyond:
        if not low <= value <= high:
            above.plot([step], [low if value < low else high], "v" if value < low else "^", color=shade, markersize=5,
                       clip_on=False, zorder=50)  # fmt: skip
    above.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    top_share = next(x for x in (10, 20, 50, 100) if x >= most)
    below.set_ylim(0, top_share)
    below.yaxis.set_major_locator(FixedLocator([0, top_share / 2, top_share]))
    _finish(above, "", "Σ |g| (1 − 2p) over Φ / 3")
    above.tick_params(labelbottom=False)
    _finish(below, "step", "layers below 1, %")
    if not page:
        _name_ends(above, ends, upper)
        subtitle = "95 % interval; grey: Gaussian noise; layers: solid by their intervals, dotted by their estimates"
        figures.add_heading(figure, ("Inequality (7): at least 1 under symmetric, unimodal noise", subtitle), 6)
    return figure


def _floats(seven: tuple[float, float | None, float | None] | None) -> list[float]:
    """Value and ends of an interval, NaN for what is missing."""
    return [math.nan if x is None else x for x in seven or (None, None, None)]


def _layers_below(record: Record) -> tuple[float, float] | None:
    """Shares of layers, in percent: whose interval is below 1, and whose estimate is."""
    below, count = below_one(record)
    return (100 * sum(below.values()) / count, 100 * len(below) / count) if count else None


def calibration_rules(records: Sequence[Record], *, page: bool = False) -> Figure:
    """SGD's learning rate over steps by every rule of calibration, averaged over the monitor's own steps.

    A rule's 0 is a triangle at the bottom. Dashed is the rate that a `HybridSignSGD` keeps itself; the rules end at the
    first step that is measured in its SGD phase.
    """
    figure, axes, plot = _one(page, named=True)
    ends: list[tuple[str, str, float, float]] = []
    zeros: list[tuple[str, list[float]]] = []
    seen: list[float] = []
    switch = min((step for step, record in _over(records) if _in_sgd(record)), default=math.inf)
    for order, rule in enumerate(RULE_COLOURS):
        own = rule == "calibrated_lr"
        found = [(step, x) for step, record in _over(records) if (x := rate(record, rule)) is not None]
        if not own:
            found = [(step, x) for step, x in found if step < switch]
        if not found:
            continue
        seen += [step for step, _ in found]
        shade = figures.shade(RULE_COLOURS[rule])
        positive = [x if x > 0 else math.nan for _, x in found]
        dashed = _DASHES if own else None
        # Where rules agree, each is still to be seen.
        width = 2.8 if rule == "ratio" else 1.3
        _line(axes, [step for step, _ in found], positive, shade, zorder=3 + order, dashed=dashed, width=width)
        zeros.append((shade, [step for step, x in found if x <= 0]))
        ends.append((RULE_LABELS.get(rule, rule), shade, *found[-1]))
    if not any(x > 0 for *_, x in ends):
        raise NothingToDraw("no record has a learning rate of calibration above 0")
    for shade, steps in zeros:
        axes.plot(steps, [0.015] * len(steps), "v", color=shade, markersize=4, transform=axes.get_xaxis_transform(),
                  clip_on=False, zorder=9)  # fmt: skip
    if switch < math.inf:
        axes.axvline(switch, color=figures.SWITCH, linestyle=(0, (5, 3)), linewidth=1.2, zorder=2)
        figures.annotate(axes, "SGD", (switch, 1), ("data", "axes fraction"), (3, 3), color=figures.SWITCH)
    _steps(axes, seen)
    _log(axes)
    _finish(axes, "step", "SGD's learning rate")
    if not page:
        _name_ends(axes, ends, plot)
        triangle = "; triangle: 0" if any(steps for _, steps in zeros) else ""
        figures.add_heading(
            figure, ("Calibration: SGD's learning rate by every rule", f"averages over the measured steps{triangle}"), 6
        )
    return figure


def rate(record: Record, rule: str) -> float | None:
    """SGD's learning rate by a rule of `RULE_COLOURS`."""
    path: tuple[str | int, ...] = ("groups", 0, rule) if rule == "calibrated_lr" else ("average", rule)
    return at(record, "calibration", *path)


def _in_sgd(record: Record) -> bool:
    """Whether a hybrid was in its SGD phase."""
    found: Any = record.get("calibration")
    found = found.get("groups") if isinstance(found, Mapping) else None
    first = found[0] if isinstance(found, Sequence) and found else None
    return isinstance(first, Mapping) and first.get("phase") == "sgd"


def dither_meters(runs: Sequence[LabelledRun], *, page: bool = False) -> Figure:
    """Rms of the momentum over sigma of the dither, over steps; grey is where the two match within a factor of 10."""
    figure, axes, plot = _one(page, named=any(label for label, _ in runs))
    ends: list[tuple[str, str, float, float]] = []
    seen, values = [], [1 / MATCH, MATCH]
    for index, (label, records) in enumerate(runs):
        found = [(step, x) for step, r in _over(records) if (x := at(r, "dither", "ratio")) is not None and x > 0]
        if not found:
            continue
        shade = figures.shade(colour(index))
        _line(axes, [step for step, _ in found], [x for _, x in found], shade, zorder=4 + index)
        ends.append((label, shade, *found[-1]))
        seen += [step for step, _ in found]
        values += [x for _, x in found]
    if not ends:
        raise NothingToDraw("no record has a dithered layer whose momentum is above 0")
    _steps(axes, seen)
    axes.axhspan(1 / MATCH, MATCH, color=figures.GRID, alpha=0.7, linewidth=0, zorder=1)
    axes.axhline(1, color=figures.MUTED, linewidth=0.8, zorder=2)
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 4, max(values) * 4)
    _log(axes)
    where, style = ("axes fraction", "data"), {"fontsize": 9, "ha": "right"}
    figures.annotate(axes, "dither changes next to no sign", (1, MATCH), where, (-3, 2), va="bottom", **style)
    figures.annotate(axes, "steps are random", (1, 1 / MATCH), where, (-3, -2), va="top", **style)
    _finish(axes, "step", "rms(m) / σ")
    if not page:
        _name_ends(axes, ends, plot)
        figures.add_heading(figure, ("Dither beside the momentum", "grey: they match within a factor of 10"), 6)
    return figure


def _over(records: Sequence[Record]) -> list[tuple[float, Record]]:
    return [(step, record) for record in by_step(records) if (step := at(record, "step")) is not None]


def _one(page: bool, *, named: bool) -> tuple[Figure, Axes, float]:
    """A figure with one plot, and the plot's height."""
    width, height, right, top = (400.0, 290.0, 14.0, 22.0) if page else (680.0, 400.0, 190.0 if named else 16.0, 70.0)
    figure, axes = figures.single_plot(width, height, left=44, right=right, top=top, bottom=40)
    return figure, axes, height - top - 40


def _line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    shade: str,
    *,
    zorder: int,
    dashed: Any = None,
    width: float = 1.6,
    marked: bool = True,
) -> None:
    """Draw a line, with marks unless there are many values."""
    marker = "o" if marked and len(x) <= 40 else None
    axes.plot(x, y, linestyle=dashed or "-", linewidth=width, marker=marker, markersize=3.2, color=shade, zorder=zorder)


def _steps(axes: Axes, steps: Sequence[float]) -> None:
    """The axis of steps; a single one is in its middle."""
    low, high = min(steps), max(steps)
    pad = 0.015 * (high - low)  # marks at the ends are whole
    axes.set_xlim((low - pad, high + pad) if low < high else (low - 1, low + 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True) if low < high else FixedLocator([low]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")


def _log(axes: Axes) -> None:
    """A logarithmic y axis with few numbers on it."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:  # at least one number on it
        middle = math.sqrt(low * high)
        low, high = middle / 4, middle * 4
        axes.set_ylim(low, high)
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    every = max(1, -(-(last - first + 1) // 6))
    axes.yaxis.set_major_locator(FixedLocator([10.0**k for k in range(first, last + 1, every)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: number(value))


def _finish(axes: Axes, across: str, up: str) -> None:
    axes.grid(axis="y", color=figures.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(across, color=figures.MUTED, fontsize=10, loc="right", labelpad=3)
    figures.annotate(axes, up, (0, 1), "axes fraction", (-34, 7))


def _name_ends(
    axes: Axes, ends: Sequence[tuple[str, str, float, float]], height: float, *, joined: bool = True
) -> None:
    """Labels right of the plot, joined to their points (label, colour, x, y), or from the top by falling y."""
    low, high = axes.get_ylim()
    inverse = axes.transAxes.inverted()
    placed = []
    for label, shade, x, y in ends:
        if label and joined:
            y = min(max(y, low), high)
            placed.append((float(inverse.transform(axes.transData.transform((x, y)))[1]), label, shade, x, y))
        elif label:
            placed.append((y, label, shade, x, y))
    placed.sort(key=lambda each: each[0])
    gap = min(14 / height, 1 / max(1, len(placed)))
    places = figures.spread_out([each[0] if joined else 1.0 for each in placed], gap, 0.0, 1.0)
    for (_, label, shade, x, y), place in zip(placed, places, strict=True):
        start, where = ((x, y), "data") if joined else ((1.015, place), "axes fraction")
        axes.annotate(
            "", start, (1.04, place), xycoords=where, textcoords="axes fraction", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 1.0 if joined else 1.8, "shrinkA": 0,
                        "shrinkB": 1},
        )  # fmt: skip
        figures.annotate(axes, _short(label, 28), (1, place), "axes fraction", (21, 0), color=figures.INK, fontsize=9.5,
                     va="center")  # fmt: skip

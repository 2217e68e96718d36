"""The report's figures: accuracy over epochs as in the paper's Figures 1 to 3, and the table as dots.

Figures are drawn once, in the colours of a light page, with matplotlib's object-oriented interface. `svg` then turns
every colour into a CSS variable of the same meaning (`palette_css` defines them), so that one drawing serves light and
dark pages.
Accuracies are in percent.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from signstep.lab.output.stats import MIN_SEEDS, Estimate, number, signed

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_METHOD = "method:"

_INK, _MUTED, _GRID, _SWITCH = "#1b1b1a", "#5f5e59", "#e2e0d9", "#c1121f"

# name of the CSS variable: colour on a light page, on a dark one. Hues from Okabe and Ito's palette, moved in lightness
# until each has a contrast of 3 to its page.
_COLOURS = {
    "ink": (_INK, "#ecebe6"),
    "muted": (_MUTED, "#a9a7a0"),
    "grid": (_GRID, "#34332f"),
    "switch": (_SWITCH, "#ff6f69"),
    "black": ("#222221", "#f5f4ef"),
    "grey": ("#83827d", "#9a9993"),
    "blue": ("#0072b2", "#58abe4"),
    "pink": ("#b4508f", "#df8fc4"),
    "vermillion": ("#c94f00", "#f5854a"),
    "orange": ("#bd8100", "#e8b53a"),
    "brown": ("#8a6a4a", "#c4a888"),
    "violet": ("#6950c1", "#a996f3"),
    "green": ("#00875f", "#2bbd8d"),
    "olive": ("#6f7f12", "#aebd52"),
}
_METHODS = {
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
}
_SPARE = ("violet", "brown", "pink", "olive", "vermillion")


def colour(method: str) -> str:
    """Name of the palette colour of a method, by its row's key: the same in every figure and table.

    A method that this module does not know gets one that depends on its key alone.
    """
    return _METHODS.get(method) or _SPARE[zlib.crc32(method.encode()) % len(_SPARE)]


def palette_css(selector: str) -> str:
    """CSS that defines the palette's variables (`--c-blue`, ...) on `selector`, for light and dark pages."""
    light, dark = (";".join(f"--c-{name}:{pair[i]}" for name, pair in _COLOURS.items()) for i in (0, 1))
    return f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{@media not print{{{selector}{{{dark}}}}}}}"


@dataclass(frozen=True)
class Curve:
    """One method's accuracy over epochs: mean over seeds, and the interval where there is one."""

    method: str
    label: str
    epochs: tuple[int, ...]
    estimates: tuple[Estimate, ...]
    runs: tuple[Mapping[int, float], ...] = ()
    """Accuracy by epoch of each seed."""
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
    estimate: Estimate | None
    values: tuple[float, ...]
    """One value per seed."""
    paper: float | None
    text: str
    """The estimate as printed, or why there is none."""


def _figure(width: float, height: float, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` points with one plot inside these margins."""
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_alpha(0)
    return figure, _plot(figure, left, bottom, width - left - right, height - top - bottom)


def _plot(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """A plot of `width` x `height` points inside a figure."""
    whole, high = (72 * inches for inches in figure.get_size_inches())
    axes = figure.add_axes((left / whole, bottom / high, width / whole, height / high))
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=10, length=3, width=0.8)
    return axes


def _say(
    axes: Axes, text: str, at: tuple[float, float], where: Any, offset: tuple[float, float] = (0, 0), **style: Any
) -> None:
    """Write `text`, taken as it is, at a point in the coordinates `where`, moved by `offset` points."""
    style = {"color": _MUTED, "fontsize": 10, **style}
    axes.annotate(
        text, at, offset, xycoords=where, textcoords="offset points", annotation_clip=False, parse_math=False, **style
    )


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the order of the rising `wanted`, at least `gap` apart, inside [low, high] where they fit."""
    placed: list[float] = []
    for value in wanted:
        placed.append(max(value, placed[-1] + gap) if placed else max(value, low))
    ceiling = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def curves(
    lines: Sequence[Curve], *, switches: Iterable[float], epochs: int, heading: tuple[str, str] | None = None
) -> Figure:
    """Test accuracy over epochs, the interval over seeds as a band (of two seeds: each as a thin line), the switch to
    SGD as a red dashed line.

    Args:
        lines: the methods; later ones are drawn on top.
        switches: epochs (may be fractional) after which a hybrid method goes on as SGD.
        epochs: length of the runs, the right end of the axis.
        heading: title and subtitle of a figure that stands alone, where the lines are named at their ends; None:
            the page around the figure has a title and a key.
    """
    width, height, right, top = (680.0, 400.0, 245.0, 70.0) if heading else (400.0, 290.0, 14.0, 22.0)
    figure, axes = _figure(width, height, left=36, right=right, top=top, bottom=40)
    marker = "o" if max((len(line.epochs) for line in lines), default=0) <= 16 else None
    for order, line in enumerate(lines):
        name = colour(line.method)
        style: dict[str, Any] = {"color": _COLOURS[name][0], "gid": _METHOD + line.method, "zorder": 3 + order}
        mean = [e.mean for e in line.estimates]
        banded = [(epoch, e) for epoch, e in zip(line.epochs, line.estimates, strict=True) if e.n >= MIN_SEEDS]
        if banded:
            axes.fill_between(
                [epoch for epoch, _ in banded],
                [max(e.mean - (e.half_width or 0), 0) for _, e in banded],
                [min(e.mean + (e.half_width or 0), 100) for _, e in banded],
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
    for switch in sorted(set(switches)):
        axes.axvline(switch, color=_SWITCH, linestyle=(0, (5, 3)), linewidth=1.2, zorder=2)
        _say(axes, "switch to SGD", (switch, 1), ("data", "axes fraction"), (3, 3), color=_SWITCH)
    axes.set_xlim(0, max(epochs, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("epoch", color=_MUTED, fontsize=10, loc="right", labelpad=3)
    _say(axes, "test accuracy, %", (0, 1), "axes fraction", (-30, 7))
    if heading:
        _head(figure, heading, 6)
        _label_ends(axes, lines, height - top - 40)
    return figure


def _head(figure: Figure, heading: tuple[str, str], left: float) -> None:
    width, height = (72 * inches for inches in figure.get_size_inches())
    left /= width
    style: dict[str, Any] = {"va": "center", "parse_math": False}
    figure.text(left, 1 - 16 / height, heading[0], color=_INK, fontsize=12, fontweight="bold", **style)
    figure.text(left, 1 - 33 / height, heading[1], color=_MUTED, fontsize=9, **style)


def _label_ends(axes: Axes, lines: Sequence[Curve], plot_height: float) -> None:
    low, high = axes.get_ylim()
    ordered = sorted(lines, key=lambda line: line.estimates[-1].mean)
    gap = (high - low) * min(15 / plot_height, 1 / max(len(ordered), 1))
    places = _spread([line.estimates[-1].mean for line in ordered], gap, low, high)
    for line, place in zip(ordered, places, strict=True):
        last = line.estimates[-1]
        shade = _COLOURS[colour(line.method)][0]
        ending = "diverged" if line.diverged else number(last.mean)
        axes.annotate(
            "", (line.epochs[-1], last.mean), (1.03, place), textcoords=("axes fraction", "data"),
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 1},
        )  # fmt: skip
        text, right = f"{line.label}  {ending}", ("axes fraction", "data")
        _say(axes, text, (1, place), right, (14, 0), color=_INK, fontsize=9.5, va="center")


def dots(lines: Sequence[Dot], *, axis: str, zero: str = "", heading: tuple[str, str] | None = None) -> Figure:
    """One line per method: mean and interval, each seed as a small tick, the paper's number as a hollow mark.

    Args:
        lines: from top to bottom.
        axis: what the numbers are, printed below.
        zero: where not empty, the numbers are differences, and this names what the line at 0 stands for.
        heading: title and subtitle of a figure that stands alone.
    """
    step, bottom, width = 36.0, 40.0, 400.0
    top = (48.0 if heading else 4.0) + (20.0 if zero else 0.0)
    margin = 12.0 if heading else 3.0
    height = top + bottom + step * len(lines)
    figure, axes = _figure(width, height, left=margin, right=margin, top=top, bottom=bottom)
    axes.set_ylim(len(lines), 0)
    axes.yaxis.set_visible(False)
    for i, line in enumerate(lines):
        y = i + 0.68
        shade = _COLOURS[colour(line.method)][0]
        gid = _METHOD + line.method
        axes.axhline(y, color=_GRID, linewidth=0.8, zorder=1)
        above = ("axes fraction", "data")
        _say(axes, line.label, (0, i + 0.27), above, color=_INK, va="center")
        shown = _INK if line.estimate else _MUTED
        _say(axes, line.text, (1, i + 0.27), above, color=shown, va="center", ha="right")
        axes.plot(line.values, [y] * len(line.values), "|", color=shade, markersize=7, markeredgewidth=1, alpha=0.6,
                  gid=gid, zorder=3)  # fmt: skip
        if line.estimate is not None:
            e = line.estimate
            if e.half_width is not None:
                ends = [e.mean - e.half_width, e.mean + e.half_width]
                if not zero:
                    ends = [max(ends[0], 0), min(ends[1], 100)]
                axes.plot(ends, [y, y], color=shade, linewidth=2.2,
                          solid_capstyle="butt", gid=gid, zorder=3)  # fmt: skip
            axes.plot([e.mean], [y], "o", color=shade, markersize=6.5, gid=gid, zorder=5)
        if line.paper is not None:
            axes.plot([line.paper], [y], "o", color=_INK, markerfacecolor="none", markersize=7, markeredgewidth=1.2,
                      zorder=6)  # fmt: skip
    axes.margins(x=0.04)
    axes.autoscale(axis="x")
    if zero:
        # Short of the text above each line.
        axes.vlines([0] * len(lines), [i + 0.5 for i in range(len(lines))], [i + 0.86 for i in range(len(lines))],
                    color=_MUTED, linewidth=1, zorder=2)  # fmt: skip
        _say(axes, zero, (0, 1), ("data", "axes fraction"), (0, 4), fontsize=9.5, ha="center")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if zero:
        axes.xaxis.set_major_formatter(lambda value, _: signed(value, 0 if value == int(value) else 1))
    axes.set_xlabel(axis, color=_MUTED, fontsize=10, loc="right", labelpad=3)
    if heading:
        _head(figure, heading, 12)
    return figure


def png(figure: Figure) -> bytes:
    """The figure in the colours of a light page on white, 216 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=216, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, *, name: str, description: str, alone: bool) -> str:
    """The figure as SVG whose colours follow the page's scheme and whose text is text.

    Args:
        figure: made by this module.
        name: unique on the page; prefix of the ids inside.
        description: what the figure shows, for those who cannot see it.
        alone: a file of its own (with its own palette and background), not a part of an HTML page.

    The elements of a method carry its key as `data-method`; the root carries the plot's place and its axis as
    `data-plot`: left, right, top, bottom in the drawing's units, then the values at its left and right end.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(buffer.getvalue())
    text = "".join(f"{e.get(_XLINK, '')} {e.get('clip-path', '')} " for e in root.iter())
    referenced = set(re.findall(r"#([\w-]+)", text))
    variables = {light: f"var(--c-{colour_name})" for colour_name, (light, _) in _COLOURS.items()}
    for element in root.iter():
        # Indentation of the file; the drawing's own words are never blank.
        element.text, element.tail = (t if t and t.strip() else None for t in (element.text, element.tail))
        identity = element.attrib.pop("id", None)
        if identity in referenced:
            element.set("id", f"{name}-{identity}")
        elif identity is not None and identity.startswith(_METHOD):
            element.set("data-method", identity.removeprefix(_METHOD))
        if _XLINK in element.attrib:
            element.set("href", f"#{name}-{element.attrib.pop(_XLINK).lstrip('#')}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{name}-"))
        for attribute in ("style", "fill", "stroke"):
            if attribute in element.attrib:
                value = re.sub(r"#[0-9a-f]{6}", lambda m: variables.get(m[0], m[0]), element.attrib[attribute])
                element.set(attribute, re.sub(r"'DejaVu Sans'[^;]*", "system-ui, sans-serif", value))
    box = figure.axes[0].get_position()
    width, height = (72 * inches for inches in figure.get_size_inches())
    place = (box.x0 * width, box.x1 * width, (1 - box.y1) * height, (1 - box.y0) * height, *figure.axes[0].get_xlim())
    root.set("data-plot", " ".join(f"{value:g}" for value in place))
    root.set("role", "img")
    root.set("aria-label", description)
    for style in root.findall(f".//{{{_SVG}}}style"):
        style.text = "*{stroke-linejoin:round;stroke-linecap:butt}" if alone else None
    if alone:
        sheet = ElementTree.Element(f"{{{_SVG}}}style")
        sheet.text = palette_css(":root") + (
            ":root{background:#fff}@media (prefers-color-scheme:dark){@media not print{:root{background:#161614}}}"
        )
        root.insert(0, sheet)
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    # Inside HTML the namespace is implied, and a page that names no URL at all is easy to check.
    return ElementTree.tostring(root, encoding="unicode").replace(f' xmlns="{_SVG}"', "")

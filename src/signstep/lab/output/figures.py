"""The style that all figures share: palette, plots in points, words on them, and the files PNG and SVG.

What a figure shows is drawn elsewhere: line charts in `lines`, the others beside the numbers that they show.

A figure is drawn once, in the colours of a light page, with matplotlib's object-oriented interface. `svg` then turns
every colour into a CSS variable of the same meaning (`palette_css` defines them), so that one drawing serves light and
dark pages. Lengths are in points, 1/72 inch.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_METHOD = "method:"

INK, MUTED, GRID, SWITCH = "#1b1b1a", "#5f5e59", "#e2e0d9", "#c1121f"

# name of the CSS variable: colour on a light page, on a dark one. Hues from Okabe and Ito's palette, moved in lightness
# until each has a contrast of 3 to its page.
_COLOURS = {
    "ink": (INK, "#ecebe6"),
    "muted": (MUTED, "#a9a7a0"),
    "grid": (GRID, "#34332f"),
    "switch": (SWITCH, "#ff6f69"),
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


def shade(name: str) -> str:
    """The hex colour of a name of the palette, on a light page.

    >>> shade("blue")
    '#0072b2'
    """
    return _COLOURS[name][0]


def method_id(method: str) -> str:
    """The `gid` of an element that belongs to a method: `svg` writes the method's key as `data-method`."""
    return _METHOD + method


def palette_css(selector: str) -> str:
    """CSS that defines the palette's variables (`--c-blue`, ...) on `selector`, for light and dark pages."""
    light, dark = (";".join(f"--c-{name}:{pair[i]}" for name, pair in _COLOURS.items()) for i in (0, 1))
    return f"{selector}{{{light}}}@media (prefers-color-scheme:dark){{@media not print{{{selector}{{{dark}}}}}}}"


def blank(width: float, height: float) -> Figure:
    """A figure of `width` x `height` points without a plot."""
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_alpha(0)
    return figure


def single_plot(
    width: float, height: float, left: float, right: float, top: float, bottom: float
) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` points with one plot inside these margins."""
    figure = blank(width, height)
    return figure, add_plot(figure, left, bottom, width - left - right, height - top - bottom)


def add_plot(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """A plot of `width` x `height` points whose lower left corner is at (`left`, `bottom`) of the figure."""
    whole, high = (72 * inches for inches in figure.get_size_inches())
    axes = figure.add_axes((left / whole, bottom / high, width / whole, height / high))
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=10, length=3, width=0.8)
    return axes


def annotate(
    axes: Axes, text: str, at: tuple[float, float], where: Any, offset: tuple[float, float] = (0, 0), **style: Any
) -> None:
    """Write `text`, taken as it is, at a point in the coordinates `where`, moved by `offset` points."""
    style = {"color": MUTED, "fontsize": 10, **style}
    axes.annotate(
        text, at, offset, xycoords=where, textcoords="offset points", annotation_clip=False, parse_math=False, **style
    )


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in the order of the rising `wanted`, at least `gap` apart, inside [low, high] where they fit."""
    placed: list[float] = []
    for value in wanted:
        placed.append(max(value, placed[-1] + gap) if placed else max(value, low))
    ceiling = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def add_heading(figure: Figure, heading: tuple[str, str], left: float) -> None:
    """Write title and subtitle at the top of a figure, `left` points from its edge."""
    width, height = (72 * inches for inches in figure.get_size_inches())
    left /= width
    style: dict[str, Any] = {"va": "center", "parse_math": False}
    figure.text(left, 1 - 16 / height, heading[0], color=INK, fontsize=12, fontweight="bold", **style)
    figure.text(left, 1 - 33 / height, heading[1], color=MUTED, fontsize=9, **style)


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

"""What the dither study writes: dither.json, a page of tables, and the maps as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from signstep.lab.output import figures, stats
from signstep.lab.output.files import write_all
from signstep.lab.output.machine import environment, now
from signstep.lab.output.tables import markdown_table

MARGIN = 11.0
"""By so many points the paper's dither of α = 0.1 is above SignSGD-M on CIFAR-100: 76 and 65 % (Table I)."""
_TITLE = "Where dither helps"
_KINDS = {"clean": "none", "absolute": "absolute", "relative": "relative"}
_SHADES = LinearSegmentedColormap.from_list("accuracy", ["#f6f4ee", "#9cc8e8", "#3d8fc6"])
_ON_SHADE = "#0f0f0f"
_CELL = (46.0, 17.0)
"""Width and height of a cell of a map, in points."""

Cell = tuple[str, float, float]
"""Kind of the noise, its size, learning rate."""


@dataclass(frozen=True)
class DitherMap:
    """What was measured under one condition."""

    title: str
    cells: Mapping[Cell, float]
    """Accuracy on held-out images, in percent, of one seed."""
    best: Mapping[str, tuple[float, float]]
    """By kind of noise the size and learning rate of its best cell; empty while cells are missing."""
    finals: Mapping[str, Mapping[int, float]]
    """By kind of noise the accuracy of its best cell on the test images, by seed."""

    @property
    def clean(self) -> float:
        """Accuracy of the best step without noise; -inf while it has no run."""
        return max((a for (kind, _, _), a in self.cells.items() if kind == "clean"), default=float("-inf"))

    def wins(self, cell: Cell) -> bool:
        """Whether noise is above the best step without noise by the paper's margin."""
        return cell[0] != "clean" and self.cells[cell] >= self.clean + MARGIN

    def seems_to_win(self, cell: Cell) -> bool:
        """Whether it is so only above the step without noise at the same learning rate, which is not tuned."""
        beside = self.cells.get(("clean", 0.0, cell[2]), float("inf"))
        return cell[0] != "clean" and not self.wins(cell) and self.cells[cell] >= beside + MARGIN

    def gain(self, kind: str) -> stats.MeanEstimate | None:
        """By how many points noise is above no noise on the test images, seed by seed; None without two seeds."""
        found = stats.paired_difference(self.finals.get(kind, {}), self.finals.get("clean", {}))
        return None if found is None or found.n < 2 else found


def noise_words(kind: str, size: float) -> str:
    """How a noise is called in a table.

    >>> noise_words("absolute", 0.1), noise_words("relative", 3.0), noise_words("clean", 0.0)
    ('α = 0.1', 'σ = 3 rms(m)', 'no dither')
    """
    return {"clean": "no dither", "absolute": f"α = {size:g}", "relative": f"σ = {size:g} rms(m)"}[kind]


def write_report(out: Path, command: str, maps: Sequence[DitherMap]) -> list[Path]:
    """Write the report of what has been measured into `out`, and return the paths of its files."""
    gains = [(each, kind, each.gain(kind)) for each in maps for kind in ("absolute", "relative")]
    corrected = stats.holm([None if gain is None else gain.p_value() for _, _, gain in gains])
    record = {
        "command": command,
        "date": now(),
        "environment": environment(torch.device("cpu"), 1),
        "margin": MARGIN,
        "maps": [
            {
                "title": each.title,
                "cells": [
                    {"noise": kind, "size": size, "lr": lr, "accuracy": accuracy}
                    for (kind, size, lr), accuracy in each.cells.items()
                ],
                "wins": sum(map(each.wins, each.cells)),
                "seems_to_win": sum(map(each.seems_to_win, each.cells)),
                "finals": [
                    {"noise": kind, "size": size, "lr": lr, "accuracies": list(each.finals[kind].values())}
                    for kind, (size, lr) in each.best.items()
                ],
                "gains": {
                    kind: None if gain is None else {"mean": gain.mean, "half_width": gain.half_width, "p_holm": p}
                    for (other, kind, gain), p in zip(gains, corrected, strict=True)
                    if other is each
                },
            }
            for each in maps
        ],
    }
    contents: dict[str, Any] = {"dither.json": record, "dither.md": _markdown(maps, gains, corrected, record)}
    drawn = [each for each in maps if each.cells]
    if drawn:
        figure = draw_maps(drawn)
        contents["dither.png"] = figures.png(figure)
        contents["dither.svg"] = figures.svg(figure, name="dither", description=_TITLE, alone=True)
    return write_all(out, contents)


def draw_maps(maps: Sequence[DitherMap]) -> Figure:
    """A map beside the other: a row for each noise, a column for each learning rate, accuracy as shade and number."""
    noises = list(dict.fromkeys(cell[:2] for each in maps for cell in each.cells))
    lrs = sorted({cell[2] for each in maps for cell in each.cells})
    low, high = (f(a for each in maps for a in each.cells.values()) for f in (min, max))
    left, gap, bottom, top = 96.0, 26.0, 44.0, 76.0
    width, height = _CELL[0] * len(lrs), _CELL[1] * len(noises)
    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    figure = figures.blank(left + columns * (width + gap), rows * (height + bottom + top - 30) + 60)
    heading = (
        "Held-out accuracy in %, one seed. Bold frame: the paper's margin above the best clean step. Thin frame: above"
    )
    figures.add_heading(figure, (_TITLE, f"{heading} the clean step at the same rate only."), 12)
    for number, each in enumerate(maps):
        row, column = divmod(number, columns)
        x = left + column * (width + gap)
        y = (rows - 1 - row) * (height + bottom + top - 30) + bottom
        axes = figures.add_plot(figure, x, y, width, height)
        axes.set_xlim(0, len(lrs))
        axes.set_ylim(len(noises), 0)
        axes.set_xticks([i + 0.5 for i in range(len(lrs))], [f"{lr:g}" for lr in lrs])
        names = [noise_words(*noise) for noise in noises] if column == 0 else [""] * len(noises)
        axes.set_yticks([i + 0.5 for i in range(len(noises))], names)
        axes.tick_params(axis="y", length=0)
        figures.annotate(axes, each.title, (0, 1), "axes fraction", (0, 7), color=figures.INK)
        if row == rows - 1 or number + columns >= len(maps):
            figures.annotate(axes, "learning rate", (0.5, 0), "axes fraction", (0, -30), ha="center")
        _draw_cells(axes, each, noises, lrs, (low, high))
    return figure


def _draw_cells(
    axes: Axes,
    each: DitherMap,
    noises: Sequence[tuple[str, float]],
    lrs: Sequence[float],
    span: tuple[float, float],
) -> None:
    for cell, accuracy in each.cells.items():
        x, y = lrs.index(cell[2]), noises.index(cell[:2])
        shade = to_hex(_SHADES((accuracy - span[0]) / max(span[1] - span[0], 1e-9)))
        frame = 2.2 if each.wins(cell) else 0.8 if each.seems_to_win(cell) else 0.0
        axes.add_patch(
            Rectangle((x + 0.02, y + 0.04), 0.96, 0.92, facecolor=shade, edgecolor=_ON_SHADE, linewidth=frame)
        )
        figures.annotate(
            axes, f"{accuracy:.0f}", (x + 0.5, y + 0.5), "data", ha="center", va="center", color=_ON_SHADE, fontsize=9
        )


def _markdown(
    maps: Sequence[DitherMap],
    gains: Sequence[tuple[DitherMap, str, stats.MeanEstimate | None]],
    corrected: Sequence[float | None],
    record: Mapping[str, Any],
) -> str:
    made = record["environment"]
    out = [f"# {_TITLE}", "", f"`{record['command']}`, {record['date']}, {made['cpu']}, torch {made['torch']}", ""]
    head = ("condition", "noise", "best", "lr", "test accuracy, %", "seeds", "less no dither", "p")
    rows = []
    tested = {(id(each), kind): (gain, p) for (each, kind, gain), p in zip(gains, corrected, strict=True)}
    for each in maps:
        for kind, (size, lr) in each.best.items():
            values = list(each.finals[kind].values())
            gain, p = tested.get((id(each), kind), (None, None))
            rows.append(
                (
                    each.title,
                    _KINDS[kind],
                    noise_words(kind, size),
                    f"{lr:g}",
                    stats.with_interval(stats.estimate(values)) if values else "",
                    str(len(values)),
                    "" if gain is None else stats.with_interval(gain, sign=True),
                    "" if p is None else stats.probability(p),
                )
            )
    out += ["## The best of each kind, on the test images", ""]
    out += markdown_table(head, rows, left=(0, 1, 2))
    out += [
        "",
        "Differences are seed by seed with half their 95 % t-interval; p after Holm's correction over the table.",
        "",
    ]
    for each in (found for found in maps if found.cells):
        noises = list(dict.fromkeys(cell[:2] for cell in each.cells))
        lrs = sorted({cell[2] for cell in each.cells})
        out += [f"## {each.title[0].upper() + each.title[1:]}: held-out accuracy, %", ""]
        lines = []
        for noise in noises:
            line = [noise_words(*noise)]
            for lr in lrs:
                cell = (*noise, lr)
                text = f"{each.cells[cell]:.1f}" if cell in each.cells else ""
                mark = "" if cell not in each.cells else "**" if each.wins(cell) else "_" * each.seems_to_win(cell)
                line.append(f"{mark}{text}{mark}")
            lines.append(line)
        out += markdown_table(["", *(f"lr {lr:g}" for lr in lrs)], lines)
        wins, seeming = sum(map(each.wins, each.cells)), sum(map(each.seems_to_win, each.cells))
        out += [
            "",
            f"Bold: {MARGIN:g} points above the best step without dither ({wins} cells). Italic: so far above the step "
            f"without dither at the same learning rate only ({seeming} cells).",
            "",
        ]
    return "\n".join(out)

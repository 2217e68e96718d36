"""What `signstep bench step` shows and writes: tables, bench-step.json, .md, and a bar chart as .png and .svg."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import rich.box
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from signstep.lab.bench.step import Entry, Result, Spread
from signstep.lab.bench.step_contestants import COPY
from signstep.lab.bench.step_targets import Target, targets
from signstep.lab.output import figures
from signstep.lab.output.machine import environment
from signstep.lab.training.checkpoint import write_atomically

NAME = "bench-step"
_WIDTH = 100
HEAD = ("optimizer", "ns", "over SGD", "bytes", "of copy", "state")
TARGETS_HEAD = ("target", "limit", "measured", "verdict")
NOTES = (
    "ns: nanoseconds per parameter, median over the rounds",
    "over SGD: time over that of torch SGD(momentum=0.9), fused where it works; as with all ratios, the median over "
    "the rounds of two times of the same round, then the 10th and 90th percentile",
    "bytes: per parameter, what a step must move: p and its state read and written, g read",
    "of copy: those bytes per second, over the bytes per second of a loop of copies that moves the clean step's bytes "
    "in as much memory; a step works in place and can pass 1",
    "state: bytes per parameter, counted in the optimizer's state",
)
_PACKAGES = ("pytorch-optimizer", "lion-pytorch", "heavyball", "triton")
_COLOURS = {"limit": "green", "signstep": "blue", "torch": "black", "plain": "orange", "package": "pink"}
# By how far apart the axis's ends may be.
_TICKS = {8.0: (0.25, 0.5, 1, 2, 4), 80.0: (0.1, 0.3, 1, 3, 10, 30), float("inf"): (0.01, 0.1, 1, 10, 100, 1000)}
_KINDS = {"signstep": "signstep", "torch": "torch.optim", "package": "other packages", "plain": "plain torch",
          "limit": "copy"}  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _interval(spread: Spread | None) -> str:
    if spread is None:
        return ""
    return f"{_number(spread.median)} ({_number(spread.low)}–{_number(spread.high)})"


def row(result: Result, key: str) -> tuple[str, ...]:
    """A contestant's line of the table; for one without times, why."""
    entry = result.entries[key]
    if entry.missing is not None:
        return (entry.label, entry.missing)
    share = result.share(key)
    assert share is not None  # the copy is in every round
    return (
        entry.label,
        f"{result.median(key) / result.parameters * 1e9:.2f}",
        _interval(result.ratio(key, result.peer)),
        f"{entry.bytes_per_parameter:.2f}".removesuffix(".00"),
        "" if key == COPY else f"{share.median:.2f}",
        f"{entry.state_bytes / result.parameters:.2f}".removesuffix(".00"),
    )


def _target_row(target: Target) -> tuple[str, ...]:
    return (target.text, f"{'≥' if target.at_least else '≤'} {target.limit:g}", _interval(target.measured),
            target.verdict)  # fmt: skip


def _headline(result: Result, dtype: str) -> str:
    return f"{result.title}, {dtype}: {result.parameters / 1e6:.2f} M parameters in {result.tensors} tensors"


def show(console: Console, result: Result, dtype: str) -> None:
    """Print a workload's tables."""
    # A pipe has no width of its own.
    console.width = max(console.width, _WIDTH) if not console.is_terminal else console.width
    table = Table(*HEAD, title=escape(_headline(result, dtype)), box=rich.box.SIMPLE, title_justify="left")
    table.columns[0].ratio = 1
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    missing = []
    for key, entry in result.entries.items():
        if entry.missing is None:
            table.add_row(*map(escape, row(result, key)))
        else:
            missing.append(f"{entry.label}: {entry.missing}")
    console.print(table)
    for line in missing:
        console.print(line, highlight=False, markup=False)
    verdicts = Table(*TARGETS_HEAD, title="targets", box=rich.box.SIMPLE, title_justify="left")
    for target in targets(result, dtype):
        verdicts.add_row(*map(escape, _target_row(target)))
    console.print(verdicts)


def machine(device: torch.device) -> dict[str, Any]:
    """What the benchmark ran on."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        **environment(device, 1),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": versions,
    }


def _entry(result: Result, key: str, entry: Entry) -> dict[str, Any]:
    if entry.missing is not None:
        return {"label": entry.label, "kind": entry.kind, "missing": entry.missing}
    ratio, share = result.ratio(key, result.peer), result.share(key)
    assert ratio is not None
    assert share is not None
    return {
        "label": entry.label,
        "kind": entry.kind,
        "median_seconds": result.median(key),
        "over_peer": asdict(ratio),
        "bytes_per_parameter": entry.bytes_per_parameter,
        "share_of_copy": asdict(share),
        "state_bytes": entry.state_bytes,
        "state_bytes_per_parameter": entry.state_bytes / result.parameters,
    }


def _target(target: Target) -> dict[str, Any]:
    return {
        "target": target.text,
        "limit": target.limit,
        "at_least": target.at_least,
        "measured": None if target.measured is None else asdict(target.measured),
        "verdict": target.verdict,
    }


def to_dict(results: Sequence[Result], *, dtype: str, device: torch.device, command: str) -> dict[str, Any]:
    """All that was measured, every time included."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "dtype": dtype,
        "copy": COPY,
        "workloads": {
            result.workload: {
                "title": result.title,
                "tensors": result.tensors,
                "parameters": result.parameters,
                "peer": result.peer,
                "contestants": {key: _entry(result, key, entry) for key, entry in result.entries.items()},
                "targets": [_target(target) for target in targets(result, dtype)],
                "rounds": [asdict(each) for each in result.rounds],
            }
            for result in results
        },
    }


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[*head], ["---", *["---:"] * (len(head) - 1)]]
    lines += [[*each, *[""] * (len(head) - len(each))] for each in rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def markdown(results: Sequence[Result], record: dict[str, Any]) -> str:
    """The tables as Markdown, under the machine and command of `to_dict`."""
    made = record["machine"]
    dtype = record["dtype"]
    lines = ["# What a step costs", "", f"`{record['command']}`, {record['date']}", ""]
    lines.append(
        f"{made['device']}, {made['cpu']}, {made['threads']} threads, {made['platform']}; torch {made['torch']}, "
        f"signstep {made['signstep']} ({made['git'] or 'no checkout'})"
    )
    for result in results:
        lines += ["", f"## {_headline(result, dtype)}", ""]
        lines += _markdown_table(HEAD, [row(result, key) for key in result.entries])
        lines += ["", *_markdown_table(TARGETS_HEAD, [_target_row(target) for target in targets(result, dtype)])]
    lines += ["", *(f"- {note}" for note in NOTES)]
    return "\n".join(lines) + "\n"


def bars(results: Sequence[Result], heading: tuple[str, str]) -> Figure:
    """Time over SGD's on a logarithmic axis: a panel per workload, a bar per contestant from 1 to its ratio."""
    entries = {key: entry for result in results for key, entry in result.entries.items() if entry.missing is None}
    step, top, bottom, left, right, gap, panel = 17.0, 88.0, 40.0, 225.0, 48.0, 52.0, 140.0
    width = left + right + len(results) * panel + (len(results) - 1) * gap
    height = top + bottom + step * len(entries)
    figure, first = figures.single_plot(width, height, left, width - left - panel, top, bottom)
    ratios = [[result.ratio(key, result.peer) for key in entries] for result in results]
    everything = [spread.median for column in ratios for spread in column if spread is not None]
    span = min(*everything, 1.0) / 1.2, max(*everything, 1.0) * 1.2
    for i, (result, column) in enumerate(zip(results, ratios, strict=True)):
        place = ((left + i * (panel + gap)) / width, bottom / height, panel / width, 1 - (top + bottom) / height)
        axes = first if i == 0 else figure.add_axes(place)
        _panel(axes, result.title, list(zip(entries.values(), column, strict=True)), span)
    for y, entry in enumerate(entries.values()):
        figures.annotate(first, entry.label, (0, y), ("axes fraction", "data"), (-6, 0), color=figures.INK, fontsize=9,
                     va="center", ha="right")  # fmt: skip
    x = 12.0
    for kind in (kind for kind in _KINDS if any(entry.kind == kind for entry in entries.values())):
        shade = figures.shade(_COLOURS[kind])
        figure.text(x / width, 1 - 52 / height, f"■ {_KINDS[kind]}", color=shade, fontsize=9, va="center")
        x += 20 + 5.2 * len(_KINDS[kind])
    figures.add_heading(figure, heading, 12)
    return figure


def _panel(axes: Any, title: str, lines: Sequence[tuple[Entry, Spread | None]], span: tuple[float, float]) -> None:
    axes.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(figures.MUTED)
    axes.tick_params(colors=figures.MUTED, labelsize=9, length=3, width=0.8)
    axes.set_xscale("log")
    axes.set_xlim(*span)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.yaxis.set_visible(False)
    ladder = next(ticks for factor, ticks in _TICKS.items() if span[1] / span[0] < factor)
    axes.xaxis.set_major_locator(FixedLocator(ladder))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="x", color=figures.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axvline(1, color=figures.MUTED, linewidth=1, zorder=2)
    for y, (entry, spread) in enumerate(lines):
        if spread is not None:
            shade = figures.shade(_COLOURS[entry.kind])
            axes.barh(y, spread.median - 1, 0.62, left=1, color=shade, zorder=3)
            axes.plot([spread.low, spread.high], [y, y], color=figures.MUTED, linewidth=1, zorder=4)
            figures.annotate(
                axes,
                _number(spread.median),
                (1, y),
                ("axes fraction", "data"),
                (34, 0),
                color=figures.INK,
                fontsize=8.5,
                va="center",
                ha="right",
            )
    figures.annotate(axes, title, (0, 1), "axes fraction", (0, 6), color=figures.INK, fontsize=9.5)
    axes.set_xlabel("time over SGD", color=figures.MUTED, fontsize=9, loc="right", labelpad=2)


def _put(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def write(results: Sequence[Result], out: Path, *, dtype: str, device: torch.device, command: str) -> list[Path]:
    """Write the four files into `out`, made where there is none, and return their paths.

    Raises:
        OSError: `out` cannot be written.
    """
    record = to_dict(results, dtype=dtype, device=device, command=command)
    made = record["machine"]
    title = f"Time of a step over {results[0].entries[results[0].peer].label}"
    subtitle = f"{dtype}, {made['cpu'] if device.type == 'cpu' else made['device']}; median, 10 to 90 %"
    drawn = bars(results, (title, subtitle))
    drawing = figures.svg(drawn, name=NAME, description=f"{title}; {subtitle}", alone=True)
    contents = {
        "json": (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode(),
        "md": markdown(results, record).encode(),
        "png": figures.png(drawn),
        "svg": drawing.encode(),
    }
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, content in contents.items():
        path = out / f"{NAME}.{suffix}"
        write_atomically(path, functools.partial(_put, content))
        paths.append(path)
    return paths

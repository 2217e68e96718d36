"""What `signstep bench step` shows and writes: tables, bench-step.json, .md, and a bar chart as .png and .svg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from rich.console import Console

from signstep.lab.bench.bars import draw_bars, draw_legend, name_bars
from signstep.lab.bench.report import machine, print_table
from signstep.lab.bench.step_contestants import COPY
from signstep.lab.bench.step_targets import step_targets
from signstep.lab.bench.step_timing import StepEntry, StepResult
from signstep.lab.bench.targets import TARGETS_HEAD
from signstep.lab.output import figures
from signstep.lab.output.files import write_all
from signstep.lab.output.machine import machine_kind, now
from signstep.lab.output.tables import markdown_table

_WIDTH = 100
HEAD = ("optimizer", "ns", "over SGD", "bytes", "of limit", "state")
NOTES = (
    "ns: nanoseconds per parameter, median over the rounds",
    "over SGD: time over that of torch SGD(momentum=0.9), fused where it works; as with all ratios, the median over "
    "the rounds of two times of the same round, then the 10th and 90th percentile",
    "bytes: per parameter, what a step must move: p and its state read and written, g read",
    "of limit: those bytes per second, over the bytes per second of a loop that reads and writes the clean step's "
    "bytes in place, with a bit operation in between",
    "state: bytes per parameter, counted in the optimizer's state",
)
_PACKAGES = ("pytorch-optimizer", "lion-pytorch", "heavyball", "triton")
# By how far apart the axis's ends may be.
_TICKS = {8.0: (0.25, 0.5, 1, 2, 4), 80.0: (0.1, 0.3, 1, 3, 10, 30), float("inf"): (0.01, 0.1, 1, 10, 100, 1000)}
# Name in the legend, and colour.
_KINDS = {
    "signstep": ("signstep", "blue"),
    "torch": ("torch.optim", "black"),
    "package": ("other packages", "pink"),
    "plain": ("plain torch", "orange"),
    "limit": ("limit", "green"),
}


def record_name(made: Mapping[str, Any], dtype: str) -> str:
    """Of the files: one result per kind of machine, and per dtype other than float32."""
    return "-".join(["bench-step", machine_kind(made), *([] if dtype == "float32" else [dtype])])


def row(result: StepResult, key: str) -> tuple[str, ...]:
    """A contestant's line of the table; for one without times, why."""
    entry = result.entries[key]
    if entry.missing is not None:
        return (entry.label, entry.missing)
    share = result.share(key)
    assert share is not None  # the copy is in every round
    return (
        entry.label,
        f"{result.median(key) / result.parameters * 1e9:.2f}",
        str(result.ratio(key, result.peer) or ""),
        f"{entry.bytes_per_parameter:.2f}".removesuffix(".00"),
        "" if key == COPY else f"{share.median:.2f}",
        f"{entry.state_bytes / result.parameters:.2f}".removesuffix(".00"),
    )


def _headline(result: StepResult, dtype: str) -> str:
    return f"{result.title}, {dtype}: {result.parameters / 1e6:.2f} M parameters in {result.tensors} tensors"


def show(console: Console, result: StepResult, dtype: str) -> None:
    """Print a workload's tables."""
    there = [key for key, entry in result.entries.items() if entry.missing is None]
    print_table(console, _headline(result, dtype), HEAD, [row(result, key) for key in there], width=_WIDTH)
    for entry in result.entries.values():
        if entry.missing is not None:
            console.print(f"{entry.label}: {entry.missing}", highlight=False, markup=False)
    print_table(console, "targets", TARGETS_HEAD, [target.row for target in step_targets(result)], width=_WIDTH)


def _entry(result: StepResult, key: str, entry: StepEntry) -> dict[str, Any]:
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


def to_dict(results: Sequence[StepResult], *, dtype: str, device: torch.device, command: str) -> dict[str, Any]:
    """All that was measured, every time included."""
    return {
        "command": command,
        "date": now(),
        "machine": machine(device, _PACKAGES),
        "dtype": dtype,
        "copy": COPY,
        "workloads": {
            result.workload: {
                "title": result.title,
                "tensors": result.tensors,
                "parameters": result.parameters,
                "peer": result.peer,
                "contestants": {key: _entry(result, key, entry) for key, entry in result.entries.items()},
                "targets": [target.to_dict() for target in step_targets(result)],
                "rounds": [asdict(each) for each in result.rounds],
            }
            for result in results
        },
    }


def markdown(results: Sequence[StepResult], record: dict[str, Any]) -> str:
    """The tables as Markdown, under the machine and command of `to_dict`."""
    made = record["machine"]
    dtype = record["dtype"]
    lines = ["# What a step costs", "", f"`{record['command']}`, {record['date']}", ""]
    lines.append(
        f"{made['device']}, {made['cpu']} ({made['cpu_model']}), {made['isa'] or 'no native library'}, caches "
        f"{made['caches'] or 'unknown'}, {made['threads']} threads, {made['platform']}; torch {made['torch']}, "
        f"signstep {made['signstep']} ({made['git'] or 'no checkout'})"
    )
    for result in results:
        lines += ["", f"## {_headline(result, dtype)}", ""]
        rows = [row(result, key) for key in result.entries]
        lines += markdown_table(HEAD, [[*each, *[""] * (len(HEAD) - len(each))] for each in rows])
        lines += ["", *markdown_table(TARGETS_HEAD, [target.row for target in step_targets(result)])]
    lines += ["", *(f"- {note}" for note in NOTES)]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[StepResult], heading: tuple[str, str]) -> Figure:
    """Time over SGD's on a logarithmic axis: a panel per workload, a bar per contestant from 1 to its ratio."""
    entries = {key: entry for result in results for key, entry in result.entries.items() if entry.missing is None}
    step, top, bottom, left, right, gap, panel = 17.0, 88.0, 40.0, 225.0, 48.0, 52.0, 140.0
    width = left + right + len(results) * panel + (len(results) - 1) * gap
    height = step * len(entries)
    ratios = [[result.ratio(key, result.peer) for key in entries] for result in results]
    everything = [spread.median for column in ratios for spread in column if spread is not None]
    span = min(*everything, 1.0) / 1.2, max(*everything, 1.0) * 1.2
    ticks = FixedLocator(next(ticks for factor, ticks in _TICKS.items() if span[1] / span[0] < factor))
    figure = figures.blank(width, top + height + bottom)
    for i, (result, column) in enumerate(zip(results, ratios, strict=True)):
        axes = figures.add_plot(figure, left + i * (panel + gap), bottom, panel, height)
        bars = [(_KINDS[entry.kind][1], spread) for entry, spread in zip(entries.values(), column, strict=True)]
        draw_bars(axes, result.title, bars, start=1, span=span, ticks=ticks)
        axes.axvline(1, color=figures.MUTED, linewidth=1, zorder=2)
        axes.set_xlabel("time over SGD", color=figures.MUTED, fontsize=9, loc="right", labelpad=2)
        if i == 0:
            name_bars(axes, [entry.label for entry in entries.values()])
    draw_legend(figure, [named for kind, named in _KINDS.items() if any(e.kind == kind for e in entries.values())])
    figures.add_heading(figure, heading, 12)
    return figure


def write(results: Sequence[StepResult], out: Path, *, dtype: str, device: torch.device, command: str) -> list[Path]:
    """Write the four files of this machine into `out`, made where there is none, and return their paths."""
    record = to_dict(results, dtype=dtype, device=device, command=command)
    made = record["machine"]
    title = f"Time of a step over {results[0].entries[results[0].peer].label}"
    processor = f"{made['cpu']}, {made['isa'] or 'no native library'}"
    subtitle = f"{dtype}, {processor if device.type == 'cpu' else made['device']}; median, 10 to 90 %"
    drawn = draw(results, (title, subtitle))
    name = record_name(made, dtype)
    drawing = figures.svg(drawn, name=name, description=f"{title}; {subtitle}", alone=True)
    contents = {
        f"{name}.json": record,
        f"{name}.md": markdown(results, record),
        f"{name}.png": figures.png(drawn),
        f"{name}.svg": drawing,
    }
    return write_all(out, contents)

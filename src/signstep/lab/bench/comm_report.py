"""What `signstep bench comm` shows and writes: a table per cell, bench-comm.json, .md, and a figure per workload."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console

from signstep.distributed.reductions import REDUCTIONS
from signstep.lab.bench import netns
from signstep.lab.bench.bars import draw_bars, draw_legend, name_bars
from signstep.lab.bench.comm_cells import LOOPBACK, UNSHAPED, CommCell, CommPlan, CommResult, CommWorkload
from signstep.lab.bench.comm_methods import PEER
from signstep.lab.bench.report import print_table
from signstep.lab.bench.spread import number
from signstep.lab.output import figures
from signstep.lab.output.files import write_all
from signstep.lab.output.machine import environment, now
from signstep.lab.output.tables import markdown_table

NAME = "bench-comm"
HEAD = ("method", "ms per step", "times faster", "CPU ms", "bytes per step", "per parameter", "payload")
_WIDTH = 120
_KINDS = {"signstep": ("signstep", "blue"), "torch": ("torch", "black"), "plain": ("plain torch", "orange")}


def notes(result: CommResult) -> list[str]:
    """What the columns mean, and what the network was."""
    lines = [
        "ms per step: forward and backward that only hand out given gradients, communication hook, optimizer; the mean "
        "of a window of steps on the slowest rank, then median and 10th and 90th percentile over rounds",
        f"times faster: than {REDUCTIONS[PEER].label} in the same round, median and 10th and 90th percentile",
        "CPU ms: processor time of one rank per step, on one thread; ranks beyond the number of cores wait for each "
        "other, which the wall time includes",
        "bytes per step, per parameter: what one rank sends, headers included, by its interface's counter tx_bytes",
        "payload: bytes per parameter by the formula of signstep.distributed.plan, without padding, flags and headers",
        "links are shaped at both ends by tc's token bucket, which adds no latency: a real network of that rate is "
        "slower for methods with several small collectives",
        "where a time follows the rate, as in 10mbit/50ms, links have that latency too: of a round trip, half each "
        "way, as ping shows it; a process delays packets of at most 1500 bytes; TCP's congestion control is cubic",
        "what would wait for more than 100 ms and a burst, at either end of a link, is lost",
        "the counter sees packets of up to 64 KiB with one header, as a network card with segmentation offload does; "
        "the shaped rate is that of the frames of 1500 bytes they become, of which headers are 4.4 %",
    ]
    if any(cell.rate == LOOPBACK for cell in result.cells):
        lines.append("loopback: the interface is shared by all ranks, so bytes are the payload by formula, not counted")
    return lines


def row(cell: CommCell, workload: CommWorkload, key: str) -> tuple[str, ...]:
    """A method's line of a cell's table."""
    faster, count = cell.faster(key), workload.gradients.parameters
    sent = cell.sent(key, workload.gradients)
    return (
        REDUCTIONS[key].label,
        str(cell.seconds(key).scaled(1e3)),
        str(faster or ""),
        number(1e3 * cell.cpu(key)),
        "" if cell.rate == LOOPBACK else f"{sent:,.0f}",
        "" if cell.rate == LOOPBACK else f"{sent / count:.4f}",
        f"{REDUCTIONS[key].payload(workload.gradients, cell.ranks) / count:.4f}",
    )


def _place(cell: CommCell) -> str:
    if cell.rate == LOOPBACK:
        return f"{cell.ranks} ranks, loopback interface"
    if cell.rate == UNSHAPED:
        return f"{cell.ranks} ranks, links not shaped"
    rate, slash, latency = cell.rate.partition("/")
    return f"{cell.ranks} ranks, links of {rate}" + (f" and {latency} for a round trip" if slash else "")


def _latency(result: CommResult) -> str:
    """What a figure says of the latency of its links."""
    with_latency = ["/" in cell.rate for cell in result.cells]
    if not any(with_latency):
        return "links without added latency"
    return "after a slash the latency of a round trip" + ("" if all(with_latency) else ", else none added")


def _size(workload: CommWorkload) -> str:
    gradients = workload.gradients
    return f"{workload.title}: {gradients.parameters:,} parameters in {len(gradients.shapes)} tensors"


def show(console: Console, result: CommResult) -> None:
    """Print the table of the last cell."""
    cell = result.cells[-1]
    workload = result.workloads[cell.workload]
    title = f"{_size(workload)}\n{_place(cell)}, {len(cell.rounds)} rounds"
    rows = [row(cell, workload, key) for key in result.methods]
    print_table(console, title, HEAD, rows, width=_WIDTH)


def _cell(result: CommResult, cell: CommCell) -> dict[str, Any]:
    gradients = result.workloads[cell.workload].gradients
    methods = {}
    for key in result.methods:
        faster = cell.faster(key)
        methods[key] = {
            "seconds": asdict(cell.seconds(key)),
            "times_faster": None if faster is None else asdict(faster),
            "cpu_seconds": cell.cpu(key),
            "bytes_sent": None if cell.rate == LOOPBACK else cell.sent(key, gradients),
            "payload": REDUCTIONS[key].payload(gradients, cell.ranks),
            "steps_per_window": cell.steps[key],
        }
    link = CommPlan.link(cell.rate)
    return {
        "workload": cell.workload,
        "ranks": cell.ranks,
        "rate": cell.rate,
        "bits_per_second": None if link is None else link.rate,
        "latency_seconds": 0.0 if link is None else link.latency,
        "burst_bytes": None if link is None else netns.burst(link.rate),
        "methods": methods,
        "rounds": [{key: asdict(sample) for key, sample in each.items()} for each in cell.rounds],
    }


def to_dict(result: CommResult, command: str) -> dict[str, Any]:
    """All that was measured, every window included."""
    return {
        "command": command,
        "date": now(),
        "machine": {
            **environment(torch.device("cpu"), 1),
            "threads": 1,
            "cores": os.cpu_count(),
            "platform": platform.platform(),
        },
        "peer": PEER,
        "methods": {key: {"label": REDUCTIONS[key].label, "kind": REDUCTIONS[key].origin} for key in result.methods},
        "workloads": {
            key: {
                "title": workload.title,
                "parameters": workload.gradients.parameters,
                "shapes": workload.gradients.shapes,
            }
            for key, workload in result.workloads.items()
        },
        "cells": [_cell(result, cell) for cell in result.cells],
        "left_out": result.left_out,
    }


def markdown(result: CommResult, record: dict[str, Any]) -> str:
    """The tables as Markdown, under the machine and command of `to_dict`."""
    made = record["machine"]
    lines = ["# What a step over the network costs", "", f"`{record['command']}`, {record['date']}", ""]
    lines.append(
        f"{made['cpu']}, {made['cores']} cores, one thread per rank, {made['platform']}; torch {made['torch']} with "
        f"gloo, signstep {made['signstep']} ({made['git'] or 'no checkout'})"
    )
    for workload in result.workloads.values():
        lines += ["", f"## {_size(workload)}"]
        for cell in (cell for cell in result.cells if cell.workload == workload.key):
            lines += ["", f"### {_place(cell)}", "", f"{len(cell.rounds)} rounds", ""]
            lines += markdown_table(HEAD, [row(cell, workload, key) for key in result.methods])
    if result.left_out:
        lines += ["", "Not measured:", "", *(f"- {each}" for each in result.left_out)]
    lines += ["", *(f"- {note}" for note in notes(result))]
    return "\n".join(lines) + "\n"


def draw(result: CommResult, workload: CommWorkload, heading: tuple[str, str]) -> Figure:
    """Milliseconds per step on a logarithmic axis: a column per rate, a block per number of ranks, a bar per method."""
    cells = {(cell.ranks, cell.rate): cell for cell in result.cells if cell.workload == workload.key}
    counts, rates = sorted({ranks for ranks, _ in cells}), list(dict.fromkeys(rate for _, rate in cells))
    step, top, bottom, left, right, gap, panel, head = 15.0, 78.0, 34.0, 150.0, 44.0, 50.0, 130.0, 36.0
    block = step * len(result.methods)
    width = left + len(rates) * panel + (len(rates) - 1) * gap + right
    figure = figures.blank(width, top + bottom + len(counts) * block + (len(counts) - 1) * head)
    times = [1e3 * cell.seconds(key).median for cell in cells.values() for key in result.methods]
    span = min(times) / 1.5, max(times) * 1.2
    for i, count in enumerate(counts):
        for j, rate in enumerate(rates):
            below = bottom + (len(counts) - 1 - i) * (block + head)
            axes = figures.add_plot(figure, left + j * (panel + gap), below, panel, block)
            cell = cells.get((count, rate))
            spreads = [None if cell is None else cell.seconds(key).scaled(1e3) for key in result.methods]
            shades = [_KINDS[REDUCTIONS[key].origin][1] for key in result.methods]
            title = f"{count} ranks, {'not shaped' if rate == UNSHAPED else rate}"
            ticks = LogLocator(subs=(1, 3) if span[1] < 30 * span[0] else (1,))
            draw_bars(axes, title, list(zip(shades, spreads, strict=True)), start=span[0], span=span, ticks=ticks)
            if cell is None:
                figures.annotate(axes, "not measured", (0.5, 0.5), "axes fraction", ha="center", va="center")
            if j == 0:
                name_bars(axes, [REDUCTIONS[key].label for key in result.methods])
    origins = {REDUCTIONS[key].origin for key in result.methods}
    draw_legend(figure, [named for origin, named in _KINDS.items() if origin in origins])
    figures.add_heading(figure, heading, 12)
    return figure


def write(result: CommResult, out: Path, command: str) -> list[Path]:
    """Write what there is so far into `out`, made where there is none, each file atomically, and return their paths."""
    record = to_dict(result, command)
    made = record["machine"]
    contents: dict[str, Any] = {f"{NAME}.json": record, f"{NAME}.md": markdown(result, record)}
    for workload in result.workloads.values():
        if any(cell.workload == workload.key for cell in result.cells):
            title = f"A step over the network: {workload.title}, milliseconds"
            subtitle = f"{made['cpu']}, {made['cores']} cores; median, 10 to 90 %; gloo, {_latency(result)}"
            drawn = draw(result, workload, (title, subtitle))
            name = f"{NAME}-{workload.key}"
            contents[f"{name}.png"] = figures.png(drawn)
            contents[f"{name}.svg"] = figures.svg(drawn, name=NAME, description=f"{title}; {subtitle}", alone=True)
    return write_all(out, contents)

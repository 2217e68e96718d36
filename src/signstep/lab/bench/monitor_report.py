"""What `signstep bench monitor` shows and writes: a table per network, bench-monitor.json and .md."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from signstep.lab.bench.monitor_loops import EVERY, PARTS, MonitorResult
from signstep.lab.bench.report import machine, print_table
from signstep.lab.bench.targets import TARGETS_HEAD
from signstep.lab.output.files import write_all
from signstep.lab.output.machine import now
from signstep.lab.output.tables import markdown_table

NAME = "bench-monitor"
HEAD = ("loop", "other step", "own step", "extra", f"% at every={EVERY}", "peak", "lasting")
NOTES = (
    "other step, own step: time over that of the same step in a plain loop, median over the rounds of two times of the "
    "same round, then the 10th and 90th percentile; an own step is a measured one: what it costs at every=1",
    "extra: how much longer own steps are than plain ones, over the same in the first line",
    f"% at every={EVERY}: ({EVERY - 1} other + own) / ({EVERY} plain) - 1",
    "peak: of an own step's memory beyond a plain step's, over the bytes of the gradients; lasting: the same without "
    "what a forward and backward pass both makes and releases: activations, and Cockpit's per-sample gradients",
    f"Monitor: every={EVERY} and its defaults, to a JSONLines sink; measure: the batch goes through the network once "
    f"more, in {PARTS} parts; accumulation: {PARTS} micro-batches a step, together the batch, and nothing to measure",
    "Cockpit: its quantities of that name at the same schedule",
)
_PACKAGES = ("cockpit-for-pytorch", "backpack-for-pytorch", "setuptools")
_WIDTH = 120


def row(result: MonitorResult, key: str) -> tuple[str, ...]:
    """A loop's line of the table."""
    times = (result.over(key, "other"), result.over(key, "own"), result.extra(key), result.overhead(key))
    memory = ("" if each is None else f"{each:.2f}" for each in result.excess(key))
    return (result.labels[key], *map(str, times), *memory)


def _title(result: MonitorResult, batch: int) -> str:
    plain = statistics.median(r["monitor"]["plain"] for r in result.rounds)
    return (
        f"{result.title}, {result.parameters:,} parameters, {result.gradient_bytes / 2**20:.2f} MiB of gradients, "
        f"batch {batch}: a plain step takes {1e3 * plain:.0f} ms"
    )


def _remarks(result: MonitorResult) -> list[str]:
    lines = [f"{label}: not measured: {why}" for label, why in result.missing.items()]
    return lines + [f"Cockpit or BackPACK warns: {text}" for text in result.said]


def to_dict(results: Sequence[MonitorResult], device: torch.device, batch: int, command: str) -> dict[str, Any]:
    """All that was measured, every time included."""
    return {
        "command": command,
        "date": now(),
        "machine": machine(device, _PACKAGES) | {"cores": os.cpu_count()},
        "batch": batch,
        "every": EVERY,
        "parts": PARTS,
        "networks": [
            {
                "title": result.title,
                "parameters": result.parameters,
                "gradient_bytes": result.gradient_bytes,
                "loops": {key: _loop(result, key) for key in result.labels},
                "missing": result.missing,
                "warnings": result.said,
                "targets": [target.to_dict() for target in result.targets()],
                "rounds": result.rounds,
            }
            for result in results
        ],
    }


def _loop(result: MonitorResult, key: str) -> dict[str, Any]:
    whole, lasting = result.excess(key)
    return {
        "label": result.labels[key],
        "other_over_plain": asdict(result.over(key, "other")),
        "own_over_plain": asdict(result.over(key, "own")),
        "extra_over_monitor": asdict(result.extra(key)),
        "overhead_percent": asdict(result.overhead(key)),
        "peak_over_gradients": whole,
        "lasting_peak_over_gradients": lasting,
        "peak_bytes": {kind: {"all": each[0], "lasting": each[1]} for kind, each in result.peaks[key].items()},
    }


def markdown(results: Sequence[MonitorResult], record: Mapping[str, Any]) -> str:
    """The tables as Markdown, under the machine and command of `to_dict`."""
    made = record["machine"]
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in made["packages"].items())
    lines = ["# What a Monitor costs", "", f"`{record['command']}`, {record['date']}", ""]
    lines.append(
        f"{made['device']}, {made['cpu']}, {made['cores']} cores, {made['threads']} threads, {made['platform']}; torch "
        f"{made['torch']}, signstep {made['signstep']} ({made['git'] or 'no checkout'}); {packages}; "
        f"{len(results[0].rounds)} rounds"
    )
    for result in results:
        lines += ["", f"## {_title(result, record['batch'])}", ""]
        lines += markdown_table(HEAD, [row(result, key) for key in result.labels])
        lines += ["", *markdown_table(TARGETS_HEAD, [target.row for target in result.targets()])]
        lines += ["", *(f"- {line}" for line in _remarks(result))]
    return "\n".join([*lines, "", *(f"- {note}" for note in NOTES)]) + "\n"


def show(results: Sequence[MonitorResult], record: Mapping[str, Any]) -> None:
    console = Console()
    for result in results:
        title = _title(result, record["batch"])
        print_table(console, title, HEAD, [row(result, key) for key in result.labels], width=_WIDTH)
        print_table(console, "targets", TARGETS_HEAD, [target.row for target in result.targets()], width=_WIDTH)
        for remark in _remarks(result):
            console.print(remark, highlight=False, markup=False)
    for note in NOTES:
        console.print(note, highlight=False, markup=False)


def write(results: Sequence[MonitorResult], record: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the record and its tables into `out`, made where there is none."""
    return write_all(out, {f"{NAME}.json": record, f"{NAME}.md": markdown(results, record)})

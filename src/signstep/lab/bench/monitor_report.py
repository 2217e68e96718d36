"""What `signstep bench monitor` shows and writes: a table per network, bench-monitor.json and .md."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import rich.box
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from signstep.lab.bench import step_report as bench_report
from signstep.lab.bench.monitor import EVERY, PARTS, Result
from signstep.lab.bench.step_report import TARGETS_HEAD, _interval, _markdown_table, _put
from signstep.lab.bench.step_targets import Target
from signstep.lab.training.checkpoint import write_atomically

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


@contextlib.contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """What a measurement tells its progress to."""
    console = Console(stderr=True)
    with console.status("") as line:
        yield line.update if console.is_terminal else console.print


def row(result: Result, key: str) -> tuple[str, ...]:
    """A loop's line of the table."""
    times = (result.over(key, "other"), result.over(key, "own"), result.extra(key), result.overhead(key))
    memory = ("" if each is None else f"{each:.2f}" for each in result.excess(key))
    return (result.labels[key], *map(_interval, times), *memory)


def _target_row(target: Target) -> tuple[str, ...]:
    spread = target.measured
    exact = spread is not None and spread.low == spread.high
    return (target.text, f"≤ {target.limit:g}", _interval(spread).partition(" (")[0] if exact else _interval(spread),
            target.verdict)  # fmt: skip


def _title(result: Result, batch: int) -> str:
    plain = statistics.median(r["monitor"]["plain"] for r in result.rounds)
    return (
        f"{result.title}, {result.parameters:,} parameters, {result.gradient_bytes / 2**20:.2f} MiB of gradients, "
        f"batch {batch}: a plain step takes {1e3 * plain:.0f} ms"
    )


def _remarks(result: Result) -> list[str]:
    lines = [f"{label}: not measured: {why}" for label, why in result.missing.items()]
    return lines + [f"Cockpit or BackPACK warns: {text}" for text in result.said]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def to_dict(results: Sequence[Result], device: torch.device, batch: int, command: str) -> dict[str, Any]:
    """All that was measured, every time included."""
    packages = {name: _version(name) for name in _PACKAGES}
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": bench_report.machine(device) | {"cores": os.cpu_count(), "packages": packages},
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
                "targets": [bench_report._target(target) for target in result.targets()],
                "rounds": result.rounds,
            }
            for result in results
        ],
    }


def _loop(result: Result, key: str) -> dict[str, Any]:
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


def markdown(results: Sequence[Result], record: Mapping[str, Any]) -> str:
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
        lines += _markdown_table(HEAD, [row(result, key) for key in result.labels])
        lines += ["", *_markdown_table(TARGETS_HEAD, [_target_row(target) for target in result.targets()])]
        lines += ["", *(f"- {line}" for line in _remarks(result))]
    return "\n".join([*lines, "", *(f"- {note}" for note in NOTES)]) + "\n"


def show(results: Sequence[Result], record: Mapping[str, Any], out: Path | None) -> None:
    """Print the tables, and write them into `out`, made where there is none.

    Raises:
        OSError: `out` cannot be written.
    """
    console = Console()
    # A pipe has no width of its own.
    console.width = max(console.width, _WIDTH) if not console.is_terminal else console.width
    for result in results:
        rows = [row(result, key) for key in result.labels]
        verdicts = [_target_row(target) for target in result.targets()]
        for title, head, lines in ((_title(result, record["batch"]), HEAD, rows), ("targets", TARGETS_HEAD, verdicts)):
            table = Table(*head, title=escape(title), box=rich.box.SIMPLE, title_justify="left")
            for column in table.columns[1:]:
                column.justify, column.no_wrap = "right", True
            for line in lines:
                table.add_row(*map(escape, line))
            console.print(table)
        for remark in _remarks(result):
            console.print(remark, highlight=False, markup=False)
    for note in NOTES:
        console.print(note, highlight=False, markup=False)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    contents = {"json": json.dumps(record, indent=1, ensure_ascii=False) + "\n", "md": markdown(results, record)}
    for suffix, text in contents.items():
        path = out / f"{NAME}.{suffix}"
        write_atomically(path, functools.partial(_put, text.encode()))
        console.print(f"written: {path}", highlight=False, markup=False)

"""What the benchmarks' reports share: a line of progress, tables on a terminal, and the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import rich.box
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from signstep.lab.output.machine import environment


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """What a measurement tells its progress to: on a terminal a line that changes, else lines on stderr."""
    console = Console(stderr=True)
    with console.status("") as line:
        yield line.update if console.is_terminal else console.print


def print_table(
    console: Console,
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    width: int,
    left: Sequence[int] = (0,),
) -> None:
    """Print a table. A pipe has no width of its own, so it gets `width`.

    A terminal that is too narrow folds the lines: nothing is cut off.
    `left` has the numbers of the columns that are aligned left; the others hold numbers.
    """
    needed = 1 + sum(max(map(len, column)) + 3 for column in zip(head, *rows, strict=True))
    console.width = max(console.width, needed if console.is_terminal else max(needed, width))
    table = Table(*head, title=escape(title), box=rich.box.SIMPLE, title_justify="left")
    for number, column in enumerate(table.columns):
        column.justify = "left" if number in left else "right"
        column.no_wrap = number > 0
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def machine(device: torch.device, packages: Collection[str]) -> dict[str, Any]:
    """What a benchmark ran on, with the versions of these packages; None for one that is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        **environment(device, 1),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "packages": versions,
    }

"""`signstep runs`: the runs of a folder, a line for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from signstep.lab.errors import BadInput

if TYPE_CHECKING:
    from signstep.lab.studies.run_list import ListedRun

_HEAD = ("dataset", "method", "lr", "seed", "epochs", "accuracy", "state", "run")
_LEFT = (0, 1, 6, 7)


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder: what they are, how good, and how far.

    Accuracy is that of the last evaluation, in percent; of a text bits per byte stand in its place. A run that was
    interrupted goes on with the command that started it.
    """

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Where `signstep train` wrote them, or the folders runs and tune of an experiment."""
    html: bool = False
    """Write the list into the folder too, as runs.html: a table that can be sorted, with the curve of each run."""

    def run(self) -> int:
        from rich.console import Console

        from signstep.lab.bench.report import print_table
        from signstep.lab.studies.run_list import read_list, write_page

        if not self.folder.is_dir():
            raise BadInput(f"{self.folder}: there is no such folder; name the one that signstep train wrote to")
        found = read_list(self.folder)
        if found.runs:
            count = f"{len(found.runs)} run{'s' if len(found.runs) > 1 else ''}"
            rows = [_row(run) for run in found.runs]
            print_table(Console(), f"{count} in {self.folder}", _HEAD, rows, width=0, left=_LEFT)
        else:
            inside = sorted({str(path.parent) for path in self.folder.glob("*/*.jsonl")})
            print(f"no runs in {self.folder}" + (f"; there are records in {', '.join(inside)}" if inside else ""))
        for text in found.unreadable:
            print(text)
        if self.html and (found.runs or found.unreadable):
            print(f"page: {write_page(found)}")
        return 0


def _row(run: ListedRun) -> tuple[str, ...]:
    config = run.config
    return (
        config.dataset,
        run.method,
        f"{config.lr:g}",
        str(config.seed),
        str(config.epochs),
        run.text,
        run.state,
        config.hash,
    )

"""`signstep demo`: the paper's comparison in minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from signstep.lab.arguments import check_folder
from signstep.lab.cli.reproduce import Reproduce
from signstep.lab.training.config import Dataset


@dataclass(frozen=True)
class Demo:
    """Train Table I's rows on Fashion-MNIST in a few minutes and write the report."""

    out: Path = Path("results")
    """The results go to <out>/demo-strong."""
    data: Path | None = None
    """Folder to look for the images in first."""
    max_minutes: float | None = 9.0
    """Stop after this many minutes; the same command goes on."""
    seeds: int = 2
    """Runs of every row."""

    def run(self) -> int:
        from signstep.lab.data import demo_dataset

        check_folder(self.data)
        name, reason = demo_dataset(self.data)
        print(f"data set {name}: {reason}")
        return Reproduce(
            experiment="table1",
            scale="demo",
            dataset=(cast(Dataset, name),),
            out=self.out,
            data=self.data,
            max_minutes=self.max_minutes,
            seeds=self.seeds,
        ).run()

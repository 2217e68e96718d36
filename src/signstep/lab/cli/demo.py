"""`signstep demo`: what to take from the paper, in minutes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from signstep.lab.arguments import check_folder
from signstep.lab.cli.experiments import TrainingOptions
from signstep.lab.errors import BadInput
from signstep.lab.training.config import Dataset


@dataclass(frozen=True)
class Demo:
    """Train sign steps, their peers and the remedies on Fashion-MNIST in minutes, and say what to take from it."""

    out: Path = Path("results")
    """The results go to <out>/demo-strong."""
    data: Path | None = None
    """Folder to look for the images in first."""
    max_minutes: float | None = 8.0
    """Stop after this many minutes; the same command goes on."""
    seeds: int = 2
    """Runs of every row."""
    processes: int | None = None
    """Runs at a time, each on one thread; None: as many as torch has threads, at most 4."""

    def run(self) -> int:
        import torch

        from signstep.lab.data import demo_dataset
        from signstep.lab.output.stats import number
        from signstep.lab.paper.reproduce import reproduce
        from signstep.lab.paper.tuned import read_tuned

        check_folder(self.data)
        if self.processes is not None and self.processes < 1:
            raise BadInput(f"--processes {self.processes}: expected at least 1")
        name, reason = demo_dataset(self.data)
        print(f"data set {name}: {reason}")
        options = TrainingOptions(
            experiment="demo",
            scale="demo",
            dataset=(cast(Dataset, name),),
            out=self.out,
            data=self.data,
            max_minutes=self.max_minutes,
        )
        chosen, _ = options.begin()
        reproduce(
            chosen,
            options.folder,
            seeds=self.seeds,
            tuned=read_tuned(options.folder),
            data=self.data,
            max_minutes=self.max_minutes,
            processes=self.processes or min(4, torch.get_num_threads()),
        )
        options.write_reports(chosen, self.seeds)
        report = json.loads((options.folder / "demo.json").read_text(encoding="utf-8"))
        for row in report["rows"]:
            mean = row["cells"][name]["mean"]
            called = row["label"] if row["short"] == row["label"] else f"{row['short']}: {row['label']}"
            print(f"{'not run' if mean is None else number(mean, 1) + ' %':>8}  {called}")
        print(report["headline"])
        return 0

"""What `sweep`, `reproduce` and `report` share: the options that choose experiments, and the end of their work."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from signstep.lab.arguments import check_minutes, check_place, parse_shard
from signstep.lab.cli.data import say_where
from signstep.lab.errors import BadInput
from signstep.lab.paper import experiments
from signstep.lab.paper.experiments import Experiment, Name, Recipe, Scale
from signstep.lab.training.config import Dataset


@dataclass(frozen=True)
class ExperimentOptions:
    """Which experiments, and where their results are."""

    experiment: Annotated[Name | Literal["all"], tyro.conf.Positional] = "all"
    """Which of the paper's results."""
    scale: Scale = "cpu"
    """smoke: seconds; demo: minutes; cpu: hours on two cores; cpu2: days on two cores; full: one GPU."""
    recipe: Recipe = "strong"
    """paper: what the paper's text says; strong: what a reviewer would accept."""
    dataset: tuple[Dataset, ...] = ()
    """Data sets instead of the paper's."""
    rows: tuple[str, ...] = ()
    """Rows, by their keys (sgd, signsgd, pre-relative, ...), instead of all."""
    out: Path = Path("results")
    """Results go to <out>/<scale>-<recipe>."""

    @property
    def folder(self) -> Path:
        return self.out / f"{self.scale}-{self.recipe}"

    def load(self) -> tuple[Experiment, ...]:
        return experiments.load_all(
            self.experiment, scale=self.scale, recipe=self.recipe, datasets=self.dataset or None, rows=self.rows
        )

    @property
    def which(self) -> list[str]:
        """The arguments that choose these experiments, for any command."""
        words = [self.experiment, "--scale", self.scale, "--recipe", self.recipe]
        words += ["--dataset", *self.dataset] if self.dataset else []
        return words + (["--rows", *self.rows] if self.rows else [])

    def write_reports(self, chosen: Sequence[Experiment], seeds: int) -> None:
        """Write what the runs in `folder` show, and name the reports."""
        from signstep.lab.paper.reproduce import write_reports
        from signstep.lab.paper.tuned import read_tuned

        tuned = read_tuned(self.folder)
        keys = {(dataset, row.key) for e in chosen for dataset in e.datasets for row in e.rows}
        choices = [choice for d, rows in tuned.items() for key, choice in rows.items() if (d, key) in keys]
        grids = sorted({len(choice["trials"]) - choice["extensions"] for choice in choices})
        commands = [["sweep", *self.which, "--trials", str(trials)] for trials in grids]
        commands.append(["reproduce", *self.which, "--seeds", str(seeds)])
        lines = [shlex.join(["signstep", *command]) for command in commands]
        for page in write_reports(chosen, self.folder, seeds=seeds, tuned=tuned, commands=lines):
            print(f"table: {page.with_suffix('.md')}")
            print(f"report: {page}")


@dataclass(frozen=True)
class TrainingOptions(ExperimentOptions):
    """Which experiments to train, and how."""

    data: Path | None = None
    """Folder to look for the images in first, or the file of --dataset text."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    max_minutes: float | None = None
    """Stop after this many minutes; the same command goes on."""
    shard: str = "0/1"
    """i/n: do the i-th of n shares of the work, i from 0."""

    def begin(self) -> tuple[tuple[Experiment, ...], tuple[int, int]]:
        """The experiments, and the shard's i and n; says where their images are.

        Raises:
            BadInput: an option that cannot be used.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise BadInput(
                "torchrun's workers train one run together: use it with signstep train, "
                "and --shard here to train several runs at the same time"
            )
        check_minutes(self.max_minutes)
        shard = parse_shard(self.shard)
        chosen = self.load()
        datasets = {dataset for e in chosen for dataset in e.datasets}
        check_place(self.data, datasets)
        say_where(datasets, self.data)
        if "text" in datasets:
            from signstep.lab.data import load_text
            from signstep.lab.training.records import require_text_of

            text = load_text("text", self.data)
            for folder in ("tune", "runs"):
                require_text_of(self.folder / folder, text)
        return chosen, shard

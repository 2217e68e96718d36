"""What an experiment's runs show, as numbers: results, intervals, and differences to the baselines.

A result is what the experiment's metric says: an accuracy in percent, with differences in points of percent, or bits
per byte, of which fewer are better. A run stopped by a non-finite loss counts with the value of chance and is said to
have diverged; an unfinished run counts nowhere and is listed as missing.
What is said of the numbers is in sentences.py, how the runs were made in settings.py, what is drawn in charts.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from signstep.lab.output import stats
from signstep.lab.paper.experiments import Experiment, Row, dataset_title
from signstep.lab.paper.plan import plan
from signstep.lab.paper.tuned import Choices, learning_rate
from signstep.lab.training.config import RunConfig
from signstep.lab.training.records import Run
from signstep.lab.training.tasks import Metric

BASELINES = ("sgd", "adam", "signsgd")
"""Keys of the rows that every other one is compared with, seed by seed."""


@dataclass(frozen=True)
class Cell:
    """One method on one data set."""

    dataset: str
    lr: float
    results: Mapping[int, float]
    """By seed, of finished runs."""
    diverged: tuple[int, ...]
    missing: tuple[int, ...]
    """Seeds that the experiment has and this cell has no finished run of."""
    paper: float | None
    runs: tuple[Run, ...]
    metric: Metric
    trials: int
    """How many chose its learning rate; 0: none did."""

    @property
    def all_diverged(self) -> bool:
        return bool(self.results) and len(self.diverged) == len(self.results)

    @cached_property
    def estimate(self) -> stats.MeanEstimate | None:
        """None without a finished run, and where all diverged: chance is no measurement."""
        return stats.estimate(list(self.results.values())) if self.results and not self.all_diverged else None

    @property
    def text(self) -> str:
        if self.estimate is None:
            return f"diverged ({self.caveat})" if self.all_diverged else "not run"
        return stats.with_interval(self.estimate, digits=self.metric.digits)

    @property
    def caveat(self) -> str:
        """'1 of 3' or nothing: how many seeds diverged."""
        return f"{len(self.diverged)} of {len(self.results)}" if self.diverged else ""

    @property
    def shift(self) -> float | None:
        """Measured mean minus the paper's number."""
        return None if self.estimate is None or self.paper is None else self.estimate.mean - self.paper

    @property
    def verdict(self) -> str:
        """The cell beside the paper's number, in words."""
        if self.estimate is None:
            return self.text
        return "the paper gives no number" if self.paper is None else stats.against_paper(self.estimate, self.paper)


@dataclass(frozen=True)
class Difference:
    """A method minus a baseline on one data set, over the seeds that both have."""

    dataset: str
    row: Row
    baseline: Row
    estimate: stats.MeanEstimate | None
    paper: float | None
    """The same difference of the paper's numbers."""
    corrected: float | None = None
    """p of the paired t-test, by Holm's correction for all differences of the report; None where there is no p."""

    @property
    def verdict(self) -> stats.Verdict | None:
        """What the measured difference says of the paper's; None where either is absent."""
        if self.estimate is None or self.paper is None:
            return None
        return stats.claim_verdict(self.estimate, self.paper, self.corrected)


def _corrected(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    corrected = stats.holm([None if d.estimate is None else d.estimate.p_value() for d in differences])
    return tuple(replace(d, corrected=p) for d, p in zip(differences, corrected, strict=True))


class Results:
    """An experiment and its runs, brought together.

    Args:
        experiment: the rows and data sets.
        runs: by hash; others than the experiment's at the tuned (else preset) learning rates are left out.
        tuned: what the sweep chose.
        seeds: which are counted, and missing where there is no run; None: those that the runs have.
    """

    def __init__(
        self, experiment: Experiment, runs: Mapping[str, Run], tuned: Choices, seeds: Iterable[int] | None = None
    ) -> None:
        self.experiment, self.metric = experiment, experiment.metric
        self.tuned = {d: {r.key: tuned[d][r.key] for r in experiment.rows if r.key in tuned[d]}
                      for d in experiment.datasets if d in tuned}  # fmt: skip
        self.titles = {d: dataset_title(d) for d in experiment.datasets}
        wanted = {run.config.seed for run in runs.values()} if seeds is None else set(seeds)
        planned = plan([experiment], sorted(wanted), tuned)
        found: dict[tuple[str, str], dict[int, Run]] = {(r.key, d): {} for r in experiment.rows for d in self.titles}
        for each in planned:
            if each.config.hash in runs:
                found[each.row.key, each.dataset][each.seed] = runs[each.config.hash]
        if seeds is None:
            wanted = {seed for by_seed in found.values() for seed in by_seed}
        self.seeds = tuple(sorted(wanted))
        self.unfinished = tuple(run for by_seed in found.values() for run in by_seed.values() if not run.done)
        self.cells = {
            (row.key, dataset): self._cell(row, dataset, learning_rate(row, dataset, tuned), found[row.key, dataset])
            for row in experiment.rows
            for dataset in experiment.datasets
        }
        self.differences = _corrected(list(self._differences()))

    def _cell(self, row: Row, dataset: str, lr: float, by_seed: dict[int, Run]) -> Cell:
        finished = {seed: run for seed, run in by_seed.items() if run.done}
        return Cell(
            dataset=dataset,
            lr=lr,
            results={seed: run.result for seed, run in finished.items()},
            diverged=tuple(seed for seed, run in finished.items() if run.diverged),
            missing=tuple(seed for seed in self.seeds if seed not in finished),
            paper=row.paper.get(dataset),
            runs=tuple(finished.values()),
            metric=self.metric,
            trials=len(self.tuned.get(dataset, {}).get(row.tuned_key, {}).get("trials", ())),
        )

    def _differences(self) -> Iterator[Difference]:
        for dataset in self.experiment.datasets:
            for base in self.baselines:
                ours_base = self.cells[base.key, dataset]
                for row in self.experiment.rows:
                    cell = self.cells[row.key, dataset]
                    if row in self.baselines[: self.baselines.index(base) + 1]:
                        continue  # itself, or its mirror image, which has been there
                    measured = None
                    if cell.estimate and ours_base.estimate:
                        measured = stats.paired_difference(cell.results, ours_base.results)
                    paper = None if cell.paper is None or ours_base.paper is None else cell.paper - ours_base.paper
                    yield Difference(dataset, row, base, measured, paper)

    @property
    def baselines(self) -> tuple[Row, ...]:
        """The rows to compare with that the experiment has; of a user's comparison without any, its first row."""
        known = tuple(row for key in BASELINES for row in self.experiment.rows if row.key == key)
        return known or (() if self.experiment.of_paper else self.experiment.rows[:1])

    @property
    def groups(self) -> tuple[tuple[str, tuple[Row, ...]], ...]:
        """The paper's rows, then those that are not in it."""
        parts = ((title, tuple(r for r in self.experiment.rows if r.in_paper is kind))
                 for title, kind in (("", True), ("Not in the paper", False)))  # fmt: skip
        return tuple(part for part in parts if part[1])

    def difference(self, dataset: str, row: Row, baseline: Row) -> Difference | None:
        """The comparison of a row with a baseline; None of a row with itself."""
        for each in self.differences:
            if (each.dataset, each.row.key, each.baseline.key) == (dataset, row.key, baseline.key):
                return each
        return None

    def corrected(self, dataset: str, row: Row, other: Row) -> float | None:
        """The p of two rows that were named after their results were seen, corrected for all that might have been.

        Holm's where the report compares the two, else Bonferroni's for all pairs; None where there is no p.
        """
        compared = self.difference(dataset, row, other) or self.difference(dataset, other, row)
        if compared is not None:
            return compared.corrected
        gap = stats.paired_difference(self.cells[row.key, dataset].results, self.cells[other.key, dataset].results)
        p = None if gap is None else gap.p_value()
        return None if p is None else min(1.0, p * math.comb(len(self.experiment.rows), 2))

    def is_best(self, cell: Cell) -> bool:
        """Better than every other of its data set, seed by seed, with a p below 0.05 for each.

        All of them have to be, so their number needs no correction: the largest p is that of the whole.
        """
        others = [c for c in self.cells.values() if c.dataset == cell.dataset and c is not cell and c.estimate]
        return cell.estimate is not None and all(self._is_better(cell, other) for other in others)

    def _is_better(self, cell: Cell, other: Cell) -> bool:
        gap = stats.paired_difference(cell.results, other.results)
        p = None if gap is None else gap.p_value()
        return gap is not None and p is not None and self.metric.sign * gap.mean > 0 and p < stats.LEVEL

    def is_paper_best(self, cell: Cell) -> bool:
        """Highest of the paper's numbers of its data set."""
        numbers = [c.paper for c in self.cells.values() if c.dataset == cell.dataset and c.paper is not None]
        return cell.paper is not None and cell.paper == max(numbers)

    @property
    def finished(self) -> tuple[Run, ...]:
        """Every finished run that the report uses."""
        return tuple(run for cell in self.cells.values() for run in cell.runs)

    @cached_property
    def configs(self) -> tuple[RunConfig, ...]:
        """The configuration of every row on every data set, with seed 0 and the preset's learning rate."""
        return tuple(row.config(d) for row in self.experiment.rows for d in self.experiment.datasets)

    def in_paper(self, dataset: str) -> bool:
        """Whether the paper has any number on a data set."""
        return any(row.paper.get(dataset) is not None for row in self.experiment.rows)

    @property
    def any_in_paper(self) -> bool:
        """Whether the paper has any number on any of the data sets."""
        return any(self.in_paper(d) for d in self.experiment.datasets)

    @property
    def edges(self) -> list[tuple[Row, str, float]]:
        """Rows and data sets whose best learning rate, the third, is at the edge of the sweep's grid."""
        return [
            (row, dataset, float(rows[row.key]["lr"]))
            for dataset, rows in self.tuned.items()
            for row in self.experiment.rows
            if rows.get(row.key, {}).get("at_edge")
        ]

    def rates(self, dataset: str) -> list[float]:
        """Every learning rate tried on a data set."""
        return sorted({float(t["lr"]) for choice in self.tuned[dataset].values() for t in choice["trials"]})

    @staticmethod
    def trial(choice: Mapping[str, Any], lr: float) -> Mapping[str, Any] | None:
        """The trial of a learning rate, if it was tried."""
        return next((t for t in choice["trials"] if t["lr"] == lr), None)

    def switches(self, dataset: str) -> tuple[float, ...]:
        """Epochs at which the hybrid rows go on as SGD."""
        configs = [row.config(dataset) for row in self.experiment.rows]
        return tuple(sorted({c.switch * c.epochs for c in configs if c.switch is not None}))

    def epochs(self, dataset: str) -> int:
        """Length of the longest run."""
        return max(row.config(dataset).epochs for row in self.experiment.rows)

"""The final runs that experiments consist of: every row on every data set with every seed, at its learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from signstep.lab.errors import BadInput
from signstep.lab.paper.experiments import Experiment, Row
from signstep.lab.paper.tuned import Choices, learning_rate
from signstep.lab.training.config import RunConfig


@dataclass(frozen=True)
class PlannedRun:
    """One run, and where it belongs."""

    dataset: str
    row: Row
    seed: int
    config: RunConfig

    @property
    def label(self) -> str:
        """How the run is named in a line of progress."""
        return f"{self.dataset}, {self.row.label}, seed {self.seed}, lr {self.config.lr:g}"


def cells(experiments: Iterable[Experiment]) -> list[tuple[str, Row]]:
    """Every data set and row, in the experiments' order; those that several experiments have come once."""
    pairs = ((dataset, row) for each in experiments for dataset in each.datasets for row in each.rows)
    return list({(dataset, row.key): (dataset, row) for dataset, row in pairs}.values())


def first_seeds(count: int) -> range:
    """Seeds 0 to count - 1.

    Raises:
        BadInput: count is below 1.
    """
    if count < 1:
        raise BadInput(f"seeds={count}: expected at least 1")
    return range(count)


def plan(experiments: Sequence[Experiment], seeds: Iterable[int], tuned: Choices) -> list[PlannedRun]:
    """The runs that experiments of one scale and recipe need; one that several of them need comes once.

    Args:
        experiments: whose rows to run.
        seeds: of every row; all rows with the first seed come before any row with the second.
        tuned: what the sweep chose; a row that it lacks has its preset's learning rate.
    """
    rated = [(dataset, row, learning_rate(row, dataset, tuned)) for dataset, row in cells(experiments)]
    return [PlannedRun(d, row, seed, row.config(d, seed, lr)) for seed in seeds for d, row, lr in rated]

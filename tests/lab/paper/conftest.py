"""A report on Table I that several files of tests read."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import COMMANDS, accuracies, by_hash, run

from signstep.lab.paper import experiments
from signstep.lab.paper.experiments import Experiment, Row
from signstep.lab.paper.report import write
from signstep.lab.training.records import Run


@pytest.fixture(scope="session")
def table1() -> Experiment:
    return experiments.load("table1", scale="cpu")


@pytest.fixture(scope="session")
def tuned_table1(table1: Experiment) -> dict[str, dict[str, dict[str, Any]]]:
    def choice(row: Row) -> dict[str, Any]:
        rates = [experiments.grid_point(i) for i in row.grid(5)]
        trials = [{"lr": lr, "accuracy": 50.0 + i, "diverged": i == 4, "hash": "0" * 12} for i, lr in enumerate(rates)]
        return {"lr": rates[3], "accuracy": 53.0, "at_edge": row.key == "adam", "extensions": 0, "trials": trials}

    return {"cifar10": {row.key: choice(row) for row in table1.rows}}


@pytest.fixture(scope="session")
def page(table1: Experiment, tuned_table1: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table I with three seeds, one of them diverged, one unfinished, one absent."""
    runs: list[Run] = []
    for (key, dataset, seed), accuracy in accuracies(table1, 3).items():
        row, lr = table1.row(key), tuned_table1.get(dataset, {}).get(key, {}).get("lr")
        if (key, dataset, seed) == ("post-0.1", "cifar10", 2):
            continue
        gone = (key, dataset, seed) == ("pre-0.5", "cifar100", 1)
        part = 2 if (key, dataset, seed) == ("adam", "cifar100", 2) else 0
        runs.append(run(row, dataset, seed, None if gone else accuracy, lr=lr, upto=part))
    out = tmp_path_factory.mktemp("report")
    return write(table1, by_hash(*runs), out, tuned=tuned_table1, commands=COMMANDS)

"""Tune the learning rate of every method with the same number of trials, without looking at the test set.

Each trial is one run on the tuning split: trained on nine tenths of the training set, judged by its last epoch's
accuracy on the tenth that was held out. A best trial at the edge of the grid extends the grid by a point beyond that
edge, at most `MAX_EXTENSIONS` times. What is known follows from the trials' records alone, so a sweep that was
stopped, or split over machines, goes on from whatever files there are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import filelock

from signstep.lab.errors import BadInput
from signstep.lab.paper.experiments import Experiment, Row, grid_point
from signstep.lab.training.config import RunConfig

MAX_EXTENSIONS = 2


class Record(Protocol):
    """What the sweep reads of a `signstep.lab.training.records.Run`."""

    @property
    def done(self) -> bool: ...
    @property
    def diverged(self) -> bool: ...
    @property
    def final_accuracy(self) -> float: ...


Train = Callable[[RunConfig, Path, float | None], str]
"""Trains one run in a folder for at most so many minutes: "done", "diverged", "stopped", or "busy" (elsewhere)."""


@dataclass(frozen=True)
class Trial:
    """A finished tuning run; `accuracy` in percent."""

    lr: float
    accuracy: float
    diverged: bool
    hash: str


@dataclass(frozen=True)
class Search:
    """How far the search for one method's learning rate on one data set has come."""

    dataset: str
    row: Row
    trials: tuple[Trial, ...]
    """Finished ones, by rising lr."""
    pending: tuple[RunConfig, ...]
    """To be trained next; empty: the search is over."""
    extensions: int
    at_edge: bool
    """The best trial is still at the grid's edge: the method may want a learning rate outside it."""

    @property
    def best(self) -> Trial:
        """The trial of the highest accuracy, of equal ones that of the smaller lr. A diverged one comes last."""
        return max(self.trials, key=lambda trial: (not trial.diverged, trial.accuracy, -trial.lr))


def search(dataset: str, row: Row, trials: int, records: Mapping[str, Record]) -> Search:
    """The state of a search, from the records of the trials made so far (by hash).

    Args:
        dataset: the data set.
        row: the method.
        trials: number of grid points before any extension, at least 1.
        records: finished or unfinished runs; others than this search's are ignored.
    """
    if trials < 1:
        raise BadInput(f"trials={trials}: expected at least 1")
    indices = list(row.grid(trials))
    extensions = 0
    while True:
        configs = {c.hash: c for c in (row.tuning_config(dataset, grid_point(index)) for index in indices)}
        finished = {key: records[key] for key in configs if key in records and records[key].done}
        state = Search(
            dataset=dataset,
            row=row,
            trials=tuple(
                Trial(configs[key].lr, record.final_accuracy, record.diverged, key) for key, record in finished.items()
            ),
            pending=tuple(config for key, config in configs.items() if key not in finished),
            extensions=extensions,
            at_edge=False,
        )
        if state.pending:
            return state
        lowest, highest = (grid_point(index) for index in (indices[0], indices[-1]))
        at_low, at_high = state.best.lr == lowest, state.best.lr == highest
        if not (at_low or at_high):
            return state
        if extensions == MAX_EXTENSIONS:
            return replace(state, at_edge=True)
        if at_high:
            indices.append(indices[-1] + 1)
        else:
            indices.insert(0, indices[0] - 1)
        extensions += 1


def read_tuned(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The choices in `<folder>/tuned.json`: by data set, then row; none where there is no such file.

    Raises:
        BadInput: the file is not what `sweep` writes.
    """
    path = folder / "tuned.json"
    if not path.exists():
        return {}
    try:
        choices: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text(encoding="utf-8"))["choices"]
        for rows in choices.values():
            for choice in rows.values():
                float(choice["lr"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path}: not a file that sweep writes ({error!r}); delete it and run the sweep again"
        ) from error
    return choices


def learning_rate(experiment: Experiment, key: str, dataset: str, tuned: Mapping[str, Mapping[str, Any]]) -> float:
    """The tuned learning rate of a row on a data set, or the preset's where it was not tuned."""
    row = experiment.row(key)
    choice = tuned.get(dataset, {}).get(row.tuned_key)
    return row.lr if choice is None else float(choice["lr"])


def _write_tuned(folder: Path, experiment: Experiment, searches: Iterable[Search]) -> None:
    """Add the choices of finished searches to tuned.json, and keep those of others that it has."""
    from signstep.lab.training.checkpoint import write_atomically

    choices = read_tuned(folder)
    for found in searches:
        if found.pending:
            continue
        choices.setdefault(found.dataset, {})[found.row.key] = {
            "lr": found.best.lr,
            "accuracy": round(found.best.accuracy, 4),
            "at_edge": found.at_edge,
            "extensions": found.extensions,
            "trials": [
                {"lr": t.lr, "accuracy": round(t.accuracy, 4), "diverged": t.diverged, "hash": t.hash}
                for t in found.trials
            ],
        }
    values = {
        "scale": experiment.scale,
        "recipe": experiment.recipe,
        "epochs": experiment.tune_epochs,
        "grid": f"ratio sqrt(10), the same number of trials per method, at most {MAX_EXTENSIONS} more beyond an edge",
        "criterion": "last epoch's accuracy (%) on the held-out tenth of the training set; ties to the smaller lr",
        "choices": {dataset: dict(sorted(choices[dataset].items())) for dataset in sorted(choices)},
    }
    text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / "tuned.json", lambda file: file.write(text.encode()))


def sweep(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    train: Train,
    read: Callable[[Path], Mapping[str, Record]],
    trials: int = 5,
    max_minutes: float | None = None,
    shard: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> bool:
    """Run the trials that are missing, then write the choices to `<folder>/tuned.json`.

    Args:
        experiments: whose rows to tune, each on its experiment's data sets; one scale and recipe. A row that several
            of them have is tuned once, one that takes another's learning rate not at all.
        folder: where `tune/<hash>.jsonl` and tuned.json go.
        train: trains one trial.
        read: reads the records in a folder.
        trials: grid points for every method.
        max_minutes: start no trial, and stop the one that runs, after so many minutes; None: no limit.
        shard: (i, n): do every n-th search, beginning with the i-th.
        say: takes a line of what is going on.

    Returns:
        Whether every search, of all shards, is over.
    """
    started = time.monotonic()
    pairs = list(
        {(d, row.key): (d, row) for e in experiments for d in e.datasets for row in e.rows if not row.lr_of}.values()
    )
    tune = folder / "tune"

    stopped = False
    for position in range(shard[0], len(pairs), shard[1]):
        dataset, row = pairs[position]
        busy: set[str] = set()
        while not stopped:
            waiting = [c for c in search(dataset, row, trials, read(tune)).pending if c.hash not in busy]
            if not waiting:
                break
            left = None if max_minutes is None else max_minutes - (time.monotonic() - started) / 60
            if left is not None and left <= 0:
                stopped = True
                break
            say(f"tuning {position + 1} of {len(pairs)}: {dataset}, {row.label}, lr {waiting[0].lr:g}")
            status = train(waiting[0], tune, left)
            if status in ("done", "diverged"):
                (tune / f"{waiting[0].hash}.pt").unlink(missing_ok=True)  # its accuracy is all that counts
            if status == "busy":
                busy.add(waiting[0].hash)
            stopped = status == "stopped"
        if stopped:
            break
    # Under a lock, so that of two shards that end at the same time the later one sees, and keeps, what both found.
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "results.lock"):
        records = read(tune)
        found = [search(dataset, row, trials, records) for dataset, row in pairs]
        _write_tuned(folder, experiments[0], found)
    for each in found:
        if each.at_edge:
            say(
                f"{each.dataset}, {each.row.label}: lr {each.best.lr:g} is best and still at the grid's edge "
                f"after {each.extensions} extensions"
            )
    missing = [each for each in found if each.pending]
    if missing:
        count = sum(len(each.pending) for each in missing)
        names = ", ".join(f"{each.dataset}/{each.row.key} ({len(each.pending)})" for each in missing)
        say(f"{count} trials are left, for {names}. The same command goes on with them.")
    return not missing

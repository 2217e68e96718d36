"""Tunes the learning rate of every method with the same grid of trials, without looking at the test set.

Each trial is one run on the tuning split: trained on nine tenths of the training set, judged by its last epoch's
accuracy (of a text: bits per byte) on the tenth that was held out. A best trial at the edge of the grid extends the
grid by a point beyond that edge, at most `MAX_EXTENSIONS` times. What is known follows from the trials' records alone,
so a sweep that was stopped, or split over machines, goes on from whatever files there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from signstep.lab.errors import BadInput
from signstep.lab.output.files import locked, make_folder
from signstep.lab.paper.experiments import Experiment, Row, grid_point
from signstep.lab.paper.plan import cells
from signstep.lab.paper.time_left import TimeLeft
from signstep.lab.paper.tuned import read_tuned, write_tuned
from signstep.lab.training.config import RunConfig
from signstep.lab.training.records import Run, read_runs
from signstep.lab.training.series import train_run
from signstep.lab.training.tasks import BITS_PER_BYTE, Metric

MAX_EXTENSIONS = 2


@dataclass(frozen=True)
class Trial:
    """A finished tuning run; `result` in the unit of its data set's metric."""

    lr: float
    result: float
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
    def metric(self) -> Metric:
        """What its trials are judged by."""
        return self.row.config(self.dataset).task.metric

    @property
    def best(self) -> Trial:
        """The trial of the best result, of equal ones that of the smaller lr. A diverged one comes last."""
        sign = self.metric.sign
        return max(self.trials, key=lambda trial: (not trial.diverged, sign * trial.result, -trial.lr))


def search(dataset: str, row: Row, trials: int, records: Mapping[str, Run]) -> Search:
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
                Trial(configs[key].lr, record.result, record.diverged, key) for key, record in finished.items()
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


def _add_choices(folder: Path, experiment: Experiment, searches: Iterable[Search]) -> None:
    """Add the choices of finished searches to tuned.json, and keep those of others that it has."""
    choices = read_tuned(folder)
    for found in searches:
        if found.pending:
            continue
        metric = found.metric
        choices.setdefault(found.dataset, {})[found.row.key] = {
            "lr": found.best.lr,
            metric.key: round(found.best.result, 4),
            "at_edge": found.at_edge,
            "extensions": found.extensions,
            "trials": [
                {"lr": t.lr, metric.key: round(t.result, 4), "diverged": t.diverged, "hash": t.hash}
                for t in found.trials
            ],
        }
    texts = experiment.metric is BITS_PER_BYTE
    criterion = (
        "bits per byte on the tenth before the test part"
        if texts
        else f"{experiment.metric.name}{' (%)' if experiment.metric.unit == '%' else ''} on "
        + ("the held-out tenth of the training set" if experiment.of_paper else experiment.tuned_on)
    )
    about = {
        "scale": experiment.scale,
        "recipe": experiment.recipe,
        "epochs": experiment.tune_epochs,
        "grid": f"ratio sqrt(10), the same number of trials per method, at most {MAX_EXTENSIONS} more beyond an edge",
        "criterion": f"last epoch's {criterion}; ties to the smaller lr",
    }
    write_tuned(folder, {"text": about} if texts else about, choices)


def sweep(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    data: Path | None = None,
    device: str = "auto",
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
        data: folder to look for the images in first, or the file of data set "text"; None: the usual places.
        device: as of `signstep.lab.training.loop.train`.
        trials: grid points for every method.
        max_minutes: start no trial, and stop the one that runs, after so many minutes; None: no limit.
        shard: (i, n): do every n-th search, beginning with the i-th.
        say: takes a line of what is going on.

    Returns:
        Whether every search, of all shards, is over.
    """
    started = time.monotonic()
    pairs = [(dataset, row) for dataset, row in cells(experiments) if not row.lr_of]
    tune = folder / "tune"

    time_left = TimeLeft(device)
    stopped = trained = False
    mine = range(shard[0], len(pairs), shard[1])
    for position in mine:
        dataset, row = pairs[position]
        busy: set[str] = set()
        while not stopped:
            records = read_runs(tune)
            waiting = [c for c in search(dataset, row, trials, records).pending if c.hash not in busy]
            if not waiting:
                break
            left = None if max_minutes is None else max_minutes - (time.monotonic() - started) / 60
            if left is not None and left <= 0:
                stopped = True
                break
            others = [c for p in mine if p > position for c in search(*pairs[p], trials, records).pending]
            how_long = time_left.text([*waiting, *others], records.values())
            say(f"tuning {position + 1} of {len(pairs)}: {dataset}, {row.label}, lr {waiting[0].lr:g} ({how_long})")
            trained = True
            status = train_run(waiting[0], tune, data=data, device=device, max_minutes=left)
            if status in ("done", "diverged"):
                (tune / f"{waiting[0].hash}.pt").unlink(missing_ok=True)  # its result is all that counts
            if status == "busy":
                busy.add(waiting[0].hash)
            stopped = status == "stopped"
        if stopped:
            break
    # Under a lock, so that of two shards that end at the same time the later one sees, and keeps, what both found.
    make_folder(folder)
    with locked(folder / "results.lock"):
        records = read_runs(tune)
        found = [search(dataset, row, trials, records) for dataset, row in pairs]
        _add_choices(folder, experiments[0], found)
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
    elif not trained:
        say(f"nothing to train: all {sum(len(each.trials) for each in found)} trials have ended before")
    return not missing

"""What an experiment's runs show, in numbers and in words: what the page, the Markdown and the JSON are written from.

Every sentence with a number in it is computed from the runs. Accuracies are in percent, differences in points of
percent. A run stopped by a non-finite loss counts with the accuracy of chance and is said to have diverged; an
unfinished run counts nowhere and is listed as missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from signstep.lab.output import stats
from signstep.lab.paper import charts
from signstep.lab.paper.experiments import Experiment, Row, dataset_title
from signstep.lab.paper.sweep import learning_rate
from signstep.lab.training.config import RunConfig
from signstep.lab.training.display import duration
from signstep.lab.training.records import Run

BASELINES = ("sgd", "adam", "signsgd")
"""Keys of the rows that every other one is compared with, seed by seed."""


@dataclass(frozen=True)
class Cell:
    """One method on one data set."""

    dataset: str
    lr: float
    accuracies: Mapping[int, float]
    """Percent by seed, of finished runs."""
    diverged: tuple[int, ...]
    missing: tuple[int, ...]
    """Seeds that the experiment has and this cell has no finished run of."""
    paper: float | None
    runs: tuple[Run, ...]

    @property
    def all_diverged(self) -> bool:
        return bool(self.accuracies) and len(self.diverged) == len(self.accuracies)

    @cached_property
    def estimate(self) -> stats.Estimate | None:
        """None without a finished run, and where all diverged: chance is no measurement."""
        return stats.estimate(list(self.accuracies.values())) if self.accuracies and not self.all_diverged else None

    @property
    def text(self) -> str:
        if self.estimate is None:
            return f"diverged ({self.caveat})" if self.all_diverged else "not run"
        return stats.with_interval(self.estimate)

    @property
    def caveat(self) -> str:
        """'1 of 3' or nothing: how many seeds diverged."""
        return f"{len(self.diverged)} of {len(self.accuracies)}" if self.diverged else ""

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
    estimate: stats.Estimate | None
    paper: float | None
    """The same difference of the paper's numbers."""

    @property
    def verdict(self) -> stats.Verdict | None:
        """What the measured difference says of the paper's; None where either is absent."""
        if self.estimate is None or self.paper is None:
            return None
        return stats.claim_verdict(self.estimate, self.paper)


class Results:
    """An experiment and its runs, brought together: what the page, the Markdown and the JSON are written from."""

    def __init__(
        self,
        experiment: Experiment,
        runs: Mapping[str, Run],
        tuned: Mapping[str, Mapping[str, Any]],
        commands: Sequence[str],
        seeds: int = 0,
    ) -> None:
        self.experiment = experiment
        self.tuned = {d: {r.key: tuned[d][r.key] for r in experiment.rows if r.key in tuned[d]}
                      for d in experiment.datasets if d in tuned}  # fmt: skip
        self.commands = tuple(commands)
        self.titles = {d: dataset_title(d) for d in experiment.datasets}
        candidates = {run.config.seed for run in runs.values()}
        found: dict[tuple[str, str], dict[int, Run]] = {}
        for row in experiment.rows:
            for dataset in experiment.datasets:
                lr = learning_rate(experiment, row.key, dataset, tuned)
                hashes = {seed: row.config(dataset, seed, lr).hash for seed in sorted(candidates)}
                found[row.key, dataset] = {seed: runs[h] for seed, h in hashes.items() if h in runs}
        self.seeds = tuple(sorted({seed for by_seed in found.values() for seed in by_seed} | set(range(seeds))))
        self.unfinished = tuple(run for by_seed in found.values() for run in by_seed.values() if not run.done)
        self.cells = {
            (row.key, dataset): self._cell(row, dataset, tuned, found[row.key, dataset])
            for row in experiment.rows
            for dataset in experiment.datasets
        }
        self.differences = tuple(self._differences())

    def _cell(self, row: Row, dataset: str, tuned: Mapping[str, Mapping[str, Any]], by_seed: dict[int, Run]) -> Cell:
        finished = {seed: run for seed, run in by_seed.items() if run.done}
        return Cell(
            dataset=dataset,
            lr=learning_rate(self.experiment, row.key, dataset, tuned),
            accuracies={seed: run.final_accuracy for seed, run in finished.items()},
            diverged=tuple(seed for seed, run in finished.items() if run.diverged),
            missing=tuple(seed for seed in self.seeds if seed not in finished),
            paper=row.paper.get(dataset),
            runs=tuple(finished.values()),
        )

    def _differences(self) -> Iterator[Difference]:
        for dataset in self.experiment.datasets:
            for base in self.baselines:
                ours_base = self.cells[base.key, dataset]
                for row in self.experiment.rows:
                    cell = self.cells[row.key, dataset]
                    if row.key in BASELINES[: BASELINES.index(base.key) + 1]:
                        continue  # itself, or its mirror image, which has been there
                    measured = None
                    if cell.estimate and ours_base.estimate:
                        measured = stats.paired_difference(cell.accuracies, ours_base.accuracies)
                    paper = None if cell.paper is None or ours_base.paper is None else cell.paper - ours_base.paper
                    yield Difference(dataset, row, base, measured, paper)

    @property
    def baselines(self) -> tuple[Row, ...]:
        """The rows to compare with that the experiment has."""
        return tuple(row for key in BASELINES for row in self.experiment.rows if row.key == key)

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

    def is_best(self, cell: Cell) -> bool:
        """Highest mean of its data set, to the digits shown."""
        means = [c.estimate.mean for c in self.cells.values() if c.dataset == cell.dataset and c.estimate]
        return cell.estimate is not None and stats.number(cell.estimate.mean) == stats.number(max(means))

    def is_paper_best(self, cell: Cell) -> bool:
        """Highest of the paper's numbers of its data set."""
        numbers = [c.paper for c in self.cells.values() if c.dataset == cell.dataset and c.paper is not None]
        return cell.paper is not None and cell.paper == max(numbers)

    @property
    def finished(self) -> tuple[Run, ...]:
        """Every finished run that the report uses."""
        return tuple(run for cell in self.cells.values() for run in cell.runs)

    # ------------------------------------------------------------------------------------------------ in words

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        parts = [f"on {self.titles[d]}, {self._outcome(d)}" for d in self.experiment.datasets]
        sentence = "; ".join(parts)
        return f"{sentence[0].upper()}{sentence[1:]}."

    def _outcome(self, dataset: str) -> str:
        cells = [(row, self.cells[row.key, dataset].estimate) for row in self.experiment.rows]
        means = [(estimate.mean, row) for row, estimate in cells if estimate]
        ranked = [row for _, row in sorted(means, key=lambda pair: -pair[0])]
        if not ranked:
            any_run = any(self.cells[row.key, dataset].runs for row in self.experiment.rows)
            return "every run diverged" if any_run else "no run has finished yet"
        best = ranked[0]
        reached = f"{self.cells[best.key, dataset].text} %"
        if len(ranked) == 1:
            return f"{best.label}, the only method with a result, reaches {reached}"
        if doubts := self._doubts(dataset, ranked):
            low, high = (stats.number(end(mean for mean, _ in means)) for end in (min, max))
            return f"{len(ranked)} methods reach {low} to {high} %, which ranks none of them: {listed(doubts)}"
        rival = next((row for row in ranked[1:] if row.key == "sgd"), ranked[1])
        gap = stats.paired_difference(
            self.cells[best.key, dataset].accuracies, self.cells[rival.key, dataset].accuracies
        )
        assert gap is not None
        if gap.contains(0):
            points = stats.with_interval(gap, sign=True)
            return f"{best.label} is highest, but {gap.n} seeds do not tell it from {rival.label} ({points} points)"
        verb = "beats" if gap.mean > 0 else "is highest, but is beaten seed by seed by"
        name = rival.label if rival.key == "sgd" else f"the next best, {rival.label},"
        return f"{best.label} {verb} {name} by {stats.with_interval(gap)} points"

    def _doubts(self, dataset: str, rows: Sequence[Row]) -> list[str]:
        """Why no row may be called the best."""
        doubts = []
        tuned = [row.tuned_key in self.tuned.get(dataset, {}) for row in rows]
        if not all(tuned):
            doubts.append("not every learning rate was tuned" if any(tuned) else "no learning rate was tuned")
        if len(set.intersection(*(set(self.cells[row.key, dataset].accuracies) for row in rows))) < stats.MIN_SEEDS:
            doubts.append(f"fewer than {stats.MIN_SEEDS} seeds are common to all")
        return doubts

    @property
    def setting(self) -> str:
        """Net, images, epochs and seeds, as of the runs."""
        configs = self._configs
        images = sorted({int(run.start["train_images"]) for run in self.finished})
        parts = [" and ".join(sorted({_net(c.model, c.width) for c in configs}))]
        if images:
            parts.append(f"{' and '.join(f'{n:,}' for n in images)} training images")
        parts.append(f"{' and '.join(str(n) for n in sorted({c.epochs for c in configs}))} epochs")
        parts.append(f"{len(self.seeds)} {_plural(len(self.seeds), 'seed')}")
        return ", ".join(parts)

    @property
    def scope(self) -> str:
        """What was trained, and how far it compares with the paper's."""
        sentences = [f"{self.setting}."]
        if self.experiment.scale in ("smoke", "demo"):
            sentences.append(self.experiment.scale_summary)
        unknown = [self.titles[d] for d in self.experiment.datasets if not self.in_paper(d)]
        smaller = any(c.model != "resnet18" or c.width != 1 or c.subset is not None for c in self._configs)
        if unknown:
            sentences.append(f"The paper has no numbers on {listed(unknown)}.")
        if smaller and self.any_in_paper:
            sentences.append(
                "The paper trained ResNet-18 on all images, so its accuracies are printed for reference; "
                "what can be compared is the order of the methods and the differences between them."
            )
        return " ".join(sentences)

    @cached_property
    def _configs(self) -> tuple[RunConfig, ...]:
        return tuple(row.config(d) for row in self.experiment.rows for d in self.experiment.datasets)

    def in_paper(self, dataset: str) -> bool:
        """Whether the paper has any number on a data set."""
        return any(row.paper.get(dataset) is not None for row in self.experiment.rows)

    @property
    def any_in_paper(self) -> bool:
        """Whether the paper has any number on any of the data sets."""
        return any(self.in_paper(d) for d in self.experiment.datasets)

    @property
    def tally(self) -> str:
        """How many of the paper's differences are borne out."""
        verdicts = Counter(d.verdict for d in self.differences if d.verdict)
        total = sum(verdicts.values())
        if not total:
            return ""
        names = listed([row.label for row in self.baselines])
        same, opposite, open_ = (verdicts[verdict] for verdict in ("same sign", "opposite sign", "undecided"))
        return (
            f"Of the paper's {total} {_plural(total, 'difference')} to {names} that were measured here, "
            f"{same} {_have(same)} its sign, {opposite} the opposite one, and {open_} {_are(open_)} undecided: "
            "the 95 % interval includes zero, or there is one seed."
        )

    @property
    def gap_summary(self) -> str:
        """How much is missing or went wrong, in one sentence; empty if nothing is."""
        diverged = sum(len(cell.diverged) for cell in self.cells.values())
        missing = sum(len(cell.missing) for cell in self.cells.values())
        edges = len(self._edges)
        parts = []
        if diverged:
            parts.append(f"{diverged} {_plural(diverged, 'run')} diverged")
        if missing:
            parts.append(f"{missing} {_plural(missing, 'run')} {_are(missing)} missing")
        if edges:
            parts.append(f"{edges} {_plural(edges, 'learning rate')} {_are(edges)} at the edge of the sweep's grid")
        return listed(parts)

    @property
    def _edges(self) -> list[tuple[Row, str, float]]:
        return [
            (row, dataset, float(rows[row.key]["lr"]))
            for dataset, rows in self.tuned.items()
            for row in self.experiment.rows
            if rows.get(row.key, {}).get("at_edge")
        ]

    @property
    def gaps(self) -> tuple[str, ...]:
        """What is missing or went wrong, one sentence each."""
        sentences = []
        for row in self.experiment.rows:
            for dataset in self.experiment.datasets:
                cell = self.cells[row.key, dataset]
                name = f"{row.label} on {self.titles[dataset]}"
                if cell.diverged:
                    seeds = listed([str(seed) for seed in cell.diverged])
                    sentences.append(
                        f"{name}: {cell.caveat} diverged (seed {seeds}), counted with the accuracy of chance."
                    )
                if cell.missing and not cell.accuracies:
                    sentences.append(f"{name}: no finished run.")
                elif cell.missing:
                    sentences.append(f"{name}: seed {listed([str(s) for s in cell.missing])} missing.")
        for run in self.unfinished:
            sentences.append(
                f"Unfinished, not counted: {run.config.hash}, at epoch {len(run.epochs)} of {run.config.epochs}."
            )
        for row, dataset, lr in self._edges:
            sentences.append(
                f"{row.label} on {self.titles[dataset]}: the best learning rate of the sweep, {lr:g}, is at the edge "
                "of its grid; the method may want one beyond it."
            )
        return tuple(sentences)

    @property
    def untuned(self) -> str:
        """Which learning rates the sweep did not choose for their own row."""
        names = {
            d: [row.label for row in self.experiment.rows if row.tuned_key not in self.tuned.get(d, {})]
            for d in self.experiment.datasets
        }
        if all(len(missing) == len(self.experiment.rows) for missing in names.values()):
            return "The learning rates were not tuned: every method has its preset's."
        sentences = [
            f"Not tuned on {self.titles[d]}, with the preset's learning rate: {listed(missing)}."
            for d, missing in names.items()
            if missing
        ]
        for key in dict.fromkeys(row.lr_of for row in self.experiment.rows if row.lr_of):
            takers = listed([row.label for row in self.experiment.rows if row.lr_of == key])
            sentences.append(f"Not tuned, with the learning rate of {self.experiment.row(key).label}: {takers}.")
        return " ".join(sentences)

    # ------------------------------------------------------------------------------------------------ recipe, machine

    @property
    def guesses(self) -> tuple[str, ...]:
        """What the paper does not say and is assumed here, the choice of the learning rates among it."""
        tuning = (
            f"Learning rates are chosen on a held-out tenth of the training set, by runs of "
            f"{self.experiment.tune_epochs} {_plural(self.experiment.tune_epochs, 'epoch')}, "
            "with the same number of trials for every method."
        )
        tuned = any(self.tuned.values())
        return tuple(filter(None, (*self.experiment.guesses, tuning if tuned else "", self.untuned)))

    @cached_property
    def shared_settings(self) -> dict[str, str]:
        """Fields of `RunConfig` that all runs have in common."""
        configs = [_settings(config) for config in self._configs]
        return {
            name: plain(value)
            for name, value in configs[0].items()
            if name != "lr" and all(name in c and c[name] == value for c in configs)
        }

    def own_settings(self, row: Row) -> dict[str, str]:
        """The fields in which a row's runs differ from other rows', by data set where they differ there."""
        configs = {d: _settings(row.config(d, 0, self.cells[row.key, d].lr)) for d in self.experiment.datasets}
        settings = {}
        for name in dict.fromkeys(name for config in configs.values() for name in config):
            if name not in self.shared_settings:
                values = {self.titles[d]: plain(c[name]) for d, c in configs.items() if name in c}
                if len(values) == len(configs) and len(set(values.values())) == 1:
                    settings[name] = next(iter(values.values()))
                else:
                    settings[name] = ", ".join(f"{value} ({title})" for title, value in values.items())
        return settings

    @property
    def environment(self) -> dict[str, str]:
        """What the runs ran on; a value that not all of them have is followed by the number that do."""
        runs = {run.config.hash: run for run in (*self.finished, *self.unfinished)}.values()
        values: dict[str, Counter[str]] = {}
        for run in runs:
            for name, value in run.start.get("environment", {}).items():
                if value is not None:
                    values.setdefault(name, Counter())[str(value)] += 1
        table = {
            name: next(iter(counts))
            if set(counts.values()) == {len(runs)}
            else ", ".join(f"{v} ({n} {_plural(n, 'run')})" for v, n in counts.items())
            for name, counts in values.items()
        }
        seconds = math.fsum(epoch.get("timing", {}).get("seconds", 0.0) for run in runs for epoch in run.epochs)
        table["runs"] = str(len(runs))
        table["training time in total"] = duration(seconds)
        return table

    # ------------------------------------------------------------------------------------------------ figures

    def curves(self, dataset: str) -> tuple[charts.Curve, ...]:
        """Mean accuracy over epochs of each row that has been evaluated; its last point is the table's number."""
        lines = []
        for row in self.experiment.rows:
            cell = self.cells[row.key, dataset]
            series = [_series(run, to_the_end=not cell.all_diverged) for run in cell.runs]
            epochs = sorted({epoch for values in series for epoch in values})
            ended = tuple(int(run.end["epoch"]) for run in cell.runs if run.diverged and run.end)
            for run, values in zip(cell.runs, series, strict=True):
                if run.diverged and run.end and not cell.all_diverged:
                    # It goes on at chance wherever another was evaluated after its end.
                    rest = [epoch for epoch in epochs if epoch not in values and epoch >= int(run.end["epoch"])]
                    values |= dict.fromkeys(rest, run.final_accuracy)
            points = [stats.estimate([values[epoch] for values in series if epoch in values]) for epoch in epochs]
            if epochs:
                lines.append(
                    charts.Curve(
                        method=row.key,
                        label=row.label,
                        epochs=tuple(epochs),
                        estimates=tuple(points),
                        runs=tuple(dict(sorted(values.items())) for values in series),
                        own=not row.in_paper,
                        diverged_at=ended,
                        diverged=cell.all_diverged,
                    )
                )
        return tuple(lines)

    def key(self, dataset: str) -> list[tuple[charts.Curve, str]]:
        """The curves by falling final accuracy, each with that accuracy as printed."""
        lines = sorted(self.curves(dataset), key=lambda line: (line.diverged, -line.estimates[-1].mean))
        return [(line, "diverged" if line.diverged else stats.with_interval(line.estimates[-1])) for line in lines]

    def curve_values(self, dataset: str) -> list[dict[str, Any]]:
        """What the page's script shows under the pointer."""
        return [
            {"method": c.method, "epochs": c.epochs, "text": [stats.with_interval(e) for e in c.estimates]}
            for c in self.curves(dataset)
        ]

    def rates(self, dataset: str) -> list[float]:
        """Every learning rate tried on a data set."""
        return sorted({float(t["lr"]) for choice in self.tuned[dataset].values() for t in choice["trials"]})

    @staticmethod
    def trial(choice: Mapping[str, Any], lr: float) -> Mapping[str, Any] | None:
        """The trial of a learning rate, if it was tried."""
        return next((t for t in choice["trials"] if t["lr"] == lr), None)

    def dots(self, dataset: str) -> tuple[charts.Dot, ...]:
        """The table's column of a data set."""
        return tuple(
            charts.Dot(
                row.key,
                row.label,
                cell.estimate,
                tuple(cell.accuracies.values()) if cell.estimate else (),
                cell.paper,
                cell.text,
            )
            for _, rows in self.groups
            for row in rows
            if (cell := self.cells[row.key, dataset])
        )

    def difference_dots(self, dataset: str, baseline: Row) -> tuple[charts.Dot, ...]:
        """The differences to a baseline on a data set."""
        base = self.cells[baseline.key, dataset].accuracies
        lines = []
        for _, rows in self.groups:
            for row in rows:
                each = self.difference(dataset, row, baseline)
                if each is not None:
                    own = self.cells[row.key, dataset].accuracies
                    values = tuple(own[s] - base[s] for s in own if s in base) if each.estimate else ()
                    text = stats.with_interval(each.estimate, sign=True) if each.estimate else "—"
                    lines.append(charts.Dot(row.key, row.label, each.estimate, values, each.paper, text))
        return tuple(lines)

    def switches(self, dataset: str) -> tuple[float, ...]:
        """Epochs at which the hybrid rows go on as SGD."""
        configs = [row.config(dataset) for row in self.experiment.rows]
        return tuple(sorted({c.switch * c.epochs for c in configs if c.switch is not None}))

    def epochs(self, dataset: str) -> int:
        """Length of the longest run."""
        return max(row.config(dataset).epochs for row in self.experiment.rows)

    # ------------------------------------------------------------------------------------------------ as data

    def to_dict(self) -> dict[str, Any]:
        """The report's numbers, for a machine."""
        e = self.experiment
        return {
            "experiment": e.name,
            "title": e.title,
            "caption": e.caption,
            "scale": e.scale,
            "recipe": e.recipe,
            "headline": self.headline,
            "scope": self.scope,
            "seeds": list(self.seeds),
            "confidence": stats.CONFIDENCE,
            "rows": [
                {
                    "key": row.key,
                    "label": row.label,
                    "in_paper": row.in_paper,
                    "note": row.note,
                    "cells": {d: _cell_dict(self.cells[row.key, d]) for d in e.datasets},
                }
                for row in e.rows
            ],
            "differences": [
                {
                    "dataset": d.dataset,
                    "row": d.row.key,
                    "baseline": d.baseline.key,
                    **_estimate_dict(d.estimate),
                    "paper": None if d.paper is None else round(d.paper, 6),
                    "verdict": d.verdict,
                }
                for d in self.differences
            ],
            "gaps": list(self.gaps),
            "tuned": self.tuned,
            "guesses": list(self.guesses),
            "settings": {"shared": self.shared_settings, **{row.key: self.own_settings(row) for row in e.rows}},
            "environment": self.environment,
            "commands": list(self.commands),
        }


def _settings(config: RunConfig) -> dict[str, Any]:
    """The fields that say how a run trained, less those that it does not use."""
    unused = {"seed", "dataset"} | (set() if config.schedule == "step" else {"milestones", "gamma"})
    return {name: value for name, value in config.to_dict().items() if value is not None and name not in unused}


def _net(model: str, width: float) -> str:
    name = model.replace("resnet", "ResNet-")
    return name if width == 1 else f"{name} at width {width:g}"


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _series(run: Run, *, to_the_end: bool) -> dict[int, float]:
    """Accuracy in percent by epoch; with `to_the_end` a diverged run's last epoch has that of chance."""
    values = {
        int(e["epoch"]): 100.0 * float(e["eval_accuracy"]) for e in run.epochs if e.get("eval_accuracy") is not None
    }
    if run.diverged and to_the_end:
        values[run.config.epochs] = run.final_accuracy
    return values


def _estimate_dict(e: stats.Estimate | None) -> dict[str, Any]:
    if e is None:
        return {"n": 0, "mean": None, "low": None, "high": None}
    return {"n": e.n, "mean": e.mean, "low": e.low, "high": e.high}


def _cell_dict(cell: Cell) -> dict[str, Any]:
    return {
        **_estimate_dict(cell.estimate),
        "accuracy_by_seed": {str(seed): value for seed, value in cell.accuracies.items()},
        "diverged_seeds": list(cell.diverged),
        "missing_seeds": list(cell.missing),
        "paper": cell.paper,
        "difference_to_paper": cell.shift,
        "verdict": cell.verdict,
        "lr": cell.lr,
        "runs": [run.config.hash for run in cell.runs],
    }

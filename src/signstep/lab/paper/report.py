"""The report on an experiment: one self-contained HTML page, the same as Markdown and JSON, and its figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from signstep.lab.output import figures, pages, stats
from signstep.lab.output.files import make_folder, write_bytes, write_json, write_text
from signstep.lab.paper import charts
from signstep.lab.paper.experiments import Experiment
from signstep.lab.paper.results import Cell, Results
from signstep.lab.paper.sentences import Sentences, listed
from signstep.lab.paper.settings import environment, own_settings, plain, shared_settings
from signstep.lab.paper.tuned import Choices
from signstep.lab.training.records import Run
from signstep.lab.training.tasks import is_own


@dataclass(frozen=True)
class _Drawing:
    dataset: str
    kind: str
    title: str
    description: str
    draw: Callable[..., Figure]
    """Draws it to stand alone under `heading`, a title and subtitle, or without a heading as part of the page."""


def _drawings(results: Results) -> Iterator[_Drawing]:
    metric = results.metric
    unit_word = "Percent" if metric.unit == "%" else metric.unit[0].upper() + metric.unit[1:]
    for dataset in results.experiment.datasets:
        lines = charts.curves(results, dataset)
        if lines:
            switches = results.switches(dataset)
            title = f"{results.titles[dataset]}: test {metric.name} over epochs"
            words = [f"{line.label} {text}" for line, text in charts.by_result(results, dataset)]
            switch = f" Switch to SGD after epoch {listed([f'{s:g}' for s in switches])}." if switches else ""
            yield _Drawing(
                dataset,
                "curves",
                title,
                f"{title}. {unit_word} at the end: {'; '.join(words)}.{switch}",
                partial(charts.draw_curves, lines, switches=switches, epochs=results.epochs(dataset), metric=metric),
            )
        tables = [("dots", f"final test {metric.name}", metric.unit, charts.dots(results, dataset), "")]
        for base in results.baselines[:1]:
            difference = f"difference to {base.short_label}"
            tables.append(
                (
                    "differences",
                    difference,
                    metric.points,
                    charts.difference_dots(results, dataset, base),
                    base.short_label,
                )
            )
        for kind, what, unit, dots, zero in tables:
            if any(dot.estimate for dot in dots):
                title = f"{results.titles[dataset]}: {what}"
                words = [
                    f"{d.label} {d.text}{'' if d.paper is None else f' (paper {stats.paper_number(d.paper)})'}"
                    for d in dots
                ]
                axis = unit if zero else charts.axis_title(metric, "final test")
                draw = partial(charts.draw_dots, dots, axis=axis, zero=zero, metric=metric)
                named = title if what.endswith(unit) else f"{title}, {unit}"
                yield _Drawing(dataset, kind, title, f"{named}: {'; '.join(words)}.", draw)


def write(
    experiment: Experiment,
    runs: Mapping[str, Run],
    out: Path,
    *,
    tuned: Choices | None,
    commands: Sequence[str],
    seeds: Collection[int] | None = None,
) -> Path:
    """Write the report on `experiment` into `out`: `<name>.html`, `<name>.md`, `<name>.json`, and the figures.

    Args:
        experiment: the rows and data sets; its runs at the tuned (else preset) learning rates are looked up in `runs`.
        runs: by configuration hash, as `training.records.read_runs` gives them; others than the experiment's are
            ignored.
        out: a folder, made where there is none. Figures are `<name>-<data set>-<curves|dots|differences>.<svg|png>`.
        tuned: what the sweep chose, as `signstep.lab.paper.tuned.read_tuned` gives it; None: nothing was tuned.
        commands: the commands that reproduce the report, printed as they are.
        seeds: which are counted; a run that is not there is reported as missing. None: those that the runs have.

    Returns:
        The path of the HTML page, which needs no other file and no network.

    Raises:
        CannotWrite: `out` cannot be written. Each file is there whole or as it was.
    """
    results = Results(experiment, runs, tuned or {}, seeds)
    words = Sentences(results)
    make_folder(out)
    name = experiment.name
    drawn: dict[tuple[str, str], dict[str, Any]] = {}
    hollow = "mean, 95 % interval, seeds; hollow: the paper"
    spread = "95 % interval" if len(results.seeds) >= stats.MIN_SEEDS else "each seed"
    marks = {"curves": f"mean and {spread}", "dots": hollow, "differences": hollow}
    for drawing in _drawings(results):
        dataset = drawing.dataset
        if is_own(dataset):
            dataset = re.sub(r"[^\w.-]+", "-", results.titles[dataset])
        stem = f"{name}-{dataset}-{drawing.kind}"
        alone = drawing.draw(heading=(drawing.title, f"{words.setting}; {marks[drawing.kind]}"))
        write_bytes(out / f"{stem}.png", figures.png(alone))
        write_text(out / f"{stem}.svg", figures.svg(alone, name=stem, description=drawing.description, alone=True))
        inline = figures.svg(drawing.draw(), name=stem, description=drawing.description, alone=False)
        drawn[drawing.dataset, drawing.kind] = {
            "svg": Markup(inline),
            "file": stem,
            "title": drawing.title,
            "description": drawing.description,
        }
    context = {
        "results": results,
        "metric": results.metric,
        "axis": charts.axis_title(results.metric),
        "experiment": experiment,
        "words": words,
        "shared_settings": shared_settings(results),
        "own_settings": partial(own_settings, results),
        "environment": environment(results),
        "curve_key": partial(charts.by_result, results),
        "curve_values": partial(charts.curve_values, results),
        "drawn": drawn,
        "commands": commands,
    }
    filters = {"plain": plain, "colour": charts.colour}
    write_json(out / f"{name}.json", to_dict(results, commands))
    write_text(out / f"{name}.md", pages.render("report.md", context, filters))
    page = out / f"{name}.html"
    write_text(page, pages.render("report.html", context, filters))
    return page


def to_dict(results: Results, commands: Sequence[str]) -> dict[str, Any]:
    """The report's numbers, for a machine."""
    e, words = results.experiment, Sentences(results)
    return {
        "experiment": e.name,
        "title": e.title,
        "caption": e.caption,
        "scale": e.scale,
        "recipe": e.recipe,
        "headline": words.headline,
        "scope": words.scope,
        "seeds": list(results.seeds),
        "confidence": stats.CONFIDENCE,
        "rows": [
            {
                "key": row.key,
                "label": row.label,
                "short": row.short_label,
                "in_paper": row.in_paper,
                "note": row.note,
                "cells": {d: _cell_dict(results.cells[row.key, d]) for d in e.datasets},
            }
            for row in e.rows
        ],
        "differences": [
            {
                "dataset": d.dataset,
                "row": d.row.key,
                "baseline": d.baseline.key,
                **_estimate_dict(d.estimate),
                "p": None if d.estimate is None else d.estimate.p_value(),
                "p_holm": d.corrected,
                "paper": None if d.paper is None else round(d.paper, 6),
                "verdict": d.verdict,
            }
            for d in results.differences
        ],
        "gaps": list(words.gaps),
        "tuned": results.tuned,
        "guesses": list(words.guesses),
        "settings": {"shared": shared_settings(results), **{row.key: own_settings(results, row) for row in e.rows}},
        "environment": environment(results),
        "commands": list(commands),
    }


def _estimate_dict(e: stats.MeanEstimate | None) -> dict[str, Any]:
    if e is None:
        return {"n": 0, "mean": None, "low": None, "high": None}
    return {"n": e.n, "mean": e.mean, "low": e.low, "high": e.high}


def _cell_dict(cell: Cell) -> dict[str, Any]:
    return {
        **_estimate_dict(cell.estimate),
        f"{cell.metric.key}_by_seed": {str(seed): value for seed, value in cell.results.items()},
        "diverged_seeds": list(cell.diverged),
        "missing_seeds": list(cell.missing),
        "paper": cell.paper,
        "difference_to_paper": cell.shift,
        "verdict": cell.verdict,
        "lr": cell.lr,
        "trials": cell.trials,
        "runs": [run.config.hash for run in cell.runs],
    }

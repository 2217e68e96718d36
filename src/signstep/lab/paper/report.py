"""The report on an experiment: one self-contained HTML page, the same as Markdown and JSON, and its figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from signstep.lab.output import figures, pages, stats
from signstep.lab.output.files import write_bytes, write_text
from signstep.lab.paper import charts
from signstep.lab.paper.experiments import Experiment
from signstep.lab.paper.results import Results, listed, plain
from signstep.lab.training.records import Run


@dataclass(frozen=True)
class _Drawing:
    dataset: str
    kind: str
    title: str
    description: str
    draw: Callable[[tuple[str, str] | None], Figure]
    """Draws it to stand alone under a title and subtitle, or, without them, as part of the page."""


def _drawings(results: Results) -> Iterator[_Drawing]:
    for dataset in results.experiment.datasets:
        lines = results.curves(dataset)
        if lines:
            switches = results.switches(dataset)
            title = f"{results.titles[dataset]}: test accuracy over epochs"
            words = [f"{line.label} {text}" for line, text in results.key(dataset)]
            switch = f" Switch to SGD after epoch {listed([f'{s:g}' for s in switches])}." if switches else ""
            yield _Drawing(
                dataset,
                "curves",
                title,
                f"{title}. Percent at the end: {'; '.join(words)}.{switch}",
                partial(_curves, lines, switches, results.epochs(dataset)),
            )
        tables = [("dots", "final test accuracy", "%", results.dots(dataset), "")]
        for base in results.baselines[:1]:
            difference = f"difference to {base.label}"
            tables.append(("differences", difference, "points", results.difference_dots(dataset, base), base.label))
        for kind, what, unit, dots, zero in tables:
            if any(dot.estimate for dot in dots):
                title = f"{results.titles[dataset]}: {what}"
                words = [
                    f"{d.label} {d.text}{'' if d.paper is None else f' (paper {stats.paper_number(d.paper)})'}"
                    for d in dots
                ]
                axis = unit if zero else f"{what}, {unit}"
                yield _Drawing(
                    dataset, kind, title, f"{title}, {unit}: {'; '.join(words)}.", partial(_dots, dots, axis, zero)
                )


def _curves(
    lines: Sequence[charts.Curve], switches: Sequence[float], epochs: int, heading: tuple[str, str] | None
) -> Figure:
    return charts.curves(lines, switches=switches, epochs=epochs, heading=heading)


def _dots(dots: Sequence[charts.Dot], axis: str, zero: str, heading: tuple[str, str] | None) -> Figure:
    return charts.dots(dots, axis=axis, zero=zero, heading=heading)


def write(
    experiment: Experiment,
    runs: Mapping[str, Run],
    out: Path,
    *,
    tuned: Mapping[str, Mapping[str, Any]] | None,
    commands: Sequence[str],
    seeds: int = 0,
) -> Path:
    """Write the report on `experiment` into `out`: `<name>.html`, `<name>.md`, `<name>.json`, and the figures.

    Args:
        experiment: the rows and data sets; its runs at the tuned (else preset) learning rates are looked up in `runs`.
        runs: by configuration hash, as `training.records.read_runs` gives them; others than the experiment's are
            ignored.
        out: a folder, made where there is none. Figures are `<name>-<data set>-<curves|dots|differences>.<svg|png>`.
        tuned: what the sweep chose, as `signstep.lab.paper.sweep.read_tuned` gives it; None: nothing was tuned.
        commands: the commands that reproduce the report, printed as they are.
        seeds: runs of seeds 0 to this less one were asked for: one that is not there is reported as missing.

    Returns:
        The path of the HTML page, which needs no other file and no network.

    Raises:
        OSError: `out` cannot be written. Each file is there whole or as it was.
    """
    results = Results(experiment, runs, tuned or {}, commands, seeds)
    out.mkdir(parents=True, exist_ok=True)
    name = experiment.name
    drawn: dict[tuple[str, str], dict[str, Any]] = {}
    hollow = "mean, 95 % interval, seeds; hollow: the paper"
    spread = "95 % interval" if len(results.seeds) >= stats.MIN_SEEDS else "each seed"
    marks = {"curves": f"mean and {spread}", "dots": hollow, "differences": hollow}
    for drawing in _drawings(results):
        stem = f"{name}-{drawing.dataset}-{drawing.kind}"
        alone = drawing.draw((drawing.title, f"{results.setting}; {marks[drawing.kind]}"))
        write_bytes(out / f"{stem}.png", figures.png(alone))
        write_text(out / f"{stem}.svg", figures.svg(alone, name=stem, description=drawing.description, alone=True))
        inline = figures.svg(drawing.draw(None), name=stem, description=drawing.description, alone=False)
        drawn[drawing.dataset, drawing.kind] = {
            "svg": Markup(inline),
            "file": stem,
            "title": drawing.title,
            "description": drawing.description,
        }
    context = {"results": results, "experiment": experiment, "drawn": drawn}
    filters = {"plain": plain, "colour": charts.colour}
    write_text(out / f"{name}.json", json.dumps(results.to_dict(), indent=1, ensure_ascii=False) + "\n")
    write_text(out / f"{name}.md", pages.render("report.md", context, filters))
    page = out / f"{name}.html"
    write_text(page, pages.render("report.html", context, filters))
    return page

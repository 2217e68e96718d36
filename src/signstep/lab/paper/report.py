"""The report on an experiment: one self-contained HTML page, the same as Markdown and JSON, and its figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from signstep.lab.output import figures, stats
from signstep.lab.paper.experiments import Experiment
from signstep.lab.paper.results import Results, listed, plain
from signstep.lab.training.checkpoint import write_atomically
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
    lines: Sequence[figures.Curve], switches: Sequence[float], epochs: int, heading: tuple[str, str] | None
) -> Figure:
    return figures.curves(lines, switches=switches, epochs=epochs, heading=heading)


def _dots(dots: Sequence[figures.Dot], axis: str, zero: str, heading: tuple[str, str] | None) -> Figure:
    return figures.dots(dots, axis=axis, zero=zero, heading=heading)


def _environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("signstep.lab.output"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["number"] = stats.number
    env.filters["signed"] = stats.signed
    env.filters["interval"] = stats.with_interval
    env.filters["paper"] = stats.paper_number
    env.filters["shortsigned"] = lambda v: stats.signed(v, 0 if abs(v - round(v)) < 1e-9 else 2)
    env.filters["unbroken"] = _unbroken
    env.filters["plain"] = plain
    env.filters["colour"] = figures.colour
    env.filters["md"] = lambda text: str(text).translate({ord(c): f"\\{c}" for c in "\\|*_`[]<>"})
    return env


def _unbroken(text: str) -> Markup:
    """Text whose hyphenated words, intervals and bracketed remarks stay on one line."""
    glued = re.sub(r" ± | %", lambda m: m[0].replace(" ", "\xa0"), text)
    glued = re.sub(r"\([^()]{1,12}\)", lambda m: m[0].replace(" ", "\xa0"), glued)
    words = (
        Markup('<span class="whole">{}</span>').format(w) if "-" in w else Markup.escape(w) for w in glued.split(" ")
    )
    return Markup(" ").join(words)


def _save(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


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
        _save(out / f"{stem}.png", figures.png(alone))
        _save(out / f"{stem}.svg", figures.svg(alone, name=stem, description=drawing.description, alone=True).encode())
        inline = figures.svg(drawing.draw(None), name=stem, description=drawing.description, alone=False)
        drawn[drawing.dataset, drawing.kind] = {
            "svg": Markup(inline),
            "file": stem,
            "title": drawing.title,
            "description": drawing.description,
        }
    env = _environment()
    context = {
        "results": results,
        "experiment": experiment,
        "drawn": drawn,
        "palette": Markup(figures.palette_css(":root")),
    }
    _save(out / f"{name}.json", (json.dumps(results.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())
    _save(out / f"{name}.md", env.get_template("report.md").render(context).encode())
    page = out / f"{name}.html"
    _save(page, env.get_template("report.html").render(context).encode())
    return page

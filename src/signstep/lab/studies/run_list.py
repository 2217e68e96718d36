"""The runs of a folder, as `signstep runs` lists them: in words, and as the page runs.html with a curve for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from signstep.lab.errors import BadInput
from signstep.lab.output import pages
from signstep.lab.output.files import write_text
from signstep.lab.training.checkpoint import is_locked
from signstep.lab.training.config import RunConfig
from signstep.lab.training.optimizers import known_optimizer
from signstep.lab.training.records import Run, read_run
from signstep.lab.training.tasks import Metric
from signstep.optim.options import HYBRID_OPTIONS, SIGNSGD_OPTIONS

PAGE_FILE = "runs.html"
"""Name of the page that `write_page` writes into a folder of runs."""
_WIDTH, _HEIGHT, _MARGIN = 120.0, 30.0, 2.0


@dataclass(frozen=True)
class ListedRun:
    """What a list says of a run."""

    config: RunConfig
    metric: Metric
    method: str
    """The optimizer with the options that are not its defaults, and how workers' gradients are reduced."""
    state: str
    """"finished", "diverged at step 10", or in which epoch it is running or was interrupted."""
    result: float | None
    """The metric's value at the last evaluation; None where there is none, and of a run that diverged."""
    curve: tuple[tuple[float, float], ...]
    """Epoch and value of every evaluation whose value is finite."""

    @property
    def text(self) -> str:
        """The result as printed, an accuracy in percent or what else it is in its unit; empty where there is none."""
        if self.result is None:
            return ""
        return f"{self.result:.2f}" if self.metric.unit == "%" else self.metric.text(self.result)


@dataclass(frozen=True)
class RunList:
    """The runs of a folder, by data set, method, learning rate and seed."""

    folder: Path
    runs: tuple[ListedRun, ...]
    unreadable: tuple[str, ...]
    """For each file that holds no run's record, a sentence that says why."""


def read_list(folder: Path) -> RunList:
    """The runs whose records are in `folder`, not below it."""
    found, unreadable = [], []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            run = _listed(read_run(path), is_locked(path.with_suffix(".lock")))
            config = run.config
            found.append(((config.dataset, run.method, config.lr, int(config.seed), config.hash), run))
        except BadInput as error:
            unreadable.append(str(error))
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            unreadable.append(f"{path}: not a run's record ({error!r}); delete the file to train the run again")
    found.sort(key=lambda each: each[0])
    printable = (text.encode(errors="backslashreplace").decode() for text in unreadable)
    return RunList(folder, tuple(run for _, run in found), tuple(printable))


def _listed(run: Run, running: bool) -> ListedRun:
    points = [(float(epoch["epoch"]), value) for epoch in run.epochs if (value := run.result_of(epoch)) is not None]
    method, state = _method(run.config), _state(run, running)
    for text in (run.config.dataset, method, state, run.metric.name):
        text.encode()  # half of a surrogate pair, which JSON may hold, is no text
    return ListedRun(
        config=run.config,
        metric=run.metric,
        method=method,
        state=state,
        result=run.result if points and not run.diverged else None,
        curve=tuple((epoch, value) for epoch, value in points if math.isfinite(epoch) and math.isfinite(value)),
    )


def _method(config: RunConfig) -> str:
    known = known_optimizer(config.optimizer)
    options = {**SIGNSGD_OPTIONS, **HYBRID_OPTIONS}
    usual = {**{name: option.default for name, option in options.items()}, **known.defaults}
    words = [config.optimizer]
    for name in known.options:
        value = getattr(config, name)
        if value is not None and value != usual.get(name):
            words.append(f"{name} {value}")
    return " ".join(words if config.reduce == "mean" else [*words, config.reduce])


def _state(run: Run, running: bool) -> str:
    if run.end is not None:
        return "finished" if run.end["status"] == "done" else f"diverged at step {run.end['step']}"
    epoch = min(len(run.epochs) + 1, run.config.epochs)
    return f"{'running' if running else 'interrupted'} in epoch {epoch}"


@dataclass(frozen=True)
class _Drawn:
    run: ListedRun
    points: str
    """The curve as the points of an SVG polyline; empty where nothing was evaluated."""
    end: tuple[float, float] | None
    words: str


def write_page(found: RunList) -> Path:
    """Write the list into its folder as runs.html, one file that needs no other and no network.

    A curve is the metric over the epochs that its run is to have; curves of one data set and metric share their scale,
    from the worst of their values to the best.

    Returns:
        The path of the page.

    Raises:
        CannotWrite: it cannot be written; an earlier page is as it was.
    """
    scales: dict[tuple[str, str], list[float]] = {}
    for run in found.runs:
        scales.setdefault(_kind(run), []).extend(value for _, value in run.curve)
    context = {
        "name": found.folder.resolve().name,
        "drawn": [_draw(run, scales[_kind(run)]) for run in found.runs],
        "unreadable": found.unreadable,
        "width": _WIDTH,
        "height": _HEIGHT,
        "states": _states(found.runs),
    }
    page = found.folder / PAGE_FILE
    # The folder's name may be no UTF-8.
    write_text(page, pages.render("runs.html", context).encode(errors="replace").decode())
    return page


def _kind(run: ListedRun) -> tuple[str, str]:
    return run.config.dataset, run.metric.name


def _draw(run: ListedRun, values: Sequence[float]) -> _Drawn:
    if not run.curve:
        return _Drawn(run, "", None, "not evaluated yet")
    low, high = min(values), max(values)
    last = max(float(run.config.epochs), *(epoch for epoch, _ in run.curve), 1.0)
    points = []
    for epoch, value in run.curve:
        part = (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * max(epoch, 0.0) / last
        points.append((round(x, 1), round(_HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * part, 1)))
    first, end = (run.metric.text(run.curve[i][1]) for i in (0, -1))
    words = f"{run.metric.name}: {first} in epoch {run.curve[0][0]:g}, {end} in epoch {run.curve[-1][0]:g}"
    return _Drawn(run, " ".join(f"{x:g},{y:g}" for x, y in points), points[-1], words)


def _states(runs: Sequence[ListedRun]) -> str:
    counts: dict[str, int] = {}
    for run in runs:
        word = run.state.partition(" ")[0]
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{counts[word]} {word}" for word in sorted(counts))

"""`signstep runs`: the runs of a folder, a line for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from signstep.lab.errors import BadInput

if TYPE_CHECKING:
    from signstep.lab.training.config import RunConfig
    from signstep.lab.training.records import Run

_HEAD = ("dataset", "method", "lr", "seed", "epochs", "accuracy", "state", "run")
_LEFT = (0, 1, 6, 7)


@dataclass(frozen=True)
class Runs:
    """List the runs of a folder: what they are, how good, and how far.

    Accuracy is that of the last evaluation, in percent; of a text bits per byte stand in its place. A run that was
    interrupted goes on with the command that started it.
    """

    folder: Annotated[Path, tyro.conf.Positional] = Path("runs")
    """Where `signstep train` wrote them, or the folders runs and tune of an experiment."""

    def run(self) -> int:
        from rich.console import Console

        from signstep.lab.bench.report import print_table
        from signstep.lab.training.checkpoint import is_locked
        from signstep.lab.training.records import read_run

        if not self.folder.is_dir():
            raise BadInput(f"{self.folder}: there is no such folder; name the one that signstep train wrote to")
        found, unreadable = [], []
        for path in self.folder.glob("*.jsonl"):
            try:
                run = read_run(path)
            except BadInput as error:
                unreadable.append(str(error))
            else:
                found.append((run, is_locked(path.with_suffix(".lock"))))
        found.sort(key=lambda each: _order(each[0].config))
        if found:
            rows = [_row(run, running) for run, running in found]
            count = f"{len(found)} run{'s' if len(found) > 1 else ''}"
            print_table(Console(), f"{count} in {self.folder}", _HEAD, rows, width=0, left=_LEFT)
        else:
            inside = sorted({str(path.parent) for path in self.folder.glob("*/*.jsonl")})
            print(f"no runs in {self.folder}" + (f"; there are records in {', '.join(inside)}" if inside else ""))
        for text in unreadable:
            print(text)
        return 0


def _order(config: RunConfig) -> tuple[str, str, float, int, str]:
    return config.dataset, _method(config), config.lr, config.seed, config.hash


def _row(run: Run, running: bool) -> tuple[str, ...]:
    config = run.config
    evaluated = any(run.result_of(epoch) is not None for epoch in run.epochs) and not run.diverged
    return (
        config.dataset,
        _method(config),
        f"{config.lr:g}",
        str(config.seed),
        str(config.epochs),
        _result(run) if evaluated else "",
        _state(run, running),
        config.hash,
    )


def _result(run: Run) -> str:
    """As printed: an accuracy in percent, or what else it is in its unit."""
    return f"{run.result:.2f}" if run.metric.unit == "%" else run.metric.text(run.result)


def _method(config: RunConfig) -> str:
    """The optimizer with the options that are not its defaults, and how workers' gradients are reduced."""
    from signstep.lab.training.optimizers import known_optimizer
    from signstep.optim.options import HYBRID_OPTIONS, SIGNSGD_OPTIONS

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

"""The range test of a run's model, data and optimizer, and its picture: the loss over the learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from signstep.lab.errors import BadInput
from signstep.lab.output import figures
from signstep.lab.training.config import RunConfig
from signstep.lab.training.run import TrainingRun
from signstep.lab.training.workers import Workers
from signstep.optim import LrRange, find_lr


def measure(config: RunConfig, data: Path | None, device: str, *, low: float, high: float, steps: int) -> LrRange:
    """The range test of a run on its own batches, from its own first weights; schedule and `config.lr` play no part.

    Args:
        config: the run.
        data: as of `signstep.lab.training.loop.train`.
        device: likewise.
        low, high, steps: as of `signstep.find_lr`.

    Raises:
        BadInput: the run does not fit its data or this machine, or the test has nothing to measure.
    """
    first = {"hybrid": "signsgd", "fixed-switch": "signsgd", "swats": "adamw"}.get(config.optimizer)
    if first is not None:
        raise BadInput(
            f"optimizer {config.optimizer} switches while it trains: find the rate of its first phase, with "
            f"--optimizer {first}"
        )
    run = TrainingRun(config, Workers.join(device), data)
    if run.workers.size > 1:
        raise BadInput("find-lr works in one process: start it without torchrun")
    batches = _batches(run)

    def closure() -> Tensor:
        x, y = next(batches)
        loss = run.loss(run.logits(run.network, x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    try:
        return find_lr(run.model, run.optimizer, closure, low=low, high=high, steps=steps)
    except ValueError as error:
        raise BadInput(f"find-lr: {error}") from error


def _batches(run: TrainingRun) -> Iterator[tuple[Tensor, Tensor]]:
    for step in itertools.count():
        yield run.batches.training(*divmod(step, run.steps_per_epoch))


def draw(found: LrRange, title: str) -> Figure:
    """The losses over the learning rates, their running average as a line, and the suggestion."""
    figure, axes = figures.single_plot(520.0, 320.0, left=44, right=16, top=58, bottom=42)
    axes.plot(found.lrs, found.losses, ".", color=figures.MUTED, markersize=3, alpha=0.6)
    axes.plot(found.lrs, found.smoothed, color=figures.shade("blue"), linewidth=1.8)
    axes.set_xscale("log")
    first, lowest = found.smoothed[0], min(found.smoothed)
    margin = max(first - lowest, 0.1 * abs(first))
    axes.set_ylim(lowest - 0.3 * margin, first + 0.6 * margin)
    if (best := found.suggestion) is not None:
        axes.axvline(best, color=figures.SWITCH, linestyle=(0, (5, 3)), linewidth=1.2)
        at = ("data", "axes fraction")
        figures.annotate(axes, f"suggested: {best:.2g}", (best, 1), at, (4, -12), color=figures.SWITCH)
    axes.grid(axis="y", color=figures.GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("learning rate", color=figures.MUTED, fontsize=10, loc="right", labelpad=3)
    figures.annotate(axes, "training loss", (0, 1), "axes fraction", (-34, 7))
    figures.add_heading(figure, (title, f"{len(found.lrs)} steps, each at a higher rate; line: running average"), 6)
    return figure

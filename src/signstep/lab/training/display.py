"""What a training run shows while it runs: a bar on a terminal, a line per epoch elsewhere, TensorBoard on request."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TimeRemainingColumn
from torch import Tensor

from signstep.lab.training.config import RunConfig


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(45), duration(1800), duration(5400)
    ('45 s', '30 min', '1 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


class Display:
    """Shows one run; a context manager.

    Args:
        config: the run.
        step: steps already taken.
        steps: steps of the whole run.
        show: show progress; False: only what `say` is given.
        quiet: show nothing at all.
        board: folder for TensorBoard's files; None: none.
    """

    def __init__(
        self, config: RunConfig, step: int, steps: int, *, show: bool, quiet: bool, board: Path | None
    ) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._label = f"{config.dataset} {config.optimizer} lr {config.lr:g} seed {config.seed}"
        self._metric, self._row = config.task.metric, config.task.row
        self._epochs, self._steps, self._batch_size = config.epochs, steps, config.batch_size
        self._epoch_length = steps // config.epochs
        # Not time.monotonic(), which on Windows stands still for 16 ms.
        self._began, self._began_at = time.perf_counter(), step
        self._lines = show and not self._console.is_terminal
        title, numbers = "{task.description}", "{task.fields[numbers]}"
        columns: list[str | ProgressColumn] = [title, BarColumn(bar_width=8), numbers, TimeRemainingColumn()]
        if self._console.width < 80:  # where all columns are cut alike, and of one column the end
            columns = [f"{title} {numbers}"]
        self._progress = Progress(
            *columns,
            console=self._console,
            disable=quiet or not show or self._lines,
        )
        self._task = self._progress.add_task(self._title(step), total=steps, completed=step, numbers="")
        self._evaluated = ""
        self._board: Any = None
        if board is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(board), purge_step=step // self._epoch_length + 1)

    def __enter__(self) -> Display:
        if not self._progress.disable:
            self._console.print(self._label, highlight=False)
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()
        if self._board is not None:
            self._board.close()

    def _value(self, loss: float, accuracy: float) -> str:
        """The metric's value, short."""
        value = self._metric.of(loss, accuracy)
        return f"{value:.1f}%" if self._metric.unit == "%" else f"{value:.{self._metric.digits - 1}f}"

    def _now(self, loss: float, accuracy: float) -> str:
        return f"{self._metric.name} {self._value(loss, accuracy)}"

    def _title(self, step: int) -> str:
        return f"epoch {min(step // self._epoch_length + 1, self._epochs)}/{self._epochs}"

    def step(self, step: int, losses: Tensor, accuracies: Tensor) -> None:
        """Show where the run is: `losses` and `accuracies` of the epoch's steps so far."""
        if self._progress.disable:
            return
        rate = (step - self._began_at) * self._batch_size / (time.perf_counter() - self._began)
        now = self._now(losses.mean().item(), accuracies.mean().item())
        numbers = f"{now}{self._evaluated}  loss {losses.mean():.3f}  {rate:,.0f} {self._row}/s"
        self._progress.update(self._task, completed=step, description=self._title(step), numbers=numbers)

    def epoch(self, line: dict[str, Any]) -> None:
        """Show an epoch's line of the record."""
        score = self._metric.score
        if f"eval_{score}" in line:
            self._evaluated = f", eval {self._value(line['eval_loss'], line[f'eval_{score}'])}"
        if self._lines:
            each = (time.perf_counter() - self._began) / (line["step"] - self._began_at)
            rate = line["timing"][f"{self._row}_per_second"]
            left = duration(each * (self._steps - line["step"]))
            trained = line[f"train_{score}"]
            now = self._now(line["train_loss"], math.nan if trained is None else trained)
            self._console.print(
                f"epoch {line['epoch']}/{self._epochs}  {now}"
                f"{self._evaluated}  loss {line['train_loss']:.3f}  {rate:,.0f} {self._row}/s  {left} left"
                f"  {self._label}",
                highlight=False,
                soft_wrap=True,
            )
        if self._board is not None:
            for name, value in line.items():
                if name not in ("epoch", "step") and isinstance(value, int | float):
                    self._board.add_scalar(name, value, line["epoch"])
            name = f"{self._row}_per_second"
            self._board.add_scalar(name, line["timing"][name], line["epoch"])

    def say(self, text: str) -> None:
        """Print `text`, whether or not progress is shown."""
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

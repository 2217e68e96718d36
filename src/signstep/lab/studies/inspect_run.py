"""`signstep inspect`: what a monitor says of a run, from its records or from a measurement at its checkpoint.

A checkpoint's model, optimizer and images are rebuilt from its configuration, in memory; no file changes. Gradients are
compared between micro-batches of training images, with batch norm in train mode. The images are augmented as in the
run, in an order that the run never has. Then one step is taken on the batch that comes next in the run: the numbers
of dither and calibration belong to this step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import rich.box
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from signstep.lab.arguments import check_folder, check_place
from signstep.lab.errors import BadInput
from signstep.lab.output.command import command_line
from signstep.lab.output.files import write_json
from signstep.lab.output.machine import environment, now
from signstep.lab.studies import monitor_numbers, monitor_page
from signstep.lab.studies.monitor_numbers import Record, at, by_step, number
from signstep.lab.training import checkpoint
from signstep.lab.training.batches import AnyBatches, batches_of
from signstep.lab.training.checkpoint import CheckpointError
from signstep.lab.training.config import RunConfig
from signstep.lab.training.objective import Objective
from signstep.lab.training.recipe import build_model, build_optimizer, lr_factor
from signstep.lab.training.workers import Workers
from signstep.monitor import Monitor
from signstep.monitor.sinks import plain, read
from signstep.optim import HybridSignSGD

_FEWEST = 4
_WIDTH = 180
_CHOICES = (
    "momentum",
    "dither",
    "dither_decay",
    "dither_position",
    "dither_scale",
    "dither_law",
    "switch",
    "calibration",
)
"""Options that the sentence about a run names where they are set."""
_VOTED = (
    "dither and calibration: the momentum is with the run's workers, who vote; signstep train --watch measures them "
    "in the run"
)


@dataclass(frozen=True)
class Inspected:
    """A run, and what is known of its signs."""

    path: Path
    records: Sequence[Record]
    """All records of a monitor's file; one of a checkpoint."""
    about: str
    """What the records were measured on, in a sentence."""
    config: RunConfig | None = None
    """The configuration of a checkpoint's run."""


@dataclass(frozen=True)
class InspectRun:
    """Say what a monitor's records show, or measure a checkpoint of signstep train; nothing of the files changes."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files: <hash>.pt or <hash>.jsonl of signstep train, or the .jsonl of a monitor."""
    micro_batches: int = 64
    """Whose gradients are compared, of a checkpoint."""
    micro_batch_size: int = 32
    """Training images in each."""
    data: Path | None = None
    """Folder to look for the images in first, or the file of a run on data set text."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    out: Path | None = None
    """Folder to write inspect.json, inspect.md, monitor.html and figures to."""

    @property
    def command(self) -> str:
        return command_line(["inspect", *map(str, self.runs)], self, omit=("runs",))

    def run(self) -> int:
        """Inspect the runs, print what is found, and write it into `out` if there is one.

        Raises:
            BadInput: an option or a file that cannot be used.
            CheckpointError: a checkpoint that is damaged, or no run's.
        """
        if self.data is None or not self.data.is_file():
            check_folder(self.data)
        if not self.runs:
            raise BadInput("inspect: name the files of a run, as in: signstep inspect runs/<hash>.pt")
        if self.micro_batches < _FEWEST:
            raise BadInput(f"--micro-batches {self.micro_batches}: expected at least {_FEWEST}")
        if self.micro_batch_size < 1:
            raise BadInput(f"--micro-batch-size {self.micro_batch_size}: expected at least 1")
        messages, console = Console(stderr=True), Console()
        found = []
        for path in self.runs:
            with messages.status(f"{path}"):
                found.append(self.inspect(path))
        labels = _labels([each.path for each in found])
        for label, each in zip(labels, found, strict=True):
            show(console, label, each)
        if self.out is not None:
            print(f"page: {self._write(self.out, labels, found)}")
        return 0

    def inspect(self, path: Path) -> Inspected:
        """The records of a monitor's file, or one measured at the checkpoint of a run.

        Args:
            path: one of the files that `runs` describes.

        Raises:
            BadInput: a file that is missing, or neither a run's nor a monitor's.
            CheckpointError: a checkpoint that is damaged, or no run's.
        """
        if not path.is_file():
            raise BadInput(
                f"{path}: there is no such file; expected <hash>.pt or .jsonl of a run, or a monitor's .jsonl"
            )
        if path.suffix == ".pt":
            return measure(path, self)
        try:
            with path.open("rb") as file:
                first = json.loads(file.readline())
            of_a_run = isinstance(first, dict) and first.get("event") == "start"
            records = [] if of_a_run else read(path)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: neither the record of a run nor that of a monitor ({error})") from error
        if of_a_run:
            saved = path.with_suffix(".pt")
            if not saved.is_file():
                raise BadInput(f"{path}: its checkpoint {saved.name} is not beside it; copy it there, or train the run")
            return measure(saved, self)
        if not all("reliability" in record and at(record, "step") is not None for record in records) or not records:
            raise BadInput(
                f"{path}: neither the record of a run nor that of a monitor (a line without step or reliability)"
            )
        return Inspected(path, records, monitor_page.scope(by_step(records)))

    def _write(self, out: Path, labels: Sequence[str], found: Sequence[Inspected]) -> Path:
        """Write the page, its figures and inspect.json; the page's path."""
        page = monitor_page.write_runs(
            [("" if len(found) == 1 else label, each.records) for label, each in zip(labels, found, strict=True)],
            out,
            title=", ".join(labels),
            command=self.command,
            name="inspect",
            about=[each.about for each in found],
        )
        record = {
            "command": self.command,
            "date": now(),
            "environment": environment(Workers.join(self.device).device, 1),
            "runs": [
                {
                    "file": str(each.path),
                    "about": each.about,
                    "config": None if each.config is None else each.config.to_dict(),
                    "record": plain(by_step(each.records)[-1]),
                }
                for each in found
            ],
        }
        write_json(out / "inspect.json", record, allow_nan=False)
        return page


class _Inspector(Monitor):
    """A monitor that compares images other than those of the step."""

    per_step = 1
    """Number of micro-batches that have as many images as a batch of the run."""

    def _rows(self) -> tuple[Tensor, int]:
        return super()._rows()[0], self.per_step


def measure(path: Path, options: InspectRun) -> Inspected:
    """A monitor's record at a checkpoint.

    Args:
        path: a checkpoint of signstep train.
        options: of the measurement.

    Raises:
        BadInput: more than one process, or images that are not there.
        CheckpointError: the checkpoint is damaged, or no run's.
    """
    state = checkpoint.read(path)
    config = RunConfig.from_dict(state["config"])
    check_place(options.data, [config.dataset])
    workers = Workers.join(options.device)
    if workers.size > 1:
        raise BadInput("inspect works in one process: start it without torchrun")
    batches = batches_of(config, workers, options.data)
    total = config.epochs * batches.steps_per_epoch
    model = build_model(config, batches, workers.device, options.micro_batch_size)
    optimizer = build_optimizer(config, model, total)
    try:
        step = int(state["step"])
        if not 0 <= step <= total:
            raise ValueError(f"step {step} of {total}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if step == total:
            # The schedule may have come down to 0: the rate of the last step.
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_factor(config, step - 1, total)
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} does not hold the network and optimizer of its configuration ({reason})"
        ) from error

    objective = Objective(config)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(workers.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = model(x).float()
        return objective.loss(logits, y)

    monitor = _Inspector(model, optimizer, every=1)
    monitor.step, monitor.per_step = step, max(1, round(config.batch_size / options.micro_batch_size))
    count = options.micro_batches * options.micro_batch_size
    monitor.measure(loss, *_images(batches, config, count), parts=options.micro_batches)
    loss(*batches.training(*divmod(step, batches.steps_per_epoch))).backward()  # type: ignore[no-untyped-call]
    voted = config.reduce == "vote" and (not isinstance(optimizer, HybridSignSGD) or optimizer.phase == "sign")
    optimizer.step()
    monitor.close()
    record = monitor.last
    assert record is not None
    if voted:
        record |= {part: {"advice": _VOTED, "layers": {}} for part in ("dither", "calibration")}
        record["advice"] = [record["symmetry"]["advice"], _VOTED]
    chosen = [f"{name} {value}" for name in _CHOICES if (value := getattr(config, name)) is not None]
    words = [config.dataset, config.model, config.optimizer, f"lr {number(config.lr)}", *chosen, f"seed {config.seed}"]
    about = f"{', '.join(words)}, step {step} of {total}; {options.micro_batches} micro-batches of "
    about += f"{options.micro_batch_size} training images"
    used = batches.steps_per_epoch * config.batch_size
    if count > used:
        about += f", of which there are {used}: intervals are too narrow"
    return Inspected(path, [record], f"{about}.", config)


def _images(batches: AnyBatches, config: RunConfig, count: int) -> tuple[Tensor, Tensor]:
    """Training images and labels of the epoch after the run's last, and of further epochs where it has too few."""
    first = (config.epochs + 1) * batches.steps_per_epoch
    pairs = [
        batches.training(*divmod(first + i, batches.steps_per_epoch)) for i in range(-(-count // config.batch_size))
    ]
    x, y = (torch.cat(column)[:count] for column in zip(*pairs, strict=True))
    return x, y


def show(console: Console, label: str, inspected: Inspected) -> None:
    """Print the last record: alarms and advice, then numbers, then layers."""
    if not console.is_terminal:  # a pipe has no width of its own
        console.width = max(console.width, _WIDTH)
    last = by_step(inspected.records)[-1]
    style: Mapping[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}
    console.print(label, style="bold", **style)
    console.print(inspected.about, **style)
    console.print(monitor_numbers.headline(last), **style)
    for sentence in monitor_numbers.sentences(last, "alarms"):
        console.print(f"alarm: {sentence}", style="bold red", **style)
    for sentence in monitor_numbers.sentences(last, "advice"):
        console.print(f"- {sentence}", **style)
    table = _table("", "", "")
    table.show_header = False
    for part in monitor_numbers.parts(last):
        table.add_row(f"[bold]{escape(part.title)}[/bold]", "", escape(part.reason))
        for row in part.rows:
            table.add_row(escape(row.label), escape(row.value), escape(row.note), end_section=row is part.rows[-1])
    table.columns[2].justify = "left"
    console.print(table)
    layers = monitor_numbers.layers(last)
    if not layers.rows:
        return
    table = _table("layer", *layers.head)
    for name, cells in layers.rows:
        table.add_row(escape(name), *map(escape, cells), style="red" if name in layers.violated else "")
    console.print(table)
    if layers.violated:
        console.print(f"red: inequality (7) is violated, in {len(layers.violated)} of {len(layers.rows)}", **style)


def _table(*head: str) -> Table:
    table = Table(*head, box=rich.box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _labels(paths: Sequence[Path]) -> list[str]:
    """Short names by which the files can be told apart."""
    for parts in (1, 2):
        labels = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]

"""The monitor of a training run, as `signstep train --watch 50` and `signstep study monitor` use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from signstep.distributed import MajorityVote
from signstep.lab.errors import BadInput
from signstep.lab.training.batches import AnyBatches
from signstep.lab.training.workers import Workers
from signstep.monitor import Monitor
from signstep.monitor.sinks import JSONLines


@dataclass(frozen=True)
class Watching:
    """What the monitor of a run looks at."""

    every: int = 50
    """Steps from one measurement to the next."""
    micro_batches: int = 16
    """Micro-batches that a measurement compares, those of all workers together."""
    images: int | None = None
    """Training images in all these micro-batches, taken from the step's batch and from those that follow in its epoch.
    None: the images of the step's batch."""


class Watched(Protocol):
    """What the monitor needs of a run."""

    workers: Workers
    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: int

    @property
    def batches(self) -> AnyBatches:
        """What it trains on."""
        ...

    @property
    def reduction(self) -> object:
        """How the workers' gradients are reduced to one, if that has a state."""
        ...

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        """The network's output for images."""
        ...

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean loss over the labels."""
        ...


class Watch:
    """Measures a run before some of its steps; each record is a line of JSON in a file.

    Args:
        watching: what is measured, and how often.
        run: the run, at its beginning or as restored from a checkpoint.
        path: the file; records of steps that the run has yet to take are removed from it.
        state: what `state_dict` gave at the run's checkpoint, if it has one.

    Raises:
        BadInput: there are not enough images or micro-batches to share out, or the file holds something else.
    """

    def __init__(self, watching: Watching, run: Watched, path: Path, state: dict[str, Any] | None) -> None:
        self._run = run
        size, steps = run.workers.size, run.batches.steps_per_epoch
        share = len(run.batches.training(0, 0)[0])
        self._parts, rest = divmod(watching.micro_batches, size)
        self._images = share if watching.images is None else watching.images // size
        self._batches = -(-self._images // share)
        if watching.every < 1:
            raise BadInput(f"watching every {watching.every} steps: expected at least 1")
        if rest or watching.micro_batches < 4:
            raise BadInput(
                f"{watching.micro_batches} micro-batches: expected a multiple of the {size} workers, at least 4"
            )
        if self._batches > steps or self._images < self._parts:
            raise BadInput(
                f"{watching.micro_batches} micro-batches of {self._images * size} images: expected an image for each "
                f"micro-batch, and no more than the {steps * share * size} of an epoch"
            )
        vote = run.reduction if isinstance(run.reduction, MajorityVote) else None
        self._monitor = Monitor(run.network, run.optimizer, every=watching.every, vote=vote)
        self._monitor.load_state_dict(state or {"step": run.step})
        if run.workers.rank == 0:
            try:
                self._monitor.sinks.append(JSONLines(path, before=run.step))
            except ValueError as error:
                raise BadInput(str(error)) from error

    def measure(self, epoch: int, index: int) -> None:
        """Measure if that is due before the coming step, which is step `index` of `epoch`."""
        if not self._monitor.due:
            return
        run, steps = self._run, self._run.batches.steps_per_epoch
        pairs = [run.batches.training(epoch, (index + i) % steps) for i in range(self._batches)]
        x, y = (torch.cat(column)[: self._images] for column in zip(*pairs, strict=True))
        self._monitor.measure(lambda x, y: run.loss(run.logits(run.network, x), y), x, y, parts=self._parts)

    def state_dict(self) -> dict[str, Any]:
        return self._monitor.state_dict()

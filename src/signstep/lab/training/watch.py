"""The monitor of a run of the lab: `signstep train --watch 50` and `signstep study monitor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from signstep.distributed import MajorityVote
from signstep.lab.errors import BadInput
from signstep.lab.training.batches import Batches
from signstep.lab.training.workers import Workers
from signstep.monitor import Monitor
from signstep.monitor.sinks import JSONLines


@dataclass(frozen=True)
class Watching:
    """What the monitor of a run looks at."""

    every: int = 50
    """Steps between its own."""
    micro_batches: int = 16
    """Of all workers together, at each of its own steps."""
    images: int | None = None
    """Of all workers together, training images that these are made of: the step's own batch and those that follow in
    its epoch. None: the batch."""


class Watched(Protocol):
    """What a run must have."""

    batches: Batches
    workers: Workers
    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: int

    @property
    def reduction(self) -> object:
        """What makes the workers' gradients one, if it has a state."""
        ...

    def logits(self, network: nn.Module, x: Tensor) -> Tensor:
        """Of images."""
        ...

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """A mean over the labels."""
        ...


class Watch:
    """Measures before a run's steps; the records go to `path`, one line of JSON each.

    Args:
        watching: what it looks at.
        run: that has taken its first steps, or none.
        path: of the records; those of steps that the run has yet to take are dropped.
        state: what `state_dict` gave at the run's checkpoint, if it has one.

    Raises:
        BadInput: there are not enough images or micro-batches to share out.
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
            self._monitor.sinks.append(JSONLines(path, before=run.step))

    def measure(self, epoch: int, index: int) -> None:
        """Measure, if the coming step, `index` of `epoch`, is one of the monitor's own."""
        if not self._monitor.due:
            return
        run, steps = self._run, self._run.batches.steps_per_epoch
        pairs = [run.batches.training(epoch, (index + i) % steps) for i in range(self._batches)]
        x, y = (torch.cat(column)[: self._images] for column in zip(*pairs, strict=True))
        self._monitor.measure(lambda x, y: run.loss(run.logits(run.network, x), y), x, y, parts=self._parts)

    def state_dict(self) -> dict[str, Any]:
        """For the run's checkpoint."""
        return self._monitor.state_dict()

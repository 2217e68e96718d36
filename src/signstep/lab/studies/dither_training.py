"""One training run of the dither study: sign steps whose loss is summed or averaged, with either kind of decay."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from signstep.lab.training.config import RunConfig
from signstep.lab.training.run import NotFinite, TrainingRun
from signstep.lab.training.tasks import task
from signstep.lab.training.workers import Workers


@dataclass(frozen=True)
class DitherRun:
    """A run of `signstep train`, and what of its gradient that command has no option for."""

    config: RunConfig
    loss: Literal["mean", "sum"] = "mean"
    """sum: the gradient is that of the sum over the batch, so `batch_size` times that of the mean."""
    coupled_decay: float = 0.0
    """This times the weights is added to the gradient, as `torch.optim.SGD` does."""

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "config": self.config.to_dict()}

    @property
    def key(self) -> str:
        """12 hex digits that name the run's file."""
        fields = [self.config.hash, self.loss, self.coupled_decay]
        return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:12]


def train_dithered(run: DitherRun, data: Path | None) -> dict[str, Any]:
    """Train and evaluate a run.

    Args:
        run: what to train.
        data: a folder to look for the images in first.

    Returns:
        "status" (done or diverged), "step" (the number of steps taken) and "accuracy" in percent, which is that of a
        guess where the run diverged.
    """
    training = TrainingRun(run.config, Workers.join("cpu"), data)
    factor = run.config.batch_size if run.loss == "sum" else 1

    @torch.no_grad()
    def before_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(factor).add_(p, alpha=run.coupled_decay)

    training.optimizer.register_step_pre_hook(before_step)
    try:
        while training.step < training.total_steps:
            training.train_step()
            if training.step % training.steps_per_epoch == 0:
                line = training.end_epoch(*training.read_history())
    except NotFinite:
        return {"status": "diverged", "step": training.step, "accuracy": task(run.config.dataset).metric.chance}
    return {"status": "done", "step": training.step, "accuracy": 100 * line["eval_accuracy"]}

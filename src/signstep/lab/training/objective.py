"""What a run makes smaller, and the score that it is judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from signstep.lab.errors import BadInput
from signstep.lab.training import own
from signstep.lab.training.config import RunConfig
from signstep.lab.training.tasks import is_own


class Objective:
    """The loss and the score of a run's outputs: those of `RunConfig.loss` and `RunConfig.metric`.

    Without them, the mean cross-entropy of logits [B, ..., classes] with int64 labels [B, ...], and the share of labels
    whose logit is the largest.

    Raises:
        BadInput: a name cannot be resolved.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._checks = is_own(config.dataset) or is_own(config.model)
        self._loss: Callable[[Any, Tensor], Any] | None = None
        self._metric: Callable[[Any, Tensor], Any] | None = None
        if config.loss is not None:
            self._loss = own.resolve(config.loss, "loss")
        if config.metric is not None:
            self._metric = own.resolve(config.metric, "metric")

    def loss(self, outputs: Any, y: Tensor) -> Tensor:
        """The mean that training makes smaller, a scalar.

        Raises:
            BadInput: outputs and targets do not fit the loss, or it is no scalar.
        """
        return self._mean_loss(outputs, y, self._config.label_smoothing)

    def score(self, outputs: Any, y: Tensor) -> Tensor:
        """What the batch is judged by, times the number of its labels, or of its rows where the metric is the user's.

        Raises:
            BadInput: the metric fails, or is no number; or it is the share of right answers, and these are no classes.
        """
        if self._metric is None:
            if self._checks or self._loss is not None:
                _check_classification(outputs, y)
            return torch.eq(outputs.argmax(-1), y).sum()
        value = self._scalar(self._called(self._metric, "metric", outputs, y), "metric")
        return len(y) * value.detach().to(y.device)

    def count(self, y: Tensor) -> int:
        """What `score` is a sum over: the labels of a batch, or its rows."""
        return y.numel() if self._metric is None else len(y)

    def sums(self, outputs: Any, y: Tensor) -> Tensor:
        """Loss (without label smoothing) and score of a batch to evaluate on, each times `count`: [2]."""
        if self._loss is None and self._metric is None:
            if self._checks:
                _check_classification(outputs, y)
                _check_labels(outputs, y)
            loss = F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="sum")
        else:
            loss = self.count(y) * self._mean_loss(outputs, y, 0.0)
        return torch.stack([loss, self.score(outputs, y)])

    def _mean_loss(self, outputs: Any, y: Tensor, smoothing: float) -> Tensor:
        if self._loss is not None:
            return self._scalar(self._called(self._loss, "loss", outputs, y), "loss")
        if self._checks:
            _check_classification(outputs, y)
            _check_labels(outputs, y)
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten(), label_smoothing=smoothing)

    def _called(self, function: Callable[[Any, Tensor], Any], what: str, outputs: Any, y: Tensor) -> Any:
        try:
            return function(outputs, y)
        except Exception as error:  # what a function of the user's raises of shapes that it does not take
            name = self._config.loss if what == "loss" else self._config.metric
            raise BadInput(
                f"{what} {name} fails on outputs {_shape(outputs)} and targets {_shape(y)}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error

    def _scalar(self, value: Any, what: str) -> Tensor:
        name = self._config.loss if what == "loss" else self._config.metric
        if what == "metric" and isinstance(value, int | float):
            return torch.tensor(float(value), dtype=torch.float32, device="cpu")
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {_shape(value)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise BadInput(f"{what} {name} returned {found}: expected one number, as the mean over the batch is")
        return value.reshape(())


def _check_classification(outputs: Any, y: Tensor) -> None:
    if not isinstance(outputs, Tensor):
        raise BadInput(f"the model gives a {type(outputs).__name__}: expected logits, or give a loss of your own")
    if outputs.ndim < 2 or outputs.shape[:-1] != y.shape or y.is_floating_point():
        raise BadInput(
            f"the model gives outputs {_shape(outputs)} for targets {_shape(y)} of type {y.dtype}: to classify, "
            "expected logits [B, classes] and whole numbers [B]; else give a loss and a metric of your own"
        )


def _check_labels(outputs: Tensor, y: Tensor) -> None:
    if y.device.type != "cpu":
        return  # to look at the labels would wait for the device in every step
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= outputs.shape[-1]:
        raise BadInput(f"a target is {low if low < 0 else high}: the model has {outputs.shape[-1]} classes, from 0")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"of type {type(value).__name__}"

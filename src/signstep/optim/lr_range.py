"""A range test for the learning rate (Smith, 2017, "Cyclical learning rates", section 3.3; arXiv:1506.01186)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LrRange", "find_lr"]

_SMOOTHING = 0.9
_FAR = 4.0
"""A smoothed loss of so many times the lowest one ends the test."""
_FEWEST = 10


@dataclass(frozen=True)
class LrRange:
    """What a range test has measured: a loss for each learning rate, in the order of the steps."""

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    """Of each step's batch, before the step."""
    smoothed: tuple[float, ...]
    """Running averages of the losses, of decay 0.9, bias-corrected."""

    @property
    def suggestion(self) -> float | None:
        """A learning rate to begin with, or None where the smoothed loss never fell by a hundredth.

        It is a tenth of the rate at which the smoothed loss was lowest: above that one training is unstable, and a
        whole run wants less than a short test bears. The rule is coarse: tune by a factor of ten on either side.
        """
        lowest = min(range(len(self.smoothed)), key=self.smoothed.__getitem__)
        fall = self.smoothed[0] - self.smoothed[lowest]
        return None if fall <= 0.01 * abs(self.smoothed[0]) else self.lrs[lowest] / 10


def find_lr(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    closure: Callable[[], Tensor],
    *,
    low: float = 1e-6,
    high: float = 10.0,
    steps: int = 100,
) -> LrRange:
    """Train for some steps while the learning rate rises from `low` to `high` by equal factors, and measure the loss.

    The test ends early once the loss is not finite, or its running average is four times its lowest. Then the model's
    parameters and buffers, the optimizer's state and its learning rates are as they were, and gradients are None; the
    closure's batches are used up, and so are the numbers that it drew. Groups keep the ratios of their learning rates;
    `low` and `high` are those of the group with the largest. Each step waits for the device.

    Args:
        model: what is trained.
        optimizer: any; of HybridSignSGD the sign phase is measured, if it does not switch within `steps`.
        closure: takes the next batch, computes its mean loss, calls ``backward`` on it and returns it, a scalar. It may
            raise StopIteration where batches have run out.
        low, high: the first and the last learning rate, ``0 < low < high``.
        steps: at least 10.

    Returns:
        The measured losses and a learning rate to begin with, `LrRange.suggestion`.

    Raises:
        ValueError: rates or steps out of their range, a loss that is no scalar, or an end of batches before step 10.

    Example:
        >>> import signstep
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = signstep.SignSGD(model.parameters())
        >>> x = torch.randn(64, 10)
        >>> def closure():
        ...     loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> found = signstep.find_lr(model, optimizer, closure, low=1e-5, high=1.0)
        >>> 1e-3 < found.suggestion < 1
        True
    """
    if not (0 < low < high < math.inf):
        raise ValueError(f"low={low}, high={high}: expected 0 < low < high, both finite")
    if steps < _FEWEST:
        raise ValueError(f"steps={steps}: expected at least {_FEWEST}")
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    tensors |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
    before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
    state: dict[str, Any] = _copied(optimizer.state_dict())
    try:
        return _measured(optimizer, closure, [low * (high / low) ** (i / (steps - 1)) for i in range(steps)])
    finally:
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        with torch.no_grad():
            for key, tensor in tensors.items():
                tensor.copy_(before[key])


def _copied(value: Any) -> Any:
    """A state with tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value


def _measured(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor], lrs: list[float]) -> LrRange:
    largest = max(float(group["lr"]) for group in optimizer.param_groups)
    shares = [float(group["lr"]) / largest if largest > 0 else 1.0 for group in optimizer.param_groups]
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    for number, lr in enumerate(lrs, 1):
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr * share)
            else:
                group["lr"] = lr * share
        optimizer.zero_grad()
        try:
            loss = closure()
        except StopIteration as error:
            if number <= _FEWEST:
                raise ValueError(f"the batches ended before step {number}: expected at least {_FEWEST}") from error
            break
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"the closure returned {type(loss).__name__}: expected a loss, a tensor of one number")
        value = loss.item()
        if not math.isfinite(value):
            break
        average = _SMOOTHING * average + (1 - _SMOOTHING) * value
        losses.append(value)
        smoothed.append(average / (1 - _SMOOTHING**number))
        if smoothed[-1] > _FAR * min(smoothed) > 0:
            break
        optimizer.step()
    if not losses:
        raise ValueError("the loss is not finite before any step: see the model's weights and the data")
    return LrRange(tuple(lrs[: len(losses)]), tuple(losses), tuple(smoothed))

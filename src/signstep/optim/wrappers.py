"""Optimizers inside the wrappers that trainers put around them."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["unwrap"]

_INNER = ("optimizer", "base_optimizer", "_base_optimizer")
"""Where a wrapper has what it wraps: Accelerate, Lightning and DeepSpeed; timm's Lookahead, old and new."""


def unwrap(optimizer: Any) -> Optimizer:
    """The optimizer that takes the steps: what is innermost in wrappers of any number.

    A wrapper may be an Optimizer itself, as accelerate's AcceleratedOptimizer, timm's Lookahead and Lightning's
    LightningOptimizer are; hooks and state are those of the inner one all the same.

    Args:
        optimizer: an optimizer, or a wrapper that has one as its attribute `optimizer` or `base_optimizer`.

    Raises:
        TypeError: there is no optimizer in it.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> optimizer = torch.optim.SGD([torch.zeros(1)])
        >>> unwrap(SimpleNamespace(optimizer=optimizer)) is optimizer
        True
    """
    given = type(optimizer).__name__
    while True:
        inside = [getattr(optimizer, name, None) for name in _INNER]
        wrapped = [x for x in inside if isinstance(x, Optimizer) or any(hasattr(x, name) for name in _INNER)]
        if not wrapped:
            break
        optimizer = wrapped[0]
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{given} is no torch.optim.Optimizer and has none as its attribute optimizer: pass the optimizer itself"
        )
    return optimizer

"""The learning rate as the length of a sign step: what to say of one that was meant for SGD."""

from __future__ import annotations

import sys
import warnings

from torch import Tensor

__all__ = ["LONGEST", "advice", "warn"]

LONGEST = 0.03
"""The largest learning rate of which nothing is said."""


def advice(lr: float | Tensor) -> str | None:
    """What to say of a learning rate above `LONGEST`, in one sentence; None of others.

    Nothing is said of a tensor on an accelerator: to read it, the host would have to wait for the device.

    Example:
        >>> advice(0.1)
        'lr=0.1 moves every weight by 0.1 in each step, however small its gradient is: try 1e-4 to 3e-3, as for AdamW'
        >>> advice(1e-3)
    """
    if isinstance(lr, Tensor):
        if lr.device.type != "cpu":
            return None
        lr = float(lr.detach())
    if lr <= LONGEST:
        return None
    return (
        f"lr={lr:g} moves every weight by {lr:g} in each step, however small its gradient is: "
        "try 1e-4 to 3e-3, as for AdamW"
    )


def warn(text: str) -> None:
    """Warn at the line of the caller's code, which is the first outside of signstep and torch."""
    level = 2
    while sys._getframe(level - 1).f_globals.get("__name__", "").partition(".")[0] in ("signstep", "torch"):
        level += 1
    warnings.warn(text, stacklevel=level)

"""Eq. (11)-(12): the SGD learning rate whose step equals the sign step's projection on the gradient.

With g the gradient, s the sign step's direction and delta its learning rate, lambda ||g||^2 = delta <s, g> (eq. 11).
Sums run over all parameters of a group. The rules, with E_eta the exponential moving average of decay eta:

- "paper" is eq. (12) and Algorithm 2 to the letter: lambda_bar = E_eta[delta |<s, g>| / (||g||^2 + eps)], started at
  0, with s = sign(m). The paper has a constant delta; under a schedule the SGD phase scales lambda_bar by the delta of
  its step over E_eta[delta], corrected for its start at 0, so that no single delta decides.
- "ratio" is lambda_bar = delta max(0, E_eta<s, g> / (E_eta||g||^2 + eps)), with both averages corrected for their start
  at 0. The product is averaged with its sign, so noise cancels instead of adding up; and one small gradient cannot
  make the ratio large.
- "applied" is "ratio" with s = 2 Phi(m / sigma) - 1, the dithered step that the optimizer applies on average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPS = 1e-8
"""The epsilon of eq. (12), in units of a squared gradient norm."""

RULES = ("paper", "ratio", "applied")

CALIBRATION_STATE = ("calibrated_lr", "lr_ratio", "inner_avg", "square_avg", "lr_avg", "avg_weight")
"""Names of the 0-dim tensors that a rule keeps in each param_group; they are 0 before the first step."""


def complete_state(group: dict[str, Any]) -> None:
    """Give a param_group that version 0.1 saved what that did not keep, as if its lr had always been what it is."""
    if "calibrated_lr" in group and "avg_weight" not in group and int(group["step"]) > 0:
        group["avg_weight"] = 1 - group["ema_decay"] ** int(group["step"])
        group["lr_avg"] = float(group["lr"]) * group["avg_weight"]


def update_rate(
    rule: str,
    state: dict[str, Tensor],
    sums: Tensor,
    *,
    lr: float | Tensor,
    ema_decay: float,
) -> None:
    """Take one step's inner product and squared norm into the running calibration, in place, without a host sync.

    Args:
        rule: one of `RULES`.
        state: the tensors of `CALIBRATION_STATE`: lambda_bar, what the SGD phase multiplies the scheduled delta by,
            E<s, g>, E||g||^2, E delta and E 1, which is what an average that starts at 0 is too small by.
        sums: [<s, g>, ||g||^2], shape (2,).
        lr: delta, the scheduled learning rate of this step; a tensor has 0 dimensions.
        ema_decay: eta in [0, 1).
    """
    # The tensors of state change last, by copies: under differentiable=True autograd holds what entered the sums.
    inner, square = sums.unbind()
    calibrated, ratio = state["calibrated_lr"], state["lr_ratio"]
    weight = state["avg_weight"].lerp(torch.ones_like(ratio), 1 - ema_decay)
    if rule == "paper":
        average = calibrated.lerp((lr * inner.abs() / (square + EPS)).to(calibrated.dtype), 1 - ema_decay)
        lr_average = state["lr_avg"].lerp((torch.ones_like(ratio) * lr).to(ratio.dtype), 1 - ema_decay)
        # As long as every lr was 0, there is no ratio to tell.
        now = average * weight / lr_average
        now = torch.where(now.isfinite(), now, ratio)
        calibrated.copy_(average)
        state["lr_avg"].copy_(lr_average)
    else:
        inner = state["inner_avg"].lerp(inner, 1 - ema_decay)
        square = state["square_avg"].lerp(square, 1 - ema_decay)
        now = (inner / (square + EPS * weight)).clamp(min=0)
        state["inner_avg"].copy_(inner)
        state["square_avg"].copy_(square)
        calibrated.copy_(now * lr)
    state["avg_weight"].copy_(weight)
    ratio.copy_(now)

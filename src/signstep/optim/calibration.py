"""Eq. (11)-(12): the SGD learning rate whose step equals the sign step's projection on the gradient.

With g the gradient, s the sign step's direction and delta its learning rate, lambda ||g||^2 = delta <s, g> (eq. 11).
Sums run over all parameters of a group. The rules, with E_eta the exponential moving average of decay eta:

- "paper" is eq. (12) and Algorithm 2 to the letter: lambda_bar = E_eta[delta |<s, g>| / (||g||^2 + eps)], started at
  0, with s = sign(m).
- "ratio" is lambda_bar = delta max(0, E_eta<s, g> / (E_eta||g||^2 + eps)), with both averages corrected for their start
  at 0. The product is averaged with its sign, so noise cancels instead of adding up; and one small gradient cannot
  make the ratio large.
- "applied" is "ratio" with s = 2 Phi(m / sigma) - 1, the dithered step that the optimizer applies on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8
"""The epsilon of eq. (12), in units of a squared gradient norm."""

RULES = ("paper", "ratio", "applied")

CALIBRATION_STATE = ("calibrated_lr", "lr_ratio", "inner_avg", "square_avg")
"""Names of the 0-dim tensors that a rule keeps in each param_group; they are 0 before the first step."""


def update_rate(
    rule: str,
    state: dict[str, Tensor],
    sums: Tensor,
    *,
    steps: Tensor,
    lr: float | Tensor,
    ema_decay: float,
) -> None:
    """Take one step's inner product and squared norm into the running calibration, in place, without a host sync.

    Args:
        rule: one of `RULES`.
        state: the tensors of `CALIBRATION_STATE`: lambda_bar, lambda_bar over delta at the last sign step, E<s, g>
            and E||g||^2.
        sums: [<s, g>, ||g||^2], shape (2,).
        steps: 0-dim integer tensor, sign steps taken, this one included.
        lr: delta, the scheduled learning rate of this step; a tensor has 0 dimensions.
        ema_decay: eta in [0, 1).
    """
    # The tensors of state change last, by copies: under differentiable=True autograd holds what entered the sums.
    inner, square = sums.unbind()
    calibrated, ratio = state["calibrated_lr"], state["lr_ratio"]
    if rule == "paper":
        average = calibrated.lerp((lr * inner.abs() / (square + EPS)).to(calibrated.dtype), 1 - ema_decay)
        # An lr of exactly 0 says nothing about the ratio: keep the last one.
        now = average / lr
        now = torch.where(now.isfinite(), now, ratio)
        calibrated.copy_(average)
    else:
        inner = state["inner_avg"].lerp(inner, 1 - ema_decay)
        square = state["square_avg"].lerp(square, 1 - ema_decay)
        start = 1 - ema_decay ** steps.to(torch.float32)
        now = (inner / (square + EPS * start)).clamp(min=0)
        state["inner_avg"].copy_(inner)
        state["square_avg"].copy_(square)
        calibrated.copy_(now * lr)
    ratio.copy_(now)

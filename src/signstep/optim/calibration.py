"""The learning rate of SGD that a sign step is worth: eq. (11)-(12), and rules beside them.

With g the gradient, s the sign step's direction, m the momentum, d the number of coordinates and delta the learning
rate of the sign step, the rules are, with E_eta the exponential moving average of decay eta:

- "paper" is eq. (12) and Algorithm 2 to the letter, the step's projection on the gradient: lambda_bar = E_eta[delta
  |<s, g>| / (||g||^2 + eps)], started at 0, with s = sign(m). The paper has a constant delta; under a schedule the SGD
  phase scales lambda_bar by the delta of its step over E_eta[delta], corrected for its start at 0, so that no single
  delta decides.
- "ratio" is lambda_bar = delta max(0, E_eta<s, g> / (E_eta||g||^2 + eps)), with both averages corrected for their start
  at 0. The product is averaged with its sign, so noise cancels instead of adding up; and one small gradient cannot
  make the ratio large.
- "applied" is "ratio" with s = 2 Phi(m / sigma) - 1, the dithered step that the optimizer applies on average.
- "norm" keeps the length of the step: lambda_bar = delta sqrt(d / E_eta||m||^2), corrected for its start. A sign step
  is delta sqrt(d) long, and so is lambda_bar m where ||m|| is the root of its mean square.
- "swats" is the projection of Keskar and Socher (2017, arXiv 1712.07628), on the step instead of on the gradient:
  lambda_bar = max(0, E_eta[delta d / <s, g>]), corrected for its start, without the steps in which <s, g> is 0; under a
  schedule as "paper". The product of its rate and that of eq. (12), for one step and without eps, is
  delta^2 d / ||g||^2.

They are taken over all parameters of a param_group at once, as in the paper, or for each parameter by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from signstep.kernels.engine import Measured

EPS = 1e-8
"""The epsilon of eq. (12), in units of a squared gradient norm."""

RULES: Mapping[str, Measured] = {
    "paper": Measured.SIGN,
    "ratio": Measured.SIGN,
    "applied": Measured.EXPECTED_SIGN,
    "norm": Measured.MOMENTUM,
    "swats": Measured.SIGN,
}
"""What each rule needs of a step."""

CALIBRATION_STATE = ("calibrated_lr", "lr_ratio", "inner_avg", "square_avg", "lr_avg", "avg_weight")
"""Names of the tensors that a rule keeps in each param_group; they are 0 before the first step."""

HYBRID_PROGRESS = (*CALIBRATION_STATE, "steady_steps", "phase")
"""Keys of a param_group that say how far `HybridSignSGD` has come."""


def is_per_tensor(group: Mapping[str, Any]) -> bool:
    """Whether a param_group calibrates each parameter by itself."""
    scope = group["calibration_scope"]
    return bool(scope == "tensor" or (scope is None and group["calibration"] == "norm"))


def complete_state(group: dict[str, Any]) -> None:
    """Give a param_group that version 0.1 saved what that did not keep, as if its lr had always been what it is."""
    if "calibrated_lr" in group and "avg_weight" not in group and int(group["step"]) > 0:
        group["avg_weight"] = 1 - group["ema_decay"] ** int(group["step"])
        group["lr_avg"] = float(group["lr"]) * group["avg_weight"]


def update_rate(
    rule: str,
    state: Mapping[str, Tensor],
    sums: Tensor,
    sizes: Tensor,
    *,
    lr: float | Tensor,
    ema_decay: float,
) -> Tensor:
    """Take what one step measured into the running calibration, in place, without a host sync.

    Args:
        rule: one of `RULES`.
        state: the tensors of `CALIBRATION_STATE`, all of one shape: lambda_bar, what the SGD phase multiplies the
            scheduled delta by, the averages of <s, g> and of the square, E delta and E 1, which is what an average that
            starts at 0 is too small by. Under "norm" the square is ||m||^2 / d, else ||g||^2; "swats" has the average
            of delta d / <s, g> in place of that of <s, g>. Where d is 0 nothing changes.
        sums: <s, g> and ||g||^2, under "norm" 0 and ||m||^2; shape (2, ...), the last dimensions those of the state.
        sizes: d, the coordinates that took part in the step, of the state's shape.
        lr: delta, the scheduled learning rate of this step; a tensor has 0 dimensions.
        ema_decay: eta in [0, 1).

    Returns:
        What this step alone would have made of ``lr_ratio``, of the state's shape; not finite where it says nothing.
    """
    # The tensors of state change last, by copies: under differentiable=True autograd holds what entered the sums.
    inner, square = sums.unbind()
    ratio = state["lr_ratio"]
    part = sizes > 0
    if rule == "swats":
        part = part & (inner != 0)
    share = part.to(ratio.dtype) * (1 - ema_decay)
    new: dict[str, Tensor] = {}

    def average(name: str, value: Tensor | float) -> Tensor:
        old = state[name]
        new[name] = old + share * (value - old)
        return new[name]

    weight = average("avg_weight", 1.0)
    known = weight > 0
    if rule in ("paper", "swats"):
        alone = inner.abs() / (square + EPS) if rule == "paper" else sizes / torch.where(part, inner, 1.0)
        lr_average = average("lr_avg", lr)
        # As long as every lr was 0, there is no ratio to tell.
        known = known & (lr_average > 0)
        if rule == "paper":
            now = average("calibrated_lr", alone * lr) * weight / lr_average
        else:
            rate = average("inner_avg", alone * lr).clamp(min=0)
            now, new["calibrated_lr"] = rate / lr_average, torch.where(known, rate / weight, 0.0)
    elif rule == "norm":
        mean_square = square / sizes.clamp(min=1)
        alone = mean_square.rsqrt()
        now = (weight / average("square_avg", mean_square)).sqrt()
    else:
        alone = inner / (square + EPS)
        now = average("inner_avg", inner) / (average("square_avg", square) + EPS * weight)
        now = now.clamp(min=0)
    new["lr_ratio"] = torch.where(known, now, ratio)
    if rule not in ("paper", "swats"):
        new["calibrated_lr"] = new["lr_ratio"] * lr
    for name, value in new.items():
        state[name].copy_(value)
    return alone


def steady_steps(group: dict[str, Any], alone: Tensor, sizes: Tensor) -> int:
    r"""Count for how many steps in a row the rate has been steady, in the group's ``steady_steps``.

    The criterion of "auto", which Algorithm 2's authors name as the next step and SWATS uses with another tolerance: a
    step is steady if :math:`|\lambda_k - \bar\lambda| \le \epsilon\,\bar\lambda`, averaged over the coordinates, with
    :math:`\epsilon` the ``switch_tolerance``. :math:`\lambda_k` is what step k alone would have made of the rate. The
    host waits for the device.

    Args:
        group: a param_group after its `update_rate`.
        alone: what that returned.
        sizes: what it was given.
    """
    deviation = torch.where(sizes > 0, (alone / group["lr_ratio"] - 1).abs(), 0.0)
    steady = bool((deviation * sizes).sum() <= group["switch_tolerance"] * sizes.sum()) and bool(sizes.any())
    group["steady_steps"] = group["steady_steps"] + 1 if steady else torch.zeros_like(group["steady_steps"])
    return int(group["steady_steps"])


def sizes_of(params: Sequence[Tensor], like: Tensor) -> Tensor:
    """The number of real coordinates of each parameter, of the dtype and on the device of `like`."""
    counts = tuple(p.numel() * (2 if p.is_complex() else 1) for p in params)
    make = _sizes.__wrapped__ if torch.compiler.is_compiling() else _sizes
    return make(counts, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _sizes(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept, because a CUDA graph that is being captured cannot copy from the host.
    return torch.tensor(counts, dtype=dtype, device=device)

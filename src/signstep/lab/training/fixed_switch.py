"""The switch without calibration (Sec. V, Motivation): sign steps, then SGD at a rate that one chooses."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from signstep.optim import HybridSignSGD


class FixedRateSwitch(HybridSignSGD):
    r"""`HybridSignSGD` whose SGD goes on at a rate that is given, not measured.

    With :math:`\delta_k` the scheduled ``lr`` of a group, :math:`\delta` the ``lr`` that the optimizer is made with and
    :math:`\lambda` SGD's rate, the steps from the switch on are those of torch's SGD with momentum :math:`\mu`:

    .. math::
        b_{k+1} = \mu b_k + g_k, \qquad x_{k+1} = x_k - \lambda\,\frac{\delta_k}{\delta}\,b_{k+1}

    with two differences: b starts at :math:`m / (1 - \mu)`, the momentum of the sign steps in the units of torch's sum,
    and weight decay stays that of the sign steps, decoupled and in units of their lr.

    Args:
        params, lr: as in `HybridSignSGD`; lr is a number above 0, and a group with an lr of its own has as many times
            more of SGD's rate.
        sgd_lr: lambda, SGD's rate where the schedule's factor is 1; None: the ``lr`` of the sign steps.
        **others: every keyword of `HybridSignSGD`; its calibration is measured and not used.

    Raises:
        ValueError: `lr` is not above 0, `sgd_lr` is below 0, or an option of `HybridSignSGD` is out of its range.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = FixedRateSwitch([w], lr=0.25, momentum=0.0, sgd_lr=0.5, switch_step=1)
        >>> for _ in range(2):
        ...     w.grad = w.detach().clone()
        ...     optimizer.step()
        ...     print(w.tolist())
        [0.75, 0.75]
        [0.375, 0.375]
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, *, sgd_lr: float | None = None, **others: Any) -> None:
        if not lr > 0:
            raise ValueError(f"lr={lr!r}: expected a value > 0, which SGD's rate is a multiple of")
        if sgd_lr is not None and not sgd_lr >= 0:
            raise ValueError(f"sgd_lr={sgd_lr!r}: expected a value >= 0")
        super().__init__(params, lr, **others)
        self.sgd_over_sign = 1.0 if sgd_lr is None else sgd_lr / lr

    def _switch_group(self, group: dict[str, Any]) -> None:
        super()._switch_group(group)
        # The momentum is an average, 1 - mu times torch's sum.
        group["lr_ratio"].fill_(self.sgd_over_sign / (1 - group["sgd_momentum"]))
        group["calibrated_lr"].copy_(group["lr_ratio"] * group["lr"])

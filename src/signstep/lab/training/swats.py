"""SWATS, Algorithm 1 of Keskar & Socher (2017): Adam, then SGD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class SWATS(Optimizer):
    r"""Adam until the rate of SGD that its steps amount to has settled, then SGD with momentum at that rate.

    "Improving Generalization Performance by Switching from Adam to SGD", https://arxiv.org/abs/1712.07628.

    With :math:`p_k` Adam's step and :math:`g_k` the gradient, both of all parameters of a group:

    .. math::
        \gamma_k = \frac{\langle p_k, p_k \rangle}{-\langle p_k, g_k \rangle}, \qquad
        \lambda_k = \beta_2 \lambda_{k-1} + (1 - \beta_2) \gamma_k, \qquad
        \bar\lambda_k = \frac{\lambda_k}{1 - \beta_2^k},

    The first step k > 1 with :math:`|\bar\lambda_k - \gamma_k| < \text{tolerance}` is Adam's last. From then on, with
    :math:`\Lambda = \bar\lambda_k`,

    .. math::
        v_k = \beta_1 v_{k-1} + g_k, \qquad w_k = w_{k-1} - (1 - \beta_1) \Lambda v_k .

    Algorithm 1 has one lr. Under a schedule :math:`\Lambda` is multiplied by the lr now over the lr that is averaged as
    :math:`\lambda` is. Decay is decoupled, :math:`w (1 - \text{lr} \cdot \text{weight\_decay})`, in both phases, and no
    part of :math:`p_k`. A negative :math:`\bar\lambda_k`, which Algorithm 1 does not exclude, makes no switch. Each
    group switches for itself.

    Args:
        params: parameters, or groups of them.
        lr: Adam's learning rate.
        betas: decays of the averages; the first is the momentum's after the switch, the second that of lambda as well.
        eps: added to Adam's denominator.
        switch_tolerance: how near the rate must come to its average, in units of a rate; None: `eps`, as in the paper.
        weight_decay: decoupled.

    Raises:
        ValueError: an option out of its range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = SWATS([w], lr=0.1, switch_tolerance=math.inf)
        >>> for _ in range(3):
        ...     w.grad = 2 * w.detach()
        ...     optimizer.step()
        ...     print(optimizer.phase)
        adam
        sgd
        sgd
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-9,
        switch_tolerance: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        tolerance = eps if switch_tolerance is None else switch_tolerance
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay, "switch_tolerance": tolerance}.items():
            if not value >= 0:
                raise ValueError(f"{name}={value!r}: expected a value >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas!r}: expected two values in [0, 1)")
        options = {"lr": lr, "betas": betas, "eps": eps, "switch_tolerance": tolerance, "weight_decay": weight_decay}
        super().__init__(params, options | {"phase": "adam", "step": 0, "lambda": 0.0, "lr_average": 0.0})

    @property
    def phase(self) -> Literal["adam", "sgd"]:
        """Which of the two takes the next step: SGD once every group has switched."""
        return "sgd" if all(group["phase"] == "sgd" for group in self.param_groups) else "adam"

    @property
    def calibrated_lr(self) -> float:
        """The bias-corrected average of gamma in the first group, lambda-bar; nan before the first step."""
        return _corrected(self.param_groups[0], "lambda")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; it waits for the device, as the switch is decided on the host. Returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            if group["phase"] == "sgd":
                self._sgd_step(group, params)
            else:
                self._adam_step(group, params)
        return loss

    def _sgd_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        beta = group["betas"][0]
        average = _corrected(group, "lr_average")
        scale = group["lr"] / average if average else 0.0
        for p in params:
            v = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            v.mul_(beta).add_(p.grad)
            p.add_(v, alpha=-(1 - beta) * _corrected(group, "lambda") * scale)

    def _adam_step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        group["step"] += 1
        k, (beta1, beta2) = group["step"], group["betas"]
        length = group["lr"] * math.sqrt(1 - beta2**k) / (1 - beta1**k)
        products = []
        for p in params:
            state, g = self.state[p], p.grad
            assert g is not None
            m = state.setdefault("exp_avg", torch.zeros_like(p)).lerp_(g, 1 - beta1)
            a = state.setdefault("exp_avg_sq", torch.zeros_like(p)).mul_(beta2).addcmul_(g, g, value=1 - beta2)
            step = m / a.sqrt().add_(group["eps"]) * -length
            p.add_(step)
            wide = step.double()
            products.append(torch.stack([(wide * wide).sum(), (wide * g).sum()]))
        square, inner = torch.stack(products).sum(0).tolist()
        if inner == 0:
            return
        rate = square / -inner
        group["lambda"] = beta2 * group["lambda"] + (1 - beta2) * rate
        group["lr_average"] = beta2 * group["lr_average"] + (1 - beta2) * group["lr"]
        average = _corrected(group, "lambda")
        if k > 1 and average > 0 and abs(average - rate) < group["switch_tolerance"]:
            group["phase"] = "sgd"
            for p in group["params"]:
                self.state.pop(p, None)


def _corrected(group: dict[str, Any], name: str) -> float:
    """A running average from 0, corrected for its start."""
    k = group["step"]
    return float(group[name]) / (1 - group["betas"][1] ** k) if k else math.nan

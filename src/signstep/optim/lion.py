"""Lion: the sign of an average that weighs the new gradient more than the momentum that is kept does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from signstep.optim.options import LION_OPTIONS, Option
from signstep.optim.signsgd import SignSGD

__all__ = ["Lion"]


class Lion(SignSGD):
    r"""Lion (Chen et al. 2023, arXiv 2302.06675, Algorithm 2), optionally dithered as `SignSGD` is.

    .. math::
        c_{k+1} &= \beta_1 m_k + (1 - \beta_1) g_k \\
        x_{k+1} &= (1 - \delta\,w)\,x_k - \delta\,\mathrm{sign}(c_{k+1} + \xi_k) \\
        m_{k+1} &= \beta_2 m_k + (1 - \beta_2) g_k

    With equal betas it is `SignSGD`. It costs the same memory and time: m is read and written once. Under
    `signstep.distributed.MajorityVote` it is Distributed Lion (Liu et al. 2024, arXiv 2404.00438): each worker keeps
    its own m and sends the sign of its own c.

    Args:
        params: parameters, of any float or complex dtype, (name, parameter) pairs or param_groups; a group may override
            every option below.
        lr (float or 1-element Tensor): delta, how far every coordinate moves per step: three to ten times below
            AdamW's, and the weight decay as many times above. (default: 1e-4)
        betas: beta_1, of the average whose sign is taken, and beta_2, of the one that is kept; both in [0, 1).
            (default: (0.9, 0.99))
        weight_decay: w, decoupled: x <- x - lr * weight_decay * x, as lion-pytorch's is by default; what that package
            calls ``decoupled_weight_decay`` is something else, which divides by the first lr. (default: 0)
        **others: every other keyword of `SignSGD`. Relative dither is a multiple of the rms of c_k, which the last step
            left.

    State:
        that of `SignSGD`, ``exp_avg`` being m. A state of SignSGD is refused, and Lion's by SignSGD: neither says what
        the other's betas are.

    Raises:
        TypeError, ValueError, RuntimeError: as `SignSGD`.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = Lion(model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = LION_OPTIONS

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        dither: float = 0.0,
        dither_decay: float = 0.55,
        dither_position: str = "pre",
        dither_scale: str = "absolute",
        dither_law: str = "gaussian",
        state_dtype: torch.dtype | str | None = None,
        param_rounding: str | None = None,
        seed: int = 0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        self._init(params, locals())

    def averages(self, group: dict[str, Any]) -> tuple[float, float | None]:
        """The betas, see `SignSGD.averages`."""
        interpolation, momentum = group["betas"]
        return momentum, interpolation

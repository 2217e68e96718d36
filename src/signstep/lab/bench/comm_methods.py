"""Who takes part in `signstep bench comm`: every reduction of `signstep.distributed.reductions`, with an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from signstep import SignSGD
from signstep.distributed import OneBitAdam
from signstep.distributed.reductions import REDUCTIONS

PEER = "ddp-fp32"
"""The method that ratios are over."""
_LR = 1e-3
_RELATIVE = {"dither": 1.0, "dither_decay": 0.0, "dither_scale": "relative"}


def _optimizer(key: str, model: DistributedDataParallel) -> torch.optim.Optimizer:
    if key.startswith("vote"):
        options: dict[str, Any] = _RELATIVE if key == "vote-dithered" else {}
        return SignSGD(model.parameters(), lr=_LR, **options)
    return torch.optim.SGD(model.parameters(), lr=_LR, momentum=0.0 if key == "int8-sum" else 0.9, fused=True)


def prepare(key: str, model: DistributedDataParallel) -> torch.optim.Optimizer:
    """Make a model reduce its gradients in one of the ways of `REDUCTIONS`, and return the optimizer that steps it."""
    attach = REDUCTIONS[key].attach
    if attach is None:
        return OneBitAdam(model, lr=_LR, warmup_steps=2)
    optimizer = _optimizer(key, model)
    attach(model, optimizer)
    return optimizer

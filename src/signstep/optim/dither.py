"""Eq. (9): how strong the dither is, and what it does to the expected step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from signstep.kernels.reference import expected_sign, wide_dtype

__all__ = ["dither_std", "expected_sign"]


def dither_std(step: Tensor, alpha: float, decay: float) -> Tensor:
    r"""Standard deviation of the dither at step k, eq. (9): :math:`\sigma_k = \sqrt{\alpha (1 + k)^{-\gamma}}`.

    Args:
        step: k, a 0-dim integer tensor, counted from 0.
        alpha: the variance at k = 0, >= 0.
        decay: gamma, >= 0; the paper takes 0.55 from Neelakantan et al. 2015.

    Returns:
        A 0-dim float32 tensor on the device of ``step``, in the units of the momentum.

    Example:
        >>> round(float(dither_std(torch.tensor(0), 0.1, 0.55)), 4)
        0.3162
    """
    k = step.to(wide_dtype(step.device))
    return ((1 + k).pow(-decay / 2) * math.sqrt(alpha)).to(torch.float32)

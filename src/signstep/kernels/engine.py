"""What one step of a param_group works on and what it is asked for: the interface of the engines.

Three compute the same step: plain torch (`signstep.optim.signsgd`, with `signstep.kernels.reference` for the noise),
which defines the result; `signstep.kernels.native` on CPUs; `signstep.kernels.triton` on GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tensors(NamedTuple):
    """Parameters that have a gradient, and their state, one entry per parameter in every list that is not empty."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    """Momentum; empty if there is none."""
    scales: list[Tensor]
    """Of 8-bit momentum, float32; empty if it has more bits."""
    mean_squares: list[Tensor]
    """Of the last step's momentum, 0-dim float32, replaced by this step's; empty unless dither is relative."""
    ordinals: list[int]
    """Of the parameters over all param_groups, for the noise's key."""
    offsets: list[int]
    """Row-major index, in the whole parameter, of the first element."""


class Dither(NamedTuple):
    """Gaussian noise before or after the sign."""

    position: str
    """"pre" or "post"."""
    sigma: Tensor
    """Standard deviation, 0-dim float32; times the root of a tensor's mean square where there is one."""


class Options(NamedTuple):
    """What a step is asked for: param <- decay * param - rate * direction."""

    step: Tensor
    """k, a 0-dim int64 tensor on the CPU or the parameters' device."""
    rate: float | Tensor
    decay: float | Tensor
    coupled_weight_decay: float
    """Times the parameter is added to the gradient."""
    momentum: float
    state_dtype: torch.dtype | None
    dither: Dither | None
    seed: int
    maximize: bool
    sums: Tensor | None
    """Shape (2,), to which [<s, g>, ||g||^2] is added."""
    sums_applied: bool
    """s is the expected dithered sign, not sign(m)."""
    gradient_step: bool = False
    """The direction is m itself, as in SGD."""


def sigmas(dither: Dither, mean_squares: Sequence[Tensor], count: int) -> list[Tensor]:
    """The standard deviation of each tensor's noise, 0-dim float32."""
    return [dither.sigma * ms.sqrt() for ms in mean_squares] if mean_squares else [dither.sigma] * count


def select(tensors: Tensors, indices: Sequence[int]) -> Tensors:
    """The entries of some of the parameters."""
    columns: list[Any] = [[column[i] for i in indices] if column else [] for column in tensors]
    return Tensors(*columns)


def real(x: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary coordinates, another as it is."""
    return torch.view_as_real(x) if torch.is_complex(x) else x


def real_tensors(tensors: Tensors) -> Tensors:
    """`tensors` with every complex one as its coordinates, two elements each."""
    if not any(dtype.is_complex for dtype in {p.dtype for p in tensors.params}):
        return tensors
    offsets = [o * 2 if torch.is_complex(p) else o for p, o in zip(tensors.params, tensors.offsets, strict=True)]
    params, exp_avgs = ([real(x) for x in column] for column in (tensors.params, tensors.exp_avgs))
    grads = [real(g.resolve_conj()) for g in tensors.grads]
    return tensors._replace(params=params, grads=grads, exp_avgs=exp_avgs, offsets=offsets)

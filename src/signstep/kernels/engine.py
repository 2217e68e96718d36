"""What an engine is given: the tensors of a step, its options, and where a vote's bits are.

Three engines compute the same step: `signstep.kernels.plain` in plain torch, which defines the result;
`signstep.kernels.native` on CPUs; `signstep.kernels.triton` on GPUs. Here is no computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from signstep.kernels.reference import Segment


class Direction(IntEnum):
    """The direction in which a parameter moves; csrc/signstep.h has the same numbers."""

    SIGN = 0
    """sign(m)."""
    PRE = 1
    """sign(m + noise), Algorithm 1."""
    POST = 2
    """sign(m) + noise, eq. (10)."""
    MOMENTUM = 3
    """m itself, as in SGD."""
    EXPECTED = 4
    """E sign(m + noise), without noise."""


class Measured(IntEnum):
    """What a step adds to its sums, for each tensor; csrc/signstep.h has the same numbers."""

    SIGN = 1
    """<s, g> and ||g||^2 with s = sign(m)."""
    EXPECTED_SIGN = 2
    """The same with s the expected dithered sign."""
    MOMENTUM = 3
    """0 and ||m||^2."""


class Tensors(NamedTuple):
    """Parameters that have a gradient, and their state, one entry per parameter in every list that is not empty."""

    params: list[Tensor]
    """Dense, of any float or complex dtype; a complex element is two real coordinates."""
    grads: list[Tensor]
    """No engine changes them."""
    exp_avgs: list[Tensor]
    """Momentum; empty if there is none."""
    scales: list[Tensor]
    """Scales of 8-bit momentum, float32, see `signstep.kernels.momentum`; else empty."""
    mean_squares: list[Tensor]
    """Mean squares of the last step's momentum, 0-dim float32, replaced by this step's; empty if dither is absolute."""
    ordinals: list[int]
    """Numbers of the parameters over all param_groups, for the noise's key."""
    offsets: list[int]
    """Row-major index, in the whole parameter, of the first element: not 0 for shards."""


class Options(NamedTuple):
    """The options of one step, param <- decay * param - rate * direction."""

    step: Tensor
    """k, a 0-dim int64 tensor on the CPU or the parameters' device."""
    rate: float | Tensor
    """A number, a tensor without dimensions, or one of shape (n,) with a rate for each of the n tensors."""
    decay: float | Tensor
    coupled_weight_decay: float
    """The gradient becomes gradient + coupled_weight_decay * param before it enters the momentum."""
    momentum: float
    state_dtype: torch.dtype | None
    direction: Direction
    sigma: Tensor | None
    """The noise's standard deviation, 0-dim float32; multiplied by the root of a tensor's mean square where there is
    one. None where no noise is drawn."""
    seed: int
    maximize: bool
    sums: Tensor | None = None
    """Shape (n, 2), to whose rows each of the n tensors adds what is `measured`; None: nothing is."""
    measured: Measured = Measured.SIGN
    """What that is."""
    stochastic_params: bool = True
    """bfloat16 parameters are rounded up or down at random, see `signstep.kernels.rounding`. Others, and all without
    it, are rounded to the nearest."""
    interpolation: float | None = None
    """beta_1 of Lion, in [0, 1). Where there is momentum, direction, sums and mean square are then those of beta_1 m +
    (1 - beta_1) gradient, with the m of before the step. None: of the new m."""
    law: str = "gaussian"
    """Of the noise: "gaussian" or "uniform"."""


class Slot(NamedTuple):
    """A run of elements, and the place of its bits among words, see `signstep.kernels.bits`."""

    first: int
    """The first word."""
    segment: Segment


def sigmas(options: Options, mean_squares: Sequence[Tensor], count: int) -> list[Tensor]:
    """The standard deviation of each tensor's noise, 0-dim float32."""
    assert options.sigma is not None
    return [options.sigma * square.sqrt() for square in mean_squares] if mean_squares else [options.sigma] * count


def select(tensors: Tensors, indices: Sequence[int]) -> Tensors:
    """The entries of some of the parameters."""
    columns: list[Any] = [[column[i] for i in indices] if column else [] for column in tensors]
    return Tensors(*columns)


def select_options(options: Options, indices: Sequence[int]) -> Options:
    """The options of a step of some of the tensors; its sums are a copy of their rows."""
    rate = options.rate
    if options.sums is None and not (isinstance(rate, Tensor) and rate.ndim):
        return options
    if isinstance(rate, Tensor) and rate.ndim:
        rate = rate[indices]
    return options._replace(rate=rate, sums=None if options.sums is None else options.sums[indices])


def real(x: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary coordinates, another as it is."""
    return torch.view_as_real(x) if torch.is_complex(x) else x


def real_tensors(tensors: Tensors) -> Tensors:
    """`tensors` with every complex one as its coordinates, two elements each."""
    if not any(p.is_complex() for p in tensors.params):
        return tensors
    offsets = [o * 2 if p.is_complex() else o for p, o in zip(tensors.params, tensors.offsets, strict=True)]
    params, exp_avgs = ([real(x) for x in column] for column in (tensors.params, tensors.exp_avgs))
    grads = [real(g.resolve_conj()) for g in tensors.grads]
    return tensors._replace(params=params, grads=grads, exp_avgs=exp_avgs, offsets=offsets)

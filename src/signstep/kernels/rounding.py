"""How a float32 number becomes a bfloat16 at random, so that on average nothing is lost.

bfloat16 keeps the upper 16 bits of a float32. Rounding to the nearest loses every step below half the spacing of
bfloat16, which for numbers in [1, 2) is 2^-7; and a sign step has one length, so it is lost every time. With r uniform
in [0, 2^16), the upper 16 bits of bits(x) + r are x rounded away from 0 with exactly the probability that makes the
mean x. A number between the largest bfloat16 and infinity becomes one of these two; what is not finite stays.

Parameters that are bfloat16 are rounded like this unless `Options.stochastic_params` says otherwise: their new value is
computed in float32 and rounded once, and element e takes half-word e % 8 of Philox block e // 8 of stream 5, see
`signstep.kernels.reference`. The momentum is rounded by the same function with fewer random bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from signstep.kernels.engine import Options
from signstep.kernels.plain_noise import chunk, noise_halves
from signstep.kernels.reference import PARAM_ROUNDING, Segment, in_pieces


def rounds_at_random(dtype: torch.dtype, options: Options) -> bool:
    """Whether a step draws noise to round parameters of this dtype."""
    return options.stochastic_params and dtype == torch.bfloat16


def to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """Round up or down at random.

    Args:
        x: float32, contiguous.
        random: integers in [0, 2^16), int32 or int64, of x's shape.
    """
    upper = (x.view(torch.int32) + random) >> 16
    return torch.where(x.isnan(), torch.nan, upper.to(torch.int16).view(torch.bfloat16))


def round_parameters(values: Sequence[Tensor], segments: Sequence[Segment], *, seed: int, step: Tensor) -> list[Tensor]:
    """The bfloat16 that parameters become.

    Args:
        values: their new values, float32, on one device; elements count in row-major order.
        segments: for each, which elements of which parameter it holds.
        seed: in [0, 2^64).
        step: 0-dim int64 tensor, the step count k.
    """

    def rounded(pieces: list[Tensor], covered: list[Segment], _: list[int]) -> Tensor:
        x = torch.cat(pieces)
        noise = noise_halves(covered, PARAM_ROUNDING, seed=seed, step=step, device=x.device)
        return to_bfloat16(x, torch.cat(noise))

    most = chunk() if values[0].device.type == "cpu" else None
    return in_pieces(values, segments, torch.bfloat16, rounded, most)

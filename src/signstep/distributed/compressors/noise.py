"""Stochastic rounding: the noise of a worker is a function of (seed, rank, step, parameter), so runs can be repeated.

Philox in plain torch would take longer than all the rest of a step; so Philox gives a seed for each parameter, and
torch's generator the numbers. They differ between CPU and CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from signstep.distributed.compressors.blocks import BLOCK
from signstep.kernels.philox import philox4x32

WORKER, SERVER = 256, 257
"""Philox streams, far from those of the optimizers: rounding of what a worker sends, and of what an owner sends."""

_MASK = 0xFFFFFFFF


@dataclass
class Noise:
    """The random numbers of a worker for some parameters, and those of its peers, which it may have to know."""

    seed: int
    """In [0, 2^64)."""
    rank: int
    """This worker's."""
    device: torch.device
    """Where to draw."""
    ordinals: dict[str, int]
    """The number of each parameter, by its name."""
    step: int = 0
    """How many reductions have been finished."""

    def draw(self, names: Sequence[str], rows: Sequence[int], stream: int, rank: int | None = None) -> Tensor:
        """That of a rank in this step, of this worker unless another is named, see `random_integers`."""
        ordinals = [self.ordinals[name] for name in names]
        whose = self.rank if rank is None else rank
        return random_integers(rows, ordinals, stream, seed=self.seed, rank=whose, step=self.step, device=self.device)


def random_integers(
    rows: Sequence[int],
    parameters: Sequence[int],
    stream: int,
    *,
    seed: int,
    rank: int,
    step: int,
    device: torch.device,
) -> Tensor:
    """Independent integers, uniform in [-2^15, 2^15).

    Args:
        rows: of each parameter.
        parameters: ordinal of each.
        stream: `WORKER` or `SERVER`.
        seed: in [0, 2^64).
        rank: whose noise it is.
        step: of this reduction.
        device: where to draw.

    Returns:
        int16 [sum of rows, BLOCK].
    """
    ordinals = torch.tensor(list(parameters), dtype=torch.int64, device="cpu")
    same = torch.ones_like(ordinals)
    counter = (ordinals, same * (step & _MASK), same * (rank & _MASK), same * stream)
    high, low, _, _ = philox4x32(counter, (seed & _MASK, seed >> 32))
    generator = torch.Generator(device)
    drawn = torch.empty(sum(rows), BLOCK, dtype=torch.int16, device=device)
    for part, a, b in zip(torch.split(drawn, list(rows)), high.tolist(), low.tolist(), strict=True):
        generator.manual_seed(a << 31 ^ b)  # CPU generators take the low 32 bits only
        part.view(torch.int64).random_(-(2**63), None, generator=generator)
    return drawn


def round_stochastically(x: Tensor, unit: Tensor, levels: int, noise: Tensor) -> Tensor:
    """Round x / unit up or down at random, so that the expectation is x / unit within 2^-16.

    Args:
        x: float32 [rows, columns], at most levels * unit in magnitude.
        unit: float32 [rows, 1]; where it is 0, x is.
        levels: at most 127.
        noise: int16 like x; r rounds up where the fraction of x / unit is more than 1 - (r + 2^15 + 1/2) / 2^16.

    Returns:
        uint8 like x: the rounded number + levels.

    Example:
        >>> x = torch.tensor([[0.0, 0.8, 1.2, 2.0, -0.8, -1.2, -2.0]])
        >>> round_stochastically(x, torch.tensor([[2.0]]), 1, torch.zeros(1, 7, dtype=torch.int16))
        tensor([[1, 1, 2, 2, 1, 0, 0]], dtype=torch.uint8)
    """
    # x / unit, not x * (1 / unit), which overflows where x is tiny. Sums with x = 0 are exact: 0 remains 0.
    up = x / torch.where(unit > 0, unit, 1.0)
    up.add_(noise.to(torch.float32), alpha=2**-16).add_(levels + 0.5 + 2**-17)
    return up.clamp_(max=2 * levels).to(torch.uint8)


def limit_to_rms(x: Tensor, sizes: Tensor, clip: float) -> None:
    """Limit elements to `clip` times the root mean square of their row, in place.

    Args:
        x: float32 [rows, columns], zeros beyond the end of short rows.
        sizes: float32 [rows, 1], elements in each row.
        clip: above 0.
    """
    limit = clip * (x.square().sum(dim=1, keepdim=True) / sizes).sqrt()
    torch.clamp(x, -limit, limit, out=x)

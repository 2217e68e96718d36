"""The sign with subtractive dither (Roberts 1962; Schuchman 1964): one bit whose error is independent of x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signstep.distributed.compressors.base import BlockCompressor, Message, Offer, Page
from signstep.distributed.compressors.noise import limit_to_rms

__all__ = ["DitheredSign"]


@dataclass(frozen=True)
class DitheredSign(BlockCompressor):
    r"""The sign of x + s u, with uniform u that every rank can draw again and takes away from what it receives.

    .. math::
        b_i = \mathrm{sign}(x_i + s\,u_i), \qquad C(x)_i = s\,(b_i - u_i), \qquad u_i \sim U(-1, 1)

    With :math:`|x_i| \le s` the error :math:`C(x)_i - x_i` is uniform on (-s, s) and independent of x: Schuchman's
    condition. So C(x) is unbiased with the variance s^2 / 3, where s b alone, the same bits without the subtraction,
    has s^2 - x_i^2. s is the block's largest magnitude, after elements are limited to `clip` times their
    block's root mean square: a bias that keeps one large element from drowning the others.

    It takes one phase, because the owner of a block could not send a mean in one bit: bytes grow with M. So does the
    work, for every rank draws the noise of all. So all ranks need devices of one kind: a CPU draws other numbers than a
    GPU does, and GPUs with different numbers of processors may differ from each other.

    Args:
        clip: limit in root mean squares, above 0; None: no limit, no bias. (default: 2.5)

    Raises:
        ValueError: clip is not above 0.

    Example:
        >>> x = torch.tensor([[3.0, -1.0, 1.0]])
        >>> noise = torch.tensor([[0, 2**13, -(2**14)]], dtype=torch.int16)  # u = 0, 1/4 and -1/2
        >>> DitheredSign().encode(x, torch.tensor([[3.0]]), noise)
        (tensor([[3.]]), tensor([[ True, False, False]]))
    """

    clip: float | None = 2.5
    error_feedback = False
    two_sided = False
    stochastic = True
    values = (-1.0, 1.0)

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"Invalid clip: {self.clip}, expected clip > 0, or None for no clipping")

    def limit(self, x: Tensor, sizes: Tensor) -> None:
        """Limit elements to clip times the root mean square of their block."""
        if self.clip is not None:
            limit_to_rms(x, sizes, self.clip)

    def encode(self, x: Tensor, sizes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The largest magnitude, and whether x + s u is positive."""
        largest = x.abs().amax(dim=1, keepdim=True)
        return largest, torch.addcmul(x, largest, uniform(noise)) > 0

    def reconstruct(self, rows: Tensor, noise: Tensor) -> Tensor:
        """What a worker's rows stand for, given the noise that it has added."""
        return self._decode(rows).sub_(uniform(noise).mul_(rows[:, :1].contiguous().view(torch.float32)))

    def exchange(self, x: Tensor, message: Message) -> Tensor:
        """The mean of what all workers have sent, each without its noise."""
        layout = message.layout
        wire = layout.wire(self.scales, self._bits, dealt=False)
        self.limit(x, layout.all.sizes)
        rows = self._encode(x, layout.all, message.draw())
        received = message.gather(wire.send(rows).view(-1))
        mean = torch.zeros_like(x)
        for rank, words in enumerate(received):
            mean.add_(self.reconstruct(wire.place(words), message.draw(rank)))
        return mean.div_(len(received))


def uniform(noise: Tensor) -> Tensor:
    """int16 noise as float32 in (-1, 1), symmetric about 0.

    >>> uniform(torch.tensor([-(2**15), -1, 0, 2**15 - 1], dtype=torch.int16)) * 2**15
    tensor([-3.2768e+04, -5.0000e-01,  5.0000e-01,  3.2768e+04])
    """
    return noise.to(torch.float32).add_(0.5).mul_(2**-15)


OFFERS = {
    "dithered-sign": Offer(
        "dithered sign",
        DitheredSign,
        Page(
            paper="Roberts 1962; Schuchman 1964, as in [2604.25550](https://arxiv.org/abs/2604.25550)'s references",
            bytes="33/256 (M-1)",
            biased="by clipping only; `clip=None`: no",
            state="none",
            good_for="one bit without state, few workers: a third of the variance or less that the bits alone have",
            not_for="many workers: bytes and work grow with M",
        ),
    ),
}

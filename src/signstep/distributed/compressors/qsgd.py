"""QSGD (Alistarh et al. 2017, arXiv 1610.02132): stochastic rounding to a few levels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from signstep.distributed.compressors.base import BlockCompressor, Offer, Page
from signstep.distributed.compressors.noise import round_stochastically

__all__ = ["QSGD"]


@dataclass(frozen=True)
class QSGD(BlockCompressor):
    r"""Each element rounded up or down to one of s levels of the block's largest, at random, without bias.

    .. math::
        C(x)_i = \frac{\lVert x \rVert_\infty}{s} \Big(\Big\lfloor \frac{s\,x_i}{\lVert x \rVert_\infty} \Big\rfloor +
        b_i\Big), \qquad b_i \sim \mathrm{Bernoulli}\ \text{with}\ \mathbb E\,C(x) = x

    The paper's analysis scales by the 2-norm, which makes most elements 0 and pays with a variable-length code; with a
    fixed number of bits the largest magnitude, never more than the 2-norm, gives less variance. The owner's second
    rounding is unbiased as well.

    Args:
        levels: s, above 0: 1 takes 2 bits per element, 2 to 7 take 4, 8 to 127 take 8. (default: 7)

    Raises:
        ValueError: levels are out of range.

    Example:
        >>> import torch
        >>> x = torch.tensor([[7.0, 2.5, -2.5]])
        >>> QSGD().encode(x, torch.tensor([[3.0]]), noise=torch.tensor([[0, -9999, 9999]], dtype=torch.int16))
        (tensor([[1.]]), tensor([[14,  9,  5]], dtype=torch.uint8))
    """

    levels: int = 7
    error_feedback = False
    stochastic = True

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 127:
            raise ValueError(f"Invalid levels: {self.levels}, expected 1 <= levels <= 127")

    @property
    def values(self) -> tuple[float, ...]:
        """From -s to s; what is beyond fills the bits up and is not used."""
        bits = 2 if self.levels == 1 else 4 if self.levels <= 7 else 8
        return tuple(float(code - self.levels) for code in range(2**bits))

    def encode(self, x: Tensor, sizes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The distance of two levels, and each element's level."""
        unit = x.abs().amax(dim=1, keepdim=True) / self.levels
        return unit, round_stochastically(x, unit, self.levels, noise)


OFFERS = {
    "qsgd": Offer(
        "QSGD, 4 bits",
        QSGD,
        Page(
            paper="Alistarh et al. 2017, [1610.02132](https://arxiv.org/abs/1610.02132)",
            bytes="129/128 (M-1)/M",
            biased="no",
            state="none",
            good_for="elastic or short runs, as there is nothing to save; "
            "8 bits (`levels=127`, 1.506 at M = 4) are close to the exact mean",
            not_for="the slowest links",
        ),
    ),
}

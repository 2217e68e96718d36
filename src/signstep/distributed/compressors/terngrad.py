"""TernGrad (Wen et al. 2017, arXiv 1705.07878): three values, at random."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from signstep.distributed.compressors.base import BlockCompressor, Offer, Page
from signstep.distributed.compressors.noise import limit_to_rms, round_stochastically

__all__ = ["TernGrad"]


@dataclass(frozen=True)
class TernGrad(BlockCompressor):
    r"""Each element becomes -s, 0 or s, with s the block's largest magnitude.

    .. math::
        C(x)_i = s\,\mathrm{sign}(x_i)\,b_i, \qquad P(b_i = 1) = |x_i| / s, \qquad s = \max_j |x_j|

    which is unbiased. Its variance grows with s, so the paper first limits elements to c standard deviations of the
    layer's gradient, a bias that it accepts; so do workers here, but not the owners' second rounding. Here it is c
    times the root mean square of the block: deviations from the mean are 0 where a block has one element. The paper's
    workers agree on s, which saves the owner nothing here, and is left out.

    Args:
        clip: c, above 0; None: no clipping, no bias. (default: 2.5)

    Raises:
        ValueError: clip is not above 0.

    Example:
        >>> import torch
        >>> x = torch.tensor([[4.0, 1.0, -1.0]])
        >>> TernGrad().encode(x, torch.tensor([[3.0]]), noise=torch.tensor([[0, 29999, 29999]], dtype=torch.int16))
        (tensor([[4.]]), tensor([[2, 2, 1]], dtype=torch.uint8))
    """

    clip: float | None = 2.5
    error_feedback = False
    stochastic = True
    values = (-1.0, 0.0, 1.0, 2.0)

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"Invalid clip: {self.clip}, expected clip > 0, or None for no clipping")

    def limit(self, x: Tensor, sizes: Tensor) -> None:
        """Limit elements to clip times the root mean square of their block."""
        if self.clip is not None:
            limit_to_rms(x, sizes, self.clip)

    def encode(self, x: Tensor, sizes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The largest magnitude, and each element's sign or 0."""
        largest = x.abs().amax(dim=1, keepdim=True)
        return largest, round_stochastically(x, largest, 1, noise)


OFFERS = {
    "terngrad": Offer(
        "TernGrad",
        TernGrad,
        Page(
            paper="Wen et al. 2017, [1705.07878](https://arxiv.org/abs/1705.07878)",
            bytes="65/128 (M-1)/M",
            biased="by clipping only; `clip=None`: no",
            state="none",
            good_for="few bits without state, with large batches",
            not_for="small batches: its variance comes on top of theirs",
        ),
    ),
}

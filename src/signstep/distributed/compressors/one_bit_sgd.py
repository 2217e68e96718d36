"""1-bit SGD (Seide et al. 2014, Interspeech: "1-bit stochastic gradient descent and its application to ... DNNs")."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signstep.distributed.compressors.base import BlockCompressor, Offer, Page

__all__ = ["OneBitSGD"]


@dataclass(frozen=True)
class OneBitSGD(BlockCompressor):
    r"""One bit per element and two values per block, with error feedback on both sides.

    .. math::
        C(x)_i = \begin{cases} \mathrm{mean}(x_j : x_j > 0) & x_i > 0 \\ \mathrm{mean}(x_j : x_j \le 0) & x_i \le 0
        \end{cases}

    which are the two values with the least squared error for this threshold. The paper takes them per column of a
    weight matrix; here a block of 1024 elements is a column.

    Example:
        >>> scales, up = OneBitSGD().encode(
        ...     torch.tensor([[3.0, -1.0, 1.0] + [0.0] * 5]), torch.tensor([[3.0]]), noise=torch.empty(0)
        ... )
        >>> scales, up[0, :3]
        (tensor([[-1.,  2.]]), tensor([ True, False,  True]))
    """

    error_feedback = True
    scales = 2
    values = (0.0, 1.0)

    def encode(self, x: Tensor, sizes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Means of the non-positive and of the positive elements, and which are positive."""
        up = x > 0
        # As 64-bit integers of eight flags, at most 128 of which are added: a sum over bool is slow.
        eight = up.view(torch.int64).sum(dim=1, keepdim=True).view(torch.uint8)
        count = eight.sum(dim=1, keepdim=True).to(torch.float32)
        positive = x.clamp(min=0).sum(dim=1, keepdim=True)
        negative = x.clamp(max=0).sum(dim=1, keepdim=True)
        return torch.cat([negative / (sizes - count).clamp(min=1), positive / count.clamp(min=1)], dim=1), up

    def decode(self, scales: Tensor, values: Tensor) -> Tensor:
        """The one mean or the other."""
        low, high = scales[:, :1], scales[:, 1:]
        return values.mul_(high - low).add_(low)


OFFERS = {
    "one-bit-sgd": Offer(
        "1-bit SGD",
        OneBitSGD,
        Page(
            paper="Seide et al. 2014, Interspeech",
            bytes="17/64 (M-1)/M",
            biased="yes, fed back twice",
            state="4n + 4n/M bytes",
            good_for="as above, where blocks have a mean far from 0 or lopsided tails",
            not_for="as above",
        ),
    ),
}

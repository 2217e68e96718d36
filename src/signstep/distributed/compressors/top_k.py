"""Top-k (Aji and Heafield 2017, arXiv 1704.05021; Stich et al. 2018, arXiv 1809.07599): the largest elements only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from signstep.distributed.compressors.base import Compressor, Message, Offer, Page
from signstep.distributed.compressors.blocks import BLOCK

__all__ = ["TopK", "largest"]

_STRIDE = 64


@dataclass(frozen=True)
class TopK(Compressor):
    r"""The k elements of each parameter with the largest magnitude, as (index, value), with error feedback.

    .. math::
        C(x)_i = x_i \text{ if } |x_i| \text{ is among the } k \text{ largest, else } 0

    so ||C(x) - x||^2 <= (1 - k / d) ||x||^2. Everything goes to everybody: 8 k (M - 1) bytes, and the sum has up to
    k M elements.

    Args:
        ratio: k = ratio times the parameter's elements, rounded up, in (0, 1]. (default: 0.01)

    Raises:
        ValueError: the ratio is out of range.

    Example:
        >>> largest(torch.tensor([0.0, -3.0, 1.0, 2.0]), 2).sort().values
        tensor([1, 3])
    """

    ratio: float = 0.01
    error_feedback = True
    two_sided = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"Invalid ratio: {self.ratio}, expected 0 < ratio <= 1")

    def exchange(self, x: Tensor, message: Message) -> Tensor:
        """Every worker's (index, value) pairs to everybody, added up in the order of ranks."""
        layout = message.layout
        flat = x.view(-1)
        indices = torch.cat(
            [
                largest(place, math.ceil(self.ratio * place.numel())) + start * BLOCK
                for place, start in zip(layout.places(x), layout.starts, strict=True)
            ]
        )
        sent = torch.cat([indices.to(torch.int32), flat[indices].view(torch.int32)])
        flat[indices] = 0
        mean = torch.zeros_like(x)
        for received in message.gather(sent):
            where, values = received.contiguous().chunk(2)
            mean.view(-1).index_add_(0, where, values.view(torch.float32))
        return mean.div_(layout.workers)

    def bytes_per_parameter(self, world_size: int) -> float:
        """8 ratio (M - 1)."""
        return 8 * self.ratio * (world_size - 1)


def largest(x: Tensor, k: int) -> Tensor:
    """Where the k elements of the largest magnitude are, in any order; x is float, 1-D and finite.

    torch.topk of all elements costs more than a comparison of all with a bound that at least k reach, and topk of
    these. One in 64 elements gives such a bound, almost always.
    """
    magnitude = x.abs()
    sample = magnitude[::_STRIDE]
    rank = k // _STRIDE + 4 * math.isqrt(k // _STRIDE) + 4  # four standard deviations more than there should be
    if rank < len(sample):
        candidates = (magnitude >= sample.topk(rank, sorted=False).values.amin()).nonzero().view(-1)
        if len(candidates) >= k:
            return candidates[magnitude[candidates].topk(k, sorted=False).indices]
    return magnitude.topk(k, sorted=False).indices


OFFERS = {
    "top-k": Offer(
        "Top-K, 1 %",
        TopK,
        Page(
            paper="Aji and Heafield 2017, [1704.05021](https://arxiv.org/abs/1704.05021); Stich et al. 2018, [1809.07599](https://arxiv.org/abs/1809.07599)",
            bytes="8 ratio (M-1)",
            biased="yes, fed back",
            state="4n bytes",
            good_for="gradients that are sparse or nearly so: embeddings, fine-tuning",
            not_for="many workers; an element waits 1/ratio steps on average",
        ),
    ),
}

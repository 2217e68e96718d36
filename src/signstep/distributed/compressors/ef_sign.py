"""EF-SignSGD (Karimireddy et al. 2019, arXiv 1901.09847) and dist-EF-SGD (Zheng et al. 2019, arXiv 1905.10936)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from signstep.distributed.compressors.base import BlockCompressor, Offer, Page

__all__ = ["EFSign"]


@dataclass(frozen=True)
class EFSign(BlockCompressor):
    r"""The sign, scaled by the mean magnitude, with error feedback.

    .. math::
        C(x) = \frac{\lVert x \rVert_1}{d} \mathrm{sign}(x)

    on every block of d = 1024 elements; sign(0) is -1. ||C(x) - x||^2 <= (1 - 1 / d) ||x||^2, so error feedback
    converges, where the sign alone may not.

    Args:
        two_sided: False sends everything to everybody (EF-SignSGD): the mean of the scaled signs is exact. True has
            block owners compress the mean again, with a residual of their own (dist-EF-SGD): 2 / M of the bytes.

    Example:
        >>> import torch
        >>> scale, up = EFSign().encode(torch.tensor([[3.0, -1.0]]), torch.tensor([[2.0]]), noise=torch.empty(0))
        >>> scale, up
        (tensor([[2.]]), tensor([[ True, False]]))
    """

    two_sided: bool = False
    error_feedback = True
    values = (-1.0, 1.0)

    def encode(self, x: Tensor, sizes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Mean magnitude, and which elements are positive."""
        return x.abs().sum(dim=1, keepdim=True) / sizes, x > 0


OFFERS = {
    "ef-sign": Offer(
        "EF-SignSGD",
        EFSign,
        Page(
            paper="Karimireddy et al. 2019, [1901.09847](https://arxiv.org/abs/1901.09847)",
            bytes="33/256 (M-1)",
            biased="yes, fed back",
            state="4n bytes",
            good_for="M = 2, where it sends no more than two-sided and loses less",
            not_for="many workers: bytes grow with M",
        ),
    ),
    "ef-sign-two-sided": Offer(
        "EF-SignSGD, two-sided",
        lambda: EFSign(two_sided=True),
        Page(
            paper="Zheng et al. 2019, [1905.10936](https://arxiv.org/abs/1905.10936)",
            bytes="33/128 (M-1)/M",
            biased="yes, fed back twice",
            state="4n + 4n/M bytes",
            good_for="slow links, any M: the fewest bytes that do not depend on sparsity",
            not_for="gradients with a few large elements per block, which take many steps to get through",
        ),
    ),
}

"""EF-SignSGD (Karimireddy et al. 2019, arXiv 1901.09847) and dist-EF-SGD (Zheng et al. 2019, arXiv 1905.10936)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from signstep.distributed.compressors.base import BlockCompressor

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

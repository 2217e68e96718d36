"""`CompressedGradients`: a DDP hook that leaves in p.grad the compressed mean of the workers' gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from signstep.distributed.compressors.base import Compressor
from signstep.distributed.compressors.mean import CompressedMean
from signstep.distributed.hooks import Bucket, GradientHook

__all__ = ["CompressedGradients"]


class CompressedGradients(GradientHook):
    r"""Averages the gradients of a DDP model in compressed form; any optimizer can follow.

    With C the compressor and e_w what worker w has not sent yet (of compressors with error feedback), p.grad becomes

    .. math::
        \bar g = \frac 1 M \sum_w C(g_w + e_w), \qquad e_w \leftarrow g_w + e_w - C(g_w + e_w)

    in two phases :math:`C(\bar g + e)`, where the owner of each block keeps e. It is the same on all ranks, bit for
    bit. A worker whose backward does not reach a parameter sends zeros for it, as in DDP's own mean, and keeps its
    residual. Residuals are in units of the gradient: when the learning rate changes, they are applied at the new one.

    Args:
        model: wrapped in DistributedDataParallel, on one device; gradients are compressed in float32.
        compressor: see `signstep.distributed.compressors`.
        seed: of stochastic rounding, the same on all ranks, in [0, 2^64). (default: 0)

    Attributes:
        mean: `CompressedMean`, which keeps residuals.

    Raises:
        TypeError: the model is not wrapped, or has complex parameters.
        ValueError: the seed is out of range.
        CollectiveError: from backward, on all ranks: a gradient is not finite, with rank and parameter.

    Example:
        .. code-block:: python

            model = DistributedDataParallel(net)
            hook = CompressedGradients(model, EFSign(two_sided=True))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    """

    def __init__(self, model: DistributedDataParallel, compressor: Compressor, *, seed: int = 0) -> None:
        super().__init__(model)
        self.mean = CompressedMean({name: p for p, name in self.names.items()}, self.group, compressor, seed=seed)
        self.attach(model)

    def reduce(self, bucket: Bucket) -> None:
        """Replace the gradients by the mean of what all workers have made of theirs."""
        self.mean.average(bucket.entries)
        self.mean.step += bucket.is_last

    def state_dict(self) -> dict[str, Any]:
        """The rank's own state, residuals by parameter name: every rank must save its own."""
        return self.mean.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` of the same rank gave.

        Raises:
            ValueError: it is another rank's, of another number of workers, or of other parameters or compressors.
        """
        self.mean.load_state_dict(state)

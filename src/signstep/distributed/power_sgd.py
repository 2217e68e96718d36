"""PowerSGD (Vogels et al. 2019, arXiv 1905.13727): means of low rank, by torch's own hook."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from signstep.distributed.compressors.base import Page
from signstep.distributed.hooks import Bucket, GradientHook

__all__ = ["RANK", "PowerSGD", "PowerSGDHook"]

RANK = 2


class PowerSGD:
    """Means of rank `RANK` with error feedback, one bucket at a time, because torch's hook hangs on gloo with two under
    way. The first two steps send everything. What it keeps between steps cannot be saved.

    Args:
        group: the workers.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        # It takes its time to import.
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

        self._hook = powersgd.powerSGD_hook
        self._state = powersgd.PowerSGDState(
            group, matrix_approximation_rank=RANK, start_powerSGD_iter=2, warm_start=True
        )

    def average(self, bucket: Bucket) -> None:
        """Write the mean of low-rank approximations into the bucket."""
        bucket.buffer.copy_(self._hook(self._state, bucket.original).wait())


class PowerSGDHook(GradientHook):
    """The communication hook of `PowerSGD`.

    Args:
        model: wrapped in DistributedDataParallel.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model)
        self._power = PowerSGD(self.group)
        self.attach(model)

    def reduce(self, bucket: Bucket) -> None:
        """The mean of low-rank approximations."""
        self._power.average(bucket)


PAGE = Page(
    paper="Vogels et al. 2019, [1905.13727](https://arxiv.org/abs/1905.13727)",
    bytes="8 r (a + b)/(a b) (M-1)/M for a x b, r = 2",
    biased="yes, fed back",
    state="4n bytes and the factors, which torch's hook cannot save",
    good_for="large matrices whose gradients have few strong directions",
    not_for="convolutions of few channels, vectors: what would not shrink by half is sent as it is",
)

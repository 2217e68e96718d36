"""PowerSGD (Vogels et al. 2019, arXiv 1905.13727) by torch's own hook, for a `GradientHook` to call."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

from signstep.distributed.hooks import Bucket
from signstep.distributed.plan import POWERSGD_RANK


class PowerSGD:
    """Means of rank `POWERSGD_RANK` with error feedback, one bucket at a time: with two under way torch's hook hangs on
    gloo. The first two steps send everything.

    Args:
        group: the workers.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._state = powersgd.PowerSGDState(
            group, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2, warm_start=True
        )

    def average(self, bucket: Bucket) -> None:
        """Write the mean of low-rank approximations into the bucket."""
        bucket.buffer.copy_(powersgd.powerSGD_hook(self._state, bucket.original).wait())

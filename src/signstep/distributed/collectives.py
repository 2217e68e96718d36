"""What every reduction over torch.distributed needs: the collectives themselves, a process group, and a common error.

Nothing here knows of votes, compressors or models.
"""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "CollectiveError",
    "all_gather",
    "failure",
    "mean_over",
    "own_group",
    "reduce_scatter",
    "release_at_exit",
    "start_all_gather",
    "start_all_to_all",
]

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Concatenates one tensor per rank; torch renamed it."""

reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Adds up one tensor per rank and leaves each rank its part of the sum; torch renamed it."""


_HOLDERS: weakref.WeakSet[Any] = weakref.WeakSet()


def release_at_exit(holder: object) -> None:
    """Have an object let go of its `group` as the interpreter ends.

    A gloo group that outlives the interpreter aborts the process ("terminate called without an active exception") in
    some runs, after all work is done, because its threads meet an interpreter that has gone.
    """
    _HOLDERS.add(holder)


@atexit.register
def _release() -> None:
    for holder in list(_HOLDERS):
        holder.group = None


class CollectiveError(RuntimeError):
    """An error that all ranks raise together, because all of them know of it."""


def failure(rank: int, size: int, what: str, error: BaseException) -> RuntimeError:
    """The error of a rank on which something that all ranks do together has failed."""
    return RuntimeError(
        f"rank {rank} of {size}: {what} failed ({str(error).strip().partition(chr(10))[0]}); if other ranks report a "
        "lost connection, look for the one that stopped first"
    )


def start_all_to_all(
    out: Tensor,
    x: Tensor,
    group: dist.ProcessGroup,
    received: list[int] | None = None,
    sent: list[int] | None = None,
) -> dist.Work:
    """Send the m-th part of x to rank m, for every m; once the work has been waited for, out has what each has sent.

    Args:
        out, x: 1-D, or parts of the same size as rows.
        group: the ranks.
        received, sent: elements that come from each rank and go to it; None: the same number for all.
    """
    work: dist.Work = dist.all_to_all_single(out, x, received, sent, group=group, async_op=True)
    return work


def start_all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Send x, 1-D, to every rank; out has every rank's, side by side, when the work has been waited for."""
    if x.is_cpu:
        # gloo's all-gather is a ring, M - 1 hops that wait for each other: as many bytes go straight there in one.
        return start_all_to_all(out, x.repeat(dist.get_world_size(group)), group)
    work: dist.Work = all_gather(out, x, group=group, async_op=True)
    return work


def mean_over(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """The mean of every rank's x, in place: x is divided by the number of ranks first, then added up."""
    size = dist.get_world_size(group)
    x /= size
    if size > 1:
        dist.all_reduce(x, group=group)
    return x


def own_group(
    group: dist.ProcessGroup | None, device: torch.device, ranks: Sequence[int] | None = None
) -> dist.ProcessGroup:
    """A new process group of the same ranks, backend and timeout, whose collectives cannot meet those of the old one.

    Args:
        group: the group to copy; None: all ranks.
        device: where the tensors are that will be sent.
        ranks: of the new group; None: those of the old one.
    """
    group = group or dist.group.WORLD
    assert group is not None
    ranks = dist.get_process_group_ranks(group) if ranks is None else list(ranks)
    timeout: timedelta = group._get_backend(device).options._timeout
    everyone = len(ranks) == dist.get_world_size()
    copy = dist.new_group(
        ranks, timeout=timeout, backend=dist.get_backend(group), use_local_synchronization=not everyone
    )
    assert isinstance(copy, dist.ProcessGroup)
    return copy

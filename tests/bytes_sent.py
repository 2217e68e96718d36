"""How many bytes ranks on gloo send in all-to-alls, of which an all-gather is one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor


@contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """Bytes that this rank sends to others, one number for each collective."""
    sent: list[int] = []
    all_to_all, size = dist.all_to_all_single, dist.get_world_size()

    def counting(out: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(x.nbytes * (size - 1) // size)
        return all_to_all(out, x, *args, **options)

    with mock.patch.object(dist, "all_to_all_single", counting):
        yield sent

"""The mean itself, float32, for what is to be compared with compressed means or need not be compressed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from signstep.distributed.compressors.base import Compressor, Message

__all__ = ["Exact"]


@dataclass(frozen=True)
class Exact(Compressor):
    """Sends everything as it is, in two phases.

    The owner of a block adds up what the ranks have sent, in the order of ranks, and divides by their number. So the
    mean is a function of the workers' values alone, the same bits on all ranks and in every run, where an all-reduce
    adds up in an order of its own.

    Example:
        >>> Exact().bytes_per_parameter(4)
        6.0
    """

    error_feedback = False
    two_sided = True

    def exchange(self, x: Tensor, message: Message) -> Tensor:
        """Everybody's blocks to their owners, and the owners' means to everybody."""
        wire = message.layout.wire(scales=0, bits=32, dealt=True)
        received = [wire.place_own(words).view(torch.float32) for words in message.scatter(wire.send(_words(x)))]
        mean = received[0].clone()
        for rows in received[1:]:
            mean += rows
        mean /= len(received)
        return wire.place(message.publish(wire.send_own(_words(mean)))).view(torch.float32)

    def bytes_per_parameter(self, world_size: int) -> float:
        """8 (M - 1) / M, as of a ring all-reduce."""
        return 8 * (world_size - 1) / world_size


def _words(x: Tensor) -> Tensor:
    return x.view(torch.int32)

"""What a compressor is, and how it reaches the other workers; what lasts between steps is in mean.py.

There are two ways to average blocks. In two phases (all-to-all, all-gather) the owner of a block averages what the
workers have sent, compresses the mean, and sends it to all. In one phase every worker sends everything to everybody:
that loses nothing a second time, and costs M / 2 times as much. Each compressor has a file of its own beside this one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from signstep.distributed.collectives import CollectiveError, start_all_gather, start_all_to_all
from signstep.distributed.compressors.blocks import BLOCK, Blocks, Layout, pack, unpack
from signstep.distributed.compressors.noise import SERVER, WORKER, Noise

__all__ = ["BlockCompressor", "Compressor", "Message", "Offer", "Page", "Part"]

PRESENT, NOT_FINITE = 1, 2
"""Bits of a worker's flag for a parameter."""
_ROWS = 256


class Compressor(ABC):
    """What is sent in place of gradients. It has options and no state: residuals are kept by `CompressedMean`."""

    error_feedback: bool
    """Whether what was not sent is added to the next step's gradient."""
    two_sided: bool
    """Whether its owner compresses the mean again, with error feedback of its own."""

    @property
    def decay(self) -> float:
        """What was not sent is multiplied by this before it is added to what comes next."""
        return 1.0

    @abstractmethod
    def exchange(self, x: Tensor, message: Message) -> Tensor:
        """The mean of what all workers make of their x.

        Args:
            x: float32 [rows, BLOCK], finite; with error feedback, what was not sent is left in it.
            message: the way to the other workers; its first collective must be `scatter` or `gather`.

        Returns:
            float32 like x, the same on all ranks.
        """

    @abstractmethod
    def bytes_per_parameter(self, world_size: int) -> float:
        """What a worker sends per step, in bytes; short blocks and one flag byte per parameter come on top."""

    def payload(self, shapes: Sequence[tuple[int, ...]], world_size: int) -> float:
        """What a worker sends per step for parameters of these shapes, in bytes, with the same left out."""
        return sum(map(math.prod, shapes)) * self.bytes_per_parameter(world_size)


class Page(NamedTuple):
    """What a compressor's row in docs/compressors.md says, beside what the compressor itself tells."""

    paper: str
    bytes: str
    """Formula of the bytes per parameter, of M workers."""
    biased: str
    state: str
    """Per worker, for n parameters."""
    good_for: str
    not_for: str


class Offer(NamedTuple):
    """A compressor with its options, as it is offered by name."""

    label: str
    """Its name in tables."""
    make: Callable[[], Compressor]
    page: Page


class Part(NamedTuple):
    """One parameter's part of a message."""

    name: str
    shape: tuple[int, ...]
    """In the order of its memory, the outermost dimension first."""
    flag: int
    """Of this worker: `PRESENT` and `NOT_FINITE`, or neither."""


class Message:
    """Some parameters on their way to the other workers.

    Args:
        group: the workers.
        noise: of this worker and its peers.
        server: by parameter, what has been left of the means of the blocks that this rank owns.
        layout: of the parameters' blocks.
        parts: one for each parameter.
        what: the tensors are of a parameter, for messages.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        noise: Noise,
        server: Mapping[str, Tensor],
        layout: Layout,
        parts: Sequence[Part],
        what: str,
    ) -> None:
        self.layout = layout
        self.present: list[int] = []
        """On how many ranks each parameter is present; known after the first collective."""
        self._group, self._noise, self._server, self._what = group, noise, server, what
        self.shapes = [part.shape for part in parts]
        """Of the parameters, in the order of their memory, the outermost dimension first."""
        self._names = [part.name for part in parts]
        flags = [part.flag for part in parts]
        self._flags = torch.tensor([*flags, *[0] * (-len(flags) % 4)], dtype=torch.uint8, device="cpu").view(
            torch.int32
        )

    def scatter(self, words: Tensor) -> Tensor:
        """Row r of int32 [M, n] to rank r: what the ranks have sent to this one, int32 [M, n]."""
        flags = self._flags.to(words.device).expand(len(words), -1)
        out = torch.cat([flags, words], dim=1)
        received = torch.empty_like(out)
        start_all_to_all(received, out, self._group).wait()
        return self._open(received)

    def gather(self, words: Tensor) -> Tensor:
        """What all ranks have sent to all, int32 [M, n] of int32 [n] each."""
        return self._open(self.publish(torch.cat([self._flags.to(words.device), words])))

    def publish(self, words: Tensor) -> Tensor:
        """`gather`, after another collective."""
        received = words.new_empty(self.layout.workers * len(words))
        start_all_gather(received, words, self._group).wait()
        return received.view(self.layout.workers, -1)

    def draw(self, rank: int | None = None) -> Tensor:
        """Noise for what a worker sends, this one or that of a rank, see `random_integers`."""
        return self._noise.draw(self._names, self.layout.counts, WORKER, rank)

    def draw_own(self) -> Tensor:
        """Noise for what this rank sends of the blocks that it owns."""
        return self._noise.draw(self._names, self.layout.own_counts, SERVER)

    def own_residuals(self) -> Iterator[tuple[slice, Tensor]]:
        """What has been left of the means of the rows that this rank owns: which of them, and the residual."""
        begin = 0
        for name, rows, present in zip(self._names, self.layout.own_counts, self.present, strict=True):
            if present and name in self._server:
                yield slice(begin, begin + rows), self._server[name]
            begin += rows

    def _open(self, received: Tensor) -> Tensor:
        """The words without the flags; if a gradient was not finite, all ranks raise."""
        width = self._flags.numel()
        flags = received[:, :width].contiguous().view(torch.uint8)[:, : len(self._names)].cpu()
        found = (flags & NOT_FINITE).nonzero()
        if len(found):
            rank, parameter = found[0].tolist()
            of_gradients = "use bfloat16 instead of float16 with a GradScaler"
            advice = of_gradients if self._what == "gradient" else 'pass nonfinite="abstain" to leave such a worker out'
            raise CollectiveError(
                f"rank {rank}: the {self._what} of {self._names[parameter]} is not finite, or too large for float32 "
                f"sums; nothing was sent: lower the learning rate, or {advice}"
            )
        self.present = (flags & PRESENT).sum(dim=0).tolist()
        return received[:, width:]


class BlockCompressor(Compressor):
    """A compressor that makes of each block of 1024 elements some scales and a small code per element."""

    two_sided = True
    stochastic = False
    """Whether `encode` needs noise."""
    scales = 1
    """float32 numbers per block."""

    @property
    @abstractmethod
    def values(self) -> tuple[float, ...]:
        """What each code stands for, in units of the scale: 2, 4, 16 or 256 of them."""

    @abstractmethod
    def encode(self, x: Tensor, sizes: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The scales and codes of some blocks.

        Args:
            x: float32 [rows, BLOCK], zeros beyond the end of short rows.
            sizes: float32 [rows, 1], elements in each row.
            noise: int16 like x, uniform, if the compressor is stochastic; else not used.

        Returns:
            float32 [rows, scales], and uint8 or bool like x.
        """

    def decode(self, scales: Tensor, values: Tensor) -> Tensor:
        """Elements from scales and the values of their codes, float32 [rows, BLOCK], which may be overwritten."""
        return values.mul_(scales)

    def limit(self, x: Tensor, sizes: Tensor) -> None:
        """What a worker does to its gradient before it is encoded, in place."""

    def exchange(self, x: Tensor, message: Message) -> Tensor:
        """One phase, or two; see the module."""
        layout = message.layout
        wire = layout.wire(self.scales, self._bits, dealt=self.two_sided)
        for part in _parts(x):
            self.limit(x[part], layout.all.sizes[part])
        rows = self._encode(x, layout.all, message.draw() if self.stochastic else x)
        if not self.two_sided:
            return self._mean([wire.place(words) for words in message.gather(wire.send(rows).view(-1))])

        mean = layout.own.clear(self._mean([wire.place_own(words) for words in message.scatter(wire.send(rows))]))
        residuals = list(message.own_residuals())
        for own, residual in residuals:
            mean[own].add_(residual)
        rows = self._encode(mean, layout.own, message.draw_own() if self.stochastic else mean)
        for own, residual in residuals:
            residual.copy_(mean[own])
        return self._mean([wire.place(message.publish(wire.send_own(rows)))])

    def bytes_per_parameter(self, world_size: int) -> float:
        """One way: bits / 8 + 4 scales / 1024 bytes, times M - 1; two ways: times 2 (M - 1) / M."""
        times = 2 / world_size if self.two_sided else 1
        return times * (world_size - 1) * (self._bits / 8 + 4 * self.scales / BLOCK)

    @property
    def _bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    def _encode(self, x: Tensor, blocks: Blocks, noise: Tensor) -> Tensor:
        """Rows as they are sent, int32; with error feedback, x becomes what was lost."""
        rows = x.new_empty(len(x), self.scales + BLOCK * self._bits // 32, dtype=torch.int32)
        for part in _parts(x):
            scales, codes = self.encode(x[part], blocks.sizes[part], noise[part])
            rows[part, : self.scales] = scales.view(torch.int32)
            rows[part, self.scales :] = pack(codes, self._bits).view(torch.int32)
            if self.error_feedback:
                x[part].sub_(self._decode(rows[part]))
        if self.error_feedback:
            blocks.clear(x)
        return rows

    def _decode(self, rows: Tensor) -> Tensor:
        scales = rows[:, : self.scales].contiguous().view(torch.float32)
        return self.decode(scales, unpack(rows[:, self.scales :].contiguous().view(torch.uint8), self.values))

    def _mean(self, messages: Sequence[Tensor]) -> Tensor:
        """Of what the rows stand for, added up in the order of ranks, on every rank alike."""
        mean = torch.empty(len(messages[0]), BLOCK, dtype=torch.float32, device=messages[0].device)
        for part in _parts(mean):
            total = self._decode(messages[0][part])
            for rows in messages[1:]:
                total.add_(self._decode(rows[part]))
            torch.div(total, len(messages), out=mean[part])
        return mean


def _parts(x: Tensor) -> Iterator[slice]:
    """All rows, on a CPU as many at a time as its cache holds: one megabyte of float32."""
    rows = _ROWS if x.device.type == "cpu" else max(1, len(x))
    for begin in range(0, len(x), rows):
        yield slice(begin, begin + rows)

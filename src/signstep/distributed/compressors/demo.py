"""DeMo (Peng et al. 2024, arXiv 2411.19870): the largest cosine components of each worker's momentum, by chunks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from signstep.distributed.compressors.base import Compressor, Message, Offer, Page

__all__ = ["DeMo", "Grid", "cosines", "from_components"]

_BITS = 22


@dataclass(frozen=True)
class DeMo(Compressor):
    r"""The k largest components of each chunk of the momentum, under the cosine transform; the rest waits, and decays.

    With g_w the gradient of worker w, m_w its momentum and T the orthonormal DCT-II of each chunk,

    .. math::
        m_w \leftarrow \beta m_w + g_w, \qquad q_w = \mathrm{top}_k(T m_w), \qquad m_w \leftarrow m_w - T^{-1} q_w,
        \qquad \bar q = \frac 1 M \sum_w T^{-1} q_w

    and p.grad becomes the last. DeMo then takes a step along its sign: follow with ``SignSGD(..., momentum=0)``.

    A matrix is cut into chunks of a x b elements, where a and b are the largest divisors of its sides that are at most
    `chunk`, and a vector into pieces of a. The sides of a parameter of more dimensions are its first one and the
    product of the others, in the order of its memory. A component is sent as its index in the chunk (int16) and its
    value (bfloat16, whose rounding error stays in m_w): 4 bytes, to everybody.

    Two things differ from the authors' code (github.com/bloc97/DeMo, demo.py), which sends indices of 8 bytes and
    values of 4. It divides each component's sum by the number of workers that have sent it, where here it is the mean
    over all workers. And it multiplies gradients by the learning rate before they enter the momentum.

    Args:
        k: components of each chunk, at least 1; a smaller chunk sends all that it has. (default: 32)
        chunk: longest side of a chunk, from 1 to 181. (default: 64)
        beta: what remains of the momentum from step to step, in [0, 1]. (default: 0.999)

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> DeMo(k=8).bytes_per_parameter(4)
        0.0234375
    """

    k: int = 32
    chunk: int = 64
    beta: float = 0.999
    error_feedback = True
    two_sided = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"Invalid k: {self.k}, expected an integer >= 1")
        if not 1 <= self.chunk <= 181:  # 181^2 indices fit into 15 bits
            raise ValueError(f"Invalid chunk: {self.chunk}, expected 1 <= chunk <= 181")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"Invalid beta: {self.beta}, expected 0 <= beta <= 1")

    @property
    def decay(self) -> float:
        """Beta: the momentum is what was not sent."""
        return self.beta

    def exchange(self, x: Tensor, message: Message) -> Tensor:
        """Every worker's components to everybody, added up in the order of ranks."""
        layout = message.layout
        grids = [Grid.of(shape, self.chunk) for shape in message.shapes]
        sent = []
        for place, grid in zip(layout.places(x), grids, strict=True):
            words = self._largest(grid.cut(place))
            place.sub_(grid.join(from_components(grid.components(words))))
            sent.append(words)
        received = message.gather(torch.cat([words.view(-1) for words in sent]))

        mean = torch.zeros_like(x)
        each = torch.split(received, [words.numel() for words in sent], dim=1)
        for place, grid, everyone in zip(layout.places(mean), grids, each, strict=True):
            total = grid.components(everyone[0])
            for words in everyone[1:]:
                total += grid.components(words)
            place.copy_(grid.join(from_components(total / layout.workers)))
        return mean

    def bytes_per_parameter(self, world_size: int) -> float:
        """4 k / chunk^2 (M - 1), of matrices whose sides are multiples of `chunk`."""
        return 4 * min(self.k / self.chunk**2, 1) * (world_size - 1)

    def payload(self, shapes: Sequence[tuple[int, ...]], world_size: int) -> float:
        """4 bytes for each component of every chunk, times M - 1."""
        grids = [Grid.of(shape, self.chunk) for shape in shapes]
        return 4.0 * sum(g.count * min(self.k, g.rows * g.columns) for g in grids) * (world_size - 1)

    def _largest(self, chunks: Tensor) -> Tensor:
        """Index and value of the largest components of each chunk, int32 [chunks, k]."""
        _, rows, columns = chunks.shape
        # In float64, where rounding all but never decides which components are sent.
        components = (cosines(rows, chunks.device) @ chunks.double() @ cosines(columns, chunks.device).T).flatten(1)
        indices = components.abs().topk(min(self.k, rows * columns), sorted=False).indices
        values = components.gather(1, indices).to(torch.bfloat16).view(torch.int16).to(torch.int32)
        return indices.to(torch.int32) << 16 | values & 0xFFFF


@dataclass(frozen=True)
class Grid:
    """How a parameter is cut into chunks."""

    down: int
    """Chunks above each other."""
    rows: int
    """Of a chunk."""
    across: int
    """Chunks side by side."""
    columns: int
    """Of a chunk."""

    @classmethod
    def of(cls, shape: Sequence[int], longest: int) -> Grid:
        """Chunks whose sides divide those of the parameter.

        >>> Grid.of((128, 3, 10), 64)
        Grid(down=2, rows=64, across=1, columns=30)
        >>> Grid.of((1, 130), 64)
        Grid(down=1, rows=1, across=5, columns=26)
        """
        sides = [n for n in shape if n != 1] or [1]
        height, width = (sides[0], math.prod(sides[1:])) if len(sides) > 1 else (1, sides[0])
        rows, columns = _divisor(height, longest), _divisor(width, longest)
        return cls(height // rows, rows, width // columns, columns)

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return self.down * self.across

    def cut(self, flat: Tensor) -> Tensor:
        """The chunks [count, rows, columns] of a parameter's elements."""
        chunks = flat.view(self.down, self.rows, self.across, self.columns).transpose(1, 2)
        return chunks.reshape(self.count, self.rows, self.columns)

    def join(self, chunks: Tensor) -> Tensor:
        """The inverse of `cut`."""
        return chunks.view(self.down, self.across, self.rows, self.columns).transpose(1, 2).reshape(-1)

    def components(self, words: Tensor) -> Tensor:
        """What a worker has sent, int32 [count, k] or flat, as float32 [count, rows, columns]."""
        words = words.reshape(self.count, -1)
        values = (words << 16).view(torch.float32)  # a bfloat16 is the upper half of a float32
        found = torch.zeros(self.count, self.rows * self.columns, dtype=torch.float32, device=words.device)
        return found.scatter_(1, (words >> 16).to(torch.int64), values).view(-1, self.rows, self.columns)


def _divisor(side: int, longest: int) -> int:
    return max((n for n in range(1, min(side, longest) + 1) if side % n == 0), default=1)


@functools.cache
def cosines(size: int, device: torch.device) -> Tensor:
    """The DCT-II as an orthonormal matrix, float64 [component, place]."""
    place = torch.arange(size, dtype=torch.float64, device=device)
    basis = (math.pi / size * place[:, None] * (place + 0.5)).cos() * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def from_components(components: Tensor) -> Tensor:
    """The inverse cosine transform of chunks, the same bits on every machine.

    A product of matrices is added up in an order that depends on the processor. So components are rounded to 2^-22 of
    their chunk's largest, cosines to 2^-22, and the products of the former with the latter to 2^-22 again: then float64
    holds every sum exactly, and there is one result.

    Args:
        components: float32 [chunks, rows, columns].

    Returns:
        float32 like components.
    """
    _, rows, columns = components.shape
    down, across = (cosines(size, components.device).mul(2**_BITS).round_() for size in (rows, columns))
    largest = components.abs().amax(dim=(1, 2), keepdim=True).double()
    unit = torch.exp2(largest.frexp().exponent.double() - _BITS)
    whole = (components.double() / unit).round_()
    whole = (down.T @ whole).div_(2**_BITS).round_()
    return (whole @ across).mul_(unit / 2**_BITS).float()


OFFERS = {
    "demo": Offer(
        "DeMo, 32 of 64 x 64",
        DeMo,
        Page(
            paper="Peng et al. 2024, [2411.19870](https://arxiv.org/abs/2411.19870)",
            bytes="4 k/chunk^2 (M-1)",
            biased="yes, fed back with decay",
            state="4n bytes",
            good_for="matrices with sides that are multiples of 64, before `SignSGD(momentum=0)`",
            not_for="many workers; sides without divisors near 64, which send more; slow processors",
        ),
    ),
}

"""How the gradients of a bucket become blocks, and blocks become bytes.

A parameter is cut into blocks of 1024 elements, the last one shorter, and each block is compressed on its own: layers
differ in magnitude by orders, and so do parts of a layer, so one scale for a whole bucket would drown the small ones.
The blocks of a bucket are the rows of a matrix, zeros beyond a short block's end. On the wire a row is int32 words:
its float32 scales, then its codes, as many words as its elements need. Machines are little-endian.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1024
"""Elements that share a scale."""

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2, 4 or 8 bits side by side, the first in the low bits of a byte.

    Args:
        codes: uint8 [rows, columns] below 2^bits, or bool; contiguous, columns a multiple of 8.

    Returns:
        uint8 [rows, columns * bits / 8].

    Example:
        >>> pack(torch.tensor([[1, 0, 0, 0, 0, 0, 1, 1]], dtype=torch.uint8), 1)
        tensor([[193]], dtype=torch.uint8)
    """
    count = 8 // bits
    if count == 1:
        return codes
    # The product moves code i from byte i of an integer to its place in the top byte, all codes at once.
    factor = sum(1 << (8 * (count - 1) - (8 - bits) * i) for i in range(count))
    return ((codes.view(_INTEGERS[count]) * factor) >> (8 * (count - 1))).to(torch.uint8)


def unpack(packed: Tensor, values: tuple[float, ...]) -> Tensor:
    """The inverse of `pack`, with each code replaced by what it stands for.

    Args:
        packed: uint8 [rows, bytes].
        values: of each code, 2^bits of them.

    Returns:
        float32 [rows, bytes * 8 / bits].

    Example:
        >>> unpack(torch.tensor([[193]], dtype=torch.uint8), (-1.0, 1.0))
        tensor([[ 1., -1., -1., -1., -1., -1.,  1.,  1.]])
    """
    table = _table(values, packed.device)
    rows, columns = packed.shape
    found = table.index_select(0, packed.reshape(-1).to(torch.int32))
    return found.view(rows, columns * table.shape[1])


@functools.cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """What every byte stands for, float32 [256, codes in a byte]."""
    bits = (len(values) - 1).bit_length()
    codes = (torch.arange(256, device=device)[:, None] >> (bits * torch.arange(8 // bits, device=device))) & (
        (1 << bits) - 1
    )
    return torch.tensor(values, dtype=torch.float32, device=device)[codes]


class Blocks:
    """Rows of a matrix of `BLOCK` columns; some hold fewer elements."""

    def __init__(self, sizes: Tensor, device: torch.device) -> None:
        short = (sizes < BLOCK).nonzero().view(-1)
        self.sizes = sizes[:, None].to(device, torch.float32)
        """Elements in each row, float32 [rows, 1]."""
        self._short = short.to(device)
        self._beyond = (torch.arange(BLOCK, device="cpu") >= sizes[short, None]).to(device)

    def clear(self, x: Tensor) -> Tensor:
        """Write zeros beyond the end of short rows of x, in place, and return x."""
        x[self._short] = x[self._short].masked_fill_(self._beyond, 0)
        return x


class Layout:
    """The blocks of some parameters, and who owns which: the rank that averages a block for all.

    Block j of a parameter is owned by rank (first + j) mod M, whatever bucket DDP puts the parameter in.

    Args:
        sizes: elements of each parameter.
        firsts: of each parameter, the block number from which its own are counted.
        workers: M.
        rank: this worker's.
        device: where the gradients are.
    """

    def __init__(
        self, sizes: Sequence[int], firsts: Sequence[int], workers: int, rank: int, device: torch.device
    ) -> None:
        self.sizes, self.workers, self.rank, self.device = sizes, workers, rank, device
        counts = [-(-size // BLOCK) for size in sizes]
        self.counts = counts
        """Rows of each parameter."""
        self.starts = [sum(counts[:i]) for i in range(len(counts))]
        """The first row of each parameter."""
        self.own_counts = [
            len(own_blocks(size, first, workers, rank)) for size, first in zip(sizes, firsts, strict=True)
        ]
        """Rows of each parameter that this rank owns."""
        self.rows = sum(counts)
        self._sizes = torch.cat(
            [
                torch.arange(n, device="cpu").mul_(-BLOCK).add_(size).clamp_(max=BLOCK)
                for n, size in zip(counts, sizes, strict=True)
            ]
        )
        self._owners = torch.cat(
            [(torch.arange(n, device="cpu") + first) % workers for n, first in zip(counts, firsts, strict=True)]
        )
        self.all = Blocks(self._sizes, device)
        self.own = Blocks(self._sizes[self._owners == rank], device)
        self._wires: dict[tuple[int, int, bool], Wire] = {}

    def places(self, x: Tensor) -> list[Tensor]:
        """The elements of each parameter in a matrix of all rows, 1-D views."""
        flat = x.view(-1)
        return [flat[start * BLOCK : start * BLOCK + size] for start, size in zip(self.starts, self.sizes, strict=True)]

    def parameter_of(self, row: int) -> int:
        """Index of the parameter that a row belongs to."""
        return max(i for i, start in enumerate(self.starts) if start <= row and self.counts[i] > 0)

    def wire(self, scales: int, bits: int, dealt: bool) -> Wire:
        """How blocks of so many scales and bits per element are sent: to their owners, or all to everybody."""
        key = (scales, bits, dealt)
        if key not in self._wires:
            owners = self._owners if dealt else torch.zeros_like(self._owners)
            count, rank = (self.workers, self.rank) if dealt else (1, 0)
            self._wires[key] = Wire(self._sizes, owners, count, rank, scales, bits, self.device)
        return self._wires[key]


def own_blocks(size: int, first: int, workers: int, rank: int) -> range:
    """Which blocks of a parameter of so many elements a rank owns."""
    return range((rank - first) % workers, -(-size // BLOCK), workers)


class Wire:
    """The order of words in a message: owner by owner, padded to the longest, each block cut to its size.

    Args:
        sizes: int64 [rows], elements in each row.
        owners: int64 [rows].
        count: how many owners there are.
        rank: number of this one.
        scales: float32 numbers in front of each block.
        bits: per element.
        device: where the words are.
    """

    def __init__(
        self, sizes: Tensor, owners: Tensor, count: int, rank: int, scales: int, bits: int, device: torch.device
    ) -> None:
        width = scales + BLOCK * bits // 32
        words = scales + (sizes * bits + 31) // 32
        order = owners.argsort(stable=True)
        lengths = words[order]
        totals = torch.zeros(count, dtype=torch.int64, device="cpu").index_add_(0, owners, words)
        self.count, self.length, self.width = count, int(totals.max()), width
        """`length`: words for one owner; `width`: words of a full row."""
        word = torch.arange(int(words.sum()), device="cpu")
        source = word + (order * width - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        shift = torch.arange(count, device="cpu") * self.length - (totals.cumsum(0) - totals)
        target = word + shift[owners[order]].repeat_interleave(lengths)
        send = torch.zeros(count * self.length, dtype=torch.int64, device="cpu").index_copy_(0, target, source)
        place = torch.zeros(len(sizes) * width, dtype=torch.int64, device="cpu").index_copy_(0, source, target)
        mine = owners == rank
        row = torch.zeros(len(sizes), dtype=torch.int64, device="cpu")
        row[mine] = torch.arange(int(mine.sum()), device="cpu")
        send_own = send[rank * self.length : (rank + 1) * self.length]
        send_own = row[send_own // width] * width + send_own % width
        place_own = (place.view(-1, width)[mine] - rank * self.length).clamp(min=0).view(-1)
        self._send, self._place, self._send_own, self._place_own = (
            index.to(device, torch.int32) for index in (send, place, send_own, place_own)
        )

    def send(self, rows: Tensor) -> Tensor:
        """All rows, int32 [rows, width], as messages to the owners, int32 [count, length]."""
        return rows.view(-1).index_select(0, self._send).view(self.count, self.length)

    def place(self, messages: Tensor) -> Tensor:
        """The inverse of `send`; words beyond the end of a short row are undefined."""
        return messages.reshape(-1).index_select(0, self._place).view(-1, self.width)

    def send_own(self, rows: Tensor) -> Tensor:
        """The rows that this rank owns, int32 [own rows, width], as its message, int32 [length]."""
        if len(rows) == 0:
            return rows.new_zeros(self.length)
        return rows.view(-1).index_select(0, self._send_own)

    def place_own(self, message: Tensor) -> Tensor:
        """The inverse of `send_own`."""
        return message.index_select(0, self._place_own).view(-1, self.width)

"""The tables that the Triton step reads on the device: where each tensor is, and which programs step it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

COLUMNS = 10
"""Columns of the table: the addresses of param, grad, exp_avg, scale and mean_square (0: there is none), the number of
elements, the first one's index in the whole parameter, the ordinal, the first of the programs that step it, and the
tensor's index among those of the step."""


def tables(rows: bytes, chunks: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The table on the device, and for each program the row of the table that it works on.

    Addresses seldom change from step to step. While a CUDA graph is captured the tables are made anew, by nodes of the
    graph itself, which may be replayed when a cache has long forgotten them.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _new_tables(_pinned.permanent(rows), chunks, block, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    return cached_tables(rows, chunks, block, device, stream)


@functools.lru_cache(maxsize=64)
def cached_tables(rows: bytes, chunks: int, block: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    # One per stream: another stream would have to wait for the copy, and for the last use before memory is freed.
    on_host = torch.frombuffer(bytearray(rows), dtype=torch.int64) if device.type == "cpu" else _pinned.passing(rows)
    return _new_tables(on_host, chunks, block, device)


def _new_tables(rows: Tensor, chunks: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    table = rows.to(device, non_blocking=True).view(-1, COLUMNS)
    counts = (table[:, 5] + (block - 1)) // block
    return table, torch.repeat_interleave(counts, output_size=chunks)


class _Pinned:
    """Host memory that the device copies from while the host goes on.

    A captured graph copies anew at every replay, so what it copies from is never freed. CUDA allocates no such memory
    during a capture: some is kept ready for it.
    """

    _SPARE = 1 << 17

    def __init__(self) -> None:
        self._pages: list[Tensor] = []
        self._used = 0

    def passing(self, data: bytes) -> Tensor:
        """A copy that torch frees once the device has read it."""
        self._make_ready(4 * len(data) // 8)
        return torch.frombuffer(bytearray(data), dtype=torch.int64).pin_memory()

    def permanent(self, data: bytes) -> Tensor:
        """A copy that stays."""
        size = len(data) // 8
        self._make_ready(size)
        place = self._pages[-1][self._used : self._used + size]
        self._used += size
        return place.copy_(torch.frombuffer(bytearray(data), dtype=torch.int64))

    def _make_ready(self, size: int) -> None:
        if not self._pages or self._used + size > self._pages[-1].numel():
            self._pages.append(torch.empty(max(size, self._SPARE), dtype=torch.int64, device="cpu", pin_memory=True))
            self._used = 0


_pinned = _Pinned()

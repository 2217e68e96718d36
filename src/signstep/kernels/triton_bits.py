"""Ballots on GPUs, for CUDA and ROCm: signs to words, words counted, and words to votes, in one launch per slot each.

Like the step's kernels these agree with plain torch (`signstep.kernels.bits`) under Triton's interpreter and compile
for sm_90 and gfx942, but have not run on a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from signstep.kernels.engine import Slot
from signstep.kernels.reference import Segment
from signstep.kernels.triton_noise import argument, jit, philox, triton_dtype, unavailable

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below are then never called
    triton = None

__all__ = ["count", "pack", "spread", "unavailable"]

WORDS = 32
"""Words of 64 bits that a program works on."""


@jit()
def _coin_word(
    index: tl.tensor, stream: tl.constexpr, seed: tl.tensor, step: tl.tensor, ordinal: tl.tensor
) -> tl.tensor:
    """64 coins: bits 64 (index % 2) and on of Philox block index // 2."""
    w0, w1, w2, w3 = philox((index // 2).to(tl.uint32), stream, seed, step, ordinal)
    low = tl.where(index % 2 == 0, w0, w2).to(tl.uint64)
    high = tl.where(index % 2 == 0, w1, w3).to(tl.uint64)
    return low | (high << 32)


@jit()
def _coins(
    start: tl.tensor, stream: tl.constexpr, seed: tl.tensor, step: tl.tensor, ordinal: tl.tensor, N: tl.constexpr
) -> tl.tensor:
    """A coin for each of 64 N elements from start on, as words."""
    index = start // 64 + tl.arange(0, N)
    shift = (start % 64).to(tl.uint64)
    first = _coin_word(index, stream, seed, step, ordinal)
    second = _coin_word(index + 1, stream, seed, step, ordinal)
    # In two steps, as a shift by 64 is undefined.
    return (first >> shift) | ((second << 1) << (63 - shift))


@jit()
def _gather(each: tl.tensor) -> tl.tensor:
    """Bool [N, 64] as words."""
    lane = tl.arange(0, 64).to(tl.uint64)
    return tl.sum(each.to(tl.uint64) << lane[None, :], axis=1)


_NUMBERS = ["size", "start", "seed", "step", "ordinal", "step_at", "rows", "stride", "voters"]


@jit(do_not_specialize=_NUMBERS)
def _pack_kernel(
    direction: tl.tensor,
    words: tl.tensor,
    size: tl.int64,
    start: tl.int64,
    seed: tl.uint64,
    step: tl.uint32,
    ordinal: tl.uint32,
    step_at: tl.tensor,
    WIDE: tl.constexpr,
    N: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * N
    word = first + tl.arange(0, N)
    element = word[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = element < size
    d = tl.load(direction + element, mask=inside, other=0).to(WIDE)
    k = step.to(tl.uint32) if step_at is None else tl.load(step_at).to(tl.uint32)
    coin = _coins(start + 64 * first, 3, seed.to(tl.uint64), k, ordinal.to(tl.uint32), N)
    up = _gather(d > 0) | (_gather((d == 0) & inside) & coin)
    tl.store(words + word, up.to(tl.int64, bitcast=True), mask=word * 64 < size)


@jit(do_not_specialize=_NUMBERS)
def _count_kernel(
    ballots: tl.tensor,
    majority: tl.tensor,
    ties: tl.tensor,
    rows: tl.int64,
    stride: tl.int64,
    voters: tl.int64,
    size: tl.int64,
    start: tl.int64,
    seed: tl.uint64,
    step: tl.uint32,
    ordinal: tl.uint32,
    step_at: tl.tensor,
    N: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * N
    word = first + tl.arange(0, N)
    element = word[:, None] * 64 + tl.arange(0, 64)[None, :]
    lane = tl.arange(0, 64).to(tl.int64)
    ups = tl.zeros([N, 64], tl.int32)
    for row in range(rows):
        ballot = tl.load(ballots + row * stride + word, mask=word * 64 < size, other=0)
        ups += ((ballot[:, None] >> lane[None, :]) & 1).to(tl.int32)
    above = _gather(2 * ups > voters)
    tied = _gather((2 * ups == voters) & (element < size))
    if ties is None:
        k = step.to(tl.uint32) if step_at is None else tl.load(step_at).to(tl.uint32)
        above = above | (tied & _coins(start + 64 * first, 4, seed.to(tl.uint64), k, ordinal.to(tl.uint32), N))
    else:
        tl.store(ties + word, tied.to(tl.int64, bitcast=True), mask=word * 64 < size)
    tl.store(majority + word, above.to(tl.int64, bitcast=True), mask=word * 64 < size)


@jit(do_not_specialize=_NUMBERS)
def _spread_kernel(
    words: tl.tensor, ties: tl.tensor, out: tl.tensor, size: tl.int64, OUT: tl.constexpr, N: tl.constexpr
) -> None:
    word = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    lane = tl.arange(0, 64).to(tl.int64)
    element = word[:, None] * 64 + lane[None, :]
    up = tl.load(words + word, mask=word * 64 < size, other=0)
    votes = tl.where((up[:, None] >> lane[None, :]) & 1 != 0, 1.0, -1.0)
    if ties is not None:
        tied = tl.load(ties + word, mask=word * 64 < size, other=0)
        votes = tl.where((tied[:, None] >> lane[None, :]) & 1 != 0, 0.0, votes)
    tl.store(out + element, votes.to(OUT), mask=element < size)


def _grid(size: int) -> tuple[int]:
    return (-(-size // (64 * WORDS)),)


def pack(direction: Tensor, words: Tensor, segment: Segment, *, seed: int, step: Tensor) -> None:
    """Write the signs of a segment's direction, any float dtype, as words: 1 for up, a coin for 0."""
    if segment.size == 0:
        return
    k, step_at = argument(step, words.device)
    with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
        _pack_kernel[_grid(segment.size)](
            direction.contiguous(),
            words,
            size=segment.size,
            start=segment.start,
            seed=seed,
            step=int(k) & 0xFFFFFFFF,
            ordinal=segment.parameter,
            step_at=step_at,
            WIDE=triton_dtype(torch.promote_types(direction.dtype, torch.float32)),
            N=WORDS,
        )


def count(
    ballots: Tensor,
    voters: Sequence[int],
    slots: Sequence[Slot],
    *,
    seed: int,
    step: Tensor,
    ties: Tensor | None = None,
) -> Tensor:
    """`signstep.kernels.bits.count`."""
    ballots = ballots if ballots.stride(1) == 1 else ballots.contiguous()
    out = torch.zeros_like(ballots[0])
    if ties is not None:
        ties.zero_()
    k, step_at = argument(step, out.device)
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        for (first, segment), number in zip(slots, voters, strict=True):
            if number == 0 or segment.size == 0:
                continue
            _count_kernel[_grid(segment.size)](
                ballots[:, first:],
                out[first:],
                None if ties is None or number % 2 else ties[first:],
                rows=len(ballots),
                stride=ballots.stride(0),
                voters=number,
                size=segment.size,
                start=segment.start,
                seed=seed,
                step=int(k) & 0xFFFFFFFF,
                ordinal=segment.parameter,
                step_at=step_at,
                N=WORDS,
            )
    return out


def spread(
    words: Tensor, ties: Tensor | None, slots: Sequence[Slot], outs: Sequence[Tensor], sums: Tensor | None = None
) -> None:
    """`signstep.kernels.bits.spread`."""
    with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
        for i, ((first, segment), out) in enumerate(zip(slots, outs, strict=True)):
            before = None if sums is None else out.to(torch.float64, copy=True)
            if segment.size > 0:
                _spread_kernel[_grid(segment.size)](
                    words[first:],
                    None if ties is None else ties[first:],
                    out,
                    size=segment.size,
                    OUT=triton_dtype(out.dtype),
                    N=WORDS,
                )
            if sums is not None and before is not None:
                sums[i, 0], sums[i, 1] = before @ out.to(torch.float64), before @ before

"""One bit per coordinate: a worker casts its signs as bits, ballots are counted, and the result becomes numbers again.

A slot holds the bits of a parameter, or of a run of its elements, in int64 words. Element e of the slot is bit e % 64
of word e // 64; the bit is 1 for up. Each slot begins at a new word, and the bits after its last element are not used.
A bit has no third value, so two cases are decided by a coin:

- A momentum of exactly 0 casts a coin from stream `ZERO_COINS` of the worker's own seed.
- A tie of an even number of voters is decided by a coin from stream `TIE_COINS` of the seed that all workers share.

The coin of element e of parameter p at step k is bit e % 128 of the Philox block with counter (e // 128, k, p, stream).

`cast`, `count` and `spread` use the native library on CPUs and Triton on GPUs. Where neither can be used, plain torch
computes them: `reference_cast`, `reference_count` and `reference_spread`, which also define every bit. Nothing here
sends anything: that is `signstep.distributed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from signstep.kernels import native, reference
from signstep.kernels.engine import Direction, Options, Slot, Tensors, sigmas
from signstep.kernels.momentum import enter_momentum, mean_square
from signstep.kernels.plain import dithered
from signstep.kernels.reference import TIE_COINS, ZERO_COINS, Segment

WORD = 64


def word_count(elements: int) -> int:
    """The number of words that hold one bit for each element."""
    return -(-elements // WORD)


def pack(up: Tensor) -> Tensor:
    """Pack bool [n] into words, int64 [ceil(n / 64)]; the last word is filled up with zeros."""
    padded = torch.nn.functional.pad(up.reshape(-1), (0, -up.numel() % WORD)).view(-1, WORD)
    return (padded.to(torch.int64) << torch.arange(WORD, device=up.device)).sum(dim=1)


def bits(words: Tensor, size: int) -> Tensor:
    """Unpack words, int64 [ceil(size / 64)], into bool [size]: the inverse of `pack`."""
    return ((words[:, None] >> torch.arange(WORD, device=words.device)) & 1).flatten()[:size].bool()


def coins(segment: Segment, stream: int, *, seed: int, step: Tensor, device: torch.device) -> Tensor:
    """A fair coin for every element of a segment, bool [size]."""
    (words,) = reference.blocks([segment], 128, stream, seed, step, device)
    each = torch.stack([(w[:, None] >> torch.arange(32, device=device)) & 1 for w in words], dim=1).flatten()
    return each.narrow(0, segment.start % 128, segment.size).bool()


def _triton(x: Tensor) -> Any:
    """The Triton module with `pack`, `count` and `spread` for a tensor on a GPU; None where it cannot be used."""
    if x.device.type != "cuda":
        return None
    # Imported on use: Triton is not installed everywhere, and importing it is slow.
    from signstep.kernels import triton_bits

    return triton_bits if triton_bits.unavailable() is None else None


def cast(tensors: Tensors, options: Options, words: Tensor, slots: Sequence[Slot]) -> None:
    """The worker's side of Algorithm 1: momentum, dither and sign of each tensor, as bits instead of a step.

    Args:
        tensors: gradients and momentum. Parameters are only read, and only for coupled weight decay.
        options: the options of a step. `seed` is the worker's own; rate and decay are not used. Of sums there can be
            those of the momentum.
        words: int64 [W]. The words of the slots are written.
        slots: for each tensor, where its bits go and which elements they are.
    """
    if native.cast(tensors, options, words, slots):
        return
    engine = _triton(words)
    if engine is None:
        reference_cast(tensors, options, words, slots)
        return
    for i, (first, segment) in enumerate(slots):
        direction = _direction(tensors, options, i, segment)
        engine.pack(direction, words[first:], segment, seed=options.seed, step=options.step)


def reference_cast(tensors: Tensors, options: Options, words: Tensor, slots: Sequence[Slot]) -> None:
    """`cast` in plain torch, which defines it."""
    for i, (first, segment) in enumerate(slots):
        direction = _direction(tensors, options, i, segment).reshape(-1)
        up, zero = direction > 0, direction == 0
        if zero.any():
            coin = coins(segment, ZERO_COINS, seed=options.seed, step=options.step, device=direction.device)
            up = torch.where(zero, coin, up)
        words[first : first + word_count(segment.size)] = pack(up)


def _direction(tensors: Tensors, options: Options, i: int, segment: Segment) -> Tensor:
    """Take a gradient into its momentum, and return the values whose signs are cast."""
    m, _ = enter_momentum(tensors, i, options)
    if options.sums is not None:
        options.sums[i, 1] += m.to(options.sums.dtype).square().sum()
    direction = m
    if options.direction is Direction.PRE:
        (direction,) = dithered([m], sigmas(options, tensors.mean_squares[i : i + 1], 1), [segment], options)
    if tensors.mean_squares:
        tensors.mean_squares[i].copy_(mean_square(m))
    return direction


def count(
    ballots: Tensor,
    voters: Sequence[int],
    slots: Sequence[Slot],
    *,
    seed: int,
    step: Tensor,
    ties: Tensor | None = None,
) -> Tensor:
    """The majority of the ballots, by carry-save addition of bit planes: 64 coordinates at a time.

    Args:
        ballots: int64 [M, W], one worker's words in a row; who abstains from a slot has zeros there.
        voters: for each slot, how many workers vote in it; 0 leaves its words 0.
        slots: what the words hold; none may overlap, and words outside all slots stay 0.
        seed: shared by all workers, of the coin that decides a tie.
        step: 0-dim int64 tensor.
        ties: int64 [W] in which ties are marked instead, their majority being 0; None: ties are decided by coins.

    Returns:
        int64 [W].
    """
    out = native.count(ballots, voters, slots, seed=seed, step=step, ties=ties)
    if out is not None:
        return out
    engine = _triton(ballots)
    counted = reference_count if engine is None else engine.count
    return counted(ballots, voters, slots, seed=seed, step=step, ties=ties)


def reference_count(
    ballots: Tensor,
    voters: Sequence[int],
    slots: Sequence[Slot],
    *,
    seed: int,
    step: Tensor,
    ties: Tensor | None = None,
) -> Tensor:
    """`count` in plain torch, which defines it."""
    planes: list[Tensor] = []
    for number, row in enumerate(ballots, 1):
        carry = row
        for i, plane in enumerate(planes):
            planes[i], carry = plane ^ carry, plane & carry
        if number.bit_length() > len(planes):
            planes.append(carry)
    out = torch.zeros_like(ballots[0])
    if ties is not None:
        ties.zero_()
    for slot, number in zip(slots, voters, strict=True):
        if number == 0:
            continue
        words = slice(slot.first, slot.first + word_count(slot.segment.size))
        above, equal = torch.zeros_like(out[words]), torch.full_like(out[words], -1)
        for i in reversed(range(len(planes))):
            plane = planes[i][words]
            if (number // 2) >> i & 1:
                equal &= plane
            else:
                above |= equal & plane
                equal &= ~plane
        if number % 2 == 0:
            tied = equal & pack(torch.ones(slot.segment.size, dtype=torch.bool, device=out.device))
            if ties is not None:
                ties[words] = tied
            elif tied.any():
                above |= tied & pack(coins(slot.segment, TIE_COINS, seed=seed, step=step, device=out.device))
        out[words] = above
    return out


def spread(
    words: Tensor, ties: Tensor | None, slots: Sequence[Slot], outs: Sequence[Tensor], sums: Tensor | None = None
) -> None:
    """Write the votes as numbers: +1 where a bit is 1, -1 where it is 0, 0 where a tie is marked.

    Args:
        words: int64 [W].
        ties: int64 [W], or None where there are none.
        slots: for each tensor of outs, where its bits are.
        outs: 1-D, any float dtype, one element per bit; overwritten.
        sums: float64 [len(outs), 2], written: with v the votes, <v, g> and ||g||^2 of what outs held before; None: not
            wanted.
    """
    if native.spread(words, ties, slots, outs, sums):
        return
    engine = _triton(words)
    (reference_spread if engine is None else engine.spread)(words, ties, slots, outs, sums)


def reference_spread(
    words: Tensor, ties: Tensor | None, slots: Sequence[Slot], outs: Sequence[Tensor], sums: Tensor | None = None
) -> None:
    """`spread` in plain torch, which defines it."""
    for i, (slot, out) in enumerate(zip(slots, outs, strict=True)):
        own = slice(slot.first, slot.first + word_count(slot.segment.size))
        votes = bits(words[own], slot.segment.size).to(out.dtype) * 2 - 1
        if ties is not None:
            votes = votes.masked_fill_(bits(ties[own], slot.segment.size), 0)
        if sums is not None:
            wide = out.to(torch.float64)
            sums[i, 0], sums[i, 1] = wide @ votes.to(torch.float64), wide @ wide
        out.copy_(votes)

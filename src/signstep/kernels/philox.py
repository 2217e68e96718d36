"""Philox4x32-10, the counter-based random number generator behind every draw in signstep.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, and its reference
implementation Random123, whose known-answer vectors the tests check.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int], rounds: int = 10) -> Words:
    """Return the four 32-bit words of one Philox block for every counter.

    Args:
        counter: four int64 tensors of one shape (or that broadcast), each value in [0, 2^32).
        key: two integers in [0, 2^32).
        rounds: 10, unless a test looks at a weaker one.

    Returns:
        Four int64 tensors with values in [0, 2^32), a pure function of counter and key.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [hex(int(w)) for w in philox4x32((zero, zero, zero, zero), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    shape = torch.broadcast_shapes(*(c.shape for c in counter))  # type: ignore[no-untyped-call]
    device = next((c.device for c in counter if c.ndim > 0), counter[0].device)
    # A step on the CPU has no dimensions, so that it may be added to what is on any device.
    c0, c1, c2, c3 = (torch.zeros(shape, dtype=torch.int64, device=device).add_(c) for c in counter)
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    k0, k1 = key
    for _ in range(rounds):
        # int64 holds the unsigned 64-bit product bit for bit: the multiplication wraps, and the mask drops the sign.
        # Of c1 and c3 only the low 32 bits count.
        torch.mul(c0, _MULTIPLIERS[0], out=p0)
        torch.mul(c2, _MULTIPLIERS[1], out=p1)
        torch.bitwise_right_shift(p1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(p0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3, p0, p1 = p1, p0, c3, c1
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)

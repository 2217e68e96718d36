"""The noise of `signstep.kernels.reference` on CPUs, drawn many times faster and with the same result.

- U < T is decided by the first 8 bits of U and a float32 estimate of T, but for about 1 element in 250, for which these
  do not tell: only for those are the other 24 bits drawn and T computed as the reference does.
- Numbers of 8 and 16 bits are cut from Philox's words by looking at the same memory in another type.
- `chunk` elements are drawn at a time, so that what is computed stays in the caches.

On other devices the host would wait for the number of elements that do not tell, so that there, and inside tensor
subclasses, everything is left to the reference.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from signstep.kernels import reference
from signstep.kernels.philox import philox4x32
from signstep.kernels.reference import LOW_BITS, TOP_BITS, Segment, blocks, in_pieces

SLACK = 2.0**-4
"""More than 256 times the estimate of Phi is off."""
_A, _B = 0.070566, torch.tensor(1.5976, dtype=torch.float32, device="cpu")
_PER_THREAD, _IN_CACHE = 1 << 19, 1 << 17
"""Elements per thread that are drawn, and that are decided, at a time."""


def chunk() -> int:
    """Elements drawn at a time: torch gives a thread no less than 2^15 blocks, which have 16 bytes each."""
    return min(reference.CHUNK, _PER_THREAD * torch.get_num_threads())


def directions(
    ms: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    segments: Sequence[Segment],
    *,
    seed: int,
    step: Tensor,
    position: str,
    law: str = "gaussian",
) -> list[Tensor]:
    """See `signstep.kernels.reference.directions`."""
    # A sigma that is 0 or not finite makes z infinite or NaN where m is neither: the reference says what that means.
    if position != "pre" or not _here(*ms, *sigmas) or not all(0 < float(s.detach()) < math.inf for s in sigmas):
        return reference.directions(ms, sigmas, segments, seed=seed, step=step, position=position, law=law)
    room = _Room(min(chunk(), sum(m.numel() for m in ms)))
    spreads = [reference.spread(sigma, law) for sigma in sigmas]

    def drawn(pieces: list[Tensor], covered: list[Segment], owners: list[int]) -> Tensor:
        narrow = [m.to(torch.float32) for m in pieces]
        return _draw(narrow, [spreads[i] for i in owners], covered, seed, step, law, room)

    with torch.no_grad():  # which the signs have no use for, and out= forbids
        return in_pieces(ms, segments, torch.float32, drawn, chunk())


def noise_bytes(
    segments: Sequence[Segment], stream: int, *, seed: int, step: Tensor, device: torch.device
) -> list[Tensor]:
    """See `signstep.kernels.reference.noise_bytes`, but int32."""
    if not _here(step) or device.type != "cpu":
        drawn = reference.noise_bytes(segments, stream, seed=seed, step=step, device=device)
        return [x.to(torch.int32) for x in drawn]
    return _numbers(segments, torch.uint8, stream, seed, step)


def noise_halves(
    segments: Sequence[Segment], stream: int, *, seed: int, step: Tensor, device: torch.device
) -> list[Tensor]:
    """See `signstep.kernels.reference.noise_halves`, but int32."""
    if not _here(step) or device.type != "cpu":
        drawn = reference.noise_halves(segments, stream, seed=seed, step=step, device=device)
        return [x.to(torch.int32) for x in drawn]
    return [x.bitwise_and_(0xFFFF) for x in _numbers(segments, torch.int16, stream, seed, step)]


def _here(*xs: Tensor) -> bool:
    """Whether this file can draw for these: a compiler cannot trace it."""
    if torch.compiler.is_compiling() or sys.byteorder != "little":
        return False
    return all(type(x) is Tensor and x.device.type == "cpu" for x in xs)


class _Room:
    """Memory for so many elements, which all chunks of a call use in turn."""

    def __init__(self, size: int) -> None:
        self.z = torch.empty(size, dtype=torch.float32, device="cpu")
        self.out = torch.empty_like(self.z)
        self.byte = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.ties = torch.zeros(-(-size // 8) * 8, dtype=torch.bool, device="cpu")


def _draw(
    ms: list[Tensor], spreads: list[Tensor], segments: list[Segment], seed: int, step: Tensor, law: str, room: _Room
) -> Tensor:
    """`reference.directions` of float32 vectors with noise before the sign, one after another in one vector.

    The result is in `room` until the next call.
    """
    sizes = [m.numel() for m in ms]
    total = sum(sizes)
    m = ms[0] if len(ms) == 1 else torch.cat(ms)
    z, byte, out = room.z[:total], room.byte[:total], room.out[:total]
    for x, spread, quotient in zip(ms, spreads, torch.split(z, sizes), strict=True):
        torch.div(x, spread, out=quotient)
    for cut, numbers in zip(torch.split(byte, sizes), _cut(segments, torch.uint8, TOP_BITS, seed, step), strict=True):
        cut.copy_(numbers)
    ties = room.ties[: -(-total // 8) * 8]
    ties[total:] = False
    few = _IN_CACHE * torch.get_num_threads()
    for a, b, c, d, e in zip(*(torch.split(x, few) for x in (m, z, byte, out, ties[:total])), strict=True):
        _estimate(a, b, c, d, e, law)
    tied = _true(ties)
    decided = _decide(z[tied], byte[tied].to(torch.int64), tied, segments, sizes, seed, step, law)
    out[tied] = _masked(decided, m[tied], torch.empty_like(decided))
    return out


def _estimate(m: Tensor, z: Tensor, byte: Tensor, out: Tensor, ties: Tensor, law: str) -> None:
    """Write the directions as 8 bits and an approximate chance of +1 have them, and for which elements these do not
    tell.
    """
    if law == "uniform":
        torch.mul(z, 0.5, out=out).add_(0.5)
    else:
        # Phi(z) is the logistic function of a z^3 + b z within 1.41e-4.
        torch.addcmul(_B, z, z, value=_A, out=out).mul_(z).sigmoid_()
    # Less the middle of the byte's 256th.
    scratch = byte.to(torch.float32)
    out.sub_(scratch, alpha=1 / 256).sub_(0.5 / 256)
    # Comparisons whose result is a float are vectorised.
    ties.copy_(torch.abs(out, out=scratch).le_((0.5 + SLACK) / 256))
    _masked(out, m, scratch)


def _masked(above: Tensor, m: Tensor, scratch: Tensor) -> Tensor:
    """The sign of above, in place, but 0 where m is 0 and NaN where m is not finite."""
    # First times 0, then the sign: it makes -0 a +0.
    above.mul_(torch.ne(m, 0, out=scratch)).sign_().add_(m, alpha=0)
    return above


def _decide(
    z: Tensor, top: Tensor, where: Tensor, segments: list[Segment], sizes: list[int], seed: int, step: Tensor, law: str
) -> Tensor:
    """1 where U < T and -1 elsewhere, as the reference decides it, for the elements at these places of a chunk."""

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device="cpu")

    ends = integers(sizes).cumsum(0)
    owner = torch.bucketize(where, ends, right=True)
    shifts = integers([s.start for s in segments]) - ends + integers(sizes)
    element = where + shifts[owner]
    parameter = integers([s.parameter for s in segments])[owner]
    mask = 0xFFFFFFFF
    counter = ((element >> 2) & mask, step & mask, parameter & mask, torch.full_like(element, LOW_BITS))
    words = torch.stack(philox4x32(counter, (seed & mask, seed >> 32)))
    low = words.gather(0, (element & 3)[None])[0] & 0xFFFFFF
    return reference.less(top, low, reference.threshold(z, law)).to(torch.float32).mul_(2).sub_(1)


def _true(flags: Tensor) -> Tensor:
    """Where flags, bool [n] with n a multiple of 8, are True: for the few that are, 8 are looked at in one."""
    eights = flags.view(torch.int64).nonzero().flatten()
    among = flags.view(-1, 8)[eights].nonzero()
    return eights[among[:, 0]] * 8 + among[:, 1]


def _numbers(segments: Sequence[Segment], dtype: torch.dtype, stream: int, seed: int, step: Tensor) -> list[Tensor]:
    """`_cut` of all elements, chunk by chunk, converted to int32."""
    out = [torch.empty(s.size, dtype=torch.int32, device="cpu") for s in segments]
    most = chunk()
    for segment, numbers in zip(segments, out, strict=True):
        for first in range(0, segment.size, most):
            size = min(most, segment.size - first)
            (cut,) = _cut([Segment(segment.parameter, segment.start + first, size)], dtype, stream, seed, step)
            numbers[first : first + size] = cut
    return out


def _cut(segments: Sequence[Segment], dtype: torch.dtype, stream: int, seed: int, step: Tensor) -> list[Tensor]:
    """As many bits as dtype has for every element: the words of its blocks, cut from below."""
    per_block = 16 // dtype.itemsize
    out = []
    for segment, words in zip(
        segments, blocks(segments, per_block, stream, seed, step, torch.device("cpu")), strict=True
    ):
        joined = torch.empty(words[0].numel(), 4, dtype=torch.int32, device="cpu")
        for i, word in enumerate(words):
            joined[:, i] = word
        out.append(joined.view(dtype).flatten().narrow(0, segment.start % per_block, segment.size))
    return out

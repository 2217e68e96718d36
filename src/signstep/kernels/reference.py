"""The sign decision in plain torch: this file defines what every engine computes.

Element e of parameter p at step k under a seed owns one uniform 32-bit integer U. With the 64-bit seed as Philox key
and the counter (block, k, p, stream),

- its top 8 bits are byte e % 16 of block e // 16 of stream 0 (byte 0 is the low byte of word 0),
- its low 24 bits are the low 24 bits of word e % 4 of block e // 4 of stream 1,

so U depends on nothing else: not on the device, the order of the tensors, how a tensor is sharded or which steps ran
before. The low 24 bits matter only where the top 8 tie with the threshold's, 1 decision in 256; a fast engine draws
them only there. Stream 2 has the bytes that round the momentum, laid out as stream 0; streams 3 and 4 have the
coins of `signstep.kernels.bits`; stream 5 has the 16 bits that round a bfloat16 parameter, half-word e % 8 of block
e // 8 (half-word 0 is the lower half of word 0); 256 and 257 seed the rounding of compressors. Indices are modulo 2^32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from signstep.kernels.philox import Words, philox4x32

TOP_BITS, LOW_BITS, ROUNDING, ZERO_COINS, TIE_COINS, PARAM_ROUNDING = range(6)
"""Stream numbers, the last word of the counter."""

_MASK = 0xFFFFFFFF
CHUNK = 1 << 22
"""Elements whose noise is drawn at a time, which bounds its memory to some 350 MB."""


class Segment(NamedTuple):
    """A run of consecutive elements of one parameter."""

    parameter: int
    """Ordinal of the parameter over all param_groups."""
    start: int
    """Row-major index, in the whole parameter, of the first element."""
    size: int


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest float type that the device computes in: float64 but for MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def blocks(
    segments: Sequence[Segment], per_block: int, stream: int, seed: int, step: Tensor, device: torch.device
) -> list[Words]:
    """The Philox blocks that cover each segment, all segments in one call."""
    ranges = [(s.start // per_block, -(-(s.start + s.size) // per_block)) for s in segments]
    index = torch.cat([torch.arange(a, b, device=device) for a, b in ranges])
    parameter = torch.cat(
        [
            torch.full((b - a,), s.parameter, dtype=torch.int64, device=device)
            for s, (a, b) in zip(segments, ranges, strict=True)
        ]
    )
    last = torch.full_like(index, stream)
    words = philox4x32((index & _MASK, step & _MASK, parameter & _MASK, last), (seed & _MASK, seed >> 32))
    split = [torch.split(w, [b - a for a, b in ranges]) for w in words]
    return [(split[0][i], split[1][i], split[2][i], split[3][i]) for i in range(len(segments))]


def noise_bytes(
    segments: Sequence[Segment], stream: int, *, seed: int, step: Tensor, device: torch.device
) -> list[Tensor]:
    """A byte for every element, int64 in [0, 256), one 1-D tensor per segment: in `TOP_BITS` the top 8 bits of U."""
    return _cut_words(segments, 8, stream, seed, step, device)


def noise_halves(
    segments: Sequence[Segment], stream: int, *, seed: int, step: Tensor, device: torch.device
) -> list[Tensor]:
    """16 bits for every element, int64 in [0, 2^16), one 1-D tensor per segment."""
    return _cut_words(segments, 16, stream, seed, step, device)


def low_bits(segments: Sequence[Segment], *, seed: int, step: Tensor, device: torch.device) -> list[Tensor]:
    """The low 24 bits of U for every element, int64 in [0, 2^24), one 1-D tensor per segment."""
    return [word & 0xFFFFFF for word in _cut_words(segments, 32, LOW_BITS, seed, step, device)]


def _cut_words(
    segments: Sequence[Segment], bits: int, stream: int, seed: int, step: Tensor, device: torch.device
) -> list[Tensor]:
    """So many bits for every element, one 1-D int64 tensor per segment: the words of its blocks, cut from below."""
    per_block, mask = 128 // bits, (1 << bits) - 1
    out = []
    for segment, words in zip(segments, blocks(segments, per_block, stream, seed, step, device), strict=True):
        cut = torch.stack([(w >> j) & mask for w in words for j in range(0, 32, bits)], dim=1).flatten()
        out.append(cut.narrow(0, segment.start % per_block, segment.size))
    return out


def spread(sigma: Tensor, law: str) -> Tensor:
    r"""What a momentum is divided by, float32 as sigma is: sigma, or for uniform noise :math:`\Delta = \sqrt3\,\sigma`.

    Uniform noise on [-Delta, Delta] has the standard deviation sigma.
    """
    return sigma * math.sqrt(3) if law == "uniform" else sigma


def threshold(z: Tensor, law: str = "gaussian") -> Tensor:
    r"""T = floor(2^32 P), int64 in [0, 2^32], with P the chance of +1 where m is z times the `spread`.

    P is Phi(z), the standard normal distribution function; for uniform noise (1 + z) / 2, between 0 and 1. Then
    T is 2^31 + floor(2^31 z), which is exact: z is a float32, and its product with a power of 2 is not rounded.
    """
    wide = z.to(wide_dtype(z.device))
    if law == "uniform":
        return (wide * 2.0**31).floor().clamp(-(2.0**31), 2.0**31).to(torch.int64) + (1 << 31)
    probability: Tensor = torch.special.erfc(wide * -math.sqrt(0.5)) * 0.5
    return (probability * 2.0**32).floor().to(torch.int64)


def less(top: Tensor, low: Tensor, t: Tensor) -> Tensor:
    """U < T decided by 8 bits and, where they tie, by 24 more: the same as comparing (top << 24 | low) with T."""
    t_top = t >> 24
    return (top < t_top) | ((top == t_top) & (low < (t & 0xFFFFFF)))


def sign(m: Tensor) -> Tensor:
    """The sign of m: 0 at 0, and NaN where m is not finite (torch.sign turns NaN into 0 and hides it)."""
    return torch.where(m.isfinite(), torch.sign(m), math.nan)


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
    """The dithered directions that replace sign(m), for tensors on one device.

    "pre" is sign(m + xi) with xi ~ N(0, sigma^2), drawn as +1 exactly when U < floor(2^32 Phi(m / sigma)), which has
    the same law (Algorithm 1, line 7). "post" is sign(m) + xi (eq. 10) with xi = sigma Phi^-1((U + 1/2) / 2^32). Both
    are 0 where m is exactly 0 and NaN where m is not finite.

    Of the "uniform" law xi is uniform on [-Delta, Delta] with Delta = sqrt(3) sigma. "pre" is +1 exactly when
    U < floor(2^32 clip((1 + m / Delta) / 2, 0, 1)), and "post" has xi = Delta (2 (U + 1/2) / 2^32 - 1). Delta and
    m / Delta are rounded to float32. The rest of "pre" is exact, so that all engines decide alike.

    Args:
        ms: momentum (or gradient) tensors, any real float dtype and shape; elements count in row-major order.
        sigmas: for each, the noise's standard deviation, a 0-dim float tensor in the units of m ("pre") or of the step
        ("post").
        segments: for each, which elements of which parameter it holds.
        seed: in [0, 2^64).
        step: 0-dim int64 tensor, the step count k.
        position: "pre" or "post".
        law: "gaussian" or "uniform".

    Returns:
        For each, a float32 tensor of its shape.
    """
    spreads = [spread(sigma, law) for sigma in sigmas]

    def drawn(pieces: list[Tensor], covered: list[Segment], owners: list[int]) -> Tensor:
        narrow = [m.to(torch.float32) for m in pieces]
        return _draw(narrow, [spreads[i] for i in owners], covered, seed, step, position, law)

    return in_pieces(ms, segments, torch.float32, drawn)


def expected_sign(m: Tensor, sigma: Tensor, law: str = "gaussian") -> Tensor:
    r"""Expected dithered sign, Sec. IV: :math:`E\,\mathrm{sign}(m + \xi) = 2\Phi(m/\sigma) - 1`.

    Under uniform noise it is linear up to :math:`\Delta = \sqrt3\,\sigma`, :math:`\mathrm{clip}(m/\Delta, -1, 1)`
    (Schuchman 1964).

    Args:
        m: momentum, any shape, a real float dtype.
        sigma: 0-dim tensor >= 0; at 0 the result is sign(m).
        law: "gaussian" or "uniform".

    Returns:
        A float32 tensor of m's shape in [-1, 1]; 0 where m is 0.
    """
    narrow, width = m.to(torch.float32), spread(sigma, law)
    # No division by 0, whose derivative is not a number.
    z = narrow / torch.where(width == 0, 1.0, width)
    mean = z.clamp(-1, 1) if law == "uniform" else torch.special.erf(z * math.sqrt(0.5))
    return torch.where(narrow == 0, 0.0, torch.where(width == 0, torch.sign(narrow), mean))


def expected_direction(m: Tensor, sigma: Tensor, law: str = "gaussian") -> Tensor:
    """`expected_sign` as a step: NaN where m is not finite, as `sign` is."""
    return torch.where(m.to(torch.float32).isfinite(), expected_sign(m, sigma, law), math.nan)


def in_pieces(
    xs: Sequence[Tensor],
    segments: Sequence[Segment],
    dtype: torch.dtype,
    compute: Callable[[list[Tensor], list[Segment], list[int]], Tensor],
    chunk: int | None = None,
) -> list[Tensor]:
    """What a function makes of every element, so many elements a call: for each x a new tensor of its shape.

    Args:
        xs: tensors on one device; elements count in row-major order.
        segments: for each, which elements of which parameter it holds.
        dtype: of the results.
        compute: takes pieces of the xs as vectors, their segments, and the index of the x of each; returns the results,
            one after another in one vector.
        chunk: elements of a call; None: `CHUNK`.
    """
    out = [torch.empty(x.shape, dtype=dtype, device=x.device) for x in xs]
    flat_in, flat_out = [x.reshape(-1) for x in xs], [y.view(-1) for y in out]
    for pieces in _pieces([x.numel() for x in xs], chunk or CHUNK):
        computed = compute(
            [flat_in[i][a:b] for i, a, b in pieces],
            [Segment(segments[i].parameter, segments[i].start + a, b - a) for i, a, b in pieces],
            [i for i, _, _ in pieces],
        )
        for (i, a, b), piece in zip(pieces, torch.split(computed, [b - a for _, a, b in pieces]), strict=True):
            flat_out[i][a:b] = piece
    return out


def _pieces(sizes: Sequence[int], chunk: int) -> list[list[tuple[int, int, int]]]:
    """All elements of tensors of these sizes, in order, as lists of (tensor, first, end), `chunk` elements a list."""
    lists: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, size in enumerate(sizes):
        first = 0
        while first < size:
            if room == 0:
                lists.append([])
                room = chunk
            end = min(size, first + room)
            lists[-1].append((i, first, end))
            room -= end - first
            first = end
    return lists


def _draw(
    ms: list[Tensor],
    spreads: list[Tensor],
    segments: list[Segment],
    seed: int,
    step: Tensor,
    position: str,
    law: str,
) -> Tensor:
    """`directions` of float32 vectors, one after another in one vector."""
    sizes = [m.numel() for m in ms]
    device = ms[0].device
    m = torch.cat(ms)
    top = torch.cat(noise_bytes(segments, TOP_BITS, seed=seed, step=step, device=device))
    low = torch.cat(low_bits(segments, seed=seed, step=step, device=device))
    # Each spread stays where it is: a 0-dim CPU tensor reaches a GPU kernel without a copy that the host waits for.
    if position == "pre":
        z = torch.cat([x / s for x, s in zip(ms, spreads, strict=True)])
        signs = torch.where(less(top, low, threshold(z, law)), 1.0, -1.0)
        flat = torch.where(z.isnan(), math.nan, signs)  # sigma is not a number: the rms of a tensor with such elements
    else:
        wide = wide_dtype(device)
        u = (top << 24) | low
        if law == "uniform":
            unit = ((u - (1 << 31)).to(wide) + 0.5) * 2.0**-31
        else:
            chance = (u.to(wide) + 0.5) * 2.0**-32
            if wide == torch.float32:
                chance = chance.clamp(max=1 - 2.0**-24)  # which else rounds to 1, and the noise to infinity
            unit = torch.special.ndtri(chance)
        units = torch.split(unit.to(torch.float32), sizes)
        xi = torch.cat([x * s for x, s in zip(units, spreads, strict=True)])
        flat = torch.sign(m) + xi
    # torch.where, not arithmetic: the compiler may take m * 0 for 0 although m is NaN.
    return torch.where(m.isfinite(), torch.where(m == 0, 0.0, flat), math.nan)

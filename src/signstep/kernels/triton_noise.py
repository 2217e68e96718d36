"""Shared parts of the Triton kernels: whether Triton is there, how numbers reach a kernel, and the noise.

The noise is that of `signstep.kernels.reference`: the same Philox words, and Phi and its inverse by polynomials.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below are then never called
    triton = None

_OLDEST = (3, 2)


def unavailable() -> str | None:
    """Why the engine cannot be used here, one sentence; None if it can."""
    if triton is None:
        return "Triton is not installed: pip install triton"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _OLDEST:
        return f"Triton {triton.__version__} is too old: pip install 'triton>={_OLDEST[0]}.{_OLDEST[1]}'"
    return None


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """triton.jit, or nothing where there is no Triton."""
    return lambda function: function if triton is None else triton.jit(**options)(function)


def on_host(x: float | Tensor) -> bool:
    """Whether the host can read a number without waiting for the device."""
    return not isinstance(x, Tensor) or x.device.type == "cpu"


def argument(x: float | Tensor, device: torch.device) -> tuple[float | Tensor, Tensor | None]:
    """A number and None, or a placeholder and where on the device the number is, which the host must not wait for."""
    if on_host(x):
        return x, None
    assert isinstance(x, Tensor)
    return 0, x.to(device)


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for a dtype of torch."""
    return getattr(tl, str(dtype).removeprefix("torch."))


# --- noise, see kernels/reference.py ---------------------------------------------------------------------------------


@jit()
def philox(block: tl.tensor, stream: tl.constexpr, seed: tl.tensor, step: tl.tensor, ordinal: tl.tensor) -> tl.tensor:
    """Philox4x32-10 as in kernels/philox.py. (tl.philox multiplies twice for the two halves of a product.)"""
    c0 = block
    c1 = step
    c2 = ordinal
    c3 = tl.full([], stream, tl.uint32)
    k0 = seed
    k1 = seed >> 32
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1.to(tl.uint32)
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit()
def _pick(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor, i: tl.tensor) -> tl.tensor:
    return tl.where(i < 2, tl.where(i == 0, w0, w1), tl.where(i == 2, w2, w3))


@jit()
def _in_sequence(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor) -> tl.tensor:
    """The four words of each Philox block, one after another."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [4 * w0.shape[0]])


@jit()
def noise_bits(
    first: tl.tensor,
    local: tl.tensor,
    stream: tl.constexpr,
    seed: tl.tensor,
    step: tl.tensor,
    ordinal: tl.tensor,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """8 or 16 bits per element, the upper ones of a uint32 [ROWS, 256]: with N = 128 // BITS, number e % N of block
    e // N.

    ALIGNED says that the first element is a multiple of 16, so that one block serves N elements; else every element
    computes its own.
    """
    IN_WORD: tl.constexpr = 32 // BITS
    if ALIGNED:
        block = (first // (4 * IN_WORD) + tl.arange(0, ROWS * 64 // IN_WORD)).to(tl.uint32)
        w0, w1, w2, w3 = philox(block, stream, seed, step, ordinal)
        words = _in_sequence(w0, w1, w2, w3)
        shift = (32 - BITS - BITS * tl.arange(0, IN_WORD)).to(tl.uint32)
        result = tl.reshape(words[:, None] << shift[None, :], [ROWS, 256])
    else:
        element = first + local
        w0, w1, w2, w3 = philox((element // (4 * IN_WORD)).to(tl.uint32), stream, seed, step, ordinal)
        word = _pick(w0, w1, w2, w3, element // IN_WORD % 4)
        result = word << (32 - BITS - BITS * (element % IN_WORD)).to(tl.uint32)
    return result


@jit()
def uniform(
    first: tl.tensor,
    local: tl.tensor,
    seed: tl.tensor,
    step: tl.tensor,
    ordinal: tl.tensor,
    ROWS: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """U, uint32 [ROWS, 256]: 8 bits of stream 0 and the low 24 of word e % 4 of block e // 4 of stream 1."""
    if ALIGNED:
        block = (first // 4 + tl.arange(0, ROWS * 64)).to(tl.uint32)
        w0, w1, w2, w3 = philox(block, 1, seed, step, ordinal)
        low = tl.reshape(_in_sequence(w0, w1, w2, w3), [ROWS, 256])
    else:
        element = first + local
        w0, w1, w2, w3 = philox((element // 4).to(tl.uint32), 1, seed, step, ordinal)
        low = _pick(w0, w1, w2, w3, element % 4)
    top = noise_bits(first, local, 0, seed, step, ordinal, 8, ROWS, ALIGNED)
    return (top & 0xFF000000) | (low & 0xFFFFFF)


@jit()
def below_line(u: tl.tensor, z: tl.tensor) -> tl.tensor:
    """U < 2^31 + floor(2^31 z), exactly, for a float32 z."""
    # Below 2^31 in size, the floor is an integer that float32 holds.
    line = tl.floor(tl.minimum(tl.maximum(z, -1.0), 1.0) * 2147483648.0).to(tl.int64)
    return u.to(tl.int64) < line + 2147483648


@jit()
def clip(z: tl.tensor) -> tl.tensor:
    """Z between -1 and 1; a NaN stays."""
    most = tl.where(z > 1.0, 1.0, z)
    return tl.where(most < -1.0, -1.0, most)


@jit()
def centred(u: tl.tensor) -> tl.tensor:
    """2 (U + 1/2) / 2^32 - 1."""
    return ((u ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 2.0**-31


@jit()
def erf(x: tl.tensor) -> tl.tensor:
    """Erf to 1e-7, by a polynomial for log2 erfc: half as many instructions as a library's, which is as good near 0."""
    size = tl.abs(x)
    y = tl.fma(tl.full(x.shape, -4.5358612e-05, tl.float32), size, 0.000445507706)
    y = tl.fma(y, size, -0.00148944168)
    y = tl.fma(y, size, -0.000774629779)
    y = tl.fma(y, size, 0.0282536813)
    y = tl.fma(y, size, -0.148481615)
    y = tl.fma(y, size, -0.918416393)
    y = tl.fma(y, size, -1.62790859)
    positive = 1.0 - tl.exp2(y * size)
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return (positive.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@jit()
def below_curve(u: tl.tensor, x: tl.tensor) -> tl.tensor:
    """U < 2^32 Phi(sqrt(2) x) by the upper 24 bits, which float32 holds; at an infinite x it is the sign."""
    return (u >> 8).to(tl.float32) < tl.fma(erf(x), 8388608.0, 8388608.0)


@jit()
def normal(u: tl.tensor) -> tl.tensor:
    """Phi^-1((U + 1/2) / 2^32) to 5e-7 of itself.

    With s = 2 Phi - 1: s P(w), w = -log(1 - s^2), as Giles, "Approximating the erfinv function" (2012), computes
    sqrt(2) erfinv(s); the coefficients are fitted anew, because his are for |s| <= 1 - 2^-24.
    """
    # U - 2^31, and the nearer of U and 2^32 - 1 - U: float32 resolves both where they are small.
    nearer = tl.where(u < 0x80000000, u, u ^ 0xFFFFFFFF)
    s = centred(u)
    tail = (nearer.to(tl.float32) + 0.5) * 2.0**-32
    w = -tl.log(4.0 * tail * (1.0 - tail))
    x = w - 2.5
    centre = tl.fma(tl.full(x.shape, 4.03460605e-08, tl.float32), x, 4.86090749e-07)
    centre = tl.fma(centre, x, -4.99046321e-06)
    centre = tl.fma(centre, x, -6.21785208e-06)
    centre = tl.fma(centre, x, 0.000309149831)
    centre = tl.fma(centre, x, -0.00177301058)
    centre = tl.fma(centre, x, -0.00590817055)
    centre = tl.fma(centre, x, 0.34880266)
    centre = tl.fma(centre, x, 2.12331357)
    x = tl.sqrt_rn(w) - 3.0
    far = tl.fma(tl.full(x.shape, -2.99194622e-05, tl.float32), x, -0.000157672669)
    far = tl.fma(far, x, 0.00162357271)
    far = tl.fma(far, x, -0.00484826588)
    far = tl.fma(far, x, 0.00822829474)
    far = tl.fma(far, x, -0.0108963425)
    far = tl.fma(far, x, 0.0133303181)
    far = tl.fma(far, x, 1.41659073)
    far = tl.fma(far, x, 4.00643502)
    return s * tl.where(w < 5.0, centre, far)

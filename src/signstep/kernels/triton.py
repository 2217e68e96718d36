"""The Triton engine: the step of all tensors of a dtype in one launch and one pass over memory, for CUDA and ROCm.

A program steps `BLOCK` consecutive elements of one tensor, as rows of 256. Which tensor, and where its elements are,
it reads in two tables on the device: one launch serves any number of tensors. Sums over elements are formed by each
program, and by a second kernel over a tensor's programs in their order: no result depends on which program ran first.

Nothing here waits for the device. Of the kernels' arguments only numbers change from step to step, so each is compiled
once, and with ``capturable=True`` a kernel reads them on the device, so that a CUDA graph of a step can be replayed.
"""

from __future__ import annotations

import struct
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from signstep.kernels.engine import Options, Tensors
from signstep.kernels.layout import laid_out, order_is_free
from signstep.kernels.momentum import BLOCK as ROW
from signstep.kernels.momentum import STOCHASTIC
from signstep.kernels.rounding import rounds_at_random
from signstep.kernels.triton_noise import (
    argument,
    below_curve,
    below_line,
    centred,
    clip,
    jit,
    noise_bits,
    normal,
    triton_dtype,
    unavailable,
    uniform,
)
from signstep.kernels.triton_tables import COLUMNS, tables

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below are then never called
    triton = None

ROWS = 8
"""Rows of 256 elements that a program steps."""
BLOCK = ROWS * ROW
_WARPS = 4
_REDUCE = 4096
"""Programs whose sums the second kernel adds at a time."""


# --- the step --------------------------------------------------------------------------------------------------------


@jit()
def _number(bits: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """A number that the host passes as `_bits`."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(DTYPE)


@jit()
def _number_or(bits: tl.tensor, at: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """A number that the host passes, or the one at an address on the device."""
    return _number(bits, DTYPE) if at is None else tl.load(at).to(DTYPE)


@jit()
def _load(address: tl.tensor, inside: tl.tensor, FULL: tl.constexpr) -> tl.tensor:
    # A mask that may end anywhere would keep the compiler from loading vectors.
    return tl.load(address) if FULL else tl.load(address, mask=inside, other=0)


@jit()
def _store(address: tl.tensor, value: tl.tensor, inside: tl.tensor, FULL: tl.constexpr) -> None:
    if FULL:
        tl.store(address, value)
    else:
        tl.store(address, value, mask=inside)


@jit()
def _address(
    row: tl.tensor, column: tl.constexpr, first: tl.tensor, DTYPE: tl.constexpr, VECTORS: tl.constexpr
) -> tl.tensor:
    """The address of element `first` of one of the tensor's buffers."""
    base = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if VECTORS:
        base = tl.multiple_of(base, 16)
    return base + first


@jit()
def _average(m: tl.tensor, g: tl.tensor, weight: tl.tensor, SMALL: tl.constexpr) -> tl.tensor:
    """M + (1 - beta) (g - m), in the form that torch.lerp rounds: from g if the weight is not below 1/2."""
    return tl.fma(weight, g - m, m) if SMALL else tl.fma(weight - 1, g - m, g)


@jit()
def _average_or(m: tl.tensor, old: tl.tensor, g: tl.tensor, weight: tl.tensor, INTERPOLATE: tl.constexpr) -> tl.tensor:
    """What the direction is taken of: m, or an average of old momentum and gradient with a weight of its own."""
    return m if INTERPOLATE == "no" else _average(old, g, weight, INTERPOLATE == "small")


@jit()
def _sign(m: tl.tensor) -> tl.tensor:
    return tl.where(m > 0, 1.0, 0.0).to(m.dtype) - tl.where(m < 0, 1.0, 0.0).to(m.dtype)


@jit()
def _to_int8(m: tl.tensor, random: tl.tensor) -> tl.tensor:
    """8-bit momentum and its scales, one per row: see `signstep.kernels.momentum`."""
    # Of the bits: a NaN is larger than infinity, and that than all numbers.
    largest = tl.max(m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, 127.0, tl.float32))
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    units = m * tl.where(scale < 2.0**-120, 0.0, inverse)[:, None]
    units = tl.where(units == units, units, 0.0)
    # floor, for what lies above -128: truncation of a positive number.
    shifted = (units + ((random >> 24).to(tl.float32) + 0.5) * 2.0**-8 + 128.0).to(tl.int32) - 128
    return tl.minimum(shifted, 127).to(tl.int8), scale


@jit()
def _to_bfloat16_bits(x: tl.tensor, random: tl.tensor) -> tl.tensor:
    """A float32 rounded up or down to bfloat16 by a number below 2^16: see `signstep.kernels.rounding`."""
    # With one NaN for all, the sum cannot overflow.
    bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
    return ((bits + random) >> 16).to(tl.uint16)


@jit()
def _step_elements(
    row: tl.tensor,
    partial: tl.tensor,
    first: tl.tensor,
    size: tl.tensor,
    rate: tl.tensor,
    decay: tl.tensor,
    coupled_decay: tl.tensor,
    weight: tl.tensor,
    direction_weight: tl.tensor,
    sigma: tl.tensor,
    seed: tl.tensor,
    step: tl.tensor,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    WIDE: tl.constexpr,
    KEPT: tl.constexpr,
    DIRECTION: tl.constexpr,
    UNIFORM: tl.constexpr,
    RELATIVE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COUPLED: tl.constexpr,
    SMALL: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    MEASURED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,
) -> None:
    rows = tl.arange(0, ROWS)
    local = rows[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = first + local < size
    param_at = _address(row, 0, first, PARAM, VECTORS) + local
    grad_at = _address(row, 1, first, PARAM, VECTORS) + local
    p = _load(param_at, inside, FULL).to(WIDE)
    g = _load(grad_at, inside, FULL).to(WIDE)
    if MAXIMIZE:
        g = -g
    if COUPLED:
        g = tl.fma(coupled_decay, p, g)

    element = tl.load(row + 6) + first
    ordinal = tl.load(row + 7).to(tl.uint32)
    m = g
    if KEPT != "none":
        state_at = _address(row, 2, first, STATE, VECTORS) + local
        old = _load(state_at, inside, FULL)
        if KEPT == "nearest":
            old = old.to(WIDE)
            kept = _average(old, g, weight, SMALL).to(STATE)
            _store(state_at, kept, inside, FULL)
            m = _average_or(kept.to(WIDE), old, g, direction_weight, INTERPOLATE)
        else:
            random = noise_bits(element, local, 2, seed, step, ordinal, 8, ROWS, ALIGNED)
            if KEPT == "int8":
                scale_at = _address(row, 3, first // 256, tl.float32, False) + rows
                has_row = first + rows * 256 < size
                scale = _load(scale_at, has_row, FULL)
                old = (old.to(tl.float32) * scale[:, None]).to(WIDE)
                m = _average(old, g, weight, SMALL)
                quantised, scale = _to_int8(m.to(tl.float32), random)
                _store(state_at, quantised, inside, FULL)
                _store(scale_at, scale, has_row, FULL)
            else:
                old = old.to(tl.float32).to(WIDE)
                m = _average(old, g, weight, SMALL)
                bits = _to_bfloat16_bits(m.to(tl.float32), (random >> 16 & 0xFF00) | 0x80)
                _store(state_at.to(tl.pointer_type(tl.uint16)), bits, inside, FULL)
            m = _average_or(m, old, g, direction_weight, INTERPOLATE)

    # The decision is made in float32 whatever the parameter is.
    narrow = m.to(tl.float32)
    signs = _sign(m)
    if DIRECTION == "pre" or DIRECTION == "post" or DIRECTION == "expected":
        if RELATIVE:
            sigma = sigma * tl.sqrt_rn(tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))))
        if UNIFORM:
            sigma = sigma * 1.7320508
        if DIRECTION == "post":
            u = uniform(element, local, seed, step, ordinal, ROWS, ALIGNED)
            noisy = _sign(narrow) + sigma * (centred(u) if UNIFORM else normal(u))
        else:
            if UNIFORM:
                z = tl.div_rn(narrow, sigma)
                mean = clip(z)
            else:
                z = narrow * tl.div_rn(tl.full([], 0.70710678, tl.float32), sigma)
                mean = tl.erf(z)
            if MEASURED == "expected_sign":
                signs = tl.where(narrow == 0, 0.0, mean).to(WIDE)
            noisy = mean
            if DIRECTION == "pre":
                u = uniform(element, local, seed, step, ordinal, ROWS, ALIGNED)
                up = below_line(u, z) if UNIFORM else below_curve(u, z)
                one = tl.where(sigma == sigma, 1.0, sigma)
                noisy = tl.where(up, one, -one)
        noisy = tl.where(narrow == 0, 0.0, noisy)
        # m * 0 is NaN where m is not finite.
        direction = tl.fma(narrow, 0.0, noisy).to(WIDE)
    elif DIRECTION == "sign":
        direction = tl.fma(m, 0.0, signs)
    else:
        direction = m

    if MEASURED == "sign" or MEASURED == "expected_sign":
        tl.store(partial, tl.sum(tl.sum(signs.to(WIDE) * g, axis=1), axis=0))
        tl.store(partial + 1, tl.sum(tl.sum(g * g, axis=1), axis=0))
    if RELATIVE or MEASURED == "momentum":
        tl.store(partial + 2, tl.sum(tl.sum(m * m, axis=1), axis=0))
    moved = tl.fma(-rate, direction, p * decay)
    if STOCHASTIC:
        random = noise_bits(element, local, 5, seed, step, ordinal, 16, ROWS, ALIGNED)
        bits = _to_bfloat16_bits(moved, random >> 16)
        _store(param_at.to(tl.pointer_type(tl.uint16)), bits, inside, FULL)
    else:
        _store(param_at, moved.to(PARAM), inside, FULL)


_NUMBERS = [
    *("seed", "step", "rate", "decay", "coupled_decay", "weight", "direction_weight", "sigma"),
    *("step_at", "rate_at", "decay_at", "sigma_at"),
]


@jit(do_not_specialize=_NUMBERS)
def _step_kernel(
    table: tl.tensor,
    chunks: tl.tensor,
    partials: tl.tensor,
    seed: tl.uint64,
    step: tl.uint32,
    rate: tl.int64,
    decay: tl.int64,
    coupled_decay: tl.int64,
    weight: tl.int64,
    direction_weight: tl.int64,
    sigma: tl.int64,
    step_at: tl.tensor,
    rate_at: tl.tensor,
    decay_at: tl.tensor,
    sigma_at: tl.tensor,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    WIDE: tl.constexpr,
    KEPT: tl.constexpr,
    DIRECTION: tl.constexpr,
    UNIFORM: tl.constexpr,
    RELATIVE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    COUPLED: tl.constexpr,
    SMALL: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    MEASURED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    RATES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    chunk = tl.program_id(0)
    row = table + tl.load(chunks + chunk) * COLUMNS
    size = tl.load(row + 5)
    first = (chunk - tl.load(row + 8)) * (ROWS * 256)
    partial = partials
    if RELATIVE or MEASURED != "none":
        partial = partials + chunk.to(tl.int64) * 3
    key = seed.to(tl.uint64)
    k = step.to(tl.uint32) if step_at is None else tl.load(step_at).to(tl.uint32)
    if RATES:
        rate_at += tl.load(row + 9)
    moved = _number_or(rate, rate_at, WIDE)
    shrunk = _number_or(decay, decay_at, WIDE)
    coupled = _number(coupled_decay, WIDE)
    share = _number(weight, WIDE)
    other_share = _number(direction_weight, WIDE)
    noise = _number_or(sigma, sigma_at, tl.float32)
    if first + ROWS * 256 <= size:
        _step_elements(
            row, partial, first, size, moved, shrunk, coupled, share, other_share, noise, key, k, PARAM, STATE, WIDE,
            KEPT, DIRECTION, UNIFORM, RELATIVE, MAXIMIZE, COUPLED, SMALL, INTERPOLATE, MEASURED, STOCHASTIC, VECTORS,
            ALIGNED, ROWS, True,
        )  # fmt: skip
    else:
        _step_elements(
            row, partial, first, size, moved, shrunk, coupled, share, other_share, noise, key, k, PARAM, STATE, WIDE,
            KEPT, DIRECTION, UNIFORM, RELATIVE, MAXIMIZE, COUPLED, SMALL, INTERPOLATE, MEASURED, STOCHASTIC, VECTORS,
            ALIGNED, ROWS, False,
        )  # fmt: skip


@jit()
def _reduce_kernel(
    table: tl.tensor,
    partials: tl.tensor,
    totals: tl.tensor,
    MEASURED: tl.constexpr,
    RELATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Add up one tensor's partial sums, in the order of its programs."""
    tensor = tl.program_id(0)
    row = table + tensor * COLUMNS
    size = tl.load(row + 5)
    begin = tl.load(row + 8)
    end = begin + (size + ROWS * 256 - 1) // (ROWS * 256)
    lane = tl.arange(0, WIDTH)
    inner = tl.zeros([WIDTH], tl.float64)
    norm = tl.zeros([WIDTH], tl.float64)
    square = tl.zeros([WIDTH], tl.float64)
    for start in range(begin, end, WIDTH):
        at = partials + (start + lane) * 3
        mine = start + lane < end
        if MEASURED == "sign" or MEASURED == "expected_sign":
            inner += tl.load(at, mask=mine, other=0).to(tl.float64)
            norm += tl.load(at + 1, mask=mine, other=0).to(tl.float64)
        if RELATIVE or MEASURED == "momentum":
            square += tl.load(at + 2, mask=mine, other=0).to(tl.float64)
    if MEASURED == "sign" or MEASURED == "expected_sign":
        tl.store(totals + tl.load(row + 9) * 2, tl.sum(inner, axis=0))
        tl.store(totals + tl.load(row + 9) * 2 + 1, tl.sum(norm, axis=0))
    if MEASURED == "momentum":
        tl.store(totals + tl.load(row + 9) * 2 + 1, tl.sum(square, axis=0))
    if RELATIVE:
        mean = tl.sum(square, axis=0) / tl.maximum(size, 1).to(tl.float64)
        tl.store(tl.load(row + 4).to(tl.pointer_type(tl.float32)), mean.to(tl.float32))


# --- the host's side -------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """The properties that all tensors of one launch share."""

    dtype: torch.dtype
    vectors: bool
    """All buffers begin at multiples of 16 bytes."""
    aligned: bool
    """The first element is a multiple of 16, the elements of a Philox block."""


class _Rows:
    """The table of one launch, as it is filled."""

    def __init__(self) -> None:
        self.values = array("q")
        self.chunks = 0

    def add(self, *columns: int, size: int, offset: int, ordinal: int, index: int) -> None:
        self.values.extend((*columns, size, offset, ordinal, self.chunks, index))
        self.chunks += -(-size // BLOCK)


def step(tensors: Tensors, options: Options) -> None:
    """One step of all tensors, which are on one device, in place."""
    if (reason := unavailable()) is not None:
        raise RuntimeError(reason)
    launches: dict[_Kind, _Rows] = {}
    with laid_out(tensors, options) as ready:
        columns = (ready.params, ready.grads, ready.exp_avgs, ready.scales, ready.mean_squares)
        for i, (p, ordinal, offset) in enumerate(zip(ready.params, ready.ordinals, ready.offsets, strict=True)):
            addresses = [column[i].data_ptr() if column else 0 for column in columns]
            vectors = (addresses[0] | addresses[1] | addresses[2]) % 16 == 0
            aligned = offset % 16 == 0 or order_is_free(options, p.dtype)
            table = launches.setdefault(_Kind(p.dtype, vectors, aligned), _Rows())
            table.add(*addresses, size=p.numel(), offset=offset, ordinal=ordinal, index=i)
        if ready.params:
            totals = None
            if options.sums is not None:
                totals = torch.zeros(len(ready.params), 2, dtype=torch.float64, device=ready.params[0].device)
            with torch.cuda.device_of(ready.params[0]):  # type: ignore[no-untyped-call]
                for kind, table in launches.items():
                    _launch(kind, table, tensors, options, totals)
            if options.sums is not None and totals is not None:
                options.sums.add_(totals.to(options.sums.device, options.sums.dtype))


def _launch(kind: _Kind, rows: _Rows, tensors: Tensors, options: Options, totals: Tensor | None) -> None:
    """Step the tensors of one kind, which are those of the rows, and write what is measured of them to the totals."""
    device, relative = tensors.params[0].device, bool(tensors.mean_squares)
    table, chunks = tables(rows.values.tobytes(), rows.chunks, BLOCK, device)
    wide = torch.promote_types(kind.dtype, torch.float32)
    measured = "none" if options.sums is None else options.measured.name.lower()
    summed = relative or options.sums is not None
    partials = torch.empty((rows.chunks, 3), dtype=wide, device=device) if summed else None
    step, step_at = argument(options.step, device)
    rate: float | Tensor = 0.0
    rates = isinstance(options.rate, Tensor) and options.rate.ndim == 1
    if isinstance(options.rate, Tensor) and rates:
        rate_at: Tensor | None = options.rate.to(device)
    else:
        rate, rate_at = argument(options.rate, device)
    decay, decay_at = argument(options.decay, device)
    c = options.interpolation
    sigma, sigma_at = argument(0.0 if options.sigma is None else options.sigma, device)
    if rows.chunks:
        _step_kernel[(rows.chunks,)](
            table,
            chunks,
            partials,
            seed=options.seed,
            step=int(step) & 0xFFFFFFFF,
            rate=_bits(rate),
            decay=_bits(decay),
            coupled_decay=_bits(options.coupled_weight_decay),
            weight=_bits(1 - options.momentum),
            direction_weight=_bits(1 - (c or 0.0)),
            sigma=_bits(sigma),
            step_at=step_at,
            rate_at=rate_at,
            decay_at=decay_at,
            sigma_at=sigma_at,
            PARAM=triton_dtype(kind.dtype),
            STATE=triton_dtype(options.state_dtype or kind.dtype),
            WIDE=triton_dtype(wide),
            KEPT=_kept(options.state_dtype) if tensors.exp_avgs else "none",
            DIRECTION=options.direction.name.lower(),
            UNIFORM=options.law == "uniform",
            RELATIVE=relative,
            MAXIMIZE=options.maximize,
            COUPLED=options.coupled_weight_decay != 0,
            SMALL=_is_small(1.0 - options.momentum, wide),
            INTERPOLATE="no" if c is None else "small" if _is_small(1.0 - c, wide) else "large",
            MEASURED=measured,
            STOCHASTIC=rounds_at_random(kind.dtype, options),
            VECTORS=kind.vectors,
            ALIGNED=kind.aligned,
            RATES=rates,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=_WARPS,
            # A product that is added is rounded before, as in the reference, but where tl.fma says otherwise.
            enable_fp_fusion=False,
        )
    if partials is None:
        return
    count = len(rows.values) // COLUMNS
    _reduce_kernel[(count,)](
        *(table, partials, totals),
        MEASURED=measured,
        RELATIVE=relative,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        WIDTH=_REDUCE,
        num_warps=8,
    )


def _bits(x: float | Tensor) -> int:
    """A float as the int64 of the same bits: as a float, Triton would round it to float32."""
    return int.from_bytes(struct.pack("<d", x), "little", signed=True)


def _is_small(weight: float, wide: torch.dtype) -> bool:
    """Whether an average in a dtype starts from the momentum, see `_average`."""
    return array("d" if wide == torch.float64 else "f", [weight])[0] < 0.5


def _kept(state_dtype: torch.dtype | None) -> str:
    """The kernel's name for the way in which the momentum is kept."""
    return str(state_dtype).removeprefix("torch.") if state_dtype in STOCHASTIC else "nearest"

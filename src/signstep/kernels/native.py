"""The native engine for CPUs: a library in C++ (csrc/) steps all tensors of a group in one pass over memory.

The library also casts, counts and spreads ballots. It knows nothing of torch: it gets addresses and sizes by ctypes, so
one build serves every version of torch. It uses torch's own OpenMP threads where torch has them, as many as
torch.get_num_threads().
"""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from signstep.kernels import shared_library
from signstep.kernels.engine import Measured, Options, Slot, Tensors
from signstep.kernels.layout import laid_out
from signstep.kernels.momentum import BLOCK

_ABI = 6
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATE_DTYPES = {torch.float32: 0, torch.bfloat16: 4, torch.int8: 5}
_LAWS = {"gaussian": 0, "uniform": 1}
_MOST_ROWS = (1 << 16) - 1
ISAS = {"best": 0, "portable": 1, "avx2": 2, "avx512": 3}
"""Instruction sets by name, as the library numbers them."""


class _Options(ctypes.Structure):
    _fields_ = [
        ("rate", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("coupled_decay", ctypes.c_double),
        ("gradient_weight", ctypes.c_double),
        ("direction_weight", ctypes.c_double),
        ("sigma", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("maximize", ctypes.c_int32),
        ("direction", ctypes.c_int32),
        ("sums", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("stochastic_params", ctypes.c_int32),
        ("law", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
        ("rates", ctypes.c_void_p),
    ]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    try:
        library = shared_library.load(_ABI)
    except OSError as error:
        return None, str(error)
    address, number, options = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Options)
    library.signstep_step.argtypes = [address, number, options, address]
    library.signstep_count.argtypes = [address, number, number, address, number, options, address, address]
    library.signstep_spread_votes.argtypes = [address, address, address, number, options, address]
    return library, None


def unavailable() -> str | None:
    """Why the engine cannot be used here, one sentence; None if it can.

    Raises:
        RuntimeError: as `best_isa`.
    """
    library, reason = _load()
    if library is not None:
        best_isa()
    return reason


def machine_isa() -> str:
    """The best instruction set of this machine that the library has, whatever SIGNSTEP_ISA says."""
    library, _ = _load()
    assert library is not None
    number: int = library.signstep_best_isa()
    return list(ISAS)[number]


@functools.cache
def best_isa() -> str:
    """The instruction set that the library takes: SIGNSTEP_ISA of the environment, else the best of this machine.

    Raises:
        RuntimeError: SIGNSTEP_ISA names none, or one that this machine does not have.
    """
    best = machine_isa()
    chosen = os.environ.get("SIGNSTEP_ISA") or best
    here = [isa for isa, number in ISAS.items() if 0 < number <= ISAS[best]]
    if chosen not in here:
        raise RuntimeError(
            f"SIGNSTEP_ISA={chosen}: this machine has {', '.join(here)}; set it to one of these or unset it"
        )
    return chosen


@functools.cache
def _parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch runs on; None: the library starts its own threads."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            try:
                # A search for a symbol goes on in what the library was linked with.
                return ctypes.cast(ctypes.CDLL(str(folder / name)).GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                return None
    return None


def _request(isa: str, own_threads: bool, options: Options | None = None) -> _Options:
    """The options of a call: those of every call, and with `options` those that a step and a ballot have in common."""
    number = ISAS[best_isa() if isa == "best" else isa]
    request = _Options(isa=number, threads=torch.get_num_threads(), parallel=None if own_threads else _parallel())
    if options is not None:
        request.coupled_decay = options.coupled_weight_decay
        request.gradient_weight = 1 - options.momentum
        request.direction_weight = 0.0 if options.interpolation is None else 1 - options.interpolation
        request.direction = options.direction
        request.sigma = 0.0 if options.sigma is None else float(options.sigma)
        request.seed = options.seed
        request.step = int(options.step)
        request.maximize = options.maximize
        request.stochastic_params = options.stochastic_params
        request.law = _LAWS[options.law]
    return request


_NO_MEMORY = "signstep: no memory for the list of work; nothing was changed"


def _run(function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments):
        raise MemoryError(_NO_MEMORY)


def step(tensors: Tensors, options: Options, *, isa: str = "best", own_threads: bool = False) -> None:
    """One step of all tensors, in place; `isa` and `own_threads`, here and below, are for tests and benchmarks."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    request = _request(isa, own_threads, options)
    rates = None
    if isinstance(options.rate, Tensor) and options.rate.ndim:
        rates = options.rate.to("cpu", torch.float64).contiguous()
        request.rates = rates.data_ptr()
    else:
        request.rate = float(options.rate)
    request.decay = float(options.decay)
    request.sums = 0 if options.sums is None else options.measured
    count = len(tensors.params)
    sums = None if options.sums is None else torch.empty(count, 3, dtype=torch.float64, device="cpu")
    with laid_out(tensors, options) as (params, grads, exp_avgs, scales, mean_squares, ordinals, offsets):
        table = array("q")
        for i, p in enumerate(params):
            dtype = _DTYPES[p.dtype]
            table.extend(
                (
                    p.data_ptr(),
                    grads[i].data_ptr(),
                    exp_avgs[i].data_ptr() if exp_avgs else 0,
                    scales[i].data_ptr() if scales else 0,
                    mean_squares[i].data_ptr() if mean_squares else 0,
                    0,
                    p.numel(),
                    offsets[i],
                    ordinals[i],
                    dtype,
                    dtype if options.state_dtype is None else _STATE_DTYPES[options.state_dtype],
                )
            )
        at = table.buffer_info()[0]
        if library.signstep_step(at, count, request, None if sums is None else sums.data_ptr()):
            raise MemoryError(_NO_MEMORY)
    if sums is not None and options.sums is not None:
        _add_measured(options.sums, sums, options)


def _add_measured(sums: Tensor, found: Tensor, options: Options) -> None:
    """Add what the library found, [n, 3], to sums."""
    found = found.to(sums.device, sums.dtype)
    if options.measured is Measured.MOMENTUM:
        sums[:, 1].add_(found[:, 2])
    else:
        sums.add_(found[:, :2])


# --- bits, see kernels/bits.py ---------------------------------------------------------------------------------------
#
# A function below changes nothing, and returns False or None, if the library cannot read a tensor. Its caller then uses
# plain torch, which takes every tensor or says what is wrong. A call may have a hundred small tensors, so the work per
# tensor must be small.


def _readable(x: Tensor, dtype: torch.dtype, size: int) -> bool:
    """Whether a tensor's address is that of `size` numbers of a dtype, side by side in memory."""
    return (
        x.dtype is dtype
        and x.numel() == size
        and x.is_cpu
        and x.is_contiguous()
        and (type(x) is Tensor or type(x) is Parameter)
        and not x.is_neg()
    )


def _inside(first: int, size: int, width: int) -> bool:
    """Whether `size` bits from word `first` on lie within `width` words."""
    return first >= 0 and 64 * (width - first) >= size


def cast(
    tensors: Tensors,
    options: Options,
    words: Tensor,
    slots: Sequence[Slot],
    *,
    isa: str = "best",
    own_threads: bool = False,
) -> bool:
    """`signstep.kernels.bits.cast` if the library can."""
    library, _ = _load()
    width = words.numel()
    if library is None or not _readable(words, torch.int64, width):
        return False
    table, base = array("q"), words.data_ptr()
    coupled = options.coupled_weight_decay != 0
    momentum, scales, squares = tensors.exp_avgs, tensors.scales, tensors.mean_squares
    for i, (grad, (first, segment), offset, ordinal) in enumerate(
        zip(tensors.grads, slots, tensors.offsets, tensors.ordinals, strict=True)
    ):
        dtype, size = grad.dtype, segment.size
        state = options.state_dtype or dtype
        if (
            dtype not in _DTYPES
            or segment != (ordinal, offset, size)
            or not _inside(first, size, width)
            or not _readable(grad, dtype, size)
            or (momentum and not _readable(momentum[i], state, size))
            or (scales and not _readable(scales[i], torch.float32, -(-size // BLOCK)))
            or (squares and not _readable(squares[i], torch.float32, 1))
            or (coupled and not _readable(tensors.params[i], dtype, size))
        ):
            return False
        table.extend(
            (
                tensors.params[i].data_ptr() if coupled else 0,
                grad.data_ptr(),
                momentum[i].data_ptr() if momentum else 0,
                scales[i].data_ptr() if scales else 0,
                squares[i].data_ptr() if squares else 0,
                base + 8 * first,
                size,
                offset,
                ordinal,
                _DTYPES[dtype],
                _DTYPES[dtype] if options.state_dtype is None else _STATE_DTYPES[state],
            )
        )
    request = _request(isa, own_threads, options)
    found = None
    if options.sums is not None:
        request.sums = options.measured
        found = torch.empty(len(tensors.grads), 3, dtype=torch.float64, device="cpu")
    at = None if found is None else found.data_ptr()
    _run(library.signstep_step, table.buffer_info()[0], len(tensors.grads), request, at)
    if found is not None and options.sums is not None:
        _add_measured(options.sums, found, options)
    # Autograd has not seen that the library wrote.
    torch.autograd.graph.increment_version([words, *momentum, *scales, *squares])
    return True


def count(
    ballots: Tensor,
    voters: Sequence[int],
    slots: Sequence[Slot],
    *,
    seed: int,
    step: Tensor,
    ties: Tensor | None = None,
    isa: str = "best",
    own_threads: bool = False,
) -> Tensor | None:
    """`signstep.kernels.bits.count` if the library can."""
    library, _ = _load()
    rows, width = ballots.shape
    if (
        library is None
        or not 1 <= rows <= _MOST_ROWS
        or not _readable(ballots[0], torch.int64, width)
        or (ties is not None and not _readable(ties, torch.int64, width))
    ):
        return None
    table = array("q")
    for (first, (parameter, start, size)), number in zip(slots, voters, strict=True):
        if not _inside(first, size, width):
            return None
        table.extend((first, size, start, parameter, number))
    out = torch.zeros(width, dtype=torch.int64, device="cpu")
    if ties is not None:
        ties.zero_()
    request = _request(isa, own_threads)
    request.seed, request.step = seed, int(step)
    _run(
        library.signstep_count,
        *(ballots.data_ptr(), rows, ballots.stride(0), table.buffer_info()[0], len(slots), request),
        *(out.data_ptr(), None if ties is None else ties.data_ptr()),
    )
    return out


def spread(
    words: Tensor,
    ties: Tensor | None,
    slots: Sequence[Slot],
    outs: Sequence[Tensor],
    sums: Tensor | None = None,
    *,
    isa: str = "best",
    own_threads: bool = False,
) -> bool:
    """`signstep.kernels.bits.spread` if the library can."""
    library, _ = _load()
    width = words.numel()
    if (
        library is None
        or not _readable(words, torch.int64, width)
        or (ties is not None and not _readable(ties, torch.int64, width))
        or (sums is not None and not _readable(sums, torch.float64, 2 * len(outs)))
    ):
        return False
    table = array("q")
    for (first, (_, _, size)), out in zip(slots, outs, strict=True):
        dtype = out.dtype
        if dtype not in _DTYPES or not _inside(first, size, width) or not _readable(out, dtype, size):
            return False
        table.extend((first, size, out.data_ptr(), _DTYPES[dtype]))
    _run(
        library.signstep_spread_votes,
        *(words.data_ptr(), None if ties is None else ties.data_ptr(), table.buffer_info()[0], len(outs)),
        *(_request(isa, own_threads), None if sums is None else sums.data_ptr()),
    )
    torch.autograd.graph.increment_version([*outs, *([] if sums is None else [sums])])
    return True

"""The native engine: the step of all tensors of a group in one pass over memory, in C++ (csrc/), for CPUs.

The library knows nothing of torch: it gets addresses and sizes by ctypes, so one build serves every version. Its
threads are those of torch's own OpenMP pool where torch has one, as many as torch.get_num_threads().
"""

from __future__ import annotations

import ctypes
import functools
import sys
from array import array
from pathlib import Path

import torch

from signstep.kernels.engine import Options, Tensors
from signstep.kernels.layout import laid_out

_ABI = 1
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_STATE_DTYPES = {torch.float32: 0, torch.bfloat16: 4, torch.int8: 5}
_CLEAN, _PRE, _POST, _GRADIENT = range(4)
_POSITIONS = {"pre": _PRE, "post": _POST}
ISAS = {"best": 0, "portable": 1, "avx2": 2, "avx512": 3}
"""Instruction sets by name, as the library numbers them."""


class _Options(ctypes.Structure):
    _fields_ = [
        ("rate", ctypes.c_double),
        ("decay", ctypes.c_double),
        ("coupled_decay", ctypes.c_double),
        ("gradient_weight", ctypes.c_double),
        ("sigma", ctypes.c_double),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("maximize", ctypes.c_int32),
        ("position", ctypes.c_int32),
        ("sums", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    ]


def _candidates() -> list[Path]:
    """Where the library may be: beside this file, or where an editable install keeps what it built."""
    name = "libsignstep.dylib" if sys.platform == "darwin" else "libsignstep.so"
    return [Path(__file__).with_name(name), *(Path(p) / "signstep" / "kernels" / name for p in sys.path)]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    path = next((p for p in _candidates() if p.exists()), None)
    try:
        if path is None:
            raise OSError
        library = ctypes.CDLL(str(path))
    except OSError as error:
        why = "was not built" if path is None else f"cannot be loaded ({error})"
        return None, (
            f"signstep's native library {why}: install a C++17 compiler (GCC or Clang), then signstep again from its "
            "source folder (pip install --force-reinstall --no-deps --no-cache-dir .)"
        )
    if library.signstep_abi() != _ABI:
        return None, f"signstep's native library {path} is of another version: install signstep again"
    library.signstep_step.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Options), ctypes.c_void_p]
    return library, None


def unavailable() -> str | None:
    """Why the engine cannot be used here, one sentence; None if it can."""
    return _load()[1]


def best_isa() -> str:
    """The instruction set that the library takes on this machine."""
    library, _ = _load()
    assert library is not None
    number: int = library.signstep_best_isa()
    return list(ISAS)[number]


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


def step(tensors: Tensors, options: Options, *, isa: str = "best", own_threads: bool = False) -> None:
    """One step of all tensors, in place; `isa` and `own_threads` are for tests and benchmarks."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    position = _CLEAN if options.dither is None else _POSITIONS[options.dither.position]
    request = _Options(
        rate=float(options.rate),
        decay=float(options.decay),
        coupled_decay=options.coupled_weight_decay,
        gradient_weight=1 - options.momentum,
        sigma=0.0 if options.dither is None else float(options.dither.sigma),
        seed=options.seed,
        step=int(options.step),
        maximize=options.maximize,
        position=_GRADIENT if options.gradient_step else position,
        sums=0 if options.sums is None else 1 + options.sums_applied,
        isa=ISAS[isa],
        threads=torch.get_num_threads(),
        parallel=None if own_threads else _parallel(),
    )
    count = len(tensors.params)
    sums = None if options.sums is None else torch.empty(count, 3, dtype=torch.float64)
    with laid_out(tensors, options) as rows:
        table = array("q")
        for row in rows:
            dtype = _DTYPES[row.param.dtype]
            state_dtype = dtype if options.state_dtype is None else _STATE_DTYPES[options.state_dtype]
            table.extend((*row.addresses(), row.param.numel(), row.offset, row.ordinal, dtype, state_dtype))
        failed = library.signstep_step(
            table.buffer_info()[0], count, ctypes.byref(request), None if sums is None else sums.data_ptr()
        )
        if failed:
            raise MemoryError("signstep: no memory for the step's list of work; nothing was changed")
    if sums is not None and options.sums is not None:
        options.sums.add_(sums[:, :2].sum(dim=0).to(options.sums.device, options.sums.dtype))

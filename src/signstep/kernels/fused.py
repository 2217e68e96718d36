"""Which fused engine steps which tensors: the native library on CPUs, Triton on GPUs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from signstep.kernels import compiled, native
from signstep.kernels.engine import Options, Tensors, real_tensors, select

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _engine(device_type: str) -> ModuleType | None:
    """The module that steps tensors of this device, None if there is none."""
    if device_type == "cpu":
        return native
    if device_type == "cuda":  # ROCm is cuda to torch
        # Imported on use: Triton is not everywhere, and takes its time.
        from signstep.kernels import triton

        return triton
    return None


def missing(params: Sequence[Tensor]) -> str | None:
    """Why these parameters cannot be stepped by fused kernels, one sentence; None if they can."""
    odd = {type(p) for p in params} - {Tensor, torch.nn.Parameter}
    if odd:
        return f"there are no fused kernels for tensors of type {', '.join(sorted(t.__name__ for t in odd))}"
    for device_type in {p.device.type for p in params}:
        engine = _engine(device_type)
        if engine is None:
            return f"there are no fused kernels for {device_type} tensors"
        # Not while tracing, which looks into the search for a library.
        if not torch.compiler.is_compiling() and (reason := engine.unavailable()) is not None:
            return str(reason)
    strange = next((d for d in {p.dtype for p in params} if d.is_floating_point and d not in _DTYPES), None)
    return None if strange is None else f"there are no fused kernels for {strange}"


def by_default(params: Sequence[Tensor]) -> bool:
    """Whether fused=None takes fused kernels for these parameters.

    Not on GPUs yet: the Triton kernels agree with plain torch under the interpreter and compile for sm_90 and gfx942,
    but have not run on a device.
    """
    if {p.device.type for p in params} != {"cpu"}:
        return False
    reason = missing(params)
    if reason is not None and reason == native.unavailable():
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}; until then the step is plain torch, which is several times slower, and dithered a hundred times "
        "(fused=False asks for it, without this warning)",
        stacklevel=2,
    )


def require(params: Sequence[Tensor]) -> None:
    """Raise a RuntimeError that says why these parameters cannot be stepped by fused kernels, if so."""
    if (reason := missing(params)) is not None:
        raise RuntimeError(f"Invalid fused: True, {reason}; pass fused=None to do without")


def step(tensors: Tensors, options: Options) -> None:
    """One step of all tensors, in place, one call per device."""
    if torch.compiler.is_compiling():
        # The engines read addresses, and there are none while a step is traced.
        compiled.step(tensors, options)
        return
    tensors = real_tensors(tensors)
    devices = {p.device for p in tensors.params}
    for device in devices:
        engine = _engine(device.type)
        assert engine is not None
        if len(devices) > 1:
            engine.step(select(tensors, [i for i, p in enumerate(tensors.params) if p.device == device]), options)
        else:
            engine.step(tensors, options)

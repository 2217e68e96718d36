"""The choice of a fused engine: the native library steps tensors on CPUs, Triton steps tensors on GPUs.

Inside torch.compile the step is one operator, `signstep::step`, which the compiler calls and does not trace.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, library

from signstep.kernels import native
from signstep.kernels.engine import Direction, Options, Projected, Tensors, real_tensors, select

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def _engine(device_type: str) -> ModuleType | None:
    """The module that steps tensors on this type of device; None if there is none."""
    if device_type == "cpu":
        return native
    if device_type == "cuda":  # ROCm is cuda to torch
        # Imported on use: Triton is not installed everywhere, and importing it is slow.
        from signstep.kernels import triton

        return triton
    return None


def missing(params: Sequence[Tensor]) -> str | None:
    """Why these parameters cannot be stepped by fused kernels, one sentence; None if they can."""
    kinds = frozenset((type(p), p.device.type, p.dtype) for p in params)
    return _missing(kinds, torch.compiler.is_compiling())


@functools.cache
def _missing(kinds: frozenset[tuple[type, str, torch.dtype]], tracing: bool) -> str | None:
    odd = {kind for kind, _, _ in kinds} - {Tensor, torch.nn.Parameter}
    if odd:
        return f"there are no fused kernels for tensors of type {', '.join(sorted(t.__name__ for t in odd))}"
    for device_type in {device_type for _, device_type, _ in kinds}:
        engine = _engine(device_type)
        if engine is None:
            return f"there are no fused kernels for {device_type} tensors"
        # Not while tracing: the compiler would trace the search for a library.
        if not tracing and (reason := engine.unavailable()) is not None:
            return str(reason)
    strange = next((d for _, _, d in kinds if d.is_floating_point and d not in _DTYPES), None)
    return None if strange is None else f"there are no fused kernels for {strange}"


def by_default(tensors: Tensors) -> bool:
    """Whether fused=None takes fused kernels for these tensors.

    Not for gradients of another dtype, nor where autograd follows the step, nor on GPUs yet: the Triton kernels agree
    with plain torch under the interpreter and compile for sm_90 and gfx942, but have not run on a device.
    """
    params = tensors.params
    if any(g.dtype != p.dtype or p.device.type != "cpu" for g, p in zip(tensors.grads, params, strict=True)):
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in params):
        return False
    reason = _missing(frozenset((type(p), p.device.type, p.dtype) for p in params), False)
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
        # The engines read addresses, which tensors do not have while a step is traced.
        _call_operator(tensors, options)
        return
    if any(p.is_complex() for p in tensors.params):
        tensors = real_tensors(tensors)
    devices = {p.device for p in tensors.params}
    for device in devices:
        engine = _engine(device.type)
        assert engine is not None
        if len(devices) > 1:
            engine.step(select(tensors, [i for i, p in enumerate(tensors.params) if p.device == device]), options)
        else:
            engine.step(tensors, options)


# --- the operator ----------------------------------------------------------------------------------------------------

# The operator's arguments are the fields of Tensors and Options, in their order. A field that may be a float or a
# tensor is passed as a tensor. The seed, an unsigned 64-bit number, is passed as the signed one with the same bits.
_ARGUMENTS: dict[str, str] = {
    "params": "Tensor(a!)[]",
    "grads": "Tensor[]",
    "exp_avgs": "Tensor(b!)[]",
    "scales": "Tensor(c!)[]",
    "mean_squares": "Tensor(d!)[]",
    "ordinals": "int[]",
    "offsets": "int[]",
    "step": "Tensor",
    "rate": "Tensor",
    "decay": "Tensor",
    "coupled_weight_decay": "float",
    "momentum": "float",
    "state_dtype": "ScalarType?",
    "direction": "int",
    "sigma": "Tensor?",
    "seed": "int",
    "maximize": "bool",
    "sums": "Tensor(e!)?",
    "projected": "int",
}
library.define("signstep::step", f"({', '.join(f'{kind} {name}' for name, kind in _ARGUMENTS.items())}) -> ()")


def _call_operator(tensors: Tensors, options: Options) -> None:
    """One step of all tensors, in place, by the operator."""
    changed: dict[str, Any] = {
        "rate": _tensor(options.rate),
        "decay": _tensor(options.decay),
        "seed": options.seed - (1 << 64) if options.seed >> 63 else options.seed,
        "direction": int(options.direction),
        "projected": int(options.projected),
    }
    values = [changed.get(name, value) for name, value in zip(Options._fields, options, strict=True)]
    torch.ops.signstep.step(*tensors, *values)


def _tensor(x: float | Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


@library.impl("signstep::step", "CompositeExplicitAutograd")
def _run_operator(*arguments: Any) -> None:
    count = len(Tensors._fields)
    options = Options(*arguments[count:])
    step(
        Tensors(*arguments[:count]),
        options._replace(
            seed=options.seed % (1 << 64),
            direction=Direction(options.direction),
            projected=Projected(options.projected),
        ),
    )


library.register_fake("signstep::step", lambda *arguments: None)

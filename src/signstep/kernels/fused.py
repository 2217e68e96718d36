"""The choice of a fused engine: the native library steps tensors on CPUs, Triton steps tensors on GPUs.

Inside torch.compile the step is one operator, `signstep::step`, which the compiler calls and does not trace.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, library

from signstep.kernels import native
from signstep.kernels.engine import Direction, Options, Projected, Tensors, real_tensors, select
from signstep.kernels.opaque_noise import signed, unsigned

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


_ENGINES = {"cpu": "signstep.kernels.native", "cuda": "signstep.kernels.triton"}  # ROCm is cuda to torch
"""The module that steps tensors on a type of device. Imported on use: Triton is not installed everywhere."""


def missing(params: Sequence[Tensor]) -> str | None:
    """Why these parameters cannot be stepped by fused kernels, one sentence; None if they can."""
    kinds = frozenset((type(p), p.device.type, p.dtype) for p in params)
    reason = _unsupported(kinds)
    # Not while tracing: the compiler would trace the search for a library.
    if reason is not None or torch.compiler.is_compiling():
        return reason
    reasons = (importlib.import_module(_ENGINES[device_type]).unavailable() for _, device_type, _ in kinds)
    return next((reason for reason in reasons if reason is not None), None)


def _unsupported(kinds: frozenset[tuple[type, str, torch.dtype]]) -> str | None:
    odd = {kind for kind, _, _ in kinds} - {Tensor, torch.nn.Parameter}
    if odd:
        return f"there are no fused kernels for tensors of type {', '.join(sorted(t.__name__ for t in odd))}"
    elsewhere = next((device_type for _, device_type, _ in kinds if device_type not in _ENGINES), None)
    if elsewhere is not None:
        return f"there are no fused kernels for {elsewhere} tensors"
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
    kinds = frozenset((type(p), p.device.type, p.dtype) for p in params)
    if torch.compiler.is_compiling():
        return _unsupported(kinds) is None and _library_is_there()
    return _steps(kinds)


@functools.cache
def _steps(kinds: frozenset[tuple[type, str, torch.dtype]]) -> bool:
    return _unsupported(kinds) is None and _library_is_there()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _library_is_there() -> bool:
    """Whether the native library can be used; if not, a warning says so once."""
    reason = native.unavailable()
    if reason is not None:
        _warn_once(reason)
    return reason is None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}; until then the step is plain torch, which is several times slower, and dithered ten times or more "
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
        engine = importlib.import_module(_ENGINES[device.type])
        if len(devices) > 1:
            engine.step(select(tensors, [i for i, p in enumerate(tensors.params) if p.device == device]), options)
        else:
            engine.step(tensors, options)


# --- the operator ----------------------------------------------------------------------------------------------------

# The operator takes the fields of Tensors and Options, in their order. A field that may be a float or a tensor
# is passed as both; the tensor counts if there is one.
_NUMBERS = ("rate", "decay")
_ARGUMENTS: dict[str, str] = {
    "params": "Tensor(a!)[]",
    "grads": "Tensor[]",
    "exp_avgs": "Tensor(b!)[]",
    "scales": "Tensor(c!)[]",
    "mean_squares": "Tensor(d!)[]",
    "ordinals": "int[]",
    "offsets": "int[]",
    "step": "Tensor",
    "rate": "float",
    "rate_tensor": "Tensor?",
    "decay": "float",
    "decay_tensor": "Tensor?",
    "coupled_weight_decay": "float",
    "momentum": "float",
    "state_dtype": "ScalarType?",
    "direction": "int",
    "sigma": "Tensor?",
    "seed": "int",
    "maximize": "bool",
    "sums": "Tensor(e!)?",
    "projected": "int",
    "stochastic_params": "bool",
}
library.define("signstep::step", f"({', '.join(f'{kind} {name}' for name, kind in _ARGUMENTS.items())}) -> ()")


def _call_operator(tensors: Tensors, options: Options) -> None:
    """One step of all tensors, in place, by the operator."""
    values: list[Any] = []
    value: Any
    for name, value in zip(Options._fields, options, strict=True):
        if name in _NUMBERS:
            values += [0.0, value] if isinstance(value, Tensor) else [value, None]
        elif name == "seed":
            values.append(signed(value))
        else:
            values.append(int(value) if isinstance(value, IntEnum) else value)
    torch.ops.signstep.step(*tensors, *values)


@library.impl("signstep::step", "CompositeExplicitAutograd")
def _run_operator(*arguments: Any) -> None:
    values = dict(zip(_ARGUMENTS, arguments, strict=True))
    for name in _NUMBERS:
        number = values.pop(f"{name}_tensor")
        values[name] = values[name] if number is None else number
    tensors = Tensors(*(values.pop(name) for name in Tensors._fields))
    values |= {"seed": unsigned(values["seed"])}
    values |= {"direction": Direction(values["direction"]), "projected": Projected(values["projected"])}
    step(tensors, Options(**values))


library.register_fake("signstep::step", lambda *arguments: None)

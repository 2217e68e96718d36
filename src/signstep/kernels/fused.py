"""The choice of a fused engine: the native library steps tensors on CPUs, Triton steps tensors on GPUs.

A GPU is stepped by Triton once its kernels have passed `signstep.kernels.self_check` there. Inside torch.compile the
step is one operator, `signstep::step`, which the compiler calls and does not trace.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, library

from signstep.kernels import native, self_check
from signstep.kernels.engine import Direction, Measured, Options, Tensors, real_tensors, select, select_options
from signstep.kernels.opaque_noise import signed, unsigned
from signstep.kernels.plain import multi_tensor_step

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


_ENGINES = {"cpu": "signstep.kernels.native", "cuda": "signstep.kernels.triton"}  # ROCm is cuda to torch
"""The module that steps tensors on a type of device. Imported on use: Triton is not installed everywhere."""


def missing(params: Sequence[Tensor]) -> str | None:
    """Why these parameters cannot be stepped by fused kernels, one sentence; None if they can."""
    kinds = frozenset((type(p), p.device, p.dtype) for p in params)
    reason = _unsupported(kinds)
    # Not while tracing: the compiler would trace the search for a library.
    if reason is not None or torch.compiler.is_compiling():
        return reason
    return _lacking({device for _, device, _ in kinds})


def _lacking(devices: Iterable[torch.device]) -> str | None:
    """Why the engine for one of these devices cannot be used, one sentence; None if all can."""
    for device in devices:
        engine = importlib.import_module(_ENGINES[device.type])
        reason: str | None = engine.unavailable()
        if reason is None and engine is not native:
            reason = self_check.failure(engine, device)
        if reason is not None:
            return reason
    return None


_Kinds = frozenset[tuple[type, torch.device, torch.dtype]]


def _unsupported(kinds: _Kinds) -> str | None:
    odd = {kind for kind, _, _ in kinds} - {Tensor, torch.nn.Parameter}
    if odd:
        return f"there are no fused kernels for tensors of type {', '.join(sorted(t.__name__ for t in odd))}"
    elsewhere = next((device.type for _, device, _ in kinds if device.type not in _ENGINES), None)
    if elsewhere is not None:
        return f"there are no fused kernels for {elsewhere} tensors"
    strange = next((d for _, _, d in kinds if d.is_floating_point and d not in _DTYPES), None)
    return None if strange is None else f"there are no fused kernels for {strange}"


def by_default(tensors: Tensors) -> bool:
    """Whether fused=None takes fused kernels for these tensors; if only an engine is missing, a warning says so once.

    Not for gradients of another dtype, nor where autograd follows the step.
    """
    params = tensors.params
    if any(g.dtype != p.dtype for g, p in zip(tensors.grads, params, strict=True)):
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in params):
        return False
    kinds = frozenset((type(p), p.device, p.dtype) for p in params)
    if torch.compiler.is_compiling():
        # On GPUs the operator decides when it runs: a check on the device cannot be traced.
        on_cpu = any(device.type == "cpu" for _, device, _ in kinds)
        return _unsupported(kinds) is None and (not on_cpu or _library_is_there())
    if kinds in _SERVED:
        return True
    if _unsupported(kinds) is not None:
        return False
    reason = _lacking({device for _, device, _ in kinds})
    if reason is None:
        _SERVED.add(kinds)
    else:
        _warn_once(reason)
    return reason is None


_SERVED: set[_Kinds] = set()
"""Kinds of parameters that fused kernels are known to step."""


def _library_is_there() -> bool:
    """Whether the native library can be used; if not, a warning says so once."""
    reason = native.unavailable()
    if reason is not None:
        _warn_once(reason)
    return reason is None


# What torch.compiler.assume_constant_result does, which imports the whole compiler first.
_library_is_there._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        raise _refusal(reason)


def _refusal(reason: str) -> RuntimeError:
    return RuntimeError(f"Invalid fused: True, {reason}; pass fused=None to do without")


def step(tensors: Tensors, options: Options, *, demanded: bool) -> None:
    """One step of all tensors, in place, one call per device.

    While a compiler traces it, whether there is an engine is not known yet: if there is none when the step runs, plain
    torch takes it, or, where fused kernels are `demanded`, a RuntimeError says why.
    """
    if torch.compiler.is_compiling():
        # The engines read addresses, which tensors do not have while a step is traced.
        _call_operator(tensors, options, demanded)
        return
    if any(p.is_complex() for p in tensors.params):
        tensors = real_tensors(tensors)
    devices = {p.device for p in tensors.params}
    for device in devices:
        engine = importlib.import_module(_ENGINES[device.type])
        if len(devices) > 1:
            indices = [i for i, p in enumerate(tensors.params) if p.device == device]
            own = select_options(options, indices)
            engine.step(select(tensors, indices), own)
            if options.sums is not None and own.sums is not None:
                options.sums[indices] = own.sums
        else:
            engine.step(tensors, options)


# --- the operator ----------------------------------------------------------------------------------------------------

# The operator takes the fields of Tensors and Options, in their order, and whether fused kernels are demanded. A field
# that may be a float or a tensor is passed as both; the tensor counts if there is one.
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
    "measured": "int",
    "stochastic_params": "bool",
    "interpolation": "float?",
    "law": "str",
    "demanded": "bool",
}
library.define("signstep::step", f"({', '.join(f'{kind} {name}' for name, kind in _ARGUMENTS.items())}) -> ()")


def _call_operator(tensors: Tensors, options: Options, demanded: bool) -> None:
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
    torch.ops.signstep.step(*tensors, *values, demanded)


@library.impl("signstep::step", "CompositeExplicitAutograd")
def _run_operator(*arguments: Any) -> None:
    values = dict(zip(_ARGUMENTS, arguments, strict=True))
    for name in _NUMBERS:
        number = values.pop(f"{name}_tensor")
        values[name] = values[name] if number is None else number
    tensors = Tensors(*(values.pop(name) for name in Tensors._fields))
    values |= {"seed": unsigned(values["seed"])}
    values |= {"direction": Direction(values["direction"]), "measured": Measured(values["measured"])}
    demanded = values.pop("demanded")
    options = Options(**values)
    reason = _lacking({p.device for p in tensors.params})
    if reason is None:
        step(tensors, options, demanded=demanded)
    elif demanded:
        raise _refusal(reason)
    else:
        _warn_once(reason)
        multi_tensor_step(tensors, options)


library.register_fake("signstep::step", lambda *arguments: None)

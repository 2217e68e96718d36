"""What every option of the optimizers may be, checked with one sentence that says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from signstep.kernels.momentum import STATE_DTYPES
from signstep.optim import calibration


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    allowed: str


def _number(low: float, high: float = math.inf, *, open_end: bool = False) -> _Rule:
    end = f"{high})" if open_end or high == math.inf else f"{high}]"

    def holds(x: float) -> bool:
        return low <= x <= high and math.isfinite(x) and not (open_end and x == high)

    return _Rule(holds, f"a number in [{low}, {end}")


def _integer(low: int, high: int) -> _Rule:
    return _Rule(lambda x: low <= x < high, f"an integer in [{low}, {high})")


def _choice(*names: str) -> _Rule:
    return _Rule(lambda x: x in names, "one of " + ", ".join(repr(n) for n in names))


_FLAG = (bool,)
_STATE_DTYPES = "None or one of " + ", ".join(str(dtype) for dtype in STATE_DTYPES)
_RULES: dict[str, tuple[tuple[type, ...], _Rule]] = {
    "lr": ((Real, Tensor), _number(0)),
    "momentum": ((Real,), _number(0, 1, open_end=True)),
    "dither": ((Real,), _number(0)),
    "dither_decay": ((Real,), _number(0)),
    "dither_position": ((str,), _choice("pre", "post")),
    "dither_scale": ((str,), _choice("absolute", "relative")),
    "state_dtype": ((torch.dtype, type(None)), _Rule(lambda x: x is None or x in STATE_DTYPES, _STATE_DTYPES)),
    "seed": ((Integral,), _integer(0, 1 << 64)),
    "weight_decay": ((Real,), _number(0)),
    "switch_step": ((Integral, type(None)), _Rule(lambda x: x is None or x >= 1, "None or an integer >= 1")),
    "ema_decay": ((Real,), _number(0, 1, open_end=True)),
    "calibration": ((str,), _choice(*calibration.RULES)),
    "sgd_momentum": ((Real,), _number(0, 1, open_end=True)),
    "decoupled_weight_decay": (_FLAG, _Rule(lambda x: True, "True or False")),
    "maximize": (_FLAG, _Rule(lambda x: True, "True or False")),
    "capturable": (_FLAG, _Rule(lambda x: True, "True or False")),
    "differentiable": (_FLAG, _Rule(lambda x: True, "True or False")),
    "foreach": ((bool, type(None)), _Rule(lambda x: True, "True, False or None")),
    "fused": ((bool, type(None)), _Rule(lambda x: True, "True, False or None")),
}


def check_options(options: dict[str, Any]) -> None:
    """Raise a TypeError or ValueError that names the first bad option, its value and what is allowed."""
    for name, value in options.items():
        if name not in _RULES:
            continue
        types, rule = _RULES[name]
        if isinstance(value, Tensor) and name == "lr" and value.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(value.shape)}")
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise TypeError(f"Invalid {name}: {value!r} of type {type(value).__name__}, expected {rule.allowed}")
        if not rule.holds(float(value.detach()) if isinstance(value, Tensor) else value):
            raise ValueError(f"Invalid {name}: {value!r}, expected {rule.allowed}")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("Invalid fused: True with foreach=True, which are two implementations; pass one of them")
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("Invalid fused: True with differentiable=True, which needs plain torch; pass fused=None")
    if options["capturable"] and options.get("switch_step") is not None:
        raise ValueError(
            f"Invalid switch_step: {options['switch_step']!r} with capturable=True, whose step count is on the device; "
            "pass switch_step=None and call switch()"
        )
    if options["foreach"] and options["differentiable"]:
        raise RuntimeError("Invalid foreach: True, _foreach ops do not support differentiable=True; pass foreach=None")

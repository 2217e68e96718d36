"""Every option of the optimizers, once: its default, and what it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from signstep.kernels import momentum
from signstep.optim.calibration import RULES

__all__ = [
    "HYBRID_OPTIONS",
    "LION_OPTIONS",
    "SIGNSGD_OPTIONS",
    "STATE_DTYPES",
    "Option",
    "check_options",
    "name_state_dtype",
    "rate_and_decay",
]

STATE_DTYPES: Mapping[Any, torch.dtype | None] = {
    None: None,
    **{dtype: dtype for dtype in momentum.STATE_DTYPES},
    **{str(dtype).removeprefix("torch."): dtype for dtype in momentum.STATE_DTYPES},
}
"""The dtype that a ``state_dtype`` means, which may be the dtype itself, its name or None."""


class Option(NamedTuple):
    """One keyword of an optimizer."""

    default: Any
    types: tuple[type, ...]
    holds: Callable[[Any], bool]
    """Whether a value of these types is allowed."""
    allowed: str
    """The allowed values in words, for an error's message."""
    always: bool = False
    """Every state that was ever saved has the option. In a state that lacks one of the others it is the default."""


def _number(default: float, end: float = math.inf, *types: type, always: bool = False) -> Option:
    """A number from 0 to `end`, which is not allowed itself."""

    def holds(x: float) -> bool:
        return 0 <= x < end and math.isfinite(x)

    return Option(default, (Real, *types), holds, f"a number in [0, {end})", always)


def _pair(first: float, second: float, end: float) -> Option:
    """Two numbers from 0 to `end`, which is not allowed itself."""

    def holds(pair: Sequence[float]) -> bool:
        return len(pair) == 2 and all(
            isinstance(x, Real) and not isinstance(x, bool) and 0 <= float(x) < end for x in pair
        )

    return Option((first, second), (tuple, list), holds, f"two numbers in [0, {end})", True)


def _choice(default: str, *others: str) -> Option:
    names = (default, *others)
    return Option(default, (str,), lambda x: x in names, "one of " + ", ".join(repr(n) for n in names))


def _flag(default: bool) -> Option:
    return Option(default, (bool,), lambda x: True, "True or False")


def _flag_or_none() -> Option:
    return Option(None, (bool, type(None)), lambda x: True, "True, False or None")


SIGNSGD_OPTIONS: Mapping[str, Option] = {
    "lr": _number(1e-3, math.inf, Tensor, always=True),
    "momentum": _number(0.9, 1, always=True),
    "dither": _number(0.0),
    "dither_decay": _number(0.55),
    "dither_position": _choice("pre", "post", "expected"),
    "dither_scale": _choice("absolute", "relative"),
    "dither_law": _choice("gaussian", "uniform"),
    "state_dtype": Option(
        None,
        (torch.dtype, str, type(None)),
        lambda x: x in STATE_DTYPES,
        "None or one of " + ", ".join(str(dtype) for dtype in momentum.STATE_DTYPES) + ", or its name as a string",
    ),
    "param_rounding": Option(
        None,
        (str, type(None)),
        lambda x: x in (None, "nearest", "stochastic"),
        "None, 'nearest' or 'stochastic'",
    ),
    "seed": Option(0, (Integral,), lambda x: 0 <= x < 1 << 64, f"an integer in [0, {1 << 64})"),
    "weight_decay": _number(0.0),
    "decoupled_weight_decay": _flag(True),
    "maximize": _flag(False),
    "foreach": _flag_or_none(),
    "fused": _flag_or_none(),
    "capturable": _flag(False),
    "differentiable": _flag(False),
}
"""The options of `SignSGD`, and of `HybridSignSGD`."""

LION_OPTIONS: Mapping[str, Option] = {
    **{name: option for name, option in SIGNSGD_OPTIONS.items() if name != "momentum"},
    "lr": _number(1e-4, math.inf, Tensor, always=True),
    "betas": _pair(0.9, 0.99, 1),
}
"""The options of `Lion`."""

HYBRID_OPTIONS: Mapping[str, Option] = {
    "switch_step": Option(
        None,
        (Integral, str, type(None)),
        lambda x: x is None or x == "auto" or (not isinstance(x, str) and x >= 1),
        "None, 'auto' or an integer >= 1",
    ),
    "switch_tolerance": _number(0.25),
    "switch_patience": Option(50, (Integral,), lambda x: x >= 1, "an integer >= 1"),
    "ema_decay": _number(0.99, 1),
    "calibration": _choice("norm", *(rule for rule in RULES if rule != "norm")),
    "calibration_scope": Option(
        None, (str, type(None)), lambda x: x in (None, "group", "tensor"), "None, 'group' or 'tensor'"
    ),
    "sgd_momentum": _number(0.0, 1),
}
"""The options that `HybridSignSGD` adds."""


def check_options(values: Mapping[str, Any]) -> None:
    """Raise a TypeError or ValueError that names the first bad option, its value and what is allowed.

    Args:
        values: a param_group, or an optimizer's defaults; keys that are no options are not looked at.
    """
    options = {**LION_OPTIONS, **SIGNSGD_OPTIONS, **HYBRID_OPTIONS}
    for name, value in values.items():
        if name not in options:
            continue
        option = options[name]
        if isinstance(value, Tensor) and name == "lr" and value.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(value.shape)}")
        if not isinstance(value, option.types) or (isinstance(value, bool) and bool not in option.types):
            raise TypeError(f"Invalid {name}: {value!r} of type {type(value).__name__}, expected {option.allowed}")
        if not option.holds(float(value.detach()) if isinstance(value, Tensor) else value):
            raise ValueError(f"Invalid {name}: {value!r}, expected {option.allowed}")
    if values["fused"] and values["foreach"]:
        raise RuntimeError("Invalid fused: True with foreach=True, which are two implementations; pass one of them")
    if values["fused"] and values["differentiable"]:
        raise RuntimeError("Invalid fused: True with differentiable=True, which needs plain torch; pass fused=None")
    if values["capturable"] and values.get("switch_step") is not None:
        raise ValueError(
            f"Invalid switch_step: {values['switch_step']!r} with capturable=True, whose step count is on the device; "
            "pass switch_step=None and call switch()"
        )
    if values["foreach"] and values["differentiable"]:
        raise RuntimeError("Invalid foreach: True, _foreach ops do not support differentiable=True; pass foreach=None")
    if values["param_rounding"] == "stochastic" and any(p.dtype == torch.float16 for p in values.get("params", ())):
        raise ValueError(
            "Invalid param_rounding: 'stochastic' with float16 parameters, which are always rounded to the nearest; "
            "pass None, or make the parameters bfloat16 or float32"
        )


def name_state_dtype(group: dict[str, Any]) -> None:
    """Let a param_group keep its ``state_dtype`` as a name: not every format of checkpoints can hold a dtype."""
    if isinstance(group["state_dtype"], torch.dtype):
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")


def rate_and_decay(group: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor, float]:
    """The learning rate of a param_group, and how its weight decay acts.

    Returns:
        The learning rate, a tensor without dimensions where it is a tensor, so that it may be on the CPU while the
        parameters are not; the factor 1 - lr * weight_decay of the parameter, or 1; and the multiple of the parameter
        that is added to the gradient, or 0. Which of the two decays, ``decoupled_weight_decay`` says.
    """
    lr, weight_decay = group["lr"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = lr.squeeze()
    if not group["decoupled_weight_decay"]:
        return lr, 1.0, weight_decay
    return lr, (1 - lr * weight_decay if weight_decay != 0 else 1.0), 0.0

"""What a step has moved along: the gradient that entered it and the momentum, read from the optimizer after the step.

Gradients are read after the step because a closure computes them inside it, and because a fused step under a GradScaler
writes them back unscaled. What the step overwrites is kept from before it: see `Before`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from signstep.kernels import momentum as buffers
from signstep.kernels.engine import real
from signstep.kernels.reference import wide_dtype
from signstep.optim.signsgd import SignSGD

__all__ = [
    "Before",
    "Param",
    "chunks",
    "finite",
    "flat",
    "gradient",
    "inner",
    "keeps_average",
    "kept",
    "numbers",
    "stepped",
]


_CHUNK = 1 << 16


@dataclass
class Before:
    """What is known of an optimizer before a step and gone after it."""

    steps: list[int | None]
    """Of each param_group; None where the optimizer does not count."""
    phases: list[str]
    """"sign", "sgd" or, for other optimizers, ""."""
    params: dict[Tensor, Tensor]
    """Copies of those that coupled weight decay adds to the gradient."""

    @classmethod
    def of(cls, optimizer: Optimizer, copies: Callable[[dict[str, Any]], bool]) -> Before:
        """Take the snapshot, with copies of parameters for those param_groups alone that `copies` says."""
        groups = optimizer.param_groups
        ours = isinstance(optimizer, SignSGD)
        steps = [int(g["step"]) if ours else None for g in groups]
        phases = [g.get("phase", "sign") if ours else "" for g in groups]
        coupled = [g for g in groups if _coupled_decay(optimizer, g) != 0 and copies(g)]
        params = {p: p.detach().clone() for g in coupled for p in g["params"] if p.requires_grad}
        return cls(steps, phases, params)


class Param(NamedTuple):
    """A parameter that has moved in the step, and the index of its param_group."""

    param: Tensor
    group_index: int
    group: dict[str, Any]


def stepped(optimizer: Optimizer, before: Before) -> Iterator[Param]:
    """The parameters that the step since `before` has moved.

    Without those whose gradient is sparse or sharded (DTensor), and without any if a fused step has found an infinity
    and done nothing.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None and float(found_inf) != 0:
        return
    # Groups that were added since have not been seen before.
    for index, (group, steps) in enumerate(zip(optimizer.param_groups, before.steps, strict=False)):
        if steps is None or int(group["step"]) > steps:
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_sparse and not hasattr(p, "to_local"):
                    yield Param(p, index, group)


def gradient(optimizer: Optimizer, moved: Param, before: Before) -> Tensor:
    """What has entered the momentum, 1-D, at least float32: negated by maximize, and with coupled weight decay."""
    p, _, group = moved
    assert p.grad is not None
    g = flat(p.grad.resolve_conj())
    if group.get("maximize", False):
        g = -g
    return g + _coupled_decay(optimizer, group) * flat(before.params[p]) if p in before.params else g


def keeps_average(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether steps of a group are taken along a momentum, rather than along the gradient itself."""
    if isinstance(optimizer, SignSGD):
        return optimizer._keeps_exp_avg(group)
    if isinstance(optimizer, torch.optim.SGD):
        return bool(group["momentum"] != 0)
    return "betas" in group or bool(group.get("momentum", 0) != 0)


def kept(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor | None:
    """The momentum that an optimizer keeps of a parameter, as an average of gradients.

    That is ``exp_avg``, or SGD's ``momentum_buffer`` times (1 - momentum) / (1 - dampening).

    Returns:
        1-D, at least float32, complex numbers as two coordinates; None where there is none, or none that averages
        gradients.
    """
    state = optimizer.state.get(p, {})
    if isinstance(state.get("exp_avg"), Tensor):
        return flat(buffers.read(state["exp_avg"], state.get("exp_avg_scale")))
    buffer = state.get("momentum_buffer")
    if isinstance(optimizer, torch.optim.RMSprop) or not isinstance(buffer, Tensor):
        return None
    dampening = group.get("dampening")
    if dampening is None:  # an average by itself, as in torch.optim.Muon
        return flat(buffer)
    return None if dampening == 1 else flat(buffer) * ((1 - group["momentum"]) / (1 - dampening))


def flat(x: Tensor) -> Tensor:
    """The real coordinates of a tensor, 1-D, at least float32."""
    coordinates = real(x.detach()).reshape(-1)
    return coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of 1-D tensors of one length that stay in a CPU's cache, whatever is made of them; elsewhere all of it."""
    size = _CHUNK if tensors[0].device.type == "cpu" else max(1, len(tensors[0]))
    return zip(*(torch.split(x, size) for x in tensors), strict=True)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of two 1-D tensors, 0-dim, in the widest float type of the device.

    Products are rounded to the wider of the two types, so what is below 1e-38 in float32 is lost.
    """
    wide = wide_dtype(a.device)
    if a.device.type != "cpu":
        return (a * b).sum(dtype=wide)
    total = torch.zeros((), dtype=wide)
    for x, y in chunks(a, b):
        total += torch.dot(x, y)
    return total


def numbers(values: list[Tensor]) -> list[float]:
    """0-dim tensors of any device as numbers, in one transfer per device."""
    result = [0.0] * len(values)
    for device in {v.device for v in values}:
        at = [i for i, v in enumerate(values) if v.device == device]
        for i, value in zip(at, torch.stack([values[i].to(wide_dtype(device)) for i in at]).tolist(), strict=True):
            result[i] = value
    return result


def finite(x: float | None) -> float | None:
    """X, or None where it is no number that a record can hold."""
    return x if x is not None and abs(x) < float("inf") else None


def _coupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """What times the parameter enters the gradient, in the optimizer."""
    if getattr(optimizer, "takes_votes", False):
        return 0.0
    known = isinstance(optimizer, torch.optim.SGD | torch.optim.Adam) and not isinstance(optimizer, torch.optim.AdamW)
    if group.get("decoupled_weight_decay", not known):
        return 0.0
    return float(group.get("weight_decay", 0.0))

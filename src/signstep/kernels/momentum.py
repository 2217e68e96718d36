"""The momentum: how a gradient enters it, and how it is kept, to the nearest or in fewer bits by stochastic rounding.

With ``state_dtype=None`` or float32 the buffer holds m rounded to the nearest, and the step takes the sign of that.
With bfloat16 (2 bytes per element) or int8 (1 byte per element, and a float32 scale per block of 256 consecutive
elements) the step takes the sign of m before rounding. The buffer then holds m rounded up or down at random, so that
E[kept] = m: rounding to the nearest would lose every change smaller than half a unit. The random number of an element
is a byte r from stream 2 of the noise.

- bfloat16: the upper 16 bits of bits(m) + 256 r + 128, see `signstep.kernels.rounding`.
- int8: q = floor(m / scale + (r + 1/2) / 256) with scale = max |m| / 127 over the block; q * scale stands for m.

A block that holds a momentum which is not finite becomes NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from signstep.kernels.engine import Options, Tensors, real
from signstep.kernels.opaque_noise import in_operators, noise_bytes
from signstep.kernels.reference import ROUNDING, Segment
from signstep.kernels.rounding import to_bfloat16

BLOCK = 256
"""Elements that share a scale in 8-bit momentum."""

MOMENTUM = ("exp_avg", "exp_avg_scale")
"""Names of the momentum in an optimizer's state."""

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
STOCHASTIC = (torch.bfloat16, torch.int8)
_SMALLEST_SCALE = 2.0**-120


def new_momentum(param: Tensor, state_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Momentum of zeros, by its names in the optimizer's state: ``exp_avg`` and, in 8 bits, ``exp_avg_scale``."""
    # One element may have any strides: those of 0 are for `freed`.
    layout = torch.contiguous_format if param.numel() == 1 else torch.preserve_format
    if state_dtype is None:
        return {"exp_avg": torch.zeros_like(param, memory_format=layout)}
    if state_dtype != torch.int8:
        return {"exp_avg": torch.zeros_like(real(param), dtype=state_dtype, memory_format=layout)}
    exp_avg = torch.zeros_like(real(param), dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = torch.zeros(-(-exp_avg.numel() // BLOCK), dtype=torch.float32, device=param.device)
    return {"exp_avg": exp_avg, "exp_avg_scale": scale}


def freed(x: Any) -> Any:
    """Zeros of the same shape and dtype that take no memory and cannot be written to: for a buffer that is not used.

    An optimizer's state has the same names and shapes in all its phases, because `torch.distributed.checkpoint` loads
    only what the state has already.
    """
    if hasattr(x, "to_local"):
        local = freed(x.to_local())
        mesh, stride = x.device_mesh, (0,) * x.ndim
        return type(x).from_local(local, mesh, x.placements, run_check=False, shape=x.shape, stride=stride)
    return torch.zeros(1, dtype=x.dtype, device=x.device).as_strided(x.shape, (0,) * x.ndim)


def is_freed(x: Any) -> bool:
    """Whether a buffer is one that `freed` made; of one without dimensions, which takes no memory anyway, False."""
    return x.ndim > 0 and not any(x.stride())


def read_momentum(exp_avg: Tensor, scale: Tensor | None = None) -> Tensor:
    """The momentum that a buffer holds, float32 if it is kept in 8 bits, else in the buffer's own dtype."""
    if scale is None:
        return exp_avg
    per_element = scale.repeat_interleave(BLOCK)[: exp_avg.numel()].view(exp_avg.shape)
    return exp_avg.to(torch.float32) * per_element


def enter_momentum(tensors: Tensors, i: int, options: Options) -> tuple[Tensor, Tensor]:
    r"""Take the gradient of tensor i of a step into its momentum. With w the coupled weight decay,

    .. math:: g \leftarrow \pm g + w x, \qquad m \leftarrow \beta m + (1 - \beta) g

    Returns:
        m, whose sign the step takes, and the g that entered it. Without momentum m is g. m is the buffer itself, or a
        float32 (or wider) tensor where the buffer is rounded at random. With an interpolation, that in place of m, a
        float32 (or wider) tensor.
    """
    grad = tensors.grads[i]
    if options.maximize:
        grad = -grad
    if options.coupled_weight_decay != 0:
        grad = widened(grad).add(widened(tensors.params[i]), alpha=options.coupled_weight_decay)
    return _average(tensors, i, grad, options), grad


def enter_momenta(tensors: Tensors, options: Options) -> tuple[list[Tensor], list[Tensor]]:
    """`enter_momentum` of all of the tensors at once, which are of one device and dtype."""
    grads, ms = tensors.grads, tensors.exp_avgs
    if options.maximize:
        grads = list(torch._foreach_neg(grads))
    if options.coupled_weight_decay != 0:
        params = [widened(p) for p in tensors.params]
        grads = list(torch._foreach_add([widened(g) for g in grads], params, alpha=options.coupled_weight_decay))
    if ms and options.state_dtype is None and grads[0].dtype == ms[0].dtype:
        directed = ms
        if options.interpolation is not None:
            wide = [widened(m) for m in ms], [widened(g) for g in grads]
            directed = list(torch._foreach_lerp(*wide, 1 - options.interpolation))
        torch._foreach_lerp_(ms, grads, 1 - options.momentum)
        return directed, grads
    return [_average(tensors, i, g, options) for i, g in enumerate(grads)], grads


def widened(x: Tensor, param: Tensor | None = None) -> Tensor:
    """Convert x to the dtype to compute in: float32, or the dtype of `param` (by default x's own) if that is wider."""
    return x.to(torch.promote_types((x if param is None else param).dtype, torch.float32))


def _average(tensors: Tensors, i: int, grad: Tensor, options: Options) -> Tensor:
    """Average a gradient into the buffer of tensor i, in place, and return that whose sign the step takes."""
    if not tensors.exp_avgs:
        return grad
    exp_avg, scale = tensors.exp_avgs[i], tensors.scales[i] if tensors.scales else None
    if options.interpolation is not None:
        old = widened(read_momentum(exp_avg, scale), grad)
        interpolated = torch.lerp(old, widened(grad), 1 - options.interpolation)
        _average(tensors, i, grad, options._replace(interpolation=None))
        return interpolated
    weight = 1 - options.momentum
    if options.state_dtype not in STOCHASTIC:
        if torch.promote_types(grad.dtype, exp_avg.dtype) == exp_avg.dtype:
            exp_avg.lerp_(grad.to(exp_avg.dtype), weight)
        else:
            exp_avg.copy_(torch.lerp(exp_avg.to(grad.dtype), grad, weight))
        return exp_avg
    wide = torch.promote_types(grad.dtype, torch.float32)
    m = torch.lerp(read_momentum(exp_avg, scale).to(wide), grad.to(wide), weight)
    kept = m.detach().to(torch.float32)
    segment = Segment(tensors.ordinals[i], tensors.offsets[i], grad.numel())
    (random,) = noise_bytes([segment], ROUNDING, seed=options.seed, step=options.step, device=m.device)
    random = random.view(m.shape)
    if scale is None:
        exp_avg.copy_(to_bfloat16(kept.contiguous(), (random << 8) + 0x80))
        return m
    largest = _blocks(kept.abs()).amax(dim=1)
    scale.copy_(largest / 127)
    inverse = torch.where(scale < _SMALLEST_SCALE, 0.0, 1 / scale)
    units = (_blocks(kept) * inverse[:, None]).flatten()[: kept.numel()].view(kept.shape)
    shifted = units.nan_to_num(0.0) + (random.to(torch.float32) + 0.5) / 256 + 128
    exp_avg.copy_((shifted.to(torch.int32) - 128).clamp(max=127))
    return m


def mean_square(m: Tensor) -> Tensor:
    """Mean of the squares over all elements, 0-dim float32; 0 if there are none.

    Inside torch.compile an operator: a sum over each tensor is a kernel, which takes longer to compile than to run, and
    adds up in another order.
    """
    if in_operators():
        mean: Tensor = torch.ops.signstep.mean_square(m)
        return mean
    return m.to(torch.float32).square().sum() / max(1, m.numel())


library.define("signstep::mean_square", "(Tensor m) -> Tensor")
library.impl("signstep::mean_square", "CompositeExplicitAutograd")(mean_square)
library.register_fake("signstep::mean_square", lambda m: torch.empty((), dtype=torch.float32, device=m.device))


def _blocks(x: Tensor) -> Tensor:
    """The elements in row-major order, one block per row, the last filled up with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def check_momentum(p: Tensor, m: Tensor, scale: Tensor | None, state_dtype: torch.dtype | None) -> None:
    """Raise a RuntimeError if a momentum buffer is not what the parameter's must be."""
    dtype = p.dtype if state_dtype is None else state_dtype
    if m.shape != p.shape or m.dtype != dtype or m.device != p.device or (scale is None) != (dtype != torch.int8):
        found = f"{m.dtype}, {tuple(m.shape)}, on {m.device}" + (", with scales" if scale is not None else "")
        raise RuntimeError(
            f"the momentum of a parameter of shape {tuple(p.shape)} on {p.device} is {found}, expected {dtype} of the "
            "same shape and device: load the state of this model, and set state_dtype, and the model's dtype, before "
            "the first step"
        )
    blocks = -(-p.numel() // BLOCK)
    if scale is not None and (scale.shape != (blocks,) or scale.dtype != torch.float32 or scale.device != p.device):
        raise RuntimeError(
            f"8-bit momentum of {p.numel()} elements has {scale.numel()} scales, {tuple(scale.shape)}, {scale.dtype} "
            f"on {scale.device}, expected {blocks}, torch.float32 on {p.device}: load that of a whole parameter"
        )

"""Tensors as an engine reads them, by address: checked, and laid out so that element i of each is at place i."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from signstep.kernels.engine import Direction, Options, Tensors
from signstep.kernels.momentum import STOCHASTIC, check_momentum
from signstep.kernels.rounding import rounds_at_random


def order_is_free(options: Options, dtype: torch.dtype) -> bool:
    """Whether a step of parameters of this dtype gives the same result in any order of the elements.

    It does where no noise is drawn.
    """
    noisy = options.direction in (Direction.PRE, Direction.POST)
    return not noisy and options.state_dtype not in STOCHASTIC and not rounds_at_random(dtype, options)


@contextmanager
def laid_out(tensors: Tensors, options: Options) -> Iterator[Tensors]:
    """Check the tensors, and give them with copies in place of those that no engine can read.

    On leaving, the copies are written back. The caller must keep what it is given until the engine is done.

    Raises:
        RuntimeError: a gradient, a momentum or a mean square that does not fit its parameter, one sentence.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    params, exp_avgs = list(tensors.params), list(tensors.exp_avgs)
    grads = [g.resolve_neg() if g.is_neg() else g for g in tensors.grads]
    plain = options.state_dtype is None and not tensors.scales and not tensors.mean_squares
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        m = exp_avgs[i] if exp_avgs else None
        # The usual tensors, of which a step may have thousands, pass here.
        shape, dtype = p.shape, p.dtype
        alike = p.is_cpu and g.is_cpu and g.dtype is dtype and g.shape == shape
        alike = alike and (m is None or (m.is_cpu and m.dtype is dtype and m.shape == shape and m.is_contiguous()))
        if plain and alike and p.is_contiguous() and g.is_contiguous():
            continue
        if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
            raise RuntimeError(
                f"the gradient of a parameter, {p.dtype}, {tuple(p.shape)}, on {p.device}, is {g.dtype}, "
                f"{tuple(g.shape)}, on {g.device}: fused kernels need it alike; pass fused=False for a gradient of "
                "another dtype"
            )
        if m is not None:
            check_momentum(p, m, tensors.scales[i] if tensors.scales else None, options.state_dtype)
        square = tensors.mean_squares[i] if tensors.mean_squares else None
        if square is not None and (square.numel() != 1 or square.dtype != torch.float32 or square.device != p.device):
            raise RuntimeError(
                f"the mean square of the momentum of a parameter on {p.device} is {square.dtype}, "
                f"{tuple(square.shape)}, on {square.device}, expected one torch.float32 there: load the state of this "
                "model"
            )
        if p.is_contiguous() and g.is_contiguous() and (m is None or m.is_contiguous()):
            continue
        if order_is_free(options, p.dtype) and share_dense_order(p, g, m):
            continue
        params[i], grads[i] = _contiguous(p, copies), g.contiguous()
        if m is not None:
            exp_avgs[i] = _contiguous(m, copies)
    yield tensors._replace(params=params, grads=grads, exp_avgs=exp_avgs)
    for original, copy in copies:
        original.copy_(copy)
    # Autograd has not seen that the engine wrote, and would use old values without a word.
    for column in (tensors.params, tensors.exp_avgs, tensors.scales, tensors.mean_squares):
        torch.autograd.graph.increment_version(column)


def share_dense_order(p: Tensor, g: Tensor, m: Tensor | None = None) -> bool:
    """Whether the elements of each tensor lie side by side in memory, in the same order of dimensions for all."""
    if p.stride() != g.stride() or (m is not None and p.stride() != m.stride()):
        return False
    expected = 1
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _contiguous(x: Tensor, copies: list[tuple[Tensor, Tensor]]) -> Tensor:
    """X itself if it is in row-major order, else a copy that is, which is to be written back."""
    if x.is_contiguous():
        return x
    copy = x.contiguous()
    copies.append((x, copy))
    return copy

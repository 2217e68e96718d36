"""Tensors as the fused engines see them: as addresses, of memory that must be what it is taken for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from signstep.kernels.engine import Options, Tensors
from signstep.kernels.momentum import STOCHASTIC, check_state


class Row(NamedTuple):
    """One parameter and what belongs to it, element i of each at place i."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor | None
    scale: Tensor | None
    mean_square: Tensor | None
    ordinal: int
    offset: int

    def addresses(self) -> list[int]:
        """Of the five tensors; 0 where there is none."""
        return [0 if x is None else x.data_ptr() for x in self[:5]]


def order_is_free(options: Options) -> bool:
    """Whether a step does not ask which element is which: it draws no noise."""
    return options.dither is None and options.state_dtype not in STOCHASTIC


@contextmanager
def laid_out(tensors: Tensors, options: Options) -> Iterator[list[Row]]:
    """The tensors, checked, in the layout that an engine works on; on leaving, what it wrote is in the tensors.

    The rows must be alive until the engine is done: a gradient may be a copy.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    rows = []
    free = order_is_free(options)
    columns: tuple[Sequence[Tensor | None], ...] = (tensors.exp_avgs, tensors.scales, tensors.mean_squares)
    momentum, scales, mean_squares = (column or [None] * len(tensors.params) for column in columns)
    for p, g, m, s, q, ordinal, offset in zip(
        tensors.params, tensors.grads, momentum, scales, mean_squares, tensors.ordinals, tensors.offsets, strict=True
    ):
        _check(p, g, m, s, q, options.state_dtype)
        g = g.resolve_neg()
        if not _same_layout(p, g, m, free):
            p, g = _contiguous(p, copies), g.contiguous()
            m = None if m is None else _contiguous(m, copies)
        rows.append(Row(p, g, m, s, q, ordinal, offset))
    yield rows
    for original, copy in copies:
        original.copy_(copy)
    # The engine wrote behind autograd's back, which must not take the old values for the present ones.
    for column in (tensors.params, tensors.exp_avgs, tensors.scales, tensors.mean_squares):
        torch.autograd.graph.increment_version(column)


def _check(
    p: Tensor, g: Tensor, m: Tensor | None, scale: Tensor | None, square: Tensor | None, state_dtype: torch.dtype | None
) -> None:
    """Raise a RuntimeError if what an engine would read is not as large, or not where, it takes it to be."""
    if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
        raise RuntimeError(
            f"the gradient of a parameter, {p.dtype}, {tuple(p.shape)}, on {p.device}, is {g.dtype}, {tuple(g.shape)}, "
            f"on {g.device}: fused kernels need it alike; pass fused=False for a gradient of another dtype"
        )
    if m is not None:
        check_state(p, m, scale, state_dtype)
    if square is not None and (square.numel() != 1 or square.dtype != torch.float32 or square.device != p.device):
        raise RuntimeError(
            f"the mean square of the momentum of a parameter on {p.device} is {square.dtype}, {tuple(square.shape)}, "
            f"on {square.device}, expected one torch.float32 there: load the state of this model"
        )


def _same_layout(p: Tensor, g: Tensor, m: Tensor | None, free: bool) -> bool:
    """Whether element i of each is at address i: in row-major order, or in any that they share if the order is free."""
    if p.is_contiguous() and g.is_contiguous() and (m is None or m.is_contiguous()):
        return True
    same = p.stride() == g.stride() and (m is None or p.stride() == m.stride())
    return free and same and _is_dense(p)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements, in some order of the dimensions, lie side by side."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _contiguous(x: Tensor, copies: list[tuple[Tensor, Tensor]]) -> Tensor:
    """X in row-major order, by a copy that is written back if x is not so itself."""
    if x.is_contiguous():
        return x
    copy = x.contiguous()
    copies.append((x, copy))
    return copy

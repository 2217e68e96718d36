"""The fused step as one operator, `signstep::step`, which torch.compile calls and does not look into."""

from __future__ import annotations

import torch
from torch import Tensor, library

from signstep.kernels.engine import Dither, Options, Tensors

# Of an operator's arguments an int is signed, and a number is a float or a tensor, not either: the seed is passed
# modulo 2^64, and what may be a tensor as both, of which the tensor counts.
library.define(
    "signstep::step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] scales, Tensor(d!)[] mean_squares, "
    "Tensor(e!)? sums, int[] ordinals, int[] offsets, Tensor step, float rate, Tensor? rate_tensor, float decay, "
    "Tensor? decay_tensor, float coupled_weight_decay, float momentum, ScalarType? state_dtype, str? position, "
    "Tensor? sigma, int seed, bool maximize, bool sums_applied, bool gradient_step) -> ()",
)


@library.impl("signstep::step", "CompositeExplicitAutograd")
def _run(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    scales: list[Tensor],
    mean_squares: list[Tensor],
    sums: Tensor | None,
    ordinals: list[int],
    offsets: list[int],
    step: Tensor,
    rate: float,
    rate_tensor: Tensor | None,
    decay: float,
    decay_tensor: Tensor | None,
    coupled_weight_decay: float,
    momentum: float,
    state_dtype: torch.dtype | None,
    position: str | None,
    sigma: Tensor | None,
    seed: int,
    maximize: bool,
    sums_applied: bool,
    gradient_step: bool,
) -> None:
    from signstep.kernels import fused

    fused.step(
        Tensors(params, grads, exp_avgs, scales, mean_squares, ordinals, offsets),
        Options(
            step=step,
            rate=rate if rate_tensor is None else rate_tensor,
            decay=decay if decay_tensor is None else decay_tensor,
            coupled_weight_decay=coupled_weight_decay,
            momentum=momentum,
            state_dtype=state_dtype,
            dither=None if position is None or sigma is None else Dither(position, sigma),
            seed=seed % (1 << 64),
            maximize=maximize,
            sums=sums,
            sums_applied=sums_applied,
            gradient_step=gradient_step,
        ),
    )


library.register_fake("signstep::step", lambda *arguments: None)


def step(tensors: Tensors, options: Options) -> None:
    """One step of all tensors, in place, by the operator."""
    rate, decay, seed = options.rate, options.decay, options.seed
    torch.ops.signstep.step(
        tensors.params,
        tensors.grads,
        tensors.exp_avgs,
        tensors.scales,
        tensors.mean_squares,
        options.sums,
        tensors.ordinals,
        tensors.offsets,
        options.step,
        0.0 if isinstance(rate, Tensor) else rate,
        rate if isinstance(rate, Tensor) else None,
        0.0 if isinstance(decay, Tensor) else decay,
        decay if isinstance(decay, Tensor) else None,
        options.coupled_weight_decay,
        options.momentum,
        options.state_dtype,
        None if options.dither is None else options.dither.position,
        None if options.dither is None else options.dither.sigma,
        seed - (1 << 64) if seed >> 63 else seed,
        options.maximize,
        options.sums_applied,
        options.gradient_step,
    )

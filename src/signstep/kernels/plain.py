"""The step in plain torch: one tensor after another, which defines the result, and many at once.

The mathematics of the noise is in `signstep.kernels.reference`, that of the momentum in `signstep.kernels.momentum`,
that of bfloat16 parameters in `signstep.kernels.rounding`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from signstep.kernels import opaque_noise, reference
from signstep.kernels.engine import Direction, Options, Projected, Tensors, real_tensors, sigmas
from signstep.kernels.momentum import enter_momenta, enter_momentum, mean_square, widened
from signstep.kernels.reference import Segment, expected_sign
from signstep.kernels.rounding import rounds_at_random

__all__ = ["dithered", "multi_tensor_step", "single_tensor_step"]


def single_tensor_step(tensors: Tensors, options: Options) -> None:
    """One step, one tensor after another; autograd can follow it. This defines what a step is."""
    tensors = real_tensors(tensors)
    for i, param in enumerate(tensors.params):
        m, grad = enter_momentum(tensors, i, options)
        segment = Segment(tensors.ordinals[i], tensors.offsets[i], m.numel())
        expected = torch.sign(m)
        if options.direction is Direction.MOMENTUM:
            # Under differentiable=True autograd holds this step's average, which the next step overwrites.
            direction = m.clone() if torch.is_grad_enabled() else m
        elif options.direction is Direction.SIGN:
            direction = reference.sign(m)
        else:
            (sigma,) = sigmas(options, tensors.mean_squares[i : i + 1], 1)
            (direction,) = dithered([m.detach()], [sigma], [segment], options)
            if _projects_expected_sign(options):
                expected = expected_sign(m, sigma)
        if tensors.mean_squares:
            tensors.mean_squares[i].copy_(mean_square(m))
        if options.sums is not None:
            _add_sums(options.sums, [expected], [grad])
        target = param
        if isinstance(options.decay, Tensor) or options.decay != 1:
            # Of a copy: autograd holds the factor of an lr that it differentiates, and param is overwritten.
            target = param.to(torch.promote_types(param.dtype, torch.float32), copy=True) * options.decay
        if isinstance(options.rate, Tensor):
            target = target + widened(direction, param) * -options.rate.to(param.device)
        else:
            target = torch.add(target, widened(direction, param), alpha=-options.rate)
        param.copy_(target)
        if rounds_at_random(param.dtype, options):
            # Of the number alone: to autograd, rounding is the identity.
            (rounded,) = opaque_noise.round_parameters(
                [target.detach()], [segment], seed=options.seed, step=options.step
            )
            param.detach().copy_(rounded)


def multi_tensor_step(tensors: Tensors, options: Options) -> None:
    """The same step, all tensors of a device and dtype at once."""
    tensors = real_tensors(tensors)
    grouped = Optimizer._group_tensors_by_device_and_dtype([tensors.params, tensors.grads], with_indices=True)  # type: ignore[list-item]
    for _, indices in grouped.values():
        ms, grads = enter_momenta(tensors, indices, options)
        squares = [tensors.mean_squares[i] for i in indices] if tensors.mean_squares else []
        directions = _directions(tensors, options, indices, ms, grads, squares)
        for kept, m in zip(squares, ms, strict=bool(squares)):
            kept.copy_(mean_square(m))
        _move(tensors, indices, directions, options)


def _projects_expected_sign(options: Options) -> bool:
    # Noise after the sign does not change the expected step.
    return options.projected is Projected.EXPECTED_SIGN and options.direction is Direction.PRE


def _directions(
    tensors: Tensors,
    options: Options,
    indices: Sequence[int],
    ms: list[Tensor],
    grads: list[Tensor],
    mean_squares: list[Tensor],
) -> list[Tensor]:
    """The directions in which tensors of one device and dtype move; their inner products are added to the sums."""
    if options.direction is Direction.MOMENTUM:
        return [m.to(torch.promote_types(m.dtype, torch.float32), copy=True) for m in ms]
    if options.direction is Direction.SIGN:
        directions = list(torch._foreach_sign(ms))
        if options.sums is not None:
            _add_sums(options.sums, directions, grads)
        # sign, with NaN where m is not finite: see reference.sign.
        torch._foreach_add_(directions, ms, alpha=0)
        return directions
    stds = sigmas(options, mean_squares, len(ms))
    if options.sums is not None:
        expected = _projects_expected_sign(options)
        signs = [expected_sign(m, s) if expected else torch.sign(m) for m, s in zip(ms, stds, strict=True)]
        _add_sums(options.sums, signs, grads)
    return dithered(ms, stds, _segments(tensors, indices), options)


def _segments(tensors: Tensors, indices: Sequence[int]) -> list[Segment]:
    return [Segment(tensors.ordinals[i], tensors.offsets[i], tensors.params[i].numel()) for i in indices]


def dithered(
    ms: Sequence[Tensor], stds: Sequence[Tensor], segments: Sequence[Segment], options: Options
) -> list[Tensor]:
    """The noisy signs of momenta on one device, see `signstep.kernels.reference.directions`."""
    position = "post" if options.direction is Direction.POST else "pre"
    return opaque_noise.directions(ms, stds, segments, seed=options.seed, step=options.step, position=position)


def _add_sums(sums: Tensor, directions: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add [<s, g>, ||g||^2] over the lists to sums, in the dtype of sums."""
    for direction, grad in zip(directions, grads, strict=True):
        g = grad.to(sums.dtype)
        sums += torch.stack([(direction.to(sums.dtype) * g).sum(), g.square().sum()]).to(sums.device)


def _move(tensors: Tensors, indices: Sequence[int], directions: Sequence[Tensor], options: Options) -> None:
    """Param <- decay * param - rate * direction, in at least float32 and rounded to the parameter's dtype once.

    May overwrite directions.
    """
    rate, decay = options.rate, options.decay
    params = [tensors.params[i] for i in indices]
    decays = isinstance(decay, Tensor) or decay != 1
    stochastic = rounds_at_random(params[0].dtype, options)
    targets = [widened(p) for p in params] if decays or stochastic else params
    if decays:
        torch._foreach_mul_(targets, decay)
    steps = [widened(d, p) for d, p in zip(directions, params, strict=True)]
    if isinstance(rate, Tensor):
        torch._foreach_mul_(steps, -rate.to(params[0].device))
        torch._foreach_add_(targets, steps)
    else:
        torch._foreach_add_(targets, steps, alpha=-rate)
    if stochastic:
        targets = opaque_noise.round_parameters(
            targets, _segments(tensors, indices), seed=options.seed, step=options.step
        )
    if targets[0] is not params[0]:
        torch._foreach_copy_(params, targets)

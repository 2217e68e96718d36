"""The step in plain torch: one tensor after another, which defines the result, and many at once.

The mathematics of the noise is in `signstep.kernels.reference`, that of the momentum in `signstep.kernels.momentum`,
that of bfloat16 parameters in `signstep.kernels.rounding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from signstep.kernels import opaque_noise, reference
from signstep.kernels.engine import Direction, Measured, Options, Tensors, real_tensors, select, select_options, sigmas
from signstep.kernels.layout import order_is_free, share_dense_order
from signstep.kernels.momentum import BLOCK, enter_momenta, enter_momentum, mean_square, widened
from signstep.kernels.plain_noise import chunk
from signstep.kernels.reference import Segment, expected_direction, expected_sign
from signstep.kernels.rounding import rounds_at_random

__all__ = ["dithered", "multi_tensor_step", "single_tensor_step"]

_PER_THREAD = 1 << 17
"""Elements per thread of a batch on a CPU: few enough for the caches, and enough that threads seldom wait for each
other, which takes milliseconds where data loaders keep the cores busy."""


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
            if options.direction is Direction.EXPECTED:
                direction = expected_direction(m, sigma, options.law)
            else:
                (direction,) = dithered([m.detach()], [sigma], [segment], options)
            if _measures_expected_sign(options):
                expected = expected_sign(m, sigma, options.law)
        if tensors.mean_squares:
            tensors.mean_squares[i].copy_(mean_square(m))
        if options.sums is not None:
            _add_sums(options._replace(sums=options.sums[i : i + 1]), [expected], [grad], [m])
        target = param
        if isinstance(options.decay, Tensor) or options.decay != 1:
            # Of a copy: autograd holds the factor of an lr that it differentiates, and param is overwritten.
            target = param.to(torch.promote_types(param.dtype, torch.float32), copy=True) * options.decay
        if isinstance(options.rate, Tensor):
            rate = options.rate[i] if options.rate.ndim else options.rate
            target = target + widened(direction, param) * -rate.to(param.device)
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
    """The same step, all tensors of a device and dtype at once; on CPUs in batches, which stay in the caches."""
    tensors = real_tensors(tensors)
    grouped = Optimizer._group_tensors_by_device_and_dtype([tensors.params, tensors.grads], with_indices=True)  # type: ignore[list-item]
    for _, indices in grouped.values():
        for members, batch in _batches(tensors, indices, options):
            own = select_options(options, members)
            ms, grads = enter_momenta(batch, own)
            directions = _directions(batch, own, ms, grads)
            for kept, m in zip(batch.mean_squares, ms, strict=bool(batch.mean_squares)):
                kept.copy_(mean_square(m))
            _move(batch, directions, own)
            if options.sums is not None and own.sums is not None:
                options.sums[members] = own.sums


def _batches(tensors: Tensors, indices: list[int], options: Options) -> Iterator[tuple[list[int], Tensors]]:
    """Which tensors are in a batch, and they; all of one device and dtype.

    On CPUs a batch has so many elements, for which large tensors are cut into vectors.

    What is computed of a batch is in the caches when it is used, and in memory that the last batch has used, where
    fresh memory for whole tensors costs more than the step: the kernel fills it with zeros first.
    """
    if tensors.params[indices[0]].device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled():
        yield indices, select(tensors, indices)
        return
    free = order_is_free(options, tensors.params[indices[0]].dtype)
    # Noise is drawn for several elements at a time, so that it takes more of them to occupy a thread.
    most = _PER_THREAD * torch.get_num_threads() if free else -(-chunk() // BLOCK) * BLOCK
    run: list[int] = []
    room = most
    for i in indices:
        size = tensors.params[i].numel()
        if size > room and run:
            yield run, select(tensors, run)
            run, room = [], most
        vectors = _vectors(select(tensors, [i]), options, free) if size > most else None
        if vectors is None:
            run.append(i)
            room -= size
        else:
            for first in range(0, size, most):
                yield [i], _cut(vectors, first, first + most)
    if run:
        yield run, select(tensors, run)


def _vectors(one: Tensors, options: Options, order_is_free: bool) -> Tensors | None:
    """The only tensor as a vector that a step may cut; None if it may not, or if there is no such view."""
    if options.sums is not None or one.mean_squares:
        return None  # Sums over its pieces would be rounded otherwise.
    columns = (one.params, one.grads, one.exp_avgs)
    p, g, *m = (x for column in columns for x in column)
    if all(x.is_contiguous() for x in (p, g, *m)):
        params, grads, exp_avgs = ([x.view(-1) for x in column] for column in columns)
    elif order_is_free and share_dense_order(p, g, *m):
        params, grads, exp_avgs = ([x.as_strided((x.numel(),), (1,)) for x in column] for column in columns)
    else:
        return None
    return one._replace(params=params, grads=grads, exp_avgs=exp_avgs)


def _cut(vector: Tensors, first: int, end: int) -> Tensors:
    """Elements of the only tensor, a vector; `first` begins a block of 8-bit momentum."""
    params, grads, exp_avgs = ([x[first:end] for x in column] for column in vector[:3])
    scales = [x[first // BLOCK : -(-end // BLOCK)] for x in vector.scales]
    return vector._replace(
        params=params, grads=grads, exp_avgs=exp_avgs, scales=scales, offsets=[vector.offsets[0] + first]
    )


def _measures_expected_sign(options: Options) -> bool:
    # Noise after the sign does not change the expected step.
    return options.measured is Measured.EXPECTED_SIGN and options.direction in (Direction.PRE, Direction.EXPECTED)


def _directions(tensors: Tensors, options: Options, ms: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The directions in which tensors of one device and dtype move; their inner products are added to the sums."""
    if options.direction is Direction.MOMENTUM:
        return [m.to(torch.promote_types(m.dtype, torch.float32), copy=True) for m in ms]
    if options.direction is Direction.SIGN:
        directions = list(torch._foreach_sign(ms))
        if options.sums is not None:
            _add_sums(options, directions, grads, ms)
        # sign, with NaN where m is not finite: see reference.sign.
        torch._foreach_add_(directions, ms, alpha=0)
        return directions
    stds = sigmas(options, tensors.mean_squares, len(ms))
    if options.sums is not None:
        expected = _measures_expected_sign(options)
        signs = [expected_sign(m, s, options.law) if expected else m.sign() for m, s in zip(ms, stds, strict=True)]
        _add_sums(options, signs, grads, ms)
    if options.direction is Direction.EXPECTED:
        return [expected_direction(m, s, options.law) for m, s in zip(ms, stds, strict=True)]
    return dithered(ms, stds, _segments(tensors), options)


def _segments(tensors: Tensors) -> list[Segment]:
    sizes = [p.numel() for p in tensors.params]
    return [Segment(*each) for each in zip(tensors.ordinals, tensors.offsets, sizes, strict=True)]


def dithered(
    ms: Sequence[Tensor], stds: Sequence[Tensor], segments: Sequence[Segment], options: Options
) -> list[Tensor]:
    """The noisy signs of momenta on one device, see `signstep.kernels.reference.directions`."""
    position = "post" if options.direction is Direction.POST else "pre"
    return opaque_noise.directions(
        ms, stds, segments, seed=options.seed, step=options.step, position=position, law=options.law
    )


def _add_sums(options: Options, directions: Sequence[Tensor], grads: Sequence[Tensor], ms: Sequence[Tensor]) -> None:
    """Add what is measured of each tensor to its row of the sums, in the dtype of the sums."""
    sums = options.sums
    assert sums is not None
    for i, (direction, grad, m) in enumerate(zip(directions, grads, ms, strict=True)):
        if options.measured is Measured.MOMENTUM:
            # Of a copy: autograd holds what is squared, and the next step overwrites m.
            own = m.clone() if torch.is_grad_enabled() else m
            sums[i, 1] += own.to(sums.dtype).square().sum().to(sums.device)
        else:
            g = grad.to(sums.dtype)
            sums[i] += torch.stack([(direction.to(sums.dtype) * g).sum(), g.square().sum()]).to(sums.device)


def _move(tensors: Tensors, directions: Sequence[Tensor], options: Options) -> None:
    """Param <- decay * param - rate * direction, in at least float32 and rounded to the parameter's dtype once.

    May overwrite directions.
    """
    rate, decay, params = options.rate, options.decay, tensors.params
    decays = isinstance(decay, Tensor) or decay != 1
    stochastic = rounds_at_random(params[0].dtype, options)
    targets = [widened(p) for p in params] if decays or stochastic else params
    if decays:
        torch._foreach_mul_(targets, decay)
    steps = [widened(d, p) for d, p in zip(directions, params, strict=True)]
    if isinstance(rate, Tensor):
        negative = -rate.to(params[0].device)
        torch._foreach_mul_(steps, list(negative.unbind()) if rate.ndim else negative)
        torch._foreach_add_(targets, steps)
    else:
        torch._foreach_add_(targets, steps, alpha=-rate)
    if stochastic:
        targets = opaque_noise.round_parameters(targets, _segments(tensors), seed=options.seed, step=options.step)
    if targets[0] is not params[0]:
        torch._foreach_copy_(params, targets)

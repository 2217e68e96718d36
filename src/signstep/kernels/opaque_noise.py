"""The noise of plain torch, drawn by an operator inside torch.compile, which calls it and does not trace it.

Traced, Philox alone is a thousand operations, and the compiler takes minutes. An operator also draws the very bits
that the step draws without the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, library

from signstep.kernels import plain_noise, rounding
from signstep.kernels.reference import Segment

_SEGMENTS = "int[] parameters, int[] starts, int[] sizes"
library.define(
    "signstep::directions",
    f"(Tensor[] ms, Tensor[] sigmas, {_SEGMENTS}, int seed, Tensor step, str position, str law) -> Tensor[]",
)
library.define("signstep::round_parameters", f"(Tensor[] values, {_SEGMENTS}, int seed, Tensor step) -> Tensor[]")
library.define("signstep::noise_bytes", f"({_SEGMENTS}, int stream, int seed, Tensor step, Device device) -> Tensor[]")


def in_operators() -> bool:
    """Whether a compiler is tracing, and autograd is not: it could not follow an operator."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def directions(
    ms: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    segments: Sequence[Segment],
    *,
    seed: int,
    step: Tensor,
    position: str,
    law: str = "gaussian",
) -> list[Tensor]:
    """See `signstep.kernels.reference.directions`."""
    if not in_operators():
        return plain_noise.directions(ms, sigmas, segments, seed=seed, step=step, position=position, law=law)
    drawn: list[Tensor] = torch.ops.signstep.directions(
        ms, sigmas, *zip(*segments, strict=True), signed(seed), step, position, law
    )
    return drawn


def round_parameters(values: Sequence[Tensor], segments: Sequence[Segment], *, seed: int, step: Tensor) -> list[Tensor]:
    """See `signstep.kernels.rounding.round_parameters`."""
    if not in_operators():
        return rounding.round_parameters(values, segments, seed=seed, step=step)
    rounded: list[Tensor] = torch.ops.signstep.round_parameters(
        values, *zip(*segments, strict=True), signed(seed), step
    )
    return rounded


def noise_bytes(
    segments: Sequence[Segment], stream: int, *, seed: int, step: Tensor, device: torch.device
) -> list[Tensor]:
    """See `signstep.kernels.plain_noise.noise_bytes`."""
    if not in_operators():
        return plain_noise.noise_bytes(segments, stream, seed=seed, step=step, device=device)
    drawn: list[Tensor] = torch.ops.signstep.noise_bytes(
        *zip(*segments, strict=True), stream, signed(seed), step, device
    )
    return drawn


def signed(seed: int) -> int:
    """The signed 64-bit number with the bits of an unsigned one, which operators do not take."""
    return seed - (1 << 64) if seed >> 63 else seed


def unsigned(seed: int) -> int:
    """The inverse of `signed`."""
    return seed % (1 << 64)


def _segments(parameters: list[int], starts: list[int], sizes: list[int]) -> list[Segment]:
    return [Segment(*each) for each in zip(parameters, starts, sizes, strict=True)]


@library.impl("signstep::directions", "CompositeExplicitAutograd")
def _run_directions(
    ms: list[Tensor],
    sigmas: list[Tensor],
    parameters: list[int],
    starts: list[int],
    sizes: list[int],
    seed: int,
    step: Tensor,
    position: str,
    law: str,
) -> list[Tensor]:
    segments = _segments(parameters, starts, sizes)
    return plain_noise.directions(ms, sigmas, segments, seed=unsigned(seed), step=step, position=position, law=law)


@library.impl("signstep::round_parameters", "CompositeExplicitAutograd")
def _run_round_parameters(
    values: list[Tensor], parameters: list[int], starts: list[int], sizes: list[int], seed: int, step: Tensor
) -> list[Tensor]:
    return rounding.round_parameters(values, _segments(parameters, starts, sizes), seed=unsigned(seed), step=step)


@library.impl("signstep::noise_bytes", "CompositeExplicitAutograd")
def _run_noise_bytes(
    parameters: list[int],
    starts: list[int],
    sizes: list[int],
    stream: int,
    seed: int,
    step: Tensor,
    device: torch.device,
) -> list[Tensor]:
    return plain_noise.noise_bytes(
        _segments(parameters, starts, sizes), stream, seed=unsigned(seed), step=step, device=device
    )


library.register_fake(
    "signstep::directions",
    lambda ms, *others: [torch.empty(m.shape, dtype=torch.float32, device=m.device) for m in ms],
)
library.register_fake(
    "signstep::round_parameters",
    lambda values, *others: [torch.empty(x.shape, dtype=torch.bfloat16, device=x.device) for x in values],
)
library.register_fake(
    "signstep::noise_bytes",
    lambda parameters, starts, sizes, stream, seed, step, device: [
        torch.empty(size, dtype=torch.int32, device=device) for size in sizes
    ],
)

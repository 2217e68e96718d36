"""Sums over large tensors, and how they become the numbers and words of a record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from signstep.kernels.engine import real
from signstep.kernels.reference import wide_dtype

__all__ = ["chunks", "finite", "flat", "inner_product", "span", "to_floats"]

_CHUNK = 1 << 16


def flat(x: Tensor) -> Tensor:
    """The real coordinates of a tensor, 1-D, at least float32."""
    coordinates = real(x.detach()).reshape(-1)
    return coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of 1-D tensors of one length: on a CPU so small that work on them stays in its cache, else all at once."""
    size = _CHUNK if tensors[0].device.type == "cpu" else max(1, len(tensors[0]))
    return zip(*(torch.split(x, size) for x in tensors), strict=True)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of two 1-D tensors, 0-dim, in the widest float type of the device.

    Products are rounded to the wider of the two types, so what is below 1e-38 in float32 is lost.
    """
    wide = wide_dtype(a.device)
    if a.device.type != "cpu":
        return (a * b).sum(dtype=wide)
    total = torch.zeros((), dtype=wide, device=a.device)
    for x, y in chunks(a, b):
        total += torch.dot(x, y)
    return total


def to_floats(values: Sequence[Tensor]) -> list[float]:
    """0-dim tensors of any device as numbers, in one transfer per device."""
    result = [0.0] * len(values)
    for device in {v.device for v in values}:
        at = [i for i, v in enumerate(values) if v.device == device]
        for i, value in zip(at, torch.stack([values[i].to(wide_dtype(device)) for i in at]).tolist(), strict=True):
            result[i] = value
    return result


def finite(x: float | None) -> float | None:
    """The number, or None where it is not finite, which a record cannot hold."""
    return x if x is not None and abs(x) < float("inf") else None


def span(values: Sequence[float | None], digits: int) -> str:
    """The least and the greatest of the known values in words, "1 to 2"."""
    known = [x for x in values if x is not None]
    if not known:
        return "unknown"
    low, high = f"{min(known):.{digits}g}", f"{max(known):.{digits}g}"
    return low if low == high else f"{low} to {high}"

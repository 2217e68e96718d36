"""What a step over the network costs, before anything runs: `signstep plan`. What a vote is worth: theory/vote.py.

Bytes follow from the collectives that each method uses, with n coordinates and M workers; the time is that of the bytes
on the wire, and of nothing else. Work of the processor is not in it: `signstep bench comm` measures it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from signstep.distributed.compressors import METHODS as COMPRESSORS
from signstep.distributed.compressors import EFSign

__all__ = [
    "METHODS",
    "Cost",
    "Gradients",
    "Method",
    "Prediction",
    "bits_per_second",
    "outside",
    "predict",
]

FRAMING = 1514 / 1448
"""Bytes on an Ethernet link per byte of payload: TCP over IPv4, frames of 1500 bytes."""
POWERSGD_RANK = 2
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes, of DistributedDataParallel
_SIDE = 1000
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def bits_per_second(text: str) -> float:
    """A rate as tc writes it.

    Raises:
        ValueError: not a number above 0 with the unit bit, kbit, mbit or gbit.

    >>> bits_per_second("100mbit")
    100000000.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text.strip().lower())
    rate = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not rate > 0:
        raise ValueError(f"{text}: expected a rate such as 100mbit or 1gbit")
    return rate


@dataclass(frozen=True)
class Gradients:
    """The gradients of one step, float32, by their shapes.

    >>> Gradients(((512, 4608), (512,))).parameters
    2359808
    """

    shapes: Sequence[tuple[int, ...]]

    @classmethod
    def square(cls, parameters: int) -> Gradients:
        """So many parameters in square matrices of at most 1000 x 1000, for who knows no more than their number.

        >>> Gradients.square(2_500_000).shapes
        ((1000, 1000), (1000, 1000), (500, 1000))
        """
        side = min(_SIDE, math.isqrt(parameters))
        rows, rest = divmod(parameters, side)
        full, more = divmod(rows, side)
        shapes: list[tuple[int, ...]] = [(side, side)] * full
        shapes += [(more, side)] if more else []
        return cls((*shapes, (rest,)) if rest else tuple(shapes))

    @property
    def parameters(self) -> int:
        """How many numbers they are."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def buckets(self) -> int:
        """Into how many parts DistributedDataParallel divides them with its default sizes, about."""
        return 1 + math.ceil(max(0, 4 * self.parameters - _FIRST_BUCKET) / _BUCKET)


@dataclass(frozen=True)
class Method:
    """A way to reduce gradients over the network."""

    label: str
    payload: Callable[[Gradients, int], float]
    """Bytes that each of M workers sends in a step, without padding and headers."""
    collectives: int = 1
    """For each bucket, one after the other."""


def _all_reduce(bits: float) -> Callable[[Gradients, int], float]:
    """A ring all-reduce, or all-to-all and all-gather: (M - 1) / M of all coordinates out and back, `bits` each way."""
    return lambda gradients, workers: 2 * gradients.parameters * bits / 8 * (workers - 1) / workers


def _power_sgd(gradients: Gradients, workers: int) -> float:
    # As torch's PowerSGDState decides by default: what would not shrink by half is sent as it is.
    sent = 0
    for shape in gradients.shapes:
        rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
        factors = (rows + columns) * min(rows, columns, POWERSGD_RANK)
        sent += factors if 2 * factors < rows * columns else rows * columns
    return 8 * sent * (workers - 1) / workers


def _compressed(label: str, key: str) -> Method:
    compressor = EFSign(two_sided=True) if key == "one-bit-adam" else COMPRESSORS[key]()
    return Method(
        label,
        lambda gradients, workers: gradients.parameters * compressor.bytes_per_parameter(workers),
        2 if compressor.two_sided else 1,
    )


METHODS = {
    "ddp-fp32": Method("DDP, fp32", _all_reduce(32)),
    "bf16": Method("DDP, bf16", _all_reduce(16)),
    "powersgd": Method(f"PowerSGD, rank {POWERSGD_RANK}", _power_sgd, 3),
    "int8-sum": Method("int8 sum of signs", _all_reduce(8)),
    "vote": Method("vote", _all_reduce(1), 2),
    "vote-dithered": Method("vote, dithered", _all_reduce(1), 2),
    "vote-abstain": Method("vote, ties abstain", _all_reduce(1.5), 2),
    "vote-ef": Method("vote, error feedback", _all_reduce(1), 2),
    "ef-sign": _compressed("EF-SignSGD", "ef-sign"),
    "ef-sign-two-sided": _compressed("EF-SignSGD, two-sided", "ef-sign-two-sided"),
    "one-bit-sgd": _compressed("1-bit SGD", "one-bit-sgd"),
    "one-bit-adam": _compressed("1-bit Adam", "one-bit-adam"),
    "terngrad": _compressed("TernGrad", "terngrad"),
    "qsgd": _compressed("QSGD, 4 bits", "qsgd"),
    "top-k": _compressed("Top-K, 1 %", "top-k"),
}
"""Every method by its key, the same as in `signstep bench comm`."""


@dataclass(frozen=True)
class Cost:
    """What a step is done with; times in seconds."""

    workers: int
    bandwidth: float
    """Of each worker's link, in bits per second in both directions at once."""
    step: float
    """Time of a step without communication."""
    latency: float = 0.0
    """Of one collective."""


@dataclass(frozen=True)
class Prediction:
    """Bytes per worker and step, and times in seconds."""

    payload: float
    communication: float
    best: float
    """Of a step whose communication overlaps with backward as far as it can."""
    worst: float
    """Of a step that overlaps with nothing."""


def predict(method: Method, gradients: Gradients, cost: Cost) -> Prediction:
    """What a step costs with a method.

    Raises:
        ValueError: fewer than one worker.

    Example:
        >>> found = predict(METHODS["ddp-fp32"], Gradients.square(4_000_000), Cost(4, 100e6, step=0.08))
        >>> found.payload, round(found.communication, 2)
        (24000000.0, 2.01)
    """
    if cost.workers < 1:
        raise ValueError(f"workers={cost.workers}: expected at least 1")
    payload = method.payload(gradients, cost.workers)
    communication = payload * FRAMING * 8 / cost.bandwidth
    if cost.workers > 1:
        communication += method.collectives * gradients.buckets * cost.latency
    return Prediction(payload, communication, max(cost.step, communication), cost.step + communication)


def outside(measured: float, low: float, high: float) -> float:
    """By what share of the nearer bound a measurement is below (negative) or above an interval; 0 inside.

    >>> outside(3.0, 1.0, 2.0), outside(1.5, 1.0, 2.0)
    (0.5, 0.0)
    """
    if measured < low:
        return measured / low - 1
    return max(0.0, measured / high - 1)

"""What a step over the network costs, before anything runs: `signstep plan`. What a vote is worth: theory/vote.py.

Bytes follow from the collectives that each method uses, with n coordinates and M workers; the time is that of the bytes
on the wire, and of nothing else. Work of the processor is not in it: `signstep bench comm` measures it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from signstep.distributed.reductions import Gradients, Reduction

__all__ = [
    "Cost",
    "Link",
    "Prediction",
    "bits_per_second",
    "outside",
    "predict",
]

FRAMING = 1514 / 1448
"""Bytes on an Ethernet link per byte of payload: TCP over IPv4, frames of 1500 bytes."""
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


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
class Link:
    """What connects each worker with the others."""

    rate: float
    """In bits per second, in both directions at once."""
    latency: float = 0.0
    """Of a round trip between two workers, in seconds, as ping shows it: half of it each way."""

    @classmethod
    def of(cls, text: str) -> Link:
        """A rate as tc writes it, and with a slash the latency.

        Raises:
            ValueError: not a number above 0 with the unit bit, kbit, mbit or gbit; or no number with us, ms or s after
                the slash.

        >>> Link.of("10mbit/50ms"), Link.of("1gbit")
        (Link(rate=10000000.0, latency=0.05), Link(rate=1000000000.0, latency=0.0))
        """
        rate, slash, latency = text.partition("/")
        if not slash:
            return cls(bits_per_second(rate))
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", latency.strip().lower())
        if not found:
            raise ValueError(f"{text}: expected a rate and the latency of a round trip, such as 10mbit/50ms")
        return cls(bits_per_second(rate), float(found[1]) * _SECONDS[found[2]])


@dataclass(frozen=True)
class Cost:
    """What a step is done with; times in seconds."""

    workers: int
    link: Link
    step: float
    """Time of a step without communication."""


@dataclass(frozen=True)
class Prediction:
    """Bytes per worker and step, and times in seconds."""

    payload: float
    communication: float
    best: float
    """Of a step whose communication overlaps with backward as far as it can."""
    worst: float
    """Of a step that overlaps with nothing."""


def predict(reduction: Reduction, gradients: Gradients, cost: Cost) -> Prediction:
    """What a step costs with a way to reduce gradients.

    Raises:
        ValueError: fewer than one worker.

    Example:
        >>> from signstep.distributed.reductions import REDUCTIONS
        >>> found = predict(REDUCTIONS["ddp-fp32"], Gradients.square(4_000_000), Cost(4, Link(100e6), step=0.08))
        >>> found.payload, round(found.communication, 2)
        (24000000.0, 2.01)
    """
    if cost.workers < 1:
        raise ValueError(f"workers={cost.workers}: expected at least 1")
    payload = reduction.payload(gradients, cost.workers)
    communication = payload * FRAMING * 8 / cost.link.rate
    if cost.workers > 1:
        communication += reduction.delays(cost.workers) * gradients.buckets * cost.link.latency / 2
    return Prediction(payload, communication, max(cost.step, communication), cost.step + communication)


def outside(measured: float, low: float, high: float) -> float:
    """By what share of the nearer bound a measurement is below (negative) or above an interval; 0 inside.

    >>> outside(3.0, 1.0, 2.0), outside(1.5, 1.0, 2.0)
    (0.5, 0.0)
    """
    if measured < low:
        return measured / low - 1
    return max(0.0, measured / high - 1)

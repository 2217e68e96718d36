"""What a step over the network costs, before anything runs: `signstep plan`. What a vote is worth: theory/vote.py.

Bytes follow from the collectives that each method uses, with n coordinates and M workers. The time is that of the bytes
on the wire, of the links' latency as often as the collectives wait for it, and of the processor's work, which is a
machine's own and has to be given: `signstep bench comm` measures it. TCP's slow start and lost packets are not in it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from signstep.distributed.local_methods import LocalMethod
from signstep.distributed.reductions import Gradients, Reduction

__all__ = [
    "Cost",
    "Link",
    "Prediction",
    "bits_per_second",
    "outside",
    "predict",
    "steps_under_way",
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
    """What a step is done with."""

    workers: int
    link: Link
    step: float
    """Seconds of a step without communication."""


@dataclass(frozen=True)
class Prediction:
    """Bytes per worker and step, and times in seconds; where workers talk once in H steps, a step's share of them."""

    payload: float
    wire: float
    """Of the bytes, headers included, on a worker's link."""
    waiting: float
    """Of the links' latency, every bucket's or message's after the other's."""
    work: float
    """Of the processor, for packing, sending and unpacking."""
    best: float
    """Of a step whose communication overlaps with steps as far as it can, and whose messages wait at the same time."""
    worst: float
    """Of a step that overlaps with nothing."""

    @property
    def communication(self) -> float:
        """Of bytes and latency together."""
        return self.wire + self.waiting


def predict(
    method: Reduction | LocalMethod, gradients: Gradients, cost: Cost, *, work: float = 0.0, every: int = 1
) -> Prediction:
    """What a step costs with a way to reduce gradients, or to agree now and then.

    Args:
        method: of `REDUCTIONS` or `LOCAL_METHODS`.
        gradients: or weights, in a round.
        cost: the rest.
        work: processor seconds of one reduction or round.
        every: H, steps per reduction or round.

    Raises:
        ValueError: fewer than one worker or step.

    Example:
        >>> from signstep.distributed.local_methods import LOCAL_METHODS
        >>> from signstep.distributed.reductions import REDUCTIONS
        >>> model, cost = Gradients.square(4_000_000), Cost(4, Link(100e6), step=0.08)
        >>> found = predict(REDUCTIONS["ddp-fp32"], model, cost)
        >>> found.payload, round(found.communication, 2)
        (24000000.0, 2.01)
        >>> predict(LOCAL_METHODS["local-vote"], model, cost, every=32).payload
        23439.75
    """
    if cost.workers < 1:
        raise ValueError(f"workers={cost.workers}: expected at least 1")
    if every < 1:
        raise ValueError(f"every={every}: expected at least 1 step")
    payload = method.payload(gradients, cost.workers) / every
    wire = payload * FRAMING * 8 / cost.link.rate
    latency = cost.link.latency / every if cost.workers > 1 else 0.0
    waiting = method.round_trips(gradients, cost.workers) * latency
    least = method.least_trips(gradients, cost.workers) * latency
    busy = cost.step + work / every
    return Prediction(payload, wire, waiting, work / every, max(busy, wire + least), busy + wire + waiting)


def steps_under_way(found: Prediction, cost: Cost, every: int) -> int:
    """The steps that a worker takes while a round's bytes travel: the `delay` of `LocalVote`, below H.

    >>> cost = Cost(4, Link(100e6), step=0.08)
    >>> model = Gradients.square(4_000_000)
    >>> from signstep.distributed.local_methods import LOCAL_METHODS
    >>> steps_under_way(predict(LOCAL_METHODS["local-vote"], model, cost, every=32), cost, every=32)
    1
    """
    whole, most = every * found.communication, every - 1
    return most if whole >= most * cost.step else math.ceil(whole / cost.step)


def outside(measured: float, low: float, high: float) -> float:
    """By what share of the nearer bound a measurement is below (negative) or above an interval; 0 inside.

    >>> outside(3.0, 1.0, 2.0), outside(1.5, 1.0, 2.0)
    (0.5, 0.0)
    """
    if measured < low:
        return measured / low - 1
    return max(0.0, measured / high - 1)

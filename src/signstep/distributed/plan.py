r"""What a step over the network costs and what a vote is worth, before anything runs: `signstep plan`.

Bytes follow from the collectives that each method uses, with n coordinates and M workers; the time is that of the bytes
on the wire, and of nothing else. Work of the processor is not in it: `signstep bench comm` measures it.

With :math:`q = \Phi(m / \sigma)` the chance that one worker's dithered sign is right, and a tie decided by a coin, the
vote of M workers has the expectation

.. math::
    \mathbb E v = P(B > M / 2) - P(B < M / 2), \qquad B \sim \mathrm{Binomial}(M, q)
"""

from __future__ import annotations

import bisect
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
    "accuracy",
    "bits_per_second",
    "colluders_survived",
    "expected_vote",
    "linear_slope",
    "outside",
    "predict",
]

FRAMING = 1514 / 1448
"""Bytes on an Ethernet link per byte of payload: TCP over IPv4, frames of 1500 bytes."""
POWERSGD_RANK = 2
_FIRST_BUCKET, _BUCKET = 2**20, 25 * 2**20  # bytes, of DistributedDataParallel
_SIDE = 1000
_ROUNDING = 1e-12
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


def accuracy(snr: float) -> float:
    """The chance that one worker's dithered sign is right: Phi(m / sigma).

    >>> accuracy(0.0)
    0.5
    """
    return math.erfc(-snr / math.sqrt(2)) / 2


def _binomial(count: int, chance: float) -> list[float]:
    """P(B = 0), ..., P(B = count)."""
    if chance in (0.0, 1.0):
        certain = int(count * chance)
        return [float(k == certain) for k in range(count + 1)]
    up, down = math.log(chance), math.log1p(-chance)
    ways = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(count + 1)]
    return [math.exp(w + k * up + (count - k) * down) for k, w in enumerate(ways)]


def expected_vote(snr: float, workers: int, *, flipping: int = 0, colluding: int = 0) -> float:
    """E v in units of the right sign, in [-1, 1]: ties are a fair coin.

    Args:
        snr: m / sigma of each worker, at least 0; infinity is no noise at all.
        workers: M, attackers included.
        flipping: of them, those that cast the opposite of their own sign.
        colluding: of them, those that all cast the wrong sign.

    Raises:
        ValueError: fewer than one worker, or more attackers than workers.

    Example:
        >>> round(expected_vote(0.1, 15), 3), round(expected_vote(0.1, 15, colluding=3), 3)
        (0.247, -0.44)
    """
    honest = workers - flipping - colluding
    if workers < 1 or min(flipping, colluding, honest) < 0:
        raise ValueError(
            f"workers={workers}, flipping={flipping}, colluding={colluding}: expected at least one worker, and no more "
            "attackers than workers"
        )
    chance = accuracy(snr)
    right = [0.0] * (honest + flipping + 1)
    for i, p in enumerate(_binomial(honest, chance)):
        for j, r in enumerate(_binomial(flipping, 1 - chance)):
            right[i + j] += p * r
    for_it = math.fsum(p for votes, p in enumerate(right) if 2 * votes > workers)
    against = math.fsum(p for votes, p in enumerate(right) if 2 * votes < workers)
    return for_it - against


def linear_slope(workers: int) -> float:
    r"""The slope of `expected_vote` at 0: :math:`\sqrt{2/\pi}\, M \binom{M-1}{(M-1)/2} 2^{1-M}` for odd M.

    A vote of an even number of workers is worth as much as that of one worker fewer.

    >>> round(linear_slope(1), 2), round(linear_slope(15), 2), linear_slope(16) == linear_slope(15)
    (0.8, 2.51, True)
    """
    odd = workers - 1 + workers % 2
    ways = math.lgamma(odd) - 2 * math.lgamma((odd + 1) / 2)
    return math.sqrt(2 / math.pi) * odd * math.exp(ways + (1 - odd) * math.log(2))


def colluders_survived(snr: float, workers: int) -> tuple[float, int]:
    """How many workers that all cast the wrong sign a coordinate survives: a share, and a number of these workers.

    The share is the limit of many workers, below which (1 - a) q > 1/2: a < 1 - 1 / (2 q). The number is the largest
    that leaves `expected_vote` above 0, or 0. Workers that flip their own signs must be half of all at any snr above 0,
    since (1 - a) q + a (1 - q) > 1/2 is a < 1/2.

    >>> colluders_survived(1.0, 15)
    (0.405..., 6)
    """
    share = 1 - 1 / (2 * accuracy(snr))
    reversed_at = bisect.bisect_left(
        range(workers + 1), True, key=lambda f: expected_vote(snr, workers, colluding=f) < _ROUNDING
    )
    return share, max(0, reversed_at - 1)

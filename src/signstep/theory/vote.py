r"""What a vote is worth: the expected vote of M workers, its slope at 0, and the attackers that it survives.

Let :math:`q = \Phi(m / \sigma)` be the chance that one worker's dithered sign is right, or of uniform noise
:math:`\min(1, (1 + m / (\sqrt3\,\sigma)) / 2)`, and let a coin decide ties.
Then the vote of M workers has the expectation

.. math::
    \mathbb E v = P(B > M / 2) - P(B < M / 2), \qquad B \sim \mathrm{Binomial}(M, q)
"""

from __future__ import annotations

import bisect
import math

__all__ = ["accuracy", "colluders_survived", "expected_vote", "linear_slope"]

_ROUNDING = 1e-12


def accuracy(snr: float, law: str = "gaussian") -> float:
    """The chance that one worker's dithered sign is right: Phi(m / sigma), of "uniform" noise a line until it is 1.

    >>> accuracy(0.0), round(accuracy(1.0), 3), round(accuracy(1.0, "uniform"), 3), accuracy(2.0, "uniform")
    (0.5, 0.841, 0.789, 1.0)
    """
    if law == "uniform":
        return min(max(0.5 + snr / math.sqrt(12), 0.0), 1.0)
    return math.erfc(-snr / math.sqrt(2)) / 2


def _binomial(count: int, chance: float) -> list[float]:
    """P(B = 0), ..., P(B = count)."""
    if chance in (0.0, 1.0):
        certain = int(count * chance)
        return [float(k == certain) for k in range(count + 1)]
    up, down = math.log(chance), math.log1p(-chance)
    ways = [math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(count + 1)]
    return [math.exp(w + k * up + (count - k) * down) for k, w in enumerate(ways)]


def expected_vote(snr: float, workers: int, *, flipping: int = 0, colluding: int = 0, law: str = "gaussian") -> float:
    """E v, counted as positive in the direction of the right sign, in [-1, 1]; a fair coin decides ties.

    Args:
        snr: m / sigma of each worker, at least 0; infinity is no noise at all.
        workers: M, attackers included.
        flipping: how many of them cast the opposite of their own sign.
        colluding: how many of them all cast the wrong sign.
        law: of the noise, "gaussian" or "uniform".

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
    chance = accuracy(snr, law)
    right = [0.0] * (honest + flipping + 1)
    for i, p in enumerate(_binomial(honest, chance)):
        for j, r in enumerate(_binomial(flipping, 1 - chance)):
            right[i + j] += p * r
    for_it = math.fsum(p for votes, p in enumerate(right) if 2 * votes > workers)
    against = math.fsum(p for votes, p in enumerate(right) if 2 * votes < workers)
    return for_it - against


def linear_slope(workers: int, law: str = "gaussian") -> float:
    r"""The slope of `expected_vote` at 0: :math:`\sqrt{2/\pi}\, M \binom{M-1}{(M-1)/2} 2^{1-M}` for odd M.

    Of "uniform" noise :math:`1 / \sqrt3` stands for :math:`\sqrt{2/\pi}`. A vote of an even number of workers is worth
    as much as that of one worker fewer.

    >>> round(linear_slope(1), 2), round(linear_slope(15), 2), linear_slope(16) == linear_slope(15)
    (0.8, 2.51, True)
    >>> round(linear_slope(1, "uniform") / linear_slope(1), 4)
    0.7236
    """
    one = 1 / math.sqrt(3) if law == "uniform" else math.sqrt(2 / math.pi)
    odd = workers - 1 + workers % 2
    ways = math.lgamma(odd) - 2 * math.lgamma((odd + 1) / 2)
    return one * odd * math.exp(ways + (1 - odd) * math.log(2))


def colluders_survived(snr: float, workers: int) -> tuple[float, int]:
    """How many workers may all cast the wrong sign before a coordinate is turned: a share, and a number of workers.

    The share is the limit for many workers, below which (1 - a) q > 1/2: a < 1 - 1 / (2 q). The number is the largest
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

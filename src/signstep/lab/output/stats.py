"""Means over seeds with their 95% t-interval, paired differences, and what they say in words.

Numbers are in whatever unit their metric has, percent or bits. One seed has no interval: nothing here invents one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
LEVEL = 0.05
"""A p below it decides."""
MIN_SEEDS = 3
"""Fewer decide nothing: the interval of two values is 13 times as wide as they are apart."""

Verdict = Literal["same sign", "opposite sign", "undecided"]


@dataclass(frozen=True)
class MeanEstimate:
    """A mean over n independent values and, from n = 2 on, its 95% interval."""

    n: int
    mean: float
    half_width: float | None
    """Half the interval's width; None where n = 1, because one value says nothing about its own spread."""

    @property
    def low(self) -> float | None:
        """Lower end of the interval, None without one."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the interval, None without one."""
        return None if self.half_width is None else self.mean + self.half_width

    def contains(self, value: float) -> bool | None:
        """Whether `value` lies in the interval, ends included; None without an interval."""
        return None if self.half_width is None else abs(value - self.mean) <= self.half_width

    def p_value(self, value: float = 0.0) -> float | None:
        """Two-sided p of the t-test that the mean is `value`; None without an interval.

        >>> round(estimate([1.0, 2.0, 4.0]).p_value(), 4)
        0.1181
        """
        if self.half_width is None:
            return None
        if self.half_width == 0:
            return float(self.mean == value)
        import scipy.stats

        t = (self.mean - value) * _t_factor(self.n) * math.sqrt(self.n) / self.half_width
        return float(2 * scipy.stats.t.sf(abs(t), self.n - 1))


@cache
def _t_factor(n: int) -> float:
    import scipy.stats  # when first needed: a command's options need this file's numbers as text alone

    return float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) / math.sqrt(n)


def estimate(values: Sequence[float]) -> MeanEstimate:
    """Mean and 95% interval t(n-1) s / sqrt(n), s the sample standard deviation, of independent values.

    Raises ValueError if there is no value or one is not finite.

    >>> e = estimate([70.0, 71.0, 72.0])
    >>> e.n, e.mean, round(e.half_width, 2)
    (3, 71.0, 2.48)
    >>> estimate([70.0]).half_width is None
    True
    """
    if not values:
        raise ValueError("no values: a mean needs at least one")
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"values {list(values)!r}: expected finite numbers, leave out or replace what is not measured")
    n = len(array)
    half_width = _t_factor(n) * float(array.std(ddof=1)) if n > 1 else None
    return MeanEstimate(n, float(array.mean()), half_width)


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> MeanEstimate | None:
    """Mean of values - baseline over the seeds that both have, with the 95% interval of the paired t-test.

    Args:
        values: the result by seed.
        baseline: the result by seed of the method compared with.

    Returns None if no seed is common. `n` of the result is the number of common seeds.

    >>> paired_difference({0: 71.0, 1: 72.0, 2: 70.0}, {0: 70.0, 1: 71.0, 7: 10.0})
    MeanEstimate(n=2, mean=1.0, half_width=0.0)
    """
    seeds = sorted(values.keys() & baseline.keys())
    return estimate([values[s] - baseline[s] for s in seeds]) if seeds else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Corrects p for their number (Holm 1979): those below 0.05 contain a true null with a chance of 5 % at most.

    The k-th smallest of n, k from 0, is multiplied by n - k; none is smaller than one before it, or above 1. None is
    what has no test: it does not count and stays.

    >>> holm([0.01, None, 0.04, 0.03])
    [0.03, None, 0.06, 0.06]
    """
    p = np.array([each for each in p_values if each is not None])
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    tested = iter(corrected)
    return [None if each is None else float(next(tested)) for each in p_values]


def claim_verdict(difference: MeanEstimate, claimed: float, p: float | None) -> Verdict:
    """Whether a measured difference has the sign of a claimed one.

    Args:
        difference: the measured one.
        claimed: the claimed one.
        p: of the measured one, corrected for the number of tests beside it; None: it has one seed.

    "same sign" and "opposite sign" need a p below 0.05; all else is "undecided".
    """
    if p is None or p >= LEVEL or claimed == 0:
        return "undecided"
    return "same sign" if (difference.mean > 0) == (claimed > 0) else "opposite sign"


def number(value: float, digits: int = 2) -> str:
    """`value` with a fixed number of digits and a typographic minus; a rounded zero carries no sign.

    >>> number(-1.234), number(-0.001)
    ('−1.23', '0.00')
    """
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """As `number`, with a plus where positive."""
    text = number(value, digits)
    return f"+{text}" if float(text.replace("−", "-")) > 0 else text


def with_interval(e: MeanEstimate, *, sign: bool = False, digits: int = 2) -> str:
    """'71.00 ± 2.48', or the mean alone where there is no interval."""
    mean = signed(e.mean, digits) if sign else number(e.mean, digits)
    return mean if e.half_width is None else f"{mean} ± {number(e.half_width, digits)}"


def probability(p: float) -> str:
    """A p to two significant digits, or that it is very small.

    >>> probability(0.0312), probability(4e-7)
    ('0.031', '4e−7')
    """
    if 0 < p < 1e-4:
        mantissa, _, exponent = f"{p:.0e}".partition("e")
        return f"{mantissa}e−{abs(int(exponent))}"
    return f"{p:.2g}" if p < 0.995 else "1"


def paper_number(value: float) -> str:
    """A number as the paper prints it: 91.38 and 77, not 77.00."""
    return f"{value:g}".replace("-", "−")


def against_paper(e: MeanEstimate, paper: float) -> str:
    """One phrase that sets a measured mean beside the paper's single number.

    >>> against_paper(MeanEstimate(3, 92.5, 0.2), 91.4)
    "higher than the paper's number by 1.10; the interval excludes it"
    >>> against_paper(MeanEstimate(1, 90.0, None), 91.4)
    "lower than the paper's number by 1.40; one seed, no interval"
    """
    shift = e.mean - paper
    if abs(shift) < 0.005:
        phrase = "equal to the paper's number"
    else:
        phrase = f"{'higher' if shift > 0 else 'lower'} than the paper's number by {number(abs(shift))}"
    inside = e.contains(paper)
    if inside is None:
        return f"{phrase}; one seed, no interval"
    return f"{phrase}; the interval {'includes' if inside else 'excludes'} it"

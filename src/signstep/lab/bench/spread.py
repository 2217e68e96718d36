"""How a benchmark sums up its rounds, and the error of one that cannot be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from signstep.lab.errors import UserError


class BenchError(UserError, RuntimeError):
    """What is timed does not do what it should, so there are no numbers to report."""


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile over rounds.

    >>> print(Spread.of([1.0, 3.0]))
    2.00 (1.20–2.80)
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values."""
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[0], deciles[-1])

    def scaled(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(factor * self.median, factor * self.low, factor * self.high)

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}–{number(self.high)})"


def number(value: float) -> str:
    """Three digits, or all before the point.

    >>> number(1.234), number(12.34), number(1234.5)
    ('1.23', '12.3', '1,234')
    """
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"

"""What an interval says of a claim about the size of a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from signstep.lab.output import stats

Outcome = Literal["holds", "holds under conditions", "does not hold", "undecided", "not measured yet"]
OUTCOMES: tuple[Outcome, ...] = Outcome.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Bound:
    """A claim about a number: that it is above a bound, below it, or no further than it from 0."""

    kind: Literal["above", "below", "within"]
    size: float

    @property
    def text(self) -> str:
        """As printed.

        >>> Bound("above", 0).text, Bound("within", 1).text
        ('> 0', 'within ±1')
        """
        return {"above": "> ", "below": "< ", "within": "within ±"}[self.kind] + f"{self.size:g}".replace("-", "−")

    def nearest(self, value: float) -> float:
        """The edge of the claim that is nearest to a value; the test that decides is against it."""
        return -self.size if self.kind == "within" and value < 0 else self.size

    def allows(self, value: float) -> bool:
        """Whether the claim is true of a value."""
        if self.kind == "within":
            return abs(value) <= self.size
        return value > self.size if self.kind == "above" else value < self.size


def p_value(estimate: stats.MeanEstimate, bound: Bound) -> float | None:
    """Two-sided p of the t-test against the edge of the claim that is nearest; None of one seed."""
    return estimate.p_value(bound.nearest(estimate.mean))


def decide(low: float, middle: float, high: float, bound: Bound, p: float | None = None) -> Outcome:
    """The verdict on a claim.

    Args:
        low, middle, high: the number's interval and what lies in it.
        bound: the claim.
        p: of the test against the bound, corrected for the number of tests beside it; None: the number has no test,
            and its interval decides alone.

    Returns:
        "holds" or "does not hold" where the interval excludes the edges of the claim, and p is below 0.05;
        "undecided" otherwise.

    >>> decide(0.1, 0.5, 0.9, Bound("above", 0), 0.01), decide(0.1, 0.5, 0.9, Bound("above", 0), 0.07)
    ('holds', 'undecided')
    """
    edges = (bound.size, -bound.size) if bound.kind == "within" else (bound.size,)
    if any(low <= edge <= high for edge in edges) or (p is not None and p >= stats.LEVEL):
        return "undecided"
    return "holds" if bound.allows(middle) else "does not hold"

"""A promise about a measured number, and whether it is kept. Each benchmark has its own promises."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from signstep.lab.bench.spread import Spread, number

TARGETS_HEAD = ("target", "limit", "measured", "verdict")


@dataclass(frozen=True)
class Target:
    """A bound that signstep promises on a ratio or share."""

    text: str
    limit: float
    at_least: bool
    measured: Spread | None

    @property
    def verdict(self) -> str:
        """Met, missed, undecided where the 10 to 90 % of the rounds lie on both sides of the limit, or not measured."""
        if self.measured is None:
            return "not measured"
        if self.measured.low < self.limit < self.measured.high:
            return "undecided"
        value = self.measured.median
        return "met" if (value >= self.limit if self.at_least else value <= self.limit) else "missed"

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Its line of a table under `TARGETS_HEAD`."""
        measured = "" if self.measured is None else str(self.measured)
        if self.measured is not None and self.measured.low == self.measured.high:
            measured = number(self.measured.median)
        return (self.text, f"{'≥' if self.at_least else '≤'} {self.limit:g}", measured, self.verdict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.text,
            "limit": self.limit,
            "at_least": self.at_least,
            "measured": None if self.measured is None else asdict(self.measured),
            "verdict": self.verdict,
        }

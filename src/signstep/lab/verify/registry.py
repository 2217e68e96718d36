"""The registry of checks: a statement with its source, how it is measured, and the verdict that is expected.

    @check("gauss.example", "p <= 1/2", source="eq. (6)")
    def _(rng: Generator) -> Finding:
        return Finding(measured="p = 0.31", error="exact", verdict=HOLDS)

A check's name is that of its group, a dot and its own. Each check gets its own random numbers, seeded by its name, so
it measures the same whichever other checks run.
"""

from __future__ import annotations

import difflib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator

from signstep.lab.errors import BadInput

StatementVerdict = Literal["holds", "holds with a better constant", "fails"]
HOLDS: StatementVerdict = "holds"
BETTER: StatementVerdict = "holds with a better constant"
FAILS: StatementVerdict = "fails"

LIMIT = 4.0
"""In standard errors: the largest distance of a measurement from a statement that holds, and the least from one that
fails."""


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    measured: str
    error: str
    """The measurement's error: standard errors, z-scores, or that it is exact."""
    verdict: StatementVerdict
    condition: str = ""
    """Under what a statement fails."""
    detail: str = ""
    """Why, how it was measured, and what to do about it."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The numbers, for the JSON and the figures."""


@dataclass(frozen=True)
class Check:
    """A named statement."""

    name: str
    claim: str
    source: str
    """Where it is stated: an equation or a section of the paper, a page or a module of ours, or neither."""
    expected: StatementVerdict
    measure: Callable[[Generator], Finding]

    @property
    def group(self) -> str:
        return self.name.partition(".")[0]

    @property
    def whose(self) -> Literal["paper", "ours", "neither"]:
        """Who states it first: the source says so."""
        return (
            "paper" if self.source.startswith("paper") else "neither" if self.source.startswith("neither") else "ours"
        )


@dataclass(frozen=True)
class CheckOutcome:
    """A check that has run."""

    check: Check
    result: Finding
    seconds: float

    @property
    def as_expected(self) -> bool:
        """Whether the verdict is the one recorded with the check."""
        return self.result.verdict == self.check.expected

    @property
    def verdict(self) -> str:
        condition = self.result.condition
        return f"fails under {condition}" if self.result.verdict == FAILS and condition else self.result.verdict


GROUPS = {
    "gauss": "How often a sign is wrong: eq. (5) to (7)",
    "theorem": "Theorem 1: eq. (1) to (4) and (8)",
    "dither": "Dither before and after the sign: eq. (9) and (10)",
    "projection": "The calibrated switch: eq. (11) and (12)",
    "vote": "The majority vote",
    "estimators": "What micro-batches can tell",
}
"""Titles by name, in the order in which they run."""

CHECKS: dict[str, Check] = {}
"""All checks by name."""


def check(
    name: str, claim: str, *, source: str, expected: StatementVerdict = HOLDS
) -> Callable[[Callable[[Generator], Finding]], Callable[[Generator], Finding]]:
    """Register the decorated function, which takes random numbers and returns a `Finding`.

    Raises:
        ValueError: the name is taken, or its first part is no group.
    """

    def register(measure: Callable[[Generator], Finding]) -> Callable[[Generator], Finding]:
        if name in CHECKS or name.partition(".")[0] not in GROUPS:
            raise ValueError(f"check {name!r}: expected a new name that begins with one of {', '.join(GROUPS)}")
        CHECKS[name] = Check(name, claim, source, expected, measure)
        return measure

    return register


def select(names: Sequence[str]) -> list[Check]:
    """The checks of these names or groups, each once, in the order of groups; all if there are no names.

    Raises:
        BadInput: a name that is neither.
    """
    for name in names:
        if name not in CHECKS and name not in GROUPS:
            close = difflib.get_close_matches(name, [*GROUPS, *CHECKS], n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"expected a group ({', '.join(GROUPS)}) or a check"
            raise BadInput(f"no check is named {name!r}: {hint} (signstep verify --list names them all)")
    order = list(GROUPS)
    chosen = [each for each in CHECKS.values() if not names or each.name in names or each.group in names]
    return sorted(chosen, key=lambda each: order.index(each.group))


def run(checks: Sequence[Check]) -> Iterator[CheckOutcome]:
    """Run the checks one after another."""
    for each in checks:
        started = time.perf_counter()
        with torch.no_grad():
            result = each.measure(torch.Generator().manual_seed(zlib.crc32(each.name.encode())))
        yield CheckOutcome(each, result, time.perf_counter() - started)


def when(truth: bool, *, better: bool = False) -> StatementVerdict:
    """The verdict on a statement that was found true or not; `better`: true with a better constant as well."""
    return FAILS if not truth else BETTER if better else HOLDS

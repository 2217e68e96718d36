"""The verdict on a number: what holds, mirrored and shifted claims, and that p and interval never disagree."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from signstep.lab.docs.verdicts import OUTCOMES, Bound, decide, p_value
from signstep.lab.output import stats

number = st.floats(-50, 50)
size = st.floats(0, 20)
kind = st.sampled_from(["above", "below", "within"])
intervals = st.tuples(number, number, number).map(sorted)
samples = st.lists(st.integers(-400, 400), min_size=2, max_size=8)
MIRROR = {"above": "below", "below": "above", "within": "within"}


@pytest.mark.parametrize(
    ("interval", "bound", "p", "verdict"),
    [
        ((0.1, 0.5, 0.9), Bound("above", 0), 0.01, "holds"),
        ((0.1, 0.5, 0.9), Bound("below", 0), 0.01, "does not hold"),
        ((-0.1, 0.5, 1.1), Bound("above", 0), 0.2, "undecided"),
        ((0.0, 0.5, 1.0), Bound("above", 0), None, "undecided"),
        ((-0.9, 0.1, 0.9), Bound("within", 1), 0.01, "holds"),
        ((-0.9, 0.1, 1.1), Bound("within", 1), 0.01, "undecided"),
        ((-3.0, 0.1, 3.0), Bound("within", 1), 0.01, "undecided"),
        ((1.1, 2.0, 2.9), Bound("within", 1), 0.01, "does not hold"),
        ((-2.9, -2.0, -1.1), Bound("within", 1), 0.01, "does not hold"),
        ((5.0, 5.0, 5.0), Bound("above", 4), None, "holds"),
    ],
)
def test_examples(interval: tuple[float, float, float], bound: Bound, p: float | None, verdict: str) -> None:
    assert decide(*interval, bound, p) == verdict


@given(intervals, kind, size, st.floats(0, 1))
def test_a_p_of_the_level_or_more_decides_nothing(interval: list[float], kind: str, size: float, p: float) -> None:
    bound = Bound(kind, size)  # type: ignore[arg-type]
    alone, tested = decide(*interval, bound), decide(*interval, bound, p)
    assert alone in OUTCOMES
    assert tested == ("undecided" if p >= stats.LEVEL else alone)
    assert decide(*interval, bound, stats.LEVEL) == "undecided"


@given(intervals, kind, size)
def test_the_mirrored_claim_has_the_mirrored_verdict(interval: list[float], kind: str, size: float) -> None:
    low, middle, high = interval
    mirrored = Bound(MIRROR[kind], size if kind == "within" else -size)  # type: ignore[arg-type]
    assert decide(low, middle, high, Bound(kind, size)) == decide(-high, -middle, -low, mirrored)  # type: ignore[arg-type]


@given(intervals, size)
def test_a_claim_and_its_contrary_are_never_both_true(interval: list[float], size: float) -> None:
    above, below = (decide(*interval, Bound(each, size)) for each in ("above", "below"))
    assert {above, below} in ({"holds", "does not hold"}, {"undecided"})


@given(intervals, kind, size, st.floats(0, 20))
def test_a_weaker_claim_holds_where_a_stronger_one_does(
    interval: list[float], kind: str, size: float, slack: float
) -> None:
    weaker = size - slack if kind == "above" else size + slack
    if decide(*interval, Bound(kind, size)) == "holds":  # type: ignore[arg-type]
        assert decide(*interval, Bound(kind, weaker)) == "holds"  # type: ignore[arg-type]
    if decide(*interval, Bound(kind, weaker)) == "does not hold":  # type: ignore[arg-type]
        assert decide(*interval, Bound(kind, size)) == "does not hold"  # type: ignore[arg-type]


@given(intervals, kind, size)
def test_all_of_a_decided_interval_agrees(interval: list[float], kind: str, size: float) -> None:
    bound = Bound(kind, size)  # type: ignore[arg-type]
    verdict = decide(*interval, bound)
    allowed = {bound.allows(value) for value in interval}
    if verdict != "undecided":
        assert allowed == {verdict == "holds"}


@given(samples, kind, size)
def test_the_t_test_alone_and_its_interval_decide_alike(values: list[int], kind: str, size: float) -> None:
    """So a correction can only take a verdict back: it never makes one, or turns one round."""
    e, bound = stats.estimate([float(value) / 8 for value in values]), Bound(kind, size)  # type: ignore[arg-type]
    assert e.low is not None
    assert e.high is not None
    assume(e.high > e.low)
    edges = {size, -size} if kind == "within" else {size}
    assume(all(min(abs(edge - e.low), abs(edge - e.high)) > 1e-6 for edge in edges))
    p = p_value(e, bound)
    alone = decide(e.low, e.mean, e.high, bound)
    assert p is not None
    assert 0 <= p <= 1
    if kind != "within":
        assert (p < stats.LEVEL) == (alone != "undecided")
    assert decide(e.low, e.mean, e.high, bound, p) == alone


def test_one_seed_has_no_p() -> None:
    assert p_value(stats.estimate([3.0]), Bound("above", 0)) is None


@given(number, size)
def test_the_nearest_edge_is_an_edge_and_no_other_is_nearer(value: float, size: float) -> None:
    edge = Bound("within", size).nearest(value)
    assert abs(edge) == size
    assert math.isclose(abs(value - edge), min(abs(value - size), abs(value + size)))

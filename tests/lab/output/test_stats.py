"""Means, intervals, paired differences and their words, against scipy and against simulation."""

import math
from random import Random

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from signstep.lab.output.stats import (
    CONFIDENCE,
    LEVEL,
    MeanEstimate,
    against_paper,
    claim_verdict,
    estimate,
    holm,
    number,
    paired_difference,
    paper_number,
    signed,
    with_interval,
)

accuracy = st.floats(0, 100)
several = st.lists(accuracy, min_size=2, max_size=12)
by_seed = st.dictionaries(st.integers(0, 9), accuracy, max_size=8)


@given(several)
def test_estimate_is_the_t_interval(values: list[float]) -> None:
    e = estimate(values)
    assert e.n == len(values)
    assert e.mean == pytest.approx(math.fsum(values) / len(values))
    error = scipy.stats.sem(values)
    assume(error > 1e-9)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
    assert e.low == pytest.approx(low)
    assert e.high == pytest.approx(high)


@given(accuracy)
def test_one_value_has_no_interval(value: float) -> None:
    e = estimate([value])
    assert e == MeanEstimate(1, value, None)
    assert e.low is None
    assert e.high is None
    assert e.contains(value) is None
    assert "±" not in with_interval(e)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_what_is_not_measured_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values"):
        estimate(values)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_covers_the_mean_19_times_in_20(n: int) -> None:
    samples = np.random.default_rng(n).normal(70, 0.5, size=(4000, n))
    covered = sum(bool(estimate(list(row)).contains(70)) for row in samples)
    assert abs(covered / 4000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


@given(by_seed, by_seed)
def test_paired_difference_uses_common_seeds_only(ours: dict[int, float], base: dict[int, float]) -> None:
    found = paired_difference(ours, base)
    common = sorted(set(ours) & set(base))
    if not common:
        assert found is None
        return
    assert found is not None
    assert found.n == len(common)
    mirrored = paired_difference(base, ours)
    assert mirrored is not None
    assert mirrored.mean == pytest.approx(-found.mean)
    a, b = [ours[s] for s in common], [base[s] for s in common]
    if len(common) < 2:
        assert found.half_width is None
    elif np.std(np.subtract(a, b)) > 1e-6:
        interval = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_pairing_removes_what_the_seeds_share() -> None:
    shared = {0: 60.0, 1: 70.0, 2: 80.0}
    found = paired_difference({seed: value + 1 for seed, value in shared.items()}, shared)
    assert found == MeanEstimate(3, 1.0, 0.0)


@pytest.mark.parametrize(
    ("difference", "claimed", "verdict"),
    [
        (MeanEstimate(3, 1.0, 0.5), 0.8, "same sign"),
        (MeanEstimate(3, -1.0, 0.5), -12.0, "same sign"),
        (MeanEstimate(3, -1.0, 0.5), 0.8, "opposite sign"),
        (MeanEstimate(3, 1.0, 1.001), 0.8, "undecided"),
        (MeanEstimate(3, 0.0, 0.0), 0.8, "undecided"),
        (MeanEstimate(1, 30.0, None), 0.8, "undecided"),
        (MeanEstimate(3, 1.0, 0.5), 0.0, "undecided"),
    ],
)
def test_claim_verdict(difference: MeanEstimate, claimed: float, verdict: str) -> None:
    assert claim_verdict(difference, claimed, difference.p_value()) == verdict
    assert claim_verdict(difference, claimed, 0.05) == "undecided"


@given(several, st.floats(0, 100))
def test_p_is_that_of_the_t_test_and_small_where_the_interval_excludes(values: list[float], value: float) -> None:
    assume(scipy.stats.sem(values) > 1e-6)
    e = estimate(values)
    p = e.p_value(value)
    assert p == pytest.approx(scipy.stats.ttest_1samp(values, value).pvalue, rel=1e-6, abs=1e-12)
    assume(abs(abs(value - e.mean) - (e.half_width or 0)) > 1e-9)
    assert p is not None
    assert (p < LEVEL) is not e.contains(value)


chances = st.lists(st.floats(0, 1), max_size=12)


@given(chances)
def test_holm_rejects_step_by_step(p_values: list[float]) -> None:
    """A corrected p is the smallest level at which Holm's steps, done one after another, reject."""
    corrected = holm(p_values)
    for level in {*corrected, 0.05, 1e-3} - {1.0}:
        left, rejected = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
        while left and p_values[left[0]] * len(left) <= level:
            rejected.add(left.pop(0))
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected


@given(chances, st.randoms())
def test_holm_keeps_the_order_and_lies_between_no_correction_and_bonferroni(
    p_values: list[float], draw: Random
) -> None:
    corrected = holm(p_values)
    for p, q in zip(p_values, corrected, strict=True):
        assert p <= q <= min(1, p * len(p_values))
    assert sorted(corrected) == [q for _, q in sorted(zip(p_values, corrected, strict=True))]
    mixed = list(range(len(p_values)))
    draw.shuffle(mixed)
    assert holm([p_values[i] for i in mixed]) == [corrected[i] for i in mixed]


def test_holm_rarely_rejects_a_true_null() -> None:
    p_values = np.random.default_rng(0).random((4000, 8))
    p_values[:, :3] *= 1e-4  # three that are false, beside five that are true
    wrong = sum(min(holm(list(row))[3:]) < LEVEL for row in p_values)
    assert wrong / 4000 < LEVEL + 4 * math.sqrt(LEVEL * CONFIDENCE / 4000)


@given(st.floats(-200, 200), st.integers(0, 3))
def test_numbers_read_back(value: float, digits: int) -> None:
    for text in (number(value, digits), signed(value, digits)):
        assert "-" not in text
        assert float(text.replace("−", "-")) == pytest.approx(value, abs=0.5 * 10**-digits + 1e-9)
    assert signed(value, digits)[0] in "+−" or float(signed(value, digits)) == 0


def test_words() -> None:
    assert with_interval(MeanEstimate(3, 71.0, 2.484)) == "71.00 ± 2.48"
    assert with_interval(MeanEstimate(3, 0.5, 0.25), sign=True) == "+0.50 ± 0.25"
    assert (paper_number(77.0), paper_number(91.38)) == ("77", "91.38")
    assert against_paper(MeanEstimate(3, 92.0, 1.0), 91.38) == (
        "higher than the paper's number by 0.62; the interval includes it"
    )
    assert against_paper(MeanEstimate(1, 91.38, None), 91.38) == "equal to the paper's number; one seed, no interval"
    assert against_paper(MeanEstimate(2, 90.0, 0.1), 91.38).startswith("lower than the paper's number by 1.38")

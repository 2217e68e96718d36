"""The bounds against every symmetric unimodal law there is, against each other, and with bad input."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from signstep.theory import bounds
from signstep.theory.bounds import (
    CRITICAL_SNR,
    PAPER_CONSTANT,
    PAPER_SPLIT,
    SHARP_CONSTANT,
    dithered_std,
    l1_bound,
    l1_bound_with_floor,
    optimal_lr,
    phi,
    sign_failure_bound,
    skew_threshold,
    stationarity_bound,
)
from signstep.theory.noise import skewed

SNR = st.floats(1e-6, 50)
AMOUNT = st.floats(1e-3, 1e6)
GRID = torch.cat([torch.linspace(1e-4, 3, 30_000, dtype=torch.float64), torch.logspace(0.5, 4, 1000).double()])


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_the_branches_meet_with_the_same_slope() -> None:
    below, above = CRITICAL_SNR * (1 - 1e-6), CRITICAL_SNR * (1 + 1e-6)
    points = torch.tensor([below, CRITICAL_SNR, above], dtype=torch.float64)
    left, middle, right = sign_failure_bound(points).tolist()
    assert middle == pytest.approx(1 / 6)
    assert left - middle == pytest.approx(middle - right, rel=1e-4)


def test_the_papers_split_makes_a_jump_upwards() -> None:
    before, after = sign_failure_bound(PAPER_SPLIT + torch.tensor([0.0, 1e-12]).double(), split=PAPER_SPLIT).tolist()
    assert (round(before, 3), round(after, 3)) == (0.264, 0.333)


@given(SNR, st.floats(1e-3, CRITICAL_SNR))
def test_every_allowed_split_bounds_the_default(snr: float, split: float) -> None:
    """2 / (9 S^2) is convex and the other branch is its tangent at 2 / sqrt 3."""
    assert sign_failure_bound(one(snr), split=split) >= sign_failure_bound(one(snr)) - 1e-15


def test_a_split_beyond_the_critical_snr_would_be_false() -> None:
    assert (0.5 - 1.5 / (2 * math.sqrt(3))) < 2 / (9 * 1.5**2)
    with pytest.raises(ValueError, match=r"split=1.5: expected a number above 0 and at most 2 / sqrt 3 = 1.1547"):
        sign_failure_bound(one(1.5), split=1.5)


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 100)), min_size=1, max_size=6).filter(
        lambda parts: any(width > 1e-3 for _, width in parts)
    ),
    SNR,
)
def test_no_symmetric_unimodal_law_fails_more_often(parts: list[tuple[float, float]], snr: float) -> None:
    """Every such law is a mixture of centred uniform ones (Khinchin), with an atom at 0 for width 0."""
    total = sum(weight for weight, _ in parts)
    std = math.sqrt(sum(weight / total * width**2 / 3 for weight, width in parts))
    size = snr * std
    failure = sum(weight / total * max(0.0, 1 - size / width) / 2 for weight, width in parts if width > 0)
    for split in (CRITICAL_SNR, PAPER_SPLIT):
        assert failure <= float(sign_failure_bound(one(snr), split=split)) + 1e-12


def test_constants() -> None:
    """The sharp constant is the largest c with 1 - 2 p >= c min(1, S); the paper's split would give sqrt 6."""
    by_split = {}
    for split in (CRITICAL_SNR, PAPER_SPLIT):
        reliability = 1 - 2 * sign_failure_bound(GRID, split=split)
        by_split[split] = float((reliability / GRID.clamp(max=1)).min())
    assert by_split[CRITICAL_SNR] == pytest.approx(1 / SHARP_CONSTANT, abs=1e-12)
    assert by_split[PAPER_SPLIT] == pytest.approx(1 / math.sqrt(6), abs=1e-3)
    assert min(by_split.values()) > 1 / PAPER_CONSTANT


def test_failure_bound_at_the_ends() -> None:
    assert sign_failure_bound(torch.tensor([0.0, math.inf])).tolist() == [0.5, 0.0]
    assert sign_failure_bound(torch.tensor([math.nan])).isnan().all()
    assert sign_failure_bound(torch.ones(2, 3, dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(ValueError, match=r"snr=-0.5: expected \|g\| / s, at least 0"):
        sign_failure_bound(torch.tensor([1.0, -0.5]))


@pytest.mark.parametrize("split", [0.0, -1.0, math.nan, math.inf, 1.16])
def test_split_out_of_range(split: float) -> None:
    with pytest.raises(ValueError, match="split="):
        sign_failure_bound(one(1.0), split=split)


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_phi_between_its_bounds(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(3, 20, generator=generator, dtype=torch.float64) * scale
    s = torch.rand(3, 20, generator=generator, dtype=torch.float64)
    s[:, :5] = 0
    g[:, 4:8] = 0
    found, l1 = phi(g, s), g.abs().sum(-1)
    assert found.shape == (3,)
    assert (found <= l1).all()
    slack = 1 + 1e-12
    assert (l1 <= (found + s.sum(-1) / 4) * slack).all()
    assert (l1 <= (found + (found * s.sum(-1)).sqrt()) * slack).all()
    assert torch.allclose(phi(-3 * g, 3 * s), 3 * found)
    assert torch.allclose(phi(g, torch.zeros(())), l1)


def test_phi_of_extremes() -> None:
    g, s = torch.tensor([2.0, 0.0, 1.0, 0.5]), torch.tensor([0.0, 0.0, math.inf, 0.5])
    assert phi(g, s) == 2.5
    assert phi(torch.tensor([math.nan, 1.0]), torch.ones(2)).isnan()
    assert phi(torch.zeros(4, 0), torch.zeros(0)).tolist() == [0] * 4
    with pytest.raises(ValueError, match="noise_std=-1: expected a standard deviation, at least 0"):
        phi(torch.ones(2), torch.tensor([1.0, -1.0]))


def test_a_smaller_floor_is_false() -> None:
    """|a| - a^2 / s is largest at a = s / 2, where it is s / 4."""
    a = torch.linspace(0, 3, 3001, dtype=torch.float64)
    needed = a - torch.minimum(a, a.square())
    assert float(needed.max()) == 0.25
    assert float(a[needed.argmax()]) == 0.5
    with pytest.raises(ValueError, match=r"floor=0.24: expected at least 0.25"):
        l1_bound_with_floor(1.0, 1.0, floor=0.24)


@given(AMOUNT, AMOUNT, st.integers(1, 10**6))
def test_stationarity_bound_is_eq_2_at_the_papers_step(gap: float, smoothness: float, steps: int) -> None:
    expected = math.sqrt(smoothness / steps) * (gap + 0.5)
    assert stationarity_bound(gap, smoothness, steps, constant=PAPER_CONSTANT) == pytest.approx(3 * expected)
    assert stationarity_bound(gap, smoothness, steps) == pytest.approx(math.sqrt(3) * expected)


@given(AMOUNT, AMOUNT, st.integers(1, 10**6), st.floats(0.01, 100))
def test_the_optimal_step_is(gap: float, smoothness: float, steps: int, factor: float) -> None:
    lr = optimal_lr(gap, smoothness, steps)
    best = stationarity_bound(gap, smoothness, steps, lr=lr)
    assert best == pytest.approx(SHARP_CONSTANT * math.sqrt(2 * smoothness * gap / steps))
    assert best <= stationarity_bound(gap, smoothness, steps, lr=lr * factor) * (1 + 1e-12)
    assert best <= stationarity_bound(gap, smoothness, steps) * (1 + 1e-12)


@given(AMOUNT, AMOUNT, st.floats(0.01, 100))
def test_units_of_f(gap: float, smoothness: float, unit: float) -> None:
    """In other units of f the bound has other units, and the optimal step the same: the paper's has not."""
    before = stationarity_bound(gap, smoothness, 100, lr=optimal_lr(gap, smoothness, 100))
    gap, smoothness = unit * gap, unit * smoothness
    assert stationarity_bound(gap, smoothness, 100, lr=optimal_lr(gap, smoothness, 100)) == pytest.approx(unit * before)


def test_the_papers_step_depends_on_units() -> None:
    assert stationarity_bound(400.0, 4.0, 100) != pytest.approx(4 * stationarity_bound(100.0, 1.0, 100), rel=0.5)


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_l1_bounds(phi_bound: float, noise: float) -> None:
    found = l1_bound(phi_bound, noise)
    assert phi_bound <= found <= 2 * phi_bound + noise / 4 + 1e-6
    if phi_bound <= noise:
        assert found <= l1_bound_with_floor(phi_bound, noise) * (1 + 1e-12)
    assert l1_bound(phi_bound, 0.0) == l1_bound_with_floor(phi_bound, 0.0) == phi_bound
    assert l1_bound(0.0, noise) == 0


@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_l1_bound_of_whole_runs(seed: int, size: float) -> None:
    """Averages over steps, with a noise that differs from step to step below its bound."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(50, 20, generator=generator, dtype=torch.float64) * 10**size
    s = torch.rand(50, 20, generator=generator, dtype=torch.float64)
    noise = float(s.amax(0).sum())
    assert float(g.abs().sum(-1).mean()) <= l1_bound(float(phi(g, s).mean()), noise) * (1 + 1e-12)


def test_numbers_of_the_theory_notes() -> None:
    paper = 358.0 - 331.0
    assert l1_bound(paper / math.sqrt(3), 331.0) == pytest.approx(88, abs=1)


def test_dithered_std() -> None:
    s = torch.rand(5, dtype=torch.float64)
    assert torch.allclose(dithered_std(s, 0.5).square(), s.square() + 0.25)
    assert torch.allclose(dithered_std(s, s).square(), 2 * s.square())
    assert torch.equal(dithered_std(s, 0.0), s)
    assert dithered_std(s.float(), 0.5).dtype == torch.float32


def test_skew_threshold_against_the_exact_median() -> None:
    """Where the mean of n draws of Exp(1) - 1 is as often wrong as right: the notes have 0.0294 for n = 128."""
    for n, tolerance in ((1, 0.1), (8, 0.02), (128, 0.002), (2048, 0.0002)):
        law, low, high = skewed(n), 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(law.failure(one(middle))) > 0.5 else (low, middle)
        assert skew_threshold(2.0, n) == pytest.approx(low, rel=tolerance)
        if n == 128:
            assert round(low, 4) == 0.0294
    assert round(skew_threshold(-2.0, 128), 4) == 0.0295


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stationarity_bound(-1.0, 1.0, 10), "gap=-1.0: expected a finite number of at least 0"),
        (lambda: stationarity_bound(math.nan, 1.0, 10), "gap=nan"),
        (lambda: stationarity_bound(1.0, 0.0, 10), "smoothness=0.0: expected a finite number above 0"),
        (lambda: stationarity_bound(1.0, 1.0, 0), "steps=0: expected at least 1"),
        (lambda: stationarity_bound(1.0, 1.0, 10, lr=0.0), "lr=0.0"),
        (lambda: stationarity_bound(1.0, 1.0, 10, constant=-3.0), "constant=-3.0"),
        (lambda: optimal_lr(0.0, 1.0, 10), "gap=0.0"),
        (lambda: optimal_lr(1.0, 1.0, 0), "steps=0"),
        (lambda: l1_bound(-1.0, 1.0), "phi_bound=-1.0"),
        (lambda: l1_bound(1.0, math.inf), "noise=inf"),
        (lambda: l1_bound_with_floor(1.0, -1.0), "noise=-1.0"),
        (lambda: l1_bound_with_floor(1.0, 1.0, floor=math.nan), "floor=nan"),
        (lambda: skew_threshold(1.0, 0), "n=0: expected at least 1"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def test_every_public_name_is_documented() -> None:
    """docs/theory.md derives what bounds.py computes."""
    text = (Path(__file__).parents[2] / "docs" / "theory.md").read_text()
    assert [name for name in bounds.__all__ if f"`{name}" not in text] == []

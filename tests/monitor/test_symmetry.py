"""The symmetry test: its level at symmetric laws, its power at skewed ones, and what it says about them."""

import importlib
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from signstep.monitor import symmetry as module
from signstep.monitor.symmetry import _p_values, benjamini_hochberg, symmetry

COORDINATES = 4000


def _atoms(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    return x * (torch.rand(x.shape, generator=generator) >= share)


def _student(shape: tuple[int, int], generator: torch.Generator, freedom: int = 3) -> Tensor:
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    chi = torch.randn((freedom, *shape), generator=generator, dtype=torch.float64).square().sum(0)
    return normal / (chi / freedom).sqrt()


def _laplace(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    two = torch.rand((2, *shape), generator=generator, dtype=torch.float64)
    return two[0].log() - two[1].log()


def _normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SYMMETRIC: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "gaussian": _normal,
    "laplace": _laplace,
    "student-t3": _student,
    "60 % zeros": lambda shape, generator: _atoms(_normal(shape, generator), 0.6, generator),
    "uniform": lambda shape, generator: torch.rand(shape, generator=generator, dtype=torch.float64),
}
LEVELS = {"gaussian": 0.05, "laplace": 0.05, "student-t3": 0.055, "60 % zeros": 0.06, "uniform": 0.10}
"""What the docstring promises, at a nominal 5 %."""


def mgg_reference(x: npt.NDArray[np.float64]) -> float:
    """T of one coordinate, as the paper has it."""
    n = len(x)
    median = float(np.median(x))
    j = math.sqrt(math.pi / 2) * sum(abs(float(v) - median) for v in x) / n
    return math.sqrt(n) * (float(x.mean()) - median) / j / math.sqrt(math.pi / 2 - 1)


@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(-5, 5))
def test_the_statistic_is_the_papers(seed: int, count: int, shift: float) -> None:
    x = torch.randn(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp() + shift
    found = module._statistic(x, module._median(x))
    for row, t in zip(x.numpy(), found.tolist(), strict=True):
        assert t == pytest.approx(mgg_reference(row), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("law", SYMMETRIC)
@pytest.mark.parametrize("count", [20, 33, 64])
def test_level(law: str, count: int) -> None:
    """At a nominal 5 %, no law is rejected more often than promised, by 4 standard errors."""
    x = SYMMETRIC[law]((COORDINATES, count), torch.Generator().manual_seed(count))
    x = x[(x != x[:, :1]).any(dim=1)]
    rejected = float((_p_values(x) <= 0.05).double().mean())
    promised = LEVELS[law]
    assert rejected < promised + 4 * math.sqrt(promised * (1 - promised) / COORDINATES)


def test_level_of_a_mixture_of_laws_on_all_scales() -> None:
    """The tails, at which Benjamini-Hochberg looks: 0.1 % of all, by 4 standard errors, and none rejected."""
    generator = torch.Generator().manual_seed(0)
    parts = [draw((COORDINATES, 32), generator) for draw in SYMMETRIC.values()]
    x = torch.cat([p * 10 ** (6 * torch.rand(COORDINATES, 1, generator=generator) - 6) for p in parts])
    assert float((_p_values(x) <= 1e-3).double().mean()) < 1e-3 + 4 * math.sqrt(1e-3 / len(x))
    assert symmetry(x.T)["rejected_share"] <= 0.002


def test_mgg_alone_would_reject_t3_and_zeros() -> None:
    """Why the samples are reflected."""
    for law, share in (("student-t3", 0.08), ("60 % zeros", 0.3)):
        x = SYMMETRIC[law]((COORDINATES, 64), torch.Generator().manual_seed(1))
        t = module._statistic(x, module._median(x)).abs()
        assert float((torch.erfc(t / math.sqrt(2)) <= 0.05).double().mean()) > share


@pytest.mark.parametrize(("skewness", "count", "power"), [(2.0, 64, 0.8), (2.0, 128, 0.99), (1.0, 256, 0.75)])
def test_power_against_gamma_noise(skewness: float, count: int, power: float) -> None:
    """Share rejected after Benjamini-Hochberg: at least this."""
    shape = 4 / skewness**2
    draws = stats.gamma(shape).rvs((count, 2000), random_state=np.random.default_rng(0)) - shape
    record = symmetry(torch.from_numpy(draws))
    assert record["rejected_share"] > power
    assert record["skew_threshold"] == pytest.approx(skewness / (6 * math.sqrt(count)), rel=0.25)
    assert "wrong sign more often" in record["advice"]


def test_the_share_rejected_falls_with_averaging() -> None:
    """Micro-batches of b samples have skewness gamma / sqrt(b)."""
    draws = stats.expon.rvs(size=(64, 64, 500), random_state=np.random.default_rng(0)) - 1
    single, averaged = (torch.from_numpy(draws[:, :b].mean(axis=1)) for b in (1, 64))
    assert symmetry(single)["rejected_share"] > 0.8
    assert symmetry(averaged)["rejected_share"] < 0.1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.01, 0.9))
def test_benjamini_hochberg_is_scipys(p_values: list[float], alpha: float) -> None:
    adjusted = stats.false_discovery_control(p_values)
    if np.isclose(adjusted, alpha, rtol=1e-9, atol=0).any():
        return
    found = benjamini_hochberg(torch.tensor(p_values, dtype=torch.float64), alpha)
    assert found.tolist() == (adjusted <= alpha).tolist()


def test_false_discoveries_are_few() -> None:
    """Half of the coordinates skewed: of those rejected, at most 5 % are symmetric, by 4 standard errors."""
    generator = torch.Generator().manual_seed(3)
    x = _student((COORDINATES, 128), generator)
    x[: COORDINATES // 2] = -torch.rand(COORDINATES // 2, 128, generator=generator, dtype=torch.float64).log()
    rejected = benjamini_hochberg(_p_values(x), 0.05)
    assert rejected[: COORDINATES // 2].double().mean() > 0.95
    false = float(rejected[COORDINATES // 2 :].sum() / rejected.sum())
    assert false < 0.05 + 4 * math.sqrt(0.05 / float(rejected.sum()))


def test_coordinates_at_risk_are_those_whose_gradient_leans_to_the_tail() -> None:
    """With g = +-0.5 thresholds, half of the coordinates have skewness's sign, and those are at risk."""
    generator = torch.Generator().manual_seed(4)
    noise = -torch.rand(400, 2000, generator=generator, dtype=torch.float64).log() - 1
    noise -= noise.mean(dim=0)
    g = 0.5 * 2 / (6 * math.sqrt(400)) / math.sqrt(400)
    sign = torch.ones(2000, dtype=torch.float64)
    sign[1000:] = -1
    assert symmetry(noise + g * sign)["against_share"] == pytest.approx(0.5, abs=0.02)
    # And it is true of them: a mean of 400 is negative more often than not, though its expectation is g > 0.
    wrong, beyond = (stats.gamma(400).cdf(400 * (1 - factor * g)) for factor in (1, 3))
    assert wrong > 0.5 > beyond


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(v) for v in value.values())
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "zeros", "constant", "one entry", "tiny", "huge", "nan rows", "columns"])
def test_no_nan_whatever_comes(kind: str, dtype: torch.dtype) -> None:
    rows = torch.randn(24, 300, generator=torch.Generator().manual_seed(0))
    if kind == "zeros":
        rows.zero_()
    elif kind == "constant":
        rows[:] = torch.rand(300)
    elif kind == "one entry":
        rows.zero_()[3, 5] = 1
    elif kind == "tiny":
        rows *= 1e-7 if dtype == torch.float16 else 1e-38
    elif kind == "huge":
        rows *= 1e4 if dtype == torch.float16 else 1e37
    elif kind == "nan rows":
        rows[:3, 7] = math.nan
        rows[3, 8] = math.inf
    elif kind == "columns":
        rows = rows[:, :0]
    record = symmetry(rows.to(dtype), dip=True)
    json.dumps(record, allow_nan=False)
    assert _is_plain(record)
    assert record["micro_batches"] == (20 if kind == "nan rows" else 24)
    if kind in ("zeros", "constant", "columns"):
        assert record["tested"] == 0
        assert "varies" in record["advice"]
    else:
        assert record["tested"] >= 1
    assert (record["zero_share"] == 1) == (kind == "zeros")


def test_too_few_micro_batches_say_so() -> None:
    record = symmetry(torch.randn(19, 10))
    assert "needs at least 20 micro-batches, got 19" in record["advice"]
    assert record["rejected_share"] is None
    assert record["zero_share"] == 0
    rows = torch.randn(21, 10)
    rows[:2, 0] = math.nan
    assert "got 19 (2 more were not finite)" in symmetry(rows)["advice"]
    assert "got 0" in symmetry(torch.empty(0, 10))["advice"]


def test_zeros_are_counted_and_constant_coordinates_left_out() -> None:
    rows = torch.randn(40, 100, generator=torch.Generator().manual_seed(0))
    rows[:, :30] = 0
    rows[:, 30:40] = 7.0
    record = symmetry(rows)
    assert record["tested"] == 60
    assert record["constant_share"] == pytest.approx(0.4)
    assert record["zero_share"] == pytest.approx(0.3)
    assert "30% of the entries are exactly 0" in record["advice"]


@given(st.floats(-30, 30), st.floats(-100, 100))
def test_neither_shift_nor_scale_matters(log_scale: float, shift: float) -> None:
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    one, two = symmetry(x), symmetry((x + shift) * 10.0**log_scale)
    assert one["rejected_share"] == two["rejected_share"]
    assert one["skew_threshold"] == pytest.approx(two["skew_threshold"], rel=1e-6)


def test_same_rows_same_answer_and_no_generator_moves() -> None:
    rows = torch.randn(32, 100)
    before = torch.get_rng_state()
    assert symmetry(rows) == symmetry(rows)
    assert torch.equal(before, torch.get_rng_state())


def test_more_coordinates_than_are_tested() -> None:
    record = symmetry(torch.randn(20, 3 * module.TESTED + 5, generator=torch.Generator().manual_seed(0)))
    assert record["coordinates"] == 3 * module.TESTED + 5
    assert record["tested"] == module.TESTED


@pytest.mark.parametrize(
    ("rows", "alpha", "error", "said"),
    [
        ([[1.0]], 0.05, TypeError, "rows: list"),
        (torch.ones(30, 3, dtype=torch.int64), 0.05, TypeError, "rows: torch.int64"),
        (torch.ones(30), 0.05, ValueError, r"rows: shape \(30,\)"),
        (torch.ones(30, 3), 0.0, ValueError, "alpha=0.0"),
        (torch.ones(30, 3), math.nan, ValueError, "alpha=nan"),
    ],
)
def test_bad_input(rows: Any, alpha: float, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        symmetry(rows, alpha=alpha)


def test_dip_is_the_packages_and_finds_two_modes() -> None:
    diptest = pytest.importorskip("diptest")
    generator = torch.Generator().manual_seed(0)
    bimodal = torch.sign(torch.randn(128, 200, generator=generator)) + 0.2 * torch.randn(128, 200, generator=generator)
    p = [float(diptest.diptest(column.double().numpy())[1]) for column in bimodal.T]
    expected = float((stats.false_discovery_control(p) <= 0.05).mean())
    assert symmetry(bimodal, dip=True)["dip_rejected_share"] == pytest.approx(expected, abs=0.011)
    assert expected > 0.9
    record = symmetry(torch.randn(128, 200, generator=generator), dip=True)
    assert record["dip_rejected_share"] == 0
    assert "unimodality rejected in 0%" in record["advice"]


def test_dip_is_missed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    record = symmetry(torch.randn(32, 10), dip=True)
    assert record["dip_rejected_share"] is None
    assert "diptest is not installed" in record["advice"]
    assert symmetry(torch.randn(32, 10))["dip_rejected_share"] is None

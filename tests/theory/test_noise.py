"""Laws of noise: samples against distribution functions, the bounds they obey, and the two that break them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from signstep.theory.bounds import CRITICAL_SNR, PAPER_SPLIT, SHARP_CONSTANT, sign_failure_bound
from signstep.theory.noise import LAWS, Law, gauss_extremal, skewed

DERIVED = [
    gauss_extremal(CRITICAL_SNR),
    gauss_extremal(3.0),
    skewed(5),
    LAWS["laplace"].dithered(0.5),
    LAWS["uniform"].dithered(2.0),
    LAWS["skewed"].dithered(1.0),
    LAWS["bimodal"].dithered(1.0),
]
ALL = [*LAWS.values(), *DERIVED]
GOOD = [law for law in ALL if law.symmetric and law.unimodal]
SNR = st.floats(1e-6, 50)


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def names(law: Law) -> str:
    return law.name


@pytest.mark.parametrize("law", ALL, ids=names)
def test_samples_have_the_cdf(law: Law) -> None:
    """200 000 draws; of 40 points per law none is 4.5 standard errors off (chance 3e-4 per law)."""
    count, generator = 200_000, torch.Generator().manual_seed(1)
    drawn = law.sample((count,), generator)
    assert drawn.dtype == torch.float64
    points = torch.cat([torch.linspace(-4, 4, 39, dtype=torch.float64), one(0.1).reshape(1)])
    chance = law.cdf(points)
    error = (chance * (1 - chance) / count).sqrt()
    measured = (drawn.unsqueeze(1) <= points).double().mean(0)
    assert ((measured - chance).abs() <= 4.5 * error + 1e-5).all()


@pytest.mark.parametrize("law", ALL, ids=names)
def test_mean_0_and_variance_1_by_the_cdf(law: Law) -> None:
    """E X = int 1 - F(x) - F(-x), E X^2 = int 2 x (1 - F(x) + F(-x)) over x > 0, on a grid of ln x."""
    u = torch.linspace(math.log(1e-6), math.log(1e7), 1001, dtype=torch.float64)
    x = u.exp()
    right, left = 1 - law.cdf(x), law.cdf(-x)
    # 1 - F loses its digits in a tail as heavy as Student's, and a symmetric law's left tail is as good.
    right = left if law.symmetric else right
    left, right = (torch.where(side.abs() < 1e-14, 0.0, side) for side in (left, right))
    assert float(torch.trapezoid((right - left) * x, u)) == pytest.approx(0, abs=2e-4)
    assert float(torch.trapezoid(2 * x * (right + left) * x, u)) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("law", [law for law in ALL if "t3" not in law.name], ids=names)
def test_skewness(law: Law) -> None:
    drawn = law.sample((400_000,), torch.Generator().manual_seed(2))
    cubes = drawn**3
    # Student's t5 has no sixth moment: the error below is that of this sample.
    assert float(cubes.mean()) == pytest.approx(law.skewness, abs=4.5 * float(cubes.std()) / math.sqrt(len(drawn)))


@pytest.mark.parametrize("law", ALL, ids=names)
def test_a_cdf_is_one(law: Law) -> None:
    positive = torch.linspace(1e-9, 30, 240, dtype=torch.float64)
    x = torch.cat([-positive.flip(0), positive])
    chance = law.cdf(x)
    assert (chance.diff() >= -1e-12).all()
    assert chance.min() >= 0
    assert chance.max() <= 1
    assert float(chance[-1]) == pytest.approx(1, abs=1e-4)
    assert law.cdf(x.reshape(3, -1)).shape == (3, 160)
    if law.symmetric:
        assert torch.allclose(chance, 1 - chance.flip(0), atol=1e-10)


@pytest.mark.parametrize("law", GOOD, ids=names)
def test_densities_fall_away_from_the_mode(law: Law) -> None:
    density = law.cdf(torch.linspace(0.01, 8, 60, dtype=torch.float64)).diff()
    assert (density.diff() <= 1e-5).all()


@pytest.mark.parametrize("law", ALL, ids=names)
@pytest.mark.parametrize("snr", [-1.3, -0.2, 0.3, 1.0])
def test_failure_is_that_of_drawn_signs(law: Law, snr: float) -> None:
    count = 100_000
    drawn = law.sample((count,), torch.Generator().manual_seed(3))
    wrong = float(((snr + drawn).sign() != math.copysign(1, snr)).double().mean())
    chance = float(law.failure(one(snr)))
    assert wrong == pytest.approx(chance, abs=4.5 * math.sqrt(chance * (1 - chance) / count) + 1e-5)


@given(st.sampled_from(GOOD), SNR)
def test_no_law_breaks_the_bounds(law: Law, snr: float) -> None:
    failure = float(law.failure(one(snr)))
    assert failure <= float(sign_failure_bound(one(snr))) + 1e-6
    assert failure <= float(sign_failure_bound(one(snr), split=PAPER_SPLIT)) + 1e-6
    assert 1 - 2 * failure >= min(1.0, snr) / SHARP_CONSTANT - 1e-6
    assert float(law.failure(one(-snr))) == pytest.approx(failure, abs=1e-12)


@given(st.floats(0.05, 20), st.sampled_from([law for law in LAWS.values() if law.symmetric and law.unimodal]), SNR)
def test_nor_does_any_with_gaussian_dither(ratio: float, law: Law, snr: float) -> None:
    failure = float(law.dithered(ratio).failure(one(snr)))
    assert failure <= float(sign_failure_bound(one(snr))) + 1e-5


@given(st.floats(CRITICAL_SNR, 100))
def test_the_extremal_law_attains_the_bound(snr: float) -> None:
    assert float(gauss_extremal(snr).failure(one(snr))) == pytest.approx(2 / (9 * snr**2), rel=1e-9)


@given(st.floats(1e-6, CRITICAL_SNR))
def test_the_uniform_law_attains_it_below(snr: float) -> None:
    assert float(LAWS["uniform"].failure(one(snr))) == pytest.approx(float(sign_failure_bound(one(snr))), abs=1e-12)
    if snr <= 1:
        reliability = 1 - 2 * float(LAWS["uniform"].failure(one(snr)))
        assert reliability == pytest.approx(snr / SHARP_CONSTANT, rel=1e-6)


def test_numbers_of_the_theory_notes() -> None:
    grid = torch.linspace(1e-3, 3, 3000, dtype=torch.float64)
    for name, smallest in (("gaussian", 0.683), ("laplace", 0.757), ("student-t3", 0.818), ("uniform", 0.577)):
        reliability = 1 - 2 * LAWS[name].failure(grid)
        assert float((reliability / grid.clamp(max=1)).min()) == pytest.approx(smallest, abs=6e-4)


def test_two_modes_break_the_bound() -> None:
    failure = float(LAWS["bimodal"].failure(one(0.3)))
    assert round(failure, 3) == 0.491
    assert failure > float(sign_failure_bound(one(0.3))) == pytest.approx(0.413, abs=5e-4)
    assert 1 - 2 * failure < 0.3 / 3  # the paper's constant too


def test_skewed_noise_turns_descent_into_ascent_and_dither_turns_it_back() -> None:
    assert 1 - 2 * float(LAWS["skewed"].failure(one(0.2))) == pytest.approx(-0.10, abs=5e-3)
    # Towards the long tail only: the same gradient with the other sign is more reliable than with Gaussian noise.
    assert LAWS["skewed"].failure(one(-0.2)) < LAWS["gaussian"].failure(one(0.2))
    assert 1 - 2 * float(LAWS["skewed"].dithered(1.0).failure(one(0.2 / math.sqrt(2)))) == pytest.approx(
        0.047, abs=5e-4
    )


@given(st.floats(0.05, 10), st.floats(-5, 5))
def test_dithered_laws_of_closed_form(ratio: float, x: float) -> None:
    norm = math.hypot(1, ratio)
    normal = torch.special.ndtr
    assert float(LAWS["gaussian"].dithered(ratio).cdf(one(x))) == pytest.approx(float(normal(one(x))), abs=1e-7)
    # Exp(1) - 1 + r Z at y: Phi(u) - exp(r^2 / 2 - y - 1) Phi(u - r), u = (y + 1) / r.
    y = norm * x
    u = (y + 1) / ratio
    tail = math.exp(ratio**2 / 2 - y - 1 + float(torch.special.log_ndtr(one(u - ratio))))
    expected = float(normal(one(u))) - tail
    assert float(LAWS["skewed"].dithered(ratio).cdf(one(x))) == pytest.approx(expected, abs=1e-5)


def test_zero_counts_as_a_failure() -> None:
    assert float(gauss_extremal(2.0).failure(one(0.0))) == pytest.approx(1 - 1 / 6)  # P(X <= 0), an atom of 2/3 at 0
    assert float(LAWS["gaussian"].failure(one(0.0))) == 0.5
    assert LAWS["gaussian"].failure(torch.tensor([1.0, 2.0])).dtype == torch.float64


def test_generator_decides() -> None:
    for law in ALL:
        first, again, other = (law.sample((2, 3), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
        assert first.shape == (2, 3)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_names_are_keys() -> None:
    assert all(name == law.name for name, law in LAWS.items())
    assert [name for name, law in LAWS.items() if not (law.symmetric and law.unimodal)] == ["bimodal", "skewed"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gauss_extremal(1.0), "snr=1.0: expected a finite number of at least 2 / sqrt 3 = 1.1547"),
        (lambda: gauss_extremal(math.inf), "snr=inf"),
        (lambda: gauss_extremal(math.nan), "snr=nan"),
        (lambda: skewed(0), "n=0: expected at least 1"),
        (lambda: LAWS["uniform"].dithered(0.0), "ratio=0.0: expected a finite number above 0"),
        (lambda: LAWS["uniform"].dithered(math.inf), "ratio=inf"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()

"""The expected vote against drawn votes, its slope, and the attackers that it survives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signstep.theory.vote import accuracy, colluders_survived, expected_vote, linear_slope

SNR = st.floats(0, 4)
WORKERS = st.integers(1, 60)


def test_more_attackers_than_workers_is_an_error() -> None:
    with pytest.raises(ValueError, match="workers=0"):
        expected_vote(0.1, 0)
    with pytest.raises(ValueError, match="no more attackers"):
        expected_vote(0.1, 3, flipping=2, colluding=2)


@pytest.mark.parametrize(
    ("snr", "workers", "flipping", "colluding"),
    [
        (0.0, 5, 0, 0),
        (0.05, 101, 0, 0),
        (0.3, 1, 0, 0),
        (0.3, 4, 0, 0),
        (0.5, 15, 3, 0),
        (0.5, 16, 0, 3),
        (1.0, 12, 2, 3),
        (2.0, 8, 4, 0),
        (math.inf, 9, 4, 0),
        (math.inf, 8, 0, 4),
    ],
)
def test_expected_vote_is_that_of_drawn_votes(snr: float, workers: int, flipping: int, colluding: int) -> None:
    """50 000 elections: five standard errors of a mean of votes in {-1, 0, 1} are at most 0.0224."""
    elections, generator = 50_000, torch.Generator().manual_seed(0)
    noise = torch.randn(elections, workers, generator=generator)
    signs = torch.ones_like(noise) if snr == math.inf else (snr + noise).sign()
    signs[:, :flipping] *= -1
    signs[:, flipping : flipping + colluding] = -1
    votes = signs.sum(dim=1).sign()
    error = 5 * float(votes.std()) / math.sqrt(elections)
    expected = expected_vote(snr, workers, flipping=flipping, colluding=colluding)
    assert float(votes.mean()) == pytest.approx(expected, abs=max(error, 1e-9))
    assert error < 0.0225


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
@pytest.mark.parametrize("workers", [1, 2, 7, 16])
def test_the_expected_vote_begins_with_its_slope(workers: int, law: str) -> None:
    assert expected_vote(1e-5, workers, law=law) / 1e-5 == pytest.approx(linear_slope(workers, law), rel=1e-4)
    assert accuracy(0.0, law) == 0.5


@given(SNR, WORKERS)
def test_uniform_noise_decides_beyond_its_range(snr: float, workers: int) -> None:
    chance = accuracy(snr, "uniform")
    assert chance == pytest.approx(min(1.0, (1 + snr / math.sqrt(3)) / 2), rel=1e-12)
    if snr > 1.7321:
        assert chance == expected_vote(snr, workers, law="uniform") == 1


def test_numbers_of_the_theory_notes() -> None:
    assert [round(expected_vote(0.3, m), 3) for m in (1, 15, 101)] == [0.236, 0.654, 0.984]
    assert round(expected_vote(0.1, 15), 3) == 0.247
    assert [round(expected_vote(0.1, 15, flipping=f), 3) for f in (3, 6)] == [0.150, 0.050]
    assert round(expected_vote(0.1, 15, colluding=3), 3) == -0.440
    assert [round(linear_slope(m), 2) for m in (1, 15, 101)] == [0.80, 2.51, 6.41]


@given(SNR, WORKERS)
def test_an_even_number_of_workers_is_worth_one_fewer(snr: float, workers: int) -> None:
    odd = workers - 1 + workers % 2
    assert expected_vote(snr, odd + 1) == pytest.approx(expected_vote(snr, odd), abs=1e-9)


@given(SNR, WORKERS, st.floats(0, 1))
def test_expected_vote_rises_with_the_ratio_and_attackers_lower_it(snr: float, workers: int, more: float) -> None:
    value = expected_vote(snr, workers)
    assert -1e-9 <= value <= 1 + 1e-9
    assert expected_vote(snr + more, workers) >= value - 1e-9
    flipped = expected_vote(snr, workers, flipping=1)
    assert expected_vote(snr, workers, colluding=1) - 1e-9 <= flipped <= value + 1e-9
    # Half of them flip: by symmetry nothing is left.
    assert expected_vote(snr, 2 * workers, flipping=workers) == pytest.approx(0, abs=1e-9)


@given(WORKERS)
def test_slope_at_zero(workers: int) -> None:
    assert linear_slope(workers) == pytest.approx(expected_vote(1e-5, workers) / 1e-5, rel=1e-4)


@given(st.floats(0.01, 3), WORKERS)
def test_colluders_survived(snr: float, workers: int) -> None:
    share, count = colluders_survived(snr, workers)
    q = accuracy(snr)
    assert (1 - share) * q == pytest.approx(0.5)
    if count > 0:
        assert expected_vote(snr, workers, colluding=count) > 0
    assert expected_vote(snr, workers, colluding=count + 1 if count < workers else count) <= 1e-9


def test_few_colluders_are_survived_for_every_share_below_the_limit() -> None:
    """At many workers the number approaches the share."""
    share, count = colluders_survived(1.0, 1000)
    assert count / 1000 == pytest.approx(share, abs=0.005)

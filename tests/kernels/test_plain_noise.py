"""The fast noise of plain torch on CPUs takes the very decisions of the reference, which computes everything."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from signstep.kernels import plain_noise, reference
from signstep.kernels.reference import PARAM_ROUNDING, ROUNDING, Segment

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Any:
    """So that small tensors too have several chunks, which end within a Philox block."""
    threads = torch.get_num_threads()
    with (
        mock.patch.object(plain_noise, "_PER_THREAD", -(-1003 // threads)),
        mock.patch.object(plain_noise, "_IN_CACHE", 97),
    ):
        yield


def same_bits(
    ms: list[Tensor],
    sigmas: list[Tensor],
    segments: list[Segment],
    seed: int = 9,
    step: int = 3,
    position: str = "pre",
    law: str = "gaussian",
) -> list[Tensor]:
    """The directions, after they were compared with the reference's: also -0 with 0, and NaN with NaN."""
    at: dict[str, Any] = {"seed": seed, "step": torch.tensor(step), "position": position, "law": law}
    expected = reference.directions(ms, sigmas, segments, **at)
    with mock.patch.object(reference, "directions", side_effect=AssertionError("the slow one was asked")):
        drawn = plain_noise.directions(ms, sigmas, segments, **at)
    for x, y in zip(drawn, expected, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        x, y = (torch.where(t.isnan(), 7.0, t).view(torch.int32) for t in (x, y))
        assert torch.equal(x, y)
    return drawn


SIZES = st.sampled_from([0, 1, 2, 15, 16, 17, 96, 97, 98, 1002, 1003, 1004, 2500])
STARTS = st.one_of(st.integers(0, 40), st.integers(0, 2**40))
LAWS = st.sampled_from(["gaussian", "uniform"])
SIGMAS = st.one_of(st.floats(2.0**-149, 2.0**127, width=32), st.floats(0.015625, 64, width=32))


@given(
    st.lists(st.tuples(SIZES, STARTS, st.integers(0, 2**33), SIGMAS), min_size=1, max_size=4),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
    st.integers(-149, 127),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    LAWS,
)
def test_decisions_are_the_references(
    tensors: list[tuple[int, int, int, float]], seed: int, step: int, exponent: int, dtype: torch.dtype, law: str
) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    ms = []
    for size, _, _, sigma in tensors:
        scale = torch.tensor([sigma, 2.0**exponent, 0.0, math.inf, math.nan], dtype=torch.float64)
        kinds = torch.multinomial(torch.tensor([8.0, 4.0, 1.0, 0.1, 0.1]), max(1, size), True, generator=generator)
        ms.append((torch.randn(size, generator=generator, dtype=torch.float64) * scale[kinds[:size]]).to(dtype))
    sigmas = [
        torch.tensor(sigma, dtype=torch.float64 if i % 2 else torch.float32) for i, (*_, sigma) in enumerate(tensors)
    ]
    segments = [Segment(parameter, start, size) for size, start, parameter, _ in tensors]
    same_bits(ms, sigmas, segments, seed, step, law=law)


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_decisions_at_the_boundaries_of_bytes(law: str) -> None:
    """At the quantiles of k / 256, and next to them on both sides, with every byte that may be drawn."""
    chances = torch.arange(1, 256, dtype=torch.float64) / 256
    quantiles = (2 * chances - 1 if law == "uniform" else torch.special.ndtri(chances)).float()
    steps = torch.tensor([-3, -1, 0, 1, 3], dtype=torch.int32)
    near = (quantiles.view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
    far = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e38, -1e38, 5.5, -5.5, 6.6, -6.6, math.inf, -math.inf, math.nan])
    every = torch.cat([near, far])
    sigma = torch.tensor(1 / 3**0.5 if law == "uniform" else 1.0)
    (drawn,) = same_bits([every.repeat(60)], [sigma], [Segment(3, 5, 60 * len(every))], law=law)
    drawn = drawn.view(60, -1)[:, len(near) :]
    assert (drawn[:, :2] == 0).all()
    assert not drawn[:, :2].signbit().any()
    assert drawn[:, -3:].isnan().all()


def test_two_to_the_twenty_decisions() -> None:
    m = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)) * 2
    with mock.patch.multiple(plain_noise, _PER_THREAD=1 << 16, _IN_CACHE=1 << 14):
        for law in ("gaussian", "uniform"):
            same_bits([m], [torch.tensor(1.0)], [Segment(1, 7, 1 << 20)], law=law)


def test_the_estimate_is_better_than_the_slack() -> None:
    """Of 256 Phi(z), by a third and more, for every 64th float32 z, infinities among them."""
    z = torch.arange(0, 0x7F800001, 64, dtype=torch.int64).to(torch.int32).view(torch.float32)[::16]
    z = torch.cat([z, torch.linspace(0, 8, 100_001), torch.tensor([math.inf])])
    z = torch.cat([z, -z])
    zero = torch.zeros(len(z), dtype=torch.uint8)
    estimate, exact = torch.empty_like(z), 256 * torch.special.ndtr(z.double())
    with mock.patch.object(plain_noise, "_masked"):
        plain_noise._estimate(torch.ones_like(z), z, zero, estimate, torch.empty(len(z), dtype=torch.bool), "gaussian")
    assert float((256 * estimate.double() + 0.5 - exact).abs().max()) < plain_noise.SLACK / 1.5


@pytest.mark.parametrize("sigma", [0.0, math.inf, math.nan])
def test_degenerate_noise_is_left_to_the_reference(sigma: float) -> None:
    m, at = torch.tensor([1.0, -1.0, 0.0, math.inf]), {"seed": 1, "step": torch.tensor(0), "position": "pre"}
    with mock.patch.object(reference, "directions", return_value=["left"]):
        assert plain_noise.directions([m], [torch.tensor(sigma)], [Segment(0, 0, 4)], **at) == ["left"]  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(SIZES, STARTS, st.integers(0, 2**33)), min_size=1, max_size=3),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
)
def test_numbers_are_the_references(tensors: list[tuple[int, int, int]], seed: int, step: int) -> None:
    segments = [Segment(parameter, start, size) for size, start, parameter in tensors]
    at: dict[str, Any] = {"seed": seed, "step": torch.tensor(step), "device": CPU}
    for name, stream in (("noise_bytes", ROUNDING), ("noise_halves", PARAM_ROUNDING)):
        drawn = getattr(plain_noise, name)(segments, stream, **at)
        expected = getattr(reference, name)(segments, stream, **at)
        for x, y in zip(drawn, expected, strict=True):
            assert x.dtype == torch.int32
            assert torch.equal(x, y.int())

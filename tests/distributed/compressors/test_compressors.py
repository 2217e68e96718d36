"""One worker's side of each compressor, against a slow reference that reads like its paper."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from compressor_cases import CPU, blockwise, cosine_basis, decoded, ef_sign, one_bit_sgd, qsgd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from signstep.distributed.compressors import QSGD, DeMo, DitheredSign, EFSign, OneBitSGD, TernGrad, TopK, demo
from signstep.distributed.compressors.blocks import BLOCK, Blocks
from signstep.distributed.compressors.demo import Grid, cosines, from_components
from signstep.distributed.compressors.noise import SERVER, WORKER, random_integers, round_stochastically
from signstep.distributed.compressors.top_k import largest

magnitudes = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e30])


@given(size=st.integers(1, 2500), scale=magnitudes, seed=st.integers(0, 99), zeros=st.booleans())
def test_deterministic_compressors_agree_with_their_papers(size: int, scale: float, seed: int, zeros: bool) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale
    if zeros:
        x[::3] = 0
    for compressor, reference in ((EFSign(), ef_sign), (OneBitSGD(), one_bit_sgd)):
        expected = blockwise(x.double().numpy(), reference)
        np.testing.assert_allclose(decoded(compressor, x.clone()).numpy(), expected, rtol=1e-5, atol=1e-37)


@given(size=st.integers(1, 2500), scale=magnitudes, seed=st.integers(0, 99), levels=st.sampled_from([1, 2, 7, 8, 127]))
def test_stochastic_compressors_agree_with_their_papers(size: int, scale: float, seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * scale
    x[::3] = 0
    noise = torch.randint(-(2**15), 2**15, (-(-size // BLOCK), BLOCK), generator=generator, dtype=torch.int16)
    u = (noise.view(-1)[:size].double().numpy() + 2**15 + 0.5) / 2**16
    pieces = range(0, size, BLOCK)
    exact = x.double().numpy()
    for compressor, s in ((QSGD(levels), levels), (TernGrad(clip=None), 1)):
        expected = np.concatenate([qsgd(exact[i : i + BLOCK], u[i : i + BLOCK], s) for i in pieces])
        got = decoded(compressor, x.clone(), noise).double().numpy()
        unit = np.concatenate(
            [np.full(len(exact[i : i + BLOCK]), np.abs(exact[i : i + BLOCK]).max() / s) for i in pieces]
        )
        steps = np.abs(got - expected) / np.maximum(unit, 1e-40)
        # A fraction within float32 rounding of u goes the other way.
        assert steps.max() < 1.001
        assert (steps > 1e-4).sum() <= 2
        assert (got[::3] == 0).all()


@pytest.mark.parametrize("compressor", [QSGD(1), QSGD(7), QSGD(127), TernGrad(clip=None)], ids=repr)
def test_rounding_is_unbiased(compressor: Any) -> None:
    """4000 draws of 200 elements: no mean is off by 5 of its standard errors, 1 chance in 10000 of a false alarm."""
    draws = 4000
    x = torch.randn(200, generator=torch.Generator().manual_seed(1))
    rows = torch.zeros(draws, BLOCK)
    rows[:, :200] = x
    noise = random_integers([draws], [0], WORKER, seed=3, rank=0, step=0, device=CPU)
    got = compressor._decode(compressor._encode(rows, Blocks(torch.full((draws,), 200), CPU), noise))[:, :200].double()
    unit = float(x.abs().max()) / getattr(compressor, "levels", 1)
    q = (x.double() / unit) % 1  # the chance to be rounded up
    error = unit * (q * (1 - q) / draws).sqrt()
    assert ((got.mean(dim=0) - x).abs() <= 5 * error + unit * 2**-16 + 1e-6).all()
    np.testing.assert_allclose(got.var(dim=0), unit**2 * q * (1 - q), atol=0.05 * unit**2)


def test_the_error_of_a_dithered_sign_does_not_depend_on_what_is_sent() -> None:
    """Schuchman: uniform on (-s, s), whatever x is, so of variance s^2 / 3, to 5 standard errors."""
    draws = 4000
    x = torch.linspace(-1, 1, 9)
    rows = torch.zeros(draws, BLOCK)
    rows[:, :9] = x
    compressor = DitheredSign(clip=None)
    noise = random_integers([draws], [0], WORKER, seed=7, rank=1, step=2, device=CPU)
    coded = compressor._encode(rows, Blocks(torch.full((draws,), 9), CPU), noise)
    error = (compressor.reconstruct(coded, noise)[:, :9] - x).double()
    assert error.abs().max() <= 1 + 2**-15
    for column in error.T:
        assert scipy.stats.kstest(column.numpy(), "uniform", (-1, 2)).pvalue > 1e-4
    np.testing.assert_allclose(error.var(dim=0), 1 / 3, atol=5 * math.sqrt((1 / 5 - 1 / 9) / draws))
    covariance = (error * x).mean()  # of error and x, over everything
    assert abs(covariance) < 5 * math.sqrt(float(x.square().mean()) / 3 / error.numel())
    # The bits alone: unbiased too, with the variance 1 - x^2.
    alone = compressor._decode(coded)[:, :9].double()
    assert ((alone.mean(dim=0) - x).abs() <= 5 * ((1 - x.square()).clamp(min=1e-3) / draws).sqrt()).all()


@pytest.mark.parametrize("compressor", [DitheredSign(), TernGrad()], ids=repr)
def test_a_parameter_of_one_element_is_not_limited_to_nothing(compressor: Any) -> None:
    x = torch.zeros(1, BLOCK)
    x[0, 0] = -3.0
    compressor.limit(x, torch.tensor([[1.0]]))
    assert x[0, 0] == -3.0


def test_terngrad_limits_what_workers_send_and_not_what_owners_do() -> None:
    x = torch.randn(2, BLOCK)
    x[1, 100:] = 0
    sizes = torch.tensor([[float(BLOCK)], [100.0]])
    expected = x.clone()
    for row, size in ((0, BLOCK), (1, 100)):
        limit = 2.5 * x[row, :size].double().square().mean().sqrt()
        expected[row] = x[row].clamp(-limit, limit)
    TernGrad().limit(x, sizes)
    torch.testing.assert_close(x, expected)
    assert not torch.equal(TernGrad().encode(x * 9, sizes, torch.zeros(2, BLOCK, dtype=torch.int16))[0], x * 0)


@given(size=st.integers(1, 2000), seed=st.integers(0, 99), power=st.integers(0, 4))
def test_what_is_lost_is_bounded(size: int, seed: int, power: int) -> None:
    """||C(x) - x||^2 <= (1 - 1 / d) ||x||^2 on each block, what error feedback needs; sparse x is the worst case."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)) ** (2 * power + 1)
    for compressor in (EFSign(), OneBitSGD()):
        lost = (decoded(compressor, x.clone()) - x).double().square().sum()
        assert lost <= (1 - 1 / BLOCK) * x.double().square().sum() * (1 + 1e-5)


@given(
    size=st.integers(1, 5000),
    share=st.floats(0.0001, 1),
    seed=st.integers(0, 99),
    kind=st.sampled_from(["normal", "ties", "zero", "ramp", "periodic"]),
)
def test_largest_are_the_largest(size: int, share: float, seed: int, kind: str) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        x = x.round()
    elif kind == "zero":
        x.zero_()
    elif kind == "ramp":
        x = torch.arange(size) - size / 3
    elif kind == "periodic":  # with the period of the sample
        x = torch.where(torch.arange(size) % 64 == 0, 100 + x, x)
    k = math.ceil(share * size)
    found = largest(x, k)
    assert len(set(found.tolist())) == k
    assert torch.equal(x[found].abs().sort().values, x.abs().sort().values[-k:])


def test_options_out_of_range_are_refused() -> None:
    makers: tuple[Any, ...] = (lambda: QSGD(0), lambda: QSGD(128), lambda: TopK(0.0), lambda: TopK(1.5))
    for make in (
        *makers,
        lambda: TernGrad(0.0),
        lambda: DitheredSign(clip=-1.0),
        lambda: DeMo(k=0),
        lambda: DeMo(chunk=182),
        lambda: DeMo(beta=1.1),
    ):
        with pytest.raises(ValueError, match=r"^Invalid \w+: .*, expected "):
            make()


def test_noise_is_of_seed_rank_step_parameter_and_side() -> None:
    def draw(**changed: Any) -> Tensor:
        key: dict[str, Any] = {
            "parameters": [4, 5],
            "stream": WORKER,
            "seed": 2**40 + 1,
            "rank": 1,
            "step": 3,
            **changed,
        }
        return random_integers([3, 2], key.pop("parameters"), key.pop("stream"), **key, device=CPU)

    assert torch.equal(draw(), draw())
    # A parameter's noise does not depend on what else is in the bucket.
    assert torch.equal(draw(parameters=[5, 4])[:2], draw()[3:])
    changes = [{"stream": SERVER}, {"seed": 2**40}, {"seed": 1}, {"rank": 0}, {"step": 4}, {"parameters": [5, 6]}]
    for other in changes:
        assert (draw(**other) == draw()).float().mean() < 0.01
    x = draw(**{"parameters": [0, 1]}).double().flatten()
    # Uniform on 2^16 integers: mean -1/2, standard deviation 2^16 / sqrt(12); within 5 standard errors.
    assert abs(x.mean() + 0.5) < 5 * 2**16 / math.sqrt(12 * len(x))
    assert round_stochastically(torch.zeros(1, 8), torch.zeros(1, 1), 7, draw()[:1, :8]).eq(7).all()


@pytest.mark.parametrize("size", [1, 2, 41, 64, 181])
def test_the_cosine_transform_is_orthonormal(size: int) -> None:
    basis = cosines(size, CPU)
    torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
    np.testing.assert_allclose(basis.numpy(), cosine_basis(size), atol=1e-13)


@given(rows=st.integers(1, 70), columns=st.integers(1, 70), scale=magnitudes, seed=st.integers(0, 99))
def test_the_inverse_cosine_transform_is_exact_to_float_error(rows: int, columns: int, scale: float, seed: int) -> None:
    chunks = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(seed)) * scale
    expected = [cosine_basis(rows).T @ chunk @ cosine_basis(columns) for chunk in chunks.double().numpy()]
    np.testing.assert_allclose(
        from_components(chunks).numpy(), np.array(expected), atol=1e-5 * float(chunks.abs().max()) + 1e-44
    )


def test_the_inverse_cosine_transform_does_not_depend_on_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every order of the places of a chunk gives the same bits, as all sums are exact."""
    chunks = torch.randn(5, 64, 48, generator=torch.Generator().manual_seed(0))
    down, across = torch.randperm(64), torch.randperm(48)
    expected = from_components(chunks)
    bases = {64: cosines(64, CPU)[down], 48: cosines(48, CPU)[across]}
    monkeypatch.setattr(demo, "cosines", lambda size, device: bases[size])
    assert torch.equal(from_components(chunks[:, down][:, :, across]), expected)


@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=4).filter(lambda shape: math.prod(shape) < 50_000),
    chunk=st.integers(1, 64),
)
def test_chunks_hold_every_element_once(shape: list[int], chunk: int) -> None:
    grid = Grid.of(shape, chunk)
    assert max(grid.rows, grid.columns) <= chunk
    flat = torch.arange(float(math.prod(shape)))
    cut = grid.cut(flat)
    assert cut.shape == (grid.count, grid.rows, grid.columns)
    assert torch.equal(grid.join(cut), flat)
    sides = [n for n in shape if n > 1]
    if len(sides) > 1:
        assert torch.equal(cut[0], flat.view(sides[0], -1)[: grid.rows, : grid.columns])


@pytest.mark.parametrize("k", [1, 5, 64 * 64])
def test_demo_sends_the_largest_components(k: int) -> None:
    compressor = DeMo(k=k)
    momentum = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3))
    got = Grid.of((128, 64), 64).components(compressor._largest(momentum))
    for chunk, sent in zip(momentum.double().numpy(), got.double().numpy(), strict=True):
        components = cosine_basis(64) @ chunk @ cosine_basis(64).T
        kept = sent != 0
        assert kept.sum() == k
        assert np.abs(components[kept]).min() >= np.abs(components[~kept]).max(initial=0)
        np.testing.assert_allclose(sent[kept], components[kept], rtol=2**-8)

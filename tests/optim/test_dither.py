"""The dither's law, and that it is a pure function of (seed, step, parameter, element)."""

import copy
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import Dither, request
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import references
from signstep import SignSGD
from signstep.kernels import reference
from signstep.kernels.engine import Tensors
from signstep.kernels.reference import Segment
from signstep.optim.dither import dither_std, expected_sign
from signstep.optim.signsgd import signsgd

CPU = torch.device("cpu")
DRAWS = 1_000_000


def _draws(segment: Segment, *, seed: int = 0, step: int = 0) -> torch.Tensor:
    """U of a segment's elements, int64 in [0, 2^32)."""
    at = {"seed": seed, "step": torch.tensor(step), "device": CPU}
    return reference.noise_bytes([segment], reference.TOP_BITS, **at)[0] << 24 | reference.low_bits([segment], **at)[0]


def _directions(z: float, position: str, *, sigma: float = 0.25, seed: int = 0, law: str = "gaussian") -> torch.Tensor:
    m = torch.full((DRAWS,), z * sigma)
    (direction,) = reference.directions(
        [m], [torch.tensor(sigma)], [Segment(0, 0, DRAWS)], seed=seed, step=torch.tensor(0), position=position, law=law
    )
    return direction.double()


@pytest.mark.parametrize("z", [-2.0, 0.001, 0.01, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0])
def test_expected_sign_is_two_phi_minus_one(z: float) -> None:
    signs = _directions(z, "pre", seed=int(1000 * abs(z)))
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    law = 2 * stats.norm.cdf(z) - 1
    error = math.sqrt((1 - law**2) / DRAWS)
    assert abs(signs.mean().item() - law) < 4 * error
    assert float(expected_sign(torch.tensor(z * 0.25), torch.tensor(0.25))) == pytest.approx(law, abs=1e-6)


@pytest.mark.parametrize("z", [0.0001, 1.0, 4.0])
def test_post_sign_noise_has_mean_0_and_variance_sigma_squared(z: float) -> None:
    sigma = 0.25
    noise = _directions(z, "post", sigma=sigma) - 1
    assert abs(noise.mean().item()) < 4 * sigma / math.sqrt(DRAWS)
    assert abs(noise.var().item() - sigma**2) < 4 * sigma**2 * math.sqrt(2 / DRAWS)
    assert stats.kstest((noise / sigma).numpy(), "norm").pvalue > 1e-4


@pytest.mark.parametrize("z", [-2.0, -math.sqrt(3), -1.0, 0.001, 0.01, 0.1, 0.3, 0.5, 1.0, 1.5, 1.7, 1.75, 3.0])
def test_the_expected_sign_of_uniform_dither_is_linear(z: float) -> None:
    signs = _directions(z, "pre", seed=int(1000 * abs(z)), law="uniform")
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    law = min(max(z / math.sqrt(3), -1), 1)
    assert abs(signs.mean().item() - law) <= 4 * math.sqrt((1 - law**2) / DRAWS) + 1e-7
    sigma = torch.tensor(0.25)
    assert float(expected_sign(torch.tensor(z * 0.25), sigma, "uniform")) == pytest.approx(law, abs=1e-6)


def test_uniform_noise_is_uniform_has_mean_0_and_variance_sigma_squared() -> None:
    sigma = 0.25
    noise = _directions(1.0, "post", sigma=sigma, law="uniform") - 1
    half = math.sqrt(3) * sigma
    assert noise.abs().max().item() <= half * (1 + 1e-6)
    assert abs(noise.mean().item()) < 4 * sigma / math.sqrt(DRAWS)
    # The fourth moment is 9/5 sigma^4.
    assert abs(noise.var().item() - sigma**2) < 4 * sigma**2 * math.sqrt(0.8 / DRAWS)
    assert stats.kstest(((noise / half + 1) / 2).numpy(), "uniform").pvalue > 1e-4


@given(
    st.lists(st.one_of(st.floats(-1.25, 1.25, width=32), st.floats(width=32, allow_nan=False)), min_size=1, max_size=50)
)
def test_threshold_of_uniform_noise_is_exact(values: list[float]) -> None:
    values += [1.0, -1.0, 0.0, -1e-45, 1e-45, math.inf, -math.inf, 1 - 2.0**-24, 2.0**-24 - 1]
    chances = [min(max((1 + Fraction(z)) / 2, Fraction(0)), Fraction(1)) if math.isfinite(z) else z > 0 for z in values]
    found = reference.threshold(torch.tensor(values), "uniform").tolist()
    assert found == [math.floor(2**32 * chance) for chance in chances]


@given(st.floats(0, 2.0**100, width=32))
def test_the_spread_of_uniform_noise_is_one_float32_product(sigma: float) -> None:
    expected = np.float32(sigma) * np.float32(math.sqrt(3))
    assert float(reference.spread(torch.tensor(sigma), "uniform")) == float(expected)


def test_uniform_dither_takes_a_momentum_within_its_range_or_not_at_all() -> None:
    """Beyond sqrt(3) sigma the sign is certain, which it never is under Gaussian noise."""
    assert (_directions(1.7321, "pre", law="uniform") == 1).all()
    assert (_directions(-1.7321, "pre", law="uniform") == -1).all()
    assert (_directions(1.73, "pre", law="uniform") == -1).any()


def test_a_state_from_before_there_was_a_law_is_gaussian() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = SignSGD([p], dither=0.1)
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["dither_law"]
    optimizer.__setstate__(state)
    assert optimizer.param_groups[0]["dither_law"] == "gaussian"
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["dither_law"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["dither_law"] == "gaussian"
    with pytest.raises(ValueError, match="Invalid dither_law: 'triangular', expected one of 'gaussian', 'uniform'"):
        SignSGD([p], dither_law="triangular")


EXPECTED: dict[str, Any] = {"dither_position": "expected", "momentum": 0.9, "lr": 0.5}


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_the_expected_step_is_the_mean_of_noisy_ones(law: str, scale: str) -> None:
    """Of 200 rows of each of 100 seeds, at 40 momenta; the largest of all differences has a chance of 0.3 %."""
    seeds, rows = 100, 200
    gradient = torch.linspace(-1, 1, 40).repeat(rows, 1)
    options: dict[str, Any] = {"dither": 0.25, "dither_scale": scale, "dither_law": law, "lr": 0.5}

    def second_step(**more: Any) -> torch.Tensor:
        """What the second step takes off a parameter; relative noise is none in the first."""
        p = torch.nn.Parameter(torch.zeros(rows, 40))
        optimizer = SignSGD([p], **options, **more)
        for _ in range(2):
            p.grad, before = gradient, p.detach().clone()
            optimizer.step()
        return (before - p.detach()).double() / 0.5

    mean = torch.cat([second_step(seed=seed) for seed in range(seeds)]).mean(dim=0)
    expected = second_step(dither_position="expected")[0]
    # Where a sign is all but certain, the one draw that is another is no normal error: it is allowed for.
    error = ((1 - expected**2).clamp(min=0) / (seeds * rows)).sqrt() + 2 / (seeds * rows)
    assert (mean - expected).abs().div(error).max() < 4


def test_the_expected_step_draws_no_noise_and_is_a_sign_without_dither() -> None:
    def stepped(**options: Any) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(100))
        optimizer = SignSGD([p], **(EXPECTED | options))
        for _ in range(3):
            p.grad = torch.linspace(-1, 1, 100)
            optimizer.step()
        return p.detach()

    assert torch.equal(stepped(dither=0.1, seed=1), stepped(dither=0.1, seed=2))
    assert torch.equal(stepped(dither=0.0), stepped(dither_position="pre"))
    assert (stepped(dither=1e-30)[:45] == 1.5).all()
    # Far below sigma it is SGD.
    line = math.sqrt(2 / math.pi) * 0.5 * (0.1 + 0.19 + 0.271) * 1e-3 * torch.linspace(-1, 1, 100)
    torch.testing.assert_close(stepped(dither=1e6, dither_decay=0.0), -line, rtol=1e-5, atol=1e-9)


def test_an_expected_step_shows_a_momentum_that_is_not_finite() -> None:
    for foreach, fused in ((False, None), (True, None), (None, None)):
        p = torch.nn.Parameter(torch.zeros(4))
        optimizer = SignSGD([p], **(EXPECTED | {"momentum": 0.0, "dither": 0.1}), foreach=foreach, fused=fused)
        p.grad = torch.tensor([math.nan, math.inf, 0.0, 1.0])
        optimizer.step()
        assert p.isnan().tolist() == [True, True, False, False]
        assert p[2] == 0


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_autograd_follows_the_expected_step(law: str) -> None:
    """The slope of the step in the gradient, also where relative dither has no sigma yet: then it is the sign's, 0."""
    gradient = torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64, requires_grad=True)
    p = torch.zeros(3, dtype=torch.float64)
    at = {"momentum": 0.0, "lr": 2.0, "dither": 0.25, "dither_decay": 0.0, "dither_law": law}
    optimizer = SignSGD([p], **(EXPECTED | at), differentiable=True)
    p.grad = gradient * 1.0
    optimizer.step()
    (slope,) = torch.autograd.grad(p.sum(), gradient)
    z = gradient.detach() / 0.5
    curve = 2 * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) / 0.5
    line = torch.where(z.abs() < math.sqrt(3), 1 / (math.sqrt(3) * 0.5), 0.0).double()
    torch.testing.assert_close(slope, -2 * (line if law == "uniform" else curve), rtol=1e-5, atol=0)
    q = torch.zeros(3)
    first = SignSGD([q], **(EXPECTED | at), dither_scale="relative", differentiable=True)
    again = torch.tensor([0.1, -0.4, 0.7], requires_grad=True)
    q.grad = again * 1.0
    first.step()
    assert q.tolist() == [-2, 2, -2]
    assert torch.autograd.grad(q.sum(), again)[0].tolist() == [0, 0, 0]


def test_a_momentum_of_exactly_0_does_not_move_and_a_non_finite_one_shows() -> None:
    m = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45])
    for position, law in itertools.product(("pre", "post"), ("gaussian", "uniform")):
        (d,) = reference.directions(
            [m], [torch.tensor(0.1)], [Segment(0, 0, 6)], seed=0, step=torch.tensor(0), position=position, law=law
        )
        assert d[:2].tolist() == [0, 0]
        assert d[2:5].isnan().all()
        assert d[5].isfinite()
    assert reference.sign(m)[:2].tolist() == [0, 0]
    assert reference.sign(m)[2:5].isnan().all()


def test_no_noise_left_is_the_plain_sign() -> None:
    m = torch.tensor([1e-30, -1e-30, 3.0])
    for law in ("gaussian", "uniform"):
        (d,) = reference.directions(
            [m], [torch.tensor(0.0)], [Segment(0, 0, 3)], seed=0, step=torch.tensor(0), position="pre", law=law
        )
        assert d.tolist() == [1, -1, 1]


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**20),
    st.one_of(st.integers(0, 2**34 - 64), st.sampled_from([2**31 - 3, 2**32 - 3, 2**34 - 64])),
    st.integers(0, 40),
)
def test_draws_are_those_of_the_slow_reference(seed: int, step: int, parameter: int, start: int, size: int) -> None:
    drawn = _draws(Segment(parameter, start, size), seed=seed, step=step)
    assert drawn.tolist() == [references.uniform(seed, step, parameter, start + i) for i in range(size)]


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32)), min_size=1, max_size=50))
def test_8_bits_then_24_decide_as_32_do(pairs: list[tuple[int, int]]) -> None:
    # Each draw also against thresholds right beside it, where the top 8 bits tie.
    pairs += [(u, min(max(u + d, 0), 2**32)) for u, _ in pairs for d in (-1, 0, 1)]
    u = torch.tensor([a for a, _ in pairs])
    t = torch.tensor([b for _, b in pairs])
    assert torch.equal(reference.less(u >> 24, u & 0xFFFFFF, t), u < t)


def test_threshold_is_the_floor_of_the_exact_probability() -> None:
    z = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    exact = torch.tensor(stats.norm.cdf(z.numpy())) * 2.0**32
    t = reference.threshold(z)
    assert t.min() >= 0
    assert t.max() <= 2**32
    assert ((t - exact) <= 1e-6 * exact.clamp(min=1)).all()
    assert ((exact - t) < 1 + 1e-6 * exact.clamp(min=1)).all()


def test_uniform_bits_are_uniform() -> None:
    u = _draws(Segment(2, 0, DRAWS), seed=11, step=5)
    for bits in (u >> 24, (u >> 16) & 0xFF, (u >> 8) & 0xFF, u & 0xFF):
        assert stats.chisquare(torch.bincount(bits, minlength=256).numpy()).pvalue > 1e-4
    pairs = (u >> 28) * 16 + ((u >> 20) & 0xF)
    assert stats.chisquare(torch.bincount(pairs, minlength=256).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 15, 16, 17, 64, 1000])
def test_elements_are_uncorrelated(lag: int) -> None:
    u = _draws(Segment(0, 0, DRAWS), seed=3).double() / 2**32
    assert abs(stats.pearsonr(u[:-lag], u[lag:]).statistic) < 4 / math.sqrt(DRAWS - lag)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"step": 0}, {"step": 1}),
        ({"seed": 0}, {"seed": 1}),
        ({"seed": 0}, {"seed": 1 << 32}),
        ({"parameter": 0}, {"parameter": 1}),
    ],
    ids=["steps", "seeds", "high seed word", "parameters"],
)
def test_streams_are_independent(one: dict[str, int], other: dict[str, int]) -> None:
    a, b = (
        _draws(Segment(key.get("parameter", 4), 0, DRAWS), seed=key.get("seed", 9), step=key.get("step", 2))
        for key in (one, other)
    )
    assert abs(stats.pearsonr(a.double(), b.double()).statistic) < 4 / math.sqrt(DRAWS)
    table = torch.bincount((a >> 28) * 16 + (b >> 28), minlength=256).view(16, 16)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-4


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.sampled_from(["pre", "post"]),
    st.integers(0, 2**33),
    st.sampled_from(["gaussian", "uniform"]),
    st.booleans(),
    st.booleans(),
)
def test_a_split_tensor_draws_the_same(
    parts: list[int], position: str, offset: int, law: str, foreach: bool, is_complex: bool
) -> None:
    dtype = torch.complex64 if is_complex else torch.float32
    generator = torch.Generator().manual_seed(sum(parts))
    p, g = torch.randn(2, sum(parts), dtype=dtype, generator=generator)

    def step(params: list[torch.Tensor], grads: list[torch.Tensor], offsets: list[int]) -> None:
        tensors = Tensors(params, grads, [], [], [], [3] * len(params), offsets)
        options = request(dither=Dither(position, torch.tensor(2.0), law), rate=0.1, step=torch.tensor(6))
        signsgd(tensors, options, foreach=foreach, fused=None, differentiable=False)

    whole = p.clone()
    step([whole], [g], [offset])
    shards = [part.clone() for part in p.split(parts)]
    starts = [offset + sum(parts[:i]) for i in range(len(parts))]
    step(shards, list(g.split(parts)), starts)
    assert torch.equal(torch.cat(shards), whole)


def test_noise_does_not_depend_on_the_other_parameters_or_on_missing_gradients() -> None:
    def run(missing: tuple[int, ...]) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.zeros(33)) for _ in range(3)]
        optimizer = SignSGD([{"params": params[:2]}, {"params": params[2:]}], lr=1.0, dither=1.0)
        for _ in range(3):
            for i, p in enumerate(params):
                p.grad = None if i in missing else torch.ones(33)
            optimizer.step()
        return [p.detach() for p in params]

    assert torch.equal(run(())[2], run((0,))[2])
    assert torch.equal(run(())[1], run((0, 2))[1])
    assert not torch.equal(run(())[1], run(())[2])


def test_noise_is_the_same_after_resume() -> None:
    def train(optimizer: SignSGD, p: torch.nn.Parameter, steps: range) -> None:
        for step in steps:
            p.grad = torch.full_like(p, 0.01 * (step + 1))
            optimizer.step()

    p = torch.nn.Parameter(torch.zeros(100))
    optimizer = SignSGD([p], dither=0.1, seed=5)
    train(optimizer, p, range(5))
    state, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    train(optimizer, p, range(5, 10))

    torch.manual_seed(123)  # torch's own generator plays no part
    q = torch.nn.Parameter(weights)
    resumed = SignSGD([q], dither=0.1, seed=5)
    resumed.load_state_dict(state)
    train(resumed, q, range(5, 10))
    assert torch.equal(p, q)


@given(st.integers(0, 10**7), st.floats(0, 10), st.floats(0, 2))
def test_dither_std_is_equation_9(step: int, alpha: float, decay: float) -> None:
    expected = math.sqrt(alpha * (1 + step) ** -decay)
    assert float(dither_std(torch.tensor(step), alpha, decay)) == pytest.approx(expected, rel=1e-6, abs=1e-30)


def test_large_groups_are_dithered_in_chunks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> torch.Tensor:
        params = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 0, 1000, 3, 700, 1)]
        optimizer = SignSGD(params, dither=0.1)
        for p in params:
            p.grad = torch.linspace(-1, 1, p.numel())
        optimizer.step()
        return torch.cat([p.detach() for p in params])

    whole = run()
    monkeypatch.setattr(reference, "CHUNK", 300)
    assert torch.equal(run(), whole)


@pytest.mark.slow
def test_a_compiled_step_does_not_hide_a_non_finite_gradient() -> None:
    # Inductor takes x * 0 for 0, which would make a step of +1 or -1 of a NaN.
    recipe = pytest.importorskip("signstep.lab.training.recipe")
    try:
        recipe.require_compiler("cpu")
    except ValueError as error:
        pytest.skip(str(error))
    options: list[dict[str, Any]] = [{}, {"dither": 0.1}, {"dither": 0.1, "dither_position": "post"}]
    params = [torch.nn.Parameter(torch.zeros(5)) for _ in options]
    groups = [{"params": [p], **each} for p, each in zip(params, options, strict=True)]
    optimizer = SignSGD(groups, lr=1.0, momentum=0.0)
    for p in params:
        p.grad = torch.tensor([1.0, math.nan, math.inf, -math.inf, 0.0])
    torch.compile(optimizer.step)()
    for p in params:
        assert p.isnan().tolist() == [False, True, True, True, False]
        assert p[4] == 0


def test_relative_dither_shows_a_non_finite_momentum_in_its_whole_tensor() -> None:
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for position in ("pre", "post"):
        optimizer = SignSGD(params, dither=1.0, dither_scale="relative", dither_position=position)
        params[0].grad, params[1].grad = torch.tensor([1.0, math.nan, 2.0]), torch.ones(3)
        for _ in range(2):  # the second step has the first one's rms
            optimizer.step()
        assert params[0].isnan().all()
        assert params[1].isfinite().all()

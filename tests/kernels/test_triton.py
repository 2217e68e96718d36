"""The Triton engine against plain torch on the CPU, which defines the bits: on a GPU, else in Triton's interpreter."""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

ON_GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from engine_cases import DITHERS, DTYPES, OTHERS, STATE_DTYPES, Dither, give_gradients, parameters, request, strided  # noqa: E402

from pairwise import every_combination  # noqa: E402
from signstep import HybridSignSGD, SignSGD  # noqa: E402
from signstep.kernels import fused, momentum, native, reference  # noqa: E402
from signstep.kernels import triton as engine  # noqa: E402
from signstep.kernels.engine import Options, Projected, Tensors  # noqa: E402
from signstep.kernels.plain import multi_tensor_step  # noqa: E402
from signstep.kernels.reference import Segment  # noqa: E402
from signstep.kernels.triton_noise import erf, noise_bytes, normal, uniform  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and isinstance(tl.sum, triton.runtime.JITFunction):
    pytest.skip(
        "triton was imported before its interpreter was asked for: set TRITON_INTERPRET=1 in conftest.py",
        allow_module_level=True,
    )
if INTERPRETED and not hasattr(triton._C.libtriton.interpreter, "fma_fp32"):
    pytest.skip(f"the interpreter of Triton {triton.__version__} rounds an fma twice", allow_module_level=True)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
pytestmark = pytest.mark.skipif(engine.unavailable() is not None, reason=str(engine.unavailable()))


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """fused=True steps CPU tensors with the Triton engine, and the interpreter rounds to bfloat16 as a GPU does."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

            cast = InterpreterBuilder.cast_impl

            def rounding_cast(self: Any, source: Any, to: Any) -> Any:
                if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
                    rounded = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.int16).numpy()
                    return TensorHandle(rounded.view("uint16"), tl.bfloat16)
                return cast(self, source, to)

            # It truncates.
            patch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
            patch.setattr(fused, "_engine", lambda device_type: engine)
        yield


RAGGED = [(41, 51), (5,), (), (0, 3), (257,)]
FEW = [(9, 29), (), (0, 3)]


def differing(actual: Tensor, expected: Tensor) -> int:
    """Elements that are not equal; two NaNs are."""
    actual = actual.detach().cpu()
    return int((~((actual == expected) | (actual.isnan() & expected.isnan()))).sum())


def close(actual: Tensor, expected: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected.detach(), rtol=rtol, atol=atol, equal_nan=True)


def check_equal(
    cls: type[SignSGD],
    options: dict[str, Any],
    make: Callable[[torch.device], list[torch.nn.Parameter]],
    steps: int = 3,
) -> None:
    """Momentum bit for bit; parameters too but for one decision, or the rounding of post-sign noise and lambda."""
    params, expected = make(DEVICE), make(torch.device("cpu"))
    options = {"lr": 0.03, **options}
    optimizer = cls(params, **options, fused=True)
    plain = cls(expected, **options, foreach=True, fused=False)
    for step in range(steps):
        for ps, each in ((params, optimizer), (expected, plain)):
            give_gradients(ps, step)
            each.step()
        exact = options.get("dither_position") != "post" and getattr(plain, "phase", "sign") == "sign"
        if exact:
            assert sum(differing(p, q.detach()) for p, q in zip(params, expected, strict=True)) <= 1
        for p, q in zip(params, expected, strict=True):
            if not exact:
                close(p, q, 1e-2 if p.dtype.itemsize == 2 else 1e-5, 1e-5)
            state, wanted = optimizer.state.get(p, {}), plain.state.get(q, {})
            assert state.keys() == wanted.keys()
            for name in state:
                if name == "mean_square" or (not exact and options.get("decoupled_weight_decay") is False):
                    close(state[name].float(), wanted[name].float(), 1e-2 if p.dtype.itemsize == 2 else 1e-5, 1e-6)
                else:
                    assert differing(state[name], wanted[name]) == 0


@pytest.mark.parametrize(("dtype", "dither", "other"), every_combination(DTYPES, DITHERS, OTHERS))
def test_every_option(dtype: torch.dtype, dither: str, other: str) -> None:
    check_equal(SignSGD, DITHERS[dither] | OTHERS[other], lambda device: parameters(FEW, dtype, device), steps=2)


@pytest.mark.parametrize(
    ("dtype", "dither", "state_dtype"), every_combination(DTYPES, ["clean", "pre", "relative"], STATE_DTYPES[1:])
)
def test_every_state_dtype(dtype: torch.dtype, dither: str, state_dtype: torch.dtype) -> None:
    options = DITHERS[dither] | {"state_dtype": state_dtype}
    check_equal(SignSGD, options, lambda device: parameters(RAGGED, dtype, device), steps=2)


@pytest.mark.parametrize(
    ("dither", "calibration", "options"),
    every_combination(
        ["clean", "pre", "relative"],
        ["paper", "ratio", "applied"],
        [{}, {"sgd_momentum": 0.9}, {"sgd_momentum": 0.9, "state_dtype": torch.int8}],
    ),
)
def test_hybrid_in_both_phases(dither: str, calibration: str, options: dict[str, Any]) -> None:
    options = {"switch_step": 2, "calibration": calibration} | DITHERS[dither] | options
    check_equal(HybridSignSGD, options, lambda device: parameters(FEW, torch.float32, device), steps=4)


SIZES = st.sampled_from([0, 1, 2, 13, 16, 255, 256, 257, 1009, 1023, 1024, 1025, 2049])


@settings(max_examples=12)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    dither=st.sampled_from(list(DITHERS)),
    other=st.sampled_from(list(OTHERS)),
    dtype=st.sampled_from(DTYPES),
    state_dtype=st.sampled_from(STATE_DTYPES),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_combination(
    sizes: list[int], dither: str, other: str, dtype: torch.dtype, state_dtype: torch.dtype | None, seed: int
) -> None:
    options = DITHERS[dither] | OTHERS[other] | {"state_dtype": state_dtype, "seed": seed}
    check_equal(SignSGD, options, lambda device: parameters([(n,) for n in sizes], dtype, device), steps=2)


@pytest.mark.parametrize("options", [*DITHERS.values(), {"state_dtype": torch.int8}, {"state_dtype": torch.bfloat16}])
def test_strided_tensors(options: dict[str, Any]) -> None:
    assert not any(p.is_contiguous() for p in strided(torch.float32, DEVICE))
    check_equal(SignSGD, options, functools.partial(strided, torch.float32))


def test_complex_parameters() -> None:
    for options in ({}, DITHERS["pre"], {"state_dtype": torch.int8}):
        check_equal(SignSGD, options, lambda device: parameters([(300,), (7,)], torch.complex64, device))


def test_different_dtypes_in_one_group() -> None:
    def make(device: torch.device) -> list[torch.nn.Parameter]:
        return [parameters([(300,)], dtype, device)[0] for dtype in (*DTYPES, torch.float32, torch.bfloat16)]

    for options in DITHERS.values():
        check_equal(SignSGD, options, make)


# ---------------------------------------------------------------------------------------------------------------------
# One call of the engine
# ---------------------------------------------------------------------------------------------------------------------


def directions(m: Tensor, *, offset: int = 0, ordinal: int = 0, plain: bool = False, **changes: Any) -> Tensor:
    """What a step without momentum moves along: the parameter starts at 0 and the rate is 1."""
    device = torch.device("cpu") if plain else DEVICE
    p = torch.zeros_like(m, device=device)
    tensors = Tensors([p], [m.to(device)], [], [], [], [ordinal], [offset])
    (multi_tensor_step if plain else engine.step)(tensors, request(**changes))
    return -p.cpu()


def momenta(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


def test_decisions_are_the_references() -> None:
    """At all |m| / sigma from 1e-4 to 6, no more than one in 10^6 may differ."""
    size = 1 << (24 if ON_GPU else 18)
    generator = torch.Generator().manual_seed(2)
    sign = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    m = torch.logspace(-4, math.log10(6), size) * sign
    assert differing(directions(m), directions(m, plain=True)) <= max(1, size // 10**6)


OFFSETS = [8, 13, 16 * (2**31 - 1) - 5, 16 * 2**31 - 16, 4 * 2**31 - 3, 16 * (2**32 - 1), 2**36 - 7, 2**40 + 3]


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_shard_draws_what_the_whole_draws(position: str, offset: int) -> None:
    """Also where the block's number leaves 31 and 32 bits, reached by its offset and not by allocation."""
    m, dither = momenta(4000), Dither(position, torch.tensor(0.7))
    whole = directions(m, offset=offset, dither=dither)
    expected = directions(m, offset=offset, dither=dither, plain=True)
    close(whole, expected, 0 if position == "pre" else 1e-6, 0 if position == "pre" else 1e-6)
    for cut in (8, 250, 2048):
        parts = [
            directions(part, offset=offset + first, dither=dither) for first, part in ((0, m[:cut]), (cut, m[cut:]))
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("offset", [0, 3, 2**36 - 7])
def test_stochastic_rounding_of_a_shard_is_the_references(offset: int, state_dtype: torch.dtype) -> None:
    results = []
    for step, device in ((engine.step, DEVICE), (multi_tensor_step, torch.device("cpu"))):
        p, m = torch.zeros(3001, device=device), momenta(3001).to(device)
        state = momentum.new_momentum(p, state_dtype)
        scales = [state["exp_avg_scale"]] if state_dtype == torch.int8 else []
        for k in range(3):
            tensors = Tensors([p], [m], [state["exp_avg"]], scales, [], [4], [offset])
            step(tensors, request(dither=None, momentum=0.9, state_dtype=state_dtype, step=torch.tensor(k)))
        results.append([p.cpu(), *(x.cpu() for x in state.values())])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("sigma", [0.0, 0.5, math.inf, math.nan])
@pytest.mark.parametrize("position", [None, "pre", "post"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_or_zero(dtype: torch.dtype, position: str | None, sigma: float) -> None:
    values = [0.0, -0.0, 1e-45, -1e-45, 1e-7, -1e-7, 1.0, -1.0, 3e38, math.inf, -math.inf, math.nan]
    m = torch.tensor(values * 100, dtype=torch.float64).to(dtype)
    dither = None if position is None else Dither(position, torch.tensor(sigma))
    close(
        directions(m, dither=dither),
        directions(m, dither=dither, plain=True),
        1e-2 if m.dtype.itemsize == 2 else 1e-6,
        1e-6 if position == "post" else 0,
    )


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_momentum_that_is_not_finite(state_dtype: torch.dtype | None) -> None:
    grad = momenta(1200)
    grad[300], grad[301], grad[900] = math.nan, math.inf, -math.inf
    results = []
    for step, device in ((engine.step, DEVICE), (multi_tensor_step, torch.device("cpu"))):
        p = torch.zeros(1200, device=device)
        state = momentum.new_momentum(p, state_dtype)
        tensors = Tensors([p], [grad.to(device)], [state["exp_avg"]], list(state.values())[1:], [], [0], [0])
        for _ in range(2):
            step(tensors, request(dither=None, momentum=0.9, state_dtype=state_dtype))
        results.append([p, *state.values()])
    for actual, expected in zip(*results, strict=True):
        assert differing(actual, expected) == 0


@pytest.mark.parametrize("seed", [0, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("step", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5])
def test_wide_seeds_and_steps(step: int, seed: int) -> None:
    m = momenta(100)
    numbers = {"step": torch.tensor(step), "seed": seed, "ordinal": 3}
    assert torch.equal(directions(m, **numbers), directions(m, plain=True, **numbers))


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_and_mean_squares(dtype: torch.dtype, applied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several programs per tensor, and several rounds of the kernel that adds them up; twice the same bits."""
    monkeypatch.setattr(engine, "_REDUCE", 2)
    sizes = [11000, 3, 0, 2048, 5000]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for step, device in ((engine.step, DEVICE), (engine.step, DEVICE), (multi_tensor_step, torch.device("cpu"))):
        make = functools.partial(torch.randn, generator=torch.Generator().manual_seed(8))
        ps, gs, ms = ([make(n).add(0.3).to(dtype).to(device) for n in sizes] for _ in range(3))
        squares = [torch.tensor(0.5 + i, device=device) for i in range(len(sizes))]
        total = torch.ones(2, dtype=sums, device=device)
        step(
            Tensors(ps, gs, ms, [], squares, list(range(5)), [0] * 5),
            request(sums=total, projected=Projected.EXPECTED_SIGN if applied else Projected.SIGN, momentum=0.5),
        )
        results.append([total, *squares])
    for first, second, expected in zip(*results, strict=True):
        assert torch.equal(first, second)
        close(first, expected, 1e-5, 0)


def on_device(options: Options) -> Options:
    moved = {n: x.to(DEVICE) for n, x in options._asdict().items() if isinstance(x, Tensor)}
    return options._replace(**moved)


@pytest.mark.parametrize("position", [None, "pre", "post"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_that_are_on_the_device(
    dtype: torch.dtype, position: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As capturable=True and a Tensor lr have them: the same as the host's."""
    results = []
    for there in (False, True):
        if there:
            monkeypatch.setattr("signstep.kernels.triton_noise.on_host", lambda x: not isinstance(x, Tensor))
        p, m, g = (momenta(3000).to(dtype).to(DEVICE) for _ in range(3))
        dither = None if position is None else Dither(position, torch.tensor(0.3))
        options = request(
            step=torch.tensor(2**32 + 7),
            rate=torch.tensor(0.013),
            decay=torch.tensor(0.97),
            dither=dither,
            momentum=0.9,
        )
        engine.step(Tensors([p], [g], [m], [], [], [1], [16]), on_device(options) if there else options)
        results.append((p, m))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signstep.kernels.triton_noise.on_host", lambda x: not isinstance(x, Tensor))
    options = {"capturable": True, "lr": torch.tensor(0.03), "weight_decay": 0.1, **DITHERS["pre"]}

    def make(device: torch.device) -> list[torch.nn.Parameter]:
        return parameters(RAGGED, torch.float32, device)

    check_equal(SignSGD, options, make)
    check_equal(HybridSignSGD, options, make)


def test_gradients_and_foreign_memory_are_not_touched() -> None:
    """Views into one buffer at odd addresses, gaps of a known value between them; a gradient that is expanded."""
    buffer = torch.full((9000,), 7.0, device=DEVICE)
    views = [buffer[3:4003], buffer[4100:4101], buffer[5001:8000]]
    grads = [torch.randn(4000), torch.randn(1), torch.randn(()).expand(2999)]
    grads = [g.to(DEVICE) for g in grads[:2]] + [grads[2].to(DEVICE).expand(2999)]
    kept = [g.clone() for g in grads]
    expected = [v.cpu() for v in views]
    engine.step(Tensors(views, grads, [], [], [], [0, 1, 2], [0, 0, 0]), request())
    multi_tensor_step(Tensors(expected, [g.cpu() for g in kept], [], [], [], [0, 1, 2], [0, 0, 0]), request())
    assert all(torch.equal(g, k) for g, k in zip(grads, kept, strict=True))
    assert all(torch.equal(v.cpu(), e) for v, e in zip(views, expected, strict=True))
    inside = torch.zeros(9000, dtype=torch.bool, device=DEVICE)
    inside[3:4003] = inside[4100] = inside[5001:8000] = True
    assert (buffer[~inside] == 7).all()


def test_state_of_another_model_is_refused() -> None:
    """Plain torch would raise a shape error; the kernel would read what is not its own."""
    p, g = torch.zeros(300, device=DEVICE), torch.ones(300, device=DEVICE)
    others = [(99, torch.float32, DEVICE), (300, torch.float64, DEVICE), (300, torch.float32, torch.device("meta"))]
    for size, dtype, device in others:
        m = torch.zeros(size, dtype=dtype, device=device)
        with pytest.raises(RuntimeError, match=r"the momentum of a parameter of shape \(300,\) on .* expected"):
            engine.step(Tensors([p], [g], [m], [], [], [0], [0]), request(momentum=0.9))
    eight, options = torch.zeros(300, dtype=torch.int8, device=DEVICE), request(momentum=0.9, state_dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"8-bit momentum of 300 elements has 1 scales, .* expected 2"):
        engine.step(Tensors([p], [g], [eight], [torch.zeros(1, device=DEVICE)], [], [0], [0]), options)
    with pytest.raises(RuntimeError, match=r"expected torch\.int8"):
        engine.step(Tensors([p], [g], [eight], [], [], [0], [0]), options)
    assert not p.any()


def test_gradients_of_another_dtype_or_negated() -> None:
    m = momenta(50).to(DEVICE)
    p = torch.zeros(50, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"the gradient of a parameter, .*: fused kernels need it alike"):
        engine.step(Tensors([p], [m.double()], [], [], [], [0], [0]), request(dither=None))
    engine.step(Tensors([p], [torch.complex(m, m).conj().imag], [], [], [], [0], [0]), request(dither=None))
    assert torch.equal(p, m.sign())


def test_autograd_sees_that_the_parameter_changed() -> None:
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (p * p).sum()
    p.grad = torch.ones(3, device=DEVICE)
    SignSGD([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_to_do() -> None:
    engine.step(Tensors([], [], [], [], [], [], []), request())
    check_equal(SignSGD, DITHERS["relative"], lambda device: parameters([(0,), (3, 0)], torch.float32, device))


def test_a_missing_or_old_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (p,) = parameters([(4,)], torch.float32, DEVICE)
    fused._missing.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.10.1")
    assert engine.unavailable() is None
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    with pytest.raises(RuntimeError, match=r"Triton 3\.1\.0 is too old: pip install 'triton>=3\.2'"):
        SignSGD([p], fused=True)
    monkeypatch.setattr("signstep.kernels.triton_noise.triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed: pip install triton"):
        engine.step(Tensors([], [], [], [], [], [], []), request())


def test_the_engine_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from signstep.kernels import triton; "
        "assert 'not installed' in triton.unavailable()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of the kernel
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "seed", "step", "ordinal"])
def draw_kernel(u, byte, first, seed: tl.uint64, step, ordinal, ROWS: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    local = tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    start = tl.load(first)
    key = seed.to(tl.uint64)
    k = step.to(tl.uint32)
    p = ordinal.to(tl.uint32)
    tl.store(u + local, uniform(start, local, key, k, p, ROWS, ALIGNED).to(tl.int64))
    tl.store(byte + local, (noise_bytes(start, local, 2, key, k, p, ROWS, ALIGNED) >> 24).to(tl.int64))


@triton.jit
def function_kernel(normal_at, erf_at, u, x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    tl.store(normal_at + i, normal(tl.load(u + i).to(tl.uint32)))
    tl.store(erf_at + i, erf(tl.load(x + i)))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("first", [0, 16, 2**35 - 512, 2**36 - 256, 2**40, 5, 2**36 - 3])
@pytest.mark.parametrize("key", [(0, 0, 0), (2**64 - 1, 2**31 + 1, 5), (2**32, 7, 2**20)])
def test_noise_is_the_references_word_for_word(key: tuple[int, int, int], first: int, aligned: bool) -> None:
    if aligned and first % 16:
        pytest.skip("no such case")
    seed, step, ordinal = key
    u, byte = (torch.empty(1024, dtype=torch.int64, device=DEVICE) for _ in range(2))
    draw_kernel[(1,)](
        u, byte, torch.tensor(first, device=DEVICE), seed=seed, step=step, ordinal=ordinal, ROWS=4, ALIGNED=aligned
    )
    at: dict[str, Any] = {"seed": seed, "step": torch.tensor(step), "device": torch.device("cpu")}
    segments = [Segment(ordinal, first, 1024)]
    top, low = reference.noise_bytes(segments, 0, **at)[0], reference.low_bits(segments, **at)[0]
    assert torch.equal(u.cpu(), top << 24 | low)
    assert torch.equal(byte.cpu(), reference.noise_bytes(segments, 2, **at)[0])


def test_functions_are_as_exact_as_they_say() -> None:
    size = 1 << 18
    tails = torch.arange(5000)
    spread = torch.logspace(0, 32, size - 20000, base=2, dtype=torch.float64).long().clamp(max=2**32 - 1)
    u = torch.cat([tails, 2**32 - 1 - tails, 2**31 - 5000 + torch.arange(10000), spread])
    x = torch.cat([torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]), torch.linspace(-7, 7, size - 5)])
    normal, erf = (torch.empty(size, device=DEVICE) for _ in range(2))
    function_kernel[(1,)](normal, erf, u.to(DEVICE), x.to(DEVICE), SIZE=size)
    close(normal.double(), torch.special.ndtri((u.double() + 0.5) * 2.0**-32), 6e-7, 0)
    close(erf.double(), torch.erf(x.double()), 0, 2e-7)
    assert erf[2:4].tolist() == [1.0, -1.0]
    assert (erf.cpu().abs()[x.abs() > 6] == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# What the compilers make of it, which needs no GPU
# ---------------------------------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"DIRECTION": "sign"},
    {"PARAM": "bfloat16", "COUPLED": True, "MAXIMIZE": True},
    {"RELATIVE": True, "SUMS": True, "EXPECTED": True, "on_device": True},
    {"PARAM": "float64", "DIRECTION": "post", "RELATIVE": True},
    {"PARAM": "float16", "STATE": "int8", "KEPT": "int8", "ALIGNED": False, "VECTORS": False},
    {"STATE": "bfloat16", "KEPT": "bfloat16", "DIRECTION": "m", "SMALL": False},
]
NUMBERS = {"seed": "u64", "step": "u32"} | dict.fromkeys(["rate", "decay", "coupled_decay", "weight", "sigma"], "i64")


def compiled_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: Any, warps: int) -> Any:
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: types[name] for name in kernel.signature.parameters}, constants, {})
    return triton.compile(source, target, {"num_warps": warps, "enable_fp_fusion": False})


def compile_kind(kind: dict[str, Any], target: Any) -> None:
    options: dict[str, Any] = {
        "PARAM": "float32",
        "KEPT": "nearest",
        "DIRECTION": "pre",
        "ALIGNED": True,
        "SMALL": True,
    }
    options |= dict.fromkeys(["RELATIVE", "MAXIMIZE", "COUPLED", "SUMS", "EXPECTED"], False) | {"VECTORS": True} | kind
    on_device = options.pop("on_device", False)
    wide = "float64" if options["PARAM"] == "float64" else "float32"
    options = {"STATE": options["PARAM"], "WIDE": wide} | options
    constants = {n: getattr(tl, x) if n in ("PARAM", "STATE", "WIDE") else x for n, x in options.items()}
    constants |= {"ROWS": engine.ROWS, "COLUMNS": engine._COLUMNS}
    types = {"table": "*i64", "chunks": "*i64", "partials": "*fp32", **NUMBERS}
    addresses = ["step_at", "rate_at", "decay_at", "sigma_at"]
    if on_device:
        types |= dict.fromkeys(addresses, "*fp32")
    else:
        constants |= dict.fromkeys(addresses)
    made = compiled_kernel(engine._step_kernel, types, constants, target, engine._WARPS)
    if target.backend == "cuda":
        code = made.asm["ptx"]
        assert ("ld.global.v4.b32" in code or "ld.global.v2.b64" in code) == constants["VECTORS"], kind
        assert ".local" not in code, kind


def compile_all() -> None:
    """Every kind for CUDA, some for ROCm; run without the interpreter, by the test below."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    for target, kinds in ((GPUTarget("cuda", 90, 32), KINDS), (GPUTarget("hip", "gfx942", 64), KINDS[2:5])):
        for kind in kinds:
            compile_kind(kind, target)
        constants = {"SUMS": True, "RELATIVE": True, "ROWS": engine.ROWS, "COLUMNS": engine._COLUMNS, "WIDTH": 4096}
        types = {"table": "*i64", "partials": "*fp32", "totals": "*fp64"}
        compiled_kernel(engine._reduce_kernel, types, constants, target, 8)
    kernel, keys = engine._step_kernel, set()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = triton.runtime.jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    for seed, step, number in ((0, 0, 0.0), (1, 1, 1.0), (16, 16, 0.1), (2**64 - 1, 2**32 - 1, 1e300)):
        numbers = dict.fromkeys(NUMBERS, engine._bits(number)) | {"seed": seed, "step": step}
        keys.add(str(bind(**dict.fromkeys(kernel.signature.parameters) | numbers)[1]))
    assert len(keys) == 1, f"compiled anew when a number changes: {keys}"


@pytest.mark.slow
def test_kernels_compile_and_only_once(tmp_path: Path) -> None:
    """For CUDA and ROCm: vector loads, no spills to memory, and no number of the host's in the key of the cache."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import test_triton; test_triton.compile_all()"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------

COMPILED: list[tuple[type[SignSGD], dict[str, Any]]] = [
    (SignSGD, {}),
    (SignSGD, {"seed": 2**64 - 1, "state_dtype": torch.int8, **DITHERS["relative"]}),
    (SignSGD, {"momentum": 0, "weight_decay": 0.1, **DITHERS["post"]}),
    (HybridSignSGD, {"calibration": "applied", **DITHERS["pre"]}),
]


def compiled_equals_eager(
    cls: type[SignSGD], options: dict[str, Any], backend: str, device: torch.device = DEVICE
) -> None:
    """The whole step in one graph: but for the break that torch puts into every optimizer's wrapper."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        params = parameters([(30, 7), (5,), ()], torch.float32, device)
        optimizer = cls(params, lr=torch.tensor(0.01), fused=True, **options)
        whole = torch.compile(inspect.unwrap(cls.step), backend=backend, fullgraph=True)
        for step in range(5):
            give_gradients(params, step)
            if compiled:
                with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=step > 1):
                    whole(optimizer)
            else:
                optimizer.step()
            optimizer.param_groups[0]["lr"].mul_(0.9)
        results.append([*params, *(x for state in optimizer.state.values() for x in state.values())])
        assert optimizer.param_groups[0]["step"] == 5
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(("cls", "options"), COMPILED)
def test_compiled_equals_eager(cls: type[SignSGD], options: dict[str, Any]) -> None:
    compiled_equals_eager(cls, options, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options"), [COMPILED[1], COMPILED[3]])
def test_compiled_by_inductor_equals_eager(cls: type[SignSGD], options: dict[str, Any]) -> None:
    compiled_equals_eager(cls, options, "inductor")


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize(("cls", "options"), COMPILED)
def test_native_step_compiled_equals_eager(
    cls: type[SignSGD], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_engine", lambda device_type: native)
    compiled_equals_eager(cls, options, "aot_eager", torch.device("cpu"))


def test_compiled_step_of_complex_parameters() -> None:
    def step(p: Tensor, g: Tensor, m: Tensor) -> None:
        fused.step(Tensors([p], [g], [m], [], [], [0], [0]), request(momentum=0.5))

    whole = [torch.randn(300, dtype=torch.complex64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    whole = [x.to(DEVICE) for x in whole]
    p, g, m = values = [x.clone() for x in whole]
    fused.step(Tensors([p], [g], [m], [], [], [0], [0]), request(momentum=0.5))
    torch._dynamo.reset()
    torch.compile(step, backend="aot_eager", fullgraph=True)(*whole)
    assert all(torch.equal(x, y) for x, y in zip(whole, values, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU
# ---------------------------------------------------------------------------------------------------------------------

DEVICE_OPTIONS: list[tuple[type[SignSGD], dict[str, Any]]] = [
    (SignSGD, {}),
    (SignSGD, DITHERS["pre"]),
    (SignSGD, {"state_dtype": torch.int8, **DITHERS["relative"]}),
    (HybridSignSGD, {"calibration": "applied", **DITHERS["relative"]}),
]


def gpu_training(cls: type[SignSGD], options: dict[str, Any]) -> tuple[list[torch.nn.Parameter], SignSGD]:
    """Parameters with gradients of a fixed address, after three steps, which make the state and warm up."""
    params = parameters(RAGGED, torch.float32, DEVICE)
    lr = torch.tensor(0.01, device=DEVICE)
    optimizer = cls(params, lr=lr, fused=True, capturable=True, **options)
    for step in range(3):
        refill(params, step)
        optimizer.step()
    return params, optimizer


def refill(params: list[torch.nn.Parameter], step: int) -> None:
    kept = [p.grad for p in params]
    give_gradients(params, step)
    for p, grad in zip(params, kept, strict=True):
        if grad is not None and p.grad is not None:
            p.grad = grad.copy_(p.grad)


@needs_gpu
@pytest.mark.parametrize(("cls", "options"), DEVICE_OPTIONS)
def test_graph_replay_equals_eager(cls: type[SignSGD], options: dict[str, Any]) -> None:
    eager, optimizer = gpu_training(cls, options)
    params, captured = gpu_training(cls, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    engine._cached_tables.cache_clear()
    for step in range(3, 9):
        for ps in (eager, params):
            refill(ps, step)
        optimizer.param_groups[0]["lr"].fill_(0.01 / step)
        captured.param_groups[0]["lr"].fill_(0.01 / step)
        optimizer.step()
        graph.replay()
        assert all(torch.equal(p, q) for p, q in zip(params, eager, strict=True))
    states = [copy.deepcopy(o.state_dict()) for o in (optimizer, captured)]
    torch.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)
    assert states[0]["param_groups"][0]["step"] == states[1]["param_groups"][0]["step"] == 9


@needs_gpu
@pytest.mark.parametrize(("cls", "options"), DEVICE_OPTIONS)
def test_the_host_never_waits(cls: type[SignSGD], options: dict[str, Any]) -> None:
    optimizer = gpu_training(cls, options)[1]
    engine._cached_tables.cache_clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_kernels_are_compiled_once() -> None:
    params = parameters(RAGGED, torch.float32, DEVICE)
    optimizer = SignSGD(params, fused=True, **DITHERS["relative"])
    counts = []
    for step in range(20):
        give_gradients(params, step)
        optimizer.param_groups[0]["lr"] = [0.0, 1.0, 0.1, 1e-3][step % 4]
        optimizer.step()
        counts.append(sum(len(cache[0]) for cache in engine._step_kernel.device_caches.values()))
    assert counts[0] == counts[-1]


@needs_gpu
def test_a_step_on_another_stream_and_device() -> None:
    expected = parameters([(10000,)], torch.float32, torch.device("cpu"))
    plain = SignSGD(expected, fused=False, **DITHERS["pre"])
    params = parameters([(10000,)], torch.float32, torch.device("cuda", torch.cuda.device_count() - 1))
    optimizer = SignSGD(params, fused=True, **DITHERS["pre"])
    for step in range(4):
        give_gradients(params, step)
        give_gradients(expected, step)
        torch.cuda.synchronize(params[0].device)
        with torch.cuda.stream(torch.cuda.Stream(params[0].device) if step % 2 else None):
            optimizer.step()
        torch.cuda.synchronize(params[0].device)
        plain.step()
    assert differing(params[0], expected[0].detach()) <= 1

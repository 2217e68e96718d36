"""The native engine alone: instruction sets, threads, the missing library, sanitizers, and momentum in fewer bits."""

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import RAGGED, Dither, differing, directions, give_gradients, parameters, request
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from pairwise import every_combination
from signstep import SignSGD, kernels
from signstep.kernels import fused as engines
from signstep.kernels import momentum, native, reference
from signstep.kernels.engine import Tensors
from signstep.kernels.plain import multi_tensor_step
from signstep.kernels.reference import Segment
from signstep.optim.signsgd import signsgd

ROOT = Path(__file__).parents[2]
if shutil.which("c++") is not None:
    assert native.unavailable() is None, "there is a compiler, so the library must have been built"
pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


# --- One call of the engine -------------------------------------------------------------------------------------------


native_directions = functools.partial(directions, engine_step=native.step)
ISAS = list(native.ISAS)[1 : 1 + native.ISAS[native.best_isa()]] if native.unavailable() is None else []


def test_the_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for isa in ISAS:
            monkeypatch.setenv("SIGNSTEP_ISA", isa)
            native.best_isa.cache_clear()
            assert native.best_isa() == isa
            assert native._request("best", False).isa == native.ISAS[isa]
        for wrong in ("neon", "best"):
            monkeypatch.setenv("SIGNSTEP_ISA", wrong)
            native.best_isa.cache_clear()
            with pytest.raises(RuntimeError, match=f"SIGNSTEP_ISA={wrong}: this machine has {', '.join(ISAS)};"):
                native.unavailable()
    finally:
        native.best_isa.cache_clear()


@pytest.mark.parametrize(
    ("isa", "z", "law"),
    every_combination(ISAS, [0.0, 1e-30, 0.001, 0.3, 1.0, 2.5, 3.9, 4.0, 4.1, 6.0, 40.0], ["gaussian", "uniform"]),
)
def test_decisions_are_the_references(isa: str, z: float, law: str) -> None:
    """A million decisions around each m / sigma, none different: the approximation never decides what it cannot."""
    generator = torch.Generator().manual_seed(2)
    m = (
        z
        * (1 + 0.1 * torch.randn(1_000_003, generator=generator))
        * torch.where(torch.rand(1_000_003, generator=generator) < 0.5, -1, 1)
    )
    dither = Dither("pre", torch.tensor(1.0), law)
    assert torch.equal(native_directions(m, dither=dither, isa=isa), directions(m, dither=dither))


@pytest.mark.parametrize("isa", ISAS)
def test_approximation_is_within_its_slack(isa: str) -> None:
    """Every 16-bit z against every byte that can tie with it, with the whole grid in float steps around."""
    z = torch.arange(-40000, 40001, dtype=torch.float32) / 8192
    for ordinal in range(12):
        assert torch.equal(native_directions(z, ordinal=ordinal, isa=isa), directions(z, ordinal=ordinal))


@pytest.mark.parametrize("isa", ISAS)
def test_decisions_of_uniform_noise_at_the_boundaries_of_bytes(isa: str) -> None:
    """Where a byte begins, and in single steps of float32 beside it."""
    edges = torch.arange(-128, 129, dtype=torch.float32) / 128
    steps = torch.arange(-8, 9, dtype=torch.int32)
    m = (edges.view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
    for sigma in (torch.tensor(1 / math.sqrt(3)), torch.tensor(0.3)):
        dither = Dither("pre", sigma, "uniform")
        scaled = m * reference.spread(sigma, "uniform")
        for ordinal in range(12):
            decided = native_directions(scaled, dither=dither, ordinal=ordinal, isa=isa)
            assert differing(decided, directions(scaled, dither=dither, ordinal=ordinal)) == 0


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_the_expected_sign_is_exact_to_a_float32_and_alike_in_all_instruction_sets(law: str) -> None:
    """From 1e-12 to 100 sigma, also relative to itself where it is small; the line of uniform noise to the bit."""
    m = torch.logspace(-12, 2, 1 << 16) * torch.tensor([1.0, -1.0]).repeat(1 << 15)
    dither = Dither("expected", torch.tensor(0.7), law)
    z = m.double() / 0.7
    exact = (z / math.sqrt(3)).clamp(-1, 1) if law == "uniform" else torch.special.erf(z * math.sqrt(0.5))
    expected = directions(m, dither=dither)
    torch.testing.assert_close(expected.double(), exact, rtol=3e-7, atol=0)
    first, *others = (native_directions(m, dither=dither, isa=isa) for isa in ISAS)
    torch.testing.assert_close(first.double(), exact, rtol=1e-6, atol=0)
    assert all(torch.equal(first, other) for other in others)
    assert law == "gaussian" or torch.equal(first, expected)


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_post_noise_is_the_references(law: str) -> None:
    m = torch.ones(1_000_000)
    dither = Dither("post", torch.tensor(1.0), law)
    noise = native_directions(m, dither=dither) - 1
    expected = directions(m, dither=dither) - 1
    torch.testing.assert_close(noise, expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize(
    ("sigma", "position", "law"),
    every_combination([0.0, 0.5, math.inf, math.nan], [None, "pre", "post", "expected"], ["gaussian", "uniform"]),
)
def test_numbers_that_are_not_finite_or_zero(sigma: float, position: str | None, law: str) -> None:
    m = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, math.inf, -math.inf, math.nan] * 30)
    dither = None if position is None else Dither(position, torch.tensor(sigma), law)
    for isa in ISAS:
        torch.testing.assert_close(
            native_directions(m, dither=dither, isa=isa),
            directions(m, dither=dither),
            equal_nan=True,
            rtol=1e-6,
            atol=0,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_survives(dtype: torch.dtype) -> None:
    """All patterns but infinity as gradient, kept as momentum with beta = 0 in effect: what is read is written."""
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    grad = grad[~grad.isinf()]  # 0 * infinity is NaN
    for isa in ISAS:
        p, exp_avg = torch.zeros_like(grad), torch.zeros_like(grad)
        options = request(dither=None, momentum=2.0**-60)
        native.step(Tensors([p], [grad], [exp_avg], [], [], [0], [0]), options, isa=isa)
        torch.testing.assert_close(exp_avg, grad, rtol=0, atol=0, equal_nan=True)


@given(st.lists(st.floats(width=32), min_size=1, max_size=70))
def test_rounding_to_half_precision_is_torchs(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        p, grad = x.to(dtype), torch.zeros(len(x), dtype=dtype)
        expected = (p.float() * 1.1).to(dtype)
        native.step(
            Tensors([p], [grad], [], [], [], [0], [0]), request(dither=None, decay=1.1, stochastic_params=False)
        )
        torch.testing.assert_close(p, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("own_threads", [False, True])
def test_results_do_not_depend_on_threads(own_threads: bool) -> None:
    before = torch.get_num_threads()
    m = torch.randn(500_001, generator=torch.Generator().manual_seed(4))
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            p, exp_avg, mean_square, sums = (
                torch.zeros_like(m),
                torch.zeros_like(m),
                torch.tensor(0.3),
                torch.zeros(1, 2),
            )
            tensors = Tensors([p], [m], [exp_avg], [], [mean_square], [0], [0])
            native.step(tensors, request(momentum=0.9, sums=sums), own_threads=own_threads)
            results.append((p, exp_avg, mean_square, sums))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


def test_torch_works_on_after_the_engine_used_its_threads() -> None:
    """The pool is torch's own: no second one that spins beside it, and none left in a strange state."""
    params = parameters([(300_000,)], torch.float32)
    optimizer = SignSGD(params, fused=True, dither=0.1)
    before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    for step in range(20):
        give_gradients(params, step)
        optimizer.step()
        assert float(params[0].detach().square().sum()) > 0
    if sys.platform == "linux" and native._parallel() is not None:
        assert len(os.listdir("/proc/self/task")) <= before + max(0, torch.get_num_threads() - 1)


def test_a_gradient_of_a_wider_dtype_takes_plain_torch() -> None:
    results = []
    for fused in (None, False):
        p = torch.zeros(3, dtype=torch.bfloat16)
        exp_avg = torch.zeros(3)
        grad = torch.tensor([1e-3, -1.0, 1e-42])
        options = request(dither=None, momentum=0.5, state_dtype=torch.float32)
        tensors = Tensors([p], [grad], [exp_avg], [], [], [0], [0])
        signsgd(tensors, options, foreach=None if fused is None else False, fused=fused, differentiable=False)
        results.append((p, exp_avg))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_autograd_is_followed_where_it_is_on() -> None:
    """Outside no_grad the default is plain torch, which autograd sees."""
    p = torch.ones(3, requires_grad=True)
    q = p * 2
    tensors = Tensors([q], [torch.ones(3)], [], [], [], [0], [0])
    options = request(dither=None, rate=0.1, decay=1 - 0.1 * 0.5)
    signsgd(tensors, options, foreach=None, fused=None, differentiable=False)
    (slope,) = torch.autograd.grad(q.sum(), p)
    assert torch.allclose(slope, torch.full((3,), 2 * (1 - 0.1 * 0.5)))


@pytest.mark.parametrize("position", ["pre", "post"])
def test_double_momentum_is_decided_as_float(position: str) -> None:
    m = torch.tensor([1e-60, -1e-60, 1e60, -1e60, 1e-300, 0.5, -0.5, 0.0] * 40, dtype=torch.float64)
    dither = Dither(position, torch.tensor(0.3))
    for isa in ISAS:
        expected = directions(m, dither=dither)
        torch.testing.assert_close(
            native_directions(m, dither=dither, isa=isa), expected, equal_nan=True, rtol=1e-6, atol=0
        )


def test_state_dtype_that_changes_is_refused_by_every_implementation() -> None:
    for fused in (None, False):
        params = parameters([(300,), (7,)], torch.float32)
        optimizer = SignSGD(params, fused=fused)
        params[0].grad = torch.ones(300)
        optimizer.step()
        params[1].grad = torch.ones(7)
        optimizer.param_groups[0]["state_dtype"] = torch.int8
        with pytest.raises(RuntimeError, match="set state_dtype, and the model's dtype, before the first step"):
            optimizer.step()


def test_tensor_subclasses_take_plain_torch() -> None:
    class Odd(torch.Tensor):
        pass

    p = torch.zeros(4).as_subclass(Odd)
    p.grad = torch.ones(4)
    SignSGD([p], lr=1.0).step()
    assert (p == -1).all()
    with pytest.raises(RuntimeError, match="no fused kernels for tensors of type Odd"):
        SignSGD([p], fused=True)


def test_a_library_that_cannot_be_loaded_is_said_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params = parameters([(4,)], torch.float32)
    (whole,) = (p for folder in kernels.__path__ for p in Path(folder).glob("libsignstep.*"))
    path = tmp_path / whole.name
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])

    def reason() -> str:
        native._load.cache_clear()
        with pytest.raises(RuntimeError, match="Invalid fused: True") as error:
            SignSGD(params, fused=True)
        return str(error.value)

    try:
        assert "signstep's native library was not built: install a C++17 compiler" in reason()
        path.write_bytes(b"not a library")
        assert f"signstep's native library {path} cannot be loaded (" in reason()
        path.write_bytes(whole.read_bytes()[:-4096])
        assert f"signstep's native library {path} cannot be loaded (the file is cut short): install" in reason()
        give_gradients(params, 0)
        engines._SERVED.clear()
        engines._warn_once.cache_clear()
        with pytest.warns(UserWarning, match=f"{path} .*cut short.*: install .* until then the step is plain torch"):
            SignSGD(params, fused=None).step()
        with warnings.catch_warnings(action="error"):  # once, and not to those who asked for plain torch
            SignSGD(params, fused=None).step()
            engines._warn_once.cache_clear()
            SignSGD(params, fused=False).step()
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
        engines._SERVED.clear()
    SignSGD(params, fused=True)


# --- Momentum in fewer bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8])
def test_stochastic_rounding_is_unbiased_and_within_one_unit(state_dtype: torch.dtype) -> None:
    """Mean of 4,096 roundings of one m: within 5 standard errors and the 2^-9 units that a byte cannot resolve.

    256 of them are beside each other in each of 16 steps.
    """
    m = torch.randn(512, generator=torch.Generator().manual_seed(5))
    total = torch.zeros(512, dtype=torch.float64)
    copies, steps = 256, 16
    unit = (m.abs().view(2, 256).amax(dim=1) / 127).repeat_interleave(256)
    if state_dtype == torch.bfloat16:
        unit = torch.exp2(m.abs().log2().floor() - 7)
    tiled = m.repeat(copies)
    for step in range(steps):
        state = momentum.new_momentum(tiled, state_dtype)
        exp_avg, scale = state["exp_avg"], state.get("exp_avg_scale")
        tensors = Tensors([tiled], [tiled], [exp_avg], [] if scale is None else [scale], [], [0], [0])
        options = request(dither=None, state_dtype=state_dtype, seed=1, step=torch.tensor(step))
        momentum.enter_momentum(tensors, 0, options)
        kept = momentum.read_momentum(exp_avg, scale).float().view(copies, 512)
        assert ((kept - m).abs() <= unit * 1.001).all()
        total += kept.double().sum(0)
    rounds = copies * steps
    error = (total / rounds - m.double()).abs()
    assert (error <= unit.double() * (5 * 0.5 / math.sqrt(rounds) + 2**-9)).all()


def test_zero_stays_zero_in_eight_bits_and_small_blocks_vanish() -> None:
    grad = torch.zeros(512)
    grad[:256] = torch.linspace(-1, 1, 256)
    grad[10] = 0
    grad[256:] = 1e-38
    for engine in (native.step, multi_tensor_step):
        p = torch.zeros(512)
        state = momentum.new_momentum(p, torch.int8)
        tensors = Tensors([p], [grad], [state["exp_avg"]], [state["exp_avg_scale"]], [], [0], [0])
        for step in range(20):
            options = request(dither=None, momentum=0.9, state_dtype=torch.int8, step=torch.tensor(step))
            engine(tensors, options)  # type: ignore[operator]
        assert state["exp_avg"][10] == 0
        assert p[10] == 0
        assert not state["exp_avg"][256:].any()


def test_eight_bits_show_a_momentum_that_is_not_finite() -> None:
    for bad in (math.nan, math.inf):
        grad = torch.ones(600)
        grad[300] = bad
        p = torch.nn.Parameter(torch.zeros(600))
        optimizer = SignSGD([p], state_dtype=torch.int8, fused=True)
        for _ in range(2):
            p.grad = grad.clone()
            optimizer.step()
        assert p[256:512].isnan().all()
        assert p[:256].isfinite().all()
        assert p[512:].isfinite().all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"momentum": 0.0}, 0.0),
        ({}, 4.0),
        ({"state_dtype": torch.bfloat16}, 2.0),
        ({"state_dtype": torch.int8}, 1.0 + 4 / 256),
    ],
)
def test_bytes_of_state_per_parameter(options: dict[str, Any], expected: float) -> None:
    params = parameters([(256, 1000)], torch.float32)
    give_gradients(params, 0)
    optimizer = SignSGD(params, **options)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    assert sum(t.untyped_storage().nbytes() for t in tensors) / 256_000 == expected


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "stochastic_params"),
    [
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.int8, False),
        (torch.bfloat16, None, False),
        (torch.bfloat16, None, True),
    ],
)
@pytest.mark.parametrize(
    "changes", [{}, {"decay": 0.99}, {"momentum": 0.6}, {"momentum": 0.4}, {"interpolation": 0.95, "rate": -0.3}]
)
@pytest.mark.parametrize("finite", [True, False])
def test_clean_steps_in_fewer_bits_are_alike_in_all_instruction_sets(
    dtype: torch.dtype, state_dtype: torch.dtype | None, stochastic_params: bool, changes: dict[str, Any], finite: bool
) -> None:
    """Of ragged sizes, with zeros, subnormals and, in some blocks, the largest numbers, infinities and NaNs."""
    generator = torch.Generator().manual_seed(8)
    special = torch.tensor(
        [0.0, -0.0, 1e-45, -1e-39, *([] if finite else [3e38, -3e38, math.inf, -math.inf, math.nan])]
    )

    def numbers(size: int) -> torch.Tensor:
        x = torch.randn(size, generator=generator)
        chosen = torch.rand(size, generator=generator) < 1e-3
        x[chosen] = special[torch.randint(len(special), (int(chosen.sum()),), generator=generator)]
        return x.to(dtype)

    options = request(
        dither=None, state_dtype=state_dtype, stochastic_params=stochastic_params, **{"momentum": 0.9, **changes}
    )
    for size in (1, 31, 255, 256, 257, 70_001):
        p, gradients = numbers(size), [numbers(size) for _ in range(3)]

        def stepped(
            step: Callable[..., None], p: torch.Tensor = p, gradients: Sequence[torch.Tensor] = gradients
        ) -> tuple[torch.Tensor, ...]:
            moved, exp_avg = p.clone(), torch.zeros(len(p), dtype=state_dtype or dtype)
            scale = torch.zeros(-(-len(p) // 256))
            for g in gradients:
                scales = [scale] if state_dtype is torch.int8 else []
                step(Tensors([moved], [g], [exp_avg], scales, [], [2], [13]), options)
            return moved, exp_avg, scale

        expected = stepped(multi_tensor_step)
        for isa in ISAS:
            for x, y in zip(stepped(functools.partial(native.step, isa=isa)), expected, strict=True):
                assert differing(x, y) == 0


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.int8])
def test_state_in_fewer_bits_is_saved_and_loaded_as_it_is(state_dtype: torch.dtype, tmp_path: Path) -> None:
    """Loading would cast it to the parameter's dtype if torch had its way."""
    options = {"state_dtype": state_dtype, "dither": 1.0, "dither_scale": "relative", "lr": 0.01}
    params = parameters(RAGGED["native"], torch.float32)
    optimizer = SignSGD(params, **options)
    for step in range(6):
        give_gradients(params, step)
        optimizer.step()
        if step == 2:
            torch.save(
                ({k: p.detach().clone() for k, p in enumerate(params)}, optimizer.state_dict()), tmp_path / "x.pt"
            )
    values, state = torch.load(tmp_path / "x.pt", weights_only=True)
    resumed = [torch.nn.Parameter(values[k]) for k in range(len(params))]
    other = SignSGD(resumed)
    other.load_state_dict(state)
    assert {v.dtype for v in other.state[resumed[0]].values()} == {v.dtype for v in optimizer.state[params[0]].values()}
    for step in range(3, 6):
        give_gradients(resumed, step)
        other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, resumed, strict=True))


def test_relative_dither_that_comes_late_starts_from_the_momentum_that_is_there() -> None:
    (p,) = parameters([(1000,)], torch.float32)
    optimizer = SignSGD([p])
    for step in range(3):
        give_gradients([p], step)
        optimizer.step()
    m = optimizer.state[p]["exp_avg"].clone()
    optimizer.param_groups[0].update(dither=1.0, dither_scale="relative", dither_decay=0.0)
    give_gradients([p], 3)
    before = p.detach().clone()
    optimizer.step()
    expected = reference.directions(
        [optimizer.state[p]["exp_avg"]],
        [m.square().mean().sqrt()],
        [Segment(0, 0, 1000)],
        seed=0,
        step=torch.tensor(3),
        position="pre",
    )[0]
    assert torch.equal((before - p.detach()).sign(), expected)


@pytest.mark.parametrize(
    ("count", "size", "woken"), [(1000, 64, []), (3, 65536, [3]), (9, 65536, [4]), (65, 1024, [2])]
)
def test_threads_are_woken_for_as_much_as_a_chunk_each(
    count: int, size: int, woken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(function: Callable[[int], None], data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        function(data)

    monkeypatch.setattr(native, "_parallel", lambda: ctypes.cast(parallel, ctypes.c_void_p).value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    p = Parameter(torch.zeros(count, size))
    rows = [Parameter(row) for row in p.detach()]
    for row in rows:
        row.grad = torch.ones(size)
    SignSGD(rows, lr=1e-2, momentum=0.0, fused=True).step()
    assert (p == -0.01).all()
    assert asked == woken


# --- The library by itself --------------------------------------------------------------------------------------------


def run_driver(build: Path, *arguments: str, emulator: Sequence[str] = (), **settings: str) -> str:
    """Build the library and tests/kernels/native/driver.cpp with CMake's settings, and run the driver.

    Returns: the last line that it prints, the fingerprint of all bytes.
    """
    definitions = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *definitions], check=True, capture_output=True)
    make = ["cmake", "--build", str(build), "--target", "driver", "--parallel", "2"]
    subprocess.run(make, check=True, capture_output=True)
    ran = subprocess.run([*emulator, str(build / "driver"), *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-5000:]
    assert "equal" in ran.stdout
    return ran.stdout.splitlines()[-1]


needs_cmake = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs CMake and a compiler"
)


@pytest.mark.slow
@needs_cmake
def test_sanitizers_find_nothing_in_the_best_instruction_set(tmp_path: Path) -> None:
    """Every 29th case, without optimization: to compile takes longer than the cases do."""
    settings = {"SIGNSTEP_SANITIZE": "address,undefined", "CMAKE_CXX_FLAGS_RELEASE": "-O0"}
    run_driver(tmp_path, "4", "29", SIGNSTEP_ONLY=native.best_isa(), **settings)


@pytest.mark.long
@needs_cmake
@pytest.mark.parametrize(("sanitizer", "dtypes"), [("address", "4"), ("thread", "1"), ("undefined", "4")])
def test_sanitizers_find_nothing(sanitizer: str, dtypes: str, tmp_path: Path) -> None:
    """The driver also compares instruction sets and numbers of threads, byte by byte."""
    run_driver(tmp_path, dtypes, SIGNSTEP_SANITIZE=sanitizer)


@pytest.mark.long
@needs_cmake
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs a compiler for aarch64 and an emulator: Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_gives_the_same_bytes(tmp_path: Path) -> None:
    cross = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
    }
    emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
    neon = run_driver(tmp_path / "neon", "4", "29", emulator=emulator, **cross)
    assert neon.startswith("fingerprint")
    assert neon == run_driver(tmp_path / "here", "4", "29")

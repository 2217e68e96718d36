"""The Triton engine alone: its pieces, what the compilers make of it, torch.compile, and what only a GPU shows."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import (
    DEVICE,
    DITHERS,
    RAGGED,
    Dither,
    Engine,
    check_equal,
    close,
    differing,
    directions,
    five_steps,
    give_gradients,
    momenta,
    parameters,
    request,
)
from torch import Tensor
from triton_cases import ON_GPU, compiled_kernel, engine, tl, triton, triton_steps_cpu_tensors

from signstep import HybridSignSGD, SignSGD
from signstep.kernels import fused, native, reference, triton_bits
from signstep.kernels.engine import Options, Tensors
from signstep.kernels.reference import Segment
from signstep.kernels.triton_noise import erf, noise_bits, normal, uniform
from signstep.kernels.triton_tables import cached_tables

ENGINE = Engine("triton", engine, DEVICE)


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with triton_steps_cpu_tensors():
        yield


needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


# --- One call of the engine -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_decisions_are_the_references() -> None:
    """At all |m| / sigma from 1e-4 to 6, no more than one in 10^6 may differ."""
    size = 1 << (24 if ON_GPU else 18)
    generator = torch.Generator().manual_seed(2)
    sign = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    m = torch.logspace(-4, math.log10(6), size) * sign
    assert differing(directions(m, engine.step, device=DEVICE), directions(m)) <= max(1, size // 10**6)


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
        return parameters(RAGGED["triton"], torch.float32, device)

    check_equal(ENGINE, SignSGD, options, make)
    check_equal(ENGINE, HybridSignSGD, options, make)


def test_a_missing_or_old_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (p,) = parameters([(4,)], torch.float32, DEVICE)
    monkeypatch.setattr(triton, "__version__", "3.10.1")
    assert engine.unavailable() is None
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    with pytest.raises(RuntimeError, match=r"Triton 3\.1\.0 is too old: pip install 'triton>=3\.2'"):
        SignSGD([p], fused=True)
    monkeypatch.setattr("signstep.kernels.triton_noise.triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed: pip install triton"):
        engine.step(Tensors([], [], [], [], [], [], []), request())


@pytest.mark.slow
def test_the_engine_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from signstep.kernels import triton; "
        "assert 'not installed' in triton.unavailable()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Pieces of the kernel ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["first", "seed", "step", "ordinal"])
def draw_kernel(u, byte, half, first, seed: tl.uint64, step, ordinal, ROWS: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    local = tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    start = tl.load(first)
    key = seed.to(tl.uint64)
    k = step.to(tl.uint32)
    p = ordinal.to(tl.uint32)
    tl.store(u + local, uniform(start, local, key, k, p, ROWS, ALIGNED).to(tl.int64))
    tl.store(byte + local, (noise_bits(start, local, 2, key, k, p, 8, ROWS, ALIGNED) >> 24).to(tl.int64))
    tl.store(half + local, (noise_bits(start, local, 5, key, k, p, 16, ROWS, ALIGNED) >> 16).to(tl.int64))


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
    u, byte, half = (torch.empty(1024, dtype=torch.int64, device=DEVICE) for _ in range(3))
    draw_kernel[(1,)](
        u,
        byte,
        half,
        torch.tensor(first, device=DEVICE),
        seed=seed,
        step=step,
        ordinal=ordinal,
        ROWS=4,
        ALIGNED=aligned,
    )
    at: dict[str, Any] = {"seed": seed, "step": torch.tensor(step), "device": torch.device("cpu")}
    segments = [Segment(ordinal, first, 1024)]
    top, low = reference.noise_bytes(segments, 0, **at)[0], reference.low_bits(segments, **at)[0]
    assert torch.equal(u.cpu(), top << 24 | low)
    assert torch.equal(byte.cpu(), reference.noise_bytes(segments, 2, **at)[0])
    assert torch.equal(half.cpu(), reference.noise_halves(segments, 5, **at)[0])


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


# --- What the compilers make of it, which needs no GPU ----------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"DIRECTION": "sign"},
    {"PARAM": "bfloat16", "COUPLED": True, "MAXIMIZE": True},
    {"PARAM": "bfloat16", "DIRECTION": "sign", "STOCHASTIC": True},
    {"RELATIVE": True, "MEASURED": "expected_sign", "RATES": True, "on_device": True},
    {"PARAM": "float64", "DIRECTION": "post", "RELATIVE": True},
    {"PARAM": "float16", "STATE": "int8", "KEPT": "int8", "ALIGNED": False, "VECTORS": False},
    {"STATE": "bfloat16", "KEPT": "bfloat16", "DIRECTION": "m", "SMALL": False},
    {"UNIFORM": True, "MEASURED": "expected_sign"},
    {"UNIFORM": True, "DIRECTION": "post"},
    {"PARAM": "bfloat16", "DIRECTION": "expected"},
    {"DIRECTION": "sign", "INTERPOLATE": "small"},
    {"DIRECTION": "m", "MEASURED": "momentum"},
]
NUMBERS = {"seed": "u64", "step": "u32"} | dict.fromkeys(
    ["rate", "decay", "coupled_decay", "weight", "direction_weight", "sigma"], "i64"
)


def compile_kind(kind: dict[str, Any], target: Any) -> None:
    options: dict[str, Any] = {
        "PARAM": "float32",
        "KEPT": "nearest",
        "DIRECTION": "pre",
        "ALIGNED": True,
        "SMALL": True,
    }
    options |= (
        dict.fromkeys(["RELATIVE", "MAXIMIZE", "COUPLED", "RATES", "STOCHASTIC", "UNIFORM"], False)
        | {"VECTORS": True, "MEASURED": "none", "INTERPOLATE": "no"}
        | kind
    )
    on_device = options.pop("on_device", False)
    wide = "float64" if options["PARAM"] == "float64" else "float32"
    options = {"STATE": options["PARAM"], "WIDE": wide} | options
    constants = {n: getattr(tl, x) if n in ("PARAM", "STATE", "WIDE") else x for n, x in options.items()}
    constants |= {"ROWS": engine.ROWS, "COLUMNS": engine.COLUMNS}
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


def compile_ballots(target: Any) -> None:
    numbers = dict.fromkeys(["rows", "stride", "voters", "size", "start"], "i64")
    types = {"words": "*i64", "ballots": "*i64", "majority": "*i64", "seed": "u64", "step": "u32", "ordinal": "u32"}
    cases: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (triton_bits._pack_kernel, {"direction": "*fp32"}, {"step_at": None, "WIDE": tl.float32}),
        (triton_bits._pack_kernel, {"direction": "*bf16", "step_at": "*i64"}, {"WIDE": tl.float32}),
        (triton_bits._pack_kernel, {"direction": "*fp64"}, {"step_at": None, "WIDE": tl.float64}),
        (triton_bits._count_kernel, {}, {"step_at": None, "ties": None}),
        (triton_bits._count_kernel, {"ties": "*i64"}, {"step_at": None}),
        (triton_bits._spread_kernel, {"out": "*fp32", "ties": "*i64"}, {"OUT": tl.float32}),
        (triton_bits._spread_kernel, {"out": "*bf16"}, {"OUT": tl.bfloat16, "ties": None}),
        (triton_bits._spread_kernel, {"out": "*fp64"}, {"OUT": tl.float64, "ties": None}),
    ]
    for kernel, own, constants in cases:
        made = compiled_kernel(kernel, numbers | types | own, constants | {"N": triton_bits.WORDS}, target, 4)
        assert target.backend != "cuda" or ".local" not in made.asm["ptx"]


def compile_all(every: int) -> None:
    """Each so many-th kind for CUDA, fewer for ROCm; run without the interpreter, by the test below."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    some = KINDS[::every]
    for target, kinds in ((GPUTarget("cuda", 90, 32), some), (GPUTarget("hip", "gfx942", 64), some[1:4:every])):
        for kind in kinds:
            compile_kind(kind, target)
        compile_ballots(target)
        constants = {
            "MEASURED": "sign",
            "RELATIVE": True,
            "ROWS": engine.ROWS,
            "COLUMNS": engine.COLUMNS,
            "WIDTH": 4096,
        }
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
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
def test_kernels_compile_and_only_once(every: int, tmp_path: Path) -> None:
    """For CUDA and ROCm: vector loads, no spills to memory, and no number of the host's in the key of the cache."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = f"import test_triton; test_triton.compile_all({every})"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


# --- torch.compile ----------------------------------------------------------------------------------------------------

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
        params = parameters([(30, 7), (5,), ()], torch.float32, device) + parameters([(40,)], torch.bfloat16, device)
        optimizer = cls(params, lr=torch.tensor(0.01), fused=True, **options)
        results.append(five_steps(optimizer, params, backend if compiled else None))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def long_but(*short: int) -> list[Any]:
    """The cases, of which all others than these are only in `make test-long`; the native step has them all."""
    return [pytest.param(*case, marks=() if i in short else pytest.mark.long) for i, case in enumerate(COMPILED)]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options"), long_but(1, 3))
def test_compiled_equals_eager(cls: type[SignSGD], options: dict[str, Any]) -> None:
    compiled_equals_eager(cls, options, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options"), long_but(3))
def test_compiled_by_inductor_equals_eager(cls: type[SignSGD], options: dict[str, Any]) -> None:
    compiled_equals_eager(cls, options, "inductor")


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize(("cls", "options"), COMPILED)
def test_native_step_compiled_equals_eager(
    cls: type[SignSGD], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fused._ENGINES, "cpu", native.__name__)
    compiled_equals_eager(cls, options, "aot_eager", torch.device("cpu"))


def test_compiled_step_of_complex_parameters() -> None:
    def step(p: Tensor, g: Tensor, m: Tensor) -> None:
        fused.step(Tensors([p], [g], [m], [], [], [0], [0]), request(momentum=0.5), demanded=True)

    whole = [torch.randn(300, dtype=torch.complex64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    whole = [x.to(DEVICE) for x in whole]
    p, g, m = values = [x.clone() for x in whole]
    fused.step(Tensors([p], [g], [m], [], [], [0], [0]), request(momentum=0.5), demanded=True)
    torch._dynamo.reset()
    torch.compile(step, backend="aot_eager", fullgraph=True)(*whole)
    assert all(torch.equal(x, y) for x, y in zip(whole, values, strict=True))


# --- On a GPU ---------------------------------------------------------------------------------------------------------

DEVICE_OPTIONS: list[tuple[type[SignSGD], dict[str, Any]]] = [
    (SignSGD, {}),
    (SignSGD, DITHERS["pre"]),
    (SignSGD, {"state_dtype": torch.int8, **DITHERS["relative"]}),
    (HybridSignSGD, {"calibration": "applied", **DITHERS["relative"]}),
]


def gpu_training(cls: type[SignSGD], options: dict[str, Any]) -> tuple[list[torch.nn.Parameter], SignSGD]:
    """Parameters with gradients of a fixed address, after three steps, which make the state and warm up."""
    params = parameters(RAGGED["triton"], torch.float32, DEVICE)
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
    cached_tables.cache_clear()
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
    cached_tables.cache_clear()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_kernels_are_compiled_once() -> None:
    params = parameters(RAGGED["triton"], torch.float32, DEVICE)
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

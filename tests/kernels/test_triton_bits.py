"""The Triton kernels of ballots against plain torch on the CPU: on a GPU, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton")

from engine_cases import DTYPES, Dither, request  # noqa: E402
from triton_cases import DEVICE, compiled_kernel  # noqa: E402

from signstep.kernels import bits, native  # noqa: E402
from signstep.kernels import triton_bits as engine  # noqa: E402
from signstep.kernels.bits import word_count  # noqa: E402
from signstep.kernels.engine import (  # noqa: E402
    Slot,
    Tensors,
)
from signstep.kernels.reference import Segment  # noqa: E402

pytestmark = pytest.mark.skipif(engine.unavailable() is not None, reason=str(engine.unavailable()))

SIZES = st.lists(
    st.sampled_from([0, 1, 63, 64, 65, 500, 64 * engine.WORDS, 64 * engine.WORDS + 1]), min_size=1, max_size=3
)
STARTS = [0, 64, 100, 127, 128 * 2**31 - 3, 2**40 + 1]


def slots_of(sizes: list[int], start: int) -> tuple[list[Slot], int]:
    slots, first = [], 1
    for i, size in enumerate(sizes):
        slots.append(Slot(first, Segment(i + 2, start + 7 * i, size)))
        first += word_count(size) + 1
    return slots, first


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tensors go the way of a GPU's."""
    monkeypatch.setattr(bits, "_triton", lambda x: engine)
    monkeypatch.setattr(native, "_load", lambda: (None, "not wanted here"))


@settings(max_examples=15)
@given(
    sizes=SIZES,
    start=st.sampled_from(STARTS),
    dtype=st.sampled_from(DTYPES),
    zeros=st.sampled_from([0.0, 0.01, 1.0]),
    sigma=st.sampled_from([None, 0.5]),
    seed=st.sampled_from([0, 2**32 - 1, 2**64 - 1]),
)
def test_cast(sizes: list[int], start: int, dtype: torch.dtype, zeros: float, sigma: float | None, seed: int) -> None:
    slots, width = slots_of(sizes, start)
    options = request(dither=sigma and Dither("pre", torch.tensor(sigma)), seed=seed, step=torch.tensor(2**32 + 7))
    generator = torch.Generator().manual_seed(1)
    grads = []
    for size in sizes:
        g = torch.randn(size, generator=generator, dtype=torch.float64)
        g[torch.rand(size, generator=generator) < zeros] = 0
        if size > 3:
            g[1], g[2], g[3] = torch.inf, -torch.inf, torch.nan
        grads.append(g.to(dtype))
    results = []
    for cast, device in ((bits.cast, DEVICE), (bits.reference_cast, torch.device("cpu"))):
        words = torch.full((width,), 77, device=device)
        there = [g.to(device) for g in grads]
        numbers = [s.segment.parameter for s in slots], [s.segment.start for s in slots]
        cast(Tensors(there, there, [], [], [], *numbers), options, words, slots)
        results.append(words.cpu())
    assert torch.equal(*results)


@settings(max_examples=15)
@given(
    workers=st.sampled_from([1, 2, 3, 4, 9]),
    sizes=SIZES,
    start=st.sampled_from(STARTS),
    absent=st.integers(0, 9),
    mark=st.booleans(),
    seed=st.sampled_from([0, 2**63 + 1]),
)
def test_count(workers: int, sizes: list[int], start: int, absent: int, mark: bool, seed: int) -> None:
    slots, width = slots_of(sizes, start)
    voters = [max(0, workers - absent % (i + 2)) for i in range(len(sizes))]
    ballots = torch.randint(-(2**63), 2**63 - 1, (workers, width + 2), generator=torch.Generator().manual_seed(workers))
    results: list[list[Tensor]] = []
    for count, device in ((bits.count, DEVICE), (bits.reference_count, torch.device("cpu"))):
        ties = torch.full((width,), -1, device=device) if mark else None
        rows = ballots.to(device)[:, :width]
        counted = count(rows, voters, slots, seed=seed, step=torch.tensor(5), ties=ties)
        results.append([x.cpu() for x in (counted, ties) if x is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=15)
@given(sizes=SIZES, dtype=st.sampled_from(DTYPES), tied=st.booleans(), wanted=st.booleans())
def test_spread(sizes: list[int], dtype: torch.dtype, tied: bool, wanted: bool) -> None:
    slots, width = slots_of(sizes, 0)
    generator = torch.Generator().manual_seed(1)
    words, marks = torch.randint(-(2**63), 2**63 - 1, (2, width), generator=generator)
    before = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    results: list[list[Tensor]] = []
    for spread, device in ((bits.spread, DEVICE), (bits.reference_spread, torch.device("cpu"))):
        outs = [b.clone().to(device) for b in before]
        sums = torch.full((len(sizes), 2), 7.0, dtype=torch.float64, device=device) if wanted else None
        spread(words.to(device), marks.to(device) if tied else None, slots, outs, sums)
        results.append([x.cpu() for x in (*outs, sums) if x is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12 if a.dtype == torch.float64 else 0, atol=0)


def compile_all() -> None:
    """For CUDA and ROCm; run without the interpreter, by the test below."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    numbers = dict.fromkeys(["rows", "stride", "voters", "size", "start"], "i64")
    types = {"words": "*i64", "ballots": "*i64", "majority": "*i64", "seed": "u64", "step": "u32", "ordinal": "u32"}
    cases: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (engine._pack_kernel, {"direction": "*fp32"}, {"step_at": None, "WIDE": tl.float32}),
        (engine._pack_kernel, {"direction": "*bf16", "step_at": "*i64"}, {"WIDE": tl.float32}),
        (engine._pack_kernel, {"direction": "*fp64"}, {"step_at": None, "WIDE": tl.float64}),
        (engine._count_kernel, {}, {"step_at": None, "ties": None}),
        (engine._count_kernel, {"ties": "*i64"}, {"step_at": None}),
        (engine._spread_kernel, {"out": "*fp32", "ties": "*i64"}, {"OUT": tl.float32}),
        (engine._spread_kernel, {"out": "*bf16"}, {"OUT": tl.bfloat16, "ties": None}),
        (engine._spread_kernel, {"out": "*fp64"}, {"OUT": tl.float64, "ties": None}),
    ]
    for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        for kernel, own, constants in cases:
            made = compiled_kernel(kernel, numbers | types | own, constants | {"N": engine.WORDS}, target, 4)
            assert target.backend != "cuda" or ".local" not in made.asm["ptx"]


@pytest.mark.slow
def test_kernels_compile(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    code = "import test_triton_bits; test_triton_bits.compile_all()"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]

"""Optimizers stepped by the native and the Triton engine make the decisions of plain torch, whatever their options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import (
    CPU,
    DITHERS,
    DTYPES,
    OTHERS,
    STATE_DTYPES,
    Engine,
    close,
    differing,
    give_gradients,
    parameters,
    strided,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pairwise import every_combination
from signstep import HybridSignSGD, SignSGD

Make = Callable[[torch.device], list[torch.nn.Parameter]]
RAGGED = {
    "native": [(1000, 37), (5,), (), (0, 3), (257,), (255,), (1,), (70001,)],
    "triton": [(41, 51), (5,), (), (0, 3), (257,)],
}
FEW = RAGGED | {"triton": [(9, 29), (), (0, 3)]}


def check_equal(engine: Engine, cls: type[SignSGD], options: dict[str, Any], make: Make, steps: int = 3) -> None:
    """Momentum bit for bit; parameters too, but for one decision, or the rounding of post-sign noise and lambda."""
    params, expected = make(engine.device), make(CPU)
    options = {"lr": 0.03, **options}
    optimizer, plain = cls(params, **options, fused=True), cls(expected, **options, foreach=True, fused=False)
    # On CPUs both work with the same functions, so that only a relative sigma has a rounding of its own.
    allowed = 0 if engine.name == "native" and options.get("dither_scale") != "relative" else 1
    for step in range(steps):
        for ps, each in ((params, optimizer), (expected, plain)):
            give_gradients(ps, step)
            each.step()
        exact = options.get("dither_position") != "post" and getattr(plain, "phase", "sign") == "sign"
        if exact:
            assert sum(differing(p, q) for p, q in zip(params, expected, strict=True)) <= allowed
        for p, q in zip(params, expected, strict=True):
            wide = 1e-2 if p.dtype.itemsize == 2 else 1e-5
            if not exact:
                close(p, q, wide, 1e-6 if engine.name == "native" else 1e-5)
            state, wanted = optimizer.state.get(p, {}), plain.state.get(q, {})
            assert state.keys() == wanted.keys()
            for name in state:
                if name == "mean_square" and engine.name == "native":
                    close(state[name], wanted[name], 1e-5, 1e-12)
                elif name == "mean_square" or (not exact and options.get("decoupled_weight_decay") is False):
                    close(state[name].float(), wanted[name].float(), wide, 1e-6)
                else:
                    assert differing(state[name], wanted[name]) == 0


@pytest.mark.parametrize(("dtype", "dither", "other"), every_combination(DTYPES, DITHERS, OTHERS))
def test_every_option(engine: Engine, dtype: torch.dtype, dither: str, other: str) -> None:
    make: Make = functools.partial(parameters, FEW[engine.name], dtype)
    check_equal(engine, SignSGD, DITHERS[dither] | OTHERS[other], make, steps=4 if engine.name == "native" else 2)


@pytest.mark.parametrize(
    ("dtype", "dither", "state_dtype"), every_combination(DTYPES, ["clean", "pre", "relative"], STATE_DTYPES[1:])
)
def test_every_state_dtype(engine: Engine, dtype: torch.dtype, dither: str, state_dtype: torch.dtype) -> None:
    options = DITHERS[dither] | {"state_dtype": state_dtype}
    make: Make = functools.partial(parameters, RAGGED[engine.name], dtype)
    check_equal(engine, SignSGD, options, make, steps=4 if engine.name == "native" else 2)


@pytest.mark.parametrize(
    ("dither", "calibration", "options"),
    every_combination(
        ["clean", "pre", "relative"],
        ["paper", "ratio", "applied"],
        [
            {},
            {"sgd_momentum": 0.9},
            {"sgd_momentum": 0.9, "state_dtype": torch.int8},
            {"weight_decay": 0.1},
        ],
    ),
)
def test_hybrid_in_both_phases(engine: Engine, dither: str, calibration: str, options: dict[str, Any]) -> None:
    switch = 3 if engine.name == "native" else 2
    options = {"switch_step": switch, "calibration": calibration} | DITHERS[dither] | options
    make: Make = functools.partial(parameters, FEW[engine.name], torch.float32)
    check_equal(engine, HybridSignSGD, options, make, steps=2 * switch)


@pytest.mark.parametrize("calibration", ["paper", "applied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_calibration_sums(engine: Engine, dtype: torch.dtype, calibration: str) -> None:
    rates = []
    for fused, device in ((True, engine.device), (False, CPU)):
        params = parameters(RAGGED[engine.name], dtype, device)
        optimizer = HybridSignSGD(params, lr=0.01, calibration=calibration, dither=0.01, fused=fused)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        rates.append(optimizer.calibrated_lr)
    assert rates[0] == pytest.approx(rates[1], rel=1e-5)


SIZES = {
    "native": [0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1021, 4099, 65537],
    "triton": [0, 1, 2, 13, 16, 255, 256, 257, 1009, 1023, 1024, 1025, 2049],
}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    dither=st.sampled_from(list(DITHERS)),
    other=st.sampled_from(list(OTHERS)),
    dtype=st.sampled_from(DTYPES),
    state_dtype=st.sampled_from(STATE_DTYPES),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_combination(
    engine: Engine,
    data: st.DataObject,
    dither: str,
    other: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    seed: int,
) -> None:
    sizes = data.draw(st.lists(st.sampled_from(SIZES[engine.name]), min_size=1, max_size=4))
    options = DITHERS[dither] | OTHERS[other] | {"state_dtype": state_dtype, "seed": seed}
    check_equal(engine, SignSGD, options, functools.partial(parameters, [(n,) for n in sizes], dtype), steps=2)


@pytest.mark.parametrize(
    ("options", "dtype"),
    every_combination(
        [*DITHERS.values(), {"state_dtype": torch.int8}, {"state_dtype": torch.bfloat16}],
        [torch.float32, torch.bfloat16],
    ),
)
def test_strided_tensors(engine: Engine, options: dict[str, Any], dtype: torch.dtype) -> None:
    assert not any(p.is_contiguous() for p in strided(dtype, engine.device))
    check_equal(engine, SignSGD, options, functools.partial(strided, dtype))


@pytest.mark.parametrize("options", [{}, DITHERS["pre"], {"state_dtype": torch.int8}])
def test_complex_parameters(engine: Engine, options: dict[str, Any]) -> None:
    check_equal(engine, SignSGD, options, functools.partial(parameters, [(300,), (7,)], torch.complex64))


@pytest.mark.parametrize("options", DITHERS.values(), ids=DITHERS)
def test_different_dtypes_in_one_group(engine: Engine, options: dict[str, Any]) -> None:
    def make(device: torch.device) -> list[torch.nn.Parameter]:
        return [parameters([(300,)], dtype, device)[0] for dtype in (*DTYPES, torch.float32, torch.bfloat16)]

    check_equal(engine, SignSGD, options, make, steps=2)


def test_parameters_without_elements(engine: Engine) -> None:
    make: Make = functools.partial(parameters, [(0,), (3, 0)], torch.float32)
    check_equal(engine, SignSGD, DITHERS["relative"], make)


def test_autograd_sees_that_the_parameter_changed(engine: Engine) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=engine.device))
    loss = (p * p).sum()
    p.grad = torch.ones(3, device=engine.device)
    SignSGD([p], fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

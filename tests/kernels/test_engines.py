"""Optimizers stepped by the native and the Triton engine make the decisions of plain torch, whatever their options."""

import functools
from typing import Any

import pytest
import torch
from engine_cases import (
    CPU,
    DITHERS,
    DTYPES,
    ENGINES,
    FEW,
    OTHERS,
    RAGGED,
    STATE_DTYPES,
    Engine,
    Make,
    check_equal,
    give_gradients,
    parameters,
    strided,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pairwise import every_combination, pairwise
from signstep import HybridSignSGD, Lion, SignSGD
from signstep.optim.calibration import RULES


@pytest.mark.parametrize(
    ("engine", "dtype", "dither", "other"), every_combination(ENGINES, DTYPES, DITHERS, OTHERS), indirect=["engine"]
)
def test_every_option(engine: Engine, dtype: torch.dtype, dither: str, other: str) -> None:
    make: Make = functools.partial(parameters, FEW[engine.name], dtype)
    check_equal(engine, SignSGD, DITHERS[dither] | OTHERS[other], make, steps=4 if engine.name == "native" else 2)


@pytest.mark.parametrize(
    ("engine", "dtype", "dither", "state_dtype"),
    every_combination(ENGINES, DTYPES, ["clean", "pre", "relative"], STATE_DTYPES[1:]),
    indirect=["engine"],
)
def test_every_state_dtype(engine: Engine, dtype: torch.dtype, dither: str, state_dtype: torch.dtype) -> None:
    options = DITHERS[dither] | {"state_dtype": state_dtype}
    make: Make = functools.partial(parameters, RAGGED[engine.name], dtype)
    check_equal(engine, SignSGD, options, make, steps=4 if engine.name == "native" else 2)


@pytest.mark.parametrize(
    ("engine", "dither", "calibration", "options"),
    every_combination(
        ENGINES,
        ["clean", "pre", "relative"],
        [*RULES],
        [
            {},
            {"sgd_momentum": 0.9},
            {"calibration_scope": "tensor"},
            {"sgd_momentum": 0.9, "state_dtype": torch.int8},
            {"weight_decay": 0.1},
        ],
    ),
    indirect=["engine"],
)
def test_hybrid_in_both_phases(engine: Engine, dither: str, calibration: str, options: dict[str, Any]) -> None:
    switch = 3 if engine.name == "native" else 2
    options = {"switch_step": switch, "calibration": calibration} | DITHERS[dither] | options
    make: Make = functools.partial(parameters, FEW[engine.name], torch.float32)
    check_equal(engine, HybridSignSGD, options, make, steps=2 * switch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "dtype", "calibration"),
    every_combination(ENGINES, DTYPES, ["paper", "applied", "norm"]),
    indirect=["engine"],
)
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


BETAS = [(0.9, 0.99), (0.99, 0.9), (0.2, 0.3), (0.0, 0.0)]


@pytest.mark.parametrize(
    ("engine", "dtype", "dither", "other", "state_dtype", "betas"),
    pairwise(
        ENGINES,
        DTYPES,
        ["clean", "pre", "relative", "uniform", "expected", "post"],
        ["plain", "coupled decay, maximize", "to the nearest"],
        STATE_DTYPES,
        BETAS,
    ),
    indirect=["engine"],
)
def test_lion(
    engine: Engine,
    dtype: torch.dtype,
    dither: str,
    other: str,
    state_dtype: torch.dtype | None,
    betas: tuple[float, float],
) -> None:
    options = DITHERS[dither] | OTHERS[other] | {"state_dtype": state_dtype, "betas": betas}
    options.pop("momentum", None)
    make: Make = functools.partial(parameters, FEW[engine.name], dtype)
    check_equal(engine, Lion, options, make, steps=4 if engine.name == "native" else 2)


@pytest.mark.parametrize(
    ("engine", "dither", "state_dtype"),
    every_combination(ENGINES, ["clean", "pre", "relative"], STATE_DTYPES),
    indirect=["engine"],
)
def test_lion_with_equal_betas_is_signsgd(engine: Engine, dither: str, state_dtype: torch.dtype | None) -> None:
    """In float32, where what is kept is what decides, or decides before it is rounded at random."""
    runs = []
    for cls, averages in ((Lion, {"betas": (0.9, 0.9)}), (SignSGD, {"momentum": 0.9})):
        params = parameters(FEW[engine.name], torch.float32, engine.device)
        options = DITHERS[dither] | {"state_dtype": state_dtype}
        optimizer = cls(params, lr=0.03, fused=True, **averages, **options)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        runs.append([*params, *(x for state in optimizer.state.values() for x in state.values())])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    dither=st.sampled_from(list(DITHERS)),
    other=st.sampled_from(list(OTHERS)),
    dtype=st.sampled_from(DTYPES),
    state_dtype=st.sampled_from(STATE_DTYPES),
    betas=st.none() | st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_combination(
    engine: Engine,
    data: st.DataObject,
    dither: str,
    other: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    betas: tuple[float, float] | None,
    seed: int,
) -> None:
    sizes = data.draw(st.lists(st.sampled_from(SIZES[engine.name]), min_size=1, max_size=5))
    options = DITHERS[dither] | OTHERS[other] | {"state_dtype": state_dtype, "seed": seed}
    cls = SignSGD
    if betas is not None:
        cls, options = Lion, {"betas": betas} | {k: v for k, v in options.items() if k != "momentum"}
    check_equal(engine, cls, options, functools.partial(parameters, [(n,) for n in sizes], dtype), steps=2)


@pytest.mark.parametrize(
    ("engine", "options", "dtype"),
    every_combination(
        ENGINES,
        [*DITHERS.values(), {"state_dtype": torch.int8}, {"state_dtype": torch.bfloat16}],
        [torch.float32, torch.bfloat16],
    ),
    indirect=["engine"],
)
def test_strided_tensors(engine: Engine, options: dict[str, Any], dtype: torch.dtype) -> None:
    assert not any(p.is_contiguous() for p in strided(dtype, engine.device))
    check_equal(engine, SignSGD, options, functools.partial(strided, dtype))
    check_equal(engine, Lion, options, functools.partial(strided, dtype))


@pytest.mark.parametrize("options", [{}, DITHERS["pre"], {"state_dtype": torch.int8}])
def test_complex_parameters(engine: Engine, options: dict[str, Any]) -> None:
    for cls in (SignSGD, Lion):
        check_equal(engine, cls, options, functools.partial(parameters, [(300,), (7,)], torch.complex64))


@pytest.mark.parametrize("options", DITHERS.values(), ids=DITHERS)
def test_different_dtypes_in_one_group(engine: Engine, options: dict[str, Any]) -> None:
    def make(device: torch.device) -> list[torch.nn.Parameter]:
        return [parameters([(300,)], dtype, device)[0] for dtype in (*DTYPES, torch.float32, torch.bfloat16)]

    check_equal(engine, SignSGD, options, make)


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

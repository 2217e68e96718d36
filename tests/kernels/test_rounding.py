"""bfloat16 parameters rounded at random: the mean, the noise, and every implementation on every bfloat16."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import CPU, Engine, differing, momenta, request
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import references
from signstep.kernels import native
from signstep.kernels.engine import Direction, Tensors
from signstep.kernels.plain import multi_tensor_step, single_tensor_step
from signstep.kernels.reference import PARAM_ROUNDING, Segment, noise_halves
from signstep.kernels.rounding import to_bfloat16

EVERY_R = torch.arange(1 << 16)
LARGEST = torch.finfo(torch.bfloat16).max


def all_roundings(x: float) -> Tensor:
    return to_bfloat16(torch.full((1 << 16,), x), EVERY_R).double()


@given(st.floats(-LARGEST, LARGEST, width=32))
def test_the_mean_over_all_random_numbers_is_the_number(x: float) -> None:
    """Exactly, also of subnormals and of zero; and only the two neighbours come up."""
    rounded = all_roundings(x)
    assert rounded.mean().item() == x  # a sum of 2^16 numbers of 8 bits: float64 rounds nothing
    values = rounded.unique()
    assert len(values) == (1 if x == torch.tensor(x).bfloat16().item() else 2)
    assert (rounded.signbit() == (math.copysign(1, x) < 0)).all()


def test_beyond_the_largest_number_lies_infinity() -> None:
    beyond = torch.tensor(LARGEST).view(torch.int32) + 1000
    for sign in (1, -1):
        rounded = all_roundings(sign * float(beyond.view(torch.float32)))
        assert int((rounded == sign * math.inf).sum()) == 1000
        assert int((rounded == sign * LARGEST).sum()) == (1 << 16) - 1000
        assert (all_roundings(sign * math.inf) == sign * math.inf).all()
    for bits in (0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1):
        nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        assert to_bfloat16(nan.expand(1 << 16).contiguous(), EVERY_R).isnan().all()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**20), st.integers(0, 2**35 - 64))
def test_random_numbers_are_those_of_the_slow_reference(seed: int, step: int, parameter: int, start: int) -> None:
    segment = Segment(parameter, start, 19)
    (drawn,) = noise_halves([segment], PARAM_ROUNDING, seed=seed, step=torch.tensor(step), device=torch.device("cpu"))
    key = (seed & references.MASK, seed >> 32)
    for e, number in zip(range(start, start + 19), drawn.tolist(), strict=True):
        words = references.philox((e // 8, step, parameter, 5), key)
        assert number == words[e % 8 // 2] >> 16 * (e % 2) & 0xFFFF


# --- every implementation ---------------------------------------------------------------------------------------------

EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
SPECIAL = torch.tensor([0.0, -0.0, LARGEST, -LARGEST, math.inf, -math.inf, math.nan], dtype=torch.bfloat16)
NOT_SUBNORMAL = EVERY_BFLOAT16[(EVERY_BFLOAT16 == 0) | ~(EVERY_BFLOAT16.abs() < torch.finfo(torch.bfloat16).tiny)]
CASES: dict[str, dict[str, Any]] = {
    "sign": {"rate": 1e-3},
    "decay": {"rate": 1e-3, "decay": 0.99},
    "growth": {"rate": 0.0, "decay": 1.1, "step": torch.tensor(2**31)},
    "Tensor lr": {"rate": torch.tensor(1e-5), "decay": torch.tensor(0.9999), "seed": 2**64 - 1},
    "sgd": {"rate": 0.37, "direction": Direction.MOMENTUM},
}


def stepped(engine_step: Callable[..., None], numbers: Tensor, device: torch.device = CPU, **options: Any) -> Tensor:
    """Numbers, moved up or down, or, by SGD, 0 moved by each of them."""
    p, g = numbers.clone(), momenta(len(numbers)).bfloat16()
    if options.get("direction") is Direction.MOMENTUM:
        p, g = torch.zeros_like(p), p
    p, g = p.to(device), g.to(device)
    options = {"dither": None, **options}
    engine_step(Tensors([p], [g], [], [], [], [3], [13]), request(**options))
    return p.cpu()


def numbers_for(engine: Engine) -> Tensor:
    # Triton's interpreter is slow, and takes a subnormal bfloat16 that it loads for 0.
    return EVERY_BFLOAT16 if engine.name == "native" else torch.cat([SPECIAL, NOT_SUBNORMAL[::13]])


@pytest.mark.parametrize("case", CASES)
def test_every_implementation_rounds_alike(engine: Engine, case: str) -> None:
    """All 2^16 numbers: zeros, subnormals, the largest, infinities, NaNs."""
    numbers, options = numbers_for(engine), CASES[case]
    expected = stepped(multi_tensor_step, numbers, **options)
    assert differing(stepped(engine.module.step, numbers, engine.device, **options), expected) == 0
    others: list[Callable[..., None]] = [single_tensor_step]
    if engine.name == "native":
        best = native.ISAS[native.best_isa()]
        others += [functools.partial(native.step, isa=isa) for isa, i in native.ISAS.items() if 0 < i <= best]
    for step in others:
        assert differing(stepped(step, numbers, **options), expected) == 0
    assert (
        differing(stepped(multi_tensor_step, numbers, **options, stochastic_params=False), expected)
        > len(numbers) / 100
    )


@pytest.mark.parametrize("case", ["sign", "decay", "sgd"])
def test_to_the_nearest_is_torchs_rounding(engine: Engine, case: str) -> None:
    numbers, options = numbers_for(engine), CASES[case]
    if case == "sgd":
        wide = -options["rate"] * numbers.float()
    else:
        wide = torch.sub(numbers.float() * options.get("decay", 1), momenta(len(numbers)).sign(), alpha=1e-3)
    nearest = options | {"stochastic_params": False}
    assert differing(stepped(engine.module.step, numbers, engine.device, **nearest), wide.bfloat16()) == 0
    for step in (multi_tensor_step, single_tensor_step):
        assert differing(stepped(step, numbers, **nearest), wide.bfloat16()) == 0

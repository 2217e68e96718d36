"""Plain torch steps many tensors at once, on CPUs in batches that cut the large ones, as it steps them one by one."""

import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from engine_cases import DTYPES, STATE_DTYPES, Dither, differing, momenta, request
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from signstep.kernels import plain, plain_noise
from signstep.kernels.engine import Direction, Measured, Tensors
from signstep.kernels.momentum import new_momentum
from signstep.kernels.plain import multi_tensor_step, single_tensor_step

BATCH = 256
"""Elements, where no noise is drawn; half as many as where it is."""
LAYOUTS = ("rows", "columns", "every other", "one gradient")


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """And no autograd, under which nothing is cut."""
    threads = torch.get_num_threads()
    with (
        torch.no_grad(),
        mock.patch.object(plain, "_PER_THREAD", BATCH // threads),
        mock.patch.object(plain_noise, "_PER_THREAD", -(-(2 * BATCH - 99) // threads)),
    ):
        yield


def laid(x: Tensor, layout: str) -> Tensor:
    """The same numbers, a matrix with rows of 4 where its layout needs one."""
    if layout == "every other":
        return x.repeat_interleave(2)[::2]
    return x.view(-1, 4).t().contiguous().t() if layout == "columns" and x.numel() % 4 == 0 else x


def problem(sizes: list[tuple[int, str]], dtype: torch.dtype, options: dict[str, Any], relative: bool) -> Tensors:
    generator = torch.Generator().manual_seed(5)
    params = [laid(torch.randn(n, generator=generator).to(dtype), layout) for n, layout in sizes]
    grads = [
        g.new_full((), 0.25).expand(g.shape) if layout == "one gradient" else laid(g, layout)
        for g, (_, layout) in zip([momenta(n).to(dtype) for n, _ in sizes], sizes, strict=True)
    ]
    for g, (_, layout) in zip(grads, sizes, strict=True):
        if layout != "one gradient" and g.numel() > 40:
            g[0], g[7], g[9], g[-1] = 0, math.inf, math.nan, -math.inf
    state = [new_momentum(p, options["state_dtype"]) for p in params] if options["momentum"] else []
    return Tensors(
        params=params,
        grads=grads,
        exp_avgs=[s["exp_avg"] for s in state],
        scales=[s["exp_avg_scale"] for s in state if "exp_avg_scale" in s],
        mean_squares=[torch.tensor(0.5) for _ in params] if relative else [],
        ordinals=[3 * i for i in range(len(params))],
        offsets=[100 * i for i in range(len(params))],
    )


KINDS: dict[str, dict[str, Any]] = {
    "sign": {"dither": None},
    "momentum": {"dither": None, "direction": Direction.MOMENTUM},
    "pre": {"dither": Dither("pre", torch.tensor(0.5))},
    "post": {"dither": Dither("post", torch.tensor(0.5))},
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"decay": 0.9, "rate": torch.tensor(0.03)},
    "coupled decay, maximize": {"coupled_weight_decay": 0.1, "maximize": True},
    "to the nearest": {"stochastic_params": False},
}
SIZES = st.tuples(st.sampled_from([0, 1, 64, 252, 255, 256, 257, 512, 516, 1021, 1540]), st.sampled_from(LAYOUTS))


@given(
    st.lists(SIZES, min_size=1, max_size=5),
    st.sampled_from(list(KINDS)),
    st.sampled_from(list(OTHERS)),
    st.sampled_from(DTYPES),
    st.sampled_from(STATE_DTYPES),
    st.sampled_from([0.0, 0.9]),
    st.booleans(),
    st.sampled_from([None, *Measured]),
)
def test_batches_change_no_bit(
    sizes: list[tuple[int, str]],
    kind: str,
    other: str,
    dtype: torch.dtype,
    state_dtype: torch.dtype | None,
    momentum: float,
    relative: bool,
    measured: Measured | None,
) -> None:
    options = (
        {
            "rate": torch.linspace(0.01, 0.05, len(sizes)) if measured else 0.03,
            "momentum": momentum,
            "state_dtype": state_dtype,
        }
        | KINDS[kind]
        | OTHERS[other]
    )
    relative = relative and kind in ("pre", "post")
    measured = None if kind == "momentum" else measured
    results = []
    for step in (multi_tensor_step, single_tensor_step):
        tensors, sums = problem(sizes, dtype, options, relative), None
        for k in range(2):
            sums = torch.zeros(len(sizes), 2, dtype=torch.float64) if measured else None
            step(tensors, request(**options, step=torch.tensor(k), sums=sums, measured=measured or Measured.SIGN))
        results.append([*tensors.params, *tensors.exp_avgs, *tensors.scales, *tensors.mean_squares])
        if sums is not None:
            results[-1].append(sums)
    for x, y in zip(*results, strict=True):
        assert differing(x, y) == 0
        assert torch.equal(x.isnan() | x.signbit(), y.isnan() | y.signbit())


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_large_tensors_are_cut(layout: str) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "state_dtype": None, "dither": None}
    tensors = problem(
        [(100, "rows"), (4 * BATCH + 4, layout), (60, "rows"), (70, "rows")], torch.float32, options, False
    )
    with mock.patch.object(plain, "_move") as moved:
        multi_tensor_step(tensors, request(**options))
    batches = [[p.numel() for p in call.args[0].params] for call in moved.call_args_list]
    assert batches == [[100], *[[BATCH]] * 4, [4], [60, 70]]


def test_autograd_sees_that_the_parameter_changed() -> None:
    p = torch.nn.Parameter(torch.ones(5 * BATCH))
    with torch.enable_grad():
        loss = (p * p).sum()
    multi_tensor_step(Tensors([p], [torch.ones_like(p)], [], [], [], [0], [0]), request(dither=None))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

"""The option param_rounding: bfloat16 weights move on average as float32 weights do, and what it refuses."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from signstep import HybridSignSGD, SignSGD

BFLOAT16 = torch.bfloat16


def walked(start: float, lr: float, steps: int, count: int, **options: Any) -> Tensor:
    """How far so many bfloat16 weights have come in steps of one direction, float64."""
    p = torch.nn.Parameter(torch.full((count,), start, dtype=BFLOAT16))
    begin = p.detach().double()
    p.grad = torch.ones_like(p)
    optimizer = SignSGD([p], lr=lr, **options)
    for _ in range(steps):
        optimizer.step()
    return p.detach().double() - begin


@pytest.mark.parametrize("start", [0.3, 0.5, 1.0, 2.0])
def test_weights_move_by_the_sum_of_their_steps(start: float) -> None:
    """Each rounds 200 times by up to one spacing: a standard error of 3.7e-4 at 2, where bfloat16 is coarsest."""
    moved = walked(start, 1e-3, 200, 10_000)
    error = float(moved.std()) / math.sqrt(len(moved))
    assert 1e-6 < error < 4e-4
    assert abs(float(moved.mean()) + 0.2) < 4 * error


def test_a_step_of_a_four_hundredth_of_the_spacing_counts() -> None:
    """At lr 1e-5 a weight of 1 moves with probability 0.0026, which a byte of noise would take for 0 or 0.0039."""
    moved = walked(1.0, 1e-5, 200, 40_000)
    error = float(moved.std()) / math.sqrt(len(moved))
    assert error < 2e-5
    assert abs(float(moved.mean()) + 200 * 1e-5) < 4 * error


def test_to_the_nearest_a_weight_of_1_stands_still() -> None:
    assert not walked(1.0, 1e-3, 200, 10, param_rounding="nearest").any()
    assert walked(1.0, 1e-3, 200, 10, param_rounding="stochastic").any()


def test_decay_is_not_lost_either() -> None:
    """Of weights whose gradient is 0: 1 - lr * weight_decay is 1 to bfloat16."""
    p = torch.full((20_000,), 1.5, dtype=BFLOAT16)
    p.grad = torch.zeros_like(p)
    optimizer = SignSGD([p], lr=1e-3, weight_decay=0.5)
    for _ in range(200):
        optimizer.step()
    error = float(p.double().std()) / math.sqrt(len(p))
    assert abs(float(p.double().mean()) - 1.5 * (1 - 5e-4) ** 200) < 4 * error < 2e-3


def trained(options: dict[str, Any], ways: list[dict[str, Any]]) -> list[list[Tensor]]:
    """The parameters of one optimizer per way, after 6 steps."""
    out = []
    for way in ways:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=generator).to(BFLOAT16) for s in ((40, 7), (), (0,), (300,))]
        params.append(torch.randn(6, 8, generator=generator).to(BFLOAT16).t())
        params.append(torch.randn(9, generator=generator))
        optimizer = HybridSignSGD(params, lr=1e-3, switch_step=3, **options, **way)
        for _ in range(6):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
        out.append(params)
    return out


@pytest.mark.parametrize(
    "options",
    [{}, {"dither": 0.5, "weight_decay": 0.1, "sgd_momentum": 0.5}, {"state_dtype": torch.int8, "momentum": 0.5}],
)
def test_one_by_one_and_all_at_once_are_one_step(options: dict[str, Any]) -> None:
    """Bit for bit, in both phases; and other noise, or none, gives other weights."""
    ways = [{"foreach": True}, {"foreach": False}, {"seed": 1, "foreach": True}]
    many, single, other, nearest = trained(options, [*ways, {"param_rounding": "nearest", "foreach": True}])
    assert all(torch.equal(p, q) for p, q in zip(many, single, strict=True))
    assert not torch.equal(many[0], other[0])
    assert not torch.equal(many[0], nearest[0])


def test_noise_goes_on_after_resume() -> None:
    params = [torch.full((500,), 1.0, dtype=BFLOAT16)]
    optimizer = SignSGD(params, lr=1e-3)
    for step in range(6):
        params[0].grad = torch.ones_like(params[0])
        if step == 3:
            resumed = [params[0].clone()]
            again = SignSGD(resumed, lr=1e-3)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step >= 3:
            resumed[0].grad = torch.ones_like(params[0])
            again.step()
        optimizer.step()
    assert torch.equal(params[0], resumed[0])
    assert len(params[0].unique()) > 2


def test_autograd_takes_rounding_for_the_identity() -> None:
    """As it takes the cast of rounding to the nearest; the numbers are those of the step without autograd."""
    p0 = torch.tensor([1.0, 1.0, 2.0], dtype=BFLOAT16, requires_grad=True)
    lr = torch.tensor(1e-3, requires_grad=True)
    p = p0.clone()
    p.grad = torch.tensor([1.0, -1.0, 1.0], dtype=BFLOAT16)
    SignSGD([p], lr=lr, momentum=0, weight_decay=0.5, differentiable=True).step()
    p.sum().backward()
    q = p0.detach().clone()
    q.grad = torch.tensor([1.0, -1.0, 1.0], dtype=BFLOAT16)
    SignSGD([q], lr=1e-3, momentum=0, weight_decay=0.5).step()
    assert torch.equal(p.detach(), q)
    assert torch.equal(p0.grad, torch.full_like(p0, 1 - 5e-4))
    assert float(lr.grad) == pytest.approx(-1.0 - 0.5 * 4, rel=1e-2)


@pytest.mark.parametrize("cls", [SignSGD, HybridSignSGD])
def test_float16_is_refused_where_stochastic_is_asked_for(cls: type[SignSGD]) -> None:
    half, single = torch.ones(3, dtype=torch.float16), torch.ones(3)
    message = r"Invalid param_rounding: 'stochastic' with float16 parameters, .*; pass None, or make the parameters"
    with pytest.raises(ValueError, match=message):
        cls([half], param_rounding="stochastic")
    optimizer = cls([single], param_rounding="stochastic")
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [half], "param_rounding": "nearest"})
    cls([half])

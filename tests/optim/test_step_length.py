"""A learning rate that was meant for SGD is said once, where the optimizer is made."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from signstep import HybridSignSGD, SignSGD
from signstep.optim import attach_to_backward

HERE = __file__


def said(make: Callable[[], Any]) -> list[str]:
    """The warnings of a call, which must point at this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    assert all(each.category is UserWarning and each.filename == HERE for each in caught)
    return [str(each.message) for each in caught]


def params(count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def added() -> None:
    SignSGD(params(), lr=1e-3).add_param_group({"params": params(), "lr": 0.1})


@pytest.mark.parametrize(
    ("make", "start"),
    [
        (lambda: SignSGD(params(), lr=0.1), "SignSGD: lr=0.1 moves every weight by 0.1 in each step"),
        (lambda: SignSGD(params(), 0.0301), "SignSGD: lr=0.0301 "),
        (lambda: SignSGD(params(), lr=torch.tensor(0.1)), "SignSGD: lr=0.1 "),
        (lambda: SignSGD(params(), lr=torch.tensor([0.1], dtype=torch.float64)), "SignSGD: lr=0.1 "),
        (lambda: HybridSignSGD(params(), lr=1), "HybridSignSGD: lr=1 "),
        (lambda: SignSGD([{"params": params(), "lr": 0.5}, {"params": params()}]), "SignSGD: lr=0.5 "),
        (lambda: SignSGD([{"params": params()}, {"params": params()}], lr=0.2), "SignSGD: lr=0.2 "),
        (lambda: attach_to_backward(nn.Linear(2, 2), {"lr": 0.1}), "SignSGD: lr=0.1 "),
        (lambda: attach_to_backward(nn.Linear(2, 2), {"lr": 0.1, "switch_step": 3}), "HybridSignSGD: lr=0.1 "),
        (added, "SignSGD: lr=0.1 "),
    ],
)
def test_a_large_learning_rate_is_said_once(make: Callable[[], Any], start: str) -> None:
    (text,) = said(make)
    assert text.startswith(start)
    assert text.endswith("try 1e-4 to 3e-3, as for AdamW")


def small_in_every_group() -> None:
    SignSGD([{"params": params(), "lr": 1e-3}], lr=0.1)


def loaded_copied_and_stepped() -> None:
    optimizer = SignSGD(params(), lr=1e-3)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(state)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    copied.param_groups[0]["params"][0].grad = torch.ones(2)
    copied.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SignSGD(params()),
        lambda: SignSGD(params(), lr=0.03),
        lambda: SignSGD(params(), lr=torch.tensor(0.03)),
        small_in_every_group,
        loaded_copied_and_stepped,
    ],
)
def test_nothing_is_said_of_others(make: Callable[[], Any]) -> None:
    assert said(make) == []


def test_a_learning_rate_on_an_accelerator_is_not_read() -> None:
    from signstep.optim import step_length

    assert step_length.advice(torch.tensor(0.1, device="meta")) is None

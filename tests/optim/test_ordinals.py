"""The numbers of parameters in the noise, where a model's parameters are spread over several optimizers."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from gang import on_ranks
from signstep import SignSGD

NOISY: dict[str, Any] = {"dither": 1.0, "lr": 0.01}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1000)) for _ in range(3)]


def moved(params: list[nn.Parameter], optimizers: list[Any]) -> list[Tensor]:
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    for optimizer in optimizers:
        optimizer.step()
    return [p.detach().clone() for p in params]


def together() -> list[Tensor]:
    params = parameters()
    return moved(params, [SignSGD(params, **NOISY)])


def numbered(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": [p], "first_ordinal": i} for i, p in enumerate(params)]


def test_one_optimizer_per_parameter_draws_the_same_noise_unless_it_is_numbered() -> None:
    apart = parameters()
    first, second, _ = moved(apart, [SignSGD([p], **NOISY) for p in apart])
    assert torch.equal(first, second)  # the limit that README names
    params = parameters()
    assert all(map(torch.equal, moved(params, [SignSGD([group], **NOISY) for group in numbered(params)]), together()))
    params = parameters()
    first, second, _ = moved(params, [SignSGD([p], seed=i, **NOISY) for i, p in enumerate(params)])
    assert 0.4 < float((first == second).float().mean()) < 0.6  # 6 standard errors of 1,000 coins


def test_a_step_inside_backward_by_an_optimizer_for_each_parameter() -> None:
    """As torch.distributed.optim._apply_optimizer_in_backward does it, with the numbers that it cannot give."""
    params = parameters()
    optimizers = {p: SignSGD([group], **NOISY) for p, group in zip(params, numbered(params), strict=True)}
    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    torch.stack([p.sum() * 1e-3 for p in params]).sum().backward()
    assert all(map(torch.equal, [p.detach() for p in params], together()))


@on_ranks(2)
def test_zero_redundancy_optimizer() -> None:
    whole = together()
    params = parameters()
    moved(params, [ZeroRedundancyOptimizer(params, SignSGD, **NOISY)])
    assert sum(map(torch.equal, [p.detach() for p in params], whole)) == 1  # each rank counts its own from 0
    params = parameters()
    optimizer = ZeroRedundancyOptimizer(numbered(params), SignSGD, **NOISY)
    assert all(map(torch.equal, moved(params, [optimizer]), whole))


def test_numbers_are_saved_checked_and_kept() -> None:
    p = nn.Parameter(torch.zeros(4))
    optimizer = SignSGD([{"params": [p], "first_ordinal": 5}])
    state = deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["first_ordinal"] == 5
    del state["param_groups"][0]["first_ordinal"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["first_ordinal"] == 5
    for bad in (-1, 1.5, "1", True):
        with pytest.raises(ValueError, match="Invalid first_ordinal"):
            SignSGD([{"params": [p], "first_ordinal": bad}])

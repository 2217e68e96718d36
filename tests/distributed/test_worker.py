"""A worker's state: saved, resumed, taken over, and split anew for another number of workers."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_cases import batch_of, small_net, small_vote
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang, on_ranks
from signstep import SignSGD
from signstep.distributed import MajorityVote, resplit
from signstep.distributed.worker import in_memory_order


@on_ranks(1)
def test_momentum_of_another_size_is_refused() -> None:
    model, optimizer, vote = small_vote()
    x, y = batch_of("linear", 0)
    F.cross_entropy(model(x), y).backward()
    state = vote.state_dict()
    state["state"]["0.weight"]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of 0\.weight was saved with 3 elements, the parameter has 407"):
        vote.load_state_dict(state)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="add_param_group after MajorityVote"):
        F.cross_entropy(model(x), y).backward()


def _resumable(at: int, saved: list[dict[str, Any]] | None, steps: int, **options: Any) -> Any:
    net = small_net("linear")
    model = DistributedDataParallel(net, bucket_cap_mb=0.001)
    optimizer = SignSGD(model.parameters(), dither=1e-4, **options)
    vote = MajorityVote(model, optimizer, error_feedback=options.get("state_dtype") is None)
    first = 0
    if saved is not None:
        mine = torch.load(io.BytesIO(saved[dist.get_rank()]["bytes"]), weights_only=True)
        net.load_state_dict(mine["net"])
        optimizer.load_state_dict(mine["optimizer"])
        vote.load_state_dict(mine["vote"])
        first = at
    for step in range(first, steps):
        if step == at and saved is None:
            file = io.BytesIO()
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "vote": vote.state_dict()}
            torch.save(state, file)
        x, y = batch_of("linear", step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    flat = torch.cat([p.detach().flatten() for p in net.parameters()]).tolist()
    return {"flat": flat, "bytes": file.getvalue() if saved is None else b""}


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.int8}], ids=["error feedback", "8 bits"])
def test_a_resumed_run_is_the_uninterrupted_one(options: dict[str, Any]) -> None:
    whole = gang(2).run(_call, _resumable, options, 4, None, 9)
    again = gang(2).run(_call, _resumable, options, 4, whole, 9)
    assert [w["flat"] for w in whole] == [a["flat"] for a in again]
    assert whole[0]["flat"] == whole[1]["flat"]


def _call(function: Callable[..., Any], options: dict[str, Any], *arguments: Any) -> Any:
    return function(*arguments, **options)


def test_another_number_of_workers_must_resplit() -> None:
    states = gang(3).run(_state)
    errors = gang(2).run(_load, states[0])
    assert all("resplit" in e and "3 workers" in e for e in errors)
    new = resplit(states, 2)
    assert gang(2).run(_load_own, new) == [""] * 2
    momenta = [torch.stack([s["state"]["0.weight"]["exp_avg"] for s in each]).mean(0) for each in (states, new)]
    torch.testing.assert_close(*momenta)
    assert "rank 0" in gang(2).run(_load, new[0])[1]
    with pytest.raises(ValueError, match="each of the 3 ranks once"):
        resplit(states[:2], 4)


def _state() -> dict[str, Any]:
    model, _, vote = small_vote()
    x, y = batch_of("linear", 0)
    F.cross_entropy(model(x), y).backward()
    return vote.state_dict()


def _load(state: dict[str, Any]) -> str:
    try:
        small_vote()[2].load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def _load_own(states: list[dict[str, Any]]) -> str:
    return _load(states[dist.get_rank()])


@on_ranks(1)
def test_momentum_of_a_run_alone_is_taken_over() -> None:
    net = small_net("conv")
    optimizer = SignSGD(net.parameters())
    x, y = batch_of("conv", 0)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    kept = optimizer.state[net[0].weight]["exp_avg"].clone()
    model = DistributedDataParallel(net)
    vote = MajorityVote(model, optimizer)
    assert vote.worker.steps == [1]
    assert torch.equal(vote.state_dict()["state"]["0.weight"]["exp_avg"], in_memory_order(kept))
    assert not optimizer.state

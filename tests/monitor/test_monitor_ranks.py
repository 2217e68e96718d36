"""`Monitor` over several ranks: DistributedDataParallel, uneven ranks, join, and votes."""

import types
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang, on_ranks
from measured import KeepingSink, micro_gradients
from signstep import Monitor, SignSGD
from signstep.distributed import MajorityVote
from signstep.theory import stationarity


def _ddp_records(vote: bool) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    model = DistributedDataParallel(net)
    optimizer = SignSGD(model.parameters(), lr=1e-3, dither=1e-6)
    voted = MajorityVote(model, optimizer) if vote else None
    sink = KeepingSink()
    monitor = Monitor(model, optimizer, every=1, sinks=[sink], vote=voted)
    generator = torch.Generator().manual_seed(7)
    data = torch.randn(2, 6, 10, 6, generator=generator)  # steps, micro-batches, elements
    for step in range(2):
        mine = data[step, dist.get_rank() * 3 :][:3]
        for i, x in enumerate(mine):
            with model.no_sync() if i < 2 else nullcontext():
                (model(x).square().mean() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor.close()
    if voted is not None:
        voted.close()
    return sink.records


@pytest.mark.parametrize("vote", [False, True])
def test_ddp_gathers_the_micro_batches_of_all_ranks(vote: bool) -> None:
    first, second = gang(2).run(_ddp_records, vote)
    assert second == []
    assert [r["micro_batches"] for r in first] == [6, 6]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    data = torch.randn(2, 6, 10, 6, generator=torch.Generator().manual_seed(7))
    slow = micro_gradients(net, (net(x).square().mean() for x in data[0]))
    estimate = stationarity.alignment(slow)
    assert first[0]["reliability"]["alignment"] == pytest.approx([float(v) for v in vars(estimate).values()], rel=1e-4)


@on_ranks(2)
def test_rows_of_uneven_ranks_have_the_mean_of_the_steps_gradient() -> None:
    """4 micro-batches on rank 0 and 12 on rank 1, each loss divided by 8: the step's gradient is their mean."""
    model = DistributedDataParallel(nn.Linear(6, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = Monitor(model, optimizer)
    torch.manual_seed(dist.get_rank())
    count = 4 + 8 * dist.get_rank()
    for i in range(count):
        with model.no_sync() if i < count - 1 else nullcontext():
            (model(torch.randn(10, 6) + 1).sum() / 8).backward()
    monitor._record = types.MethodType(lambda self: {"rows": self._rows()[0].mean(0).tolist()}, monitor)  # type: ignore[method-assign]
    optimizer.step()
    assert monitor.last is not None
    assert model.module.weight.grad is not None
    assert monitor.last["rows"] == pytest.approx(model.module.weight.grad.flatten().tolist(), rel=1e-4)


@on_ranks(2)
def test_ranks_that_join_are_not_waited_for() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = KeepingSink()
    Monitor(model, optimizer, every=1, sinks=[sink])
    with model.join():
        for _ in range(6 if dist.get_rank() == 0 else 3):
            for i in range(4):
                with model.no_sync() if i < 3 else nullcontext():
                    model(torch.randn(4, 6)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [r["micro_batches"] for r in sink.records] == ([4] * 6 if dist.get_rank() == 0 else [])


def _ddp_buffers(watched: bool) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    optimizer = SignSGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, every=2) if watched else None
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        x = torch.randn(32, 6)
        if monitor is not None:
            monitor.measure(lambda x: model(x).square().mean(), x, parts=4)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {name: value.tolist() for name, value in model.state_dict().items()}


def test_a_watched_ddp_run_ends_with_the_same_bits_on_all_ranks() -> None:
    assert gang(2).run(_ddp_buffers, True) == gang(2).run(_ddp_buffers, False)


@on_ranks(2)
def test_static_graph_is_refused() -> None:
    model = DistributedDataParallel(nn.Linear(6, 1), static_graph=True)
    monitor = Monitor(model, SignSGD(model.parameters(), lr=1e-3))
    with pytest.raises(ValueError, match="static_graph=True"):
        monitor.measure(lambda x: model(x).mean(), torch.randn(8, 6), parts=4)


def _ddp_measure() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model = DistributedDataParallel(net)
    optimizer = SignSGD(model.parameters(), lr=1e-3)
    sink = KeepingSink()
    monitor = Monitor(model, optimizer, every=2, sinks=[sink])
    for step in range(3):
        torch.manual_seed(10 * step + dist.get_rank())
        x = torch.randn(32, 6)
        monitor.measure(lambda x: model(x).square().mean(), x, parts=4)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [r["micro_batches"] for r in sink.records], float(net[0].weight.sum())


def test_ddp_measures_without_reducing() -> None:
    (counts, one), (none, two) = gang(2).run(_ddp_measure)
    assert (counts, none) == ([8, 8], [])
    assert one == two

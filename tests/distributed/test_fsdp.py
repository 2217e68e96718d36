"""Majority vote under FSDP2: the same steps as under DDP, bit for bit, on every shard and for every way to cut."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gang import gang
from signstep import HybridSignSGD, SignSGD
from signstep.distributed import CollectiveError, MajorityVote
from signstep.distributed import fsdp as module
from signstep.distributed.fsdp import FSDPMajorityVote
from signstep.distributed.fsdp_shards import Part, Routes
from signstep.kernels import bits, fused
from signstep.kernels.bits import word_count

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_custom_reduce_scatter"), reason="this torch has no custom reduce-scatter"
)

Options = dict[str, Any]


class Net(nn.Module):
    """Rows that no number of ranks divides, and fewer rows than ranks."""

    def __init__(self, *, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(11, 37), nn.Tanh())
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(37, 37), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(37, 3)
        self.gain = nn.Parameter(torch.randn(5))
        if tied:
            self.again = nn.Linear(11, 37, bias=False)
            self.again.weight = self.first[0].weight
        self.tied = tied
        if frozen:
            self.blocks[0][0].weight.requires_grad_(False)
            self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.tied:
            h = h + self.again(x)
        for block in self.blocks:
            h = block(h)
        return self.last(h) * self.gain.square().mean()


def _batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(6, 11, generator=generator), torch.randint(0, 3, (6,), generator=generator)


def _loss(model: nn.Module, step: int, rank: int | None = None) -> Tensor:
    x, y = _batch(step, dist.get_rank() if rank is None else rank)
    return F.cross_entropy(model(x).float(), y)


def _shard(net: Any, parts: bool = True, **options: Any) -> Any:
    if parts and not net.tied:  # torch wants what is tied in one module
        fully_shard(net.first, **options)
    for block in net.blocks if parts else ():
        fully_shard(block, **options)
    fully_shard(net, **options)
    return net


def _own(whole: Tensor, shard: DTensor) -> Tensor:
    rows = -(-whole.shape[0] // shard.device_mesh.size())
    rank = shard.device_mesh.get_local_rank()
    return whole[rank * rows : (rank + 1) * rows]


def _assert_equal(sharded: nn.Module, net: nn.Module, note: object) -> None:
    for (name, ours), theirs in zip(sharded.named_parameters(), net.parameters(), strict=True):
        assert isinstance(ours, DTensor)
        assert torch.equal(ours.to_local(), _own(theirs, ours)), (note, name)


def _assert_same_everywhere(net: nn.Module) -> None:
    flat = torch.cat([p.detach().full_tensor().flatten() for p in net.parameters()])  # type: ignore[operator]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, flat)
    assert all(torch.equal(flat, other) for other in everyone)


def _follow(
    net: Options,
    options: Options,
    vote: Options,
    sharding: Options,
    steps: int,
    slices: int,
    optimizer_class: type[SignSGD],
) -> SignSGD:
    """FSDP2 beside DDP, compared after every step."""
    ddp = DistributedDataParallel(Net(**net))
    model = _shard(Net(**net), **sharding)
    theirs = optimizer_class(ddp.parameters(), **options)
    ours = optimizer_class(model.parameters(), **options)
    MajorityVote(ddp, theirs, **vote)
    with torch.no_grad():
        _loss(model, 0)  # leaves the root's own parameters as they were gathered
    FSDPMajorityVote(model, ours, **vote)
    for step in range(steps):
        theirs.zero_grad()
        ours.zero_grad()
        for part in range(slices):
            last = part == slices - 1
            ddp.require_backward_grad_sync = last
            model.set_requires_gradient_sync(last)
            _loss(ddp, slices * step + part).backward()
            _loss(model, slices * step + part).backward()
        theirs.step()
        ours.step()
        _assert_equal(model, ddp.module, step)
    _assert_same_everywhere(model)
    return ours


def _follow_all(cases: list[str], steps: int) -> None:
    for name in cases:
        try:
            _follow(*CASES[name], steps, 1, SignSGD)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


RELATIVE = {"dither": 1.0, "dither_scale": "relative", "dither_decay": 0.0}
CASES: dict[str, tuple[Options, Options, Options, Options]] = {
    "clean": ({}, {"lr": 0.01}, {}, {}),
    "absolute dither": ({}, {"dither": 1e-4, "seed": 2**63 + 5}, {}, {}),
    "relative dither": ({}, {"lr": 0.01} | RELATIVE, {}, {}),
    "dither scaled": ({}, {"dither": 1e-4}, {"dither_workers": "scaled"}, {}),
    "no momentum": ({}, {"momentum": 0.0}, {}, {}),
    "no momentum, dither": ({}, {"momentum": 0.0, "dither": 1e-2}, {}, {"reshard_after_forward": False}),
    "decoupled decay": ({}, {"weight_decay": 0.1}, {}, {}),
    "coupled decay": ({}, {"weight_decay": 0.1, "decoupled_weight_decay": False}, {}, {}),
    "ties abstain": ({}, {"seed": 3}, {"ties": "abstain"}, {}),
    "error feedback": ({}, {"lr": 0.01}, {"error_feedback": True}, {}),
    "8-bit momentum": ({}, {"state_dtype": torch.int8, "dither": 1e-4}, {}, {}),
    "16-bit momentum": ({}, {"state_dtype": torch.bfloat16}, {}, {}),
    "maximize": ({}, {"maximize": True}, {}, {}),
    "one module": ({}, {"dither": 1e-4}, {}, {"parts": False}),
    "tied": ({"tied": True}, {"dither": 1e-4}, {}, {}),
    "frozen": ({"frozen": True}, {"dither": 1e-4}, {}, {}),
    "tied and frozen": ({"tied": True, "frozen": True}, {"weight_decay": 0.1}, {}, {"parts": False}),
}


def test_takes_the_steps_of_ddp() -> None:
    gang(4).run(_follow_all, list(CASES), 3)


@pytest.mark.parametrize("size", [1, 2])
def test_takes_the_steps_of_ddp_on_few_ranks(size: int) -> None:
    gang(size).run(_follow_all, ["relative dither", "coupled decay", "ties abstain", "8-bit momentum"], 3)


def test_thirty_steps() -> None:
    gang(4).run(_follow_all, ["absolute dither", "tied and frozen"], 30)


def test_accumulated_gradients_are_voted_on_once() -> None:
    gang(2).run(_follow, {}, {"dither": 1e-4}, {}, {}, 4, 3, SignSGD)


def test_hybrid_takes_the_steps_of_ddp_before_and_after_the_switch() -> None:
    gang(2).run(_hybrid)


def _hybrid() -> None:
    """A sum of two does not depend on who adds them, so the mean after the switch is the same too."""
    for options in (
        {"switch_step": 3, "dither": 1e-4},
        {"switch_step": 2, "sgd_momentum": 0.9, "calibration": "ratio", "maximize": True},
        {"switch_step": 3, "sgd_momentum": 0.5, "state_dtype": torch.bfloat16, "weight_decay": 0.1},
    ):
        optimizer = _follow({"frozen": True}, {"lr": 0.01} | options, {}, {}, 6, 1, HybridSignSGD)
        assert isinstance(optimizer, HybridSignSGD)
        assert optimizer.phase == "sgd"
        kept = {type(state["exp_avg"]) for state in optimizer.state.values()}
        assert kept == ({DTensor} if options.get("sgd_momentum") else set())


def test_the_switch_comes_on_the_same_step_on_all_ranks() -> None:
    rates = gang(4).run(_switch)
    assert rates == [rates[0]] * 4


def _switch() -> tuple[list[str], float]:
    """On four ranks the means differ by rounding; calibration is that of DDP."""
    ddp, model = DistributedDataParallel(Net()), _shard(Net())
    theirs, ours = (HybridSignSGD(m.parameters(), lr=0.01, switch_step=4) for m in (ddp, model))
    MajorityVote(ddp, theirs)
    vote = FSDPMajorityVote(model, ours)
    phases = []
    for step in range(6):
        theirs.zero_grad()
        ours.zero_grad()
        _loss(ddp, step).backward()
        _loss(model, step).backward()
        theirs.step()
        ours.step()
        phases.append(ours.phase)
    assert ours.calibrated_lr == theirs.calibrated_lr
    assert ours.calibrated_lr > 0
    for p, q in zip(model.parameters(), ddp.parameters(), strict=True):
        torch.testing.assert_close(p.to_local(), _own(q, p), rtol=1e-5, atol=1e-6)
    assert not vote.worker.state
    _assert_same_everywhere(model)
    return phases, float(ours.calibrated_lr)


def test_calibration_goes_by_what_takes_part_in_the_step() -> None:
    gang(2).run(_calibration)


def _calibration() -> None:
    """Which modules a step uses differs."""
    net = Branches()
    for branch in net.branches:
        fully_shard(branch)
    model: Any = fully_shard(net)
    ddp = DistributedDataParallel(Branches(), find_unused_parameters=True)
    theirs, ours = (HybridSignSGD(m.parameters(), lr=0.01) for m in (ddp, model))
    MajorityVote(ddp, theirs)
    FSDPMajorityVote(model, ours)
    for step in range(5):
        theirs.zero_grad()
        ours.zero_grad()
        x = _batch(step, dist.get_rank())[0][:, :4]
        ddp(x, step % 3).backward()
        model(x, step % 3).backward()
        theirs.step()
        ours.step()
        assert ours.calibrated_lr == theirs.calibrated_lr, step
        _assert_equal(model, ddp.module, step)


# --- replicas vote (HSDP) --------------------------------------------------------------------------------------------


def test_replicas_vote_as_workers_of_ddp_with_both_batches() -> None:
    gang(4).run(_replicas)


def _replicas() -> None:
    """A replica's gradient is the mean of its two ranks': DDP over the replicas accumulates half of each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group()
    partners = dist.get_process_group_ranks(mesh["shard"].get_group())
    cases: list[tuple[type[SignSGD], Options, float]] = [
        (SignSGD, {"dither": 1e-4, "weight_decay": 0.1}, 0.0),
        (SignSGD, {"weight_decay": 0.1, "decoupled_weight_decay": False}, 0.0),
        (SignSGD, {"momentum": 0.0, "lr": 0.01}, 0.0),
        (HybridSignSGD, {"switch_step": 3, "sgd_momentum": 0.5}, 0.0),
        (SignSGD, RELATIVE, 2e-3),  # the rms is that of DDP to rounding: few coordinates may go the other way
    ]
    for optimizer_class, options, tolerance in cases:
        ddp = DistributedDataParallel(Net(), process_group=group)
        model = _shard(Net(), mesh=mesh["shard"])
        theirs, ours = optimizer_class(ddp.parameters(), **options), optimizer_class(model.parameters(), **options)
        MajorityVote(ddp, theirs)
        vote = FSDPMajorityVote(model, ours, replicate_group=group)
        assert (vote.rank, vote.world_size) == (dist.get_rank() // 2, 2)
        for step in range(4):
            theirs.zero_grad()
            ours.zero_grad()
            with ddp.no_sync():
                (_loss(ddp, step, partners[0]) * 0.5).backward()
            (_loss(ddp, step, partners[1]) * 0.5).backward()
            _loss(model, step).backward()
            theirs.step()
            ours.step()
            if tolerance == 0.0 and step < 3:
                _assert_equal(model, ddp.module, (options, step))
        for p, q in zip(model.parameters(), ddp.parameters(), strict=True):
            differing = (p.to_local() - _own(q, p)).abs() > 1e-6
            assert differing.double().mean().nan_to_num() <= tolerance, options
        own = sum(p.to_local().numel() for p in model.parameters())
        kept = sum(state["exp_avg"].numel() for state in vote.worker.state.values() if "exp_avg" in state)
        assert kept == (0 if optimizer_class is HybridSignSGD or options.get("momentum") == 0 else own)
        _assert_same_everywhere(model)


def test_one_shard_and_replicas() -> None:
    gang(2).run(_one_shard)


def _one_shard() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    ddp, model = DistributedDataParallel(Net()), _shard(Net(), mesh=mesh["shard"])
    theirs, ours = (SignSGD(m.parameters(), dither=1e-4) for m in (ddp, model))
    MajorityVote(ddp, theirs)
    FSDPMajorityVote(model, ours, replicate_group=mesh["replicate"].get_group())
    for step in range(3):
        theirs.zero_grad()
        ours.zero_grad()
        _loss(ddp, step).backward()
        _loss(model, step).backward()
        theirs.step()
        ours.step()
    _assert_equal(model, ddp.module, "one shard")


# --- precision -------------------------------------------------------------------------------------------------------


class Cast(nn.Module):
    """What MixedPrecisionPolicy(param_dtype) computes, with gradients in the parameters' dtype."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: p.to(self.dtype) for name, p in self.net.named_parameters()}
        out: Tensor = functional_call(self.net, weights, x.to(self.dtype))
        return out


def test_mixed_precision_votes_are_whole_and_momentum_is_that_of_the_parameters() -> None:
    gang(4).run(_mixed)


def _mixed() -> None:
    """FSDP divides what it reduces in float16 by 2 before and after, and votes of four ranks came out as one half."""
    for param_dtype, reduce_dtype in (
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ):
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        ddp, model = DistributedDataParallel(Cast(Net(), param_dtype)), _shard(Net(), mp_policy=policy)
        theirs, ours = (SignSGD(m.parameters(), dither=1e-4) for m in (ddp, model))
        MajorityVote(ddp, theirs)
        vote = FSDPMajorityVote(model, ours)
        for step in range(3):
            theirs.zero_grad()
            ours.zero_grad()
            with torch.backends.mkldnn.flags(enabled=False):  # which on some machines fails for some shapes
                _loss(ddp, step).backward()
                _loss(model, step).backward()
            for p in model.parameters():
                assert torch.equal(p.grad.to_local().abs(), torch.ones_like(p.to_local()))
            theirs.step()
            ours.step()
            _assert_equal(model, ddp.module.net, (param_dtype, reduce_dtype, step))
        assert {state["exp_avg"].dtype for state in vote.worker.state.values()} == {torch.float32}


def test_float64() -> None:
    gang(4).run(_float64)


def _float64() -> None:
    model = fully_shard(nn.Linear(3, 6, bias=False).double())
    optimizer = SignSGD(model.parameters(), lr=1.0)
    FSDPMajorityVote(model, optimizer)
    model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    assert torch.equal(model.weight.grad.full_tensor(), torch.ones(6, 3, dtype=torch.float64))


def test_grad_scaler_skips_the_same_steps_on_all_ranks() -> None:
    counts = gang(2).run(_scaled)
    assert counts == [counts[0]] * 2


def _scaled() -> tuple[int, float]:
    """Of float16 on one rank alone, and in a module of which the other rank has nothing."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float16)
    net = nn.Sequential(nn.Linear(11, 8), nn.Linear(8, 1))
    net.tied = False
    for part in net:
        fully_shard(part, mp_policy=policy)
    model = fully_shard(net, mp_policy=policy)
    optimizer = SignSGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13)
    vote = FSDPMajorityVote(model, optimizer, grad_scaler=scaler)
    assert vote.nonfinite == "skip"
    for step in range(6):
        optimizer.zero_grad()
        x = _batch(step, dist.get_rank())[0] * (50.0 if step < 2 and dist.get_rank() == 1 else 1.0)
        scaler.scale(model(x).float().sum()).backward()
        before = [p.to_local().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True)]
        assert any(moved) == (step >= 2), (step, moved)
    _assert_same_everywhere(model)
    assert max(float(state["exp_avg"].abs().max()) for state in vote.worker.state.values()) < 100  # unscaled
    return int(optimizer.param_groups[0]["step"]), scaler.get_scale()


# --- who votes -------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Which branch is used is up to the caller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.branches[which](x).sum()


def test_who_has_no_gradient_abstains() -> None:
    gang(4).run(_unused, False)
    gang(4).run(_unused, True)


def _unused(replicas: bool) -> None:
    """One worker alone uses branch 1, and its vote counts in full; nobody uses branch 2."""
    net = Branches()
    before = [b.weight.detach().clone() for b in net.branches]
    mesh = init_device_mesh("cpu", (2, 2) if replicas else (1, 4), mesh_dim_names=("replicate", "shard"))
    model: Any = fully_shard(net, mesh=mesh["shard"])
    if not hasattr(model, "set_reduce_scatter_unused_params"):
        return
    model.set_reduce_scatter_unused_params(True)
    optimizer = SignSGD(model.parameters(), lr=0.5)
    vote = FSDPMajorityVote(model, optimizer, replicate_group=mesh["replicate"].get_group() if replicas else None)
    for other in (1, 1, 0):
        optimizer.zero_grad()
        model(torch.tensor([[1.0, -1.0, 2.0, -3.0]]), other if dist.get_rank() == 3 else 0).backward()
        optimizer.step()
    direction = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    after = [p.detach().full_tensor() for p in model.parameters()]
    assert torch.equal(after[0], before[0] - 1.5 * direction)
    assert torch.equal(after[1], before[1] - direction)
    assert torch.equal(after[2], before[2])
    if not replicas:
        mine = ["branches.0.weight", "branches.1.weight"] if dist.get_rank() == 3 else ["branches.0.weight"]
        assert sorted(name for name, state in vote.state_dict()["state"].items() if state) == mine


def test_groups_and_strangers() -> None:
    gang(2).run(_strangers)


def _strangers() -> None:
    """Groups have their own options, in one module too; what is not the optimizer's is averaged."""
    net = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 3), "c": nn.Linear(6, 3)})
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return net["a"](x).sum() + net["b"](x).sum() + net["c"](x).sum()

    model: Any = fully_shard(Wrapped())
    groups = [
        {"params": net["a"].parameters(), "momentum": 0.0, "lr": 0.25},
        {"params": net["b"].parameters(), "seed": 9},
    ]
    optimizer = SignSGD(groups, lr=0.5)
    vote = FSDPMajorityVote(model, optimizer)
    model(torch.full((1, 6), 1.0 + dist.get_rank())).backward()
    assert torch.equal(net["c"].weight.grad.full_tensor(), torch.full((3, 6), 1.5))
    optimizer.step()
    assert torch.equal(net["a"].weight.full_tensor(), before["a.weight"] - 0.25)
    assert torch.equal(net["b"].weight.full_tensor(), before["b.weight"] - 0.5)
    assert not any(state for name, state in vote.state_dict()["state"].items() if "a." in name)


class Offset(nn.Module):
    """Adds what makes the next layer's gradient infinite, and no other's."""

    def __init__(self, offset: list[float]) -> None:
        super().__init__()
        self.offset = torch.tensor(offset)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def _poisoned(nonfinite: str | None, replicas: bool) -> tuple[str, list[list[float]]]:
    """Rank 1's gradient of the second layer is infinite, and that layer has one row: most ranks own nothing of it."""
    torch.manual_seed(0)
    offset = [0.0, torch.inf if dist.get_rank() == 1 else 0.0, 0.0]
    net = nn.Sequential(nn.Linear(3, 3, bias=False), Offset(offset), nn.Linear(3, 1, bias=False))
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2) if replicas else (1, size), mesh_dim_names=("replicate", "shard"))
    for part in (net[0], net[2]):
        fully_shard(part, mesh=mesh["shard"])
    model: Any = fully_shard(net, mesh=mesh["shard"])
    optimizer = SignSGD(model.parameters(), lr=1.0)
    group = mesh["replicate"].get_group() if replicas else None
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if nonfinite == "skip" else None
    vote = FSDPMajorityVote(model, optimizer, nonfinite=nonfinite, grad_scaler=scaler, replicate_group=group)
    said = ""
    try:
        model(torch.ones(1, 3)).sum().backward()
    except CollectiveError as error:
        said = str(error)
    if dist.get_rank() == 1 and not replicas:
        assert not vote.worker.state.get("2.weight")
    if said and hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
        net[1].offset.zero_()
        model(torch.ones(1, 3)).sum().backward()
        assert all(set(p.grad.full_tensor().abs().flatten().tolist()) == {1.0} for p in model.parameters())
        model.zero_grad()
    grads = [p.grad for p in model.parameters()]
    return said, [[] if g is None else g.full_tensor().flatten().tolist() for g in grads]


@pytest.mark.parametrize("replicas", [False, True])
def test_a_gradient_that_is_not_finite(replicas: bool) -> None:
    for said, _ in gang(4).run(_poisoned, None, replicas):
        assert said.startswith(f"the gradient of 2.weight on rank {0 if replicas else 1} is not finite: lower the")
    answers = gang(4).run(_poisoned, "abstain", replicas)
    assert answers == [answers[0]] * 4
    assert {abs(x) for grad in answers[0][1] for x in grad} == {1.0}
    for said, (first, second) in gang(4).run(_poisoned, "skip", replicas):
        assert not said
        assert {abs(x) for x in first} == {1.0}
        assert all(x != x for x in second)


# --- the loop around it ----------------------------------------------------------------------------------------------


def test_a_saved_run_goes_on_as_if_it_had_not_stopped() -> None:
    gang(4).run(_resume, False)
    gang(4).run(_resume, True)
    gang(2).run(_resume_from_ddp)


def _resume(replicas: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2) if replicas else (1, 4), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group() if replicas else None

    def make() -> tuple[Any, HybridSignSGD, FSDPMajorityVote]:
        model = _shard(Net(), mesh=mesh["shard"])
        optimizer = HybridSignSGD(model.parameters(), lr=0.01, switch_step=9, weight_decay=0.1, **RELATIVE)
        return model, optimizer, FSDPMajorityVote(model, optimizer, replicate_group=group)

    def train(run: tuple[Any, HybridSignSGD, FSDPMajorityVote], steps: range) -> None:
        for step in steps:
            run[1].zero_grad()
            _loss(run[0], step).backward()
            run[1].step()

    whole, first, second = make(), make(), make()
    train(whole, range(5))
    train(first, range(3))
    state = copy.deepcopy((first[0].state_dict(), first[1].state_dict(), first[2].state_dict()))
    train(first, range(3, 4))  # what is saved is not shared
    second[0].load_state_dict(state[0])
    second[1].load_state_dict(state[1])
    second[2].load_state_dict(state[2])
    train(second, range(3, 5))
    for p, q in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
    assert first[1].calibrated_lr != second[1].calibrated_lr == whole[1].calibrated_lr
    third = make()
    third[1].load_state_dict(state[1])
    with pytest.raises(RuntimeError, match="taken 3 steps and the last vote was before step 0"):
        train(third, range(1))
    if replicas:
        key = next(key for key in state[2]["state"] if key.startswith("gain"))
        other = {"gain" if "@" in key else "gain@3": state[2]["state"][key]}
        with pytest.raises(ValueError, match=r"the momentum of gain was saved for .* the same shard"):
            third[2].load_state_dict(state[2] | {"state": other})
    with pytest.raises(ValueError, match="saved by 3 workers"):
        third[2].load_state_dict(state[2] | {"world_size": 3})


def _resume_from_ddp() -> None:
    """A worker is the same under both: what one has saved the other goes on with."""
    ddp, model = DistributedDataParallel(Net()), _shard(Net())
    theirs, ours = (SignSGD(m.parameters(), dither=1e-4) for m in (ddp, model))
    their_vote, our_vote = MajorityVote(ddp, theirs), FSDPMajorityVote(model, ours)
    for step in range(3):
        theirs.zero_grad()
        _loss(ddp, step).backward()
        theirs.step()
    for p, q in zip(model.parameters(), ddp.parameters(), strict=True):
        p.detach().to_local().copy_(_own(q.detach(), p))
    ours.load_state_dict(theirs.state_dict())
    our_vote.load_state_dict(their_vote.state_dict())
    for step in range(3, 5):
        theirs.zero_grad()
        ours.zero_grad()
        _loss(ddp, step).backward()
        _loss(model, step).backward()
        theirs.step()
        ours.step()
    _assert_equal(model, ddp.module, "resumed")
    their_vote.load_state_dict(our_vote.state_dict())


def test_distributed_checkpoints() -> None:
    gang(2).run(_checkpoint)


def _checkpoint() -> None:
    """They take a step of their own to make state, which does not count."""
    for optimizer_class, options in ((SignSGD, {}), (HybridSignSGD, {"switch_step": 2, "sgd_momentum": 0.9})):
        runs = []
        for _ in range(2):
            model = _shard(Net())
            optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
            runs.append((model, optimizer, FSDPMajorityVote(model, optimizer)))
        (model, optimizer, vote), (again, fresh, its_vote) = runs
        get_state_dict(model, optimizer)
        assert int(optimizer.param_groups[0]["step"]) == 0
        for step in range(5):
            if step == 3:
                states = copy.deepcopy(get_state_dict(model, optimizer))
                set_state_dict(again, fresh, model_state_dict=states[0], optim_state_dict=states[1])
                its_vote.load_state_dict(copy.deepcopy(vote.state_dict()))
            for m, o, _ in runs if step >= 3 else runs[:1]:
                o.zero_grad()
                _loss(m, step).backward()
                o.step()
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())


def test_a_vote_that_comes_late_goes_on_with_the_momentum() -> None:
    gang(2).run(_late)
    gang(4).run(_late_replicas)


def _late() -> None:
    ddp, model = DistributedDataParallel(Net()), _shard(Net())
    theirs, ours = (SignSGD(m.parameters(), lr=0.01) for m in (ddp, model))
    for step in range(4):
        if step == 2:
            MajorityVote(ddp, theirs)
            FSDPMajorityVote(model, ours)
        theirs.zero_grad()
        ours.zero_grad()
        _loss(ddp, step).backward()
        _loss(model, step).backward()
        theirs.step()
        ours.step()
        _assert_equal(model, ddp.module, step)


def _late_replicas() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group()
    model = _shard(Net(), mesh=mesh["shard"])
    optimizer = SignSGD(model.parameters(), lr=0.01)
    _loss(model, 0).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad.to_local(), group=group)
    optimizer.step()
    momenta = {name: optimizer.state[p]["exp_avg"].to_local().flatten() for name, p in model.named_parameters()}
    vote = FSDPMajorityVote(model, optimizer, replicate_group=group)
    assert not optimizer.state
    for key, state in vote.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], momenta.pop(key.partition("@")[0]))
    optimizer.zero_grad()
    _loss(model, 1).backward()
    for key in vote.state_dict()["state"]:
        name, _, start = key.partition("@")
        assert int(start or 0) == (0 if dist.get_rank() % 2 == 0 else _half(model.get_parameter(name))), key
    assert not momenta


def _half(p: Tensor) -> int:
    return -(-p.shape[0] // 2) * (p.numel() // p.shape[0])


def test_steps_on_local_shards() -> None:
    gang(4).run(_local_steps)


def _local_steps() -> None:
    """Fused, with nothing to do on some ranks, and with a learning rate that starts at 0."""
    engine_steps = []
    step = fused.step

    def counted(tensors: Any, options: Any) -> None:
        engine_steps.append({type(p) for p in tensors.params})
        step(tensors, options)

    model: Any = fully_shard(nn.Linear(4, 2))
    before = model.weight.full_tensor()
    optimizer = SignSGD(model.parameters(), lr=0.0)
    FSDPMajorityVote(model, optimizer)
    fused.step = counted
    try:
        for lr in (0.0, 0.5):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
    finally:
        fused.step = step
    assert int(optimizer.param_groups[0]["step"]) == 2
    assert torch.equal(model.weight.full_tensor(), before - 0.5)
    if fused.missing([torch.empty(1)]) is None:
        assert [isinstance(t, type) and t is not DTensor for types in engine_steps for t in types] == [True] * 2


def test_backward_again() -> None:
    gang(2).run(_again)


def _again() -> None:
    model: Any = fully_shard(nn.Linear(4, 3))
    optimizer = SignSGD(model.parameters(), lr=0.5)
    FSDPMajorityVote(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for to_none in (True, False, True):  # a dropped step, zeros and none are no reason to warn
            model(torch.ones(1, 4)).sum().backward()
            optimizer.zero_grad(set_to_none=to_none)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.warns(UserWarning, match=re.escape("backward again without zero_grad()")):
        model(torch.ones(1, 4)).sum().backward()


def test_a_module_that_is_called_twice_votes_once() -> None:
    gang(2).run(_twice)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(11, 11)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.tanh(self.inner(x))))


def _twice() -> None:
    """And so does one that a checkpoint calls again in backward."""
    for checkpointed, calls in ((None, 2), (False, 2), (True, 1)):
        ddp, net = DistributedDataParallel(Twice()), Twice()
        fully_shard(net.inner)
        model: Any = fully_shard(net)
        theirs, ours = (SignSGD(m.parameters(), lr=0.01, dither=1e-4) for m in (ddp, model))
        MajorityVote(ddp, theirs)
        FSDPMajorityVote(model, ours)
        for step in range(3):
            x = _batch(step, dist.get_rank())[0].requires_grad_()
            theirs.zero_grad()
            ours.zero_grad()
            (ddp(x) + (calls - 1) * ddp.module(x)).square().sum().backward()
            outs = [
                model(x) if checkpointed is None else checkpoint(model, x, use_reentrant=checkpointed)
                for _ in range(calls)
            ]
            sum(outs).square().sum().backward()
            theirs.step()
            ours.step()
            _assert_equal(model, ddp.module, (checkpointed, step))


def test_bytes_on_the_wire() -> None:
    """Bits for the shards of others, and what is padded; the hybrid, and DDP, twice that."""
    sent = gang(4).run(_payload)
    elements, rows = 64 * 37 + 64, 4
    for sign, hybrid in sent:
        assert elements * 3 / 32 <= sign <= elements * 3 / 32 + 8 * 2 * rows + 8 * 3
        assert elements * 3 / 16 <= hybrid <= elements * 3 / 16 + 16 * 2 * rows + 8 * 3


def _payload() -> list[int]:
    own = 3 / 4  # of what a collective moves leaves the rank
    totals = []
    all_to_all, all_gather = dist.all_to_all_single, module.all_gather
    from signstep.distributed import vote as collective

    for optimizer_class in (SignSGD, HybridSignSGD):
        model: Any = fully_shard(nn.Linear(37, 64))
        optimizer = optimizer_class(model.parameters())
        FSDPMajorityVote(model, optimizer)
        sent: list[float] = []

        def counting(function: Callable[..., Any], sent: list[float] = sent) -> Callable[..., Any]:
            def count(out: Tensor, *arguments: Any, **options: Any) -> Any:
                sent.append(out.numel() * out.element_size() * own)
                return function(out, *arguments, **options)

            return count

        dist.all_to_all_single, collective.all_gather = counting(all_to_all), counting(all_gather)
        try:
            model(torch.ones(1, 37)).sum().backward()
        finally:
            dist.all_to_all_single, collective.all_gather = all_to_all, all_gather
        totals.append(int(sum(sent)))
    return totals


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 90)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_bits_are_cut_where_shards_are(shapes: list[tuple[int, int]], ranks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [Part(str(i), None, r * c, -(-r // ranks) * c) for i, (r, c) in enumerate(shapes)]  # type: ignore[arg-type]
    ups = [torch.rand(part.size, generator=generator) > 0.5 for part in parts]
    cut = Routes.of(parts, ranks, torch.device("cpu")).cut(torch.cat([bits.pack(up) for up in ups]))
    first = 0
    for part, up in zip(parts, ups, strict=True):
        for rank in range(ranks):
            begin, count = part.begin(rank), part.count(rank)
            found = bits.bits(cut[rank, first : first + word_count(part.run)], count)
            assert torch.equal(found, up[begin : begin + count])
        first += word_count(part.run)
        table = part.rows(up, ranks)
        assert table.shape == (ranks, part.run)
        assert torch.equal(part.whole(table, 0), up)
    assert cut.shape == (ranks, first)


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    gang(4).run(_refusals)


def _refusals() -> None:
    plain = nn.Linear(8, 8)
    early = SignSGD(plain.parameters())
    with pytest.raises(TypeError, match="expected a model under fully_shard, got Linear"):
        FSDPMajorityVote(plain, early)
    model: Any = fully_shard(plain)
    with pytest.raises(ValueError, match="make it after fully_shard"):
        FSDPMajorityVote(model, early)
    optimizer = SignSGD(model.parameters())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match="Invalid ties: 'up'"):
        FSDPMajorityVote(model, optimizer, ties="up")
    with pytest.raises(ValueError, match="Invalid error_feedback: True with replicate_group"):
        FSDPMajorityVote(model, optimizer, error_feedback=True, replicate_group=mesh["shard"].get_group())
    with pytest.raises(ValueError, match="replicate_group shares ranks"):
        FSDPMajorityVote(model, optimizer, replicate_group=mesh["shard"].get_group())
    with pytest.raises(TypeError, match="a vote needs SignSGD or HybridSignSGD, got SGD"):
        FSDPMajorityVote(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("Invalid state_dtype: torch.int8 with sgd_momentum > 0")):
        FSDPMajorityVote(model, HybridSignSGD(model.parameters(), sgd_momentum=0.5, state_dtype=torch.int8))
    native: Any = fully_shard(nn.Linear(8, 8), mesh=mesh)
    with pytest.raises(ValueError, match="sharded over a 2-D mesh"):
        FSDPMajorityVote(native, SignSGD(native.parameters()))
    columns: Any = fully_shard(nn.Linear(8, 8, bias=False), shard_placement_fn=lambda p: Shard(1))
    with pytest.raises(ValueError, match=re.escape("weight is sharded as (Shard(dim=1),)")):
        FSDPMajorityVote(columns, SignSGD(columns.parameters()))
    with torch.device("meta"):
        empty: Any = nn.Linear(8, 8)
    fully_shard(empty)
    with pytest.raises(ValueError, match="on the meta device"):
        FSDPMajorityVote(empty, SignSGD(empty.parameters()))
    mixed: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    fully_shard(mixed[0], mesh=mesh["shard"])
    fully_shard(mixed)
    with pytest.raises(ValueError, match="takes one mesh"):
        FSDPMajorityVote(mixed, SignSGD(mixed.parameters()))

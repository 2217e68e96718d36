"""Majority vote under FSDP2: the same steps as under DDP, bit for bit, for every option and precision."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_cases import (
    RELATIVE,
    Branches,
    Net,
    Options,
    assert_equal,
    assert_same_everywhere,
    batch_of,
    loss_of,
    needs_custom_reduce_scatter,
    own_rows,
    shard,
    train_step,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from gang import gang, on_ranks
from signstep import HybridSignSGD, SignSGD
from signstep.distributed import MajorityVote
from signstep.distributed.fsdp import FSDPMajorityVote

pytestmark = needs_custom_reduce_scatter


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
    model = shard(Net(**net), **sharding)
    theirs = optimizer_class(ddp.parameters(), **options)
    ours = optimizer_class(model.parameters(), **options)
    MajorityVote(ddp, theirs, **vote)
    with torch.no_grad():
        loss_of(model, 0)  # leaves the root's own parameters as they were gathered
    FSDPMajorityVote(model, ours, **vote)
    for step in range(steps):
        theirs.zero_grad()
        ours.zero_grad()
        for part in range(slices):
            last = part == slices - 1
            ddp.require_backward_grad_sync = last
            model.set_requires_gradient_sync(last)
            loss_of(ddp, slices * step + part).backward()
            loss_of(model, slices * step + part).backward()
        theirs.step()
        ours.step()
        assert_equal(model, ddp.module, step)
    assert_same_everywhere(model)
    return ours


def _follow_all(cases: list[str], steps: int) -> None:
    for name in cases:
        try:
            _follow(*CASES[name], steps, 1, SignSGD)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


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


@pytest.mark.slow
def test_takes_the_steps_of_ddp() -> None:
    gang(4).run(_follow_all, list(CASES), 2)


@pytest.mark.parametrize("size", [1, 2])
def test_takes_the_steps_of_ddp_on_few_ranks(size: int) -> None:
    gang(size).run(_follow_all, ["relative dither", "coupled decay", "ties abstain", "8-bit momentum"], 3)


@pytest.mark.long
def test_thirty_steps() -> None:
    gang(4).run(_follow_all, ["absolute dither", "tied and frozen"], 30)


def test_accumulated_gradients_are_voted_on_once() -> None:
    gang(2).run(_follow, {}, {"dither": 1e-4}, {}, {}, 4, 3, SignSGD)


@on_ranks(2)
def test_hybrid_takes_the_steps_of_ddp_before_and_after_the_switch() -> None:
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


def _switch() -> tuple[list[str], list[float]]:
    """On four ranks the means differ by rounding; calibration is that of DDP."""
    ddp, model = DistributedDataParallel(Net()), shard(Net())
    theirs, ours = (HybridSignSGD(m.parameters(), lr=0.01, switch_step=4) for m in (ddp, model))
    MajorityVote(ddp, theirs)
    vote = FSDPMajorityVote(model, ours)
    phases = []
    for step in range(6):
        train_step(step, (ddp, theirs), (model, ours))
        phases.append(ours.phase)
    assert ours.calibrated_lr == pytest.approx(theirs.calibrated_lr, rel=1e-6)
    assert min(ours.calibrated_lr) > 0
    for p, q in zip(model.parameters(), ddp.parameters(), strict=True):
        torch.testing.assert_close(p.to_local(), own_rows(q, p), rtol=1e-5, atol=1e-6)
    assert not vote.worker.state
    assert_same_everywhere(model)
    return phases, ours.calibrated_lr


@on_ranks(2)
def test_calibration_goes_by_what_takes_part_in_the_step() -> None:
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
        x = batch_of(step, dist.get_rank())[0][:, :4]
        ddp(x, step % 3).backward()
        model(x, step % 3).backward()
        theirs.step()
        ours.step()
        assert ours.calibrated_lr == theirs.calibrated_lr, step
        assert_equal(model, ddp.module, step)


@pytest.mark.slow
@on_ranks(4)
def test_replicas_vote_as_workers_of_ddp_with_both_batches() -> None:
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
        model = shard(Net(), mesh=mesh["shard"])
        theirs, ours = optimizer_class(ddp.parameters(), **options), optimizer_class(model.parameters(), **options)
        MajorityVote(ddp, theirs)
        vote = FSDPMajorityVote(model, ours, replicate_group=group)
        assert (vote.rank, vote.world_size) == (dist.get_rank() // 2, 2)
        for step in range(4):
            theirs.zero_grad()
            ours.zero_grad()
            with ddp.no_sync():
                (loss_of(ddp, step, partners[0]) * 0.5).backward()
            (loss_of(ddp, step, partners[1]) * 0.5).backward()
            loss_of(model, step).backward()
            theirs.step()
            ours.step()
            if tolerance == 0.0 and step < 3:
                assert_equal(model, ddp.module, (options, step))
        for p, q in zip(model.parameters(), ddp.parameters(), strict=True):
            differing = (p.to_local() - own_rows(q, p)).abs() > 1e-6
            assert differing.double().mean().nan_to_num() <= tolerance, options
        own = sum(p.to_local().numel() for p in model.parameters())
        kept = sum(state["exp_avg"].numel() for state in vote.worker.state.values() if "exp_avg" in state)
        assert kept == (0 if optimizer_class is HybridSignSGD or options.get("momentum") == 0 else own)
        assert_same_everywhere(model)


@on_ranks(2)
def test_one_shard_and_replicas() -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    ddp, model = DistributedDataParallel(Net()), shard(Net(), mesh=mesh["shard"])
    theirs, ours = (SignSGD(m.parameters(), dither=1e-4) for m in (ddp, model))
    MajorityVote(ddp, theirs)
    FSDPMajorityVote(model, ours, replicate_group=mesh["replicate"].get_group())
    for step in range(3):
        train_step(step, (ddp, theirs), (model, ours))
    assert_equal(model, ddp.module, "one shard")


class Cast(nn.Module):
    """What MixedPrecisionPolicy(param_dtype) computes, with gradients in the parameters' dtype."""

    def __init__(self, net: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: p.to(self.dtype) for name, p in self.net.named_parameters()}
        out: Tensor = functional_call(self.net, weights, x.to(self.dtype))
        return out


@on_ranks(4)
def test_mixed_precision_votes_are_whole_and_momentum_is_that_of_the_parameters() -> None:
    """FSDP divides what it reduces in float16 by 2 before and after, and votes of four ranks came out as one half."""
    for param_dtype, reduce_dtype in (
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ):
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        ddp, model = DistributedDataParallel(Cast(Net(), param_dtype)), shard(Net(), mp_policy=policy)
        theirs, ours = (SignSGD(m.parameters(), dither=1e-4) for m in (ddp, model))
        MajorityVote(ddp, theirs)
        vote = FSDPMajorityVote(model, ours)
        for step in range(3):
            theirs.zero_grad()
            ours.zero_grad()
            with torch.backends.mkldnn.flags(enabled=False):  # which on some machines fails for some shapes
                loss_of(ddp, step).backward()
                loss_of(model, step).backward()
            for p in model.parameters():
                assert torch.equal(p.grad.to_local().abs(), torch.ones_like(p.to_local()))
            theirs.step()
            ours.step()
            assert_equal(model, ddp.module.net, (param_dtype, reduce_dtype, step))
        assert {state["exp_avg"].dtype for state in vote.worker.state.values()} == {torch.float32}


@on_ranks(4)
def test_float64() -> None:
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
        x = batch_of(step, dist.get_rank())[0] * (50.0 if step < 2 and dist.get_rank() == 1 else 1.0)
        scaler.scale(model(x).float().sum()).backward()
        before = [p.to_local().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p.to_local(), b) for p, b in zip(model.parameters(), before, strict=True)]
        assert any(moved) == (step >= 2), (step, moved)
    assert_same_everywhere(model)
    assert max(float(state["exp_avg"].abs().max()) for state in vote.worker.state.values()) < 100  # unscaled
    return int(optimizer.param_groups[0]["step"]), scaler.get_scale()

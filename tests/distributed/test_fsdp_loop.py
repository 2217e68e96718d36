"""Majority vote under FSDP2 in a training loop: who votes, what is saved, and backward in all its ways."""

import copy
import re
import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_cases import (
    RELATIVE,
    Branches,
    Net,
    assert_equal,
    batch_of,
    loss_of,
    needs_custom_reduce_scatter,
    own_rows,
    shard,
    train_step,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gang import gang, on_ranks
from signstep import HybridSignSGD, SignSGD
from signstep.distributed import CollectiveError, MajorityVote
from signstep.distributed.fsdp import FSDPMajorityVote
from signstep.kernels import fused

pytestmark = needs_custom_reduce_scatter


@pytest.mark.parametrize("replicas", [False, True])
@on_ranks(4)
def test_who_has_no_gradient_abstains(replicas: bool) -> None:
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


@on_ranks(2)
def test_groups_and_strangers() -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [False, True])
@on_ranks(4)
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(replicas: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2) if replicas else (1, 4), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group() if replicas else None

    def make() -> tuple[Any, HybridSignSGD, FSDPMajorityVote]:
        model = shard(Net(), mesh=mesh["shard"])
        optimizer = HybridSignSGD(model.parameters(), lr=0.01, switch_step=9, weight_decay=0.1, **RELATIVE)
        return model, optimizer, FSDPMajorityVote(model, optimizer, replicate_group=group)

    def train(run: tuple[Any, HybridSignSGD, FSDPMajorityVote], steps: range) -> None:
        for step in steps:
            train_step(step, run[:2])

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


@on_ranks(2)
def test_a_worker_resumes_what_the_other_wrapper_saved() -> None:
    """A worker is the same under both: what one has saved the other goes on with."""
    ddp, model = DistributedDataParallel(Net()), shard(Net())
    theirs, ours = (SignSGD(m.parameters(), dither=1e-4) for m in (ddp, model))
    their_vote, our_vote = MajorityVote(ddp, theirs), FSDPMajorityVote(model, ours)
    for step in range(3):
        train_step(step, (ddp, theirs))
    for p, q in zip(model.parameters(), ddp.parameters(), strict=True):
        p.detach().to_local().copy_(own_rows(q.detach(), p))
    ours.load_state_dict(theirs.state_dict())
    our_vote.load_state_dict(their_vote.state_dict())
    for step in range(3, 5):
        train_step(step, (ddp, theirs), (model, ours))
    assert_equal(model, ddp.module, "resumed")
    their_vote.load_state_dict(our_vote.state_dict())


@pytest.mark.parametrize(
    "cases",
    [
        # A kind and a moment.
        [(0, 1), (1, 1), (1, 2), (2, 2), (3, 4)],
        pytest.param([(0, 2), (0, 4), (1, 4), (2, 1), (2, 4), (3, 1), (3, 2)], marks=pytest.mark.long),
    ],
    ids=["few", "others"],
)
@on_ranks(2)
def test_distributed_checkpoints(cases: list[tuple[int, int]]) -> None:
    """Before, at and after the switch; they take a step of their own to make state, which does not count."""
    folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    hybrid = {"switch_step": 2, "calibration": "ratio"}
    kinds: list[tuple[type[SignSGD], dict[str, Any]]] = [
        (SignSGD, {}),
        (HybridSignSGD, hybrid | {"sgd_momentum": 0.9}),
        (HybridSignSGD, hybrid | {"sgd_momentum": 0.9, "momentum": 0.0}),
        (HybridSignSGD, hybrid | {"sgd_momentum": 0.0}),
    ]

    def state(model: Any, optimizer: SignSGD) -> dict[str, Any]:
        parts = get_state_dict(model, optimizer)
        return {"model": parts[0], "optimizer": parts[1]}

    for kind, saved in cases:
        optimizer_class, options = kinds[kind]
        runs = []
        for _ in range(2):
            model = shard(Net())
            optimizer = optimizer_class(model.parameters(), lr=0.01, **options)
            runs.append((model, optimizer, FSDPMajorityVote(model, optimizer)))
        (model, optimizer, vote), (again, fresh, its_vote) = runs
        get_state_dict(model, optimizer)
        assert int(optimizer.param_groups[0]["step"]) == 0
        for step in range(6):
            if step == saved:
                place = f"{folder[0]}/{kind}-{saved}"
                dcp.save(state(model, optimizer), checkpoint_id=place)
                loaded = state(again, fresh)
                dcp.load(loaded, checkpoint_id=place)
                set_state_dict(again, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
                its_vote.load_state_dict(copy.deepcopy(vote.state_dict()))
            for m, o, _ in runs if step >= saved else runs[:1]:
                train_step(step, (m, o))
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local()), (kind, saved)


@on_ranks(2)
def test_a_vote_that_comes_late_goes_on_with_the_momentum() -> None:
    ddp, model = DistributedDataParallel(Net()), shard(Net())
    theirs, ours = (SignSGD(m.parameters(), lr=0.01) for m in (ddp, model))
    for step in range(4):
        if step == 2:
            MajorityVote(ddp, theirs)
            FSDPMajorityVote(model, ours)
        train_step(step, (ddp, theirs), (model, ours))
        assert_equal(model, ddp.module, step)


@on_ranks(4)
def test_a_vote_of_replicas_that_comes_late_goes_on_with_the_momentum() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh["replicate"].get_group()
    model = shard(Net(), mesh=mesh["shard"])
    optimizer = SignSGD(model.parameters(), lr=0.01)
    loss_of(model, 0).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad.to_local(), group=group)
    optimizer.step()
    momenta = {name: optimizer.state[p]["exp_avg"].to_local().flatten() for name, p in model.named_parameters()}
    vote = FSDPMajorityVote(model, optimizer, replicate_group=group)
    assert not optimizer.state
    for key, state in vote.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], momenta.pop(key.partition("@")[0]))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    for key in vote.state_dict()["state"]:
        name, _, start = key.partition("@")
        assert int(start or 0) == (0 if dist.get_rank() % 2 == 0 else _half(model.get_parameter(name))), key
    assert not momenta


def _half(p: Tensor) -> int:
    return -(-p.shape[0] // 2) * (p.numel() // p.shape[0])


@on_ranks(4)
def test_steps_on_local_shards() -> None:
    """Fused, with nothing to do on some ranks, and with a learning rate that starts at 0."""
    engine_steps = []
    step = fused.step

    def counted(tensors: Any, options: Any, *, demanded: bool) -> None:
        engine_steps.append({type(p) for p in tensors.params})
        step(tensors, options, demanded=demanded)

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


@on_ranks(2)
def test_backward_again() -> None:
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


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(11, 11)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.tanh(self.inner(x))))


@on_ranks(2)
def test_a_module_that_is_called_twice_votes_once() -> None:
    """And so does one that a checkpoint calls again in backward."""
    for checkpointed, calls in ((None, 2), (False, 2), (True, 1)):
        ddp, net = DistributedDataParallel(Twice()), Twice()
        fully_shard(net.inner)
        model: Any = fully_shard(net)
        theirs, ours = (SignSGD(m.parameters(), lr=0.01, dither=1e-4) for m in (ddp, model))
        MajorityVote(ddp, theirs)
        FSDPMajorityVote(model, ours)
        for step in range(3):
            x = batch_of(step, dist.get_rank())[0].requires_grad_()
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
            assert_equal(model, ddp.module, (checkpointed, step))

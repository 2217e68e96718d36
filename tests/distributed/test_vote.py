"""Majority vote under DDP: real processes against a slow vote that reads like the paper, and every trap of the wire."""

from __future__ import annotations

import copy
import gc
import io
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang
from signstep import HybridSignSGD, SignSGD
from signstep.distributed import CollectiveError, MajorityVote, resplit
from signstep.distributed.worker import in_memory_order, worker_seed
from signstep.kernels import bits, reference
from signstep.kernels.reference import TIE_COINS, ZERO_COINS, Segment
from signstep.optim import attach_to_backward
from signstep.optim.dither import dither_std


class SlowVote:
    """Every worker's momentum, sign and ballot, one parameter after another; the same on each rank."""

    def __init__(self, params: list[Tensor], size: int, **options: Any) -> None:
        self.params, self.size = params, size
        self.lr, self.beta = options.get("lr", 1e-3), options.get("momentum", 0.9)
        self.seed, self.alpha = options.get("seed", 0), options.get("dither", 0.0)
        self.decay, self.abstain = options.get("weight_decay", 0.0), options.get("ties") == "abstain"
        self.momenta = [[torch.zeros(p.numel()) for p in params] for _ in range(size)]
        self.step_count = 0

    def step(self, gradients: list[list[Tensor | None]]) -> None:
        """One step on the gradients of every worker; None abstains."""
        step = torch.tensor(self.step_count)
        moved = False
        for i, p in enumerate(self.params):
            segment = Segment(i, 0, p.numel())
            ups = []
            for w in range(self.size):
                grad = gradients[w][i]
                if grad is None:
                    continue
                m = self.momenta[w][i]
                m.lerp_(in_memory_order(grad), 1 - self.beta) if self.beta > 0 else m.copy_(in_memory_order(grad))
                seed = worker_seed(self.seed, w)
                up = m > 0
                if self.alpha > 0:
                    sigma = dither_std(step, self.alpha, 0.55)
                    (d,) = reference.directions([m], [sigma], [segment], seed=seed, step=step, position="pre")
                    up = d > 0
                coin = bits.coins(segment, ZERO_COINS, seed=seed, step=step, device=m.device)
                ups.append(torch.where(m == 0, coin, up))
            if not ups:
                continue
            moved = True
            balance = sum(torch.where(up, 1, -1) for up in ups)
            assert isinstance(balance, Tensor)
            coin = bits.coins(segment, TIE_COINS, seed=self.seed, step=step, device=p.device)
            tied = torch.zeros(p.numel()) if self.abstain else torch.where(coin, 1.0, -1.0)
            vote = torch.where(balance == 0, tied, torch.sign(balance).float())
            if self.decay:
                p.mul_(1 - self.lr * self.decay)
            in_memory_order(p).add_(vote, alpha=-self.lr)
        self.step_count += moved


def _share(mine: list[Tensor | None]) -> list[list[Tensor | None]]:
    """Every rank's gradients, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def _net(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "conv":
        net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 5, 3), nn.Flatten(), nn.Linear(80, 4))
        return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return nn.Sequential(nn.Linear(11, 37), nn.ReLU(), nn.Linear(37, 23), nn.ReLU(), nn.Linear(23, 4))


def _batch(kind: str, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    shape = (6, 3, 8, 8) if kind == "conv" else (6, 11)
    x = torch.randn(shape, generator=generator)
    return x.to(memory_format=torch.channels_last) if kind == "conv" else x, torch.randint(
        0, 4, (6,), generator=generator
    )


def _equal_everywhere(net: nn.Module) -> bool:
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    return all(torch.equal(flat, other) for [other] in _share([flat]) if other is not None)


def _follow(
    kind: str, ddp: dict[str, Any], options: dict[str, Any], vote: dict[str, Any], steps: int, slices: int
) -> int:
    net = _net(kind)
    twin = copy.deepcopy(net)
    model = DistributedDataParallel(net, **ddp)
    optimizer = SignSGD(model.parameters(), **options)
    MajorityVote(model, optimizer, **vote)
    slow = SlowVote([p.data for p in twin.parameters()], dist.get_world_size(), **options, **vote)
    for step in range(steps):
        twin.zero_grad()
        optimizer.zero_grad()
        for part in range(slices):
            x, y = _batch(kind, slices * step + part)
            F.cross_entropy(twin(x), y).backward()
            if part < slices - 1:
                with model.no_sync():
                    F.cross_entropy(model(x), y).backward()
            else:
                F.cross_entropy(model(x), y).backward()
        optimizer.step()
        slow.step(_share([p.grad for p in twin.parameters()]))
        for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours, theirs), (step, name)
    assert _equal_everywhere(net)
    return steps


SMALL_BUCKETS = {"bucket_cap_mb": 0.001}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one bucket": ("linear", {}, {}, {}),
    "buckets that are rebuilt": ("linear", SMALL_BUCKETS, {"dither": 1e-4}, {}),
    "static graph": ("linear", SMALL_BUCKETS | {"static_graph": True}, {}, {}),
    "find_unused_parameters": ("linear", SMALL_BUCKETS | {"find_unused_parameters": True}, {}, {}),
    "gradient_as_bucket_view": ("linear", SMALL_BUCKETS | {"gradient_as_bucket_view": True}, {"momentum": 0.0}, {}),
    "channels_last": ("conv", SMALL_BUCKETS, {"dither": 1e-4, "weight_decay": 0.1}, {}),
    "channels_last, views": ("conv", {"gradient_as_bucket_view": True}, {}, {"ties": "abstain"}),
    "ties abstain": ("linear", SMALL_BUCKETS, {"seed": 5}, {"ties": "abstain"}),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_follows_the_slow_vote(size: int) -> None:
    for kind, ddp, options, vote in CASES.values():
        assert gang(size).run(_follow, kind, ddp, options, vote, 6, 1) == [6] * size


def test_gradients_accumulated_in_no_sync_are_voted_on_once() -> None:
    gang(2).run(_follow, "linear", SMALL_BUCKETS, {}, {}, 5, 3)


def test_many_buckets_many_steps() -> None:
    """A second collective chained to the first on gloo hung here."""
    gang(3).run(_many_buckets)


def _many_buckets() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(10, 10) for _ in range(29)])
    model = DistributedDataParallel(net, bucket_cap_mb=0.0001)
    optimizer = SignSGD(model.parameters())
    vote = MajorityVote(model, optimizer)
    buckets = set()
    reduce = vote.reduce
    vote.reduce = lambda bucket: (buckets.add(bucket.index), reduce(bucket))[1]  # type: ignore[method-assign,func-returns-value]
    for step in range(30):
        optimizer.zero_grad()
        model(torch.randn(2, 10) + dist.get_rank() + step).sum().backward()
        optimizer.step()
    assert len(buckets) > 20
    assert _equal_everywhere(net)


class Branches(nn.Module):
    """Which branch is used is up to the caller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(4, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return self.branches[which](x).sum()


def test_who_has_no_gradient_abstains() -> None:
    gang(3).run(_unused)


def _unused() -> None:
    """Rank 2 alone uses branch 1, and its vote counts in full; nobody uses branch 2."""
    net = Branches()
    before = [b.weight.detach().clone() for b in net.branches]
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = SignSGD(model.parameters(), lr=0.5)
    vote = MajorityVote(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([[1.0, -1.0, 2.0, -3.0]]), int(dist.get_rank() == 2)).backward()
        optimizer.step()
    direction = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert torch.equal(net.branches[0].weight, before[0] - direction)
    assert torch.equal(net.branches[1].weight, before[1] - direction)
    assert torch.equal(net.branches[2].weight, before[2])
    assert net.branches[2].weight.grad is None
    mine = "branches.1.weight" if dist.get_rank() == 2 else "branches.0.weight"
    assert [name for name, state in vote.state_dict()["state"].items() if state] == [mine]


def test_a_zero_gradient_is_a_vote() -> None:
    gang(1).run(_zero_gradient)


def _zero_gradient() -> None:
    """Exact zeros cast coins; momentum of the past goes on deciding."""
    net = nn.Linear(1000, 1, bias=False)
    before = net.weight.detach().clone()
    model = DistributedDataParallel(net)
    optimizer = SignSGD(model.parameters(), lr=1.0)
    MajorityVote(model, optimizer)
    (model(torch.ones(1, 1000)) * 0).sum().backward()
    assert torch.equal(net.weight.grad.abs(), torch.ones(1, 1000))  # type: ignore[union-attr]
    optimizer.step()
    ups = int((before - net.weight > 0).sum())
    assert abs(ups - 500) < 5 * 15.8  # 5 standard deviations of 1000 coins
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.zero_grad()
    model(torch.ones(1, 1000)).sum().backward()
    optimizer.zero_grad()
    (model(torch.ones(1, 1000)) * 0).sum().backward()
    assert torch.equal(net.weight.grad, torch.ones(1, 1000))


def test_ranks_that_have_joined_abstain() -> None:
    gang(3).run(_join)


def _join() -> None:
    """Rank r has r + 1 batches; with a sign of 0 for absentees two joined ranks would outvote the last one."""
    net = nn.Linear(5, 1, bias=False)
    nn.init.zeros_(net.weight)
    model = DistributedDataParallel(net)
    optimizer = SignSGD(model.parameters(), lr=1.0, momentum=0.0)
    MajorityVote(model, optimizer)
    with model.join():
        for _ in range(dist.get_rank() + 1):
            optimizer.zero_grad()
            model(-torch.ones(1, 5)).sum().backward()
            optimizer.step()
    assert torch.equal(net.weight, torch.full((1, 5), 3.0)), net.weight


@pytest.mark.parametrize("hybrid", [False, True])
def test_join_leaves_all_ranks_at_the_same_step(hybrid: bool) -> None:
    """Three epochs with uneven batches: counts, phases and weights stay equal."""
    gang(2).run(_epochs_with_join, hybrid)


def _epochs_with_join(hybrid: bool) -> None:
    net = _net("linear")
    model = DistributedDataParallel(net)
    options = {"lr": 1e-3, "dither": 1e-4}
    optimizer = (
        HybridSignSGD(model.parameters(), switch_step=8, calibration="ratio", **options)
        if hybrid
        else SignSGD(model.parameters(), **options)
    )
    MajorityVote(model, optimizer)
    for epoch in range(3):
        with model.join():
            for step in range(2 + 2 * dist.get_rank()):
                x, y = _batch("linear", 10 * epoch + step)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        group = optimizer.param_groups[0]
        states = _share([group["step"].clone(), torch.tensor(float(group.get("calibrated_lr", 0)))])
        assert states[0][0] == 4 * (epoch + 1) or hybrid
        assert torch.equal(states[0][1], states[1][1])  # type: ignore[arg-type]
        assert len({str(getattr(optimizer, "phase", "sign"))}) == 1
        assert _equal_everywhere(net)


def test_a_round_without_voters_is_a_step_without_a_move() -> None:
    gang(2).run(_nobody)


def _nobody() -> None:
    for hybrid in (False, True):
        net = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(net.weight)
        model = DistributedDataParallel(net)
        optimizer = (HybridSignSGD if hybrid else SignSGD)(model.parameters(), lr=1.0)
        MajorityVote(model, optimizer, nonfinite="abstain")
        for scale in (torch.nan, 1.0, torch.nan, 1.0):
            optimizer.zero_grad()
            (model(torch.ones(1, 4)).sum() * scale).backward()
            optimizer.step()
        assert torch.equal(net.weight, torch.full((1, 4), -2.0)), net.weight


def test_a_closed_hook_refuses_and_a_dropped_one_is_freed() -> None:
    gang(2).run(_closed)


def _closed() -> None:
    others = set(threading.enumerate())
    model = DistributedDataParallel(nn.Linear(3, 1))
    optimizer = SignSGD(model.parameters())
    vote = MajorityVote(model, optimizer)
    model(torch.ones(1, 3)).sum().backward()
    vote.close()
    vote.close()
    with pytest.raises(RuntimeError, match="MajorityVote has been closed: wrap the module anew"):
        model(torch.ones(1, 3)).sum().backward()
    alive = [weakref.ref(x) for x in (model, vote)]
    del model, optimizer, vote
    gc.collect()
    assert [x() for x in alive] == [None, None]
    model = DistributedDataParallel(nn.Linear(3, 1))
    MajorityVote(model, SignSGD(model.parameters()))
    model(torch.ones(1, 3)).sum().backward()
    assert set(threading.enumerate()) > others
    del model
    gc.collect()
    # A thread that is alive when the interpreter ends takes the process with it.
    assert set(threading.enumerate()) == others


def test_momentum_of_another_size_is_refused() -> None:
    gang(1).run(_short)


def _short() -> None:
    model, optimizer, vote = _vote()
    x, y = _batch("linear", 0)
    F.cross_entropy(model(x), y).backward()
    state = vote.state_dict()
    state["state"]["0.weight"]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of 0\.weight was saved with 3 elements, the parameter has 407"):
        vote.load_state_dict(state)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="add_param_group after MajorityVote"):
        F.cross_entropy(model(x), y).backward()


def test_dtypes_groups_and_strangers() -> None:
    gang(2).run(_mixture)


def _mixture() -> None:
    """Two float dtypes are two buckets; groups have their own beta; who is not the optimizer's is averaged."""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"a": nn.Linear(6, 3), "b": nn.Linear(6, 3).double(), "c": nn.Linear(6, 3), "frozen": nn.Linear(6, 3)}
    )
    net["frozen"].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return net["a"](x).sum() + net["b"](x.double()).sum().float() + net["c"](x).sum() + net["frozen"](x).sum()

    model = DistributedDataParallel(Wrapped())
    groups = [
        {"params": net["a"].parameters(), "momentum": 0.0, "lr": 0.25},
        {"params": net["b"].parameters(), "seed": 9},
    ]
    optimizer = SignSGD(groups, lr=0.5)
    vote = MajorityVote(model, optimizer)
    x = torch.full((1, 6), 1.0 + dist.get_rank())
    model(x).backward()
    assert torch.equal(net["c"].weight.grad, torch.full((3, 6), 1.5))
    optimizer.step()
    assert torch.equal(net["a"].weight, before["a.weight"] - 0.25)
    assert torch.equal(net["b"].weight, before["b.weight"] - 0.5)
    assert net["frozen"].weight.grad is None
    assert set(vote.state_dict()["state"]["net.b.weight"]) == {"exp_avg"}
    assert not any(state for name, state in vote.state_dict()["state"].items() if "a." in name)


def test_a_subgroup_of_the_ranks_votes_among_itself() -> None:
    gang(4).run(_subgroup)


def _subgroup() -> None:
    rank = dist.get_rank()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    net = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(net.weight)
    model = DistributedDataParallel(net, process_group=halves[rank // 2])
    optimizer = SignSGD(model.parameters(), lr=1.0)
    vote = MajorityVote(model, optimizer)
    assert (vote.rank, vote.world_size) == (rank % 2, 2)
    model(torch.ones(1, 4) * (1 if rank < 2 else -1)).sum().backward()
    optimizer.step()
    assert torch.equal(net.weight, torch.full((1, 4), -1.0 if rank < 2 else 1.0))


def _poisoned(nonfinite: str | None) -> tuple[str, list[float], list[float]]:
    """Rank 1's gradient of the second layer is infinite."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False))
    model = DistributedDataParallel(net, bucket_cap_mb=0.00001)
    optimizer = SignSGD(model.parameters(), lr=1.0)
    vote = MajorityVote(model, optimizer, nonfinite=nonfinite)
    if dist.get_rank() == 1:
        net[1].weight.register_hook(lambda g: g * torch.tensor([1.0, torch.inf, 1.0]))
    said = ""
    try:
        model(torch.ones(1, 3)).sum().backward()
    except CollectiveError as error:
        said = str(error)
    grads = [p.grad.flatten().tolist() if p.grad is not None else [] for p in net.parameters()]
    if dist.get_rank() == 1:
        assert "1.weight" not in vote.worker.state
    return said, grads[0], grads[1]


def test_a_gradient_that_is_not_finite_is_named_on_all_ranks() -> None:
    said = [answer[0] for answer in gang(3).run(_poisoned, None)]
    assert said[0].startswith("the gradient of 1.weight on rank 1 is not finite: ")
    assert said == [said[0]] * 3


def test_a_gradient_that_is_not_finite_abstains() -> None:
    answers = gang(3).run(_poisoned, "abstain")
    assert answers == [answers[0]] * 3
    assert answers[0][0] == ""
    assert {abs(x) for x in answers[0][2]} == {1.0}


def test_grad_scaler_skips_what_overflowed_anywhere_and_scales_the_rest() -> None:
    gang(2).run(_scaled)


def _scaled() -> None:
    net = nn.Linear(8, 1, bias=False)
    nn.init.zeros_(net.weight)
    model = DistributedDataParallel(net)
    optimizer = HybridSignSGD(model.parameters(), lr=0.5, switch_step=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    vote = MajorityVote(model, optimizer, grad_scaler=scaler)
    steps = []
    for overflow in (True, False, False):
        optimizer.zero_grad()
        loss = model(torch.full((1, 8), 3.0)).sum()
        scaler.scale(loss * (1e30 if overflow and dist.get_rank() == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        if not overflow:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        steps.append((int(optimizer.param_groups[0]["step"]), vote.worker.steps[0]))
    assert steps == [(0, 0), (1, 1), (2, 2)]
    assert torch.equal(net.weight, torch.full((1, 8), -1.0))
    assert scaler.get_scale() == 2.0**39
    # In the gradient's own units, with the finite gradient that rank 0 had at the skipped step.
    m = 3 * (1 - 0.9 ** (3 - dist.get_rank()))
    torch.testing.assert_close(vote.state_dict()["state"]["weight"]["exp_avg"], torch.full((8,), m))


def test_autocast() -> None:
    gang(2).run(_autocast)


def _autocast() -> None:
    torch.manual_seed(0)
    net = nn.Linear(16, 4)
    model = DistributedDataParallel(net)
    optimizer = SignSGD(model.parameters())
    MajorityVote(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        x = torch.randn(4, 16)
    with torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    assert _equal_everywhere(net)


def test_backward_twice_without_zero_grad_warns() -> None:
    gang(2).run(_no_zero_grad)


def _no_zero_grad() -> None:
    net = nn.Linear(3, 1)
    model = DistributedDataParallel(net)
    optimizer = SignSGD(model.parameters())
    MajorityVote(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            with model.no_sync():
                model(torch.ones(1, 3)).sum().backward()
            model(torch.ones(1, 3)).sum().backward()
    with pytest.warns(UserWarning, match="backward again without zero_grad"):
        model(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize("after_switch", ["mean", "bf16", "powersgd"])
@pytest.mark.parametrize("sgd_momentum", [0.0, 0.9])
def test_hybrid_switches_everywhere_at_once(after_switch: str, sgd_momentum: float) -> None:
    gang(3).run(_hybrid, after_switch, sgd_momentum)


def _hybrid(after_switch: str, sgd_momentum: float) -> None:
    net = _net("linear")
    model = DistributedDataParallel(net, bucket_cap_mb=0.001)
    optimizer = HybridSignSGD(
        model.parameters(), lr=3e-3, switch_step=5, calibration="ratio", sgd_momentum=sgd_momentum, ema_decay=0.5
    )
    vote = MajorityVote(model, optimizer, after_switch=after_switch)
    first = next(iter(net.parameters()))
    rates, phases = [], []
    inner = square = 0.0
    for step in range(12):
        x, y = _batch("linear", step)
        own = copy.deepcopy(net)
        F.cross_entropy(own(x), y).backward()
        gradients = _share([p.grad for p in own.parameters()])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step < 5:
            votes = torch.cat([p.grad.flatten() for p in net.parameters()]).double()  # type: ignore[union-attr]
            flats = [torch.cat([g.flatten() for g in each]).double() for each in gradients]  # type: ignore[union-attr]
            inner = 0.5 * inner + 0.5 * float(sum(votes @ f for f in flats)) / 3
            square = 0.5 * square + 0.5 * float(sum(f @ f for f in flats)) / 3
        elif after_switch == "mean":
            mean = sum(each[0] for each in gradients) / 3  # type: ignore[misc]
            torch.testing.assert_close(first.grad, mean)
        if step == 5:
            momentum = vote.state_dict()["state"]
            assert not momentum
        optimizer.step()
        rates.append(optimizer.calibrated_lr)
        phases.append(optimizer.phase)
        if step == 4:
            assert optimizer.calibrated_lr == pytest.approx(3e-3 * max(0.0, inner) / square, rel=1e-4)
        if step == 5 and sgd_momentum:
            assert optimizer.state[first]["exp_avg"].abs().sum() > 0
    assert phases == ["sign"] * 4 + ["sgd"] * 8
    assert len(set(rates[4:])) == 1
    assert _equal_everywhere(net)


def _resumable(at: int, saved: list[dict[str, Any]] | None, steps: int, **options: Any) -> Any:
    net = _net("linear")
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
        x, y = _batch("linear", step)
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


def _vote() -> tuple[DistributedDataParallel, SignSGD, MajorityVote]:
    model = DistributedDataParallel(_net("linear"))
    optimizer = SignSGD(model.parameters())
    return model, optimizer, MajorityVote(model, optimizer)


def _state() -> dict[str, Any]:
    model, _, vote = _vote()
    x, y = _batch("linear", 0)
    F.cross_entropy(model(x), y).backward()
    return vote.state_dict()


def _load(state: dict[str, Any]) -> str:
    try:
        _vote()[2].load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


def _load_own(states: list[dict[str, Any]]) -> str:
    return _load(states[dist.get_rank()])


def test_bad_input_is_one_sentence() -> None:
    for said in gang(1).run(_refusals)[0].items():
        assert said[0] in said[1], said


def _refusals() -> dict[str, str]:
    net = nn.Linear(2, 2)
    model = DistributedDataParallel(net)
    adam = torch.optim.Adam(model.parameters())

    def sign(**options: Any) -> SignSGD:
        return SignSGD(model.parameters(), **options)

    attempts: dict[str, Callable[[], object]] = {
        "wrapped in DistributedDataParallel": lambda: MajorityVote(net, sign()),  # type: ignore[arg-type]
        "needs SignSGD or HybridSignSGD, got Adam": lambda: MajorityVote(model, adam),  # type: ignore[arg-type]
        "Invalid ties: 'coin'": lambda: MajorityVote(model, sign(), ties="coin"),
        "Invalid nonfinite: 'skip' without grad_scaler": lambda: MajorityVote(model, sign(), nonfinite="skip"),
        "1 parameters that are not the model's": lambda: MajorityVote(
            model, SignSGD([*model.parameters(), nn.Parameter(torch.ones(1))])
        ),
        "instead of attach_to_backward": lambda: MajorityVote(model, attach_to_backward(nn.Linear(2, 2), {})),
        "Invalid nonfinite: 'ignore'": lambda: MajorityVote(model, sign(), nonfinite="ignore"),
        "Invalid after_switch": lambda: MajorityVote(model, sign(), after_switch="fp8"),
        "Invalid dither_workers": lambda: MajorityVote(model, sign(), dither_workers="shared"),
        "Invalid dither_position: 'post'": lambda: MajorityVote(model, sign(dither=1.0, dither_position="post")),
        "Invalid capturable": lambda: MajorityVote(model, sign(capturable=True)),
        "Invalid state_dtype": lambda: MajorityVote(model, sign(state_dtype=torch.int8), error_feedback=True),
    }
    said = {}
    for expected, attempt in attempts.items():
        try:
            attempt()
        except (TypeError, ValueError, RuntimeError) as error:
            said[expected] = str(error)
        else:
            said[expected] = "nothing was raised"
    MajorityVote(model, sign())
    try:
        MajorityVote(model, sign())
    except RuntimeError as error:
        said["has a communication hook already"] = str(error)
    return said


def test_steps_without_votes_are_noticed() -> None:
    gang(1).run(_lost_state)


def _lost_state() -> None:
    model, optimizer, _ = _vote()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["step"] = torch.tensor(50)
    optimizer.load_state_dict(saved)
    x, y = _batch("linear", 0)
    with pytest.raises(RuntimeError, match=r"50 steps and 0 votes: load vote\.state_dict"):
        F.cross_entropy(model(x), y).backward()


def test_momentum_of_a_run_alone_is_taken_over() -> None:
    gang(1).run(_take_over)


def _take_over() -> None:
    net = _net("conv")
    optimizer = SignSGD(net.parameters())
    x, y = _batch("conv", 0)
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    kept = optimizer.state[net[0].weight]["exp_avg"].clone()
    model = DistributedDataParallel(net)
    vote = MajorityVote(model, optimizer)
    assert vote.worker.steps == [1]
    assert torch.equal(vote.state_dict()["state"]["0.weight"]["exp_avg"], in_memory_order(kept))
    assert not optimizer.state

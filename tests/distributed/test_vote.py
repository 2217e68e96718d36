"""The rules of a vote, in real processes under DDP: who abstains, what is not finite, and the hybrid's switch."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_cases import Branches, batch_of, equal_everywhere, share, small_net, small_vote
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang, on_ranks
from signstep import HybridSignSGD, SignSGD
from signstep.distributed import CollectiveError, MajorityVote


@on_ranks(3)
def test_who_has_no_gradient_abstains() -> None:
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


@on_ranks(1)
def test_a_zero_gradient_is_a_vote() -> None:
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


@on_ranks(3)
def test_ranks_that_have_joined_abstain() -> None:
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
@on_ranks(2)
def test_join_leaves_all_ranks_at_the_same_step(hybrid: bool) -> None:
    """Three epochs with uneven batches: counts, phases and weights stay equal."""
    net = small_net("linear")
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
                x, y = batch_of("linear", 10 * epoch + step)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        group = optimizer.param_groups[0]
        states = share([group["step"].clone(), torch.tensor(float(group.get("calibrated_lr", 0)))])
        assert states[0][0] == 4 * (epoch + 1) or hybrid
        assert torch.equal(states[0][1], states[1][1])  # type: ignore[arg-type]
        assert len({str(getattr(optimizer, "phase", "sign"))}) == 1
        assert equal_everywhere(net)


@on_ranks(2)
def test_a_round_without_voters_is_a_step_without_a_move() -> None:
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


@on_ranks(2)
def test_grad_scaler_skips_what_overflowed_anywhere_and_scales_the_rest() -> None:
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


@pytest.mark.parametrize("after_switch", ["mean", "bf16", "powersgd"])
@pytest.mark.parametrize("sgd_momentum", [0.0, 0.9])
@on_ranks(3)
def test_hybrid_switches_everywhere_at_once(after_switch: str, sgd_momentum: float) -> None:
    net = small_net("linear")
    model = DistributedDataParallel(net, bucket_cap_mb=0.001)
    optimizer = HybridSignSGD(
        model.parameters(), lr=3e-3, switch_step=5, calibration="ratio", sgd_momentum=sgd_momentum, ema_decay=0.5
    )
    vote = MajorityVote(model, optimizer, after_switch=after_switch)
    first = next(iter(net.parameters()))
    rates, phases = [], []
    inner = square = 0.0
    for step in range(12):
        x, y = batch_of("linear", step)
        own = copy.deepcopy(net)
        F.cross_entropy(own(x), y).backward()
        gradients = share([p.grad for p in own.parameters()])
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
    assert equal_everywhere(net)


@on_ranks(1)
def test_steps_without_votes_are_noticed() -> None:
    model, optimizer, _ = small_vote()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["step"] = torch.tensor(50)
    optimizer.load_state_dict(saved)
    x, y = batch_of("linear", 0)
    with pytest.raises(RuntimeError, match=r"50 steps and 0 votes: load vote\.state_dict"):
        F.cross_entropy(model(x), y).backward()

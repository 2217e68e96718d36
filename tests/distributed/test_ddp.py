"""Majority vote under DDP: real processes against a slow vote that reads like the paper, and every trap of the wire."""

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_cases import SMALL_BUCKETS, batch_of, equal_everywhere, share, small_net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang, on_ranks
from signstep import Lion, SignSGD
from signstep.distributed import CollectiveError, MajorityVote
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
        self.betas = options.get("betas")
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
                if self.betas is not None:  # Liu et al. 2024, Algorithm 1
                    kept, g, (beta_1, beta_2) = m, in_memory_order(grad), self.betas
                    m = beta_1 * kept + (1 - beta_1) * g
                    kept.mul_(beta_2).add_(g, alpha=1 - beta_2)
                elif self.beta > 0:
                    m.lerp_(in_memory_order(grad), 1 - self.beta)
                else:
                    m.copy_(in_memory_order(grad))
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


def _follow(
    kind: str, ddp: dict[str, Any], options: dict[str, Any], vote: dict[str, Any], steps: int, slices: int
) -> int:
    net = small_net(kind)
    twin = copy.deepcopy(net)
    model = DistributedDataParallel(net, **ddp)
    optimizer = (Lion if "betas" in options else SignSGD)(model.parameters(), **options)
    MajorityVote(model, optimizer, **vote)
    slow = SlowVote([p.data for p in twin.parameters()], dist.get_world_size(), **options, **vote)
    for step in range(steps):
        twin.zero_grad()
        optimizer.zero_grad()
        for part in range(slices):
            x, y = batch_of(kind, slices * step + part)
            F.cross_entropy(twin(x), y).backward()
            if part < slices - 1:
                with model.no_sync():
                    F.cross_entropy(model(x), y).backward()
            else:
                F.cross_entropy(model(x), y).backward()
        optimizer.step()
        slow.step(share([p.grad for p in twin.parameters()]))
        for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours, theirs), (step, name)
    assert equal_everywhere(net)
    return steps


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one bucket": ("linear", {}, {}, {}),
    "buckets that are rebuilt": ("linear", SMALL_BUCKETS, {"dither": 1e-4}, {}),
    "static graph": ("linear", SMALL_BUCKETS | {"static_graph": True}, {}, {}),
    "find_unused_parameters": ("linear", SMALL_BUCKETS | {"find_unused_parameters": True}, {}, {}),
    "gradient_as_bucket_view": ("linear", SMALL_BUCKETS | {"gradient_as_bucket_view": True}, {"momentum": 0.0}, {}),
    "channels_last": ("conv", SMALL_BUCKETS, {"dither": 1e-4, "weight_decay": 0.1}, {}),
    "channels_last, views": ("conv", {"gradient_as_bucket_view": True}, {}, {"ties": "abstain"}),
    "lion": ("conv", SMALL_BUCKETS, {"betas": (0.9, 0.99), "lr": 3e-3, "weight_decay": 0.1, "dither": 1e-4}, {}),
    "ties abstain": ("linear", SMALL_BUCKETS, {"seed": 5}, {"ties": "abstain"}),
}


FEW_CASES = ["one bucket", "channels_last", "ties abstain"]


@pytest.mark.parametrize(
    ("size", "steps", "cases"),
    [(1, 3, FEW_CASES), (2, 3, FEW_CASES), (3, 3, list(CASES)), (4, 3, FEW_CASES)]
    + [pytest.param(size, 6, list(CASES), marks=pytest.mark.long) for size in (1, 2, 3, 4)],
)
def test_follows_the_slow_vote(size: int, steps: int, cases: list[str]) -> None:
    for kind, ddp, options, vote in (CASES[name] for name in cases):
        assert gang(size).run(_follow, kind, ddp, options, vote, steps, 1) == [steps] * size


def _follow_in_parts(kind: str, ddp: dict[str, Any], options: dict[str, Any], vote: dict[str, Any]) -> int:
    with mock.patch("signstep.distributed.vote.LEAST_PART", 200):
        return _follow(kind, ddp, options, vote, 3, 1)


@pytest.mark.parametrize("size", [2, 3])
def test_parts_of_a_bucket_that_are_voted_on_in_turns(size: int) -> None:
    for kind, ddp, options, vote in (CASES[name] for name in FEW_CASES):
        assert gang(size).run(_follow_in_parts, kind, ddp, options, vote) == [3] * size


@on_ranks(3)
def test_a_part_that_is_not_finite_stops_all_ranks_while_others_are_on_the_wire() -> None:
    model = DistributedDataParallel(small_net("linear"))
    MajorityVote(model, SignSGD(model.parameters()))
    if dist.get_rank() == 1:
        # The first part that is cast is of the last layer.
        next(reversed(list(model.parameters()))).register_hook(lambda g: g * torch.inf)
    x, y = batch_of("linear", 0)
    with (
        mock.patch("signstep.distributed.vote.LEAST_PART", 1),
        pytest.raises(CollectiveError, match=r"gradient of 4.bias on rank 1 is not finite"),
    ):
        F.cross_entropy(model(x), y).backward()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, pytest.param(200, marks=pytest.mark.long)])
def test_distributed_lion_follows_the_slow_vote(steps: int) -> None:
    options = {"betas": (0.9, 0.99), "lr": 3e-3, "weight_decay": 0.1}
    for size in (2, 3):
        assert gang(size).run(_follow, "linear", SMALL_BUCKETS, options, {}, steps, 1) == [steps] * size


def test_gradients_accumulated_in_no_sync_are_voted_on_once() -> None:
    gang(2).run(_follow, "linear", SMALL_BUCKETS, {}, {}, 5, 3)


@pytest.mark.parametrize("steps", [8, pytest.param(60, marks=pytest.mark.long)])
@on_ranks(3)
def test_many_buckets_many_steps(steps: int) -> None:
    """A second collective chained to the first on gloo hung here."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(10, 10) for _ in range(29)])
    model = DistributedDataParallel(net, bucket_cap_mb=0.0001)
    optimizer = SignSGD(model.parameters())
    vote = MajorityVote(model, optimizer)
    buckets = set()
    reduce = vote.reduce
    vote.reduce = lambda bucket: (buckets.add(bucket.index), reduce(bucket))[1]  # type: ignore[method-assign,func-returns-value]
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 10) + dist.get_rank() + step).sum().backward()
        optimizer.step()
    assert len(buckets) > 20
    assert equal_everywhere(net)


@on_ranks(2)
def test_a_closed_hook_refuses_and_a_dropped_one_is_freed() -> None:
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


@on_ranks(2)
def test_dtypes_groups_and_strangers() -> None:
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


@on_ranks(4)
def test_a_subgroup_of_the_ranks_votes_among_itself() -> None:
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


@on_ranks(2)
def test_autocast() -> None:
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
    assert equal_everywhere(net)


@on_ranks(2)
def test_backward_twice_without_zero_grad_warns() -> None:
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
        "needs SignSGD, HybridSignSGD or Lion, got Adam": lambda: MajorityVote(model, adam),  # type: ignore[arg-type]
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
        "Invalid dither_position: 'expected', the expected sign is a number, which does not fit in one bit": (
            lambda: MajorityVote(model, sign(dither=1.0, dither_position="expected"))
        ),
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

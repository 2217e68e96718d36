"""The simulation of M workers takes the steps of real processes, and of a vote that is counted by hand."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gang import gang
from signstep import HybridSignSGD, Lion, SignSGD
from signstep.distributed import CollectiveError, MajorityVote, resplit
from signstep.distributed.attacks import Attack, Collude, NotANumber, Random, SignFlip, Silent, Stale
from signstep.distributed.simulation import SimulatedMean, SimulatedVote, per_worker_gradients
from signstep.lab.training.models import build

STEPS, SWITCH = 14, 9


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As each rank of the gang has: the rounding of a sum depends on how it is shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Module:
    """Convolution in channels_last, batch norm, and a part that only some ranks use."""
    torch.manual_seed(0)
    return Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.linear = nn.Linear(5, 4)
        self.extra = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        # The ranks whose images are dark do without.
        return out + self.extra if x.mean() > 0 else out


def images(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(3, 3, 6, 6, generator=generator).to(memory_format=torch.channels_last)
    return x + (0.5 if (rank + step) % 3 else -0.5), torch.randint(4, (3,), generator=generator)


class Coarse(Attack):
    """Gradients whose sums have no rounding, in whatever order."""

    def corrupt(self, name: str, gradient: Tensor) -> None:
        gradient.mul_(64).round_().div_(64)


OPTIMIZERS: dict[str, Callable[[nn.Module], SignSGD]] = {
    "clean": lambda m: SignSGD(m.parameters(), lr=3e-3),
    "dithered": lambda m: SignSGD(m.parameters(), lr=3e-3, dither=1e-4, seed=5),
    "uniform": lambda m: SignSGD(m.parameters(), lr=3e-3, dither=1e-4, dither_law="uniform"),
    "relative": lambda m: SignSGD(
        [
            {"params": [m.conv.weight], "momentum": 0.5, "seed": 9},
            {"params": [m.extra, *m.norm.parameters(), *m.linear.parameters()]},
        ],
        dither=0.5, dither_scale="relative", weight_decay=0.1, decoupled_weight_decay=False, maximize=True,
    ),
    "bfloat16": lambda m: SignSGD(m.parameters(), lr=3e-3, state_dtype=torch.bfloat16),
    "lion": lambda m: Lion(m.parameters(), lr=3e-3, weight_decay=0.1, dither=0.5, dither_scale="relative"),
    "lion, int8": lambda m: Lion(m.parameters(), lr=3e-3, betas=(0.8, 0.0), state_dtype=torch.int8),
    "int8": lambda m: SignSGD(m.parameters(), lr=3e-3, state_dtype=torch.int8, dither=1e-4),
    "some": lambda m: SignSGD([m.conv.weight, m.extra], lr=3e-3, momentum=0.0),
    "hybrid": lambda m: HybridSignSGD(m.parameters(), lr=3e-3, switch_step=SWITCH, calibration="ratio"),
    "momentum": lambda m: HybridSignSGD(m.parameters(), lr=3e-3, switch_step=SWITCH, sgd_momentum=0.9, dither=1e-4),
}  # fmt: skip


def _real(optimizer: str, options: dict[str, Any], attacks: dict[int, Attack]) -> dict[str, Tensor]:
    net = network()
    model = DistributedDataParallel(net, find_unused_parameters=True, bucket_cap_mb=0.0005)
    chosen = OPTIMIZERS[optimizer](net)
    vote = MajorityVote(model, chosen, **options)
    vote.attack = attacks.get(dist.get_rank())
    for step in range(STEPS):
        x, y = images(dist.get_rank(), step)
        chosen.zero_grad()
        F.cross_entropy(model(x), y).backward()
        chosen.step()
    vote.close()
    state = {name: p.detach() for name, p in net.named_parameters()}
    return state | {f"{name} of rank 0": b for name, b in net.named_buffers()}


def _simulated(size: int, optimizer: str, options: dict[str, Any], attacks: dict[int, Attack]) -> dict[str, Tensor]:
    net = network()
    chosen = OPTIMIZERS[optimizer](net)
    sim = SimulatedVote(net, chosen, size, attacks=copy.deepcopy(attacks), **options)
    for step in range(STEPS):
        batch = [images(rank, step) for rank in range(size)]
        x, y = (torch.cat(column) for column in zip(*batch, strict=True))
        chosen.zero_grad()
        sim.vote(per_worker_gradients(net, F.cross_entropy, x, y, size, vectorize=False))
        chosen.step()
    state = {name: p.detach() for name, p in net.named_parameters()}
    return state | {f"{name} of rank 0": b for name, b in net.named_buffers()}


CASES: list[Any] = [
    (2, "clean", {}, {}),
    (4, "clean", {}, {}),
    (4, "clean", {"ties": "abstain"}, {}),
    (3, "lion", {"dither_workers": "scaled"}, {}),
    (3, "lion, int8", {}, {}),
    (2, "lion", {"error_feedback": True}, {}),
    pytest.param(8, "dithered", {"ties": "abstain"}, {}, marks=pytest.mark.long),
    (4, "clean", {"error_feedback": True}, {}),
    (2, "dithered", {}, {}),
    (4, "dithered", {"dither_workers": "scaled", "ties": "abstain"}, {}),
    (2, "uniform", {}, {}),
    (4, "relative", {}, {}),
    (4, "bfloat16", {}, {}),
    (4, "int8", {}, {}),
    (2, "some", {}, {}),
    (2, "hybrid", {}, {}),
    (2, "momentum", {}, {}),
    (4, "hybrid", {}, {rank: Coarse() for rank in range(4)}),
    (4, "clean", {"nonfinite": "abstain"}, {0: NotANumber(), 1: Stale(3), 2: Random(seed=4)}),
    (4, "dithered", {}, {1: SignFlip(2), 2: Silent(), 3: Collude(seed=7, blind=True)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "optimizer", "options", "attacks"), CASES)
def test_steps_are_those_of_real_processes(
    size: int, optimizer: str, options: dict[str, Any], attacks: dict[int, Attack]
) -> None:
    real = gang(size).run(_real, optimizer, options, attacks)
    simulated = _simulated(size, optimizer, options, attacks)
    start = dict(network().named_parameters())
    for name, x in simulated.items():
        assert torch.equal(x, real[0][name]), name
        if name in start and optimizer != "some":
            assert not torch.equal(x, start[name])


def test_sgd_phase_of_four_differs_in_rounding_alone() -> None:
    real, simulated = gang(4).run(_real, "momentum", {}, {}), _simulated(4, "momentum", {}, {})
    for name, p in network().named_parameters():
        del p
        torch.testing.assert_close(simulated[name], real[0][name], rtol=1e-4, atol=1e-6)


@given(
    votes=st.lists(st.lists(st.sampled_from([-1.0, 1.0, None]), min_size=3, max_size=3), min_size=1, max_size=9),
    ties=st.sampled_from(["random", "abstain"]),
)
def test_vote_is_the_sign_of_the_sum(votes: list[list[float | None]], ties: str) -> None:
    net = nn.Module()
    for i in range(3):
        net.register_parameter(f"p{i}", nn.Parameter(torch.zeros(70)))
    optimizer = SignSGD(net.parameters(), momentum=0.0)
    sim = SimulatedVote(net, optimizer, len(votes), ties=ties)
    sim.vote([{f"p{i}": None if v is None else torch.full((70,), v) for i, v in enumerate(own)} for own in votes])
    for i, p in enumerate(net.parameters()):
        cast = [own[i] for own in votes if own[i] is not None]
        total = sum(v for v in cast if v is not None)
        if not cast:
            assert p.grad is None
        elif total == 0 and ties == "random":
            assert set(p.grad.tolist()) <= {-1.0, 1.0}  # type: ignore[union-attr]
        else:
            assert p.grad.tolist() == [float((total > 0) - (total < 0))] * 70  # type: ignore[union-attr]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_mean_is_that_of_the_whole_batch(workers: int) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randint(2, (10,))
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    SimulatedMean(net, workers).mean(per_worker_gradients(net, F.cross_entropy, x, y, workers))
    for p, g in zip(net.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)


def test_mean_counts_absent_workers_as_zero() -> None:
    net = nn.Linear(2, 1, bias=False)
    SimulatedMean(net, 4, attacks={0: Silent()}).mean([{"weight": torch.full((1, 2), 8.0)}] * 2 + [None, {}])
    assert net.weight.grad is not None
    assert net.weight.grad.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_vectorized_gradients_are_those_of_the_loop(chunk_size: int | None) -> None:
    torch.manual_seed(2)
    x, y = torch.randn(28, 3, 16, 16), torch.randint(10, (28,))
    one = build("resnet8", num_classes=10, width=0.25)
    other = copy.deepcopy(one)
    fast = per_worker_gradients(one, F.cross_entropy, x, y, 7, chunk_size=chunk_size)
    slow = per_worker_gradients(other, F.cross_entropy, x, y, 7, vectorize=False)
    for a, b in zip(fast, slow, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert all(b == 1 for name, b in one.named_buffers() if name.endswith("num_batches_tracked"))


def test_loop_gives_what_a_process_of_its_own_would_get() -> None:
    net = network()
    x, y = images(1, 0)
    batch = torch.cat([x - 9, x]), torch.cat([y, y])  # the first worker's are dark
    own = per_worker_gradients(net, F.cross_entropy, *batch, 2, vectorize=False)
    assert own[0]["extra"] is None
    alone = network()
    F.cross_entropy(alone(x), y).backward()
    for name, p in alone.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, own[1][name])  # type: ignore[arg-type]
    assert torch.equal(net.norm.running_mean, _norm_after(x - 9))  # type: ignore[union-attr, arg-type]


def _norm_after(x: Tensor) -> Tensor:
    net = network()
    net(x)
    return net.norm.running_mean  # type: ignore[union-attr, return-value]


def test_a_thousand_workers() -> None:
    net = nn.Linear(75_000, 1, bias=False)
    optimizer = SignSGD(net.parameters(), momentum=0.0, dither=1.0)
    sim = SimulatedVote(net, optimizer, 1000)
    m = torch.linspace(-0.3, 0.3, 75_000)
    sim.vote([{"weight": m[None]}] * 1000)
    votes = net.weight.grad
    assert votes is not None
    # E[vote] = 1 - 2 P(Binomial(1000, Phi(m)) < 500) but for ties, to 1 % by the normal law.
    share = 0.5 + torch.erf(m / 2**0.5).div(2)
    expected = torch.erf((share - 0.5) * 1000 / (2000 * share * (1 - share)).sqrt())
    assert float((votes[0] - expected).mean()) == pytest.approx(0, abs=5 / 75_000**0.5)
    assert float((votes[0] * m.sign()).mean()) == pytest.approx(float(expected.abs().mean()), abs=0.02)


def test_attackers_below_one_half_are_outvoted() -> None:
    net = nn.Linear(100, 1, bias=False)
    g = torch.randn(1, 100)
    for attack, share in ((SignFlip, 0.49), (NotANumber, 0.99), (Silent, 0.99), (Collude, 0.49)):
        attackers = {rank: attack() for rank in range(int(100 * share))}
        optimizer = SignSGD(net.parameters())
        SimulatedVote(net, optimizer, 100, nonfinite="abstain", attacks=attackers).vote([{"weight": g}] * 100)
        assert net.weight.grad is not None
        assert torch.equal(net.weight.grad, g.sign()), attack


def test_colluders_know_the_mean_of_the_honest() -> None:
    net = nn.Linear(1, 1, bias=False)
    attacks = {2: Collude(scale=2.0), 0: Collude(scale=1.0)}
    SimulatedMean(net, 4, attacks=attacks).mean([{"weight": torch.full((1, 1), g)} for g in (100.0, 3.0, -50.0, 5.0)])
    assert net.weight.grad is not None
    assert net.weight.grad.item() == (-4 + 3 - 8 + 5) / 4


def test_momentum_of_the_optimizer_goes_to_every_worker() -> None:
    net = nn.Linear(2, 1, bias=False)
    optimizer = SignSGD(net.parameters(), lr=0.1, momentum=0.9)
    net.weight.grad = torch.tensor([[1.0, -1.0]])
    optimizer.step()
    sim = SimulatedVote(net, optimizer, 3)
    momenta = [worker.state["weight"]["exp_avg"] for worker in sim.workers]
    assert all(torch.equal(m, momenta[0]) and m.any() for m in momenta)
    assert len({m.data_ptr() for m in momenta}) == 3
    # State moves between simulations of other sizes as between those of processes.
    sim.vote([{"weight": torch.full((1, 2), float(w))} for w in range(3)])
    optimizer.step()
    states = resplit([worker.state_dict() for worker in sim.workers], 2)
    larger = SimulatedVote(net, optimizer, 2)
    for worker, state in zip(larger.workers, states, strict=True):
        worker.load_state_dict(state)
    assert larger.workers[1].steps == [2]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_sgd_starts_from_the_mean_of_the_workers_momenta(shape: tuple[int, ...]) -> None:
    net = nn.Module()
    net.weight = nn.Parameter(torch.ones(shape))
    optimizer = HybridSignSGD(net.parameters(), lr=0.1, momentum=0.9, switch_step=2, sgd_momentum=0.8)
    optimizer.state[net.weight]["slow"] = torch.ones(shape)  # as a wrapper keeps it
    sim = SimulatedVote(net, optimizer, 2)
    gradients = [{"weight": torch.full(shape, g)} for g in (1.0, 3.0)]
    momentum = torch.full(shape, (1 - 0.9**2) * 2.0)
    for _ in range(2):
        sim.vote(gradients)
        optimizer.step()
    for _ in range(3):
        sim.vote(gradients)
        optimizer.step()
        momentum = 0.8 * momentum + 0.2 * 2.0
        torch.testing.assert_close(optimizer.state[net.weight]["exp_avg"], momentum)
    assert "slow" in optimizer.state[net.weight]


def test_what_does_not_fit_is_refused() -> None:
    net = nn.Linear(2, 1, bias=False)
    optimizer = SignSGD(net.parameters())
    with pytest.raises(TypeError, match="a vote needs SignSGD"):
        SimulatedVote(net, torch.optim.SGD(net.parameters()), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Invalid world_size: 0"):
        SimulatedVote(net, optimizer, 0)
    with pytest.raises(ValueError, match="Invalid ties: 'zero'"):
        SimulatedVote(net, optimizer, 2, ties="zero")
    with pytest.raises(ValueError, match="Invalid nonfinite: 'skip'"):
        SimulatedVote(net, optimizer, 2, nonfinite="skip")
    with pytest.raises(ValueError, match="an attack on rank 2: ranks are 0 to 1"):
        SimulatedMean(net, 2, attacks={2: SignFlip()})
    shared = SignFlip()
    with pytest.raises(ValueError, match="two ranks share an attack"):
        SimulatedMean(net, 2, attacks={0: shared, 1: shared})
    sim = SimulatedVote(net, optimizer, 2)
    with pytest.raises(ValueError, match="gradients of 1 workers, expected 2"):
        sim.vote([{}])
    with pytest.raises(ValueError, match="a gradient of bias"):
        sim.vote([{"bias": torch.zeros(1)}, None])
    with pytest.raises(ValueError, match=r"the gradient of weight is \(2,\), expected \(1, 2\)"):
        sim.vote([{"weight": torch.zeros(2)}, None])
    with pytest.raises(CollectiveError, match="the gradient of weight on rank 1 is not finite"):
        sim.vote([{"weight": torch.ones(1, 2)}, {"weight": torch.full((1, 2), torch.inf)}])
    with pytest.raises(ValueError, match="x and y have 3 and 3 rows"):
        per_worker_gradients(net, F.mse_loss, torch.ones(3, 2), torch.ones(3, 1), 2)

"""`DiLoCo`: real processes take the steps of a plain loop with torch.optim.SGD on the mean."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ddp_cases import equal_everywhere
from local_cases import OPTIMIZERS, local_step, network, small, small_step
from torch import Tensor, nn

from bytes_sent import bytes_sent
from gang import gang, on_ranks
from signstep.distributed import QSGD, CollectiveError, DiLoCo, EFSign, TopK
from signstep.distributed.local_methods import LOCAL_METHODS
from signstep.distributed.reductions import Gradients


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As each rank of the gang has: the rounding of a sum depends on how it is shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[..., None]]] = {
    "net": (network, local_step),
    "small": (small, small_step),
}


def train(name: str, steps: int, every: int, options: dict[str, Any], kind: str = "net") -> dict[str, Tensor]:
    """The weights after some steps; every rank's first model is its own, and the first one's is taken."""
    rank = dist.get_rank()
    make, advance = MODELS[kind]
    model = make(rank)
    optimizer = OPTIMIZERS[name](model.parameters())
    local = DiLoCo(model, optimizer, every=every, **options)
    for step in range(steps):
        advance(model, optimizer, rank, step)
        if local.step() and local.since == 0:
            assert equal_everywhere(model)
    local.hold_round()
    assert equal_everywhere(model)
    return {key: x.clone() for key, x in model.state_dict().items()}


def plain_loop(
    name: str, workers: int, steps: int, every: int, lr: float, momentum: float, kind: str = "net"
) -> nn.Module:
    """As the paper has it: an outer optimizer on the mean of what the workers have gone; buffers take the median."""
    make, advance = MODELS[kind]
    models = [make(0) for _ in range(workers)]
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in models]
    outer_model = make(0)
    outer = torch.optim.SGD(outer_model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            advance(model, optimizer, rank, step)
        if (step + 1) % every:
            continue
        with torch.no_grad():
            for p, *others in zip(outer_model.parameters(), *(model.parameters() for model in models), strict=True):
                p.grad = p - others[0]
                for x in others[1:]:
                    p.grad += p - x
                p.grad /= workers
            outer.step()
            for b, *others in zip(outer_model.buffers(), *(model.buffers() for model in models), strict=True):
                ordered = torch.stack(others).sort(dim=0).values.double()
                middle = (ordered[(workers - 1) // 2] + ordered[workers // 2]) / 2
                b.copy_(middle if b.is_floating_point() else others[0])
            for model in models:
                model.load_state_dict(outer_model.state_dict())
    return outer_model


@pytest.mark.parametrize(
    ("name", "workers", "outer", "kind", "steps"),
    [
        ("adamw", 2, (0.7, 0.9), "net", 40),
        ("sgd", 3, (0.5, 0.0), "net", 40),
        pytest.param("adamw", 3, (0.7, 0.9), "small", 500, marks=pytest.mark.slow),
        pytest.param("lion", 4, (1.0, 0.5), "net", 500, marks=pytest.mark.long),
    ],
)
def test_ranks_take_the_steps_of_a_plain_loop(
    name: str, workers: int, outer: tuple[float, float], kind: str, steps: int
) -> None:
    lr, momentum = outer
    options = {"outer_lr": lr, "outer_momentum": momentum}
    everyone = gang(workers).run(train, name, steps, 10, options, kind)
    expected = plain_loop(name, workers, steps, 10, lr, momentum, kind).state_dict()
    for weights in everyone:
        assert all(torch.equal(x, weights[key]) for key, x in expected.items())


CASES: dict[str, dict[str, Any]] = {
    "8 bits": {"compressor": QSGD(levels=127), "seed": 3},
    "error feedback": {"compressor": EFSign(two_sided=True), "fragments": 3},
    "delayed": {"compressor": QSGD(levels=127), "delay": 3, "fragments": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_have_the_same_weights_after_a_round(case: str) -> None:
    first, *others = gang(3).run(train, "adamw", 23, 5, CASES[case])
    for weights in others:
        assert all(torch.equal(x, weights[key]) for key, x in first.items())


@on_ranks(2)
def test_eight_bits_are_right_on_average() -> None:
    """The mean of 400 rounds is off by no more than 5 standard errors, and so is not biased."""
    rank, draws = dist.get_rank(), 400
    model = nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = DiLoCo(model, optimizer, every=1, outer_lr=1.0, outer_momentum=0.0, compressor=QSGD(levels=127))
    ways = [torch.randn(30, 40, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    total = torch.zeros(30, 40, dtype=torch.float64)
    before = model.weight.detach().clone()
    for _ in range(draws):
        with torch.no_grad():
            model.weight.copy_(before - ways[rank])
        local.step()
        total += (before - model.weight.detach()).double()
        with torch.no_grad():
            model.weight.copy_(before)
        local.rounds.set_out()
    unit = max(float(way.abs().max()) for way in ways) / 127
    # A rounding has a variance of at most unit^2 / 4: the workers' are averaged, the owner's is not.
    error = unit * math.sqrt((1 / 4 / 2 + 1 / 4) / draws)
    assert (total / draws - (ways[0] + ways[1]) / 2).abs().max() < 5 * error
    assert (total / draws - (ways[0] + ways[1]) / 2).abs().max() > 0


@on_ranks(2)
def test_rounds_of_one_step_are_sgd_on_the_mean_gradient() -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model, plain = nn.Linear(5, 3), nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = DiLoCo(model, optimizer, every=1, outer_lr=1.0, outer_momentum=0.0)
    plain.load_state_dict(model.state_dict())
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(20):
        batches = [torch.randn(8, 5, generator=torch.Generator().manual_seed(10 * step + r)) for r in range(2)]
        for x, net, opt in ((batches[rank], model, optimizer), (torch.cat(batches), plain, reference)):
            opt.zero_grad()
            net(x).square().mean().backward()
            opt.step()
        assert local.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@on_ranks(1)
def test_no_step_is_lost_or_counted_twice_by_a_delay() -> None:
    """One worker, whose outer steps are as long as its ways, trains as if there were none."""
    steps = torch.randn(23, generator=torch.Generator().manual_seed(0))
    for delay, fragments in ((0, 1), (2, 1), (3, 2)):
        model = nn.Linear(1, 1)
        local = DiLoCo(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            every=5,
            delay=delay,
            fragments=fragments,
            outer_lr=1.0,
            outer_momentum=0.0,
        )
        begun = [float(p.detach()) for p in model.parameters()]
        for step in steps:
            with torch.no_grad():
                for p in model.parameters():
                    p += float(step)
            local.step()
        local.hold_round()
        for p, start in zip(model.parameters(), begun, strict=True):
            assert math.isclose(float(p.detach()), start + float(steps.sum()), rel_tol=1e-5, abs_tol=1e-5)


def stop_and_go_on(stop: int, steps: int, options: dict[str, Any], dtype: torch.dtype) -> bool:
    rank = dist.get_rank()

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, DiLoCo]:
        model = network().to(dtype)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        return model, optimizer, DiLoCo(model, optimizer, every=5, **options)

    def go(parts: tuple[nn.Module, torch.optim.Optimizer, DiLoCo], first: int, last: int) -> None:
        for step in range(first, last):
            local_step(parts[0], parts[1], rank, step)
            parts[2].step()

    whole = begin()
    go(whole, 0, steps)
    stopped = begin()
    go(stopped, 0, stop)
    saved = pickle.dumps([x.state_dict() for x in stopped])
    resumed = begin()
    for part, state in zip(resumed, pickle.loads(saved), strict=True):
        part.load_state_dict(state)
    go(resumed, stop, steps)
    expected = whole[0].state_dict()
    return all(torch.equal(x, expected[key]) for key, x in resumed[0].state_dict().items())


@pytest.mark.parametrize("stop", [10, 11, 13])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"compressor": TopK(0.1)}, torch.bfloat16),
        ({"compressor": EFSign(two_sided=True), "delay": 3, "fragments": 2}, torch.float32),
        ({"compressor": QSGD(levels=127), "delay": 3, "fragments": 2}, torch.float32),
    ],
    ids=["exact", "top-k", "error feedback", "rounding"],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(stop: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    assert gang(2).run(stop_and_go_on, stop, 22, options, dtype) == [True, True]


def spoil(nonfinite: str) -> str:
    """Rank 1 of 3 loses its weights."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    local = DiLoCo(model, optimizer, every=1, outer_lr=0.5, outer_momentum=0.0, nonfinite=nonfinite)
    before = model.weight.detach().clone()
    optimizer.state[model.weight]["momentum_buffer"] = torch.ones(3, 4)
    with torch.no_grad():
        model.weight -= (1.0, torch.inf, 3.0)[rank]
    try:
        local.step()
    except CollectiveError as error:
        return str(error)
    assert equal_everywhere(model)
    assert bool(optimizer.state) == (rank != 1)
    torch.testing.assert_close(before - model.weight.detach(), torch.full((3, 4), 0.5 * (1 + 3) / 2))
    return "went on"


def test_weights_that_are_not_finite_are_named_on_every_rank() -> None:
    for message in gang(3).run(spoil, "raise"):
        assert message.startswith("rank 1: the change of weight is not finite")
        assert message.endswith('pass nonfinite="abstain" to leave such a worker out')


def test_a_worker_whose_weights_are_not_finite_is_left_out_of_the_mean() -> None:
    assert gang(3).run(spoil, "abstain") == ["went on"] * 3


def count_bytes(key: str) -> tuple[int, int]:
    """Collectives of a round, and the bytes sent to others in it."""
    model = nn.Linear(512, 513)
    local = LOCAL_METHODS[key].start(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, None, None, 0)
    with bytes_sent() as sent:
        local.step()
    return len(sent), sum(sent)


@pytest.mark.parametrize("key", LOCAL_METHODS)
def test_bytes_and_round_trips_are_those_of_the_formula(key: str) -> None:
    gradients, method = Gradients(((513, 512), (513,))), LOCAL_METHODS[key]
    trips, sent = gang(4).run(count_bytes, key)[0]
    assert trips == method.round_trips(gradients, 4)
    assert sent == pytest.approx(method.payload(gradients, 4), rel=0.015)


def refusals() -> list[str]:
    out = []
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong in ({"every": 0}, {"outer_lr": 0.0}, {"outer_momentum": 1.0}, {"nonfinite": "skip"}, {"seed": -1}):
        with pytest.raises(ValueError, match=r"^Invalid ") as error:
            DiLoCo(model, optimizer, **{"every": 2, **wrong})  # type: ignore[arg-type]
        out.append(str(error.value))
    local = DiLoCo(model, optimizer, every=2)
    state = local.state_dict()
    with pytest.raises(ValueError, match="saved by 7 workers"):
        local.load_state_dict({**state, "mean": {**state["mean"], "world_size": 7}})
    return out


def test_options_are_checked() -> None:
    for messages in gang(2).run(refusals):
        options = ("every", "outer_lr", "outer_momentum", "nonfinite", "seed")
        assert all(m.startswith(f"Invalid {option}: ") for m, option in zip(messages, options, strict=True))

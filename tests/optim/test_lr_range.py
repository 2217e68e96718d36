"""The range test for the learning rate: what it finds, and that it leaves no trace."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import signstep
from signstep.optim import HybridSignSGD, Lion, LrRange, SignSGD, find_lr

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p),
    "signsgd": lambda p: SignSGD(p, lr=1e-3, dither=0.1, seed=3),
    "int8": lambda p: SignSGD(p, lr=1e-3, state_dtype="int8"),
    "lion": lambda p: Lion(p, lr=1e-3),
    "hybrid": lambda p: HybridSignSGD(p, lr=1e-3, switch_step=25, sgd_momentum=0.9),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    while True:
        x = torch.randn(32, 6, generator=draw)
        yield x, x[:, :3].argmax(1)


def made(name: str) -> tuple[Net, torch.optim.Optimizer, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    stream = batches()

    def closure() -> Tensor:
        x, y = next(stream)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return model, optimizer, closure


def trained(model: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    stream = batches()
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = next(stream)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 7])
def test_training_goes_on_as_if_nothing_had_been(name: str, before: int) -> None:
    states = []
    for looked in (False, True):
        model, optimizer, closure = made(name)
        trained(model, optimizer, before)
        if looked:
            found = find_lr(model, optimizer, closure, low=1e-5, high=1.0, steps=60)
            assert len(found.lrs) > 20
            assert all(p.grad is None for p in model.parameters())
        trained(model, optimizer, 40)
        saved = optimizer.state_dict()
        groups = [{k: v.tolist() if isinstance(v, Tensor) else v for k, v in g.items()} for g in saved["param_groups"]]
        states.append(((model.state_dict(), model.calls, saved["state"]), groups))
    (plain, plain_groups), (after, after_groups) = states
    torch.testing.assert_close(after, plain, rtol=0, atol=0)
    assert after_groups == plain_groups


def test_the_rates_rise_by_equal_factors_and_groups_keep_their_ratio() -> None:
    model, _, closure = made("sgd")
    groups = [{"params": model.layers[0].parameters(), "lr": 0.02}, {"params": model.layers[3].parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups)
    seen = []

    def watched() -> Tensor:
        seen.append([group["lr"] for group in optimizer.param_groups])
        return closure()

    found = find_lr(model, optimizer, watched, low=1e-4, high=1e-2, steps=21)
    assert found.lrs == pytest.approx([10 ** (-4 + i / 10) for i in range(21)])
    assert [pair[1] for pair in seen] == pytest.approx(list(found.lrs))
    assert all(first == pytest.approx(second / 10) for first, second in seen)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.2]


def test_a_rate_that_is_a_tensor_or_zero() -> None:
    model, _, closure = made("sgd")
    optimizer = SignSGD(model.parameters(), lr=torch.tensor(0.0))
    found = find_lr(model, optimizer, closure, steps=30, high=0.1)
    assert found.lrs[-1] == pytest.approx(0.1)
    assert float(optimizer.param_groups[0]["lr"]) == 0.0


@pytest.mark.parametrize("curvature", [1.0, 100.0])
def test_gradient_descent_on_a_parabola(curvature: float) -> None:
    """It diverges above 2 / curvature: the suggestion is below that, and scales with it."""
    w = nn.Parameter(torch.full((4,), 3.0))
    model = nn.Module()
    model.w = w

    def closure() -> Tensor:
        loss = 0.5 * curvature * w.square().sum()
        loss.backward()
        return loss

    optimizer = torch.optim.SGD([w], lr=0.1)
    found = find_lr(model, optimizer, closure, low=1e-5 / curvature, high=1e3 / curvature)
    assert found.lrs[-1] < 1e3 / curvature
    assert found.suggestion is not None
    assert 0.02 < found.suggestion * curvature < 2
    assert torch.equal(w, torch.full((4,), 3.0))


def test_no_suggestion_where_the_loss_does_not_fall() -> None:
    flat = LrRange((1e-3, 1e-2, 1e-1), (1.0, 1.0, 1.5), (1.0, 0.995, 1.2))
    assert flat.suggestion is None


def test_a_loss_that_is_not_finite_ends_the_test() -> None:
    model, optimizer, closure = made("sgd")
    calls = []

    def breaks() -> Tensor:
        calls.append(None)
        return closure() if len(calls) < 15 else closure() * math.nan

    assert len(find_lr(model, optimizer, breaks).losses) == 14
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_error_leaves_no_trace_either() -> None:
    model, optimizer, closure = made("lion")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def breaks() -> Tensor:
        calls.append(None)
        if len(calls) == 12:
            raise KeyError("of the user's")
        return closure()

    with pytest.raises(KeyError, match="of the user's"):
        find_lr(model, optimizer, breaks)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert optimizer.state_dict()["state"] == {}


def ended() -> Tensor:
    raise StopIteration


@pytest.mark.parametrize(
    ("options", "closure", "message"),
    [
        ({"low": 0.0}, None, "expected 0 < low < high"),
        ({"low": 1.0, "high": 0.1}, None, "expected 0 < low < high"),
        ({"high": math.inf}, None, "expected 0 < low < high"),
        ({"steps": 9}, None, "steps=9: expected at least 10"),
        ({}, ended, "the batches ended before step 1"),
        ({}, lambda: 3.0, "the closure returned float: expected a loss"),
        ({}, lambda: torch.ones(2), "expected a loss, a tensor of one number"),
        ({}, lambda: torch.tensor(math.inf), "not finite before any step"),
    ],
)
def test_what_cannot_be_measured(options: dict[str, Any], closure: Callable[[], Any] | None, message: str) -> None:
    model, optimizer, good = made("sgd")
    with pytest.raises(ValueError, match=message):
        find_lr(model, optimizer, closure or good, **options)


def test_it_is_a_public_name() -> None:
    assert signstep.find_lr is find_lr

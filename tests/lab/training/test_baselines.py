"""The optimizers that the lab has of its own, against float64 references that read like the papers."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from signstep.lab.training.gradient_noise import NoisySGD, noise
from signstep.lab.training.swats import SWATS

SHAPES = [(3, 5), (17,), (), (2, 3, 4)]
Array = np.ndarray


class SWATSReference:
    """Algorithm 1 of arXiv 1712.07628, on all parameters as one vector, with decoupled decay and a schedule."""

    def __init__(self, w: Array, lr: float, *, tolerance: float = 1e-9, decay: float = 0.0) -> None:
        self.w, self.lr, self.tolerance, self.decay = w, lr, tolerance, decay
        self.phase, self.k, self.m, self.a, self.v = "adam", 0, np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
        self.rate = 0.0
        self.lrs: list[float] = []

    def step(self, g: Array) -> None:
        self.w = self.w - self.lr * self.decay * self.w
        if self.phase == "sgd":
            self.v = 0.9 * self.v + g
            self.w = self.w - (1 - 0.9) * self.final * self.lr / self.lr_then * self.v
            return
        self.k += 1
        k = self.k
        self.m = 0.9 * self.m + 0.1 * g
        self.a = 0.999 * self.a + 0.001 * g**2
        p = -self.lr * math.sqrt(1 - 0.999**k) / (1 - 0.9**k) * self.m / (np.sqrt(self.a) + 1e-9)
        self.w = self.w + p
        if p @ g == 0:
            return
        gamma = p @ p / -(p @ g)
        self.rate = 0.999 * self.rate + 0.001 * gamma
        self.lrs.append(self.lr)
        corrected = self.rate / (1 - 0.999**k)
        if k > 1 and corrected > 0 and abs(corrected - gamma) < self.tolerance:
            self.phase, self.final = "sgd", corrected
            self.lr_then = 0.001 * float(self.lrs @ 0.999 ** np.arange(len(self.lrs))[::-1]) / (1 - 0.999**k)


class NoisySGDReference:
    """g + N(0, eta / (1 + t)^0.55) of arXiv 1511.06807, then SGD with momentum."""

    def __init__(self, w: list[Array], lr: float, momentum: float, eta: float, seed: int, decay: float) -> None:
        self.w, self.lr, self.mu, self.eta, self.seed, self.decay = w, lr, momentum, eta, seed, decay
        self.t, self.v = 0, [np.zeros_like(each) for each in w]

    def step(self, gradients: list[Array]) -> None:
        for i, g in enumerate(gradients):
            drawn = noise(self.seed, self.t, i, torch.empty(g.shape, dtype=torch.float64)).numpy()
            self.v[i] = self.mu * self.v[i] + g + math.sqrt(self.eta / (1 + self.t) ** 0.55) * drawn
            self.v[i] = self.v[i] + self.decay * self.w[i]
            self.w[i] = self.w[i] - self.lr * self.v[i]
        self.t += 1


def start() -> list[Array]:
    rng = np.random.default_rng(7)
    return [np.asarray(rng.normal(size=shape)) for shape in SHAPES]


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in start()]


def gradients(step: int, w: list[Array]) -> list[Array]:
    """Noisy gradients of an ill-conditioned quadratic: they depend on the trajectory, so an error would grow."""
    rng = np.random.default_rng(step)
    return [np.asarray(np.linspace(0.1, 3, p.size).reshape(p.shape) * (p - 0.3) + rng.normal(size=p.shape)) for p in w]


def give(params: list[torch.nn.Parameter], step: int) -> list[Array]:
    """Set the gradients, and return them."""
    found = gradients(step, [p.detach().numpy() for p in params])
    for p, g in zip(params, found, strict=True):
        p.grad = torch.tensor(g)
    return found


def flat(arrays: list[Array]) -> Array:
    return np.concatenate([each.ravel() for each in arrays])


def cosine(step: int) -> float:
    return min(1.0, step / 10) * 0.5 * (1 + math.cos(math.pi * step / 200))


@pytest.mark.parametrize("schedule", [lambda step: 1.0, cosine], ids=["constant", "cosine"])
@pytest.mark.parametrize(("tolerance", "decay"), [(1e-9, 0.0), (1e-4, 0.3), (2e-3, 0.0)])
def test_swats_takes_the_references_steps(tolerance: float, decay: float, schedule: Callable[[int], float]) -> None:
    params = parameters()
    fast = SWATS(params, lr=1e-2, switch_tolerance=tolerance, weight_decay=decay)
    slow = SWATSReference(flat(start()), 1e-2, tolerance=tolerance, decay=decay)
    for step in range(200):
        fast.param_groups[0]["lr"] = slow.lr = 1e-2 * schedule(step)
        slow.step(flat(give(params, step)))
        fast.step()
        np.testing.assert_allclose(flat([p.detach().numpy() for p in params]), slow.w, rtol=1e-9, atol=1e-12)
        assert fast.phase == slow.phase
    assert fast.calibrated_lr == pytest.approx(slow.rate / (1 - 0.999**slow.k))
    assert fast.phase == ("adam" if tolerance == 1e-9 else "sgd")


def test_swats_is_adam_before_the_switch_and_sgd_after_it() -> None:
    params, others = parameters(), parameters()
    fast, adam = SWATS(params, weight_decay=0.1, switch_tolerance=0.0), torch.optim.AdamW(others, weight_decay=0.1)
    for group in adam.param_groups:
        group["eps"] = 0.0
    fast.param_groups[0]["eps"] = 0.0  # the two add it in different places
    for step in range(50):
        give(params, step)
        give(others, step)
        fast.step()
        adam.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
    fast.param_groups[0]["switch_tolerance"] = math.inf
    give(params, 50)
    fast.step()
    assert fast.phase == "sgd"
    assert not fast.state
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    sgd = torch.optim.SGD(others, lr=0.1 * fast.calibrated_lr, momentum=0.9)
    fast.param_groups[0]["weight_decay"] = 0.0
    for step in range(50):
        give(params, step)
        give(others, step)
        fast.step()
        sgd.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)


def test_swats_never_switches_at_its_first_step_or_to_a_negative_rate() -> None:
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SWATS([w], switch_tolerance=math.inf)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert optimizer.phase == "adam"
    w.grad = -0.5 * torch.ones_like(w)  # the momentum still points the other way: gamma is negative
    optimizer.param_groups[0]["lambda"] = 0.0
    optimizer.step()
    assert optimizer.calibrated_lr < 0
    assert optimizer.phase == "adam"


def test_swats_keeps_its_average_where_step_and_gradient_are_orthogonal() -> None:
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = SWATS([w])
    w.grad = torch.ones(2)
    optimizer.step()
    before = optimizer.param_groups[0]["lambda"]
    w.grad = torch.zeros(2)
    optimizer.step()
    assert optimizer.param_groups[0]["lambda"] == before
    assert optimizer.param_groups[0]["step"] == 2


def test_each_group_of_swats_switches_for_itself() -> None:
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = SWATS([{"params": [first], "switch_tolerance": math.inf}, {"params": [second]}])
    rng = np.random.default_rng(0)
    for _ in range(3):
        for p in (first, second):
            p.grad = torch.tensor(rng.normal(size=3), dtype=torch.float32)
        optimizer.step()
    assert [group["phase"] for group in optimizer.param_groups] == ["sgd", "adam"]
    assert optimizer.phase == "adam"


@pytest.mark.parametrize(("eta", "momentum"), [(0.01, 0.0), (0.3, 0.9), (1.0, 0.9)])
def test_noisy_sgd_takes_the_references_steps(eta: float, momentum: float) -> None:
    params = parameters()
    fast = NoisySGD(params, 1e-2, momentum, gradient_noise=eta, seed=5, weight_decay=0.1)
    slow = NoisySGDReference(start(), 1e-2, momentum, eta, 5, 0.1)
    for step in range(200):
        given = give(params, step)
        fast.step()
        slow.step(given)
        for p, w, g in zip(params, slow.w, given, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-9, atol=1e-12)
            assert p.grad is not None
            np.testing.assert_array_equal(p.grad.numpy(), g)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_noise_it_is_sgd_bit_for_bit(momentum: float) -> None:
    params, others = parameters(), parameters()
    noisy = NoisySGD(params, 0.1, momentum, gradient_noise=0.0, weight_decay=0.1)
    sgd = torch.optim.SGD(others, 0.1, momentum, weight_decay=0.1)
    for step in range(50):
        give(params, step)
        give(others, step)
        noisy.step()
        sgd.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.integers(0, 300))
def test_noise_differs_with_seed_step_and_parameter(seed: int, step: int, ordinal: int) -> None:
    like = torch.empty(20)
    here = noise(seed, step, ordinal, like)
    for other in ((seed + 1, step, ordinal), (seed, step + 1, ordinal), (seed, step, ordinal + 1)):
        assert not torch.equal(here, noise(*other, like))
    # torch's CPU generator reads 32 bits of its seed: seeds that differ above them must not be one.
    assert not torch.equal(here, noise(seed + 2**32, step, ordinal, like))


def test_noise_is_normal() -> None:
    draws = torch.cat([noise(0, step, 0, torch.empty(1000, dtype=torch.float64)) for step in range(200)])
    assert abs(draws.mean()) < 4 / math.sqrt(200_000)
    assert abs(draws.var() - 1) < 4 * math.sqrt(2 / 200_000)


@pytest.mark.parametrize(
    "make",
    [
        lambda params: SWATS(params, lr=1e-2, switch_tolerance=1e-4, weight_decay=0.1),
        lambda params: NoisySGD(params, 1e-2, 0.9, gradient_noise=0.3, seed=2),
    ],
    ids=["swats", "noisy-sgd"],
)
@pytest.mark.parametrize("at", [1, 30, 90])
def test_a_resumed_run_ends_with_the_same_bits(make: Callable[[Any], torch.optim.Optimizer], at: int) -> None:
    params = parameters()
    optimizer = make(params)
    for step in range(100):
        if step == at:
            saved = copy.deepcopy(optimizer.state_dict())
            others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        give(params, step)
        optimizer.step()
    again = make(others)
    again.load_state_dict(saved)
    for step in range(at, 100):
        give(others, step)
        again.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SWATS, {"lr": -1.0}),
        (SWATS, {"betas": (0.9, 1.0)}),
        (SWATS, {"switch_tolerance": math.nan}),
        (NoisySGD, {"gradient_noise": -0.1}),
        (NoisySGD, {"weight_decay": -0.1}),
    ],
)
def test_options_out_of_range(kind: type, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected .*values?"):
        kind(parameters(), **options)

"""Sec. IV in a training: how large the dither is beside the momentum, and what it makes of a step and of a run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from signstep import SignSGD
from signstep.lab.verify.dithered_sign import ALPHA, DECAY, directions, law, sigma
from signstep.lab.verify.measures import LINEAR_GAIN, scalar_mean_error, train_resnet8
from signstep.lab.verify.registry import FAILS, LIMIT, Finding, check, when

PARAMETERS = 11_173_962
"""Number of parameters of ResNet-18 with 10 classes."""
_SEED = 20260802


@functools.cache
def _training(lr: float, alpha: float, reduction: str = "mean") -> tuple[list[float], list[float]]:
    """The loss per image before each of 60 steps of ResNet-8 on digits, and rms(m) after it."""
    losses, rms = [], []
    steps = train_resnet8(lambda params: SignSGD(params, lr=lr, dither=alpha), seed=_SEED, reduction=reduction)
    for model, optimizer, loss in steps:
        losses.append(loss / (128 if reduction == "sum" else 1))
        m = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()])
        rms.append(float(m.square().mean().sqrt()))
    return losses, rms


@check(
    "dither.matched",
    "alpha = 0.1 is matched to the typical magnitude of the momentum",
    source="paper, Sec. IV, Empirical results",
    expected=FAILS,
)
def matched(rng: Generator) -> Finding:
    _, rms = _training(1e-3, 0.0)
    _, summed = _training(1e-3, 0.0, "sum")
    ratio = [m / sigma(k) for k, m in enumerate(rms)]
    needed = sigma(20_000) * math.sqrt(PARAMETERS)
    return Finding(
        measured=f"ResNet-8, digits, batches of 128, 60 steps: rms(m) {min(rms):.1e} to {max(rms):.1e}, which is "
        f"{100 * min(ratio):.2f} to {100 * max(ratio):.2f} % of sigma_k",
        error="one seed; the shortfall is a factor, not a percentage",
        verdict=when(max(ratio) > 0.3),
        condition="gradients of a mean loss",
        detail=f"for rms(m) = sigma_k at step 20,000, |m|_2 of ResNet-18 must be {needed:.0f}. A loss summed over the "
        f"batch, 128 times as large, comes to {100 * min(m / sigma(k) for k, m in enumerate(summed)):.0f} to "
        f"{100 * max(m / sigma(k) for k, m in enumerate(summed)):.0f} % of sigma_k: the paper does not say which it "
        "took",
        values={"rms": rms, "ratio": ratio},
    )


@check(
    "dither.late-stage",
    "The dither decays so as not to interfere with late-stage convergence",
    source="paper, Sec. IV, below (10)",
    expected=FAILS,
)
def late_stage(rng: Generator) -> Finding:
    _, rms = _training(1e-3, 0.0)
    typical = 3e-4
    late, end = sigma(20_000), sigma(80_000)
    right = 0.5 + law(typical / late) / 2
    energy = law(typical / late) ** 2
    steps = (ALPHA / typical**2) ** (1 / DECAY)
    return Finding(
        measured=f"sigma_k is {late / typical:.0f} times a momentum of 3e-4 at step 20,000 and {end / typical:.0f} "
        f"times at 80,000 (rms(m) of ResNet-8 ends at {rms[-1]:.1e}); there P(right sign) = {right:.3f} and the "
        f"signal is {energy:.1e} of the step's energy",
        error="arithmetic on (9); the momentum is measured by dither.matched",
        verdict=when(end < max(rms)),
        condition="momenta of a mean loss, far below sigma_k at all steps",
        detail=f"sigma_k falls to 3e-4 after {steps:.0e} steps. In these steps the method is SGD with a learning rate "
        "that grows (dither.learning-rate), beside noise of delta per coordinate and step",
        values={"sigma": [late, end], "right": right, "energy": energy, "steps": steps},
    )


@check(
    "dither.strongest-early",
    "The effect of dither is strongest early in training",
    source="paper, Sec. IV, below (10)",
    expected=FAILS,
)
def strongest_early(rng: Generator) -> Finding:
    m, found = 3e-4, {}
    for k in (0, 20_000, 80_000):
        signs = directions(torch.full((1 << 22,), m), step=k, seed=k + 1, dither=ALPHA).double()
        found[k] = (float(signs.mean()), 1 / math.sqrt(1 << 22))
    rise = (found[80_000][0] - found[0][0]) / (found[0][1] * math.sqrt(2))
    return Finding(
        measured="mean dithered sign at m = 3e-4, the step per unit of which is what restores magnitude: "
        + ", ".join(f"{mean:.4f} at {k:,} ({law(m / sigma(k)):.4f})" for k, (mean, _) in found.items()),
        error=f"standard errors {found[0][1]:.4f}; the rise is {rise:.0f} of them",
        verdict=when(rise < LIMIT),
        condition="momenta below sigma_k",
        detail="in brackets by the formula. What is largest early is the range of momenta that the step is linear "
        "in; its slope, sqrt(2/pi)/sigma_k, is smallest then",
    )


@check(
    "dither.learning-rate",
    "Below sigma_k a dithered step is SGD with momentum at lr delta sqrt(2/pi)/sigma_k, 22 times larger after 80,000 "
    "steps, and a walk of delta sqrt(k)",
    source="docs/theory.md, what dither does to a step",
)
def learning_rate(rng: Generator) -> Finding:
    growth = sigma(0) / sigma(80_000)
    rate = 1e-3 * LINEAR_GAIN / sigma(20_000)
    walk = 1e-3 * math.sqrt(80_000)
    mean, error, stated = _quadratic(
        lambda x: SignSGD([x], lr=1e-3, momentum=0.9, dither=1.0, dither_decay=0.0, seed=1)
    )
    other, other_error, _ = _quadratic(lambda x: _NoisySGD(x, 1e-3 * LINEAR_GAIN, 1e-3, rng))
    z = [
        (mean[0] - other[0]) / math.hypot(error[0], other_error[0]),
        (mean[1] - other[1]) / math.hypot(error[1], other_error[1]),
    ]
    arithmetic = abs(growth / 22.3 - 1) < 5e-3 and abs(rate * 0.1 / 0.0038 - 1) < 0.02 and abs(walk / 0.283 - 1) < 1e-2
    return Finding(
        measured=f"growth {growth:.1f}; delta = 1e-3 is torch.optim.SGD(momentum=0.9) at lr {rate * 0.1:.4f} at step "
        f"20,000; walk {walk:.2f} in 80,000 steps. On a quadratic, 500 steps from {stated:g}: mean {mean[0]:.5f} and "
        f"sd {mean[1]:.5f} of the optimizer, {other[0]:.5f} and {other[1]:.5f} of SGD with such noise",
        error=f"z = {z[0]:+.1f} and {z[1]:+.1f}",
        verdict=when(max(map(abs, z)) < LIMIT and arithmetic),
        detail="so (9) is a schedule of the learning rate that rises, on top of the one that is set",
        values={"growth": growth, "rate": rate, "walk": walk},
    )


class _NoisySGD:
    """SGD on the averaged momentum, with a coin of +-delta on each coordinate and step."""

    def __init__(self, x: Tensor, lr: float, delta: float, rng: Generator) -> None:
        self.x, self.lr, self.delta, self.rng = x, lr, delta, rng
        self.m = torch.zeros_like(x)

    def step(self) -> None:
        assert self.x.grad is not None
        self.m.lerp_(self.x.grad, 0.1)
        coins = torch.randint(2, self.x.shape, generator=self.rng).to(self.x.dtype) * 2 - 1
        # The coin's variance is that of a dithered sign, 1 - E^2, to second order in m/sigma.
        self.x.data -= self.lr * self.m + self.delta * coins


def _quadratic(make: Callable[[nn.Parameter], Any]) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Mean and standard deviation, with their errors, of 2^16 coordinates after 500 steps on x^2/2."""
    n, start = 1 << 16, 0.1
    x = nn.Parameter(torch.full((n,), start))
    optimizer = make(x)
    for _ in range(500):
        x.grad = x.detach().clone()
        optimizer.step()
    found = x.detach().double()
    mean, error = scalar_mean_error(found)
    spread = float(found.std())
    return (mean, spread), (error, spread / math.sqrt(2 * n)), start


@check(
    "dither.alpha-drift",
    "Below sigma_k alpha enters the mean step as delta/sqrt(alpha) only",
    source="docs/theory.md, what dither does to a step",
)
def alpha_drift(rng: Generator) -> Finding:
    m, n = 3e-3, 1 << 22
    drift, error = {}, {}
    for i, (delta, alpha) in enumerate(((1.0, 0.1), (2.0, 0.4), (0.5, 0.025))):
        signs = directions(torch.full((n,), m), seed=20 + i, dither=alpha, dither_decay=0.0).double()
        drift[alpha], error[alpha] = delta * float(signs.mean()), delta / math.sqrt(n)
    z = [(drift[a] - drift[0.1]) / math.hypot(error[a], error[0.1]) for a in (0.4, 0.025)]
    return Finding(
        measured="mean step at m = 0.003: "
        + ", ".join(
            f"{drift[a]:.5f} at delta = {d:g}, alpha = {a:g}" for d, a in ((1.0, 0.1), (2.0, 0.4), (0.5, 0.025))
        ),
        error=f"z = {z[0]:+.1f} and {z[1]:+.1f}, {n:,} draws each",
        verdict=when(max(map(abs, z)) < LIMIT),
        detail="the noise beside it is delta, so a larger alpha is the same learning rate with more noise",
    )


@check(
    "dither.short-run",
    "Pre-sign dither at alpha = 0.1 improves on the clean step",
    source="paper, Sec. IV, Empirical results (CIFAR-100, ResNet-18)",
    expected=FAILS,
)
def short_run(rng: Generator) -> Finding:
    clean = sum(_training(1e-3, 0.0)[0][-10:]) / 10
    found = {lr: sum(_training(lr, ALPHA)[0][-10:]) / 10 for lr in (1e-4, 1e-3, 1e-2)}
    return Finding(
        measured=f"ResNet-8, digits, 60 steps, mean loss of the last 10: clean {clean:.2f} at lr 1e-3; dithered "
        + ", ".join(f"{loss:.2f} at {lr:g}" for lr, loss in found.items()),
        error="one seed; chance is a loss of 2.30",
        verdict=when(min(found.values()) < clean),
        condition="short runs, in which sigma_k is large",
        detail="60 steps of a small net do not refute 76 % on CIFAR-100 after many epochs; they show that the "
        "learning rate must be tuned anew, or sigma made relative to m. results/cpu-strong has the same on CIFAR-10, "
        "tuned",
        values={"clean": clean, **{str(lr): loss for lr, loss in found.items()}},
    )

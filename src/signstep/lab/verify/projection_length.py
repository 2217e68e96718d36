"""The rules beside Sec. V on the real optimizer: SWATS's projection, and the rate that keeps the step's length."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from signstep import HybridSignSGD
from signstep.lab.verify.measures import scalar_mean_error
from signstep.lab.verify.projection_rate import BETA, hybrid
from signstep.lab.verify.registry import LIMIT, Finding, check, when

_FLOAT32_ROUNDING = 1e-5


@check(
    "projection.product",
    'For one step, the rate of "swats" times that of eq. (12) is delta^2 d / |g|^2',
    source="signstep.optim.calibration",
)
def product(rng: Generator) -> Finding:
    worst = 0.0
    for d in (3, 100, 10_000):
        g = torch.randn(d, generator=rng)
        rates = []
        for rule in ("swats", "paper"):
            x = nn.Parameter(torch.zeros(d))
            x.grad = g
            optimizer = hybrid(x, lr=0.1, calibration=rule)
            optimizer.step()
            rates.append(optimizer.calibrated_lr)
        worst = max(worst, abs(rates[0] * rates[1] * float(g.square().sum()) / (0.01 * d) - 1))
    return Finding(
        measured=f"d = 3, 100, 10,000: off by {worst:.0e} of itself at most",
        error="rounding in float32",
        verdict=when(worst < _FLOAT32_ROUNDING),
    )


@check(
    "projection.kept-length",
    'Under "norm", with SGD\'s momentum that of the sign phase, the first SGD step is as long as the last sign steps',
    source="signstep.optim.calibration",
)
def kept_length(rng: Generator) -> Finding:
    d, steps, runs = 50, 200, 400
    # A run is a parameter with its own rate: all runs take a step together.
    xs: list[Tensor] = [nn.Parameter(torch.zeros(d)) for _ in range(runs)]
    optimizer = HybridSignSGD(
        xs,
        lr=0.1,
        momentum=BETA,
        sgd_momentum=BETA,
        ema_decay=0.99,
        calibration="norm",
        calibration_scope="tensor",
        switch_step=steps,
    )
    draws = torch.stack([torch.randn(d, generator=rng) for _ in range(runs * (steps + 2))]).view(runs, steps + 2, d)
    for k in range(1, steps + 2):
        before = torch.stack(xs).detach()
        for x, g in zip(xs, 0.3 * draws[:, 0] + draws[:, k], strict=True):
            x.grad = g
        optimizer.step()
    mean, error = scalar_mean_error((torch.stack(xs).detach() - before).square().sum(1) / (0.1**2 * d))
    z = (mean - 1) / math.hypot(error, 1e-9)
    return Finding(
        measured=f"squared length over that of a sign step: {mean:.3f}, mean of {runs} runs of {steps} noisy steps",
        error=f"{error:.3f}, z = {z:+.1f}",
        verdict=when(abs(z) < LIMIT),
        detail="one step by itself may be longer or shorter: its momentum's norm scatters around the average",
        values={"mean": mean, "error": error},
    )

"""The rules beside Sec. V on the real optimizer: SWATS's projection, and the rate that keeps the step's length."""

from __future__ import annotations

import math

import torch
from torch import Generator, nn

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
    squares = []
    for _ in range(runs):
        x = nn.Parameter(torch.zeros(d))
        optimizer = hybrid(
            x, lr=0.1, momentum=BETA, sgd_momentum=BETA, ema_decay=0.99, calibration="norm", switch_step=steps
        )
        drift = torch.randn(d, generator=rng)
        for _ in range(steps + 1):
            before = x.detach().clone()
            x.grad = 0.3 * drift + torch.randn(d, generator=rng)
            optimizer.step()
        squares.append(float((x.detach() - before).square().sum()) / (0.1**2 * d))
    mean, error = scalar_mean_error(torch.tensor(squares))
    z = (mean - 1) / math.hypot(error, 1e-9)
    return Finding(
        measured=f"squared length over that of a sign step: {mean:.3f}, mean of {runs} runs of {steps} noisy steps",
        error=f"{error:.3f}, z = {z:+.1f}",
        verdict=when(abs(z) < LIMIT),
        detail="one step by itself may be longer or shorter: its momentum's norm scatters around the average",
        values={"mean": mean, "error": error},
    )

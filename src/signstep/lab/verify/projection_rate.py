"""Sec. V on the real optimizer: the projection (11), what its rate measures, and the absolute value in (12)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from signstep import HybridSignSGD
from signstep.lab.verify.measures import LINEAR_GAIN, mean_error, scalar_mean_error, step_on, train_resnet8
from signstep.lab.verify.registry import FAILS, LIMIT, Finding, check, when
from signstep.optim import calibration

_SEED = 20260803
BETA, NOISE = 0.9, 1e-3
_FLOAT32_ROUNDING = 1e-5


def hybrid(x: Tensor, **options: Any) -> HybridSignSGD:
    """The optimizer at delta = 1, where calibrated_lr is lambda / delta; it averages only if `options` say so."""
    return HybridSignSGD([x], **{"lr": 1.0, "ema_decay": 0.0, "calibration": "paper", **options})


def rates(gradients: Tensor, held: Tensor | None = None, **options: Any) -> Tensor:
    """The optimizer's rate lambda_k for each of the gradients [K, d]; `held` replaces its momentum before each step."""
    x = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = hybrid(x, **options)
    found = []
    for g in gradients:
        if held is not None:
            optimizer.state[x]["exp_avg"] = held.clone()
        x.grad = g
        optimizer.step()
        found.append(optimizer.calibrated_lr)
    return torch.tensor(found, dtype=torch.float64)


def averaged(rule: str, sums: Tensor, *, decay: float) -> Tensor:
    """lambda-bar / delta of `signstep.optim.calibration` over sums [K, 2, chains] of <s, g> and |g|^2: [chains]."""
    state = {name: torch.zeros(sums.shape[-1], dtype=sums.dtype) for name in calibration.CALIBRATION_STATE}
    sizes = torch.ones(sums.shape[-1], dtype=sums.dtype)
    for each in sums:
        calibration.update_rate(rule, state, each, sizes, lr=1.0, ema_decay=decay)
    return state["calibrated_lr"]


@check(
    "projection.identity",
    "lambda_k |g|^2 = delta <sign(m_(k+1)), g>: the SGD step is the sign step's projection on the gradient",
    source="paper, eq. (11)",
)
def identity(rng: Generator) -> Finding:
    n, delta, worst = 10_000, 0.01, 0.0
    g = torch.randn(8, n, generator=rng)
    x = nn.Parameter(torch.zeros(n))
    optimizer = hybrid(x, lr=delta, calibration="ratio")
    for each in g:
        step = -step_on(optimizer, x, each).double()
        projection = (step * each).sum() / each.double().square().sum() * each
        worst = max(worst, float((projection + optimizer.calibrated_lr * each).norm() / projection.norm()))
    return Finding(
        measured="largest relative distance of -lambda g from the projection of the applied step, 8 steps: "
        f"{worst:.1e}",
        error="rounding in float32",
        verdict=when(worst < _FLOAT32_ROUNDING),
        detail="so to first order both steps lower the loss by the same amount",
    )


@check(
    "projection.length",
    "The SGD step matches the effective step size of SignSGD-M",
    source="paper, Sec. I, Contributions, and Sec. V, Motivation",
    expected=FAILS,
)
def length(rng: Generator) -> Finding:
    found = agreement()
    share = found.cosine[5:]
    return Finding(
        measured=f"ResNet-8, digits, 60 steps: |lambda g|/|delta sign m| = |cos|, {float(share.abs().min()):.2f} to "
        f"{float(share.abs().max()):.2f} after the first steps",
        error="one seed",
        verdict=when(float(share.abs().median()) > 0.9),
        condition="a cosine between sign m and g that is far from 1",
        detail="what (11) matches is the decrease of the loss to first order, not the length of the step: the step "
        f"after the switch is {1 / float(share.abs().median()):.0f} times shorter in the median",
        values={"cosine": found.cosine.tolist()},
    )


@dataclass(frozen=True)
class Agreement:
    """How sign m and g agree in each of 60 steps of ResNet-8 on digits."""

    ratio: Tensor
    """lambda / delta of (12)."""
    norm: Tensor
    """|g|."""
    cosine: Tensor
    """Of sign m and g."""
    parameters: int
    """The network's number of them, d."""


@functools.cache
def agreement() -> Agreement:
    """Train, and measure the agreement after each step."""
    delta, ratio, norm, cosine, count = 1e-3, [], [], [], 0
    make = functools.partial(HybridSignSGD, lr=delta, ema_decay=0.0, calibration="paper")
    for model, optimizer, _ in train_resnet8(make, seed=_SEED):
        parameters = list(model.parameters())
        count = sum(p.numel() for p in parameters)
        inner = sum(float((optimizer.state[p]["exp_avg"].sign() * p.grad).sum()) for p in parameters)
        size = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
        ratio.append(float(optimizer.param_groups[0]["calibrated_lr"]) / delta)
        norm.append(size)
        cosine.append(inner / (size * math.sqrt(count)))
    as_float64 = functools.partial(torch.tensor, dtype=torch.float64)
    return Agreement(as_float64(ratio), as_float64(norm), as_float64(cosine), count)


@check(
    "projection.rate",
    "lambda/delta is sqrt(2/pi)/tau where sign m = sign g, and sqrt(2/pi)/(sqrt(d) tau) where they are independent, "
    "for Gaussian gradients of standard deviation tau",
    source="docs/theory.md, the projection",
)
def rate(rng: Generator) -> Finding:
    d, tau, steps = 4_000, 1e-3, 400
    g = tau * torch.randn(steps, d, generator=rng)
    aligned = rates(g, momentum=0.0)
    signs = torch.randn(d, generator=rng).sign()
    random = rates(g, 1e6 * signs)
    stated = {"aligned": LINEAR_GAIN / tau, "independent": LINEAR_GAIN / math.sqrt(d) / tau}
    found = {"aligned": mean_error(aligned), "independent": mean_error(random)}
    # E 1/|g|^2 is larger than 1/E|g|^2 by 2/d.
    z = {name: (float(m) - stated[name]) / math.hypot(float(e), 2 / d * stated[name]) for name, (m, e) in found.items()}
    return Finding(
        measured=f"d = {d:,}, tau = 0.001: "
        + ", ".join(f"{name} {float(m):.1f} (stated {stated[name]:.1f})" for name, (m, _) in found.items()),
        error=f"z = {', '.join(f'{v:+.1f}' for v in z.values())}, {steps} steps",
        verdict=when(max(map(abs, z.values())) < LIMIT),
        detail="the momentum that is independent is held fixed from outside; (12) takes the absolute value of a "
        "product whose mean is 0",
        values={name: float(m) for name, (m, _) in found.items()},
    )


@functools.cache
def _noise() -> tuple[tuple[float, float], tuple[float, float], float]:
    """lambda/delta on pure noise and against the previous momentum, with errors; and corr(m_(k+1), g)."""
    rng = Generator().manual_seed(_SEED + 1)
    d, steps = 4_000, 600
    g = NOISE * torch.randn(steps, d, generator=rng)
    m, lagged, correlations = torch.zeros(d), [], []
    for each in g:
        lagged.append(float((m.sign() * each).sum() / each.square().sum()))
        m.lerp_(each, 1 - BETA)
        correlations.append(float((m * each).sum() / (m.norm() * each.norm())))
    found = _stationary(rates(g, momentum=BETA)[50:])
    return found, _stationary(torch.tensor(lagged[50:]).double()), sum(correlations[50:]) / (steps - 50)


@check(
    "projection.pure-noise",
    "lambda matches the effective step size of the sign steps: it is small where they make no progress",
    source="paper, Sec. I, Contributions, and Sec. V",
    expected=FAILS,
)
def pure_noise(rng: Generator) -> Finding:
    (mean, error), (lag, lag_error), _ = _noise()
    perfect = LINEAR_GAIN / NOISE
    return Finding(
        measured=f"gradients that are noise of tau = 0.001 and nothing else, beta = 0.9: lambda/delta = {mean:.1f}, "
        f"{100 * mean / perfect:.0f} % of what perfect agreement gives; against the previous m {lag:+.2f}",
        error=f"standard errors {error:.1f} and {lag_error:.2f}",
        verdict=when(mean < LIMIT * error),
        condition="pure noise: g is a part of m_(k+1)",
        detail="no rule of ours cures it; signstep.monitor shows the rate by the previous m beside it, which is near "
        "0 here",
        values={"measured": mean, "lagged": lag},
    )


@check(
    "projection.self-inclusion",
    "Under pure noise corr(m_(k+1), g) is sqrt(1 - beta^2), 0.436 at beta = 0.9, and lambda/delta sqrt(2/pi) sqrt(1 "
    "- beta^2)/tau; by the previous m it is 0",
    source="docs/theory.md, self-inclusion",
)
def self_inclusion(rng: Generator) -> Finding:
    (mean, error), (lag, lag_error), correlation = _noise()
    share = math.sqrt(1 - BETA**2)
    z, z_lag = (mean - LINEAR_GAIN * share / NOISE) / error, lag / lag_error
    return Finding(
        measured=f"correlation {correlation:.4f}, stated {share:.4f}; lambda/delta {mean:.1f}, stated "
        f"{LINEAR_GAIN * share / NOISE:.1f}; by the previous m {lag:+.2f}",
        error=f"z = {z:+.1f} and {z_lag:+.1f}",
        verdict=when(max(abs(z), abs(z_lag)) < LIMIT and abs(correlation - share) < 2e-3 and abs(share - 0.436) < 5e-4),
        values={"correlation": correlation, "measured": mean},
    )


def _stationary(values: Tensor, block: int = 25) -> tuple[float, float]:
    """Mean of a sequence with a short memory, and its error from the means of blocks."""
    blocks = values[: len(values) // block * block].view(-1, block).mean(1)
    mean, error = mean_error(blocks)
    return float(mean), float(error)


def folded(u: float) -> float:
    """E |X| / E X of a normal law with mean/sd = u."""
    return LINEAR_GAIN * math.exp(-u * u / 2) / u + math.erf(u / math.sqrt(2))


@functools.cache
def folded_averages() -> dict[float, tuple[float, float, float]]:
    """By mean/sd of <s, g>: lambda-bar over its signed mean, its error, and z of "ratio" against that mean."""
    rng = Generator().manual_seed(_SEED + 2)
    found = {}
    for u in (0.1, 0.5, 1.0, 2.0):
        inner = u + torch.randn(2_000, 400, generator=rng, dtype=torch.float64)
        sums = torch.stack([inner, torch.ones_like(inner)], dim=1)
        mean, error = scalar_mean_error(averaged("paper", sums, decay=0.99))
        ratio, ratio_error = scalar_mean_error(averaged("ratio", sums, decay=0.999))
        found[u] = (mean / u, error / u, (ratio - u) / ratio_error)
    return found


@check(
    "projection.absolute-value",
    "The absolute value in (12) is harmless: it enforces a non-negative rate for stability",
    source="paper, eq. (12)",
    expected=FAILS,
)
def absolute_value(rng: Generator) -> Finding:
    found = folded_averages()
    return Finding(
        measured="lambda-bar over the rate of the averaged projection: "
        + ", ".join(f"{value:.2f} at mean/sd = {u:g}" for u, (value, _, _) in found.items()),
        error=f"standard errors {', '.join(f'{error:.3f}' for _, error, _ in found.values())}",
        verdict=when(found[0.1][0] < 1.5),
        condition="a product <sign m, g> that is noisy",
        detail='averaged before it is clamped, as by calibration="ratio", it has no such bias (largest |z| '
        f"{max(abs(z) for _, _, z in found.values()):.1f}). Self-inclusion hides it: many coordinates' noise makes "
        "mean/sd large",
    )


@check(
    "projection.folded",
    "The absolute value's bias is that of a folded normal law: 8.0, 1.79, 1.17 and 1.01 at mean/sd 0.1, 0.5, 1 and 2",
    source="docs/theory.md, the absolute value",
)
def folded_law(rng: Generator) -> Finding:
    stated = {0.1: 8.0, 0.5: 1.79, 1.0: 1.17, 2.0: 1.01}
    z = [(value - folded(u)) / error for u, (value, error, _) in folded_averages().items()]
    signed = [each for _, _, each in folded_averages().values()]
    return Finding(
        measured=", ".join(f"{value:.3f} ({folded(u):.3f})" for u, (value, _, _) in folded_averages().items())
        + '; "ratio" has the signed mean',
        error=f'largest |z| {max(map(abs, z)):.1f} of 4, of "ratio" {max(map(abs, signed)):.1f} of 4',
        verdict=when(
            max(map(abs, [*z, *signed])) < LIMIT and all(abs(folded(u) / v - 1) < 5e-3 for u, v in stated.items())
        ),
    )


@check(
    "projection.effective-dimension",
    "At corr(m, g) = 0.02 and 100 effective dimensions (12) is 5.1 times too large; at 0.436 it is not",
    source="docs/theory.md; the bias of the absolute value where coordinates move together",
)
def effective_dimension(rng: Generator) -> Finding:
    d, steps, found, z = 100, 40_000, {}, []
    for rho in (0.02, 0.436):
        g = torch.randn(steps, d, generator=rng, dtype=torch.float64)
        m = rho * g + math.sqrt(1 - rho * rho) * torch.randn(steps, d, generator=rng, dtype=torch.float64)
        inner = (m.sign() * g).sum(1)
        mean, error = scalar_mean_error(inner.abs())
        signed = rho * LINEAR_GAIN * d
        found[rho] = mean / signed
        z.append((mean / signed - folded(signed / math.sqrt(d * (1 - (LINEAR_GAIN * rho) ** 2)))) / (error / signed))
    return Finding(
        measured=", ".join(f"{value:.2f} times at {rho:g}" for rho, value in found.items()),
        error=f"z = {z[0]:+.1f} and {z[1]:+.1f} against the folded normal law, {steps:,} draws",
        verdict=when(abs(found[0.02] / 5.1 - 1) < 0.03 and abs(found[0.436] - 1) < 0.01 and max(map(abs, z)) < LIMIT),
        values={str(rho): value for rho, value in found.items()},
    )


@check(
    "projection.anti-aligned",
    "With |.| a step that is turned away from the gradient gives a rate that is not harmful",
    source="paper, eq. (12), 'for stability'",
    expected=FAILS,
)
def anti_aligned(rng: Generator) -> Finding:
    d = 1_000
    g = torch.randn(1, d, generator=rng)
    paper = float(rates(g, -1e6 * g[0].sign()))
    ratio = float(rates(g, -1e6 * g[0].sign(), calibration="ratio"))
    return Finding(
        measured=f'sign m = -sign g: lambda/delta = {paper:+.3f} by (12), as large as for sign m = sign g; by "ratio" '
        f"{ratio:+.3f}",
        error="exact",
        verdict=when(paper <= 0),
        condition="momentum that points up the loss",
        detail="the projection (11) is negative there: (12) turns the worst agreement into the largest rate",
        values={"paper": paper, "ratio": ratio},
    )

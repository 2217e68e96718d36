"""Sec. IV on the real optimizer: the law of a dithered step, its schedule (9), and noise after the sign (10)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from signstep import SignSGD
from signstep.lab.verify.measures import LINEAR_GAIN, sign_score, step_on
from signstep.lab.verify.registry import FAILS, LIMIT, Finding, check, when
from signstep.optim.dither import dither_std, expected_sign
from signstep.theory.vote import accuracy, linear_slope

ALPHA, DECAY = 0.1, 0.55
"""The paper's best alpha, and gamma."""
_DRAWS = 1 << 20


def directions(m: Tensor, *, step: int = 0, seed: int = 0, **options: Any) -> Tensor:
    """The direction of one step of `SignSGD` without momentum on the gradient m: (x_k - x_(k+1)) / delta."""
    x = nn.Parameter(torch.zeros_like(m))
    optimizer = SignSGD([x], lr=1.0, momentum=0.0, seed=seed, **options)
    optimizer.param_groups[0]["step"].fill_(step)
    return step_on(optimizer, x, m)


def sigma(step: int, alpha: float = ALPHA) -> float:
    """sigma_k of eq. (9), as the optimizer computes it."""
    return float(dither_std(torch.tensor(step), alpha, DECAY))


def law(z: float) -> float:
    """E sign(m + xi) at m / sigma = z, by Sec. IV."""
    return math.erf(z / math.sqrt(2))


def uniform_law(z: float) -> float:
    """The same of uniform noise of that sigma, by Schuchman's condition."""
    return max(-1.0, min(1.0, z / math.sqrt(3)))


_UNIFORM: dict[str, Any] = {"dither": 1.0, "dither_decay": 0.0, "dither_law": "uniform"}


@check(
    "dither.law",
    "The expected dithered sign is 2 Phi(m/sigma) - 1, so the sign is right with probability Phi(m/sigma)",
    source="paper, Sec. IV, Effect on the sign-failure probability",
)
def dithered_law(rng: Generator) -> Finding:
    ratios, scores, means = (0.003, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0, 3.0), [], []
    bits = True
    for i, ratio in enumerate(ratios):
        m = torch.full((_DRAWS,), ratio)
        found = directions(m, seed=i, dither=1.0, dither_decay=0.0)
        expected = law(ratio)
        bits = bits and bool((found.abs() == 1).all())
        mean, score = sign_score(found, expected)
        means.append(mean)
        scores.append(score)
    ours = float((expected_sign(torch.tensor(ratios), torch.tensor(1.0)).double()
                  - torch.tensor([law(r) for r in ratios]).double()).abs().max())  # fmt: skip
    worst = max(map(abs, scores))
    return Finding(
        measured="steps of signstep.SignSGD: "
        + ", ".join(f"{mean:.4f} at {ratio:g}" for ratio, mean in zip(ratios, means, strict=True)),
        error=f"largest |z| {worst:.1f} of {len(ratios)}, {_DRAWS:,} draws each",
        verdict=when(worst < LIMIT and ours < 1e-6 and bits),
        detail="the optimizer draws +1 with that probability in place of Gaussian noise, which is the same law",
        values={"ratios": ratios, "means": means, "z": scores},
    )


@check(
    "dither.momentum",
    "Under momentum it is the just-updated m_(k+1) that is dithered, with fresh noise at each step and coordinate",
    source="paper, Algorithm 1, lines 5-7",
)
def momentum(rng: Generator) -> Finding:
    n, beta, steps = 1 << 18, 0.9, 8
    x = nn.Parameter(torch.zeros(n))
    optimizer = SignSGD([x], lr=1.0, momentum=beta, dither=1.0, dither_decay=DECAY, seed=3)
    m, residuals, scores = 0.0, [], []
    for k in range(steps):
        moved = step_on(optimizer, x, torch.full((n,), 1.0 + 0.1 * k))
        m = beta * m + (1 - beta) * (1.0 + 0.1 * k)
        expected = law(m / sigma(k, 1.0))
        residual = (moved.double() - expected) / math.sqrt(1 - expected**2)
        scores.append(float(residual.mean()) * math.sqrt(n))
        residuals.append(residual)
    stacked = torch.stack(residuals)
    between = [float((stacked[i] * stacked[j]).mean()) * math.sqrt(n) for i in range(steps) for j in range(i)]
    beside = [float((row[1:] * row[:-1]).mean()) * math.sqrt(n - 1) for row in stacked]
    worst = [max(map(abs, each)) for each in (scores, between, beside)]
    return Finding(
        measured=f"{steps} steps of {n:,} coordinates against 2 Phi(m_(k+1)/sigma_k) - 1",
        error=f"largest |z|: means {worst[0]:.1f} of {len(scores)}, products of two steps {worst[1]:.1f} of "
        f"{len(between)}, of neighbours {worst[2]:.1f} of {len(beside)}",
        verdict=when(max(worst) < LIMIT),
    )


@check("dither.limit", "As sigma -> 0 the step is that of the deterministic sign", source="paper, Sec. IV")
def limit(rng: Generator) -> Finding:
    m = torch.randn(100_000, generator=rng)
    clean = directions(m)
    share = {alpha: float((directions(m, dither=alpha) != clean).double().mean()) for alpha in (1e-2, 1e-6, 1e-14)}
    return Finding(
        measured="share of signs that differ from sign(m), m ~ N(0, 1): "
        + ", ".join(f"{value:.1e} at sigma = {math.sqrt(alpha):.0e}" for alpha, value in share.items()),
        error="100,000 coordinates",
        verdict=when(share[1e-14] == 0 and share[1e-6] < 2e-3),
    )


@check(
    "dither.linear",
    "2 Phi(m/sigma) - 1 ~ sqrt(2/pi) m/sigma to first order: within 4.2 % up to sigma/2, 16.9 % at sigma",
    source="paper, Sec. IV; docs/theory.md",
)
def linear(rng: Generator) -> Finding:
    error = {z: LINEAR_GAIN * z / law(z) - 1 for z in (0.1, 0.5, 1.0, 2.0)}
    stated = abs(error[0.5] - 0.042) < 5e-4 and abs(error[1.0] - 0.169) < 5e-4
    return Finding(
        measured="excess of the line: " + ", ".join(f"{100 * e:.1f} % at m = {z:g} sigma" for z, e in error.items()),
        error="exact",
        verdict=when(stated),
        detail="for |m| up to sigma/2 the step is proportional to m in this sense; above 2 sigma it is a sign",
        values={str(z): e for z, e in error.items()},
    )


@check(
    "dither.uniform",
    "Uniform dither on [-A, A] makes the expected sign exactly m/A for |m| <= A, with A = sqrt(3) sigma",
    source="docs/theory.md; Schuchman 1964",
)
def uniform(rng: Generator) -> Finding:
    scores, beyond = [], True
    for i, z in enumerate((-0.999, -0.7, 0.001, 0.1, 0.3, 0.5, 0.9, 1.001, -5.0)):
        found = directions(torch.full((_DRAWS,), z * math.sqrt(3)), seed=i, **_UNIFORM)
        if abs(z) < 1:
            scores.append(sign_score(found, uniform_law(z * math.sqrt(3)))[1])
        else:
            beyond = beyond and bool((found == math.copysign(1, z)).all())
    worst = max(map(abs, scores))
    return Finding(
        measured='steps of signstep.SignSGD, dither_law="uniform": mean sign at 7 values of m/A from -0.999 to 0.9; '
        f"{'no' if beyond else 'some'} step against m at 1.001 and -5",
        error=f"largest |z| {worst:.1f} of {len(scores)}, {_DRAWS:,} draws each",
        verdict=when(worst < LIMIT and beyond),
        detail="Gaussian dither, the paper's, is linear to first order only",
    )


@check(
    "dither.uniform-flips",
    "Uniform dither turns a sign with probability (1 - |m|/A)/2, and none beyond A = sqrt(3) sigma, where Gaussian "
    "dither of that sigma turns 4.2 %",
    source="docs/theory.md, what dither does to a step",
)
def uniform_flips(rng: Generator) -> Finding:
    ratios = (0.1, 0.5, 1.0, 1.5, 1.8)
    found: dict[str, list[float]] = {"gaussian": [], "uniform": []}
    scores = []
    for i, ratio in enumerate(ratios):
        m = torch.full((_DRAWS,), ratio)
        for name in found:
            turned = float((directions(m, seed=i, **(_UNIFORM | {"dither_law": name})) < 0).double().mean())
            chance = 1 - accuracy(ratio, name)
            scores.append((turned - chance) / math.sqrt(max(chance * (1 - chance), 1e-12) / _DRAWS))
            found[name].append(turned)
    worst, edge = max(map(abs, scores)), 1 - accuracy(math.sqrt(3))
    return Finding(
        measured="share of signs turned: "
        + ", ".join(
            f"{u:.3f} (Gaussian {g:.3f}) at {r:g} sigma"
            for r, u, g in zip(ratios, found["uniform"], found["gaussian"], strict=True)
        ),
        error=f"largest |z| {worst:.1f} of {len(scores)}, {_DRAWS:,} draws each",
        verdict=when(worst < LIMIT and found["uniform"][-1] == 0 and abs(edge - 0.0416) < 5e-5),
        values={"ratios": ratios, **found},
    )


@check(
    "dither.uniform-slope",
    "At equal variance the expected signs begin with the slopes 1/sqrt(3) and 2/sqrt(2 pi) over sigma: uniform dither "
    "of sqrt(pi/6) sigma is Gaussian dither of sigma to first order, and within 0.0161 of it up to sigma/2",
    source="docs/theory.md, what dither does to a step",
)
def uniform_slope(rng: Generator) -> Finding:
    share = math.sqrt(math.pi / 6)
    slopes, gaps, scores = {}, {}, []
    for i, name in enumerate(("gaussian", "uniform")):
        signs = directions(torch.full((16 * _DRAWS,), 0.05), seed=40 + i, **(_UNIFORM | {"dither_law": name}))
        mean, score = sign_score(signs, 2 * accuracy(0.05, name) - 1)
        slopes[name] = mean / 0.05
        scores.append(score)
    for i, ratio in enumerate((0.1, 0.5, 1.0)):
        m = torch.full((_DRAWS,), ratio)
        pair = [
            float(directions(m, seed=50 + i, **(_UNIFORM | options)).double().mean())
            for options in ({"dither_law": "gaussian"}, {"dither": share**2})
        ]
        gaps[ratio] = pair[1] - pair[0]
        exact = uniform_law(ratio / share) - law(ratio)
        # Both are decided by the same uniform numbers, so that the error of the difference is below that of two draws.
        scores.append((gaps[ratio] - exact) / math.sqrt(2 / _DRAWS))
    worst = max(map(abs, scores))
    within = max(uniform_law(z / 100 / share) - law(z / 100) for z in range(51))
    stated = abs(linear_slope(1, "uniform") - 1 / math.sqrt(3)) < 1e-12 and within < 0.0161
    return Finding(
        measured=f"slopes at m = 0.05 sigma: {slopes['gaussian']:.4f} (sqrt(2/pi) = {LINEAR_GAIN:.4f}) and "
        f"{slopes['uniform']:.4f} (1/sqrt(3) = {1 / math.sqrt(3):.4f}); with sqrt(pi/6) = {share:.4f} of the sigma the "
        "mean signs differ by " + ", ".join(f"{gap:+.4f} at {r:g} sigma" for r, gap in gaps.items()),
        error=f"largest |z| {worst:.1f} of {len(scores)}; exactly at most {within:.4f} up to sigma/2",
        verdict=when(worst < LIMIT and stated),
        values={"slopes": slopes, "gaps": {str(r): gap for r, gap in gaps.items()}},
    )


@check(
    "dither.expected",
    'dither_position="expected" steps by the mean of the noisy steps, of either law, absolute or relative',
    source="signstep.SignSGD, dither_position; Sec. IV",
)
def expected_step(rng: Generator) -> Finding:
    seeds, n = 1 << 12, 64
    gradient, scores = torch.linspace(-2, 2, n), []

    def second(copies: int, **options: Any) -> Tensor:
        """The second step of so many copies of the gradient, which relative dither needs the first for."""
        x = nn.Parameter(torch.zeros(copies, n))
        optimizer = SignSGD([x], lr=1.0, momentum=0.5, **options)
        step_on(optimizer, x, gradient.repeat(copies, 1))
        return step_on(optimizer, x, gradient.repeat(copies, 1)).double()

    for name in ("gaussian", "uniform"):
        for scale in ("absolute", "relative"):
            options = {"dither": 0.5, "dither_law": name, "dither_scale": scale}
            mean = second(seeds, seed=8, **options).mean(dim=0)
            (stated,) = second(1, dither_position="expected", **options)
            # Where a sign is nearly certain, the count of the others is not normal.
            within = stated.abs() < 0.98
            scores.append(((mean - stated) * ((1 - stated**2) / seeds).rsqrt())[within])
    found = torch.cat(scores).abs()
    worst = float(found.max())
    return Finding(
        measured=f"{n} momenta from -1.5 to 1.5 in the second step, {seeds:,} noisy steps of each beside one without",
        error=f"largest |z| {worst:.1f} of {len(found)}, where the expected sign is within 0.98",
        verdict=when(worst < LIMIT),
        detail="the step is not one bit: it is the limit of many noisy ones, and tells a training what the noise costs",
    )


@check(
    "dither.subtractive",
    "Algorithm 1 is the analogue of classical subtractive dithering, whose error does not depend on the input",
    source="paper, Sec. I, Contributions",
    expected=FAILS,
)
def subtractive(rng: Generator) -> Finding:
    spread = {}
    for i, z in enumerate((0.01, 0.5, 1.0, 2.0)):
        found = directions(torch.full((_DRAWS,), z), seed=10 + i, dither=1.0, dither_decay=0.0).double()
        spread[z] = float(found.var())
    fall = (spread[0.01] - spread[1.0]) / math.sqrt(2 / _DRAWS)
    return Finding(
        measured="variance of the dithered sign: "
        + ", ".join(f"{v:.3f} at m = {z:g} sigma" for z, v in spread.items()),
        error=f"the fall to m = sigma is {fall:.0f} standard errors",
        verdict=when(fall < LIMIT),
        condition="Algorithm 1, which does not subtract the noise after the sign",
        detail="non-subtractive dither makes the mean of the error independent of the input (for uniform noise), not "
        "its variance, which is 1 - (2 Phi(m/sigma) - 1)^2",
        values={str(z): v for z, v in spread.items()},
    )


@check(
    "dither.post",
    "Noise after the sign is an unbiased random walk beside a step of fixed size, and knows nothing of |m|",
    source="paper, eq. (10) and Sec. IV, Empirical results",
)
def post(rng: Generator) -> Finding:
    scores = {}
    spread = sigma(0)
    for i, m in enumerate((1e-4, 10.0)):
        noise = directions(torch.full((_DRAWS,), m), seed=i, dither=ALPHA, dither_position="post").double() - 1
        scores[f"mean at m = {m:g}"] = float(noise.mean()) / spread * math.sqrt(_DRAWS)
        scores[f"variance at m = {m:g}"] = (float(noise.var()) / spread**2 - 1) * math.sqrt(_DRAWS / 2)
    steps, n = 64, 1 << 16
    x = nn.Parameter(torch.zeros(n))
    optimizer = SignSGD([x], lr=1.0, momentum=0.0, dither=ALPHA, dither_position="post", seed=9)
    x.grad = torch.ones(n)
    for _ in range(steps):
        optimizer.step()
    walked = x.detach().double() + steps
    total = sum(sigma(k) ** 2 for k in range(steps))
    scores["walk's mean"] = float(walked.mean()) / math.sqrt(total / n)
    scores["walk's variance"] = (float(walked.var()) / total - 1) * math.sqrt(n / 2)
    worst = max(map(abs, scores.values()))
    return Finding(
        measured=f"x_k - x_(k+1) = delta (sign m + xi): means, variances and their sums over {steps} steps as stated, "
        "at |m| = 0.0001 and 10",
        error=f"largest |z| {worst:.1f} of {len(scores)}",
        verdict=when(worst < LIMIT),
        values=scores,
    )


@check(
    "dither.schedule",
    "sigma_k^2 = alpha (1 + k)^-0.55: sigma is 0.316, 0.0208 and 0.0142 at steps 0, 20,000 and 80,000 for alpha = 0.1",
    source="paper, eq. (9)",
)
def schedule(rng: Generator) -> Finding:
    stated, scores, found = {0: 0.316, 20_000: 0.0208, 80_000: 0.0142}, [], {}
    for k in stated:
        found[k] = sigma(k)
        exact = math.sqrt(ALPHA * (1 + k) ** -DECAY)
        signs = directions(torch.full((_DRAWS,), 0.5 * exact), step=k, seed=k, dither=ALPHA)
        scores.append(sign_score(signs, law(0.5))[1])
    worst = max(map(abs, scores))
    return Finding(
        measured=", ".join(f"{value:.4f} at {k:,}" for k, value in found.items())
        + "; the optimizer's steps there, m = sigma_k/2, have the law of that sigma_k",
        error=f"largest |z| {worst:.1f} of 3, {_DRAWS:,} draws each",
        verdict=when(worst < LIMIT and all(abs(found[k] / value - 1) < 5e-3 for k, value in stated.items())),
        values={str(k): value for k, value in found.items()},
    )


@check(
    "dither.relative",
    'dither_scale="relative": sigma_k is a multiple of the rms of the previous m, so the law does not depend on m\'s '
    "scale",
    source="signstep.SignSGD, dither_scale",
)
def relative(rng: Generator) -> Finding:
    n, scores, first = 1 << 20, [], []
    for scale in (1e-6, 1.0, 1e4):
        x = nn.Parameter(torch.zeros(n))
        options = {"dither": 4.0, "dither_decay": 0.0, "dither_scale": "relative"}
        optimizer = SignSGD([x], lr=1.0, momentum=0.0, seed=5, **options)  # type: ignore[arg-type]
        for _ in range(2):
            moved = step_on(optimizer, x, torch.full((n,), scale))
            first.append(bool((moved == 1).all()))
        scores.append(sign_score(moved, law(0.5))[1])
    worst = max(map(abs, scores))
    return Finding(
        measured="sigma = 2 rms, gradients of size 1e-6, 1 and 1e4: the second step's mean sign is that of m = "
        "sigma/2; the first, whose previous m is 0, is not dithered",
        error=f"largest |z| {worst:.1f} of 3, {n:,} draws each",
        verdict=when(worst < LIMIT and first[::2] == [True] * 3 and not any(first[1::2])),
    )


@check(
    "dither.zero",
    "A coordinate whose momentum is exactly 0 stays where it is",
    source="signstep.SignSGD; Algorithm 1 to the letter does not say so",
)
def zero(rng: Generator) -> Finding:
    n, steps = 1 << 14, 100
    x = nn.Parameter(torch.zeros(n))
    optimizer = SignSGD([x], lr=1.0, momentum=0.9, dither=ALPHA)
    x.grad = torch.zeros(n)
    walk = torch.zeros(n)
    for _ in range(steps):
        optimizer.step()
        walk += torch.randn(n, generator=rng).sign()
    return Finding(
        measured=f"{steps} steps of zero gradient: the optimizer moved {int((x != 0).sum())} of {n:,} coordinates; "
        f"Algorithm 1 to the letter walks {float(walk.std()):.1f} delta, sqrt(steps) = {math.sqrt(steps):.0f}",
        error="exact",
        verdict=when(bool((x == 0).all()) and abs(float(walk.std()) / 10 - 1) < LIMIT / math.sqrt(2 * n)),
        detail="dead units and unused embeddings have such coordinates: 9 to 72 % of a ReLU net's, see "
        "estimators.real-gradients",
    )


@check(
    "dither.bf16",
    "The law survives bfloat16: Phi(m/sigma) compared with torch.rand, both of that dtype",
    source="neither: a plain implementation of Algorithm 1, line 7",
    expected=FAILS,
)
def bf16(rng: Generator) -> Finding:
    rounded = float(torch.special.ndtr(torch.tensor(0.003)).bfloat16())
    n = 1 << 24
    share = int((torch.rand(n, generator=rng, dtype=torch.bfloat16) < 0.5).sum()) / n
    z = (share - 0.5) / math.sqrt(0.25 / n)
    return Finding(
        measured=f"Phi(0.003) = 0.5012 rounds to {rounded:g}; on CPUs P(u < 0.5) = {share:.4f}, a sign biased by "
        f"{2 * share - 1:+.4f} at any m",
        error=f"z = {z:.1f}, {n:,} draws",
        verdict=when(rounded != 0.5 and abs(z) < LIMIT),
        condition="8 bits of mantissa",
        values={"share": share},
    )


@check(
    "dither.bf16-ours",
    "On bfloat16 parameters the optimizer's step has the law of Sec. IV: noise is drawn and compared in 32 bits",
    source="signstep.kernels.reference",
)
def bf16_ours(rng: Generator) -> Finding:
    n, scores, means = 1 << 22, [], []
    for i, ratio in enumerate((0.003, 0.1)):
        m = torch.full((n,), ratio, dtype=torch.bfloat16)
        mean, score = sign_score(directions(m, seed=i, dither=1.0, dither_decay=0.0), law(float(m[0])))
        means.append(mean)
        scores.append(score)
    worst = max(map(abs, scores))
    return Finding(
        measured=f"mean signs {means[0]:.5f} at m = 0.003 sigma ({law(0.003):.5f}) and {means[1]:.5f} at 0.1 "
        f"({law(0.1):.5f})",
        error=f"largest |z| {worst:.1f} of 2, {n:,} draws each, m rounded to bfloat16",
        verdict=when(worst < LIMIT),
    )

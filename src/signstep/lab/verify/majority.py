"""The majority vote of dithered signs: `signstep.theory.vote` beside votes drawn through the real ballots."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from scipy.optimize import brentq
from scipy.special import ndtri
from torch import Generator, Tensor

from signstep.distributed.attacks import Attack, SignFlip
from signstep.lab.training.single_votes import RATIOS, MeasuredVote, dithered_votes, formula_vote, measure_vote
from signstep.lab.verify.measures import ROUNDING, symmetric_unimodal
from signstep.lab.verify.registry import BETTER, LIMIT, Finding, check, when
from signstep.theory import vote

_ELEMENTS = 1 << 16


def votes(
    momenta: list[Tensor], *, seed: int, ties: str = "random", attacks: Mapping[int, Attack] | None = None
) -> Tensor:
    """One vote of workers with these momenta, dithered at sigma = 1."""
    return next(dithered_votes(momenta, seed=seed, ties=ties, attacks=attacks)).double()


@functools.cache
def _curves() -> tuple[MeasuredVote, ...]:
    sizes = ((1, 4_000), (3, 4_000), (4, 4_000), (15, 4_000), (101, 1_000))
    found = [measure_vote(m, "independent", elements=n, steps=2, seed=m) for m, n in sizes]
    return (*found, measure_vote(15, "scaled", elements=4_000, steps=2, seed=7))


@check(
    "vote.law",
    "The expected vote of M workers is P(B > M/2) - P(B < M/2), B binomial with q = Phi(m/sigma)",
    source="docs/theory.md; docs/vote-curve.md; signstep.theory.vote.expected_vote",
)
def vote_law(rng: Generator) -> Finding:
    scores, count = [], 0
    for measured in _curves():
        if measured.dither_workers == "independent":
            stated = [vote.expected_vote(ratio, measured.workers) for ratio in RATIOS]
            z = [
                (found - value) / max(error, 1e-6)
                for found, value, error in zip(measured.votes, stated, measured.errors, strict=True)
                if value < 1 - 1e-3  # where almost all votes are right the normal law says nothing
            ]
            scores.append(max(map(abs, z)))
            count += len(z)
    return Finding(
        measured="votes through signstep.distributed.SimulatedVote, M = "
        f"{', '.join(str(m.workers) for m in _curves()[:-1])}, m/sigma from 0 to 2",
        error=f"largest |z| {max(scores):.1f} of {count}",
        verdict=when(max(scores) < LIMIT),
        values={"z": scores},
    )


@check(
    "vote.slope",
    "Its slope at 0 is sqrt(2/pi) M C(M-1, (M-1)/2)/2^(M-1) ~ (2/pi) sqrt M: 0.80, 2.51 and 6.41 for M = 1, 15 and 101",
    source="docs/theory.md; signstep.theory.vote.linear_slope",
)
def slope(rng: Generator) -> Finding:
    stated, h, miss = {1: 0.80, 15: 2.51, 101: 6.41}, 1e-5, 0.0
    found = {m: vote.linear_slope(m) for m in (1, 3, 15, 101, 999)}
    for m, value in found.items():
        miss = max(miss, abs(vote.expected_vote(h, m) / h / value - 1))
    ratio = found[999] / (2 / math.pi * math.sqrt(999))
    return Finding(
        measured=", ".join(f"{value:.3f} for M = {m}" for m, value in found.items())
        + f"; {ratio:.4f} of (2/pi) sqrt M at 999",
        error=f"against the difference quotient of the expected vote: {miss:.0e}",
        verdict=when(
            miss < 1e-4 and abs(ratio - 1) < 1e-3 and all(abs(found[m] - v) < 6e-3 for m, v in stated.items())
        ),
        values={str(m): value for m, value in found.items()},
    )


@check(
    "vote.linear-range",
    "Voting shrinks the range in which the expected vote is linear in m by sqrt M: m = 0.3 sigma is worth 0.236, "
    "0.654 and 0.984 at M = 1, 15 and 101",
    source="docs/vote-curve.md; docs/theory.md",
)
def linear_range(rng: Generator) -> Finding:
    found = {m: vote.expected_vote(0.3, m) for m in (1, 15, 101)}
    stated = {1: 0.236, 15: 0.654, 101: 0.984}
    ends = {}
    for m in (1, 15, 101, 401):
        # Where the line is 10 % too large.
        slope_ = vote.linear_slope(m)
        ends[m] = float(brentq(lambda z, m=m, k=slope_: k * z / vote.expected_vote(z, m) - 1.1, 1e-3, 3))
    scaled = {m: z * math.sqrt(m) for m, z in ends.items() if m > 1}
    spread = max(scaled.values()) / min(scaled.values()) - 1
    return Finding(
        measured=", ".join(f"{value:.3f} at M = {m}" for m, value in found.items())
        + "; the line is 10 % too large from m/sigma = "
        + ", ".join(f"{z:.3f} (M = {m})" for m, z in ends.items()),
        error=f"exact; times sqrt M the last three agree to {100 * spread:.0f} %",
        verdict=when(all(abs(found[m] - v) < 6e-4 for m, v in stated.items()) and spread < 0.05),
        detail="voting also makes small momenta count more: both are one thing, the slope",
        values={str(m): z for m, z in ends.items()},
    )


@check(
    "vote.scaled",
    "sigma sqrt M on each worker keeps the range: m = 0.3 sigma is worth 0.19 for every M",
    source='docs/vote-curve.md, dither_workers="scaled"',
)
def scaled(rng: Generator) -> Finding:
    found = {m: formula_vote(0.3, m, scaled=True) for m in (1, 15, 101, 999)}
    measured = _curves()[-1]
    z = measured.scores
    limit = math.erf(0.3 * math.sqrt(2 / math.pi) / math.sqrt(2))
    return Finding(
        measured=", ".join(f"{value:.3f} at M = {m}" for m, value in found.items()) + f"; its limit is {limit:.3f}",
        error=f"largest |z| of real votes with scaled noise, M = 15: {max(map(abs, z)):.1f} of {len(z)}",
        verdict=when(max(map(abs, z)) < LIMIT and all(abs(found[m] - 0.19) < 6e-3 for m in (15, 101, 999))),
        detail="one worker alone has 0.236: the vote is of signs, and the limit's slope is 2/pi in place of sqrt(2/pi)",
    )


@check(
    "vote.attackers",
    "M = 15, m = 0.1 sigma: honest 0.247, 3 flippers 0.150, 6 flippers 0.050, 3 colluders -0.440",
    source="docs/theory.md, attackers",
)
def attackers(rng: Generator) -> Finding:
    m = torch.full((_ELEMENTS,), 0.1)
    wrong = torch.full((_ELEMENTS,), -100.0)
    cases = {
        "honest": ([m] * 15, None, {}, 0.247),
        "3 flippers": ([m] * 15, range(3), {"flipping": 3}, 0.150),
        "6 flippers": ([m] * 15, range(6), {"flipping": 6}, 0.050),
        "3 colluders": ([m] * 12 + [wrong] * 3, None, {"colluding": 3}, -0.440),
    }
    found, z, miss = {}, [], 0.0
    for i, (name, (momenta, flip, counts, stated)) in enumerate(cases.items()):
        attacks = {rank: SignFlip() for rank in flip or ()}
        found[name] = float(votes(momenta, seed=i, attacks=attacks).mean())
        flipping, colluding = counts.get("flipping", 0), counts.get("colluding", 0)
        value = vote.expected_vote(0.1, 15, flipping=flipping, colluding=colluding)
        z.append((found[name] - value) / math.sqrt((1 - value**2) / _ELEMENTS))
        miss = max(miss, abs(value - stated))
    return Finding(
        measured=", ".join(f"{name} {value:+.3f}" for name, value in found.items()),
        error=f"largest |z| {max(map(abs, z)):.1f} of 4, {_ELEMENTS:,} real votes each; the formula to {miss:.4f} as "
        "stated",
        verdict=when(max(map(abs, z)) < LIMIT and miss < 6e-4),
        values=found,
    )


@check(
    "vote.colluders",
    "Colluders of share a reverse every coordinate below z* = Phi^-1(1/(2(1 - a))): 0.319 and 0.967 at 3 and 6 of "
    "15, exactly 0.309 and 0.917",
    source="docs/theory.md, attackers; docs/vote-curve.md",
)
def colluders(rng: Generator) -> Finding:
    stated, limits = {3: (0.319, 0.309), 6: (0.967, 0.917)}, {}
    many = {}
    for f in (3, 6):
        limits[f] = (float(ndtri(1 / (2 * (1 - f / 15)))), _reversed_below(15, f))
        many[f] = _reversed_below(900, 60 * f)
    close = all(abs(a - b) < 6e-4 for f in stated for a, b in zip(limits[f], stated[f], strict=True))
    shares = all(abs(vote.colluders_survived(z, 15)[0] - f / 15) < ROUNDING for f, (z, _) in limits.items())
    z = []
    for f, (_, exact) in limits.items():
        momenta = [torch.full((_ELEMENTS,), exact)] * (15 - f) + [torch.full((_ELEMENTS,), -100.0)] * f
        z.append(float(votes(momenta, seed=f).mean()) * math.sqrt(_ELEMENTS))
    return Finding(
        measured="; ".join(
            f"{f} of 15: z* {a:.3f}, exactly {b:.3f}, {60 * f} of 900 {many[f]:.3f}" for f, (a, b) in limits.items()
        ),
        error=f"exact; at the exact values the mean of {_ELEMENTS:,} real votes is 0 with z = {z[0]:+.1f} and "
        f"{z[1]:+.1f}",
        verdict=when(
            close and shares and max(map(abs, z)) < LIMIT and all(abs(many[f] / limits[f][0] - 1) < 0.01 for f in many)
        ),
        detail="z* is the limit of many workers; 15 are few enough that it is 3 to 5 % too large",
        values={str(f): each for f, each in limits.items()},
    )


def _reversed_below(workers: int, colluding: int) -> float:
    """The m / sigma at which the expected vote is 0."""
    return float(brentq(lambda z: vote.expected_vote(z, workers, colluding=colluding), 0.01, 5))


@check(
    "vote.flippers",
    "Workers that flip their own signs must be half of all, at any m/sigma above 0",
    source="docs/theory.md, attackers; Bernstein et al. 2019",
)
def flippers(rng: Generator) -> Finding:
    worst, least = -math.inf, math.inf
    for m in (3, 4, 7, 15, 31):
        for z in (0.01, 0.1, 1.0, 3.0):
            for f in range(m + 1):
                value = vote.expected_vote(z, m, flipping=f)
                if 2 * f < m:
                    least = min(least, value)
                else:
                    worst = max(worst, value)
    return Finding(
        measured=f"least expected vote with fewer than half flipping {least:.1e}, largest with half or more "
        f"{abs(worst):.0e}; M = 3 to 31, m/sigma = 0.01 to 3",
        error="exact",
        verdict=when(least > 0 and worst < ROUNDING),
    )


@check(
    "vote.dither-weakens",
    "Dither weakens the defence of votes that are otherwise free of noise against colluders",
    source="docs/theory.md, attackers; docs/vote-curve.md",
)
def dither_weakens(rng: Generator) -> Finding:
    clean = vote.colluders_survived(math.inf, 15)[1]
    found = {z: vote.colluders_survived(z, 15)[1] for z in (3.0, 1.0, 0.3, 0.1)}
    m = torch.full((_ELEMENTS,), 0.3)
    turned = float(votes([m] * 11 + [torch.full_like(m, -100.0)] * 4, seed=11).mean())
    error = math.sqrt((1 - turned**2) / _ELEMENTS)
    return Finding(
        measured=f"colluders survived by 15 workers: {clean} without noise, "
        + ", ".join(f"{count} at m = {z:g} sigma" for z, count in found.items()),
        error=f"exact; 4 colluders against 11 real votes at m = 0.3 sigma: mean vote {turned:+.3f} ± {error:.3f}",
        verdict=when(clean == 7 and min(found.values()) < clean and turned < -LIMIT * error),
        detail="where gradients are noisy the votes are dithered already, by the data",
        values={str(z): count for z, count in found.items()},
    )


@check(
    "vote.ties",
    "Four workers tie 37 % of the time at m = 0, and an even number of workers is worth one fewer",
    source="docs/theory.md; docs/vote-curve.md",
)
def ties(rng: Generator) -> Finding:
    miss = 0.0
    for m in (2, 4, 10, 100):
        for z in (0.0, 0.1, 1.0):
            miss = max(miss, abs(vote.expected_vote(z, m) - vote.expected_vote(z, m - 1)))
    n = 4 * _ELEMENTS
    # Momenta of 0 are coins: a hair of momentum is a fair dithered sign.
    tied = float((votes([torch.full((n,), 1e-12)] * 4, seed=3, ties="abstain") == 0).double().mean())
    z_score = (tied - 0.375) / math.sqrt(0.375 * 0.625 / n)
    return Finding(
        measured=f"{100 * tied:.2f} % of real votes of 4 tie, by C(4, 2)/16 = 37.50 %; E v of M and M - 1 differ by "
        f"{miss:.0e}",
        error=f"z = {z_score:+.1f}, {n:,} votes; exact",
        verdict=when(abs(z_score) < LIMIT and miss < ROUNDING),
        values={"tied": tied},
    )


@check(
    "vote.variance",
    "Majority vote across M workers reduces the noise by sqrt M: E v >= min(1, sqrt(M) S)/3",
    source="paper, Sec. II, of Bernstein et al. 2018",
    expected=BETTER,
)
def variance(rng: Generator) -> Finding:
    snr = torch.logspace(-3, 1, 120, dtype=torch.float64)
    least, least_gaussian, at = math.inf, math.inf, ""
    for law in symmetric_unimodal():
        for m in (1, 3, 15, 101, 401):
            right = 1 - law.failure(snr)
            # The S of Gaussian votes with the same chance of a right sign.
            same = torch.special.ndtri(right.clamp(max=1 - 1e-12))
            gain = torch.tensor([vote.expected_vote(float(z), m) for z in same], dtype=torch.float64)
            ratio = float((gain / (math.sqrt(m) * snr).clamp(max=1)).min())
            if ratio < least:
                least, at = ratio, f"{law.name}, M = {m}"
            if law.name == "gaussian":
                least_gaussian = min(least_gaussian, ratio)
    return Finding(
        measured=f"smallest E v/min(1, sqrt(M) S) over the symmetric unimodal laws and M = 1 to 401: {least:.3f} "
        f"({at}); Gaussian {least_gaussian:.3f}",
        error="exact",
        verdict=when(least >= 1 / 3 - ROUNDING, better=least > 0.4),
        detail=f"uniform noise and many workers have 2 Phi(1/sqrt 3) - 1 = {math.erf(1 / math.sqrt(6)):.3f}: 1/sqrt 3 "
        "= 0.577 is a worker's constant, not a vote's",
        values={"least": least, "gaussian": least_gaussian},
    )

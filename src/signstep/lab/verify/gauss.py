"""The chance of a wrong sign: eq. (6) and (7), the laws of noise for which they hold, and those for which they do not.

All chances come from the laws' distribution functions; the first check compares these with draws.
"""

from __future__ import annotations

import math

import scipy.optimize
import scipy.stats
import torch
from torch import Generator, Tensor

from signstep.lab.verify.measures import ROUNDING, symmetric_unimodal
from signstep.lab.verify.registry import BETTER, FAILS, LIMIT, Finding, check, when
from signstep.theory import bounds, noise
from signstep.theory.noise import Law

_DRAWS = 1 << 19


def unimodal() -> list[Law]:
    """The symmetric unimodal laws of `signstep.theory.noise`, and three that attain Gauss's inequality."""
    return symmetric_unimodal() + [noise.gauss_extremal(snr) for snr in (1.25, 2.0, 4.0)]


def grid() -> Tensor:
    """S from 0.001 to 30, and the corners of the bounds."""
    corners = torch.tensor([bounds.PAPER_SPLIT, 1.0, bounds.CRITICAL_SNR, 1.25, math.sqrt(3), 2.0, 4.0])
    return torch.cat([torch.logspace(-3, 1.5, 2000, dtype=torch.float64), corners.double()]).sort().values


def weight(snr: Tensor) -> Tensor:
    """min(1, S)."""
    return snr.clamp(max=1)


@check(
    "gauss.laws",
    "The laws that these checks use have mean 0, variance 1 and the stated chances of a wrong sign",
    source="signstep.theory.noise",
)
def laws(rng: Generator) -> Finding:
    snr = torch.tensor([0.05, 0.2, 0.5, 1.0, 2.0], dtype=torch.float64)
    everything = [*noise.LAWS.values(), noise.gauss_extremal(2.0), noise.skewed(16)]
    worst, scores = "", []
    for law in everything:
        x = law.sample([_DRAWS], rng)
        centre = float(x.mean()) * math.sqrt(_DRAWS)
        # The variance of t3 has no finite error: its chances are what counts.
        fourth = float(x.pow(4).mean()) - 1
        spread = 0.0 if law.name == "student-t3" else (float(x.square().mean()) - 1) * math.sqrt(_DRAWS / fourth)
        chance = law.failure(snr)
        found = torch.stack([(x <= -each).double().mean() for each in snr])
        z = (found - chance) / (chance * (1 - chance) / _DRAWS).sqrt().clamp(min=1 / _DRAWS)
        scores.append(max(abs(centre), abs(spread), float(z.abs().max())))
        if scores[-1] == max(scores):
            worst = law.name
    return Finding(
        measured=f"{len(everything)} laws, {_DRAWS:,} draws each: mean, variance and P(wrong sign) at 5 values of S",
        error=f"largest |z| {max(scores):.1f} of {7 * len(everything)}, at {worst}",
        verdict=when(max(scores) < LIMIT),
        values={"z": scores},
    )


@check(
    "gauss.bound",
    "For unimodal symmetric noise p <= 2/(9 S^2) where S > sqrt(2/3), else p <= 1/2 - S/(2 sqrt 3)",
    source="paper, eq. (6)",
)
def bound(rng: Generator) -> Finding:
    snr = grid()
    gaps = {law.name: float((bounds.sign_failure_bound(snr, split=bounds.PAPER_SPLIT) - law.failure(snr)).min())
            for law in unimodal()}  # fmt: skip
    least = min(gaps.values())
    return Finding(
        measured=f"smallest bound - p over {len(gaps)} laws and {len(snr)} values of S: {abs(least):.1e}",
        error=f"exact, to {ROUNDING:g}",
        verdict=when(least > -ROUNDING),
        detail=f"the bound is reached by {', '.join(name for name, gap in gaps.items() if gap < ROUNDING)}",
        values=gaps,
    )


@check(
    "gauss.split",
    "The split at S = sqrt(2/3) is a slight relaxation of Gauss's inequality",
    source="paper, Sec. III, above eq. (6)",
    expected=BETTER,
)
def split(rng: Generator) -> Finding:
    snr = grid()
    paper = bounds.sign_failure_bound(snr, split=bounds.PAPER_SPLIT)
    sharp = bounds.sign_failure_bound(snr)
    at = torch.tensor(bounds.PAPER_SPLIT, dtype=torch.float64)
    below = float(bounds.sign_failure_bound(at, split=bounds.PAPER_SPLIT))
    above = float(bounds.sign_failure_bound(at * (1 + 1e-12), split=bounds.PAPER_SPLIT))
    corner = torch.tensor(bounds.CRITICAL_SNR, dtype=torch.float64)
    jump = float(bounds.sign_failure_bound(corner * (1 + 1e-12)) - bounds.sign_failure_bound(corner))
    true = all(bool((sharp - law.failure(snr) > -ROUNDING).all()) for law in unimodal())
    better = true and bool((sharp <= paper + ROUNDING).all()) and abs(jump) < ROUNDING < above - below
    return Finding(
        measured=f"at sqrt(2/3) the bound jumps up from {below:.3f} to {above:.3f}; split at 2/sqrt 3 it does not "
        "jump, is nowhere larger, and holds for the same laws",
        error=f"exact, to {ROUNDING:g}",
        verdict=BETTER if better else when(not true),
        detail=f"a bound that rises with S is not tight: between {bounds.PAPER_SPLIT:.3f} and "
        f"{bounds.CRITICAL_SNR:.3f} the paper's is up to {float((paper - sharp).max()):.3f} too large. Gauss's split "
        f"is 2/sqrt 3 = {bounds.CRITICAL_SNR:.3f}, where both branches are 1/6 and have one slope",
        values={"below": below, "above": above},
    )


@check(
    "gauss.tight",
    "Split at 2/sqrt 3, the bound is attained at every S; a later split would be false",
    source="docs/theory.md, how often a sign is wrong",
)
def tight(rng: Generator) -> Finding:
    uniform = noise.LAWS["uniform"]
    low = grid()[grid() <= bounds.CRITICAL_SNR]
    high = torch.linspace(bounds.CRITICAL_SNR + 1e-9, 10, 200, dtype=torch.float64)
    misses = [float((uniform.failure(low) - bounds.sign_failure_bound(low)).abs().max())]
    misses += [float((noise.gauss_extremal(float(s)).failure(s) - bounds.sign_failure_bound(s)).abs()) for s in high]
    p, beyond = float(noise.gauss_extremal(1.3).failure(torch.tensor(1.3).double())), 0.5 - 1.3 / (2 * math.sqrt(3))
    return Finding(
        measured=f"largest distance from it: {max(misses):.1e}; by the uniform law up to 2/sqrt 3, above by a law "
        "with an atom at 0 and a uniform part on [-3S/2, 3S/2]",
        error=f"exact, to {ROUNDING:g}",
        verdict=when(max(misses) < ROUNDING and p > beyond),
        detail=f"at S = 1.3 the first branch would be {beyond:.4f}, and that law has p = {p:.4f}",
    )


@check(
    "gauss.derivation",
    "Eq. (6) gives 1 - 2p >= min(1, S)/3 in both regimes",
    source="paper, below eq. (6)",
    expected=BETTER,
)
def derivation(rng: Generator) -> Finding:
    snr = grid()
    least = {}
    for name, at in (("sqrt(2/3)", bounds.PAPER_SPLIT), ("2/sqrt 3", bounds.CRITICAL_SNR)):
        # Just above the split is where the second branch is worst.
        near = torch.cat([snr, torch.tensor([at * (1 + 1e-12)], dtype=torch.float64)])
        least[name] = float(((1 - 2 * bounds.sign_failure_bound(near, split=at)) / weight(near)).min())
    true = min(least.values()) >= 1 / bounds.PAPER_CONSTANT - ROUNDING
    return Finding(
        measured=f"smallest (1 - 2 bound)/min(1, S): {least['sqrt(2/3)']:.3f} with the paper's split, "
        f"{least['2/sqrt 3']:.3f} = 1/sqrt 3 with Gauss's",
        error=f"exact, to {ROUNDING:g}",
        verdict=when(true, better=least["2/sqrt 3"] > 1 / bounds.PAPER_CONSTANT + 0.2),
        detail="the paper's own split already gives 0.408 in place of 1/3",
        values=least,
    )


@check(
    "gauss.constant",
    "For unimodal symmetric noise 1 - 2p >= min(1, S)/3, so E<g, sign g~> >= Phi/3",
    source="paper, eq. (5) and (7)",
    expected=BETTER,
)
def constant(rng: Generator) -> Finding:
    snr = grid()
    least = {law.name: float(((1 - 2 * law.failure(snr)) / weight(snr)).min()) for law in unimodal()}
    worst = min(least, key=least.__getitem__)
    true = least[worst] >= 1 / bounds.PAPER_CONSTANT - ROUNDING
    better = least[worst] >= 1 / bounds.SHARP_CONSTANT - ROUNDING
    return Finding(
        measured=f"smallest (1 - 2p)/min(1, S) over {len(least)} laws: {least[worst]:.4f} ({worst})",
        error=f"exact, to {ROUNDING:g}",
        verdict=when(true, better=better),
        detail=f"1/sqrt 3 = {1 / math.sqrt(3):.4f} holds in place of 1/3",
        values=least,
    )


@check(
    "gauss.mixed-norm",
    "The constant 1/sqrt 3 holds with min(2/sqrt 3, S) for min(1, S): between Phi and it lies the mixed norm of "
    "Bernstein et al. 2019",
    source="docs/theory.md, the constant of (7)",
)
def mixed_norm(rng: Generator) -> Finding:
    snr = grid()
    longer = snr.clamp(max=bounds.CRITICAL_SNR)
    mixed = torch.where(snr > bounds.CRITICAL_SNR, 1.0, snr)
    least = min(float(((1 - 2 * law.failure(snr)) / longer).min()) for law in unimodal())
    order = bool(((weight(snr) <= mixed) & (mixed <= longer)).all())
    return Finding(
        measured=f"smallest (1 - 2p)/min(2/sqrt 3, S) over {len(unimodal())} laws: {least:.4f}",
        error=f"exact, to {ROUNDING:g}",
        verdict=when(order and least >= 1 / bounds.SHARP_CONSTANT - ROUNDING),
    )


@check(
    "gauss.sharp",
    "1/sqrt 3 is the largest constant c with 1 - 2p >= c min(1, S): uniform noise attains it for all S <= 1",
    source="signstep.theory.bounds.SHARP_CONSTANT",
)
def sharp(rng: Generator) -> Finding:
    snr = grid()[grid() <= 1]
    ratio = (1 - 2 * noise.LAWS["uniform"].failure(snr)) / snr
    miss = float((ratio - 1 / bounds.SHARP_CONSTANT).abs().max())
    return Finding(
        measured=f"(1 - 2p)/S of uniform noise: {float(ratio.min()):.6f} to {float(ratio.max()):.6f} for S <= 1",
        error=f"exact, to {ROUNDING:g}",
        verdict=when(miss < ROUNDING),
    )


@check(
    "gauss.minima",
    "The smallest (1 - 2p)/min(1, S) is 0.683 for Gaussian noise, 0.757 for Laplace, 0.818 for Student's t with 3 "
    "degrees",
    source="docs/theory.md, the constant of common laws",
)
def minima(rng: Generator) -> Finding:
    snr, stated = grid(), {"gaussian": 0.683, "laplace": 0.757, "student-t3": 0.818}
    found = {name: float(((1 - 2 * noise.LAWS[name].failure(snr)) / weight(snr)).min()) for name in stated}
    return Finding(
        measured=", ".join(f"{name} {value:.4f}" for name, value in found.items()) + ", all at S = 1",
        error="exact; compared to 0.0005",
        verdict=when(all(abs(found[name] - stated[name]) < 5e-4 for name in stated)),
        values=found,
    )


@check(
    "gauss.bimodal",
    "Eq. (6) without unimodality",
    source="neither: what the assumption of Sec. III is needed for",
    expected=FAILS,
)
def bimodal(rng: Generator) -> Finding:
    snr = torch.tensor([0.3], dtype=torch.float64)
    law, limit = noise.LAWS["bimodal"], float(bounds.sign_failure_bound(snr, split=bounds.PAPER_SPLIT))
    p = float(law.failure(snr))
    whole = grid()
    ratio = float(((1 - 2 * law.failure(whole)) / weight(whole)).min())
    return Finding(
        measured=f"+-0.95 and a narrow Gaussian, S = 0.3: p = {p:.3f} > {limit:.3f}",
        error="exact",
        verdict=when(p <= limit),
        condition="bimodal noise",
        detail=f"(1 - 2p)/min(1, S) falls to {ratio:.3f}. It stays above 0: symmetric noise leaves every sign more "
        "often right than wrong",
        values={"p": p, "bound": limit, "least": ratio},
    )


@check(
    "gauss.skewed",
    "Eq. (6) and (7) without symmetry",
    source="neither: what the assumption of Sec. III is needed for",
    expected=FAILS,
)
def skewed(rng: Generator) -> Finding:
    gain = 1 - 2 * float(noise.LAWS["skewed"].failure(torch.tensor(0.2)))
    exact = 2 * math.exp(-0.8) - 1
    return Finding(
        measured=f"Exp(1) - 1, S = 0.2: 1 - 2p = {gain:+.3f}, so the step climbs",
        error=f"exact: 2 exp(-0.8) - 1 = {exact:.3f}",
        verdict=when(gain >= 0.2 / 3),
        condition="skewed noise",
        values={"gain": gain},
    )


@check(
    "gauss.skew-threshold",
    "A mean of n draws of skewness gamma turns more than half of the signs where S < |gamma|/(6 sqrt n)",
    source="docs/theory.md; signstep.theory.bounds.skew_threshold",
)
def skew_threshold(rng: Generator) -> Finding:
    exact, stated = {}, {}
    for n in (1, 8, 32, 128, 1024):
        # The sign of g > 0 is wrong half of the time where -S is the median.
        exact[n] = (n - float(scipy.stats.gamma.median(n))) / math.sqrt(n)
        stated[n] = bounds.skew_threshold(2.0, n)
    wrong = noise.skewed(128).failure(torch.tensor([0.97, 1.03], dtype=torch.float64) * stated[128]) - 0.5
    right = bool(wrong[0] > 0 > wrong[1])
    off = {n: exact[n] / stated[n] - 1 for n in exact}
    return Finding(
        measured=f"Exp(1) - 1, n = 128: {exact[128]:.5f} exactly, {stated[128]:.5f} predicted; "
        + ", ".join(f"n = {n}: {100 * each:+.2f} %" for n, each in off.items()),
        error="exact; compared to 1 % from n = 8 on, as the first term of an expansion in 1/n",
        verdict=when(right and all(abs(off[n]) < 0.01 for n in off if n >= 8)),
        detail="for one draw it is 0.307 and not 0.333",
        values={str(n): exact[n] for n in exact},
    )


def _threshold(law: Law, low: float, high: float) -> float:
    """The S at which half of the signs are wrong."""
    return float(scipy.optimize.brentq(lambda snr: float(law.failure(torch.tensor(snr).double())) - 0.5, low, high))


@check(
    "gauss.dither-repairs",
    "Gaussian dither repairs the sign of skewed noise: Exp(1) - 1, S = 0.2, sigma = s gives 1 - 2p = +0.047",
    source="docs/theory.md; paper, Sec. IV, does not say so",
)
def dither_repairs(rng: Generator) -> Finding:
    found, thresholds = {}, {}
    for ratio in (0.5, 1.0, 2.0):
        law = noise.LAWS["skewed"].dithered(ratio)
        norm = math.hypot(1, ratio)
        found[ratio] = 1 - 2 * float(law.failure(torch.tensor(0.2 / norm)))
        thresholds[ratio] = _threshold(law, 1e-3, 1.0) * norm
    x = noise.LAWS["skewed"].sample([1 << 20], rng)
    draws = torch.erf((0.2 + x) / math.sqrt(2))
    z = (float(draws.mean()) - found[1.0]) / (float(draws.std()) / 1024)
    gains = ", ".join(f"{gain:+.3f} at sigma = {ratio:g} s" for ratio, gain in found.items())
    return Finding(
        measured=f"1 - 2p: {gains}; without dither "
        f"{1 - 2 * float(noise.LAWS['skewed'].failure(torch.tensor(0.2))):+.3f}",
        error=f"integral to 1e-5; z = {z:+.1f} against {1 << 20:,} draws",
        verdict=when(abs(found[1.0] - 0.047) < 5e-4 and abs(z) < LIMIT),
        detail="dither does not remove the threshold but lowers it: in units of g/s it is 0.307 without and "
        + ", ".join(f"{value:.3f} at {ratio:g} s" for ratio, value in thresholds.items()),
        values={"gains": found, "thresholds": thresholds},
    )


@check(
    "gauss.dithered-threshold",
    "Dither of r = sigma/s lowers the threshold of skewed means to |gamma|/(6 sqrt n (1 + r^2))",
    source="docs/theory.md, dither in Theorem 1",
)
def dithered_threshold(rng: Generator) -> Finding:
    n, off = 32, {}
    for ratio in (0.5, 1.0, 2.0):
        law, norm = noise.skewed(n).dithered(ratio), math.hypot(1, ratio)
        stated = bounds.skew_threshold(2.0, n) / norm**2
        off[ratio] = _threshold(law, 0.5 * stated / norm, 2 * stated / norm) * norm / stated - 1
    return Finding(
        measured=f"Exp(1) - 1, n = {n}: exactly " + ", ".join(f"{100 * e:+.1f} % at r = {r:g}" for r, e in off.items()),
        error="integrals to 1e-5; compared to 2 %, as the first term of an expansion in 1/n",
        verdict=when(max(map(abs, off.values())) < 0.02),
        values={str(r): e for r, e in off.items()},
    )


@check(
    "gauss.sums",
    "Sums of independent symmetric unimodal noise are unimodal, so a batch of any n obeys (6)",
    source="paper, Sec. III, 'applies coordinate-wise'; docs/theory.md, means of a batch",
)
def sums(rng: Generator) -> Finding:
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    # Chances of small cells, which convolve without error.
    cells = {law.name: law.cdf(x + 0.0025) - law.cdf(x - 0.0025) for law in symmetric_unimodal()}
    pairs = [(a, b) for i, a in enumerate(cells) for b in list(cells)[i:]]
    worst = max(_second_mode(_convolve(cells[a], cells[b])) for a, b in pairs)
    # Unimodal, not symmetric: 0.3 uniform on [0, 0.01] and 0.7 on [0, 1].
    lopsided = torch.full((1000,), 0.7 / 1000, dtype=torch.float64)
    lopsided[:10] += 0.03
    lost = _second_mode(_convolve(lopsided, lopsided))
    return Finding(
        measured=f"{len(pairs)} sums of two laws: largest rise away from the mode {worst:.0e} of its height",
        error="rounding of the convolution",
        verdict=when(worst < 1e-10 < lost),
        detail="unimodality alone is lost in sums: 0.3 U(0, 0.01) + 0.7 U(0, 1) added to itself rises again by "
        f"{100 * lost:.0f} % of its mode's height",
        values={"worst": worst, "lost": lost},
    )


def _convolve(a: Tensor, b: Tensor) -> Tensor:
    size = len(a) + len(b) - 1
    product: Tensor = torch.fft.irfft(torch.fft.rfft(a, size) * torch.fft.rfft(b, size), size)
    return product


def _second_mode(density: Tensor) -> float:
    """The largest rise of a density on its way down from the mode, over the mode's height."""
    top = int(density.argmax())
    ways = (density[top:], density[: top + 1].flip(0))
    return max(float((way - way.cummin(0).values).max()) for way in ways) / float(density[top])


@check(
    "gauss.dither-symmetric",
    "Under symmetric unimodal noise Gaussian dither makes no sign more reliable",
    source="docs/theory.md, the dithered corollary",
)
def dither_symmetric(rng: Generator) -> Finding:
    snr = torch.logspace(-2, 1, 60, dtype=torch.float64)
    worst = math.inf
    laws_ = [law for law in unimodal() if not law.name.startswith("Gauss extremal")]
    for law in laws_:
        for ratio in (0.3, 1.0, 3.0):
            change = law.dithered(ratio).failure(snr / math.hypot(1, ratio)) - law.failure(snr)
            worst = min(worst, float(change.min()))
    return Finding(
        measured=f"p never falls: its least change over {len(laws_)} laws, {len(snr)} values of S and 3 of sigma is "
        f"{worst:+.0e}",
        error="integrals to 1e-5",
        verdict=when(worst > -1e-5),
        detail="for each value x of the dither the average chance over x and -x is that of (x - g, x + g) in place "
        "of (-g, g), which a unimodal law makes smaller. So what dither is good for is not in eq. (2)",
        values={"least": worst},
    )


@check(
    "gauss.zero-noise",
    "Eq. (6) and S are defined for every coordinate",
    source="paper, eq. (1) and (6)",
    expected=FAILS,
)
def zero_noise(rng: Generator) -> Finding:
    g = torch.tensor([0.0, 2.0, -3.0], dtype=torch.float64)
    undefined = bool((g.abs() / torch.zeros_like(g)).isnan().any())
    ours = float(bounds.phi(g, torch.zeros_like(g)))
    # Where one draw in ten is not 0, the rest has no sign: p of "not the sign of g" is 0.9 at any S.
    share = 0.1
    s = math.sqrt((1 - share) / share)
    p, limit = 1 - share, float(bounds.sign_failure_bound(torch.tensor(1 / s, dtype=torch.float64)))
    return Finding(
        measured=f"g = s = 0 gives S = 0/0; gradients that are exactly 0 nine times of ten (S = {1 / s:.2f}) have p = "
        f"{p:.2f} > {limit:.2f}",
        error="exact",
        verdict=when(not undefined and p <= limit),
        condition="s = 0 and gradients that are often exactly 0",
        detail=f"signstep.theory.bounds.phi takes |g| where s = 0: {ours:g} for g = (0, 2, -3). With sign 0 = 0, E "
        "sign is the chance of a right sign less that of a wrong one, and (5) holds with half of the zeros counted "
        "as wrong",
        values={"p": p, "bound": limit},
    )

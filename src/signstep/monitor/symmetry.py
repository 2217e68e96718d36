r"""Whether the noise of the gradient is symmetric, as Theorem 1 assumes: a test per coordinate over micro-batches.

With :math:`\bar x` the mean, M the median and :math:`J = \sqrt{\pi/2}\,\frac1N \sum_j |x_j - M|` over the N
micro-batches of a coordinate, the statistic of Miao, Gel and Gastwirth (2006) is

.. math::
    T = \sqrt{\frac{N}{\pi/2 - 1}}\; \frac{\bar x - M}{J}

which is standard normal if the noise is Gaussian and N large. T is compared with two laws; the larger p-value counts:

- the normal law. Alone it would not do: at a level of 5 % it rejects 8 to 10 % of t3 noise, and 35 % of Gaussian noise
  with 60 % zeros.
- the law of T on reflected samples :math:`M \pm (x_j - M)` with random signs, which have the heavy tails and the zeros
  of the coordinate and are symmetric. Each coordinate is reflected four times. The spread of T is pooled over the
  coordinates with the most similar :math:`\mathrm{rms}(x - M) / J`, and the shape of its law over all. Alone it rejects
  9 % of Gaussian noise, because a sample median is nearer to its sample than the true one.

Together, at a level of 5 %, they reject 3 to 5 % of Gaussian, Laplace, t3 and sparse Gaussian noise, and up to 10 % of
uniform noise. The procedure of Benjamini and Hochberg (1995) then bounds the share of false rejections over coordinates
that are independent or positively dependent; after it, 57 % of exponential noise is found at N = 32 and 93 % at N = 64.

Skewed noise does harm where the signal is small: the mean of n draws of skewness gamma has its median at
:math:`-\gamma s / (6 \sqrt n)` from its mean (s: standard deviation of the mean), so its sign is wrong more often than
right where :math:`|g| / s < |\gamma| / (6 \sqrt n)` and g has the sign of gamma.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from signstep.kernels.reference import wide_dtype

__all__ = ["MICRO_BATCHES", "benjamini_hochberg", "symmetry"]

MICRO_BATCHES = 20
"""The fewest that are tested."""

TESTED = 8192
"""The most coordinates that are tested: sorting them takes tenths of a second."""
DIPPED = 1024
REFLECTIONS = 4
NEIGHBOURS = 256
"""Coordinates over which the spread of T on reflected samples is pooled."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def symmetry(rows: Tensor, *, alpha: float = 0.05, dip: bool = False) -> dict[str, Any]:
    """What micro-batches say about the symmetry of the gradient's noise.

    Args:
        rows: float, [N, q]: N micro-batch gradients of equal size on q sampled coordinates. A micro-batch that is not
            finite is left out. At most `TESTED` coordinates, evenly spaced, enter.
        alpha: the share of false rejections to accept, in (0, 1).
        dip: also Hartigan's dip test of unimodality, on at most 1024 coordinates. It needs the package diptest (GPL),
            which signstep does not depend on; without it the advice says so.

    Returns:
        Numbers, None where there is none:

        - micro_batches, coordinates, tested: N, q, and how many coordinates vary at all.
        - zero_share: entries that are exactly 0. constant_share: coordinates that do not vary.
        - rejected_share: tested coordinates whose symmetry is rejected after Benjamini-Hochberg.
        - skewness: quantiles over coordinates; skewness_std: what Gaussian samples of N would scatter by.
        - skew_threshold: median |skewness| / (6 sqrt N), a signal-to-noise ratio of the mean of N. against_share:
          coordinates below their own threshold, with g of skewness's sign.
        - dip_rejected_share: as rejected_share.
        - advice: what follows, in words.

    Raises:
        TypeError: rows is not a float tensor.
        ValueError: rows has not two dimensions, or alpha is out of range.

    Example:
        >>> noise = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
        >>> symmetry(noise)["rejected_share"], symmetry(noise.exp())["rejected_share"] > 0.9
        (0.0, True)
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        found = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows: {found}, expected a float tensor [micro-batches, coordinates]")
    if rows.ndim != 2:
        raise ValueError(f"rows: shape {tuple(rows.shape)}, expected [micro-batches, coordinates]")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}: expected a number in (0, 1)")
    rows = rows.detach()
    finite = rows[rows.isfinite().all(dim=1)]
    count, coordinates = finite.shape
    record: dict[str, Any] = {
        "micro_batches": count,
        "coordinates": coordinates,
        "tested": 0,
        "zero_share": None,
        "constant_share": None,
        "rejected_share": None,
        "skewness": None,
        "skewness_std": None,
        "skew_threshold": None,
        "against_share": None,
        "dip_rejected_share": None,
    }
    if finite.numel() > 0:
        record["zero_share"] = float((finite == 0).to(torch.float32).mean())
    if count < MICRO_BATCHES:
        lost = f" ({len(rows) - count} more were not finite)" if len(rows) > count else ""
        record["advice"] = f"symmetry: needs at least {MICRO_BATCHES} micro-batches, got {count}{lost}"
        return record
    # One row per coordinate: sorting is what takes time.
    x = finite[:, _spread(coordinates, TESTED)].T.to(wide_dtype(finite.device), copy=True)
    means = x.mean(dim=1)
    x -= x[:, :1].clone()  # first, so that a constant is exactly 0
    x -= x.mean(dim=1, keepdim=True)
    scale = x.abs().amax(dim=1)
    varying = scale > 0
    record["tested"] = int(varying.sum())
    record["constant_share"] = 1 - record["tested"] / len(x) if len(x) else None
    if record["tested"] == 0:
        record["advice"] = "symmetry: no sampled coordinate varies between micro-batches"
        return record
    x, means = x[varying] / scale[varying, None], means[varying] / scale[varying]
    rejected = benjamini_hochberg(_p_values(x), alpha)
    record["rejected_share"] = float(rejected.to(torch.float32).mean())
    record |= _skewness(x, means)
    advice = _advice(record, alpha)
    if dip:
        share, said = _dip(x[_spread(len(x), DIPPED)], alpha)
        record["dip_rejected_share"] = share
        advice += said
    record["advice"] = advice
    return record


def benjamini_hochberg(p_values: Tensor, alpha: float) -> Tensor:
    """Which hypotheses are rejected at a false discovery rate of alpha: those up to the last p_(i) <= alpha i / n.

    Args:
        p_values: 1-D.
        alpha: in (0, 1).

    Returns:
        A bool tensor of the same length.

    Example:
        >>> benjamini_hochberg(torch.tensor([0.9, 0.01, 0.03]), 0.05).tolist()
        [False, True, True]
    """
    ordered = p_values.sort().values
    ranks = torch.arange(1, len(ordered) + 1, device=ordered.device, dtype=ordered.dtype)
    below = (ordered <= alpha * ranks / len(ordered)).nonzero()
    if len(below) == 0:
        return torch.zeros_like(p_values, dtype=torch.bool)
    return p_values <= ordered[int(below.max())]


def _spread(size: int, most: int) -> Tensor:
    """At most `most` indices below size, evenly spaced."""
    count = min(size, most)
    return torch.arange(count, device="cpu") * size // max(1, count)


def _median(x: Tensor) -> Tensor:
    """Of each row; of an even number the mean of the two in the middle, unlike torch.median."""
    ordered = x.sort(dim=1).values
    count = x.shape[1]
    return (ordered[:, (count - 1) // 2] + ordered[:, count // 2]) / 2


def _statistic(x: Tensor, median: Tensor) -> Tensor:
    """T of each row; 0 where nothing varies."""
    spread = math.sqrt(math.pi / 2) * (x - median[:, None]).abs().mean(dim=1)
    t = math.sqrt(x.shape[1] / (math.pi / 2 - 1)) * (x.mean(dim=1) - median) / spread
    return torch.where(spread > 0, t, 0.0)


def _p_values(x: Tensor) -> Tensor:
    """Of each row, two-sided: the larger of the normal law's and that of reflected samples."""
    median = _median(x)
    t = _statistic(x, median).abs()
    residuals = x - median[:, None]
    # A seed of its own: the same rows give the same answer, and no generator of the training moves.
    generator = torch.Generator(x.device).manual_seed(0)
    reflected = []
    for _ in range(REFLECTIONS):
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device, dtype=torch.int8) * 2 - 1
        sample = residuals * signs
        reflected.append(_statistic(sample, _median(sample)).abs())
    null = torch.stack(reflected)
    tails = residuals.square().mean(dim=1).sqrt() / residuals.abs().mean(dim=1)
    spreads = torch.empty_like(t)
    for alike in torch.split(tails.argsort(), NEIGHBOURS):
        spreads[alike] = null[:, alike].square().mean().sqrt()
    spreads = spreads.clamp(min=1e-9)
    law = (null / spreads).flatten().sort().values
    as_large = len(law) - torch.searchsorted(law, t / spreads)
    return torch.maximum(torch.erfc(t / math.sqrt(2)), (1 + as_large) / (1 + len(law)))


def _skewness(x: Tensor, means: Tensor) -> dict[str, Any]:
    """The entries of the record about skewness; rows of x have mean 0."""
    count = x.shape[1]
    variance = x.square().mean(dim=1)
    skew = x.pow(3).mean(dim=1) / variance.pow(1.5)
    snr = means / (variance * count / (count - 1)).sqrt() * math.sqrt(count)
    threshold = skew / (6 * math.sqrt(count))
    against = (snr * threshold > 0) & (snr.abs() < threshold.abs())
    quantiles = torch.quantile(skew, torch.tensor(QUANTILES, dtype=skew.dtype, device=skew.device)).tolist()
    return {
        "skewness": {f"q{round(100 * q):02d}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
        "skewness_std": math.sqrt(6 * (count - 2) / ((count + 1) * (count + 3))),
        "skew_threshold": float(threshold.abs().median()),
        "against_share": float(against.to(torch.float32).mean()),
    }


def _advice(record: dict[str, Any], alpha: float) -> str:
    count, share, zeros = record["micro_batches"], record["rejected_share"], record["zero_share"]
    of = f"{share:.0%} of {record['tested']} coordinates"
    threshold = record["skew_threshold"]
    if share == 0:
        said = (
            f"symmetry: not rejected in any of {record['tested']} coordinates (false discovery rate {alpha:.0%}), from "
            f"{count} micro-batches"
        )
    elif share < 0.1:
        said = (
            f"symmetry: rejected in {of}; Theorem 1's assumption fits the others, as far as {count} micro-batches say"
        )
    else:
        said = (
            f"symmetry: rejected in {of}; a mean of {count} micro-batches has the wrong sign more often than the right "
            f"one where its signal-to-noise ratio is below about {threshold:.2g} (median |skewness| / (6 sqrt {count})"
            f"): 4 times the batch halves that, and dither_scale='relative', dither=1.0, dither_decay=0.0 makes the "
            "noise more symmetric"
        )
    if zeros is not None and zeros >= 0.3:
        said += f"; {zeros:.0%} of the entries are exactly 0"
    return said


def _dip(x: Tensor, alpha: float) -> tuple[float | None, str]:
    """Share of rows whose unimodality is rejected, and a sentence about it."""
    try:
        diptest = importlib.import_module("diptest")
    except ImportError:
        return None, "; unimodality not tested: the package diptest is not installed"
    p = [float(diptest.diptest(row.cpu().numpy())[1]) for row in x]
    share = float(
        benjamini_hochberg(torch.tensor(p, dtype=torch.float64, device="cpu"), alpha).to(torch.float32).mean()
    )
    return share, f"; unimodality rejected in {share:.0%} of {len(x)} coordinates (dip test, conservative)"

"""What an own step's rows say of the sign: `signstep.theory.stationarity`, per layer and over all coordinates.

Rows are micro-batches scaled to the gradient of the step, so that all sums have the units of the gradient that the
optimizer sees. S of the whole step's gradient, the mean of N micro-batches, is larger by sqrt(N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from signstep.monitor.sampling import Columns
from signstep.theory import stationarity
from signstep.theory.bounds import CRITICAL_SNR, PAPER_CONSTANT
from signstep.theory.stationarity import Estimate

SNR_EDGES = tuple(10 ** (k / 4) for k in range(-12, 9))
"""Bins of the histogram of S, from 1e-3 to 100."""
_ALARM = 0.025  # chance of a false alarm per record, and over all layers of a record
_LAYERS = 8  # micro-batches below which an interval's ends are too uncertain to be widened for the number of layers


def reliability(rows: Tensor, columns: Sequence[Columns], *, micro_batches: int) -> dict[str, Any]:
    """The part "reliability" of a record, without and with "layers".

    Args:
        rows: [N, q], finite, with the units of the step's gradient.
        columns: what they are of.
        micro_batches: those in a step's gradient, all ranks together.

    Returns:
        Of all coordinates and, under "layers", of each parameter, [value, low, high] of `alignment` (sum |g| (1 - 2p)),
        `phi`, `margin` (alignment - phi / 3), `reliability` (rms 1 - 2p) and `snr`, for one micro-batch; `ratio`, the
        alignment over phi / 3; the shares of coordinates with S below 2 / sqrt 3 in a micro-batch (`below_critical`)
        and in a step (`below_critical_step`), by their estimated S; the share of entries that are exactly 0 (`zeros`).
        Of all coordinates, `snr_histogram`: their shares by estimated S over `SNR_EDGES`, first that of S^2 <= 0, last
        that beyond the last edge. `alarms` are sentences.
    """
    if len(rows) < stationarity.MIN_ROWS:
        return {
            "reason": f"{len(rows)} usable micro-batches in this step: at least {stationarity.MIN_ROWS} are needed, by "
            "accumulation, over ranks, or with monitor.measure(...)"
        }
    rows = rows.double()
    weights = torch.cat([torch.full((c.sampled,), c.numel / max(1, c.sampled)) for c in columns]).to(rows)
    squared = stationarity.snr_squared(rows)
    found = _of(rows, weights, squared, micro_batches)
    edges = torch.tensor((0.0, *(e * e for e in SNR_EDGES)), dtype=rows.dtype, device=rows.device)
    shares = torch.zeros(len(edges) + 1, dtype=rows.dtype, device=rows.device)
    shares.index_add_(0, torch.bucketize(_known(rows, squared), edges), weights / weights.sum())
    found["snr_histogram"] = shares.tolist()
    found["layers"] = {
        c.name: _of(rows[:, c.where], weights[c.where], squared[c.where], micro_batches) for c in columns if c.sampled
    }
    found["alarms"] = _alarms(found, len(rows))
    return found


def _of(rows: Tensor, weights: Tensor, squared: Tensor, micro_batches: int) -> dict[str, Any]:
    estimates: dict[str, Estimate] = {
        name: getattr(stationarity, name)(rows, weights=weights)
        for name in ("alignment", "phi", "margin", "reliability", "snr")
    }
    numbers: dict[str, Any] = {name: _triple(e) for name, e in estimates.items()}
    phi, aligned = float(estimates["phi"].value), float(estimates["alignment"].value)
    numbers["ratio"] = aligned / (phi / PAPER_CONSTANT) if phi > 0 else None
    known = _known(rows, squared)
    total = weights.sum()
    for name, times in (("below_critical", 1), ("below_critical_step", micro_batches)):
        numbers[name] = float(weights[known * times < CRITICAL_SNR**2].sum() / total)
    numbers["zeros"] = float(((rows == 0).double().mean(0) * weights).sum() / total)
    return numbers


def _known(rows: Tensor, squared: Tensor) -> Tensor:
    """S^2 where rows that all agree, which have no noise, have infinity, or 0 where they are all 0."""
    return torch.where(squared.isfinite(), squared, torch.where((rows == 0).all(0), 0.0, math.inf))


def _triple(estimate: Estimate) -> list[float | None]:
    values = [float(x) for x in (estimate.value, estimate.low, estimate.high)]
    return [x if math.isfinite(x) else None for x in values]


def _alarms(found: dict[str, Any], rows: int) -> list[str]:
    alarms = []
    aligned, bound = found["alignment"][0], found["phi"][0]
    high = found["margin"][2]
    if high is not None and high < 0:
        alarms.append(
            f"inequality (7) is violated: the sign of a micro-batch takes {aligned:.3g} off the loss per unit of "
            f"learning rate, less than Phi/3 = {bound / PAPER_CONSTANT:.3g}: the noise is not symmetric and unimodal"
        )
    layers = found["layers"] if rows >= _LAYERS else {}
    # Half-widths are those of one interval; of this many, none should be below 0 by chance.
    normal = torch.special.ndtri(torch.tensor([1 - _ALARM / max(1, len(layers)), 1 - _ALARM], dtype=torch.float64))
    wider = float(normal[0] / normal[1])
    below = [
        name
        for name, layer in layers.items()
        if None not in layer["margin"] and layer["margin"][0] + wider * (layer["margin"][2] - layer["margin"][0]) < 0
    ]
    if below:
        first = ", ".join(below[:3]) + (", ..." if len(below) > 3 else "")
        alarms.append(f"inequality (7) is violated in {len(below)} of {len(layers)} layers: {first}")
    if aligned is not None and found["alignment"][2] < 0:
        alarms.append("the sign of a micro-batch points uphill: larger batches, or dither, which averages the skew out")
    return alarms

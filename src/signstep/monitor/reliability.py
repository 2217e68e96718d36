"""How far signs can be trusted, per layer and over all coordinates: the part "reliability" of a record.

The estimators are those of `signstep.theory.stationarity`. A row is the gradient of a micro-batch, scaled so that all
sums have the units of the gradient that the optimizer sees. That gradient is a mean of N micro-batches, and its S is
larger than theirs by sqrt(N).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from signstep.monitor.sampling import Columns
from signstep.theory import stationarity
from signstep.theory.bounds import CRITICAL_SNR, PAPER_CONSTANT
from signstep.theory.stationarity import Estimate, Pairs

SNR_EDGES = tuple(10 ** (k / 4) for k in range(-12, 9))
"""Bins of the histogram of S, from 1e-3 to 100."""
_ALARM = 0.025  # chance of a false alarm per record, and over all layers of a record
_LAYERS = 8  # micro-batches below which an interval's ends are too uncertain to be widened for the number of layers


def reliability(rows: Tensor, columns: Sequence[Columns], *, micro_batches: int) -> dict[str, Any]:
    """The part "reliability" of a record, without and with "layers".

    Args:
        rows: [N, q], finite, in the units of the step's gradient.
        columns: which coordinates the columns of `rows` are.
        micro_batches: how many there are in a step's gradient, on all ranks together.

    Returns:
        For all coordinates and, under "layers", for each parameter:

        - [value, low, high] of `alignment` (sum |g| (1 - 2p)), `phi`, `margin` (alignment - phi / 3), `reliability`
          (rms 1 - 2p) and `snr`, of one micro-batch
        - `ratio`: the alignment over phi / 3
        - `below_critical`, `below_critical_step`: the share of coordinates whose estimated S is below 2 / sqrt 3, in a
          micro-batch and in a step
        - `zeros`: the share of entries that are exactly 0

        For all coordinates only, `snr_histogram`: their shares by estimated S over `SNR_EDGES`; the first is that of
        S^2 <= 0, the last that beyond the last edge. `alarms` are sentences.
    """
    if len(rows) < stationarity.MIN_ROWS:
        return {
            "reason": f"{len(rows)} usable micro-batches in this step: at least {stationarity.MIN_ROWS} are needed, by "
            "accumulation, over ranks, or with monitor.measure(...)"
        }
    edges = torch.tensor((0.0, *(e * e for e in SNR_EDGES)), dtype=torch.float64, device=rows.device)
    shares = torch.zeros(len(edges) + 1, dtype=torch.float64, device=rows.device)
    layers = {}
    whole: _Block | None = None
    # One parameter after the other, because float64 copies of all rows would take several times their memory.
    for c in columns:
        if c.sampled == 0:
            continue
        block, known = _block(rows[:, c.where].double(), c.numel / c.sampled, micro_batches)
        shares.index_add_(0, torch.bucketize(known, edges), torch.full_like(known, c.numel / c.sampled))
        layers[c.name] = _numbers(block)
        whole = block if whole is None else whole.plus(block)
    assert whole is not None
    found = _numbers(whole)
    found["snr_histogram"] = (shares / shares.sum()).tolist()
    found["layers"] = layers
    found["alarms"] = _alarms(found, len(rows))
    return found


@dataclass(frozen=True)
class _Block:
    """Sums over coordinates; those of disjoint sets add up."""

    pairs: Pairs
    counts: Tensor
    """How many coordinates have S below the critical one in a micro-batch, how many in a step, and how many entries of
    a row are 0 on average."""

    def plus(self, other: _Block) -> _Block:
        return _Block(self.pairs + other.pairs, self.counts + other.counts)


def _block(rows: Tensor, weight: float, micro_batches: int) -> tuple[_Block, Tensor]:
    """The sums of a parameter, each of whose columns stands for `weight` coordinates, and S^2 of its columns."""
    known = _known(rows, stationarity.snr_squared(rows))
    critical = CRITICAL_SNR**2
    counts = [(known < critical).sum(), (known * micro_batches < critical).sum(), (rows == 0).double().mean(0).sum()]
    weights = torch.full((rows.shape[1],), weight, dtype=rows.dtype, device=rows.device)
    return _Block(Pairs.of(rows, weights), weight * torch.stack([c.double() for c in counts])), known


def _numbers(block: _Block) -> dict[str, Any]:
    pairs = block.pairs
    estimates = {
        "alignment": pairs.alignment(),
        "phi": pairs.phi(),
        "margin": pairs.margin(),
        "reliability": pairs.reliability(),
        "snr": pairs.snr(),
    }
    numbers: dict[str, Any] = {name: _triple(e) for name, e in estimates.items()}
    phi, aligned = float(estimates["phi"].value), float(estimates["alignment"].value)
    numbers["ratio"] = aligned / (phi / PAPER_CONSTANT) if phi > 0 else None
    shares = (block.counts / pairs.coordinates).tolist()
    return numbers | dict(zip(("below_critical", "below_critical_step", "zeros"), shares, strict=True))


def _known(rows: Tensor, squared: Tensor) -> Tensor:
    """S^2 without NaN: where all rows agree there is no noise, so it is infinite, or 0 if they are all 0."""
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
    # Each half-width is that of a single interval; it is widened so that no layer falls below 0 by chance.
    normal = torch.special.ndtri(
        torch.tensor([1 - _ALARM / max(1, len(layers)), 1 - _ALARM], dtype=torch.float64, device="cpu")
    )
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

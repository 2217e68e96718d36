"""Votes on given momenta, through the ballots and kernels that a training's votes are made of; nothing is trained.

All workers have the same momentum m, and each has its own noise: this measures what dither and counting do. With
q = Phi(m / sigma), the formula is E v = P(B > M/2) - P(B < M/2), B binomial with M trials of chance q.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from signstep.distributed.attacks import Attack
from signstep.distributed.simulation import SimulatedVote
from signstep.optim import SignSGD
from signstep.theory.vote import expected_vote

RATIOS = tuple(k / 10 for k in range(11)) + tuple(k / 4 for k in range(5, 9))
"""The values of m / sigma that `measure_vote` takes."""


@dataclass(frozen=True)
class MeasuredVote:
    """The mean votes of one number of workers."""

    workers: int
    dither_workers: str
    votes: tuple[float, ...]
    """Mean vote at each of `RATIOS`."""
    errors: tuple[float, ...]
    """Its standard error, by the formula: sqrt((1 - (E v)^2) / n)."""
    formula: tuple[float, ...]
    """The expected vote at each of `RATIOS`."""

    @property
    def scores(self) -> list[float]:
        """The distance of each mean vote from the formula, in standard errors."""
        return [(v - f) / max(e, 1e-6) for v, e, f in zip(self.votes, self.errors, self.formula, strict=True)]

    @property
    def worst(self) -> float:
        """The largest of these distances."""
        return max(map(abs, self.scores))


def dithered_votes(
    momenta: Sequence[Tensor],
    *,
    seed: int,
    ties: str = "random",
    dither_workers: str = "independent",
    attacks: Mapping[int, Attack] | None = None,
) -> Iterator[Tensor]:
    """Votes of workers that have these momenta at each step, dithered at sigma = 1; each vote has new noise.

    Args:
        momenta: one tensor for each worker, all of one shape.
        seed: of noise and coins.
        ties: as in `MajorityVote`.
        dither_workers: as in `MajorityVote`; sigma is that before scaling.
        attacks: by rank, of workers that are not honest.

    Yields:
        Votes between -1 and 1, of the momenta's shape, without end.
    """
    model = nn.Module()
    model.register_parameter("x", nn.Parameter(torch.zeros_like(momenta[0])))
    optimizer = SignSGD(model.parameters(), momentum=0.0, dither=1.0, dither_decay=0.0, seed=seed)
    simulated = SimulatedVote(model, optimizer, len(momenta), ties=ties, dither_workers=dither_workers, attacks=attacks)
    while True:
        simulated.vote([{"x": m} for m in momenta])
        votes = model.get_parameter("x").grad
        assert votes is not None
        yield votes
        optimizer.step()


def measure_vote(workers: int, dither_workers: str, *, elements: int, steps: int, seed: int = 0) -> MeasuredVote:
    """Vote on momenta of RATIOS times sigma.

    Args:
        workers: M.
        dither_workers: "independent" or "scaled", as in `MajorityVote`; sigma is that before scaling.
        elements: coordinates at each ratio and step.
        steps: votes, each with new noise.
        seed: of noise and coins.

    Example:
        >>> round(measure_vote(3, "independent", elements=2000, steps=1).formula[5], 3)
        0.546
    """
    momentum = torch.tensor(RATIOS, dtype=torch.float32, device="cpu")[:, None].expand(-1, elements).contiguous()
    drawn = dithered_votes([momentum] * workers, seed=seed, dither_workers=dither_workers)
    total = torch.zeros(len(RATIOS), dtype=torch.float64, device="cpu")
    for _, votes in zip(range(steps), drawn, strict=False):
        total += votes.sum(dim=1, dtype=torch.float64)
    n = elements * steps
    formula = tuple(formula_vote(ratio, workers, scaled=dither_workers == "scaled") for ratio in RATIOS)
    errors = tuple(math.sqrt(max(0.0, 1 - f * f) / n) for f in formula)
    return MeasuredVote(workers, dither_workers, tuple((total / n).tolist()), errors, formula)


def formula_vote(ratio: float, workers: int, *, scaled: bool) -> float:
    """The expected vote at m / sigma, sigma before scaling; `scaled` as dither_workers="scaled"."""
    return expected_vote(ratio / math.sqrt(workers) if scaled else ratio, workers)
